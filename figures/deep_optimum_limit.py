"""Limits of the atlas: codes of least Schatten norm as the penalty vanishes, and the penalty from which on zero is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import optima, stored
from ufm import sweep
from ufm.plots import Curve, Curves, PhaseMap, style

NAME = "deep_optimum_limit"
MARKERS = "os^Dv"
TOLERANCE = 1e-8  # residual of the conditions of a minimum


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, optima.STUDY, optima.COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: structures and constants of the limit, and where zero takes over."""
    margins, atlas = (stored.pick(table, optima.STUDY, panel=panel) for panel in ("margin", "atlas"))
    panels = [[structures(margins), constants(margins), ends(atlas)]]
    caption = (
        r"Left, middle: $R^*(K,L)=\min$ Σ $s_i(M)^p$, $p=2/(L+1)$, over logits with margins at least 1; as the penalty vanishes "
        r"the optimum of $F$ is $(\lambda/2)(L+1)R^*(\log 1/\lambda)^p$ to leading order. $R=K-1$ at deep neural collapse. "
        f"Best found, not proven; residual of the conditions of a minimum at most {np.nanmax(margins['residual']):.0e}. "
        r"Right: the penalty $\lambda_0$ from which on zero is best; $1/K$ at $L=1$."
    )
    return stored.Drawing(panels, "Limits: no penalty, and the largest", caption, height=3.9, ncols=5)


def structures(rows: sweep.Table) -> PhaseMap:
    """What the best code is, over depth and classes."""
    grid = rows.on_grid("depth", "K")
    if min(grid["R"].shape) < 2:
        raise stored.BadRows(f"the limit has {grid['R'].shape[0]} by {grid['R'].shape[1]} codes, but a map needs two by two")
    hover = [
        f"K = {grid['K'][k]:g}, L = {grid['depth'][j]:g}: R* = {grid['R'][k, j]:.10g}\n"
        f"{grid['code'][k, j]}, rank {grid['code_rank'][k, j]:g}; best of the catalogue {grid['catalogue'][k, j]:.10g}"
        for k, j in np.ndindex(grid["R"].shape)
    ]
    return PhaseMap(
        x=grid["depth"],
        y=grid["K"],
        title=r"$\lambda$ → 0: best code",
        labels=("depth $L$", "classes $K$"),
        log=(False, False),
        codes=np.vectorize(kind)(grid["code"], grid["code_rank"]).astype(int),
        names=optima.KINDS,
        colours=list(optima.COLOURS.values()),
        certified=grid["residual"] <= TOLERANCE,
        unproven=optima.UNCONFIRMED,
        hover=np.array(hover).reshape(grid["R"].shape),
    )


def kind(code: str, rank: float) -> int:
    """The colour of a code, by the name it has in theory; any for one that was not computed, which is hatched."""
    if np.isnan(rank):
        return 0
    name = "DNC" if code.startswith("DNC") else "pairs" if "pairs" in code else code
    return optima.code(name, int(rank))


def constants(rows: sweep.Table) -> Curves:
    """R*/(K - 1) over K, a curve a depth."""
    curves = [curve(rows.where(depth=L), L, i, rows.where(depth=L)["R"] / (rows.where(depth=L)["K"] - 1)) for i, L in depths(rows)]
    return Curves(curves, title="constants", labels=("classes $K$", "$R^*/(K-1)$"), log=(False, False), limits=(0.0, 1.05))


def ends(rows: sweep.Table) -> Curves:
    """K lambda_zero over K, a curve a depth."""
    curves = [curve(rows.where(depth=L), L, i, rows.where(depth=L)["lambda_zero"] * rows.where(depth=L)["K"]) for i, L in depths(rows)]
    top = 1.05 * max(float(c.y.max()) for c in curves)
    return Curves(curves, title="zero is best from here", labels=("classes $K$", r"$K\lambda_0$"), log=(False, False), limits=(0.0, top))


def depths(rows: sweep.Table) -> list[tuple[int, int]]:
    """Every depth with its number."""
    return [(i, int(L)) for i, L in enumerate(np.unique(rows["depth"]))]


def curve(rows: sweep.Table, depth: int, number: int, y: NDArray[Any]) -> Curve:
    """One depth."""
    order, colours = np.argsort(rows["K"]), style.ordered(9)
    x, y = rows["K"][order], y[order]
    return Curve(x, y, y, y, f"$L={depth}$", colours[number], MARKERS[number % len(MARKERS)])
