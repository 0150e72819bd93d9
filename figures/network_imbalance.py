"""Trained networks against the theory of minority collapse and free descent: map, deaths, margins, objectives; all values; epochs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Boundary, Curve, Curves, ShareMap, style

Floats = NDArray[np.float64]

NAME = STUDY = "network_imbalance"
OF_RUNS = ("dead", "margins", "norms", "margin", "norm", "cosine", "features", "classifier", "gap", "level_gap")
COLUMNS = (
    *("kind", "dataset", "K", "n_max", "n_min", "t", "run", "width", "epochs", "rate", "body", "share", "settled", "strength", "ratio"),
    *("descents", "strength_minority_zero", "strength_all_zero", "predicted_margins", "predicted_norms", "predicted_dead", "solved_gap"),
    *(f"{prefix}_{name}" for prefix in ("gd", "adam", "net") for name in OF_RUNS),
    *("net_early", "net_gradient", "net_stop", "net_nc1_quotient", "epoch", "curve_gap", "curve_margins", "curve_nc1", "curve_features"),
)
WEAK, CLOSE = 0.3, 0.02  # where margins are held to 2 % of theory
STILL = 1e-2  # scale-free gradient at the end above which a run is marked as moving
LEAST = 1e-8  # where logarithmic axes end
SHOWN = 4  # levels of the figure of epochs
RATIOS = (style.OKABE_ITO["blue"], style.OKABE_ITO["vermillion"])
HALVES = {"majority": style.OKABE_ITO["blue"], "minority": style.OKABE_ITO["vermillion"]}
PALE = {"majority": style.OKABE_ITO["sky"], "minority": style.OKABE_ITO["orange"]}  # of free descent, below the networks' marks
BLACK = style.OKABE_ITO["black"]
HOLLOW = f"some run's gradient > {STILL:g}"
BAR = "share at zero"
X = "$t$"
LEVEL = r"$t=\kappa^2K/((K-1)n_{\min})$, so that theory has the minority classes at zero from $t=1$ on."
BODIES = {"mlp": "MLP", "resnet18": "ResNet-18", "resnet20": "ResNet-20"}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, COLUMNS)
    return stored.write({NAME: make(table), f"{NAME}_values": values(table), f"{NAME}_epochs": epochs(table)}, out)


def groups(table: sweep.Table) -> Iterator[tuple[str, list[tuple[str, str, sweep.Table]]]]:
    """Of each data set its networks by imbalance ratio, smallest first: (label, colour, rows); those that diverged are left out."""
    rows = stored.pick(table, STUDY, kind="network")
    rows = rows.pick(rows["net_stop"] != "DIVERGED")
    for name in dict.fromkeys(rows.values("dataset")):
        own = rows.where(dataset=name)
        ratio = own["n_max"] / own["n_min"]
        yield name, [(f"$R={r:g}$", colour, own.pick(ratio == r)) for r, colour in zip(np.unique(ratio), RATIOS, strict=False)]


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a row for each data set: networks over the map, deaths, errors of live margins and excess of the objective over t."""
    panels = [[overlay(table, name, own), deaths(name, own), errors(own), excess(own)] for name, own in groups(table)]
    title = "Trained ReLU networks against the theory of minority collapse, and free descent from their own starts"
    return stored.Drawing(panels, title, caption(table), height=1.3 + 2.1 * len(panels), ncols=3)


