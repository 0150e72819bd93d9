"""The scale of a symmetric critical point of the deep linear model: which scales are stationary at a penalty, and up to which penalty.

    phi(a) = weight log(1 + sum_j m_j e^{-a g_j}) + (lambda/2)(L+1) cost a^p,   p = 2/(L+1),   cost = sum_r rank_r sigma_r^p
    stationary iff  lambda = (weight/cost) a^{1-p} D(a),   D = sum_j m_j g_j e^{-a g_j} / (1 + sum_j m_j e^{-a g_j})

For L >= 2 the right side rises from 0 to its maximum at the fold and falls after it: two roots below the maximum, none above; for L = 1
it only falls, so there is one root. lambda is lambda_eff of `ufm.theory.deep`, of any shape; a scale that does not exist is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Branch = Literal["large", "small"]


class Part(NamedTuple):
    """Columns of one kind at scale 1: weight in the mean loss, logit gaps (J,) own minus other, how many classes at each gap (J,).

    sigma (R,), rank (R,): the singular values that move with this scale, and their multiplicities.
    """

    weight: float
    gaps: Floats
    multiplicity: Floats
    sigma: Floats
    rank: Floats


def part(weight: float, gaps: ArrayLike, multiplicity: ArrayLike, sigma: ArrayLike, rank: ArrayLike) -> Part:
    """A Part from lists and numbers; gaps that no class has are left out."""
    g, m, s, r = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (gaps, multiplicity, sigma, rank))
    return Part(weight, g[m > 0], m[m > 0], s, r)


def exponent(depth: int) -> float:
    """p = 2/(L+1)."""
    return 2 / (depth + 1)


def cost(of: Part, depth: int) -> float:
    """sum_r rank_r sigma_r^p: the Schatten-p sum at scale 1."""
    return float((of.rank * of.sigma ** exponent(depth)).sum())


def fit(of: Part, a: ArrayLike) -> Floats:
    """weight log(1 + sum_j m_j e^{-a g_j}), (...)."""
    x = np.asarray(a, dtype=np.float64)[..., None]
    return np.asarray(of.weight * np.log1p((of.multiplicity * np.exp(-x * of.gaps)).sum(axis=-1)))


def strength(of: Part, a: ArrayLike, depth: int) -> Floats:
    """The lambda at which the scale a is stationary, (...)."""
    x = np.asarray(a, dtype=np.float64)
    lead, first, total, _ = _sums(of, x)
    return np.asarray(of.weight / cost(of, depth) * _power(x, depth) * (lead * first / total))


def fold(of: Part, depth: int) -> float:
    """The scale at the largest lambda: a Var(g)/E(g) = 1 - p, moments over the softmax; 0 at L = 1."""
    if depth == 1:
        return 0.0

    def before(x: Floats) -> NDArray[np.bool_]:
        return np.asarray(np.exp(x) * _sums(of, np.exp(x))[3] < 1 - exponent(depth))

    return float(np.exp(_bisect(before, np.asarray(-60.0), np.asarray(np.log(1e3 / of.gaps.min())))))


def largest(of: Part, depth: int) -> float:
    """lambda_max, above which no scale is stationary (at L = 1 none from there on)."""
    return float(strength(of, fold(of, depth), depth))


def scale(of: Part, lam: ArrayLike, depth: int, branch: Branch = "large") -> Floats:
    """The larger or the smaller root, (...); NaN where there is none (above lambda_max, or the smaller one at L = 1)."""
    level = np.asarray(lam, dtype=np.float64)
    if branch == "small" and depth == 1:
        return np.full(level.shape, np.nan)
    top, turn = largest(of, depth), fold(of, depth)
    exists = (level > 0) & ((level < top * (1 - 4e-16)) if depth == 1 else (level <= top * (1 + 1e-15)))
    target = np.where(exists, level, top / 2)
    logs = np.log(target)
    if branch == "large":
        low = np.full(target.shape, np.log(turn) if depth > 1 else -80.0)
        high = np.full(target.shape, np.log(max(turn, 1 / of.gaps.min())))
        while np.any(beyond := _log_strength(of, high, depth) > logs):
            high = np.where(beyond, high + 0.7, high)
        x = _bisect(lambda y: _log_strength(of, y, depth) > logs, low, high)
    else:
        # D falls, so a^{1-p} weight D(0)/cost is above the curve and its root below the root
        bound = np.log(of.weight / cost(of, depth) * _slope_at_zero(of))
        low, high = (logs - bound) / (1 - exponent(depth)) - 1e-9, np.full(target.shape, np.log(turn))
        x = _bisect(lambda y: _log_strength(of, y, depth) < logs, low, high)
    return np.asarray(np.where(exists, _polish(of, np.exp(x), target, depth), np.nan))


def _polish(of: Part, a: Floats, target: Floats, depth: int) -> Floats:
    """Newton without logarithms, which lose digits at scales like 1e-90; steps that are not tiny (at the fold) are not taken."""
    for _ in range(2):
        slope = 1 - exponent(depth) - a * _sums(of, a)[3]  # of log strength in log a
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (strength(of, a, depth) / target - 1) / slope
        a = a * (1 - np.where(np.abs(step) < 1e-11, step, 0.0))
    return a


def _power(a: Floats, depth: int) -> Floats:
    """a^{(L-1)/(L+1)}, the exponent's own rounding made good: it costs two digits at a = 1e-90."""
    if depth == 1:
        return np.ones_like(a)
    exact = Fraction(depth - 1, depth + 1)
    return np.asarray(a ** float(exact) * (1 + float(exact - Fraction(float(exact))) * np.log(a)))


def _sums(of: Part, a: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(e^{-a g_min}, sum m g e^{-a(g - g_min)}, 1 + sum m e^{-a g}, Var(g)/E(g)), each (...)."""
    least = of.gaps.min()
    lead = np.exp(-a * least)
    e = of.multiplicity * np.exp(-a[..., None] * (of.gaps - least))
    first, second = (e * of.gaps).sum(axis=-1), (e * of.gaps**2).sum(axis=-1)
    total = 1 + lead * e.sum(axis=-1)
    return lead, first, total, second / first - lead * first / total


def _log_strength(of: Part, x: Floats, depth: int) -> Floats:
    """log of `strength` at a = e^x, without underflow."""
    a = np.exp(x)
    _, first, total, _ = _sums(of, a)
    return np.asarray(np.log(of.weight / cost(of, depth)) + (1 - exponent(depth)) * x - a * of.gaps.min() + np.log(first / total))


def _slope_at_zero(of: Part) -> float:
    return float((of.multiplicity * of.gaps).sum() / (1 + of.multiplicity.sum()))


def _bisect(below: Callable[[Floats], NDArray[np.bool_]], low: Floats, high: Floats) -> Floats:
    """The point where `below` turns from true to false, elementwise."""
    for _ in range(90):
        middle = (low + high) / 2
        left = below(middle)
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    return np.asarray((low + high) / 2)
