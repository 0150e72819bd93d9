"""Rank and its smooth stand-ins, of any matrices (B, m, n): features, class means, weights, logits; and of the samples of each class."""

from __future__ import annotations

from typing import Any

import numpy as np

from ufm.arrays import Array, column_sums, device_of, namespace, readable
from ufm.metrics.door import matrices, membership, positive, quotient
from ufm.metrics.statistics import nobody_missing


def singular_values(A: Array) -> Array:
    """Singular values of A (B, m, n), largest first, (B, min(m, n)); NaN where A is not finite."""
    return svd(matrices("singular_values", "A", A, "(B, m, n)"))[1]


def numerical_rank(A: Array, rtol: float | None = None) -> Array:
    """Number of singular values above rtol times the largest, (B,); rtol = max(m, n) 2^-52 by default, as in MATLAB and numpy."""
    s = svd(matrices("numerical_rank", "A", A, "(B, m, n)"))[1]
    xp = namespace(s)
    rtol = max(A.shape[1:]) * float(np.finfo(np.float64).eps) if rtol is None else rtol
    count = xp.sum(xp.astype(s > rtol * s[:, :1], s.dtype), axis=-1)
    return xp.where(xp.isnan(s[:, 0]), xp.nan, count)


def stable_rank(A: Array) -> Array:
    """||A||_F^2/||A||_2^2, (B,); 0 for a zero matrix. Source: Rudelson & Vershynin 2007."""
    s = _relative(svd(matrices("stable_rank", "A", A, "(B, m, n)"))[1])
    return namespace(s).vecdot(s, s)


def effective_rank(A: Array) -> Array:
    """exp(-sum_i p_i log p_i) with p = s/sum(s), s the singular values (not their squares), (B,); 0 for a zero matrix.

    Source: Roy & Vetterli, EUSIPCO 2007.
    """
    s = _relative(svd(matrices("effective_rank", "A", A, "(B, m, n)"))[1])
    xp = namespace(s)
    p = quotient(s, xp.sum(s, axis=-1, keepdims=True))
    entropy = -xp.sum(p * xp.log(xp.where(p == 0, 1.0, p)), axis=-1)
    return xp.where(s[:, 0] == 0, 0.0, xp.exp(entropy))


def participation_ratio(A: Array) -> Array:
    """(sum_i s_i^2)^2/sum_i s_i^4, (B,): the effective number of principal directions; 0 for a zero matrix."""
    s = _relative(svd(matrices("participation_ratio", "A", A, "(B, m, n)"))[1])
    vecdot = namespace(s).vecdot
    return quotient(vecdot(s, s) ** 2, vecdot(s * s, s * s))


def nuclear_rank(A: Array) -> Array:
    """(||A||_*/||A||_F)^2 = (sum_i s_i)^2/sum_i s_i^2, (B,), between 1 and the rank; 0 for a zero matrix."""
    s = _relative(svd(matrices("nuclear_rank", "A", A, "(B, m, n)"))[1])
    xp = namespace(s)
    return quotient(xp.sum(s, axis=-1) ** 2, xp.vecdot(s, s))


def class_rank(H: Array, labels: Any, classes: int, multiplicity: Any = None) -> Array:
    """Mean over the classes of `nuclear_rank` of the features of one class, about the origin, (B,): 1 at collapse.

    H (B, d, cols) with labels (cols,) or (B, cols) in 0 ... classes - 1; a column stands for multiplicity (cols,) or (B, cols) samples,
    1 by default. ValueError for a class without samples. Source: "numerical rank" of Markou et al. 2024.
    """
    H = matrices("class_rank", "H", H, "(B, d, cols)")
    xp = namespace(H)
    B, d, cols = H.shape
    member = membership("class_rank", labels, classes, H)
    counts = xp.broadcast_to(column_sums(member), (B, 1, classes))
    nobody_missing("class_rank", counts)
    m = positive("class_rank", "multiplicity", np.ones(cols) if multiplicity is None else multiplicity, H, cols)
    samples = xp.reshape((H * xp.sqrt(m)).mT, (B * cols, d))
    n = xp.astype(counts[:, 0, :, None], xp.int64)  # (B, K, 1)
    slot = xp.arange(int(xp.max(n)) if readable(n) else cols, dtype=xp.int64, device=device_of(H))
    run = cols * xp.arange(B, dtype=xp.int64, device=device_of(H))
    by_class = xp.argsort(xp.broadcast_to(xp.argmax(member, axis=-1), (B, cols)), axis=-1) + run[:, None]
    place = xp.cumulative_sum(n, axis=1) - n + slot  # in by_class; (B, K, slots)
    place = xp.where(slot < n, place, 0) + run[:, None, None]
    chosen = xp.take(samples, xp.take(xp.reshape(by_class, (-1,)), xp.reshape(place, (-1,))), axis=0)
    Z = xp.where((slot < n)[:, :, :, None], xp.reshape(chosen, (*place.shape, d)), 0.0)
    return xp.mean(xp.reshape(nuclear_rank(xp.reshape(Z, (B * classes, slot.shape[0], d))), (B, classes)), axis=-1)


def svd(A: Array) -> tuple[Array, Array, Array]:
    """The thin singular value decomposition; NaN in runs with a NaN, which would stop it."""
    xp = namespace(A)
    broken = xp.any(xp.isnan(A), axis=(1, 2), keepdims=True)
    U, s, Vt = xp.linalg.svd(xp.where(broken, 0.0, A), full_matrices=False)
    return xp.where(broken, xp.nan, U), xp.where(broken[:, :, 0], xp.nan, s), xp.where(broken, xp.nan, Vt)


def _relative(s: Array) -> Array:
    return quotient(s, s[:, :1])
