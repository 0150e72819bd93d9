"""Small instances of everything. A law is tried on every row; adding a row tries it against every law.

LOSSES, PROBLEMS and LIBRARIES are plain lists of (name, item); `factors` and `to_library` make inputs for them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.losses import MSE, CrossEntropy, DotRegression, Focal, from_autograd
from ufm.problem import Problem

Floats = NDArray[np.float64]


def autograd_ce(z: Any, e: Any) -> Any:
    """Cross-entropy of one column as a user would write it."""
    import autograd.numpy as anp

    top = anp.max(z)
    return top + anp.log(anp.sum(anp.exp(z - top))) - anp.sum(e * z)


def autograd_mse(z: Any, e: Any) -> Any:
    import autograd.numpy as anp

    return 0.5 * anp.sum((z - e) ** 2)


def spread(low: float, high: float, *shape: int) -> Floats:
    """Unequal numbers between low and high, the same each time."""
    return low + (high - low) * np.random.default_rng(7).random(shape)


# name -> loss for G cells of K classes
LOSSES: list[tuple[str, Callable[[int, int], Any]]] = [
    ("ce", lambda G, K: CrossEntropy()),
    ("ce_smoothed", lambda G, K: CrossEntropy(label_smoothing=0.1)),
    ("ce_weighted", lambda G, K: CrossEntropy(class_weights=spread(0.5, 2.0, K))),
    ("ce_weighted_cells", lambda G, K: CrossEntropy(class_weights=spread(0.5, 2.0, G, K))),
    ("ce_adjusted", lambda G, K: CrossEntropy(logit_adjustment=1.0)),
    ("ce_adjusted_cells", lambda G, K: CrossEntropy(logit_adjustment=spread(-1.0, 1.0, G, K))),
    ("ce_temperature", lambda G, K: CrossEntropy(temperature=2.0)),
    ("ce_temperature_classes", lambda G, K: CrossEntropy(temperature=spread(0.5, 2.0, K))),
    ("ce_temperature_cells", lambda G, K: CrossEntropy(temperature=spread(0.5, 2.0, G, K))),
    (
        "ce_everything",
        lambda G, K: CrossEntropy(
            0.05, class_weights=spread(0.5, 2.0, G, K), logit_adjustment=0.5, temperature=spread(0.5, 2.0, G, K)[:, ::-1]
        ),
    ),
    ("mse", lambda G, K: MSE()),
    ("focal_0", lambda G, K: Focal(0.0)),
    ("focal_half", lambda G, K: Focal(0.5)),
    ("focal_2", lambda G, K: Focal(2.0)),
    ("autograd_ce", lambda G, K: from_autograd(autograd_ce)),
    ("autograd_mse", lambda G, K: from_autograd(autograd_mse)),
    ("dot_regression", lambda G, K: DotRegression()),
]

# (G, K) -> class counts; the cells of a grid share N, so that both kinds of columns fit
COUNTS = {
    (1, 2): [3, 1],
    (1, 3): [3, 2, 1],
    (1, 4): [2, 2, 2, 2],
    (1, 5): [4, 2, 2, 1, 1],
    (2, 2): [[3, 1], [2, 2]],
    (2, 3): [[3, 2, 1], [2, 2, 2]],
    (2, 4): [[4, 2, 1, 1], [2, 2, 2, 2]],
    (2, 5): [[3, 1, 1, 1, 1], [2, 2, 1, 1, 1]],
}
FEATURES = [("free", "means"), ("free", "samples"), ("relu", "means"), ("relu", "samples"), ("relu_of_free", "samples")]
CHAINS = [(1, "linear"), (2, "linear"), (2, "relu"), (3, "linear"), (3, "relu")]
BIASES = [None, 0.0, 0.3]


def _problem(
    features: Any, columns: Any, depth: int, activation: Any, lam_b: Any, loss: tuple[str, Any], G: int, K: int
) -> tuple[str, Problem]:
    name = f"{features}-{columns}-{activation}{depth}-b{lam_b}-{loss[0]}-G{G}K{K}"
    problem = Problem(
        COUNTS[G, K],
        width=K + 1 if depth < 3 else max(K - 1, 2),
        depth=depth,
        features=features,
        activation=activation,
        loss=loss[1](G, K),
        lam_w=0.02 * (1.0 + np.arange(G * depth, dtype=np.float64).reshape(G, depth)),
        lam_h=0.01 * (2.0 + np.arange(G)),
        lam_b=lam_b,
        columns=columns,
    )
    return name, problem


def _problems() -> list[tuple[str, Problem]]:
    """Every features x columns x chain x bias, losses and sizes taking turns; then every loss, with and without the ReLU."""
    n, sizes = len(LOSSES), list(COUNTS)
    plans = enumerate(product(FEATURES, CHAINS, BIASES))
    turns = [_problem(*f, *chain, b, LOSSES[i % n], *sizes[(i + i // n) % len(sizes)]) for i, (f, chain, b) in plans]
    return turns + [_problem(f, "means", 1, "linear", b, loss, 2, 3) for loss, (f, b) in product(LOSSES, [("free", 0.0), ("relu", None)])]


PROBLEMS: list[tuple[str, Problem]] = _problems()


def factors(problem: Problem, runs: int = 1, seed: int = 0, scale: float = 0.7) -> tuple[Floats, ...]:
    """Random factors (H, W_1, ..., W_L[, b]) of B = G * runs runs, away from every kink; H >= 0 where the problem asks for it."""
    rng = np.random.default_rng(seed)
    B, d, K, L = problem.cells * runs, problem.width, problem.classes, problem.depth
    shapes = [(d, problem.labels.shape[1]), *[(d, d)] * (L - 1), (K, d), *([] if problem.lam_b is None else [(K, 1)])]
    arrays = [scale * rng.standard_normal((B, *shape)) for shape in shapes]
    if problem.features == "relu":
        arrays[0] = np.abs(arrays[0])
    return tuple(arrays)


# name -> numpy array to that library's array; a missing library is skipped by the test that asks for it
LIBRARIES = ["numpy", "torch", "strict", "strict_device1"]


def to_library(name: str, x: Any) -> Any:
    """x as an array of the named library; skips the test where the library is missing."""
    import pytest

    if name == "numpy":
        return np.asarray(x)
    if name == "torch":
        return pytest.importorskip("torch").asarray(np.array(x))
    strict = pytest.importorskip("array_api_strict")
    return strict.asarray(np.array(x), device=strict.Device("device1" if name == "strict_device1" else "CPU_DEVICE"))
