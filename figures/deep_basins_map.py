"""Where gradient flow ends at deep neural collapse: maps over width and scale, and what other optimisers do from the same starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import basins, stored
from ufm import sweep
from ufm.plots import ShareMap, report

NAME = "deep_basins_map"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(basins.read(folder))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a map a depth, and the ends of each optimiser."""
    grids, method = basins.pick(table, "map"), basins.pick(table, "method")
    pairs = list(zip(method["method"].tolist(), method["columns"].tolist(), strict=True))
    order = sorted(range(len(pairs)), key=lambda i: (ORDER.index(pairs[i][0]), pairs[i][1]))
    names = [NAMES[pairs[i][0]] + (", samples" if pairs[i][1] == "samples" else "") for i in order]
    ends = basins.bars(method.pick(np.array(order)), names, ("", "share of runs"), "same starts", basins.ranks(method))
    panels: list[list[report.Panel | None]] = [[*(share(grids.where(depth=L), f"$L={L}$") for L in np.unique(grids["depth"])), ends]]
    caption = (
        f"{basins.setting(table)} Maps: {basins.penalty(grids)}, {grids['seeds'][0]} seeds a cell. Last panel: {method['seeds'][0]} starts "
        f"of scale {method['scale'][0]:g}, {basins.penalty(method)}, $L={method['depth'][0]}$, $d={method['width'][0]}$. Samples: each "
        "sample starts at its own draw, not at the mean of its class. Momentum and L-BFGS from the start are other experiments, not faster "
        "ways to the same ends."
    )
    return stored.Drawing(panels, "Where gradient flow ends at deep neural collapse", caption, height=3.4, ncols=6)


NAMES = {"flow": "flow", "descent": "descent", "hybrid": "handed over", "momentum": "momentum", "lbfgs": "L-BFGS"}
ORDER = list(NAMES)


def share(rows: sweep.Table, title: str) -> ShareMap:
    """The share ending at DNC over width and scale."""
    grid = rows.on_grid("width", "scale")
    hover = [[basins.told(rows.where(width=w, scale=s), 0) for w in np.unique(rows["width"])] for s in np.unique(rows["scale"])]
    return ShareMap(
        x=grid["width"],
        y=grid["scale"],
        title=title,
        labels=("width $d$", "initial scale"),
        values=grid["dnc"],
        trusted=grid["converged"] >= basins.SETTLED,
        untrusted=basins.UNSETTLED,
        bar=basins.BAR,
        hover=np.array(hover),
    )
