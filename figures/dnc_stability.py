"""Is deep neural collapse a local minimum? Its measured index over classes, depth and penalty, with the exact line; one curve for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import dnc_stability_orbit, stored
from ufm import sweep
from ufm.plots import Boundary, Curve, Curves, PhaseMap, style

NAME = STUDY = "dnc_stability"
COLUMNS = (
    *("panel", "how", "K", "width", "depth", "code", "alpha", "level", "over_fold", "lam", "index", "nullity", "negative_parts", "lowest"),
    *("lowest_symmetric", "gradient_norm", "leak", "predicted_index", "orbit", "published", "tangents", "obtained"),
    *("stable_scale", "stable_level", "stable_over_fold", "strip_over_fold"),
)
STATIONARY = 1e-9  # largest scale-free gradient norm of a point that is coloured
# negative parts -> what the map calls it
OUTCOMES = {
    "": "local minimum: index 0",
    "symmetric, zero diagonal": "saddle: index $K(K-3)/2$",
    "standard, symmetric, zero diagonal": "saddle: $K-1$ more",
    "trivial, symmetric, zero diagonal": "saddle: scale negative, small root",
    "trivial, standard, symmetric, zero diagonal": "saddle: $K-1$ more and scale, small root",
}
COLOURS = [style.OKABE_ITO["sky"], style.OKABE_ITO["orange"], style.OKABE_ITO["vermillion"], style.OKABE_ITO["yellow"], "#8C6BB1"]
LEVEL = r"$\lambda_{\mathrm{eff}}/\lambda_{\max}$"
LINE = {"label": r"theory: $\alpha=K(L-1)/(L+1)$"}
STRIP = {"label": "theory: top of the strip", "dash": (4.0, 1.5)}
FOLD = {"label": r"theory: fold, $\lambda_{\max}$", "dash": (1.0, 1.0)}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, STUDY, COLUMNS))}, out)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """Draw both figures of the study."""
    table = stored.read(folder, STUDY, COLUMNS)
    return stored.write({NAME: make(table), dnc_stability_orbit.NAME: dnc_stability_orbit.make(table)}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: maps over classes at each depth, over depth, around the fold; the critical eigenvalue of all cells on one line."""
    maps, deep, around = (stored.pick(table, STUDY, panel=panel) for panel in ("map", "depth", "fold"))
    across = [over_classes(maps.where(depth=L)) for L in np.unique(maps["depth"]).tolist()[:3]]
    row: list[Any] = [over_depth(deep), near_fold(around), collapsed(table)]
    panels = [[*across, *[None] * (3 - len(across))], row]
    dense, lanczos = table.where(how="dense"), table.where(how="lanczos")
    blocks = table.where(how="blocks")
    blocks = blocks.pick(blocks["panel"] != "edge")
    caption = (
        r"Hessian at the explicit DNC point, linear chain, cross-entropy, $n=1$, $d=K$, one penalty; (a)-(d): large root. Coloured by "
        r"measured index: products of the Hessian with a vector of each isotypic part under permutations of the classes give the full "
        rf"inertia; cells whose scale-free gradient exceeds $10^{{{np.log10(STATIONARY):.0f}}}$ or whose signs are not clear are hatched. "
        f"The index is as theory predicts in {agreeing(blocks)} of {len(blocks)} cells, and by dense Hessians without symmetry, "
        rf"$K\leq{dense['K'].max()}$, in {agreeing(dense)} of {len(dense)}"
        + (f" (signs by Lanczos, $K\\leq{lanczos['K'].max()}$, in {signs(lanczos)} of {len(lanczos)})" if len(lanczos) else "")
        + r". (f): lowest eigenvalue of the symmetric, zero-diagonal directions over $\lambda(L-1)$, cells of (a)-(d); line: "
        r"$\alpha/a_c-1$, $a_c=K(L-1)/(L+1)$; flat parts: the eigenvalue $2\lambda$ of moves that cancel over the factors lies below."
    )
    return stored.Drawing(panels, "Is deep neural collapse a local minimum?", caption, height=5.4, ncols=3)


def agreeing(rows: sweep.Table) -> int:
    """Rows whose measured index is the predicted one."""
    return int(np.sum(rows["index"] == rows["predicted_index"]))


def signs(rows: sweep.Table) -> int:
    """Rows where a lower bound of the index is positive exactly where the prediction is."""
    return int(np.sum((rows["at_least"] > 0) == (rows["predicted_index"] > 0)))


