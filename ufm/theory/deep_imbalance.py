"""Deep linear chains with cross-entropy and unequal classes: generalised DNC under STEP imbalance, and what lower ranks cost beside it.

    F(M) = sum_c (n_c/N) CE(m_c) + (lambda/2)(L+1) sum_i s_i(M D^{1/2})^p,   D = diag(n_c),   p = 2/(L+1)

with lambda = (lam_h prod_l lam_w[l])^{1/(L+1)} = `mse.level(lam_w, lam_h)`: n is in D; for equal classes lambda_eff = lambda n^{1/(L+1)}.
M (K, K) holds class logits in columns, counts (K,). Generalised DNC has the direction of the global optimum at L = 1, which tends to the
simplex-encoded labels I - 11^T/K as lambda -> 0. Source: Garrod & Keating 2025 (arXiv 2410.23169), Appendix A and Theorems 2 and 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.records import NoTheory
from ufm.theory import deep, deep_points, deep_scale
from ufm.theory.deep_codes import Tied

Floats = NDArray[np.float64]


def value(M: ArrayLike, counts: ArrayLike, lam: ArrayLike, depth: int) -> Floats:
    """F(M), (...), of any M (..., K, K): the least value of factors that make these class logits."""
    X, n = np.asarray(M, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    K = X.shape[-1]
    R = (X - np.diagonal(X, axis1=-2, axis2=-1)[..., None, :]) * (1 - np.eye(K))  # own entry 0
    top = R.max(axis=-2, keepdims=True)
    others = (np.exp(R - top) * (1 - np.eye(K))).sum(axis=-2)
    losses = top[..., 0, :] + np.log1p(np.expm1(-top[..., 0, :]) + others)
    return np.asarray(losses @ (n / n.sum()) + deep.penalty(X * np.sqrt(n), lam, depth))


def simplex_labels(K: int) -> Floats:
    """I - 11^T/K, (K, K): simplex-encoded labels (SEL), the direction of generalised DNC as lambda -> 0, whatever the counts."""
    return np.asarray(np.eye(K) - 1 / K)


def generalised_dnc(counts: ArrayLike, lam: float) -> Floats:
    """M (K, K) of the global optimum at L = 1, sizes of at most two kinds; NoTheory where it merges or loses classes (large lambda)."""
    return deep_points.at(step(counts), lam, 1).M


def step(counts: ArrayLike) -> Tied:
    """M D^{1/2} = s_1 P_1 + s_2 P_2 + u v^T for classes of two sizes, of full rank K - 1: symmetric under moves among equal classes.

    P_g centres group g (k_g classes), u is the unit contrast of the groups, v = (v_1 on group 1, v_2 on group 2); scales s_1, s_2, then
    sqrt(k_g) v_g; singular values s_1, s_2, |v|. Stationary in its scales it is critical at every depth (`deep_points.at`, with lambda of
    this module); at L = 1 F is convex and it is the global optimum. ValueError for three sizes or more, or for one.
    """
    n = np.asarray(counts, dtype=np.float64)
    sizes = np.unique(n)[::-1]
    if n.ndim != 1 or len(sizes) != 2 or not np.all(n > 0):
        raise ValueError(
            f"deep_imbalance.step: counts is {n}, but must be (K,) with classes of two sizes; for one size use deep_points.dnc"
        )
    K, group = len(n), (n[:, None] == sizes).T
    k = group.sum(axis=1)
    contrast = np.sqrt(K / k.prod())  # between the entries of u
    columns = []
    for g, (size, many) in enumerate(zip(sizes, k, strict=True)):
        inside, outside = np.zeros(4), np.zeros(4)
        inside[g] = 1 / np.sqrt(size)
        outside[g] = (1 - 1 / many) / np.sqrt(size)
        outside[2 + g] = (-1) ** g * contrast / np.sqrt(many * size)
        columns.append((float(many * size / n.sum()), np.stack([inside, outside]), np.array([many - 1, K - many], dtype=np.float64)))
    forms = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    ranks = np.array([*(k - 1), 1], dtype=np.float64)
    limit = np.array([*np.sqrt(sizes), np.sqrt(sizes[0] * k[1] / K), -np.sqrt(sizes[1] * k[0] / K)])  # I - 11^T/K
    kept = np.array([k[0] > 1, k[1] > 1, True, True])  # a class alone has no centring
    forms, ranks = forms[np.append(kept[:2], True)][:, kept], ranks[np.append(kept[:2], True)]
    columns = [(weight, gaps[:, kept][many > 0], many[many > 0]) for weight, gaps, many in columns]
    ray = deep_scale.part(1.0, 1.0, K - 1, np.sqrt(forms @ limit[kept] ** 2), ranks)

    def start(lam: Floats, depth: int) -> Floats:
        found = deep_scale.scale(ray, lam, depth)
        return np.asarray(np.where(np.isnan(found), max(deep_scale.fold(ray, depth), 0.1), found)[..., None] * limit[kept])

    def pattern(x: Floats) -> Floats:
        full = np.zeros((*x.shape[:-1], 4))
        full[..., kept] = x
        u = np.where(group[0], np.sqrt(k[1] / (K * k[0])), -np.sqrt(k[0] / (K * k[1])))
        M = u[:, None] * (full[..., 2:] / np.sqrt(k))[..., group.argmax(axis=0)][..., None, :]
        for g, own in enumerate(group):
            M = M + full[..., g, None, None] * (np.diag(own) - np.outer(own, own) / k[g])
        return np.asarray(M / np.sqrt(n))

    return Tied(f"generalised DNC of {k[0]} + {k[1]} classes", K, tuple(columns), forms, ranks, start, limit[kept], pattern)


def along(M: ArrayLike, counts: ArrayLike, name: str = "direction") -> Tied:
    """The ray beta M as a code of one scale: `deep_points.levels(along(M, n), lam, L)` is its large stationary scale and value.

    M (K, K) must be diagonally superior, so that the loss falls along the ray; ValueError otherwise.
    """
    X, n = np.asarray(M, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    _superior("along", X)
    K = len(n)
    gaps = _gaps(X)
    columns = tuple((float(size / n.sum()), gaps[:, [c]], np.ones(K - 1)) for c, size in enumerate(n))
    s = np.linalg.svd(X * np.sqrt(n), compute_uv=False)
    rank = int((s > 1e-12 * s[0]).sum())

    def start(lam: Floats, depth: int) -> Floats:
        ray = deep_scale.part(1.0, gaps.min(), K - 1, s[:rank], np.ones(rank))
        found = deep_scale.scale(ray, lam, depth)
        return np.asarray(np.where(np.isnan(found), max(deep_scale.fold(ray, depth), 0.1), found)[..., None])

    limit = np.array([1 / gaps.min()])
    return Tied(name, K, columns, np.square(s[:rank, None], dtype=np.float64), np.ones(rank), start, limit, lambda x: x[..., None] * X)


def diagonally_superior(M: ArrayLike) -> bool:
    """Whether the own entry is strictly the largest of every column of M (K, K)."""
    return bool(_gaps(np.asarray(M, dtype=np.float64)).min() > 0)


def least_rank(K: int) -> int:
    """q_K, the least rank of a diagonally superior K x K matrix: 1 for K = 2, else 2 (points of a circle)."""
    if K < 2:
        raise ValueError(f"deep_imbalance.least_rank: K is {K}, but a margin needs two classes")
    return 1 if K == 2 else 2


def overtaking_depth(M: ArrayLike, X: ArrayLike, counts: ArrayLike) -> int:
    """Theorem 2 made explicit: from this depth on, min_beta F(beta M) < min_alpha F(alpha X) at every lambda (unless both are at 0).

    M is scaled so that every gap of its columns is at least the largest gap of the same column of X, so it fits better at equal scale;
    with singular values m_i of M D^{1/2}, x_i of X D^{1/2} its penalty is smaller iff sum m_i^p < sum x_i^p, which holds for good once
    p log(m_1/x_r) < log(r/q). The least such L after which it never fails. ValueError unless M is diagonally superior and X has a
    positive gap (without one its best scale is 0), NoTheory unless the rank q of M is below the rank r of X.
    """
    low, high, n = (np.asarray(a, dtype=np.float64) for a in (M, X, counts))
    _superior("overtaking_depth", low)
    most = _gaps(high).max(axis=0)
    if most.max() <= 0:
        raise ValueError(f"deep_imbalance.overtaking_depth: the largest gap of X is {most.max():.6g}, but must be positive; turn X around")
    low = low * (np.maximum(most, 0.0) / _gaps(low).min(axis=0)).max()
    m, x = (_spectrum(a * np.sqrt(n)) for a in (low, high))
    if len(m) >= len(x):
        raise NoTheory(f"deep_imbalance.overtaking_depth: the rank of M is {len(m)}, but must be below {len(x)}, the rank of X")
    ratio = float(np.log(m[0] / x[-1]))
    depth = max(1, int(np.ceil(2 * ratio / np.log(len(x) / len(m)))))
    while depth > 1 and (m ** (2 / depth)).sum() < (x ** (2 / depth)).sum():  # the depth below it has p = 2/depth
        depth -= 1
    return depth


def _gaps(X: Floats) -> Floats:
    """Own minus other entries of every column, (K - 1, K)."""
    K = X.shape[-1]
    own = np.eye(K, dtype=bool)
    return np.asarray((np.diagonal(X) - X).T[~own].reshape(K, K - 1).T)


def _spectrum(X: Floats) -> Floats:
    s = np.linalg.svd(X, compute_uv=False)
    return np.asarray(s[s > 1e-12 * s[0]])


def _superior(call: str, X: Floats) -> None:
    if X.ndim != 2 or X.shape[0] != X.shape[1] or not diagonally_superior(X):
        raise ValueError(
            f"deep_imbalance.{call}: M is {X!r:.60}, but must be a square matrix whose own entry is the largest of every column; "
            "such are the patterns of deep_points.candidates"
        )
