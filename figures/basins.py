"""The rows of the study of basins in words and as panels: what its figures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Bars, style

STUDY = "deep_basins"
COLUMNS = (
    *("panel", "K", "n", "depth", "width", "lam", "scale", "method", "columns", "seeds", "settled_below", "lam_eff"),
    *("dnc", "dnc_low", "dnc_high", "converged", "ranks", "mean_rank", "mean_rank_error", "structures", "unconverged", "named"),
    *("excess", "gradient", "evaluations"),
)
SETTLED = 0.95  # share of a point's runs that must be certified local minima
UNSETTLED = f"< {100 * SETTLED:.0f} % certified minima"
BAR = "share ending at DNC"


def read(folder: Path) -> sweep.Table:
    """The rows of the study in its folder."""
    return stored.read(folder, STUDY, COLUMNS)


def pick(table: sweep.Table, panel: str) -> sweep.Table:
    """The rows of one panel."""
    return stored.pick(table, STUDY, panel=panel)


def setting(table: sweep.Table) -> str:
    """In words, what all points share."""
    K, n = table["K"][0], table["n"][0]
    return (
        rf"Deep linear chain, cross-entropy, $K={K}$ classes of $n={n}$, one penalty $\lambda$ on every factor. Entries of all factors are "
        r"drawn from $N(0,\mathrm{scale}^2/d)$, then the samples of a class start at their mean; gradient flow to a scale-free gradient of "
        rf"$10^{{{np.log10(table['settled_below'][0]):.0f}}}$. Only end points that are certified local minima (inertia of the whole "
        "Hessian) count; the others are unconverged."
    )


def penalty(rows: sweep.Table) -> str:
    """The one lambda of the rows, as a power of 2."""
    return rf"$\lambda=2^{{{np.log2(rows['lam'][0]):g}}}$"


def told(rows: sweep.Table, i: int) -> str:
    """What a point holds, for the interactive figure."""
    at = {name: rows[name][i] for name in COLUMNS}
    ends = round(at["converged"] * at["seeds"])
    lines = [
        f"L = {at['depth']}, d = {at['width']}, λ = {at['lam']:.4g} (λ_eff = {at['lam_eff']:.4g}), scale {at['scale']:g}, {at['method']}",
        f"DNC {at['dnc']:.2f} ({at['dnc_low']:.2f} to {at['dnc_high']:.2f}) of {at['seeds']} seeds; certified minima {at['converged']:.0%}",
        f"ends: {at['structures'] or 'none'}",
    ]
    if ends:
        level = f", to {at['excess']:.1e}" if at["named"] else ""
        lines.append(f"{at['named']} of {ends} at a closed-form level{level}; scale-free gradient at most {at['gradient']:.1e}")
    return "\n".join([*lines, f"unconverged: {at['unconverged']}"] if at["unconverged"] else lines)


def ranks(table: sweep.Table) -> list[int]:
    """The ranks at which some run of the rows ended, rising."""
    return [int(r) for r in np.flatnonzero(table["ranks"].sum(axis=0))]


def bars(rows: sweep.Table, x: Sequence[str], labels: tuple[str, str], title: str, shown: Sequence[int]) -> Bars:
    """The shares of the ranks shown among the runs of each row; runs without a certified end point are hatched."""
    counts = rows["ranks"].astype(np.int64)
    K = int(rows["K"][0])
    own = style.ordered(K - 1)
    return Bars(
        x=x,
        counts=counts.T[list(shown)],
        names=["zero" if r == 0 else f"rank {r}" for r in shown],
        colours=[style.NEUTRAL if r == 0 else own[min(r, K - 1) - 1] for r in shown],
        unsettled=rows["seeds"] - counts.sum(axis=1),
        untrusted="no certified minimum",
        title=title,
        labels=labels,
        shared=True,
    )


def sorted_by(rows: sweep.Table, x: str) -> sweep.Table:
    """The rows with this column rising."""
    return rows.pick(np.argsort(rows[x]))


def trusted(rows: sweep.Table) -> NDArray[np.bool_]:
    """Whether enough runs of each row ended at certified minima."""
    return np.asarray(rows["converged"] >= SETTLED)
