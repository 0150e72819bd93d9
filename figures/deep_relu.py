"""Deep ReLU chains: what was found below deep neural collapse (DNC) over K, L and lambda, explicit and polished solutions, descent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import plots, sweep

STUDY = "deep_relu"
COLUMNS = ("panel", "origin", "K", "n", "depth", "width", "loss", "lam", "starts", "steps", "dnc", "linear", "explicit", "zero", "below")
SEARCH = (
    "down",
    "shares",
    "values",
    "ratios",
    "gradients",
    "subgradients",
    "kinks",
    "spread",
    "ranks",
    "spectra",
    "stalled",
    "below_low",
    "below_high",
)
DESCENT = ("step_numbers", "paths", "end_ratios", "mean_rank", "mean_rank_error", "dnc_share", "dnc_share_low", "dnc_share_high")
LOSSES = {"MSE": "squared error", "CE": "cross-entropy"}
OKABE = plots.style.OKABE_ITO
COLOURS = ("black", OKABE["blue"], OKABE["orange"], OKABE["green"], OKABE["vermillion"], OKABE["purple"])
LOOKS = dict(enumerate(zip(COLOURS, "vos^Dv", strict=True), start=2))  # by depth
ORIGINS = {
    "graph": "graph solution",
    "code": "nonnegative T(r)",
    "pairs": "shifted pairs",
    "random": "random starts",
    "deepened": "the best of L = 4, deepened",
}
SHOWN = {"MSE": ("graph", 4), "CE": ("code", 3)}  # explicit solution and depth in the figure of solutions
RATIO = "value over DNC's"
UNPROVEN = "not below DNC"

Row = dict[str, Any]


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, (*COLUMNS, *SEARCH, *DESCENT))
    return stored.write({"deep_relu": found(table), "deep_relu_solutions": solutions(table), "deep_relu_descent": descents(table)}, out)


def rows_of(table: sweep.Table, **equal: Any) -> list[Row]:
    """The rows with these values, as dictionaries."""
    own = stored.pick(table, STUDY, **equal)
    columns = {name: own.values(name) for name in own.names}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(own))]


def best(rows: list[Row]) -> dict[tuple[int, int], list[Row]]:
    """(K, L) -> its rows, all origins."""
    keys = sorted({(row["K"], row["depth"]) for row in rows})
    return {key: [row for row in rows if (row["K"], row["depth"]) == key] for key in keys}


def found(table: sweep.Table) -> stored.Drawing:
    """The best value found over (K, L) at the middle lambda, and over lambda at one K."""
    rows = {loss: rows_of(table, panel="search", loss=loss) for loss in LOSSES}
    first = rows["MSE"][0]
    share = first["shares"][first["down"]]
    random = [row for row in rows["MSE"] if row["origin"] == "random"] or rows["MSE"]
    K = max(k for k in {row["K"] for row in rows["MSE"]} if k <= 10)
    most = 100 * max(abs(row["ratios"][row["down"]] - 1) for own in rows.values() for row in own if row["ratios"][row["down"]] < 1.1)
    panels = [
        [margins(rows[loss], f"{name}, " + rf"$\lambda={share:g}\,\lambda_{{\max}}$", most, loss == "CE") for loss, name in LOSSES.items()],
        [over_lambda(rows[loss], K, f"{name}, $K={K}$") for loss, name in LOSSES.items()],
    ]
    caption = (
        r"ReLU chains, $n=1$, $d=2K$, one penalty $\lambda$ on every factor; $\lambda_{\max}$: the largest at which DNC, the orthogonal "
        "frame, is critical. Best value found from the explicit graph solution, nonnegative T(r) and shifted pairs ("
        f"{min(row['starts'] for row in rows['MSE'])} starts each) and from {max(row['starts'] for row in random)} random starts "
        rf"($K\leq {max(row['K'] for row in random)}$; deeper than $L=4$ also from the best of $L=4$ with a layer "
        rf"more at a time), polished by L-BFGS (at most {first['steps']} steps), over DNC's exact value. "
        "Each is the value of explicit factors, so below DNC is proven; how far the optimum lies below, is not: minima lie at kinks of "
        "the ReLU, where no gradient is zero (what each point is worth: the interactive figure). Red, hollow: nothing below DNC was "
        "found; blank: not searched. Curves end where zero is lower."
    )
    return stored.Drawing(panels, "What lies below deep neural collapse in deep ReLU chains", caption, height=5.0, ncols=6)


def margins(rows: list[Row], title: str, most: float, bar: bool) -> plots.Matrix:
    """100 (best/DNC - 1) at the middle lambda, rows L, columns K, coloured up to -+ most."""
    cells = best(rows)
    classes, depths = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.full((len(depths), len(classes)), np.nan)
    hover = np.full(values.shape, "not computed", dtype=object)
    for (K, L), own in cells.items():
        at = depths.index(L), classes.index(K)
        low = min(own, key=lambda row: row["ratios"][row["down"]])
        values[at] = 100 * (low["ratios"][low["down"]] - 1)
        hover[at] = "\n".join([told(low, low["down"]), *(origin(row) for row in own)])
    return plots.Matrix(
        values=values,
        title=title,
        labels=("classes $K$", "depth $L$"),
        limits=(-most, most),
        names=([str(K) for K in classes], [str(L) for L in depths]),
        bar="value against DNC's, %" if bar else "",
        hover=hover,
    )


def over_lambda(rows: list[Row], K: int, title: str) -> plots.Curves:
    """The best ratio over lambda, a curve a depth."""
    curves = []
    cells = {L: own for (k, L), own in best(rows).items() if k == K}
    for L, own in cells.items():
        colour, marker = LOOKS[L]
        which = np.argmin([row["ratios"] for row in own], axis=0)
        picked = [own[i] for i in which]
        alive = np.array([row["values"][s] < row["zero"][s] * (1 - 1e-6) for s, row in enumerate(picked)])
        ratio = np.where(alive, [row["ratios"][s] for s, row in enumerate(picked)], np.nan)
        hover = [told(row, s) for s, row in enumerate(picked)]
        curves.append(plots.Curve(own[0]["shares"], ratio, ratio, ratio, f"$L={L}$", colour, marker, ~(ratio >= 1 - 1e-9), hover))
    low = min((float(np.nanmin(curve.y, initial=1.0)) for curve in curves), default=0.0)
    labels = (r"$\lambda/\lambda_{\max}$ of DNC", RATIO)
    high = max((float(np.nanmax(curve.y, initial=1.0)) for curve in curves), default=1.0)
    return plots.Curves(curves, title=title, labels=labels, limits=(low - 0.03, max(1.06, high + 0.03)), hollow=UNPROVEN)


def told(row: Row, s: int) -> str:
    """What a search found at its share number s, for the interactive figure."""
    return (
        f"K = {row['K']}, L = {row['depth']}, d = {row['width']}, λ = {row['lam'][s]:.4g} = {row['shares'][s]:g} λ_max\n"
        f"value {row['values'][s]:.6g} from {ORIGINS[row['origin']]}, ratio to DNC {row['ratios'][s]:.5f}; zero {row['zero'][s]:.4g}\n"
        f"ranks (features, before and after each ReLU, logits): {', '.join(f'{r:g}' for r in row['ranks'][s][: 2 * row['depth']])}\n"
        f"pre-activations at a kink {row['kinks'][s]:.0%}, scale-free gradient {row['gradients'][s]:.1e}\n"
        f"shortest mean of nearby gradients {row['subgradients'][s]:.1e}; "
        f"next best run {row['spread'][s]:.1e} above; {'no step decreases it' if row['stalled'][s] else 'stopped at the most steps'}"
    )


def origin(row: Row) -> str:
    """One line on where a search began and ended, at the middle lambda."""
    s, n = row["down"], row["starts"]
    explicit = f", explicit {row['explicit'][s] / row['dnc'][s]:.4f}" if np.isfinite(row["explicit"][s]) else ""
    return f"{ORIGINS[row['origin']]}: {row['ratios'][s]:.4f}{explicit}; {row['below'] * n:.0f} of {n} starts below DNC before polishing"


def solutions(table: sweep.Table) -> stored.Drawing:
    """Explicit and polished graph solutions over K; the spectra and the logits of two of them."""
    panels: list[list[Any]] = [[], []]
    for loss, (begun, depth) in SHOWN.items():
        rows = rows_of(table, panel="search", loss=loss, origin=begun)
        row = min(rows, key=lambda r: (abs(r["K"] - 10), abs(r["depth"] - depth)))
        panels[0].append(ratios(rows, f"{LOSSES[loss]}, {ORIGINS[begun]}"))
        panels[1].append(spectrum(row, f"{loss}, $K={row['K']}$, $L={row['depth']}$", loss == "CE"))
    caption = (
        "Top: value over DNC's at a tenth of the largest $\\lambda$ at which DNC is critical: explicit solutions (classes are the edges of "
        "a complete graph, $K=r(r-1)/2$), and the same after polishing. Bottom: singular values of the "
        "polished solution, layer by layer: features $H$, before and after each ReLU, logits $Z$; below $10^{-6}$ of the largest in the "
        "darkest colour."
    )
    return stored.Drawing(panels, "Graph solutions of deep ReLU chains, explicit and polished", caption, height=5.0, ncols=6)


def ratios(rows: list[Row], title: str) -> plots.Curves:
    """Explicit and polished ratios over K, for three depths."""
    curves = []
    for L in sorted({row["depth"] for row in rows})[:3]:
        colour, marker = LOOKS[L]
        own = sorted((row for row in rows if row["depth"] == L), key=lambda row: row["K"])
        K = np.array([row["K"] for row in own])
        hover = [told(row, row["down"]) for row in own]
        explicit = [row["explicit"][row["down"]] / row["dnc"][row["down"]] for row in own]
        curves.append(plots.Curve(K, explicit, explicit, explicit, f"$L={L}$, explicit", colour, "", dash=(2.0, 1.0)))
        y = np.array([row["ratios"][row["down"]] for row in own])
        curves.append(plots.Curve(K, y, y, y, f"$L={L}$, polished", colour, marker, y < 1 - 1e-9, hover))
    low = min(float(curve.y.min()) for curve in curves)
    classes = sorted({row["K"] for row in rows})
    high = max(float(curve.y.max()) for curve in curves)
    limits = low - 0.03, max(high, 1.0) + 0.03
    return plots.Curves(curves, title=title, labels=("classes $K$", RATIO), limits=limits, ticks=classes, hollow=UNPROVEN)


def spectrum(row: Row, title: str, bar: bool) -> plots.Matrix:
    """Singular values of the layers, over the largest of each; one bar for the panels of a row."""
    L = row["depth"]
    s = np.asarray(row["spectra"], dtype=np.float64)[: 2 * L, : row["K"]]
    layers = ["$H$", *(f"{part}{layer}" for layer in range(1, L) for part in ("pre ", "post ")), "$Z$"]
    return plots.Matrix(
        values=s / np.maximum(s[:, :1], 1e-300),
        title=title,
        labels=("singular value", "layer"),
        colours="log",
        limits=(1e-6, 1.0),
        names=([str(i + 1) for i in range(s.shape[1])], layers),
        bar="over the largest" if bar else "",
    )


def descents(table: sweep.Table) -> stored.Drawing:
    """Gradient descent at the papers' settings, and where it ends over width and lambda."""
    width, lam, ce = (rows_of(table, panel=name) for name in ("width", "lambda", "cross-entropy"))
    squared = min(width, key=lambda row: abs(row["width"] - 30))
    panels = [
        [ends(width, "width", "width $d$", "over the width", True), paths(squared, "squared error"), paths(ce[0], "cross-entropy")],
        [
            ends(lam, "lam", r"$\lambda$", r"over $\lambda$: rank", False),
            spectrum(squared, "its best seed", False),
            spectrum(ce[0], "its best seed", True),
        ],
    ]
    caption = (
        rf"Gradient descent, step {squared['step']:g}, from $N(0,1/d)$, $K={squared['K']}$, $n={squared['n']}$; squared error: "
        rf"$L={squared['depth']}$, $d={squared['width']}$, $\lambda={squared['lam']:g}$ (Súkeník et al. 2024, Fig. 2); cross-entropy: "
        rf"$L={ce[0]['depth']}$, $d={ce[0]['width']}$, $\lambda=2^{{{np.log2(ce[0]['lam']):g}}}$ (Garrod & Keating 2025, Fig. 6); "
        f"{squared['starts']} seeds, {squared['steps']} steps, then L-BFGS; ends are not certified: kinks leave "
        "no gradient to vanish. Left, squared error: shares of seeds whose value ends within $10^{-3}$ of "
        "DNC's and more than that below (bands: 95 % Wilson intervals); mean rank of the class means before the last ReLU (bands: 1.96 "
        "standard errors)."
    )
    return stored.Drawing(panels, "Where gradient descent ends in deep ReLU chains", caption, height=5.0, ncols=5)


