"""Slow, obvious re-derivations at 50 digits, and loops: nothing here shares code with `ufm.theory`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from mpmath import MPContext
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

mp = MPContext()
mp.dps = 50


def bisect(f: Callable[[Any], Any], low: Any, high: Any) -> Any:
    """Root of f, negative at low and positive at high, to 45 digits."""
    low, high = mp.mpf(low), mp.mpf(high)
    for _ in range(2000):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
        if high - low <= mp.mpf(10) ** -47 * abs(high):
            break
    return (low + high) / 2


def level(penalties: Sequence[float]) -> Any:
    """Geometric mean of all penalties."""
    out = mp.mpf(1)
    for penalty in penalties:
        out *= mp.mpf(penalty)
    return mp.root(out, len(penalties))


def relu_class(K: int, n: float, N: float, lam: Any, omega: float = 1.0) -> tuple[Any, Any]:
    """(M, value) of min over M >= 0 of omega n/N log(1 + (K-1)e^{-M}) + lam sqrt((K-1)/K) sqrt(n) M, by its derivative."""
    share, cost = mp.mpf(omega) * n / N, lam * mp.sqrt(mp.mpf(K - 1) / K) * mp.sqrt(n)

    def slope(M: Any) -> Any:
        e = (K - 1) * mp.exp(-M)
        return cost - share * e / (1 + e)

    M = mp.mpf(0)
    if slope(M) < 0:
        top = mp.mpf(1)
        while slope(top) < 0:
            top *= 2
        M = bisect(slope, 0, top)
    return M, share * mp.log1p((K - 1) * mp.exp(-M)) + cost * M


def deep_direction(sigma: Any, N: float, lam: Any, depth: int) -> tuple[Any, Any]:
    """(t, value) of min over s = (1-t) sigma >= 0 of (s - sigma)^2/(2N) + (L+1)(lam/2) s^{2/(L+1)}.

    The largest stationary point in s, found in t so that no digits are lost near sigma, against s = 0 (t = 1).
    """
    p, zero = mp.mpf(2) / (depth + 1), sigma**2 / (2 * N)

    def fall(t: Any) -> Any:
        return sigma * t / N - lam * (sigma * (1 - t)) ** (p - 1)

    last = 1 - (1 - p) / (2 - p) if depth > 1 else 1 - mp.mpf(10) ** -45
    if fall(last) <= 0:
        return mp.mpf(1), zero
    t = bisect(fall, 0, last)
    value = (sigma * t) ** 2 / (2 * N) + (depth + 1) * lam / 2 * (sigma * (1 - t)) ** p
    return (t, value) if value <= zero else (mp.mpf(1), zero)


def centred_targets(counts: Sequence[float]) -> Any:
    """(I - n 1^T/N) D^{1/2} as an mpmath matrix."""
    K, N = len(counts), mp.mpf(sum(counts))
    return mp.matrix([[((1 if j == k else 0) - counts[j] / N) * mp.sqrt(counts[k]) for k in range(K)] for j in range(K)])


def centred_optimum(counts: Sequence[float], penalties: Sequence[float]) -> tuple[Any, Any]:
    """(Z without bias, value) of free-bias squared error, by mpmath's SVD; penalties W_1 ... W_L, H."""
    K, N, depth = len(counts), sum(counts), len(penalties) - 1
    U, S, V = mp.svd_r(centred_targets(counts))
    value, Z = mp.mpf(0), mp.matrix(K, K)
    for i in range(K):
        t, part = deep_direction(S[i], N, level(penalties), depth) if S[i] > 1e-30 else (mp.mpf(1), mp.mpf(0))
        value += part
        for j, k in product(range(K), repeat=2):
            Z[j, k] += (1 - t) * S[i] * U[j, i] * V[i, k] / mp.sqrt(counts[k])
    return Z, value


def bias_alone(shares: Sequence[float], lam_b: float) -> list[Any]:
    """argmin_b sum_k p_k CE(b, k) + lam_b/2 |b|^2 (lam_b > 0), t = log sum_j e^{b_j} such that sum_k b_k = 0.

    P e^{b_k - t} + lam_b b_k = p_k gives b_k = p_k/lam_b - W(P e^{p_k/lam_b - t}/lam_b), W Lambert's function.
    """
    p, lam = [mp.mpf(x) for x in shares], mp.mpf(lam_b)
    P = sum(p)

    def coordinates(t: Any) -> list[Any]:
        return [x / lam - mp.lambertw(P * mp.exp(x / lam - t) / lam).real for x in p]

    low, high = mp.mpf(0), mp.mpf(60)  # the sum of the coordinates rises with t
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(coordinates(middle)) < 0 else (low, middle)
    return coordinates(mp.findroot(lambda t: sum(coordinates(t)), (low, high), solver="secant", tol=mp.mpf(10) ** -80))


def zero_norm(counts: Sequence[float], s: Sequence[Any], omega: Sequence[float] | None = None) -> Any:
    """Spectral norm of (I - s 1^T) diag(omega_k sqrt(n_k)/N), by mpmath's SVD."""
    K, N = len(counts), mp.mpf(sum(counts))
    a = [mp.mpf(1 if omega is None else omega[k]) * mp.sqrt(counts[k]) / N for k in range(K)]
    return max(mp.svd_r(mp.matrix([[((1 if j == k else 0) - s[j]) * a[k] for k in range(K)] for j in range(K)]), compute_uv=False))


def relu_zero_norm(counts: Floats, s: Floats, omega: Floats) -> float:
    """The copositive norm of (I - s 1^T) diag(omega_k sqrt(n_k)/N)."""
    return copositive_norm((np.eye(len(s)) - s[:, None]) * (omega * np.sqrt(counts) / counts.sum()))


