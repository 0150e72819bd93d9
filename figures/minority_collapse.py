"""Minority collapse at the optimum and after descent: K = 10, with and without the ReLU, step and exponential class counts."""

from __future__ import annotations

from pathlib import Path

from figures import collapse, minority_collapse_bias, minority_collapse_cuts, minority_collapse_sizes, stored
from ufm import plots, sweep

NAME = "minority_collapse"
FEATURES = {"relu": "ReLU", "free": "no ReLU"}
PATTERNS = ("step", "exponential")


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(collapse.read(folder, *collapse.DESCENT))}, out)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """Draw every figure of the study."""
    table = collapse.read(folder, *collapse.DESCENT)
    figures = (minority_collapse_bias, minority_collapse_sizes, minority_collapse_cuts)
    return stored.write({NAME: make(table)} | {figure.NAME: figure.make(table) for figure in figures}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a row for each kind of features, for each pattern the optimum and where descent ends."""
    panels = []
    for features, name in FEATURES.items():
        labels = collapse.LABELS[0], f"{name}:  {collapse.LABELS[1]}"
        row: list[plots.PhaseMap | plots.ShareMap] = []
        for pattern in PATTERNS:
            grid = collapse.cells(table, panel="map", K=10, features=features, pattern=pattern)
            ends = collapse.bisected(table, features=features, pattern=pattern)
            row += [
                collapse.regime_map(grid, f"{pattern}: optimum", ends, labels),
                collapse.killed_map(grid, f"{pattern}: descent", labels),
            ]
        panels.append(row)
    maps = collapse.pick(table, panel="map")
    caption = (
        rf"$K=10$ classes, width $d={maps['width'][0]}$, no bias; {collapse.RATIO}, $\lambda=\sqrt{{\lambda_W\lambda_H}}$. "
        r"Step: five classes of $R\,n_{\min}$ samples, five of $n_{\min}$; exponential: as CIFAR-10-LT. "
        f"Optimum: {collapse.proof(maps)}; dots: bisected between cells. "
        "Where lines of theory coincide, that of the later regime is drawn. "
        f"Descent: {maps['descents'][0]} seeds a cell, {collapse.rule(maps)}. {collapse.killed(maps)}{collapse.CELLS}"
    )
    title = "Minority collapse over imbalance and regularisation, at the optimum and where descent ends"
    return stored.Drawing(panels, title, caption, height=4.9, ncols=3)
