"""Critical points of the deep linear model with cross-entropy and balanced classes, as functions of lambda_eff: the catalogue.

    F(M) = mean_c CE(m_c) + (lambda_eff/2)(L+1) sum_i s_i(M)^p,   p = 2/(L+1),   M (K, K), column c = logits of class c

Each function gives a code (`deep_codes`); `at` and `levels` evaluate it. Balanced factors of its M are critical for every penalty.
Sources: Garrod & Keating 2025 (arXiv 2410.23169) for DNC, pairs and the polygon; the others are derived here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm import frames
from ufm.records import NoTheory
from ufm.theory import deep_scale
from ufm.theory.deep_codes import Code, Tied
from ufm.theory.deep_scale import Branch, Part, part
from ufm.theory.deep_stability import dnc_index, pairs_index

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CriticalPoint:
    """name; M (..., K, K); scales (..., S); rank; value = fit + penalty, (...); index (...), whole numbers or NaN as value,
    None for a structure without a closed form.
    """

    name: str
    M: Floats
    scales: Floats
    rank: int
    value: Floats
    fit: Floats
    penalty: Floats
    index: Floats | None


class Levels(NamedTuple):
    """What a code is worth at each lambda_eff, without its matrix: scales (..., S), value, fit and penalty (...)."""

    scales: Floats
    value: Floats
    fit: Floats
    penalty: Floats


def levels(code: Code | Tied, lam: ArrayLike, depth: int, branch: Branch = "large") -> Levels:
    """Scales, value, fit and penalty of a code at lambda_eff (...); NaN where it does not exist there."""
    level = np.asarray(lam, dtype=np.float64)
    return levels_at(code, code.scales(level, depth, branch), level, depth)


def levels_at(code: Code | Tied, x: Floats, lam: Floats, depth: int) -> Levels:
    """What a code is worth at given scales x (..., S) and lambda_eff (...)."""
    singular, ranks = code.spectrum(x)
    fit = code.fit(x)
    penalty = np.asarray(lam / 2 * (depth + 1) * (singular ** deep_scale.exponent(depth) @ ranks))
    return Levels(x, fit + penalty, fit, penalty)


def at(code: Code | Tied, lam: ArrayLike, depth: int, branch: Branch = "large") -> CriticalPoint:
    """The critical point of a code at lambda_eff (...), with M, rank, and index for DNC, zero and pairs; NaN where it does not exist.

    NoTheory where it exists at none of the lambda_eff given.
    """
    found = levels(code, lam, depth, branch)
    if np.all(np.isnan(found.value)):
        raise NoTheory(_absence(code, lam, depth, branch))
    return CriticalPoint(
        code.name,
        code.pattern(found.scales),
        found.scales,
        int(code.spectrum(found.scales)[1].sum()),
        *found[1:],
        _index(code, found, depth),
    )


def _index(code: Code | Tied, found: Levels, depth: int) -> Floats | None:
    missing = np.isnan(found.value)
    if not isinstance(code, Code):
        return None
    if len(code.parts) == 1 and int(code.parts[0].rank.sum()) == code.classes - 1:
        alpha = np.where(missing, 1.0, found.scales[..., 0] * code.parts[0].sigma[0])
        return np.where(missing, np.nan, dnc_index(code.classes, alpha, depth))
    if depth > 1 and code.parts and code.name == pairs(code.classes - code.classes % 2).name:
        beta = np.where(missing, 1.0, found.scales[..., 0])
        return np.where(missing, np.nan, pairs_index(code.classes, beta, depth))
    return np.zeros(found.value.shape) if not code.parts and depth > 1 else None


def _absence(code: Code | Tied, lam: ArrayLike, depth: int, branch: Branch) -> str:
    if branch == "small" and depth == 1:
        return f"deep_points.at: {code.name} has no small root at depth 1"
    limit = largest(code, depth) if isinstance(code, Code) else None
    bound = "where Newton's method finds no minimum of its scales" if limit is None else f"but it exists up to {limit:.6g} only"
    return f"deep_points.at: lambda_eff is {np.min(np.asarray(lam)):.6g}, {bound}, for {code.name} at depth {depth}"


def largest(code: Code, depth: int) -> float:
    """lambda_max, up to which every scale of the code has a root (inf for zero)."""
    return min((deep_scale.largest(of, depth) for of in code.parts), default=np.inf)


def dnc(K: int) -> Code:
    """alpha (I - 11^T/K): gap alpha to the K - 1 others, K - 1 singular values alpha."""
    return blocks([K], name=f"DNC of {K} classes")


def zero(K: int) -> Code:
    """M = 0, value log K: a strict local minimum for L >= 2; index 0 there, not known here at L = 1."""
    return Code("zero", K, (), lambda x: np.zeros((*x.shape[:-1], K, K)), float(np.log(K)))


def pairs(K: int) -> Code:
    """Blocks beta [[1, -1], [-1, 1]] of classes 2i, 2i + 1, K even: K/2 singular values 2 beta; the scale is beta."""
    if K % 2:
        raise NoTheory(f"deep_points.pairs: K is {K}, but pairs need an even number of classes; use relaxed_pairs")
    return _gram_code(f"{K // 2} pairs", frames.pairs(K), [1, 2], [K - 2, 1], 2.0, K // 2)


def cross_polytope(K: int) -> Code:
    """`pairs` by another name: the Gram of the cross-polytope with K vertices."""
    return pairs(K)


def polygon(K: int) -> Code:
    """beta cos(2 pi (i - j)/K), K >= 3: two singular values K beta/2."""
    j = np.arange(1, K // 2 + 1)
    gaps = 2 * np.sin(np.pi * j / K) ** 2  # 1 - cos without cancellation
    return _gram_code(f"{K}-gon", frames.polygon(K), gaps, np.where(2 * j == K, 1, 2), K / 2, 2)


def rectified_simplex(r: int) -> Code:
    """T(r), K = r(r-1)/2: own 2 - 4/r, adjacent 1 - 4/r, disjoint -4/r times beta; r - 1 singular values (r-2) beta."""
    return _gram_code(
        f"T({r})", np.sqrt(2 - 4 / r) * frames.rectified_simplex(r), [1, 2], [2 * (r - 2), (r - 2) * (r - 3) // 2], r - 2.0, r - 1
    )


def icosahedron() -> Code:
    """beta times the Gram of the 12 vertices: three singular values 4 beta."""
    c = np.sqrt(0.2)
    return _gram_code("icosahedron", frames.icosahedron(), [1 - c, 1 + c, 2], [5, 5, 1], 4.0, 3)


def blocks(sizes: Sequence[int], name: str | None = None) -> Code:
    """Direct sum of a_k (I_k - 11^T/k) over consecutive blocks of the given sizes, one scale a distinct size k >= 2, largest first.

    Value: sum over blocks of (k/K) log(1 + (k-1)e^{-a} + (K-k)e^{-a(1-1/k)}) plus log(K)/K for a class alone, whose row and column are 0.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"deep_points.blocks: sizes is {list(sizes)}, but must hold whole numbers, at least 1 each")
    K, number = sum(sizes), Counter(sizes)
    distinct = sorted((k for k in number if k > 1), reverse=True)
    if not distinct:
        return zero(K)
    parts = tuple(
        part(number[k] * k / K, [1.0, 1 - 1 / k], [k - 1, K - k], 1.0, number[k] * (k - 1)) for k in distinct
    )  # gap 1 inside, 1 - 1/k outside

    def pattern(x: Floats) -> Floats:
        M = np.zeros((*x.shape[:-1], K, K))
        for size, end in zip(sizes, np.cumsum(sizes), strict=True):
            if size > 1:
                own = slice(end - size, end)
                M[..., own, own] = x[..., distinct.index(size), None, None] * (np.eye(size) - 1 / size)
        return M

    return Code(name or f"blocks {tuple(sizes)}", K, parts, pattern, number[1] / K * float(np.log(K)))


