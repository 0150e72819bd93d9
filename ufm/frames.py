"""Frames of K vectors, and the Grams that theory expects of class means, classifier and logits, up to scale.

Everything is a numpy array in double precision; counts and margins are (..., K), Grams (..., K, K). Frames hold their vectors as rows.
"""

from __future__ import annotations

from math import isqrt
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.arrays import Array, like, namespace

Floats = NDArray[np.float64]

ROUNDED = 1e-6  # of a frame's size: sums of rows and singular values below it are rounding, float32's too


class Targets(NamedTuple):
    """Up to scale: the class means' Gram, the classifier's W W^T, and the logits W mu of the class means, each (..., K, K)."""

    features: Floats
    classifier: Floats
    logits: Floats


def helmert(K: int) -> Floats:
    """Orthonormal basis of the vectors that sum to zero, (K - 1, K): row i is (1, ..., 1, -i, 0, ..., 0)/sqrt(i(i+1)), i ones."""
    _check("helmert", "K", K, 2, "a simplex needs two classes")
    i = np.arange(1.0, K)[:, None]
    return np.asarray((np.tri(K - 1, K) - i * np.eye(K - 1, K, k=1)) / np.sqrt(i * (i + 1)))


def simplex_etf(K: int, d: int | None = None) -> Floats:
    """K unit rows with equal pairwise cosines -1/(K-1), (K, d): M M^T = K/(K-1) (I - 11^T/K).

    Without d the symmetric form sqrt(K/(K-1)) (I - 11^T/K), (K, K); with d >= K - 1 the columns of `helmert`, zeros behind them.
    """
    if d is None:
        _check("simplex_etf", "K", K, 2, "a simplex needs two classes")
        return np.asarray(np.sqrt(K / (K - 1)) * _centring(K))
    basis = helmert(K)
    _check("simplex_etf", "d", d, K - 1, f"a simplex ETF of {K} classes spans {K - 1} dimensions")
    return np.asarray(np.sqrt(K / (K - 1)) * np.pad(basis.T, ((0, 0), (0, d - K + 1))))


def orthogonal_frame(K: int, d: int | None = None) -> Floats:
    """K orthonormal rows e_k, (K, d), d = K by default."""
    _check("orthogonal_frame", "K", K, 1, "a frame holds at least one vector")
    d = K if d is None else d
    _check("orthogonal_frame", "d", d, K, f"{K} orthogonal vectors span {K} dimensions")
    return np.eye(K, d)


