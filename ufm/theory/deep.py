"""Deep linear chains with cross-entropy and balanced classes: exact reductions, factors of a critical point, which structure wins.

    F(M) = mean_c CE(m_c) + (lambda_eff/2)(L+1) sum_i s_i(M)^p,   p = 2/(L+1),   lambda_eff = (n lam_h prod_l lam_w[l])^{1/(L+1)}

M (K, K) holds the logits of class c in column c; penalties as in `ufm.Problem`, lam_w (..., L), lam_h and n (...). Every critical point
of the linear chain has collapsed classes and balanced factors, so F(M) is its value. The critical points are in `deep_points`, their
scales in `deep_codes` and `deep_scale`, the Hessian at deep neural collapse (DNC) in `deep_stability`.
Source: Garrod & Keating 2025 (arXiv 2410.23169), who have one common penalty.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.records import NoTheory
from ufm.theory import deep_points
from ufm.theory.deep_codes import Code, Tied

Floats = NDArray[np.float64]


def lambda_eff(n: ArrayLike, lam_h: ArrayLike, lam_w: ArrayLike) -> Floats:
    """(n lam_h prod_l lam_w[l])^{1/(L+1)}, (...), mantissas and exponents apart so that nothing underflows; lam_w (..., L)."""
    w, h, size = (np.asarray(x, dtype=np.float64) for x in (lam_w, lam_h, n))
    if not (w.ndim and np.all(w > 0) and np.all(h > 0) and np.all(size > 0)):
        raise ValueError("deep.lambda_eff: lam_w must be (..., L), and every penalty and n positive; take other cells out")
    factors = [w[..., i] for i in range(w.shape[-1])] + [h, size]
    mantissa, exponent = np.asarray(1.0), np.asarray(0)
    for part, power in (np.frexp(x) for x in factors):
        mantissa, exponent = mantissa * part, exponent + power
    whole, rest = np.divmod(exponent, w.shape[-1] + 1)
    return np.asarray(np.ldexp(np.ldexp(mantissa, rest) ** (1 / (w.shape[-1] + 1)), whole))


def schatten(M: ArrayLike, depth: int) -> Floats:
    """sum_i s_i(M)^p, (...), p = 2/(L+1); singular values below rounding count as zero."""
    s = np.linalg.svd(np.asarray(M, dtype=np.float64), compute_uv=False)
    return np.asarray((np.where(_kept(s), s, 0.0) ** (2 / (depth + 1))).sum(axis=-1))


def penalty(M: ArrayLike, lam: ArrayLike, depth: int) -> Floats:
    """(lambda_eff/2)(L+1) sum_i s_i(M)^p, (...): the least penalty of factors that make the class logits M."""
    return np.asarray(np.asarray(lam, dtype=np.float64) / 2 * (depth + 1) * schatten(M, depth))


def fit(M: ArrayLike) -> Floats:
    """Mean over classes of CE(m_c), (...), in nats."""
    return np.asarray(_loss_and_slope(np.asarray(M, dtype=np.float64))[0])


def value(M: ArrayLike, lam: ArrayLike, depth: int) -> Floats:
    """F(M), (...), any M (..., K, K)."""
    return np.asarray(fit(M) + penalty(M, lam, depth))


def residual(M: ArrayLike, lam: ArrayLike, depth: int) -> Floats:
    """How far M (..., K, K) is from critical, (...): the gradient of its balanced factors over that of their penalty; 0 at M = 0.

    Critical iff U^T G = -lambda S^{p-1} V^T and G V = -lambda U S^{p-1}, M = U S V^T of full rank r and G the gradient of the fit; the
    end factors weigh these by S^{L/(L+1)}, against lambda S^{1/(L+1)}. Rounding of M alone gives eps (largest entry), and eps/lambda where
    a class is alone at zero.
    """
    X, level = np.asarray(M, dtype=np.float64), np.asarray(lam, dtype=np.float64)
    U, s, Vt = np.linalg.svd(X)
    keep = _kept(s)
    outer = np.where(keep, s, 0.0)[..., None] ** (depth / (depth + 1))
    inner = level[..., None, None] * np.where(keep, s, 0.0)[..., None] ** (1 / (depth + 1))
    G = _loss_and_slope(X)[1]
    left, right = outer * (U.mT @ G) + inner * Vt, outer * (Vt @ G.mT) + inner * U.mT
    size = np.linalg.norm(inner, axis=(-2, -1))
    miss = np.hypot(np.linalg.norm(left * keep[..., None], axis=(-2, -1)), np.linalg.norm(right * keep[..., None], axis=(-2, -1)))
    return np.asarray(np.where(size > 0, miss / np.where(size > 0, size, 1.0), 0.0))


def balanced_factors(
    M: ArrayLike, n: float, lam_h: float, lam_w: ArrayLike, d: int, generator: np.random.Generator | None = None
) -> tuple[Floats, ...]:
    """(H, W_1, ..., W_L) of least penalty with W_L ... W_1 H = M: F_l = sqrt(g/lam_l) Q_l Sigma^{1/(L+1)} Q_{l-1}^T, Z = M (x) 1_n^T.

    M (K, K), H (d, K) of class means, W_l (d, d), W_L (K, d); lam_w (L,). Q_0 ... Q_{L-1} orthonormal d x r: the first r axes, or drawn
    uniformly. ValueError where d is less than the rank r of M.
    """
    X, w = np.asarray(M, dtype=np.float64), np.asarray(lam_w, dtype=np.float64)
    L, level = w.shape[-1], float(lambda_eff(n, lam_h, w))
    U, s, Vt = np.linalg.svd(X)
    r = int(_kept(s).sum())
    if d < r:
        raise ValueError(f"deep.balanced_factors: d is {d}, but logits of rank {r} need a width of at least {r}")
    root = np.diag(s[:r] ** (1 / (L + 1)))
    Q = [_frame(d, r, generator) for _ in range(L)]
    left, right = [*Q, U[:, :r]], [Vt[:r], *(q.mT for q in Q)]
    weights = [np.sqrt(level / lam) for lam in (n * lam_h, *w)]
    return tuple(weight * (a @ root @ b) for weight, a, b in zip(weights, left, right, strict=True))


def orbit_dimension(rank: int, depth: int, d: int) -> int:
    """L [r d - r(r+1)/2]: dimension of the parameters with one critical Z of rank r, L frames in the Stiefel manifold St(r, d)."""
    _wide("orbit_dimension", rank, d)
    return depth * (rank * d - rank * (rank + 1) // 2)


def published_orbit_dimension(rank: int, depth: int, d: int) -> int:
    """L r(d - r), the Grassmannian count of Garrod & Keating (Theorem 5) for equal singular values, as we read it; see orbit_dimension."""
    _wide("published_orbit_dimension", rank, d)
    return depth * rank * (d - rank)


def dnc_is_never_optimal(K: int, depth: int, d: int) -> bool:
    """Theorem 1 of Garrod & Keating: m 2^p < 2m - 1, m = floor(K/2): pairs at DNC's scale fit better and cost less, at every lambda.

    That is K >= 4 with L >= 3, or K >= 6 with L = 2. False decides nothing. NoTheory where the width is below K, its hypothesis.
    """
    if d < K:
        raise NoTheory(f"deep.dnc_is_never_optimal: d is {d}, but the theorem needs a width of at least K = {K}")
    m = K // 2
    return bool(m * 2 ** (2 / (depth + 1)) < 2 * m - 1)  # never equal: 2^p is irrational for L >= 2, and 2 for L = 1


def margin_constants(K: int, depth: int) -> dict[str, float]:
    """R = sum_i s_i^p at unit margin of each catalogued code: value ~ (lambda/2)(L+1) R (log 1/lambda)^p as lambda -> 0.

    The smallest wins in that limit among these codes, not among all matrices: the optimum R*(K, L) may be lower. Where two are close the
    next term decides down to very small lambda.
    """
    return {code.name: code.margin_constant(depth) for code in deep_points.candidates(K)}


def crossover(first: Code | Tied, second: Code | Tied, depth: int, low: float, high: float) -> float:
    """The lambda_eff in [low, high] at which two codes have the same value, to relative 1e-12 unless they cross at a grazing angle.

    The derivative of a value in log lambda is its penalty, so Newton's method, kept in a bracket. NoTheory where one of the codes does
    not exist at an end, or the same one is lower at both ends.
    """

    def gap(lam: float) -> tuple[float, float]:
        a, b = (deep_points.levels(code, lam, depth) for code in (first, second))
        return float(a.value - b.value), float(a.penalty - b.penalty)

    return crossing(gap, low, high, f"{first.name} and {second.name} at depth {depth}")


def crossing(gap: Callable[[float], tuple[float, float]], low: float, high: float, what: str = "the two structures") -> float:
    """Root of gap(lam)[0] between low and high; gap returns the difference and its derivative in log lambda."""
    at_low, at_high = gap(low)[0], gap(high)[0]
    if not at_low * at_high < 0:
        raise NoTheory(f"deep.crossover: {what} do not change order between {low:.6g} and {high:.6g}, or one does not exist there")
    lam = float(np.sqrt(low) * np.sqrt(high))
    for _ in range(200):
        difference, slope = gap(lam)
        low, high = (lam, high) if difference * at_low > 0 else (low, lam)
        after = lam * float(np.exp(np.clip(-difference / slope, -50, 50))) if slope else np.nan
        inside = low < after < high
        after = after if inside else float(np.sqrt(low) * np.sqrt(high))
        if abs(after - lam) <= 1e-15 * lam or high <= low * (1 + 4e-16):
            break
        lam = after
    return lam


def _loss_and_slope(M: Floats) -> tuple[Floats, Floats]:
    """Mean CE (...) and its gradient in M (..., K, K): wrong classes first, the own one as minus their sum."""
    K = M.shape[-1]
    wrong = 1 - np.eye(K)
    R = (M - np.diagonal(M, axis1=-2, axis2=-1)[..., None, :]) * wrong
    top = np.maximum(R.max(axis=-2, keepdims=True), 0.0)
    E = np.exp(R - top) * wrong
    S = E.sum(axis=-2, keepdims=True)
    P = E / (np.exp(-top) + S)
    loss = top + np.log1p(np.expm1(-top) + S)
    return loss.mean(axis=(-2, -1)), (P - np.eye(K) * P.sum(axis=-2, keepdims=True)) / K


def _kept(s: Floats) -> NDArray[np.bool_]:
    return np.asarray(s > 16 * s.shape[-1] * np.finfo(np.float64).eps * s[..., :1])


def _frame(d: int, r: int, generator: np.random.Generator | None) -> Floats:
    if generator is None:
        return np.eye(d, r)
    Q, R = np.linalg.qr(generator.standard_normal((d, r)))
    return np.asarray(Q * np.sign(np.diagonal(R)))


def _wide(call: str, rank: int, d: int) -> None:
    if d < rank:
        raise ValueError(f"deep.{call}: d is {d}, but logits of rank {rank} need a width of at least {rank}")
