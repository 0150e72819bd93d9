"""Mean squared error with a linear chain of any depth: closed forms, no bias or a free one, balanced or not.

    F = (1/2N) sum_i ||W_L ... W_1 h_i + b - e_{y_i}||^2 + sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2) sum_i ||h_i||^2

The optimum keeps each singular direction of the targets or drops it: with mu = sigma^2 a squared singular value of Y (n_k without bias)
or of the centred Y (free bias), it is z sigma, where z minimises (z-1)^2/2 + eps (L+1)/2 z^{2/(L+1)}, eps = N lambda mu^{-L/(L+1)},
and lambda = (lam_h prod_l lam_w[l])^{1/(L+1)}. Depth L = lam_w.shape[-1]; penalties lam_w (..., L), lam_h (...).
Sources: depth 1 and deep linear: Dang et al. 2023 (arXiv 2301.00437), where M = L, x^M = z/(1-z), b = M N (N lam_w^M lam_h)^{1/M};
free bias: Liu 2024 (arXiv 2411.17278). Without bias the optimal features can be taken nonnegative, so H >= 0 changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.theory import imbalance

Floats = NDArray[np.float64]


def level(lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """lambda = (lam_h prod_l lam_w[l])^{1/(L+1)}, (...), power by power so that small penalties do not underflow."""
    w, h = np.asarray(lam_w, dtype=np.float64), np.asarray(lam_h, dtype=np.float64)
    if not (np.all(w > 0) and np.all(h > 0)):
        raise ValueError("theory: a penalty is 0, but the closed forms need positive penalties; take such cells out")
    depth = w.shape[-1]
    if depth == 1:
        return np.asarray(np.sqrt(w[..., 0]) * np.sqrt(h))
    return np.asarray(np.prod(w ** (1 / (depth + 1)), axis=-1) * h ** (1 / (depth + 1)))


def critical_strength(depth: int) -> float:
    """eps* = (1/L)((L-1)/L)^{(L-1)/(L+1)}: zero is optimal iff eps > eps* (L = 1: eps >= 1); x^M = M-1 there, else zero (first order)."""
    return float(((depth - 1) / depth) ** ((depth - 1) / (depth + 1)) / depth)


def strength(squared: ArrayLike, samples: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """eps = N lambda mu^{-L/(L+1)}, (..., r), for squared singular values mu (..., r) of the targets and N = samples (...)."""
    mu, N = np.asarray(squared, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    depth = np.shape(lam_w)[-1]
    root = np.sqrt(mu) if depth == 1 else mu ** (depth / (depth + 1))
    return np.asarray((N * level(lam_w, lam_h))[..., None] / root)


def collapse_level(squared: ArrayLike, samples: ArrayLike, depth: int) -> Floats:
    """lambda* = eps* mu^{L/(L+1)}/N, (..., r): the direction of squared singular value mu is lost beyond this lambda."""
    mu, N = np.asarray(squared, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    return np.asarray(critical_strength(depth) * mu ** (depth / (depth + 1)) / N[..., None])


def shortfall(eps: ArrayLike, depth: int) -> Floats:
    """t = 1 - z, (...): 1 where zero is optimal, else the smaller root of t (1-t)^{(L-1)/(L+1)} = eps.

    Equivalent to the largest root of M x^{M-1}/(1+x^M)^2 = b/n_k. Newton on log t from t = eps rises monotonically to the root.
    """
    e = np.asarray(eps, dtype=np.float64)
    alive = e < 1 if depth == 1 else e <= critical_strength(depth)
    e = np.where(alive, e, 0.5 * critical_strength(depth))
    q, t = (depth - 1) / (depth + 1), e
    if depth > 1:
        for _ in range(STEPS):
            t = np.minimum(t * np.exp(-(np.log(t / e) + q * np.log1p(-t)) / (1 - q * t / (1 - t))), 1 / depth)
    return np.asarray(np.where(alive, t, 1.0))


STEPS = 8  # the slope lies in [L/(L+1), 1], so the error squares from at most log 2 on


def optimal_value(squared: ArrayLike, samples: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """F* = sum over directions of (mu/N) [t^2/2 + (L+1) t z/2], or mu/(2N) where lost, (...)."""
    depth = np.shape(lam_w)[-1]
    t = shortfall(strength(squared, samples, lam_w, lam_h), depth)
    shares = np.asarray(squared, dtype=np.float64) / np.asarray(samples, dtype=np.float64)[..., None]
    return np.asarray((shares * (t * t + (depth + 1) * t * (1 - t)) / 2).sum(axis=-1))


class Diagonal(NamedTuple):
    """No bias: z_kk, ||h_k||^2 and the squared row norms of W_L ... W_1, (..., K) each; all else is zero."""

    logits: Floats
    features: Floats
    classifier: Floats


def without_bias(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Diagonal:
    """Z = diag(z_k), with or without H >= 0; at L = 1, z_k = (1 - kappa/sqrt(n_k))_+ and class k is lost iff n_k <= kappa^2.

    ||h_k||^2 = (lambda/lam_h) (sqrt(n_k) z_k)^{2/(L+1)}/n_k,  ||w_k||^2 = (lam_h/lambda) (sqrt(n_k) z_k)^{2L/(L+1)}.
    """
    n = np.asarray(counts, dtype=np.float64)
    depth, h = np.shape(lam_w)[-1], np.asarray(lam_h, dtype=np.float64)
    z = 1 - shortfall(strength(n, n.sum(axis=-1), lam_w, lam_h), depth)
    scale, s = (level(lam_w, lam_h) / h)[..., None], np.sqrt(n) * z
    return Diagonal(z, scale * s ** (2 / (depth + 1)) / n, s ** (2 * depth / (depth + 1)) / scale)


class Spectrum(NamedTuple):
    """Singular values of the centred targets, squared, largest first (K-1,); left and right vectors (K, K-1); own (K-1,).

    own[i] is the index (into the distinct counts, largest first) of the group of equal classes whose differences vector i spans, else -1.
    """

    squared: Floats
    left: Floats
    right: Floats
    own: NDArray[np.int64]


def centred_spectrum(counts: ArrayLike) -> Spectrum:
    """SVD of (I - n 1^T/N) D^{1/2}, counts (K,): mu = n_g on the differences inside each group of equal classes, and the
    G - 1 roots of sum_k n_k/(n_k - mu) = 0 between the G distinct counts, with u_k ~ n_k/(n_k - mu), v_k ~ sqrt(n_k)/(n_k - mu).

    Relatively accurate for counts of any ratio, which a dense SVD is not.
    """
    n = np.asarray(counts, dtype=np.float64)
    sizes, group, members = np.unique(-n, return_inverse=True, return_counts=True)
    sizes = -sizes
    parts = []
    for g in np.flatnonzero(members > 1):
        basis = np.zeros((len(n), members[g] - 1))
        basis[group == g] = _helmert(int(members[g]))
        parts.append(Spectrum(np.full(members[g] - 1, sizes[g]), basis, basis, np.full(members[g] - 1, g)))
    if len(sizes) > 1:
        pole, shift = _between(sizes, members)
        gap = (n[:, None] - pole) - shift  # n_k - mu_i without cancellation, (K, G-1)
        left, right = n[:, None] / gap, np.sqrt(n)[:, None] / gap
        parts.append(Spectrum(pole + shift, _unit(left), _unit(right), np.full(len(pole), -1)))
    merged = [np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)]
    order = np.argsort(-merged[0], kind="stable")
    return Spectrum(*(part[..., order] for part in merged))


def _between(sizes: Floats, members: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Roots of f(mu) = sum_g members_g n_g/(n_g - mu), one in each interval, as (nearest pole, signed distance), (G-1,) each."""
    upper, lower = sizes[:-1], sizes[1:]
    weights = (members * sizes)[:, None]

    def f(pole: Floats, shift: Floats) -> Floats:
        return np.asarray((weights / ((sizes[:, None] - pole) - shift)).sum(axis=0))

    half = (upper - lower) / 2
    low = f(lower, half) > 0  # f rises from -inf to +inf
    pole, sign = np.where(low, lower, upper), np.where(low, 1.0, -1.0)
    near, far = np.zeros_like(half), half
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        inward = sign * f(pole, sign * middle) < 0  # the root lies farther from the pole
        near, far = np.where(inward, middle, near), np.where(inward, far, middle)
    return pole, sign * (near + far) / 2