def phase(rows: sweep.Table, x: str, y: str, **look: Any) -> PhaseMap:
    """The measured kinds of index over two columns."""
    grid = rows.on_grid(x, y)
    names = list(OUTCOMES)
    strange = set(np.unique(grid["negative_parts"]).tolist()) - set(names)
    if strange:
        raise stored.BadRows(f"the rows hold the negative parts {strange.pop()!r}, which have no name in OUTCOMES; add one")
    codes = np.vectorize(names.index, otypes=[int])(grid["negative_parts"])
    return PhaseMap(
        x=grid[x],
        y=grid[y],
        codes=codes,
        names=list(OUTCOMES.values()),
        colours=COLOURS,
        certified=np.isfinite(grid["index"]) & (grid["gradient_norm"] <= STATIONARY),
        hover=told(grid, x, y),
        unproven="signs not clear",
        **look,
    )


def over_classes(rows: sweep.Table) -> PhaseMap:
    """Classes against the penalty at one depth."""
    K, first = np.unique(rows["K"], return_index=True)
    line = Boundary(rows["stable_level"][first], K, **LINE)
    return phase(rows, "level", "K", title=f"$L={rows['depth'][0]}$", labels=(LEVEL, "classes $K$"), boundaries=[line])


def over_depth(rows: sweep.Table) -> PhaseMap:
    """Depth against the penalty."""
    depths, first = np.unique(rows["depth"], return_index=True)
    line = Boundary(rows["stable_level"][first], depths, **LINE)
    return phase(rows, "level", "depth", title=f"$K={rows['K'][0]}$", labels=(LEVEL, "depth $L$"), boundaries=[line], log=(True, False))


def near_fold(rows: sweep.Table) -> PhaseMap:
    """Both roots around the fold."""
    K, first = np.unique(rows["K"], return_index=True)
    edge = rows["stable_over_fold"][first]
    lines = [
        Boundary(np.where(edge <= rows["over_fold"].max(), edge, np.nan), K, **LINE),
        Boundary(rows["strip_over_fold"][first], K, **STRIP),
        Boundary(np.ones(len(K)), K, **FOLD),
    ]
    title = f"$L={rows['depth'][0]}$: around the fold"
    labels = (r"$\alpha/\alpha_{\mathrm{fold}}$", "classes $K$")
    return phase(rows, "over_fold", "K", title=title, labels=labels, boundaries=lines, log=(False, True))


def collapsed(table: sweep.Table) -> Curves:
    """The critical eigenvalue of every cell over alpha/a_c: one line."""
    panels = table.pick(np.isin(table["panel"], ("map", "depth")))
    looks = zip((2, 3, 5, 8), ("blue", "green", "orange", "vermillion"), "os^D", strict=True)
    curves = []
    for L, colour, marker in looks:
        rows = panels.where(depth=L)
        if not len(rows):
            continue
        x, first = np.unique(np.round(rows["alpha"] / rows["stable_scale"], 9), return_index=True)
        y = rows["lowest_symmetric"][first] / (L - 1)
        good = (rows["gradient_norm"] <= STATIONARY)[first]
        keep = x <= 2.2
        curves.append(
            Curve(x[keep], y[keep], y[keep], y[keep], f"measured, $L={L}$", style.OKABE_ITO[colour], marker, good[keep], width=0.0)
        )
    x = np.array([0.0, 2.2])
    curves.insert(0, Curve(x, x - 1, x - 1, x - 1, "", "#000000", ""))
    labels = (r"$\alpha/a_c$", r"eigenvalue$/(\lambda(L-1))$")
    return Curves(curves, title="one line for all cells", labels=labels, log=(False, False), limits=(-1.1, 1.3), hollow="not stationary")


def told(grid: dict[str, NDArray[Any]], x: str, y: str) -> NDArray[np.str_]:
    """A text for each cell."""
    across, up = np.meshgrid(grid[x], grid[y])
    texts = [
        f"{x} = {across[at]:.3g}, {y} = {up[at]:g}; λ = {grid['lam'][at]:.3g}, α = {grid['alpha'][at]:.4g}\n"
        f"index {grid['index'][at]:g} (theory {grid['predicted_index'][at]:g}), zero eigenvalues {grid['nullity'][at]:g}\n"
        f"{grid['obtained'][at]}; scale-free gradient {grid['gradient_norm'][at]:.1e}, leak of the blocks {grid['leak'][at]:.1e}"
        for at in np.ndindex(across.shape)
    ]
    return np.array(texts).reshape(across.shape)