def copositive_norm(Q: Floats) -> float:
    """max over v >= 0, |v| = 1 of |Q v|, by trying every support (K small)."""
    K, M, best = len(Q), Q.T @ Q, 0.0
    for support in product((False, True), repeat=K):
        at = np.flatnonzero(support)
        if len(at):
            values, vectors = np.linalg.eigh(M[np.ix_(at, at)])
            lead = vectors[:, -1] * np.sign(vectors[:, -1].sum() or 1.0)
            best = max(best, values[-1] if np.all(lead >= -1e-10) else 0.0)
    return float(np.sqrt(best))


def plain(
    factors: Sequence[Floats],
    bias: Floats,
    counts: Sequence[float],
    lam_w: Sequence[float],
    lam_h: float,
    lam_b: float = 0.0,
    *,
    loss: str = "CE",
    omega: Sequence[float] | None = None,
) -> float:
    """The objective by loops; factors (H, W_1, ..., W_L) with class means for columns."""
    K, N, total = len(counts), sum(counts), 0.0
    H, *weights = factors
    for k in range(K):
        z = H[:, k]
        for W in weights:
            z = W @ z
        z = z + bias
        if loss == "CE":
            one = float(np.log1p(sum(np.exp(z[j] - z[k]) for j in range(K) if j != k)))
        else:
            one = 0.5 * sum((z[j] - (1.0 if j == k else 0.0)) ** 2 for j in range(K))
        total += counts[k] / N * (1.0 if omega is None else omega[k]) * one
        total += lam_h / 2 * counts[k] * sum(h * h for h in H[:, k])
    for lam, W in zip(lam_w, weights, strict=True):
        total += lam / 2 * sum(w * w for w in W.flat)
    return total + lam_b / 2 * sum(x * x for x in bias)


def realise(Z: Floats, counts: Floats, lam_w: Sequence[float], lam_h: float) -> list[Floats]:
    """Balanced factors (H, W_1, ..., W_L) with W_L ... W_1 H = Z, from the SVD of Z D^{1/2}; K wide."""
    U, S, Vt = np.linalg.svd(Z * np.sqrt(counts))
    S = np.where(S > 1e-14 * S[0], S, 0.0)  # else the root of rounding noise is felt
    depth, penalties = len(lam_w), [lam_h, *lam_w]
    g = float(np.prod([p ** (1 / (depth + 1)) for p in penalties]))
    root = np.diag(S ** (1 / (depth + 1)))
    H = np.sqrt(g / lam_h) * root @ Vt / np.sqrt(counts)
    inner = [np.sqrt(g / lam) * root for lam in lam_w[:-1]]
    return [H, *inner, np.sqrt(g / lam_w[-1]) * U @ root]


def realise_relu(Z: Floats, feature_gram: Floats) -> list[Floats]:
    """Factors (H, W) with one private coordinate a class: H = diag(||h_k||) >= 0, W = Z H^+."""
    norms = np.sqrt(np.diag(feature_gram))
    return [np.diag(norms), Z * np.where(norms > 0, 1 / np.where(norms > 0, norms, 1.0), 0.0)]


def dual_point(Z: Floats, counts: Floats, *, loss: str = "CE", omega: Floats | None = None) -> Floats:
    """Qt with columns q_k/sqrt(n_k), q_k minus the gradient of class k's share of the loss at logits Z (bias in)."""
    K, N = len(counts), counts.sum()
    if loss == "CE":
        E = np.exp(Z - Z.max(axis=0))
        slope = E / E.sum(axis=0) - np.eye(K)
    else:
        slope = Z - np.eye(K)
    return -slope * (np.ones(K) if omega is None else omega) * np.sqrt(counts) / N


def descend(counts: Floats, width: int, lam_w: float, lam_h: float, lam_b: float | None, *, seed: int = 0) -> tuple[float, Floats, Floats]:
    """(F, W H, H) of plain L-BFGS on (W, H D^{1/2}, b) from a random start: cross-entropy, free features (a benign landscape)."""
    K, root, N = len(counts), np.sqrt(counts), counts.sum()

    def split(x: Floats) -> tuple[Floats, Floats, Floats]:
        return x[: K * width].reshape(K, width), x[K * width : 2 * K * width].reshape(width, K), x[2 * K * width :]

    def value(x: Floats) -> tuple[float, Floats]:
        W, G, b = split(x)
        Z = W @ G / root + (b[:, None] if lam_b is not None else 0.0)
        top = Z.max(axis=0)
        E = np.exp(Z - top)
        loss = (counts / N * (np.log(E.sum(axis=0)) + top - np.diag(Z))).sum()
        Q = (E / E.sum(axis=0) - np.eye(K)) * counts / N
        F = loss + lam_w / 2 * (W * W).sum() + lam_h / 2 * (G * G).sum() + (lam_b or 0.0) / 2 * (b * b).sum()
        grads = [(Q / root) @ G.T + lam_w * W, W.T @ (Q / root) + lam_h * G, Q.sum(axis=1) * (lam_b is not None) + (lam_b or 0.0) * b]
        return float(F), np.concatenate([g.ravel() for g in grads])

    x = np.random.default_rng(seed).standard_normal(2 * K * width + K) * 0.3
    x[2 * K * width :] = 0.0
    for _ in range(6):
        x = minimize(
            value, x, jac=True, method="L-BFGS-B", options={"maxiter": 20000, "maxfun": 40000, "ftol": 0.0, "gtol": 1e-14, "maxcor": 40}
        ).x
    W, G, _ = split(x)
    return value(x)[0], W @ G / root, G / root