BISECTIONS = 110  # 53 bits beyond a root that lies 1e-16 of its interval from the pole


def _helmert(k: int) -> Floats:
    """Orthonormal basis of the differences of k coordinates, (k, k-1)."""
    j = np.arange(1, k)
    rows = np.arange(k)[:, None]
    return np.asarray(np.where(rows < j, 1.0, np.where(rows == j, -j, 0.0)) / np.sqrt(j * (j + 1.0)))


def _unit(X: Floats) -> Floats:
    return np.asarray(X / np.linalg.norm(X, axis=0))


class Centred(NamedTuple):
    """Free bias, one cell: logits (K, K) with the bias in, feature_gram and classifier_gram (K, K), bias (K,), kept (K-1,) bool."""

    logits: Floats
    feature_gram: Floats
    classifier_gram: Floats
    bias: Floats
    kept: NDArray[np.bool_]


def with_free_bias(counts: ArrayLike, spectrum: Spectrum, lam_w: ArrayLike, lam_h: float) -> Centred:
    """Z D^{1/2} = sum_i z_i sigma_i u_i v_i^T, b = n/N: at L = 1 the singular-value soft threshold at kappa; ETF if balanced.

    feature Gram = (lambda/lam_h) D^{-1/2} V s^{2/(L+1)} V^T D^{-1/2}, that of W_L ... W_1 = (lam_h/lambda) U s^{2L/(L+1)} U^T, s = z sigma.
    One cell: counts (K,), lam_w (L,). Free features only.
    """
    n = np.asarray(counts, dtype=np.float64)
    depth, N = np.shape(lam_w)[-1], n.sum()
    z = 1 - shortfall(strength(spectrum.squared, N, lam_w, lam_h), depth)
    s, scale = z * np.sqrt(spectrum.squared), level(lam_w, lam_h) / lam_h
    columns = spectrum.right / np.sqrt(n)[:, None]
    bias = n / N
    return Centred(
        (spectrum.left * s) @ columns.T + bias[:, None],
        scale * (columns * s ** (2 / (depth + 1))) @ columns.T,
        (spectrum.left * s ** (2 * depth / (depth + 1))) @ spectrum.left.T / scale,
        bias,
        z > 0,
    )


def relu_free_bias_margin(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """Balanced, H >= 0, depth 1, free bias: Z = M (I - J/K), M = (1 - kappa sqrt(K/((K-1)n)))_+, b = 1/K, (..., K).

    The means are an orthogonal frame; both Grams are those of `imbalance` for margins M. lam_w (...). Certified by q_k.q_l <= 0.
    """
    return np.maximum(1 - 1 / imbalance.survival(counts, lam_w, lam_h), 0.0)


def relu_free_bias_value(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """F* = (K-1)/K (1 - M)^2/2 + K c sqrt(n) M for `relu_free_bias_margin`, (...): a multiple (K-1)/K of t^2/2 + t (1-t), t = 1 - M."""
    n = np.asarray(counts, dtype=np.float64)
    K = n.shape[-1]
    t = np.minimum(1 / imbalance.survival(n, lam_w, lam_h), 1.0)[..., 0]
    return np.asarray((K - 1) / K * (t * t / 2 + t * (1 - t)))
