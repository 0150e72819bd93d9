"""Cross-entropy with nonnegative features under class imbalance, no bias: the closed form of the global optimum.

    F = sum_k (n_k/N) omega_k CE(z_k) + (lam_w/2)||W||^2 + (lam_h/2) sum_k n_k||h_k||^2,   H >= 0,   z_k = W h_k
    lambda = sqrt(lam_w lam_h),   c = lambda sqrt((K-1)/K),   m_k = sqrt(n_k) M_k,   S = sum_k m_k

Valid for width >= number of classes that survive. Counts and margins are (..., K), penalties (...); class weights omega
(default 1) broadcast to (..., K). Source: Dang, Tran, Nguyen & Ho, ICML 2024 (arXiv 2401.02058), who give the margins, Grams and
thresholds; their released code has CE/2 and a minibatch-sum feature penalty (see `ufm.problem.PAPERS`). Class weights enter as
n_k -> omega_k^2 n_k in the thresholds. A class oversampled r_k times whose copies carry their own penalty is `oversampled`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def level(lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """lambda = sqrt(lam_w lam_h), (...), by square roots apart so that penalties of 1e-300 do not underflow."""
    return np.sqrt(_positive("lam_w", lam_w)) * np.sqrt(_positive("lam_h", lam_h))


def kappa(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """kappa = N sqrt(lam_w lam_h), (...): with the counts, the only regularisation number that matters without a bias."""
    return np.asarray(_float(counts).sum(axis=-1) * level(lam_w, lam_h))


def attraction(counts: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """a_k = omega_k sqrt(n_k)/N, (..., K): the pull on a class's features at uniform softmax, in the units of lambda."""
    n = _float(counts)
    a = np.sqrt(n) / n.sum(axis=-1, keepdims=True)
    return np.asarray(a if class_weights is None else a * _float(class_weights))