def overlay(table: sweep.Table, name: str, own: Sequence[tuple[str, str, sweep.Table]]) -> ShareMap:
    """Where free descent leaves minority classes at zero, theory's line, and the networks as bars: low end, share, high end."""
    K = int(own[0][2]["K"][0])
    grid = stored.pick(table, STUDY, kind="map", K=K).on_grid("ratio", "strength")
    lines = [
        Boundary(grid["ratio"], grid["strength_minority_zero"][0], label="theory: minority classes at zero"),
        Boundary(grid["ratio"], grid["strength_all_zero"][0], label="theory: every class at zero", dash=(4.0, 1.5)),
    ]
    x, y = np.meshgrid(grid["ratio"], grid["strength"])
    told = [
        f"R = {a:.3g}, κ²/n_min = {b:.3g}: {s:.2f} of the minority classes at zero after free descent, {m:.0f} starts, {w:.0%} settled"
        for a, b, s, m, w in zip(*(v.ravel() for v in (x, y, grid["share"], grid["descents"], grid["settled"])), strict=True)
    ]
    return ShareMap(
        x=grid["ratio"],
        y=grid["strength"],
        title=f"{name}: map",
        labels=(r"imbalance ratio $R$", r"$\kappa^2/n_{\min}$"),
        log=(True, False),
        values=grid["share"],
        trusted=grid["settled"] >= 0.9,
        untrusted="< 90 % of descents settled",
        bar=BAR,
        boundaries=[line for line in lines if np.nanmin(line.y) < grid["strength"].max()] + list(bars(own)),
        hover=np.array(told).reshape(x.shape),
    )


def bars(own: Sequence[tuple[str, str, sweep.Table]]) -> Iterator[Boundary]:
    """For each ratio and level three strokes in a black frame: low end of the interval, share, high end, in the colours of the map."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("share", list(style.SHARE))
    for _, _, rows in own:
        ratio, K = rows["n_max"][0] / rows["n_min"][0], int(rows["K"][0])
        for t, at in levels(rows):
            height = [t * (K - 1) / K] * 2
            yield Boundary(ratio * np.array([0.685, 1.46]), height, width=4.4, halo=False)
            ends = ratio * np.array([0.7, 0.87, 1.15, 1.43])
            for left, right, value in zip(ends[:-1], ends[1:], wilson(at, "net"), strict=True):
                yield Boundary([left, right], height, colour=str(to_hex(scale(value))), width=3.0, halo=False)


def levels(rows: sweep.Table) -> Iterator[tuple[float, sweep.Table]]:
    """The runs of each level t."""
    yield from ((float(t), rows.pick(rows["t"] == t)) for t in np.unique(rows["t"]))


def minority(rows: sweep.Table, column: str) -> NDArray[np.bool_]:
    """A column of (runs, K) truth values, of the smaller half of the classes."""
    flags = np.asarray(rows[column], dtype=np.bool_)
    return flags[:, -(flags.shape[1] // 2) :]


def wilson(rows: sweep.Table, prefix: str) -> tuple[float, float, float]:
    """Wilson's interval of the share of minority classes at zero, classes of a run counted as independent: low, share, high."""
    dead = minority(rows, f"{prefix}_dead")
    low, high = sweep.wilson(dead.sum(), dead.size)
    return float(low), float(dead.mean()), float(high)


def settled(rows: sweep.Table) -> list[bool]:
    """Of each level whether every run ended with a small gradient."""
    return [bool(np.all(own["net_gradient"] <= STILL)) for _, own in levels(rows)]


def deaths(name: str, own: Sequence[tuple[str, str, sweep.Table]]) -> Curves:
    """The share of minority classes at zero over t: theory's step, networks with intervals, free descent."""
    curves = []
    for label, colour, rows in own:
        t = np.unique(rows["t"])
        for prefix, what, marker, dash, width in (
            ("adam", "free Adam", "v", (1.0, 2.0), 0.8),
            ("gd", "free descent", "s", (4.0, 2.0), 0.8),
            ("net", "networks", "o", (), 1.2),
        ):
            low, share, high = np.transpose([wilson(at, prefix) for _, at in levels(rows)])
            told = [
                f"{name}, {what}, {label.strip('$')}, t = {a:g}: {100 * s:.0f} % of the minority classes at zero "
                f"({100 * b:.0f} to {100 * c:.0f} %, {len(at)} runs)"
                for (a, at), b, s, c in zip(levels(rows), low, share, high, strict=True)
            ]
            trusted = settled(rows) if prefix == "net" else None
            ends = (low, high) if prefix == "net" else (share, share)
            curves.append(Curve(t, share, *ends, f"{what}, {label}", colour, marker, trusted, told, width, dash))
    step = np.array([0.0, 1.0, 1.0 + 1e-9, max(1.1, float(t.max()))])
    curves.append(Curve(step, [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], "theory", BLACK, "", width=1.0))
    return Curves(curves, title="minority at zero", labels=(X, "share"), log=(False, False), limits=(-0.05, 1.05), hollow=HOLLOW)


