"""The phase diagram of minority collapse: proven regimes over imbalance ratio and lambda, theory's boundaries on top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from figures import rows
from ufm.plots import REGIME_COLOURS, Boundary, PhaseMap, phase_diagram, phase_legend, style
from ufm.records import Regime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

K = 10
PATTERNS = {
    "exponential": r"exponential, as CIFAR-10-LT: $n_k=\lfloor 5000\,R^{-(k-1)/9}\rfloor$",
    "step": r"step: five classes of $5000$, five of $5000/R$",
}
LAM_K = [f"lam_{k}" for k in range(1, K + 1)]
NUMBERS = ["ratio", "lam", "dead", "tol", "lam_minority", "lam_all", *LAM_K]
WORDS = {"pattern": list(PATTERNS), "regime": [regime.name for regime in Regime], "certified": ["True", "False"]}

LIMIT = r"\kappa^2K/(K-1)"
SMALLEST = (rf"theory: smallest class, $n_{{\min}}={LIMIT}$", {"linewidth": 1.4})
LARGEST = (rf"theory: largest class, $n_{{\max}}={LIMIT}$", {"linewidth": 1.4, "linestyle": (0, (3.5, 1.2))})
BETWEEN = (rf"theory: each class between, $n_k={LIMIT}$", {"linewidth": 0.4})
FEW, MANY = "#FFDE9E", "#A85500"  # one class at zero, all but one


def draw(stored: Path, out: Path) -> list[Path]:
    """Draw the rows of the study as png and pdf into `out`; the files written."""
    table = rows.read(stored, "minority_collapse", NUMBERS, WORDS)
    out.mkdir(parents=True, exist_ok=True)
    with style.context():
        figure = make(table)
        return [style.save(figure, out / f"minority_collapse.{kind}") for kind in ("png", "pdf")]


def make(table: rows.Columns) -> Figure:
    """The figure: a panel for each pattern of class counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(style.PAGE, 3.5))
    panels = figure.subplots(1, len(PATTERNS), sharex=True, sharey=True)
    maps = [phase_map(rows.on_grid(rows.pick(table, table["pattern"] == pattern), "ratio", "lam")) for pattern in PATTERNS]
    for panel, data, title in zip(panels, maps, PATTERNS.values(), strict=True):
        drawn = phase_diagram(data, panel)
        panel.set_title(title)
        panel.set_xlabel(r"imbalance ratio $R$")
    panels[0].set_ylabel(r"$\lambda=\sqrt{\lambda_W\lambda_H}$")
    levels = np.arange(K + 1)
    bar = figure.colorbar(drawn.cells, ax=panels, pad=0.01, boundaries=[*levels - 0.5, K + 0.5], values=levels, ticks=levels)
    bar.set_label("classes with zero features")
    bar.ax.tick_params(length=0)
    bar.minorticks_off()
    phase_legend(figure, *maps, loc="outside upper center", ncols=2, columnspacing=3, handlelength=3)
    figure.supxlabel(caption(table), fontsize=7)
    return figure


def caption(table: rows.Columns) -> str:
    """What the cells are, and how well they are proven."""
    proven, tol = np.count_nonzero(table["certified"] == "True"), np.log10(table["tol"].max())
    gap = rf"relative gap proven $\leq 10^{{{tol:.3g}}}$ in {proven} of {table['tol'].size} cells"
    return rf"ReLU features, $K={K}$, width $2K$, no bias, $\kappa=N\lambda$. Cells: computed optimum, {gap}."


def phase_map(grid: rows.Columns) -> PhaseMap:
    """The measured regimes, minority collapse shaded by the number of classes at zero; the lines at which theory lets each class die."""
    codes = np.select([grid["regime"] == r.name for r in (Regime.UNKNOWN, Regime.MERGED)], [-1, K + 1], grid["dead"]).astype(int)
    regimes = [Regime.DISTINCT, *[Regime.MINORITY_ZERO] * (K - 1), Regime.ALL_ZERO, Regime.MERGED]
    return PhaseMap(
        x=grid["ratio"][0],
        y=grid["lam"][:, 0],
        codes=codes,
        names=[regime.value for regime in regimes],
        colours=[REGIME_COLOURS[regimes[0]], *_shades(K - 1), *(REGIME_COLOURS[regime] for regime in regimes[K:])],
        certified=grid["certified"] == "True",
        boundaries=boundaries(grid),
    )


def boundaries(grid: rows.Columns) -> list[Boundary]:
    """Theory's lines at the ratios of the grid; thin ones only where they differ from the outer two."""
    outer = [("lam_minority", *SMALLEST), ("lam_all", *LARGEST)]
    inner = [name for name in LAM_K if not any(np.array_equal(grid[name], grid[other]) for other, *_ in outer)]
    thin = [(name, BETWEEN[0] if name == inner[0] else None, BETWEEN[1]) for name in inner]
    return [Boundary(grid["ratio"][0], grid[name][0], label, look) for name, label, look in (*outer, *thin)]


def _shades(count: int) -> list[tuple[float, ...]]:
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("zero", [FEW, REGIME_COLOURS[Regime.MINORITY_ZERO], MANY])
    return [tuple(colour) for colour in scale(np.linspace(0, 1, count))]