def polygon(K: int) -> Floats:
    """K unit rows (cos 2 pi k/K, sin 2 pi k/K) on a circle, (K, 2); K = 3 is the simplex, K = 4 two pairs."""
    _check("polygon", "K", K, 3, "a polygon has three corners")
    angle = 2 * np.pi * np.arange(K) / K
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def pairs(K: int) -> Floats:
    """Rows e_1, -e_1, e_2, -e_2, ..., and for odd K a last class alone on its own axis, (K, ceil(K/2))."""
    _check("pairs", "K", K, 2, "a pair has two classes")
    signs = np.where(np.arange(K) % 2, -1.0, 1.0)
    return np.asarray(signs[:, None] * (np.arange(K)[:, None] // 2 == np.arange((K + 1) // 2)))


def cross_polytope(m: int) -> Floats:
    """2m unit rows e_1, -e_1, ..., e_m, -e_m, (2m, m): `pairs` of 2m classes."""
    _check("cross_polytope", "m", m, 1, "a cross-polytope has an axis")
    return pairs(2 * m)


def by_rank(F: Floats) -> Floats:
    """As many columns as the rank of F (K, m) up to rounding, with the same Gram matrix: P S of F = P S Q^T."""
    P, s, _ = np.linalg.svd(F, full_matrices=False)
    rank = int(np.sum(s > ROUNDED * s[0]))
    return np.asarray(P[:, :rank] * s[:rank])


def rectified_simplex(r: int) -> Floats:
    """T(r): unit rows along e_i + e_j - 2/r for i < j <= r, (r(r-1)/2, r): midpoints of the edges of a simplex; T(4) is the octahedron."""
    _check("rectified_simplex", "r", r, 3, "its classes are the edges of a complete graph")
    i, j = np.triu_indices(r, 1)
    rows = np.eye(r)[i] + np.eye(r)[j] - 2 / r
    return np.asarray(rows / np.sqrt(2 - 4 / r))


def triangular_root(K: int) -> int:
    """r where K = r(r-1)/2, the edges of a complete graph of r vertices; 0 where K is no such number."""
    r = (1 + isqrt(1 + 8 * K)) // 2
    return r if r * (r - 1) == 2 * K else 0


def icosahedron() -> Floats:
    """The 12 vertices, (12, 3), unit rows with cosines +-1/sqrt(5) and -1, antipodes next to each other."""
    golden = (1 + np.sqrt(5)) / 2
    half = [np.roll([0.0, 1.0, s * golden], shift) for shift in range(3) for s in (1, -1)]
    return np.asarray(np.kron(half, [[1.0], [-1.0]]) / np.hypot(1, golden))


def square_antiprism(height: float) -> Floats:
    """8 rows (cos, sin, +-height), (8, 3): a square, then the same turned by 45 degrees, at opposite heights; the circle has radius 1."""
    angle = np.pi / 2 * np.arange(4)
    around = np.concatenate([angle, angle + np.pi / 4])
    return np.stack([np.cos(around), np.sin(around), np.repeat([height, -height], 4)], axis=1)


def etf_targets(K: int) -> Targets:
    """I - 11^T/K for all three: balanced cross-entropy with free features, about any centre that is the mean of the class means."""
    _check("etf_targets", "K", K, 2, "a simplex needs two classes")
    return Targets(_centring(K), _centring(K), _centring(K))


def orthogonal_targets(K: int) -> Targets:
    """I for all three: balanced squared error without a bias. For balanced ReLU cross-entropy see `imbalanced_targets`."""
    _check("orthogonal_targets", "K", K, 1, "a frame holds at least one vector")
    return Targets(np.eye(K), np.eye(K), np.eye(K))


def imbalanced_targets(counts: ArrayLike, margins: ArrayLike) -> Targets:
    """ReLU cross-entropy without a bias: diag(M_k n_k^{-1/2}), T, and columns M_k (e_k - 1/K), with m_k = sqrt(n_k) M_k.

    T_kk = (K-1)^2 m_k + sum of the other m;  T_kl = -(K-1)(m_k + m_l) + sum of the other m. All margins equal and equal counts: the
    orthogonal frame with a simplex ETF as classifier. A class at zero has M_k = 0; with every class at zero the targets are zero.
    ValueError for counts that are not positive or margins that are negative. Source: Dang et al., ICML 2024 (arXiv 2401.02058).
    """
    n, M = np.broadcast_arrays(_counts("imbalanced_targets", counts), np.asarray(margins, dtype=np.float64))
    if not np.all(M >= 0):
        raise ValueError(
            f"frames.imbalanced_targets: margins holds {M[~(M >= 0)][0]}, but margins are at least 0; use 0 for a class at zero"
        )
    K = n.shape[-1]
    m = np.sqrt(n) * M
    T = m.sum(axis=-1)[..., None, None] - K * (m[..., :, None] + m[..., None, :]) + K * K * m[..., None] * np.eye(K)
    return Targets(np.asarray((M / np.sqrt(n))[..., None] * np.eye(K)), np.asarray(T), np.asarray(M[..., None, :] * _centring(K)))


def seli_targets(counts: ArrayLike) -> Targets:
    """Free features, penalties -> 0: D^{-1/2} U L U^T D^{-1/2}, V L V^T and I - 11^T/K, from the SVD (I - 11^T/K) D^{1/2} = V L U^T.

    D = diag(n_k). Convergence in the penalties is logarithmic. Source: Thrampoulidis et al. 2022 (arXiv 2208.05512).
    """
    n = _counts("seli_targets", counts)
    V, L, Ut = np.linalg.svd(_centring(n.shape[-1]) * np.sqrt(n)[..., None, :])
    means = np.swapaxes(Ut, -1, -2) / np.sqrt(n)[..., None]  # D^{-1/2} U, (..., K, K)
    features, classifier = ((X * L[..., None, :]) @ np.swapaxes(X, -1, -2) for X in (means, V))
    return Targets(features, classifier, np.array(np.broadcast_to(_centring(n.shape[-1]), V.shape)))


def released_margins(counts: ArrayLike, lam_w: ArrayLike, lam_h: ArrayLike) -> Floats:
    """The margins that the evaluation script of Dang et al. (2024) uses, (..., K); those of its own training problem are different.

        M_k = max(0, log((K-1)(sqrt(n_k)/(N sqrt(lam_w/2 lam_h/2) sqrt((K-1)/K lam_w/lam_h)) - 1)))

    lam_w, lam_h (...) are the script's options weight_decay and feature_decay_rate as given, not penalties in the convention of `ufm`;
    lam_h cancels. Kept to reproduce published curves. Source: Fsoft-AIC/Cross-Entropy-Imbalanced, validate_NC_unbalanced.py.
    """
    n = _counts("released_margins", counts)
    w, h = (np.asarray(x, dtype=np.float64)[..., None] for x in (lam_w, lam_h))
    if not (np.all(w > 0) and np.all(h > 0)):
        raise ValueError(f"frames.released_margins: lam_w is {lam_w!r} and lam_h {lam_h!r}, but the script's formula needs both positive")
    K = n.shape[-1]
    scale = n.sum(axis=-1, keepdims=True) * np.sqrt(w / 2 * (h / 2)) * np.sqrt((K - 1) / K * w / h)
    return np.asarray(np.log(np.maximum((K - 1) * (np.sqrt(n) / scale - 1), 1.0)))


def imbalanced_classifier(means: Array, counts: Any) -> Array:
    """Rows K sqrt(n_k) mu_k - sum_m sqrt(n_m) mu_m, (B, K, d), of class means (B, d, K): the classifier theory expects, up to scale.

    counts (K,) or (B, K). An array of the means' library, dtype and device. Source: Dang et al., ICML 2024 (arXiv 2401.02058).
    """
    xp = namespace(means)
    host = isinstance(counts, (np.ndarray, list, tuple))
    n = like(np.array(_counts("imbalanced_classifier", counts)) if host else counts, means)
    if n.shape[-1] != means.shape[-1]:
        raise ValueError(
            f"frames.imbalanced_classifier: counts has {n.shape[-1]} classes, but means has {means.shape[-1]} columns; give one count each"
        )
    root = xp.reshape(xp.sqrt(n), (-1, 1, n.shape[-1]))
    weighted = means * root  # (B, d, K)
    return (means.shape[-1] * weighted - xp.sum(weighted, axis=-1, keepdims=True)).mT


def graph_incidence(r: int) -> Floats:
    """Vertices against edges of the complete graph K_r, (r, r(r-1)/2): 1 where edge i < j has the vertex; B B^T = (r-2) I + 11^T.

    Edges in the order of `rectified_simplex`; own, adjacent and disjoint edges share 2, 1 and 0 vertices: the triangular graph.
    """
    _check("graph_incidence", "r", r, 3, "its classes are the edges of a complete graph")
    i, j = np.triu_indices(r, 1)
    return np.asarray((np.eye(r)[i] + np.eye(r)[j]).T)


def _centring(K: int) -> Floats:
    return np.asarray(np.eye(K) - 1 / K)


def _counts(call: str, counts: ArrayLike) -> Floats:
    n = np.asarray(counts, dtype=np.float64)
    if n.ndim < 1 or n.shape[-1] < 2:
        raise ValueError(f"frames.{call}: counts has shape {n.shape}, but must be (..., K) with at least two classes")
    if not (np.all(n > 0) and np.all(np.isfinite(n))):
        raise ValueError(
            f"frames.{call}: counts holds {n[~((n > 0) & np.isfinite(n))][0]}, but a class needs samples; leave empty classes out"
        )
    return n


def _check(call: str, name: str, value: int, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"frames.{call}: {name} is {value!r}, but must be a whole number, at least {least} ({why})")