def spread(rows: sweep.Table, column: str, label: str, colour: str, dash: tuple[float, ...] = (), marker: str = "o") -> Curve | None:
    """Median and range over the runs of each level, of the runs that have a value; None where no run has one."""
    found = [(t, v) for t, own in levels(rows) if (v := own[column][np.isfinite(own[column])]).size]
    if not found:
        return None
    still = dict(zip(np.unique(rows["t"]).tolist(), settled(rows), strict=True))
    low, middle, high = np.transpose([np.maximum([v.min(), np.median(v), v.max()], LEAST) for _, v in found])
    told = [f"t = {t:g}: median {np.median(v):.2g} ({v.min():.2g} to {v.max():.2g}) over {v.size} runs" for t, v in found]
    t = [t for t, _ in found]
    return Curve(t, middle, low, high, label, colour, marker, [still[at] for at in t], told, dash=dash)


def of_all(curves: Sequence[Curve | None], title: str, label: str) -> Curves:
    """A panel of these curves over t, logarithmic."""
    known = [curve for curve in curves if curve is not None]
    top, bottom = max(float(c.high.max()) for c in known), min(float(c.low.min()) for c in known)
    limits = 10 ** np.floor(np.log10(max(LEAST, bottom / 1.5))), 10 ** np.ceil(np.log10(1.5 * top))
    return Curves(known, title=title, labels=(X, label), log=(False, True), limits=limits, hollow=HOLLOW)


def errors(own: Sequence[tuple[str, str, sweep.Table]]) -> Curves:
    """The largest relative error of a live class's margin, over t, with the 2 % asked for below t = 0.3."""
    curves = [spread(rows, "net_margin", f"networks, {label}", colour) for label, colour, rows in own]
    asked = Curve([0.0, WEAK], [CLOSE] * 2, [CLOSE] * 2, [CLOSE] * 2, "2 %", BLACK, "", width=0.8, dash=(1.0, 1.0))
    return of_all([*curves, asked], "live margins", "largest relative error")


def excess(own: Sequence[tuple[str, str, sweep.Table]]) -> Curves:
    """How far the objective is above the optimum's, and above the energy of the point with the same classes at zero."""
    curves = []
    for label, colour, rows in own:
        curves.append(spread(rows, "net_gap", f"above the optimum, {label}", colour))
        curves.append(spread(rows, "net_level_gap", f"above its dead classes' energy, {label}", colour, (3.0, 2.0), "s"))
    return of_all(curves, "objective", "relative excess")


def values(table: sweep.Table) -> stored.Drawing:
    """The figure of all values: a row for each data set and ratio: margins, norms, orthogonality and Grams, variability, over t."""
    panels = []
    for name, own in groups(table):
        for label, _, rows in own:
            margins = live(rows, f"{name}, {label}: margins", "margins", "$M_k$")
            panels.append([margins, live(rows, "feature norms", "norms", "norm"), *rest(rows)])
    title = "Margins, norms, orthogonality and variability of trained networks against theory"
    text = (
        f"{LEVEL} Predicted (lines), free descent from the network's own start (squares) and networks (discs) side by side: mean over the "
        "live classes of a run, median and range over the runs. Cosine: the largest between two live class means. Grams: distance of class "
        "means and of classifier rows to those predicted for the classes that live. NC1: trace of the within- over that of the "
        f"between-class covariance. Gradient: scale-free norm at the end. {moving(table)}"
    )
    return stored.Drawing(panels, title, text, height=1.5 + 1.7 * len(panels), ncols=4)


