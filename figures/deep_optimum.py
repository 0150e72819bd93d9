"""The best structures of deep linear models: maps over classes and penalty, a panel a depth, with the refined crossovers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import deep_optimum_crossovers, deep_optimum_excess, deep_optimum_limit, optima, stored
from ufm import sweep

NAME = "deep_optimum"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, optima.STUDY, optima.COLUMNS))}, out)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """Draw every figure of the study."""
    table = stored.read(folder, optima.STUDY, optima.COLUMNS)
    figures = (deep_optimum_excess, deep_optimum_crossovers, deep_optimum_limit)
    return stored.write({NAME: make(table)} | {figure.NAME: figure.make(table) for figure in figures}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a map a depth."""
    cells = optima.flat(table)
    caption = (
        "Deep linear chains with cross-entropy, balanced classes, width $d=K$; "
        r"$\lambda=(n\,\lambda_H\lambda_1...\lambda_L)^{1/(L+1)}$, $\lambda_0(K,L)$ the penalty from which on zero is best. "
        f"{optima.search(cells)} Dots: crossovers, refined until the two values agree. Pairs: antipodal classes, one alone for odd $K$; "
        r"T(r): edge midpoints of a simplex; other: no closed form. $L=1$ is proven; for $L\geq 2$ all is best found, not proven. "
        f"Hatched: not a minimum by its Hessian, scale-free gradient above {optima.STATIONARY:.0e}, or reached by one start or none."
    )
    panels = optima.grid_of([optima.phases(table, L) for L in np.unique(cells["depth"])])
    return stored.Drawing(panels, "Which structure is optimal in deep linear models", caption, height=1.6 + 2.1 * len(panels), ncols=5)
