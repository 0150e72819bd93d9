"""Rank and its smooth stand-ins, of any matrices (B, m, n): features, class means, weights, logits."""

from __future__ import annotations

import numpy as np

from ufm.arrays import Array, namespace
from ufm.metrics.door import matrices, quotient


def singular_values(A: Array) -> Array:
    """Singular values of A (B, m, n), largest first, (B, min(m, n)); NaN where A is not finite."""
    return left_svd(matrices("singular_values", "A", A, "(B, m, n)"))[1]


def numerical_rank(A: Array, rtol: float | None = None) -> Array:
    """Number of singular values above rtol times the largest, (B,); rtol = max(m, n) 2^-52 by default, as in MATLAB and numpy."""
    s = left_svd(matrices("numerical_rank", "A", A, "(B, m, n)"))[1]
    xp = namespace(s)
    rtol = max(A.shape[1:]) * float(np.finfo(np.float64).eps) if rtol is None else rtol
    count = xp.sum(xp.astype(s > rtol * s[:, :1], s.dtype), axis=-1)
    return xp.where(xp.isnan(s[:, 0]), xp.nan, count)


def stable_rank(A: Array) -> Array:
    """||A||_F^2/||A||_2^2, (B,); 0 for a zero matrix. Source: Rudelson & Vershynin 2007."""
    s = _relative(left_svd(matrices("stable_rank", "A", A, "(B, m, n)"))[1])
    return namespace(s).vecdot(s, s)


def effective_rank(A: Array) -> Array:
    """exp(-sum_i p_i log p_i) with p = s/sum(s), s the singular values (not their squares), (B,); 0 for a zero matrix.

    Source: Roy & Vetterli, EUSIPCO 2007.
    """
    s = _relative(left_svd(matrices("effective_rank", "A", A, "(B, m, n)"))[1])
    xp = namespace(s)
    p = quotient(s, xp.sum(s, axis=-1, keepdims=True))
    entropy = -xp.sum(p * xp.log(xp.where(p == 0, 1.0, p)), axis=-1)
    return xp.where(s[:, 0] == 0, 0.0, xp.exp(entropy))


def participation_ratio(A: Array) -> Array:
    """(sum_i s_i^2)^2/sum_i s_i^4, (B,): the effective number of principal directions; 0 for a zero matrix."""
    s = _relative(left_svd(matrices("participation_ratio", "A", A, "(B, m, n)"))[1])
    vecdot = namespace(s).vecdot
    return quotient(vecdot(s, s) ** 2, vecdot(s * s, s * s))


def left_svd(A: Array) -> tuple[Array, Array]:
    """Left singular vectors (B, m, r) and singular values (B, r); both NaN in runs with a NaN, which would stop the decomposition."""
    xp = namespace(A)
    broken = xp.any(xp.isnan(A), axis=(1, 2), keepdims=True)
    U, s, _ = xp.linalg.svd(xp.where(broken, 0.0, A), full_matrices=False)
    return xp.where(broken, xp.nan, U), xp.where(broken[:, :, 0], xp.nan, s)


def _relative(s: Array) -> Array:
    return quotient(s, s[:, :1])
