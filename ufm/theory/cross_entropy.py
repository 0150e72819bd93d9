"""Cross-entropy: balanced closed forms, the optimal bias alone, and exactly when all features vanish or minority classes merge.

    F = sum_k (n_k/N) omega_k CE(W h_k + b, k) + (lam_w/2)||W||^2 + (lam_h/2) sum_k n_k||h_k||^2 + (lam_b/2)||b||^2

lambda = sqrt(lam_w lam_h), pi_k = n_k/N, a_k = omega_k sqrt(n_k)/N (`imbalance.attraction`), s = softmax(b*), b* the best bias alone.
Z = 0 is optimal iff the dual point Qt = (I - s 1^T) diag(a) has norm at most lambda: the spectral norm with free features, the maximum
over v >= 0 of ||Qt v||/||v|| with nonnegative ones. Balanced: a bias changes nothing, because the optimal one is constant by convexity
and permutation symmetry. Sources: Zhu et al. 2021 (arXiv 2105.02375) for the ETF, Hong & Ling 2023 (arXiv 2309.09725) for unequal
classes (they write lam ||W||^2 without halves).
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.theory import imbalance

Floats = NDArray[np.float64]


def balanced_level(K: int, n: ArrayLike, *, relu: bool = False, weight: ArrayLike = 1.0) -> Floats:
    """lambda* = omega/(K sqrt(n)), times sqrt((K-1)/K) with nonnegative features, (...): everything is zero from there on."""
    full = np.asarray(weight, dtype=np.float64) / (K * np.sqrt(np.asarray(n, dtype=np.float64)))
    return np.asarray(full * np.sqrt((K - 1) / K) if relu else full)


def balanced_margin(K: int, n: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, *, relu: bool = False, weight: ArrayLike = 1.0) -> Floats:
    """Z = M (I - J/K), M = log(1 + K (lambda*/lambda - 1))_+, (...): ETF means if free, an orthogonal frame if nonnegative; W an ETF.

    Free: e^M = 1/sqrt(lam_w lam_h n) - (K-1). Width at least K - 1, or K with nonnegative features.
    """
    u = balanced_level(K, n, relu=relu, weight=weight) / imbalance.level(lam_w, lam_h)
    return np.asarray(np.log1p(np.where(u > 1, K * (u - 1), 0.0)))


def balanced_value(K: int, n: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, *, relu: bool = False, weight: ArrayLike = 1.0) -> Floats:
    """F* = omega log(1 + (K-1) e^{-M}) + (K-1) lambda sqrt(n) M, or K c sqrt(n) M with c = lambda sqrt((K-1)/K) if nonnegative, (...)."""
    M = balanced_margin(K, n, lam_w, lam_h, relu=relu, weight=weight)
    cost = np.sqrt(K * (K - 1.0)) if relu else K - 1.0
    penalty = cost * imbalance.level(lam_w, lam_h) * np.sqrt(np.asarray(n, dtype=np.float64)) * M
    return np.asarray(np.asarray(weight) * np.log1p((K - 1) * np.exp(-M)) + penalty)


def bias_alone(shares: ArrayLike, lam_b: float | None) -> Floats:
    """b* = argmin_b sum_k p_k CE(b, k) + (lam_b/2)||b||^2, (..., K), for p_k = omega_k pi_k (..., K).

    No bias (None): 0. Free (0): log p, centred, the limit lam_b -> 0. Else damped Newton; sum_k b_k = 0 at the optimum.
    """
    p = np.asarray(shares, dtype=np.float64)
    if lam_b is None:
        return np.zeros(p.shape)
    if lam_b == 0:
        return np.asarray(np.log(p) - np.log(p).mean(axis=-1, keepdims=True))
    b, P = np.zeros(p.shape), p.sum(axis=-1, keepdims=True)
    for _ in range(NEWTON):
        s = softmax(b)
        d = P * s + lam_b
        # solution of (diag(d) - P s s^T) x = g that keeps sum x = 0, without dividing by lam_b
        x = (p - P * s - lam_b * b) / d
        x = x - x.sum(axis=-1, keepdims=True) * (s / d) / (s / d).sum(axis=-1, keepdims=True)
        reach = np.ptp(x, axis=-1, keepdims=True)
        b = b + damping(reach) * x
        if np.all(reach <= 1e-9 * np.ptp(b, axis=-1, keepdims=True) + 1e-15):  # the step just made squared it
            break
    return np.asarray(b - b.mean(axis=-1, keepdims=True))


NEWTON = 500


def damping(reach: ArrayLike) -> Floats:
    """log(1 + r)/r, the step that makes Newton monotone on log-sum-exp when logits move by at most r (Sun & Tran-Dinh 2019, nu = 2)."""
    r = np.maximum(np.asarray(reach, dtype=np.float64), 1e-30)
    return np.asarray(np.log1p(r) / r)


def softmax(b: ArrayLike) -> Floats:
    """e^{b_k} / sum_j e^{b_j}, (..., K)."""
    x = np.asarray(b, dtype=np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def bias_alone_value(shares: ArrayLike, b: ArrayLike, lam_b: float | None) -> Floats:
    """sum_k p_k CE(b, k) + (lam_b/2)||b||^2, (...): the value where every feature is zero."""
    p, x = np.asarray(shares, dtype=np.float64), np.asarray(b, dtype=np.float64)
    top, first = x.max(axis=-1, keepdims=True), x.argmax(axis=-1)[..., None] == np.arange(x.shape[-1])
    loss = np.log1p(np.where(first, 0.0, np.exp(x - top)).sum(axis=-1, keepdims=True)) + (top - x)
    return np.asarray((p * loss).sum(axis=-1) + (lam_b or 0.0) / 2 * (x * x).sum(axis=-1))


class Groups(NamedTuple):
    """Classes equal in count and weight: label (K,) of each class, members k_g, counts n_g and attractions a_g (G,), largest a first."""

    label: NDArray[np.int64]
    members: NDArray[np.int64]
    counts: Floats
    attraction: Floats


def groups(counts: ArrayLike, class_weights: ArrayLike | None = None) -> Groups:
    """The groups of one cell, counts (K,)."""
    n = np.asarray(counts, dtype=np.float64)
    omega = np.ones_like(n) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
    pairs, index, members = np.unique(np.stack([n, omega], axis=1), axis=0, return_inverse=True, return_counts=True)
    attraction = pairs[:, 1] * np.sqrt(pairs[:, 0]) / n.sum()
    order = np.argsort(-attraction, kind="stable")
    rank = np.argsort(order)
    return Groups(rank[index.reshape(-1)], members[order], pairs[order, 0], attraction[order])


def merging_level(cell: Groups) -> float:
    """Smallest a_g over groups of at least two classes (inf if none): a group's predictions coincide iff lambda >= a_g, whatever the bias.

    With omega = 1 this is n_g <= kappa^2 (Hong & Ling 2023). On differences inside the group the dual operator is the scalar
    a_g (1 - s_gg + s_gg'), which is a_g where the group is merged and lambda < a_g where it is not. Free features.
    """
    return float(np.min(cell.attraction, initial=np.inf, where=cell.members > 1))


def between_level(members: ArrayLike, attraction: ArrayLike, mass: ArrayLike) -> float:
    """Spectral norm of Qt on vectors constant inside each group; mass (G, G) is what a sample of group g (row) gives to group h.

    Entries sqrt(k_g/k_h) a_g (delta_hg - mass_gh), with 1 - mass_gg written as the sum of the other masses.
    """
    k, a = np.asarray(members, dtype=np.float64), np.asarray(attraction, dtype=np.float64)
    out = np.array(mass, dtype=np.float64)
    np.fill_diagonal(out, 0.0)
    Q = (np.diag(out.sum(axis=1)) - out) * (np.sqrt(k) * a)[:, None] / np.sqrt(k)
    return float(np.linalg.norm(Q, 2))


def zero_level(cell: Groups, s: ArrayLike) -> float:
    """Free features: ||(I - s 1^T) diag(a)||, so that Z = 0 is optimal iff sqrt(lam_w lam_h) is at least this; s (K,) = softmax(b*)."""
    per_group = np.zeros(len(cell.members))
    per_group[cell.label] = np.asarray(s, dtype=np.float64)
    mass = np.broadcast_to(per_group * cell.members, (len(per_group), len(per_group)))
    inside = float(np.max(cell.attraction, initial=0.0, where=cell.members > 1))
    return max(inside, between_level(cell.members, cell.attraction, mass))


class ReluLevel(NamedTuple):
    """Bounds of the level from which Z = 0 is optimal with nonnegative features; equal where it is known exactly."""

    lower: float
    upper: float


def relu_zero_level(cell: Groups, s: ArrayLike) -> ReluLevel:
    """max over v >= 0, ||v|| = 1 of ||(I - s 1^T) diag(a) v||, s (K,) = softmax(b*); lam_w lam_h I - Qt^T Qt copositive.

    Entries of Qt^T Qt: a_k a_l (delta_kl + ||s||^2 - s_k - s_l). Exact if none off the diagonal is positive (the largest diagonal entry),
    or by trying every number of classes in the support of each group, up to SUPPORTS cases; else a vertex and the spectral norm bound it.
    """
    p = np.zeros(len(cell.members))
    p[cell.label] = np.asarray(s, dtype=np.float64)
    a, k = cell.attraction, cell.members
    square = float((k * p * p).sum())
    cross = square - p[:, None] - p[None, :]
    others = (k - np.eye(len(p))) * p * p  # ||s||^2 without the class itself, summed below
    vertex = float(np.max(a * np.sqrt((1 - p) ** 2 + others.sum(axis=1))))
    paired = cross[~np.eye(len(p), dtype=bool) | (np.diag(k) > 1)]
    if not np.any(paired > 0):
        return ReluLevel(vertex, vertex)
    if prod(int(m) + 1 for m in k) > SUPPORTS:
        return ReluLevel(vertex, zero_level(cell, s))
    m = np.array(list(product(*(range(int(size) + 1) for size in k))), dtype=np.float64)  # (cases, G)
    weight = np.sqrt(m) * a
    B = weight[:, :, None] * weight[:, None, :] * cross + np.where(m > 0, a * a, 0.0)[:, :, None] * np.eye(len(p))
    values, vectors = np.linalg.eigh(B)
    lead = vectors[:, :, -1]
    one_sign = np.all(lead >= -1e-9, axis=1) | np.all(lead <= 1e-9, axis=1)
    best = max(vertex, float(np.sqrt(np.max(values[:, -1], initial=0.0, where=one_sign))))
    return ReluLevel(best, best)


SUPPORTS = 2**14