def relaxed_pairs(K: int) -> Tied:
    """K = 2m + 1: (t/2) pairs + s u v^T, scales (t, alpha, w); u = (e_K - 1/K)/sqrt(1 - 1/K), m singular values t and one s; rank m + 1.

    alpha = what the lone class lies below t/2 in a paired column, w = margin of the lone column; s v = sqrt(1-1/K) (-alpha, ..., w) and
    s^2 = (1 - 1/K)(w^2 + 2m alpha^2). Stationary in u means centred columns, so the angle x of the general form is closed.
    """
    if K % 2 == 0 or K < 3:
        raise NoTheory(f"deep_points.relaxed_pairs: K is {K}, but a lone class beside pairs needs an odd number, at least 3; use pairs")
    m = K // 2
    paired = np.array([[1.0, 0, 0], [0.5, 0, 0], [0.5, 1, 0]])
    columns = ((2 * m / K, paired[[0, 1, 2]], np.array([1.0, K - 3, 1])), (1 / K, np.array([[0.0, 0, 1]]), np.array([2.0 * m])))
    forms = np.array([[1.0, 0, 0], [0, 2 * m * (1 - 1 / K), 1 - 1 / K]])
    alone = (part(2 * m / K, [1, 0.5], [1, K - 2], 1.0, m), part(1 / K, 1.0, 2 * m, np.sqrt(1 - 1 / K), 1.0))

    def start(lam: Floats, depth: int) -> Floats:
        t, w = (_root_or_fold(of, lam, depth) for of in alone)
        return np.stack([t, np.zeros_like(t), w], axis=-1)

    def pattern(x: Floats) -> Floats:
        F = frames.pairs(K)[:, :-1]
        u = np.eye(K)[-1] - 1 / K
        v = np.concatenate([np.repeat(-x[..., 1:2], K - 1, axis=-1), x[..., 2:]], axis=-1)
        return np.asarray(x[..., 0, None, None] / 2 * (F @ F.T) + u[:, None] * v[..., None, :])

    return Tied(f"{m} pairs and a class, relaxed", K, columns, forms, np.array([m, 1.0]), start, np.array([2.0, 0, 1]), pattern)