def collapse_level(counts: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """lambda*_k = a_k sqrt((K-1)/K), (..., K): class k is at zero iff sqrt(lam_w lam_h) >= lambda*_k (second-order transition)."""
    a = attraction(counts, class_weights)
    K = a.shape[-1]
    return np.asarray(a * np.sqrt((K - 1) / K))


def complete_collapse_level(counts: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """max_k lambda*_k, (...): W = H = 0 is optimal iff sqrt(lam_w lam_h) is at least this."""
    return np.asarray(collapse_level(counts, class_weights).max(axis=-1))


def collapse_count(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """kappa^2 K/((K-1) omega_k^2), (..., K): class k is at zero iff n_k is at most this."""
    n = _float(counts)
    K = n.shape[-1]
    omega = np.ones(K) if class_weights is None else _float(class_weights)
    return np.asarray((kappa(n, lam_w, lam_h)[..., None] * np.sqrt(K / (K - 1)) / omega) ** 2)


def survival(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """u_k = lambda*_k / lambda, (..., K): class k survives iff u_k > 1; u_k^2 = omega_k^2 n_k (K-1)/(K kappa^2)."""
    return np.asarray(collapse_level(counts, class_weights) / level(lam_w, lam_h)[..., None])


def collapsed(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Classes whose features are exactly zero, (..., K): n_k <= kappa^2 K/((K-1) omega_k^2)."""
    return np.asarray(survival(counts, lam_w, lam_h, class_weights) <= 1)


def margins(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """M_k = log((K-1)(omega_k sqrt(n_k)/(N c) - 1)) above the threshold, else 0, (..., K): minimises CE along e_k - 1/K plus its cost."""
    return np.log1p(_excess(survival(counts, lam_w, lam_h, class_weights)))


def optimal_value(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """F* = sum_k [ omega_k pi_k log(1 + (K-1) e^{-M_k}) + c sqrt(n_k) M_k ], (...), in nats."""
    return np.asarray(_class_values(counts, lam_w, lam_h, class_weights).sum(axis=-1))


def dead_subset_gain(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None = None) -> Floats:
    """gain_k = omega_k pi_k [log K - log(1 + (K-1) e^{-M_k})] - c sqrt(n_k) M_k >= 0, (..., K): what losing class k costs.

    With y = e^M - 1 this is omega_k pi_k [(1+y) log(1+y)/(K+y) - log(1 + y/K)], of second order in y at the threshold.
    """
    n = _float(counts)
    K = n.shape[-1]
    y = _excess(survival(n, lam_w, lam_h, class_weights))
    return np.asarray(_share(n, class_weights) * ((1 + y) / (K + y) * np.log1p(y) - np.log1p(y / K)))


def dead_subset_value(
    counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, dead: ArrayLike, class_weights: ArrayLike | None = None
) -> Floats:
    """F_S = F* + sum_{k in S} gain_k, (...): energy of the stationary point where the classes S of `dead` (..., K) are wrongly at zero."""
    n = _float(counts)
    zero = _share(n, class_weights) * np.log(n.shape[-1])
    return np.asarray(np.where(dead, zero, _class_values(n, lam_w, lam_h, class_weights)).sum(axis=-1))


def logits(M: ArrayLike) -> Floats:
    """W h_k = M_k (e_k - 1/K), (..., K, K), column k = class k."""
    m = _float(M)
    K = m.shape[-1]
    return np.asarray(m[..., None, :] * (np.eye(K) - 1 / K))


def feature_norms(counts: ArrayLike, M: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """||h_k||^2 = sqrt((K-1)/K lam_w/(lam_h n_k)) M_k, (..., K)."""
    n = _float(counts)
    K = n.shape[-1]
    return np.asarray(_ratio(lam_w, lam_h)[..., None] * np.sqrt((K - 1) / K) / np.sqrt(n) * _float(M))


def feature_gram(counts: ArrayLike, M: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """h_k.h_l = 0, ||h_k||^2 on the diagonal, (..., K, K): the class means have disjoint supports."""
    return np.asarray(feature_norms(counts, M, lam_w, lam_h)[..., None] * np.eye(_float(counts).shape[-1]))


def classifier_gram(counts: ArrayLike, M: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """||w_k||^2 = g (S + K(K-2) m_k),  w_k.w_l = g (S - K(m_k + m_l)),  g = sqrt(lam_h/lam_w)/(K sqrt(K(K-1))), (..., K, K).

    Rows sum to zero: w_k = sqrt(lam_h/lam_w)/sqrt(K(K-1)) (K sqrt(n_k) h_k - sum_m sqrt(n_m) h_m).
    """
    K = _float(counts).shape[-1]
    g = _ratio(lam_h, lam_w) / (K * np.sqrt(K * (K - 1.0)))
    return np.asarray(g[..., None, None] * _row_gram(_masses(counts, M)))


def classifier_cosines(counts: ArrayLike, M: ArrayLike) -> Floats:
    """cos(w_k, w_l) = (S - K(m_k+m_l))/sqrt((S + K(K-2)m_k)(S + K(K-2)m_l)), (..., K, K); NaN where every class is at zero."""
    gram = _row_gram(_masses(counts, M))
    norm = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore"):
        return np.asarray(gram / norm[..., :, None] / norm[..., None, :])


def alignment(counts: ArrayLike, M: ArrayLike) -> Floats:
    """cos(w_j, h_k), (..., K, K): (K-1) sqrt(m_k)/sqrt(T_k) at j = k, else -sqrt(m_k)/sqrt(T_j), T_j = S + K(K-2) m_j; NaN if h_k = 0."""
    m = _masses(counts, M)
    K = m.shape[-1]
    norm = np.sqrt(m.sum(axis=-1, keepdims=True) + K * (K - 2) * m)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (K * np.eye(K) - 1) * np.sqrt(m)[..., None, :] / norm[..., :, None]
    return np.asarray(np.where(m[..., None, :] > 0, cosines, np.nan))


def balance(counts: ArrayLike, M: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """lam_w ||W||^2 = lam_h sum_k n_k ||h_k||^2 = c S, (...)."""
    m = _masses(counts, M)
    K = m.shape[-1]
    return np.asarray(level(lam_w, lam_h) * np.sqrt((K - 1) / K) * m.sum(axis=-1))


def step_ratio(K: int, n_min: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, minority: int | None = None) -> Floats:
    """R*, (...): `minority` classes (default K//2) of n_min, the others of R n_min; the minority is at zero iff R >= R*.

    R* = (sqrt((K-1)/(K n_min lam_w lam_h)) - minority)/(K - minority); for halves 2 sqrt((K-1)/(K^3 n_min lam_w lam_h)) - 1.
    """
    small = K // 2 if minority is None else minority
    return np.asarray((_step_root(K, n_min, lam_w, lam_h) - small) / (K - small))


def step_complete_ratio(K: int, n_min: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, minority: int | None = None) -> Floats:
    """The ratio R from which the majority is at zero too, (...): larger root of (minority + majority R)^2 = q R.

    q = (K-1)/(K n_min lam_w lam_h); halves: (1+R)^2/R = 4 (K-1)/(K^3 n_min lam_w lam_h).
    NaN where no ratio lets the majority survive (q <= 4 minority majority).
    """
    small = K // 2 if minority is None else minority
    big = K - small
    root = _step_root(K, n_min, lam_w, lam_h)
    two = 2 * np.sqrt(small * big)
    with np.errstate(invalid="ignore", over="ignore"):
        inner = np.sqrt(root - two) * np.sqrt(root + two)
        return np.asarray(((root + inner) / (2 * big)) ** 2)


class Limit(NamedTuple):
    """Grams and logits up to scale, each with unit Frobenius norm, (..., K, K)."""

    classifier_gram: Floats
    feature_gram: Floats
    logits: Floats


def limit_geometry(counts: ArrayLike) -> Limit:
    """lambda -> 0 ("ReLU-SELI"): M_k/M_l -> 1, so m_k -> sqrt(n_k), ||h_k||^2 -> n_k^{-1/2}, W H -> I - 1/K, all up to scale.

    The approach is like 1/log(1/lambda): compare no run at finite lambda with it. Class weights drop out.
    """
    n = _float(counts)
    K = n.shape[-1]
    rows, columns = _row_gram(np.sqrt(n)), np.eye(K) / np.sqrt(n)[..., None]
    centred = np.broadcast_to(np.eye(K) - 1 / K, rows.shape)
    return Limit(*(X / np.linalg.norm(X, axis=(-2, -1), keepdims=True) for X in (rows, columns, centred)))


def oversampled(counts: ArrayLike, repeats: ArrayLike) -> Floats:
    """r_k n_k, (..., K): the counts to use in every formula, with N = sum_k r_k n_k, when copies carry their own feature penalty."""
    return np.asarray(_float(counts) * _float(repeats))


def _excess(u: Floats) -> Floats:
    """e^M - 1 = K(u - 1) above the threshold, 0 below: the argument of log1p, so that M keeps its digits near u = 1."""
    return np.asarray(np.where(u > 1, u.shape[-1] * (u - 1), 0.0))


def _share(n: Floats, class_weights: ArrayLike | None) -> Floats:
    pi = n / n.sum(axis=-1, keepdims=True)
    return np.asarray(pi if class_weights is None else pi * _float(class_weights))


def _class_values(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike, class_weights: ArrayLike | None) -> Floats:
    n = _float(counts)
    K = n.shape[-1]
    y = _excess(survival(n, lam_w, lam_h, class_weights))
    c = level(lam_w, lam_h)[..., None] * np.sqrt((K - 1) / K)
    return np.asarray(_share(n, class_weights) * np.log1p((K - 1) / (1 + y)) + c * np.sqrt(n) * np.log1p(y))


def _masses(counts: ArrayLike, M: ArrayLike) -> Floats:
    return np.asarray(np.sqrt(_float(counts)) * _float(M))


def _row_gram(m: Floats) -> Floats:
    """T_kk = S + K(K-2) m_k and T_kl = S - K(m_k + m_l), (..., K, K)."""
    K = m.shape[-1]
    S = m.sum(axis=-1)[..., None, None]
    return np.asarray(S - K * (m[..., :, None] + m[..., None, :]) + K * K * m[..., None] * np.eye(K))


def _step_root(K: int, n_min: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    return np.asarray(np.sqrt((K - 1) / K) / np.sqrt(_float(n_min)) / level(lam_w, lam_h))


def _ratio(top: ArrayLike, bottom: ArrayLike) -> Floats:
    return np.asarray(np.sqrt(_positive("penalty", top)) / np.sqrt(_positive("penalty", bottom)))


def _float(x: ArrayLike) -> Floats:
    return np.asarray(x, dtype=np.float64)


def _positive(name: str, x: ArrayLike) -> Floats:
    array = _float(x)
    if not np.all(array > 0):
        raise ValueError(f"theory: {name} holds {array[~(array > 0)][0]}, but the closed forms need positive penalties; take zeros out")
    return array
