"""The nearest simplex ETF the slow way: the polar factor by SVD, and its gradient by the dense linear system of a declarative node.

Single problems in numpy, float64. The system is that of `studies.etf_node`, which imports nothing of `ufm`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from studies import etf_node
from studies.etf_node import dense_gradient as dense_gradient
from studies.etf_node import normalised

Floats = NDArray[np.float64]


def frame_of(K: int, form: str) -> Floats:
    """F (K, m) of unit Frobenius norm, entry by entry: (I - 11^T/K)/sqrt(K-1), or Helmert columns (1, ..., 1, -j, 0, ...)/sqrt(j(j+1))."""
    if form == "full":
        return np.array([[((i == j) - 1 / K) / np.sqrt(K - 1) for j in range(K)] for i in range(K)])
    F = np.zeros((K, K - 1))
    for j in range(1, K):
        F[:j, j - 1] = 1 / np.sqrt(j * (j + 1) * (K - 1))
        F[j, j - 1] = -j / np.sqrt(j * (j + 1) * (K - 1))
    return F


def nearest_point(Y: Floats, F: Floats, prox: Floats | None = None, delta: float = 0.0) -> Floats:
    """argmin over U^T U = I of ||Y - U F^T||_F^2 + (delta/2) ||U - prox||_F^2, (d, m)."""
    P, _, Qt = np.linalg.svd(2 * Y @ F + (delta * prox if prox is not None else 0), full_matrices=False)
    return np.asarray(P @ Qt)


def dense_pullback(means: Floats, grad_W: Floats, form: str, prox: Floats | None = None, delta: float = 0.0) -> Floats:
    """The gradient in the class means, (d, K), from one in W = sqrt(K) F U^T, (K, d)."""
    F = frame_of(means.shape[1], form)
    return etf_node.dense_pullback(means, grad_W, F, nearest_point(normalised(means), F, prox, delta), prox, delta)
