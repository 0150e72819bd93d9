"""The Hessian at deep neural collapse (linear chain, cross-entropy, balanced): exact spectrum, index, and the line where it is lost.

For a common penalty and n = 1, d >= K; t = alpha/K, rho = 1 - K/(e^alpha + K - 1). With n samples per class take lambda_eff and multiply
the eigenvalues by n^{-1/(L+1)}; deviations within a class add positive eigenvalues only. Unequal penalties are a congruence, so the
index is the same for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.theory import deep_scale
from ufm.theory.deep_scale import Branch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Spectrum(NamedTuple):
    """Eigenvalues (..., m), not sorted; multiplicities (m,), which add up to the number of parameters; directions (m,) in words."""

    eigenvalues: Floats
    multiplicities: Ints
    directions: tuple[str, ...]


DIRECTIONS = (
    "orbit of the orthogonal groups",
    "symmetric with zero sum over the factors; frame to complement",
    "all-ones output row; complement",
    "symmetric, zero diagonal, the same in every factor",
    "scale",
    "antisymmetric, the same in every factor",
    "diagonal coupled to the all-ones input, lower",
    "diagonal coupled to the all-ones input, upper",
)


def dnc_spectrum(K: int, alpha: ArrayLike, depth: int, width: int) -> Spectrum:
    """The whole spectrum of the Hessian at DNC of scale alpha (...), on either branch, n = 1, common penalty.

    Eigenvalues over lambda = alpha^{(L-1)/(L+1)}/(e^alpha + K - 1); ValueError for width < K, where the count differs.
    """
    if width < K:
        raise ValueError(f"deep_stability.dnc_spectrum: width is {width}, but the multiplicities are known for width >= K = {K} only")
    a = np.asarray(alpha, dtype=np.float64)
    e = np.exp(-a)
    lam = a ** ((depth - 1) / (depth + 1)) * e / (1 + (K - 1) * e)
    fixed = [np.broadcast_to(float(x), a.shape) for x in (0, 2, 1)]
    values = np.stack([*fixed, *_moving(K, a, depth)], axis=-1) * lam[..., None]
    return Spectrum(values, np.array(_fixed_counts(K, depth, width) + _moving_counts(K), dtype=np.int64), DIRECTIONS)


def dnc_index(K: int, alpha: ArrayLike, depth: int) -> Ints:
    """Negative eigenvalues at DNC of scale alpha, (...): K(K-3)/2 below a_c, K-1 more where AB < C^2, 1 more on the small root."""
    a = np.asarray(alpha, dtype=np.float64)
    values = np.stack(_moving(K, a, depth), axis=-1)
    return np.asarray(((values < 0) * np.array(_moving_counts(K))).sum(axis=-1), dtype=np.int64)


def stable_scale(K: int, depth: int) -> float:
    """a_c = K(L-1)/(L+1): for K >= 4, DNC has no negative eigenvalue iff alpha >= a_c."""
    _four("stable_scale", K)
    return K * (depth - 1) / (depth + 1)


def log_stability_level(K: int, depth: int) -> float:
    """log lambda_c, lambda_c = a_c^{(L-1)/(L+1)}/(e^{a_c} + K - 1): DNC is stable iff lambda_eff <= lambda_c; L >= 2, K >= 4."""
    _four("log_stability_level", K)
    if depth < 2:
        raise ValueError(f"deep_stability.log_stability_level: depth is {depth}, but DNC is stable wherever it exists at depth 1")
    a = stable_scale(K, depth)
    return float((depth - 1) / (depth + 1) * np.log(a) - a - np.log1p((K - 1) * np.exp(-a)))


def stability_level(K: int, depth: int) -> float:
    """lambda_c; 0 where it underflows (K near 1000), see `log_stability_level`."""
    return float(np.exp(log_stability_level(K, depth)))


def strip_top(K: int, depth: int) -> float:
    """The scale below which AB < C^2, so that K - 1 further directions are negative, K >= 3, L >= 2: the whole criterion at K = 3."""
    if K < 3 or depth < 2:
        raise ValueError(f"deep_stability.strip_top: K is {K} and depth {depth}, but the strip is there for K >= 3 and depth >= 2 only")
    low, high = 1e-12, 4.0 * K
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _determinant(K, np.asarray(middle), depth) < 0 else (low, middle)
    return (low + high) / 2


def block_is_unstable(size: int, K: int, a: ArrayLike, depth: int) -> NDArray[np.bool_]:
    """a < (L-1)/(L+1) (k + (K-k) e^{a/k}), (...): a block of k >= 4 classes at scale a then has k(k-3)/2 negative directions.

    k = K is the criterion of DNC. For k < K it holds again at large a, that is as lambda -> 0. Not the whole index: further modes of a
    block may be negative when its scale is small.
    """
    _four("block_is_unstable", size)
    x = np.asarray(a, dtype=np.float64)
    grown = (K - size) * np.exp(np.minimum(x / size, 700.0)) if size < K else 0.0
    return np.asarray(x < (depth - 1) / (depth + 1) * (size + grown))


def pairs_index(K: int, beta: ArrayLike, depth: int) -> Ints:
    """Negative eigenvalues in m = K/2 pairs of scale beta, (...): m(m-1)/2 if 2 beta < (L-1)/(L+1) (K - 2 + 2 e^{-beta}), m below the fold.

    The first are directions that turn two pairs into each other, the others the pairs' own scales; L >= 2. So pairs, too, are saddles
    for many classes. Derived here, as the line of DNC; matched to dense Hessians.
    """
    b, m = np.asarray(beta, dtype=np.float64), K // 2
    turning = 2 * b < (depth - 1) / (depth + 1) * (K - 2 + 2 * np.exp(-b))
    shrinking = b < deep_scale.fold(deep_scale.part(1.0, [1, 2], [K - 2, 1], 2.0, m), depth)
    return np.asarray(turning * (m * (m - 1) // 2) + shrinking * m, dtype=np.int64)


def dnc_is_stable(K: int, lam: ArrayLike, depth: int, branch: Branch = "large") -> NDArray[np.bool_]:
    """Whether DNC exists at lambda_eff (...) and has no negative eigenvalue."""
    a = deep_scale.scale(deep_scale.part(1.0, 1.0, K - 1, 1.0, K - 1), lam, depth, branch)
    exists = np.isfinite(a)
    return np.asarray(exists & (dnc_index(K, np.where(exists, a, 1.0), depth) == 0))


def _moving(K: int, a: Floats, depth: int) -> list[Floats]:
    """The eigenvalues over lambda that can change sign, or couple: the last five of DIRECTIONS."""
    t, rho, N = a / K, _rho(K, a), depth + 1
    A, B, C = _coupled(K, a, depth)
    middle, half = (A + B) / 2, np.hypot((A - B) / 2, C)
    upper = middle + half
    lower = np.where(middle > 0, _determinant(K, a, depth) / np.where(middle > 0, upper, 1.0), middle - half)
    if K == 2:  # there is no diagonal irrep, the all-ones mode stands alone
        lower = upper = B
    return [(2 - N) + N * t, (2 - N) + N * t * (1 + rho * (K - 1)), N * (t + 1), lower, upper]


def _fixed_counts(K: int, depth: int, d: int) -> list[int]:
    rest = d - K + 1
    orbit = depth * (K - 1) * (2 * d - K) // 2
    return [orbit, depth * (K * (K - 1) // 2 + (K - 1) * rest), d + rest + (depth - 1) * rest**2]


def _moving_counts(K: int) -> list[int]:
    return [max(K * (K - 3) // 2, 0), 1, (K - 1) * (K - 2) // 2, K - 1 if K > 2 else 0, K - 1]


def _coupled(K: int, a: Floats, depth: int) -> tuple[Floats, Floats, Floats]:
    t, rho, N = a / K, _rho(K, a), depth + 1
    return 2 - N + t * N * (1 + rho * (K - 2)), 1 + t * (1 + rho), t * rho * np.sqrt(N * (K - 2.0))


def _determinant(K: int, a: Floats, depth: int) -> Floats:
    A, B, C = _coupled(K, a, depth)
    return np.asarray(A * B - C * C)


def _rho(K: int, a: Floats) -> Floats:
    """1 - K/(e^a + K - 1), without cancellation or overflow."""
    return np.asarray(-np.expm1(-a) / (1 + (K - 1) * np.exp(-a)))


def _four(call: str, K: int) -> None:
    if K < 4:
        raise ValueError(f"deep_stability.{call}: the number of classes is {K}, but the direction it speaks of needs at least 4")
