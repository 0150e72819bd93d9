"""At which rank gradient flow ends: histograms over the width, over lambda, and over the scale of the start at several depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import basins, stored
from ufm import sweep
from ufm.plots import Bars

NAME = "deep_basins_ranks"
MOST = 3  # panels in a row


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(basins.read(folder))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a panel a scale over width and over lambda, a panel a depth over the scale."""
    width, lam, depth = (basins.pick(table, name) for name in ("width", "lambda", "depth"))
    shown = basins.ranks(table.pick(np.isin(table["panel"], ("width", "lambda", "depth"))))
    scales, depths = np.unique(width["scale"])[:MOST], np.unique(depth["depth"])[-MOST:]
    rows = [
        [histogram(width.where(scale=s), "width", "width $d$", f"scale {s:g}", shown) for s in scales],
        [histogram(lam.where(scale=s), "lam", r"$\log_2\lambda$", f"scale {s:g}", shown) for s in scales],
        [histogram(depth.where(depth=L), "scale", "scale", f"$L={L}$", shown) for L in depths],
    ]
    panels = [[*row, *[None] * (MOST - len(row))] for row in rows]
    K = int(table["K"][0])
    full = int(table["ranks"][:, K - 1].sum())
    collapsed = round(float(np.sum(table["dnc"] * table["seeds"])))
    caption = (
        f"{basins.setting(table)} First row {basins.penalty(width)}, second row $d={lam['width'][0]}$, both $L={width['depth'][0]}$ and "
        f"{width['seeds'][0]} seeds a bar; third row $d={depth['width'][0]}$, {basins.penalty(depth)} and {depth['seeds'][0]} seeds. "
        f"Of all {full} runs of the study that end at rank {K - 1}, {collapsed} end at DNC."
    )
    return stored.Drawing(panels, "The rank at which gradient flow ends", caption, height=6.6, ncols=6)


def histogram(rows: sweep.Table, x: str, label: str, title: str, shown: list[int]) -> Bars:
    """The ranks at each point of an axis."""
    own = basins.sorted_by(rows, x)
    names = [f"{np.log2(v):g}" if x == "lam" else f"{v:.2g}" if x == "scale" else f"{v:g}" for v in own[x]]
    return basins.bars(own, names, (label, "share of runs"), title, shown)