def live(rows: sweep.Table, title: str, column: str, label: str) -> Curves:
    """A value of live classes, majority and minority: predicted, simulated, trained."""
    K, curves, top = int(rows["K"][0]), [], 0.0
    for half, colour in HALVES.items():
        of_half = (np.arange(K) >= K - K // 2) == (half == "minority")
        alive = ~np.asarray(rows["predicted_dead"], dtype=np.bool_) & of_half
        for prefix, what, marker in (("predicted", "predicted", ""), ("gd", "free descent", "s"), ("net", "networks", "o")):
            kept = alive if prefix == "predicted" else alive & ~np.asarray(rows[f"{prefix}_dead"], dtype=np.bool_)
            found = []
            for t in np.unique(rows["t"]):
                at = (rows["t"] == t) & kept.any(axis=1)
                means = [float(v[k].mean()) for v, k in zip(rows[f"{prefix}_{column}"][at], kept[at], strict=True)]
                found += [(t, min(means), np.median(means), max(means), len(means))] if means else []
            if not found:
                continue
            x, low, middle, high, _ = np.transpose(found)
            top = max(top, float(high.max()))
            told = [f"{half}, {what}, t = {a:g}: {b:.4g} ({c:.4g} to {d:.4g}, {n:.0f} runs)" for a, c, b, d, n in found]
            tint, dash = {"predicted": (BLACK, ()), "gd": (PALE[half], (2.0, 2.0)), "net": (colour, ())}[prefix]
            curves.append(Curve(x, middle, low, high, f"{what}, {half}", tint, marker, None, told, 0.8, dash))
    return Curves(curves, title=title, labels=(X, label), log=(False, False), limits=(0.0, 1.08 * top))


def rest(rows: sweep.Table) -> tuple[Curves, Curves]:
    """Orthogonality and Grams, and what should be zero besides."""
    colours = style.OKABE_ITO
    geometry = [
        spread(rows, "net_cosine", "largest cosine", colours["green"], marker="o"),
        spread(rows, "net_features", "feature Gram", colours["blue"], marker="s"),
        spread(rows, "net_classifier", "classifier Gram", colours["purple"], marker="^"),
    ]
    worth = [
        spread(rows, "net_nc1_quotient", "NC1", colours["orange"], marker="o"),
        spread(rows, "net_gradient", "gradient", BLACK, (2.0, 1.5), marker="D"),
    ]
    return of_all(geometry, "orthogonality", "cosine, distance"), of_all(worth, "NC1 and gradient", "ratio, norm")


def epochs(table: sweep.Table) -> stored.Drawing:
    """The figure of single runs: a row of margins and a row of distances for each data set, a column a level."""
    panels: list[list[Curves | None]] = []
    for name, own in groups(table):
        rows = own[0][2]
        t = np.unique(rows["t"])
        chosen = t[np.unique(np.linspace(0, len(t) - 1, min(SHOWN, len(t))).round().astype(int))]
        picked = [rows.pick((rows["t"] == at) & (rows["run"] == telling(rows, at))) for at in chosen]
        panels += [[of_margins(name, row) for row in picked], [distances(row) for row in picked]]
    wide = max(map(len, panels))
    text = (
        "Single networks of the smaller imbalance ratio, at each level the first run in which a class died early, or the first. Upper "
        "rows: margin of every class, the predicted margins dashed. Lower rows: the objective above the optimum's and above the energy "
        "of the stationary point with those classes at zero that the run has there at the end; NC1 (traces); distance of the Gram of "
        "class means to the predicted one. Differences below the axis, negative ones too, are drawn on it."
    )
    return stored.Drawing(
        [[*line, *[None] * (wide - len(line))] for line in panels], "Networks on their way", text, height=1.2 + 1.6 * len(panels), ncols=4
    )


def telling(rows: sweep.Table, t: float) -> int:
    """The first run of a level in which a class died that the optimum keeps, else the first."""
    own = rows.pick(rows["t"] == t)
    early = np.asarray(own["net_early"], dtype=np.bool_).any(axis=1)
    return int(own["run"][early].min() if early.any() else own["run"].min())


def of_margins(name: str, row: sweep.Table) -> Curves:
    """The margin of every class over the epochs of one run, and its predicted level."""
    epoch, found, exact = row["epoch"][0], row["curve_margins"][0], row["predicted_margins"][0]
    K = len(exact)
    kept = np.isfinite(found).all(axis=1)
    curves = []
    for k in reversed(range(K)):
        half = "minority" if k >= K - K // 2 else "majority"
        first = k == K - 1 or k == K - K // 2 - 1
        y = found[kept, k]
        told = [f"class {k}, epoch {e:g}: margin {v:.4g}, predicted {exact[k]:.4g}" for e, v in zip(epoch[kept], y, strict=True)]
        curves.append(Curve(epoch[kept], y, y, y, f"{half} class" if first else "", HALVES[half], "", None, told, 0.8))
    for level in np.unique(exact):
        ends = np.full(2, level)
        curves.append(
            Curve(epoch[[0, -1]], ends, ends, ends, "predicted" if level == exact.max() else "", BLACK, "", None, None, 0.8, (3.0, 2.0))
        )
    low = min(0.0, float(found[kept].min()))
    limits = (low - 0.05 * exact.max(), 1.3 * float(exact.max()))
    return Curves(curves, title=f"{name}, $t={row['t'][0]:g}$", labels=("epoch", "margin"), log=(False, False), limits=limits)


def distances(row: sweep.Table) -> Curves:
    """Objective above two levels, NC1 and distance of the feature Gram over the epochs of one run."""
    epoch, gap = row["epoch"][0], row["curve_gap"][0]
    level = (1 + row["net_gap"][0]) / (1 + row["net_level_gap"][0])  # of the dead classes, over the optimum's value
    colours = style.OKABE_ITO
    curves = []
    for values_, label, colour, dash in (
        (gap, "objective above the optimum", colours["blue"], ()),
        ((1 + gap) / level - 1, "objective above its dead classes' energy", colours["sky"], (3.0, 1.5)),
        (row["curve_nc1"][0], "NC1", colours["orange"], ()),
        (row["curve_features"][0], "feature Gram", colours["green"], ()),
    ):
        kept = np.isfinite(values_)
        y = np.maximum(values_[kept], LEAST)
        told = [f"{label}, epoch {e:g}: {v:.3g}" for e, v in zip(epoch[kept], values_[kept], strict=True)]
        curves.append(Curve(epoch[kept], y, y, y, label, colour, "", None, told, 1.0, dash))
    return Curves(curves, title="distances", labels=("epoch", "relative excess, distance"), log=(False, True), limits=(LEAST, 30.0))


def caption(table: sweep.Table) -> str:
    """In words, what was run and what it is worth."""
    said = []
    for name, own in groups(table):
        rows = own[0][2]
        runs = " and ".join(f"{len(part.where(t=part['t'][0]))} at each level for {label}" for label, _, part in own)
        said.append(
            f"{name}, $K={rows['K'][0]}$: {BODIES[rows['body'][0]]}, $d={rows['width'][0]}$, {rows['epochs'][0]} epochs; networks: {runs}"
        )
    cells = stored.pick(table, STUDY, kind="map")
    return (
        f"{LEVEL} {'. '.join(said)}. Map: shares that free descent leaves at zero from {cells['descents'][0]} balanced starts a "
        "cell; bars: networks, low end of Wilson's interval (95 %, classes as if independent), share, high end. Shares: discs, with the "
        "same interval; free descent starts at the network's own class means and $W$. Margins and objective: median and range over runs; "
        f"the energy is that of the stationary point with the same classes at zero. {moving(table)}"
    )


def moving(table: sweep.Table) -> str:
    """How many networks diverged or still moved at the end, and what is known of the optima."""
    rows = stored.pick(table, STUDY, kind="network")
    lost, still = int(np.sum(rows["net_stop"] == "DIVERGED")), int(np.sum(rows["net_gradient"] > STILL))
    return (
        f"Networks: {len(rows)}, diverged and left out {lost}, scale-free gradient above {STILL:g} at the end {still} (hollow). Optima of "
        f"the same problems are proven to {rows['solved_gap'].max():.0e}."
    )
