"""How far deep neural collapse is from the best structure found, over classes and penalty."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import optima, stored
from ufm import sweep

NAME = "deep_optimum_excess"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, optima.STUDY, optima.COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a map a depth, L >= 2."""
    cells = optima.flat(table)
    panels = optima.grid_of([optima.excess(table, L) for L in np.unique(cells["depth"]) if L > 1])
    caption = (
        r"$1-F_{\mathrm{best}}/F_{\mathrm{DNC}}$ at deep neural collapse (DNC, its larger root), palest where DNC is the best found; "
        r"deep linear chains with cross-entropy, balanced classes, $\lambda_0$ the penalty from which on zero is best. "
        f"{optima.search(cells)} Best found, not proven; grey: no DNC exists; hatched: not confirmed."
    )
    return stored.Drawing(panels, "Deep neural collapse above the best structure", caption, height=1.5 + 2.1 * len(panels), ncols=3)
