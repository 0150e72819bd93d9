"""Features against the classifier by angle, and both against their nearest simplex ETF: what a guided classifier is watched by.

With Q (K, K-1) an orthonormal basis of the vectors that sum to zero and Mt = (I - 11^T/K)/sqrt(K-1), the simplex ETF nearest to Y (d, K)
is ETF_Y = U Mt = polar(Y Q) Q^T/sqrt(K-1), ||ETF_Y||_F = 1; it needs d >= K - 1. For classifier rows pass W.mT.
Source: Markou, Ajanthan & Gould 2024 (arXiv 2411.01248) and its code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ufm.arrays import Array, column_sums, like, namespace
from ufm.frames import helmert
from ufm.metrics.collapse import EPS
from ufm.metrics.door import fits, matrices, membership, positive, units
from ufm.metrics.geometry import Centre, about, normalised
from ufm.metrics.rank import svd


def cosine_margins(H: Array, W: Array, labels: Any, multiplicity: Any = None) -> Array:
    """cos(h - mu_G, w_y - wbar) - max_{j != y} cos(h - mu_G, w_j - wbar) of each sample, (B, cols): K/(K-1) at collapse to an ETF.

    H (B, d, cols), W (B, K, d), labels (cols,) or (B, cols); mu_G the mean of all samples, a column standing for multiplicity (cols,) or
    (B, cols) of them, 1 by default; wbar the mean of the rows. NaN where a sample is at mu_G or a row at wbar. See `theory.limits`.
    """
    return _cosine_margins("cosine_margins", H, W, labels, multiplicity)[0]


def sorted_cosine_margins(H: Array, W: Array, labels: Any, multiplicity: Any = None) -> Array:
    """`cosine_margins` of each run in rising order, (B, cols): the distribution P_CM."""
    values = _cosine_margins("sorted_cosine_margins", H, W, labels, multiplicity)[0]
    return namespace(values).sort(values, axis=-1)


def cosine_margin(H: Array, W: Array, labels: Any, multiplicity: Any = None) -> Array:
    """Mean of `cosine_margins` over the samples, (B,); at most K/(K-1) for balanced classes."""
    return _mean(*_cosine_margins("cosine_margin", H, W, labels, multiplicity))


def own_cosine(H: Array, W: Array, labels: Any, multiplicity: Any = None) -> Array:
    """Mean over the samples of cos(h, w_y), (B,), both about the origin; arguments as in `cosine_margins`. NaN where a vector is zero."""
    H, W, member, m = _aligned("own_cosine", H, W, labels, multiplicity)
    cosines = units(W.mT).mT @ units(H)  # (B, K, cols)
    return _mean(column_sums(cosines * member)[:, 0, :], m)


def etf_distance(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """||Y - ETF_Y||_F^2, (B,), Y = C/||C||_F, C the class means (B, d, K) about the centre: squared distance to the nearest simplex ETF.

    = ||Y 1||^2/K + sum_i (s_i - 1/sqrt(K-1))^2 with s the singular values of Y Q, which does not cancel at an ETF; 1 for zero means.
    ValueError where d < K - 1.
    """
    Y = normalised(about("etf_distance", means, centre, counts))
    K = _etf_exists("etf_distance", Y)
    xp = namespace(Y)
    gaps = svd(_coordinates(Y))[1] - (K - 1) ** -0.5
    middle = xp.sum(Y, axis=-1)
    return xp.vecdot(middle, middle) / K + xp.vecdot(gaps, gaps)


def etf_separation(first: Array, second: Array) -> Array:
    """||ETF_A - ETF_B||_F^2, (B,), of the simplex ETFs nearest to two matrices A, B (B, d, K) of class vectors: between 0 and 4.

    Class means against W.mT, or against those of another time; centre and scale do not matter. NaN where one of them is not unique: the
    smallest singular value of A Q is at most max(d, K) 2^-52 times the largest. ValueError where d < K - 1.
    """
    A, B = (matrices("etf_separation", name, x, "(B, d, K)") for name, x in (("first", first), ("second", second)))
    fits("etf_separation", "second", B, tuple(A.shape), "first")
    apart = _frame("etf_separation", A) - _frame("etf_separation", B)
    return namespace(apart).sum(apart * apart, axis=(1, 2)) / (A.shape[2] - 1)


def _frame(call: str, Y: Array) -> Array:
    """polar(Y Q), (B, d, K - 1); NaN where it is not unique."""
    K = _etf_exists(call, Y)
    U, s, Vt = svd(_coordinates(Y))
    lost = s[:, -1:, None] <= max(Y.shape[1], K) * EPS * s[:, :1, None]
    return namespace(Y).where(lost, namespace(Y).nan, U @ Vt)


def _coordinates(Y: Array) -> Array:
    """Y Q, (B, d, K - 1), of the exactly centred Y: Q^T leaves rounding of the mean's size."""
    Y = Y - namespace(Y).mean(Y, axis=-1, keepdims=True)
    return Y @ like(helmert(Y.shape[-1]), Y).mT


def _etf_exists(call: str, Y: Array) -> int:
    d, K = Y.shape[1:]
    if K < 2 or d < K - 1:
        raise ValueError(f"metrics.{call}: {K} classes have width {d}, but a simplex ETF needs at least two, and width >= K - 1")
    return int(K)


def _cosine_margins(call: str, H: Array, W: Array, labels: Any, multiplicity: Any) -> tuple[Array, Array]:
    """The margins (B, cols), and the samples each column stands for, (B or 1, 1, cols)."""
    H, W, member, m = _aligned(call, H, W, labels, multiplicity)
    xp = namespace(H)
    if W.shape[1] < 2:
        raise ValueError(f"metrics.{call}: W has one row, but a margin needs at least two classes")
    centre = xp.sum(H * m, axis=-1, keepdims=True) / xp.sum(m, axis=-1, keepdims=True)
    cosines = units((W - xp.mean(W, axis=1, keepdims=True)).mT).mT @ units(H - centre)  # (B, K, cols)
    gaps = column_sums(cosines * member) - cosines
    return xp.min(xp.where(member > 0, xp.inf, gaps), axis=1), m


def _aligned(call: str, H: Array, W: Array, labels: Any, multiplicity: Any) -> tuple[Array, Array, Array, Array]:
    """H (B, d, cols), W (B, K, d), one-hot classes (B or 1, K, cols) and multiplicities (B or 1, 1, cols)."""
    H, W = matrices(call, "H", H, "(B, d, cols)"), matrices(call, "W", W, "(B, K, d)")
    cols = H.shape[2]
    fits(call, "W", W, (H.shape[0], W.shape[1], H.shape[1]), "H")
    m = positive(call, "multiplicity", np.ones(cols) if multiplicity is None else multiplicity, H, cols)
    return H, W, membership(call, labels, W.shape[1], H).mT, m


def _mean(values: Array, m: Array) -> Array:
    """Mean of values (B, cols) with weights m (B or 1, 1, cols)."""
    xp = namespace(values)
    return xp.sum(values * m[:, 0, :], axis=-1) / xp.sum(m[:, 0, :], axis=-1)
