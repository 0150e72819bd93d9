"""Crossovers between the best structures of deep linear models: the penalty over the classes, a panel a depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import optima, stored
from ufm import sweep
from ufm.plots import Curve, Curves

NAME = "deep_optimum_crossovers"
MARKERS = "os^Dv"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, optima.STUDY, optima.COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: for each depth, a curve for each kind of structure that takes over."""
    changes = optima.crossovers(table)
    panels = optima.grid_of([overtaken(changes.where(depth=L), int(L)) for L in np.unique(changes["depth"])])
    caption = (
        r"Where the best structure found changes as the penalty grows, by what takes over; the highest such place where there are several. "
        f"{len(changes)} crossovers of deep linear chains with cross-entropy, both structures followed until their values agree to "
        rf"{changes['mismatch'].max():.0e}; $\lambda=(n\,\lambda_H\lambda_1...\lambda_L)^{{1/(L+1)}}$. "
        "At each one a third structure was searched for. Best found, not proven."
    )
    return stored.Drawing(panels, "Crossovers between the best structures", caption, height=1.5 + 2.1 * len(panels), ncols=5)


def overtaken(changes: sweep.Table, depth: int) -> Curves:
    """The crossovers of one depth."""
    kinds = np.array([optima.code(name, int(rank)) for name, rank in zip(changes["to_name"], changes["to_rank"], strict=True)])
    curves = []
    for kind in np.unique(kinds):
        K, lam = changes["K"][kinds == kind], changes["lam"][kinds == kind]
        x = np.arange(K.min(), K.max() + 1)
        y = np.array([lam[K == k].max() if k in K else np.nan for k in x])  # no line across classes without this crossover
        name = optima.KINDS[kind]
        curves.append(Curve(x, y, y, y, f"to {name}", optima.COLOURS[name], MARKERS[kind % len(MARKERS)]))
    limits = (0.5 * float(changes["lam"].min()), 2.0 * float(changes["lam"].max()))
    return Curves(curves, title=f"$L={depth}$", labels=("classes $K$", r"$\lambda$"), log=(False, True), limits=limits)
