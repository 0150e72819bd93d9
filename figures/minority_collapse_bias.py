"""Regimes of ReLU features with a free and with a penalised bias, K = 10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import collapse, stored
from ufm import sweep

NAME = "minority_collapse_bias"
BIASES = {"free": "free bias", "penalised": "penalised"}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(collapse.read(folder))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: for step and exponential counts, the certified regimes with either bias."""
    maps = collapse.pick(table, panel="bias")
    panels = [
        collapse.regime_map(collapse.cells(maps, bias=bias, pattern=pattern), f"{pattern}, {name}")
        for pattern in ("step", "exponential")
        for bias, name in BIASES.items()
    ]
    caption = (
        rf"ReLU features, $K=10$ classes, width $d={maps['width'][0]}$; {collapse.RATIO}, $\lambda=\sqrt{{\lambda_W\lambda_H}}$. "
        f"Cells: computed optimum, {collapse.proof(maps)}; theory's lines where a theorem gives them. "
        rf"Penalised: $\lambda_b={np.nanmax(maps['lam_b']):g}$. "
        "A class at zero need not be the smallest: a free bias can carry the largest class alone, its features at zero "
        "however weak the regularisation."
    )
    return stored.Drawing([panels], "Regimes of the optimum with a bias: ReLU features", caption, height=2.7, ncols=3)
