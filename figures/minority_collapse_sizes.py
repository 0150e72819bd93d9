"""Minority collapse with few and with many classes: K = 4 and K = 100, at the optimum and where descent ends."""

from __future__ import annotations

from pathlib import Path

from figures import collapse, stored
from ufm import plots, sweep
from ufm.records import Regime

NAME = "minority_collapse_sizes"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(collapse.read(folder, *collapse.DESCENT))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: both maps of K = 4, the optima of K = 100, and the share killed along one row of it."""
    few, many, row = (collapse.pick(table, panel=panel) for panel in ("few classes", "many classes", "many classes, descent"))
    grid = collapse.cells(few)
    panels = [
        collapse.regime_map(grid, "$K=4$: optimum"),
        collapse.killed_map(grid, "$K=4$: descent"),
        collapse.regime_map(collapse.cells(many), "$K=100$: optimum"),
        along(row),
    ]
    optima = f"{collapse.proof(few)} ($K=4$), {collapse.proof(many).split(' in ')[1]} ($K=100$)"
    caption = (
        r"ReLU features, no bias, width $d=2K$, half of the classes with $n_{\min}$ samples; "
        f"{collapse.RATIO}, "
        rf"$\lambda=\sqrt{{\lambda_W\lambda_H}}$. Optimum: {optima}. "
        f"Descent: {few['descents'][0]} seeds a cell, {collapse.rule(few)}. {collapse.killed(few)}{collapse.CELLS} "
        rf"(d): $\kappa^2/n_{{\min}}={row['strength'][0]:.3g}$, {row['descents'][0]} seeds a point, "
        f"{collapse.rule(row)}, band: 95 % Wilson interval."
    )
    return stored.Drawing([panels], "Minority collapse with 4 and with 100 classes", caption, height=3.1, ncols=3)


def along(row: sweep.Table) -> plots.Curves:
    """The share killed along the row; cells where the optimum keeps no class are left out."""
    asked = row.pick(row["regime"] != Regime.ALL_ZERO.name)
    if not len(asked):
        raise stored.BadRows("the optimum keeps no class in the panel 'many classes, descent'; take a lower strength")
    return plots.Curves(
        [collapse.killed_curve(asked, asked["ratio"], "", plots.style.OKABE_ITO["blue"])],
        title="$K=100$: descent",
        labels=(collapse.LABELS[0], collapse.BAR),
        limits=(-0.03, 1.03),
        hollow=collapse.UNSETTLED,
    )
