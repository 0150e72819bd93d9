"""Where the regimes of plain cross-entropy (depth 1) end: the levels of lambda = sqrt(lam_w lam_h) that are exactly known, cell by cell."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.problem import Problem
from ufm.theory import blocks, cross_entropy, imbalance

Floats = NDArray[np.float64]


class Boundaries(NamedTuple):
    """Levels lambda* per cell, (G,): from which some classes have merged, some are at zero, all are; NaN where no theorem gives one.

    Regimes follow each other in this order; one that does not occur has the level of the next.
    """

    merged: Floats
    minority_zero: Floats
    all_zero: Floats


def boundaries(problem: Problem) -> Boundaries:
    """The regime boundaries of plain cross-entropy, class weights allowed, for the counts and biases of `problem` (penalties are not read).

    ReLU without bias: Dang et al. 2024 (`imbalance.collapse_level`). ReLU with a bias: complete collapse where the copositive level is
    exact; merging at n_B = kappa^2 where the bias is free, n_B the smallest group of equal classes, if that comes before. Free features:
    `cross_entropy.merging_level`, `blocks.between_zero_level`, `cross_entropy.zero_level`. ValueError for other losses and depths.
    """
    loss: Any = problem.loss
    if problem.depth != 1 or getattr(loss, "name", "") != "CE" or not loss.plain():
        raise ValueError(f"boundaries: got depth {problem.depth} and {loss}, but they are known for plain cross-entropy and depth 1 only")
    omega = loss.class_weights
    weights = np.broadcast_to(1.0 if omega is None else omega, problem.counts.shape)
    levels = [_of_cell(problem, n, w, g) for g, (n, w) in enumerate(zip(problem.counts, weights, strict=True))]
    return Boundaries(*np.array(levels).T)


def _of_cell(problem: Problem, n: NDArray[np.int64], omega: Floats, g: int) -> tuple[float, float, float]:
    levels = imbalance.collapse_level(n, omega)
    lam_b = None if problem.lam_b is None else float(problem.lam_b[g])
    cell = cross_entropy.groups(n, omega)
    if problem.features != "free" and (lam_b is None or len(cell.members) == 1):
        return float(levels.min()), float(levels.min()), float(levels.max())
    if len(cell.members) == 1:
        level = float(cross_entropy.balanced_level(len(n), n[0], weight=omega[0]))
        return level, level, level
    b = cross_entropy.bias_alone(omega * n / n.sum(), lam_b)
    several, merging = bool(np.any(cell.members > 1)), cross_entropy.merging_level(cell)
    if problem.features != "free":
        bound = cross_entropy.relu_zero_level(cell, cross_entropy.softmax(b))
        merges = several and lam_b == 0 and merging < bound.lower
        return merging if merges else np.nan, np.nan, bound.upper if bound.upper == bound.lower else np.nan
    zero = cross_entropy.zero_level(cell, cross_entropy.softmax(b))
    start = np.zeros(len(cell.members))
    start[cell.label] = b
    between = blocks.between_zero_level(cell, zero, lam_b, start) if several else zero
    dying = float(np.min(np.where(cell.members > 1, np.maximum(cell.attraction, between), between)))
    return min(merging, dying), dying, zero
