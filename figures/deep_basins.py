"""How often gradient flow ends at deep neural collapse, and the mean rank at which it ends: cuts over the width and over lambda."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from figures import basins, deep_basins_map, deep_basins_ranks, stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

NAME = "deep_basins"
LOOKS = [(style.OKABE_ITO[name], marker) for name, marker in zip(("blue", "orange", "green", "vermillion"), "os^D", strict=True)]
WIDTHS = (10, 20, 50, 100, 200)  # with a number at the axis

Interval = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(basins.read(folder))}, out)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """Draw every figure of the study."""
    table = basins.read(folder)
    return stored.write({NAME: make(table)} | {figure.NAME: figure.make(table) for figure in (deep_basins_ranks, deep_basins_map)}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: the probability of DNC and the mean rank, over width and over lambda, a curve a scale."""
    width, lam = basins.pick(table, "width"), basins.pick(table, "lambda")
    axes = ((width, "width", "width $d$"), (lam, "lam", r"$\lambda$"))
    top = float(table["K"][0])
    panels = [
        [cut(rows, x, (label, basins.BAR), dnc, (-0.03, 1.03), f"{label}: share") for rows, x, label in axes],
        [cut(rows, x, (label, "mean rank of the end point"), rank, (0.0, top), f"{label}: rank") for rows, x, label in axes],
    ]
    caption = (
        f"{basins.setting(table)} {width['seeds'][0]} seeds a point; bands: 95 % intervals, Wilson's of shares, 1.96 standard errors "
        f"of means. Left {basins.penalty(width)}, right $d={lam['width'][0]}$; $L={width['depth'][0]}$."
    )
    return stored.Drawing(panels, "How often gradient flow ends at deep neural collapse", caption, height=4.8, ncols=5)


def dnc(rows: sweep.Table) -> Interval:
    """The share ending at DNC with its Wilson interval."""
    return rows["dnc"], rows["dnc_low"], rows["dnc_high"]


def rank(rows: sweep.Table) -> Interval:
    """The mean rank of the end points with 1.96 standard errors, no interval of a single run."""
    mean, error = rows["mean_rank"], 1.96 * rows["mean_rank_error"]
    return mean, mean - error, mean + error


def cut(
    rows: sweep.Table, x: str, labels: tuple[str, str], of: Callable[[sweep.Table], Interval], limits: tuple[float, float], title: str
) -> Curves:
    """A curve a scale."""
    curves = []
    for scale, (colour, marker) in zip(np.unique(rows["scale"]), LOOKS, strict=False):
        own = basins.sorted_by(rows.where(scale=scale), x)
        hover = [basins.told(own, i) for i in range(len(own))]
        curves.append(Curve(own[x], *of(own), f"scale {scale:g}", colour, marker, basins.trusted(own), hover))
    ticks = [d for d in WIDTHS if rows[x].min() <= d <= rows[x].max()] if x == "width" else ()
    return Curves(curves, title=title, labels=labels, log=(True, False), limits=limits, ticks=ticks, hollow=basins.UNSETTLED)
