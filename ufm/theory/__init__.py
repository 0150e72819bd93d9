"""What theory predicts for a problem: closed forms, regimes and thresholds, one function a theorem, and `predict` over them.

`imbalance` ReLU cross-entropy under imbalance; `cross_entropy` balanced cases, the bias alone, zero and merging conditions; `blocks`
unequal classes near complete collapse; `mse` mean squared error, deep linear too; `limits` floors and margins of features on a sphere;
`cells` turns theorems into predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ufm.problem import Problem
from ufm.records import NoTheory, Prediction
from ufm.theory import cells
from ufm.theory.cells import Draft

__all__ = ["HYPOTHESES", "THEOREMS", "predict"]


class Theorem(NamedTuple):
    """A named statement, the names of its hypotheses on the problem as a whole, and the function that fills the cells."""

    name: str
    hypotheses: tuple[str, ...]
    function: Callable[[Problem], Draft]


def _plain(problem: Any) -> bool:
    return getattr(problem.loss, "name", "") == "CE" and bool(problem.loss.plain())


def _standard(problem: Any) -> bool:
    return getattr(problem, "radius", None) is None and type(getattr(problem, "head", None)).__name__ in ("NoneType", "Learned")


# name -> whether a problem satisfies it
HYPOTHESES: dict[str, Callable[[Problem], bool]] = {
    "loss is plain cross-entropy (no smoothing, adjustment or temperature)": _plain,
    "loss is mean squared error": lambda p: getattr(p.loss, "name", "") == "MSE",
    "classifier is learned and features are penalised": _standard,
    "depth is 1": lambda p: p.depth == 1,
    "chain is linear": lambda p: p.depth == 1 or p.activation == "linear",
    "features are free": lambda p: p.features == "free",
    "features are nonnegative": lambda p: p.features != "free",
    "there is no bias": lambda p: p.lam_b is None,
    "there is a bias": lambda p: p.lam_b is not None,
    "bias is free (lam_b = 0) in some cell": lambda p: p.lam_b is not None and bool(np.any(p.lam_b == 0)),
}

PLAIN, SQUARED = "loss is plain cross-entropy (no smoothing, adjustment or temperature)", "loss is mean squared error"
STANDARD, FREE_BIAS = "classifier is learned and features are penalised", "bias is free (lam_b = 0) in some cell"

THEOREMS = (
    Theorem(
        "ReLU cross-entropy", (PLAIN, STANDARD, "depth is 1", "features are nonnegative", "there is no bias"), cells.relu_cross_entropy
    ),
    Theorem(
        "ReLU cross-entropy with bias",
        (PLAIN, STANDARD, "depth is 1", "features are nonnegative", "there is a bias"),
        cells.relu_cross_entropy_bias,
    ),
    Theorem("cross-entropy", (PLAIN, STANDARD, "depth is 1", "features are free"), cells.free_cross_entropy),
    Theorem("squared error", (SQUARED, STANDARD, "chain is linear", "there is no bias"), cells.mse_without_bias),
    Theorem("squared error with bias", (SQUARED, STANDARD, "chain is linear", "features are free", FREE_BIAS), cells.mse_free_bias),
    Theorem(
        "ReLU squared error with bias", (SQUARED, STANDARD, "depth is 1", "features are nonnegative", FREE_BIAS), cells.relu_mse_free_bias
    ),
)


def predict(problem: Problem) -> Prediction:
    """The global optimum of every cell: value, regime, distance to the nearest regime boundary, margins, logits, Grams, bias, source.

    A cell without a closed form has NaN and says why in `source`; its regime and distance are given where they are exactly known, else
    UNKNOWN and NaN, with `collapsed` False. Geometry is that of class means, whatever the columns of the problem; a free bias is centred
    for cross-entropy. Raises NoTheory, naming the failed hypotheses, where no theorem covers the problem as a whole.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"predict: problem is {problem!r}, but must be a ufm.Problem")
    failed = [[name for name in theorem.hypotheses if not HYPOTHESES[name](problem)] for theorem in THEOREMS]
    for theorem, missing in zip(THEOREMS, failed, strict=True):
        if not missing:
            draft = theorem.function(problem)
            for g in np.flatnonzero(cells.zero_penalty(problem)):
                draft.withdraw(int(g), cells.NO_PENALTY)
            return draft.prediction()
    fewest = min(map(len, failed))
    near = [f"'{t.name}' needs: {'; '.join(m)}" for t, m in zip(THEOREMS, failed, strict=True) if len(m) == fewest]
    raise NoTheory(f"predict: no theorem covers this problem: {', or '.join(near)}; use ufm.solve, or ufm.simulate under a head or radius")
