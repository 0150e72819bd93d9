"""How often descent ends at deep neural collapse, and at which rank otherwise: cuts over width and lambda, histograms, maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import plots, sweep

STUDY = "deep_basins"
COLUMNS = ("panel", "K", "n", "depth", "width", "lam", "scale", "method", "columns", "seeds", "settled_below", "lam_eff", "dnc", "dnc_low")
ENDS = ("dnc_high", "converged", "ranks", "mean_rank", "mean_rank_error", "structures", "unconverged", "excess", "gradient", "evaluations")
SETTLED = 0.95  # share of a point's runs that must be certified local minima
UNSETTLED = f"< {100 * SETTLED:.0f} % certified minima"
BAR = "share ending at DNC"
LOOKS = [(plots.style.OKABE_ITO[name], marker) for name, marker in zip(("blue", "orange", "green", "vermillion"), "os^D", strict=True)]


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, (*COLUMNS, *ENDS))
    return stored.write({"deep_basins": cuts(table), "deep_basins_ranks": histograms(table), "deep_basins_map": maps(table)}, out)


def setting(table: sweep.Table) -> str:
    """In words, what all points share."""
    K, n = table["K"][0], table["n"][0]
    return (
        rf"Deep linear chain, cross-entropy, $K={K}$ classes of $n={n}$, one penalty $\lambda$ on every factor, gradient flow from "
        rf"$N(0,\mathrm{{scale}}^2/d)$ to a scale-free gradient of {table['settled_below'][0]:g}; only runs whose end point is a certified "
        r"local minimum (inertia of the whole Hessian) count as ends"
    )


def cuts(table: sweep.Table) -> stored.Drawing:
    """The probability of DNC and the mean rank, over width and over lambda, a curve a scale."""
    width, lam = table.where(panel="width"), table.where(panel="lambda")
    axes = ((width, "width", "width $d$", "over the width"), (lam, "lam", r"$\lambda$", r"over $\lambda$"))
    top = float(table["K"][0])
    panels = [
        [cut(rows, x, (label, BAR), dnc, (-0.03, 1.03), title) for rows, x, label, title in axes],
        [cut(rows, x, (label, "mean rank of the end point"), rank, (0.0, top), "") for rows, x, label, _ in axes],
    ]
    caption = (
        f"{setting(table)}. {width['seeds'][0]} seeds a point; bands: 95 % intervals (Wilson above, normal below). "
        rf"Left $\lambda=2^{{{np.log2(width['lam'][0]):g}}}$, right $d={lam['width'][0]}$; $L={width['depth'][0]}$."
    )
    return stored.Drawing(panels, "How often gradient flow ends at deep neural collapse", caption, height=4.6, ncols=5)


def dnc(rows: sweep.Table) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The share ending at DNC with its Wilson interval."""
    return rows["dnc"], rows["dnc_low"], rows["dnc_high"]