def square_antiprism() -> Tied:
    """K = 8, scales = singular values (twice around the circle, once along the axis): sigma_1 cos(angle)/4 + sigma_2 (+-1)/8."""
    c = np.sqrt(0.5)
    gaps = np.array([[1, 0], [2, 0], [1 - c, 1], [1 + c, 1]]) / 4
    limit = np.array([4.0, 4 * c])
    ray = part(1.0, gaps @ limit, [2, 1, 2, 2], limit, [2, 1])

    def pattern(x: Floats) -> Floats:
        V = frames.square_antiprism(1.0)
        around, axis = V[:, :2] @ V[:, :2].T / 4, V[:, 2:] @ V[:, 2:].T / 8
        return np.asarray(x[..., 0, None, None] * around + x[..., 1, None, None] * axis)

    def start(lam: Floats, depth: int) -> Floats:
        return np.asarray(_root_or_fold(ray, lam, depth)[..., None] * limit)

    columns = ((1.0, gaps, np.array([2.0, 1, 2, 2])),)
    return Tied("square antiprism", 8, columns, np.eye(2), np.array([2.0, 1]), start, limit, pattern)


def candidates(K: int) -> list[Code | Tied]:
    """The catalogued codes of K classes in which every class has a margin, DNC first."""
    found: list[Code | Tied] = [dnc(K)]
    if K > 2:
        found += [pairs(K) if K % 2 == 0 else relaxed_pairs(K), polygon(K)]
    r = frames.triangular_root(K)
    if r >= 4:
        found.append(rectified_simplex(r))
    return found + ([square_antiprism()] if K == 8 else []) + ([icosahedron()] if K == 12 else [])


def _gram_code(name: str, V: Floats, gaps: ArrayLike, number: ArrayLike, sigma: float, rank: int) -> Code:
    """beta V V^T, for rows V (K, d) moved among each other by a transitive group, with `rank` singular values sigma beta."""
    return Code(name, len(V), (part(1.0, gaps, number, sigma, rank),), lambda x: x[..., 0, None, None] * (V @ V.T))


def _root_or_fold(of: Part, lam: Floats, depth: int) -> Floats:
    found = deep_scale.scale(of, lam, depth)
    return np.where(np.isnan(found), max(deep_scale.fold(of, depth), 0.1), found)