def paths(row: Row, title: str) -> plots.Curves:
    """Values of all seeds over the steps, with the closed-form levels."""
    steps, values = np.asarray(row["step_numbers"], dtype=np.float64), np.asarray(row["paths"], dtype=np.float64)
    curves = [
        plots.Curve(steps, path, path, path, "a seed" if b == 0 else "", OKABE["sky"], "", hover=[f"seed {b}"] * len(steps))
        for b, path in enumerate(values)
    ]
    names = [("dnc", "DNC", "black", ()), ("explicit", "graph solution", OKABE["vermillion"], (4.0, 1.5))]
    if row["loss"] == "CE":
        names.append(("linear", "linear DNC", OKABE["blue"], (1.0, 1.0)))
    for name, label, colour, dash in names:
        level = float(row[name]) if row[name] is not None else np.nan
        if np.isfinite(level):
            curves.append(plots.Curve(steps[[0, -1]], [level] * 2, [level] * 2, [level] * 2, label, colour, "", dash=dash))
    top = 1.5 * float(row["dnc"])
    return plots.Curves(curves, title=title, labels=("step", "value"), log=(False, False), limits=(0.75 * float(row["dnc"]), top))


def ends(rows: list[Row], x: str, label: str, title: str, shares: bool) -> plots.Curves:
    """Shares of seeds at and below DNC, or the mean rank with its error."""
    rows = sorted(rows, key=lambda row: row[x])
    at = np.array([row[x] for row in rows], dtype=np.float64)
    hover = [f"ratios to DNC: {', '.join(f'{r:.4f}' for r in np.sort(row['end_ratios']))}" for row in rows]
    if not shares:
        mean = np.array([row["mean_rank"] for row in rows], dtype=np.float64)
        error = 1.96 * np.array([row["mean_rank_error"] for row in rows], dtype=np.float64)
        curves = [plots.Curve(at, mean, mean - error, mean + error, "mean rank", OKABE["green"], "^", hover=hover)]
        return plots.Curves(curves, title=title, labels=(label, "mean rank"), limits=(0.0, 1.15 * rows[0]["K"]))
    curves = [
        plots.Curve(at, *bands(rows, name), text, colour, marker, hover=hover)
        for name, text, (colour, marker) in (("below", "ends below DNC", LOOKS[3]), ("dnc_share", "ends at DNC", LOOKS[4]))
    ]
    return plots.Curves(curves, title=title, labels=(label, "share of seeds"), limits=(-0.03, 1.03))


def bands(rows: list[Row], name: str) -> tuple[NDArray[np.float64], ...]:
    """The share, and its interval."""
    return tuple(np.array([row[f"{name}{end}"] for row in rows], dtype=np.float64) for end in ("", "_low", "_high"))