def rank(rows: sweep.Table) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The mean rank of the end points with 1.96 standard errors."""
    mean, error = rows["mean_rank"], np.nan_to_num(1.96 * rows["mean_rank_error"])
    return mean, mean - error, mean + error


def cut(rows: sweep.Table, x: str, labels: tuple[str, str], of: Any, limits: tuple[float, float], title: str) -> plots.Curves:
    """A curve a scale."""
    curves = []
    for scale, (colour, marker) in zip(np.unique(rows["scale"]), LOOKS, strict=False):
        own = rows.where(scale=scale)
        own = own.pick(np.argsort(own[x]))
        y, low, high = of(own)
        curves.append(
            plots.Curve(
                own[x],
                y,
                low,
                high,
                f"scale {scale:g}",
                colour,
                marker,
                own["converged"] >= SETTLED,
                [told(own, i) for i in range(len(own))],
            )
        )
    return plots.Curves(curves, title=title, labels=labels, log=(True, False), limits=limits, hollow=UNSETTLED)


def told(rows: sweep.Table, i: int) -> str:
    """What a point holds, for the interactive figure."""
    at = {name: rows[name][i] for name in (*COLUMNS, *ENDS)}
    lines = [
        f"L = {at['depth']}, d = {at['width']}, λ = {at['lam']:.4g} (λ_eff = {at['lam_eff']:.4g}), scale {at['scale']:g}, {at['method']}",
        f"DNC {at['dnc']:.2f} ({at['dnc_low']:.2f} to {at['dnc_high']:.2f}) of {at['seeds']} seeds; certified minima {at['converged']:.0%}",
        f"ends: {at['structures'] or 'none'}",
        f"largest relative distance to a closed-form level {at['excess']:.1e}; gradient at most {at['gradient']:.1e}",
    ]
    return "\n".join([*lines, f"unconverged: {at['unconverged']}"] if at["unconverged"] else lines)


def histograms(table: sweep.Table) -> stored.Drawing:
    """Ranks of the end points: over the width, over lambda, over the scale at several depths."""
    width, lam, depth = (table.where(panel=name) for name in ("width", "lambda", "depth"))
    scales, depths = np.unique(width["scale"]), np.unique(depth["depth"])
    panels = [
        [bars(width.where(scale=s), "width", "width $d$", f"scale {s:g}") for s in scales],
        [bars(lam.where(scale=s), "lam", r"$\log_2\lambda$", f"scale {s:g}") for s in scales],
        [bars(depth.where(depth=L), "scale", "scale", f"$L={L}$, $d={depth['width'][0]}$") for L in depths[-len(scales) :]],
    ]
    caption = (
        rf"{setting(table)}. Rank 9 is DNC or nearly always so. First row $\lambda=2^{{{np.log2(width['lam'][0]):g}}}$, second row "
        rf"$d={lam['width'][0]}$, both $L={width['depth'][0]}$ and {width['seeds'][0]} seeds a bar; third row "
        rf"{depth['seeds'][0]} seeds. The rank grows with scale and width and falls with depth and $\lambda$."
    )
    return stored.Drawing(panels, "The rank at which gradient flow ends", caption, height=6.4, ncols=6)


def bars(rows: sweep.Table, x: str, label: str, title: str) -> plots.Bars:
    """The histogram of ranks at each point of an axis."""
    own = rows.pick(np.argsort(rows[x]))
    K = int(own["K"][0])
    return bar_panel(own, [f"{np.log2(v):g}" if x == "lam" else f"{v:.3g}" for v in own[x]], (label, "share of runs"), title, K)


def bar_panel(rows: sweep.Table, x: Sequence[str], labels: tuple[str, str], title: str, K: int) -> plots.Bars:
    """Ranks 0 to K as shares of the runs of each row; runs without a certified end point are hatched."""
    counts = rows["ranks"].astype(np.int64)
    return plots.Bars(
        x=x,
        counts=counts.T,
        names=["zero", *(f"rank {r}" for r in range(1, K + 1))],
        colours=plots.style.ordered(K + 1),
        unsettled=rows["seeds"] - counts.sum(axis=1),
        untrusted="no certified minimum",
        title=title,
        labels=labels,
    )


def maps(table: sweep.Table) -> stored.Drawing:
    """The probability of DNC over width and scale at two depths, and what other optimisers do with the same seeds."""
    grids = table.where(panel="map")
    method = table.where(panel="method")
    names = [f"{m}, samples" if c == "samples" else m for m, c in zip(method["method"].tolist(), method["columns"].tolist(), strict=True)]
    shares = [share(grids.where(depth=L), f"$L={L}$") for L in np.unique(grids["depth"])]
    panels = [[*shares, bar_panel(method, names, ("", "share of runs"), "the same seeds", int(method["K"][0]))]]
    caption = (
        rf"{setting(table)}. Maps: $\lambda=2^{{{np.log2(grids['lam'][0]):g}}}$, {grids['seeds'][0]} seeds a cell. Right: "
        rf"{method['seeds'][0]} seeds, $L={method['depth'][0]}$, $d={method['width'][0]}$, scale {method['scale'][0]:g}: momentum and "
        r"L-BFGS from the start are other experiments, not faster ways to the same ends."
    )
    return stored.Drawing([panels[0]], "Where gradient flow ends at deep neural collapse", caption, height=3.0, ncols=6)


def share(rows: sweep.Table, title: str) -> plots.ShareMap:
    """The share ending at DNC over width and scale."""
    grid = rows.on_grid("width", "scale")
    hover = [[told(rows.where(width=w, scale=s), 0) for w in np.unique(rows["width"])] for s in np.unique(rows["scale"])]
    return plots.ShareMap(
        x=grid["width"],
        y=grid["scale"],
        title=title,
        labels=("width $d$", "initial scale"),
        values=grid["dnc"],
        trusted=grid["converged"] >= SETTLED,
        untrusted=UNSETTLED,
        bar=BAR,
        hover=np.array(hover),
    )
