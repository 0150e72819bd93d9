"""Codes of least Schatten-p norm with unit margins: the limit of vanishing penalties of deep linear chains with cross-entropy.

    R(M) = sum_i s_i(M)^p,   p = 2/(L+1),   m_cc - m_jc >= 1 for all j != c

At the optimum of F the value tends to (lambda/2)(L+1) R* (log 1/lambda)^p as lambda -> 0. Starts are the distinct local minima of F at a
tiny penalty (a softmax of growing sharpness); a log barrier and then Newton's method on the active margins make them exact. Not proven
to be the least for L >= 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.counts import balanced
from ufm.problem import Problem
from ufm.records import Saved
from ufm.solvers.fixed_rank import SETTLED, Chart, Found, at_rank, chart_at, moved_in, polish, schatten
from ufm.solvers.search import grouped, local_minima

Floats = NDArray[np.float64]

LAMBDA = 1e-9  # penalty at which the starts are searched
BARRIERS = np.geomspace(1e-2, 1e-9, 8)  # strengths of the log barrier, per penalty
TIGHT = 3e-5  # slack below which a margin is taken as active: below its multiplier at the last barrier
WEAK = 1e-9  # margins within this of 1 are active, with or without a multiplier
EQUAL = (1e-9, 1e-5)  # relative differences of R and of singular values below which two codes are one


@dataclass(frozen=True, eq=False)
class MarginCodes(Saved):
    """The distinct codes found, smallest R first; m in all.

    R (m,); rank (m,); singular (m, K), zeros behind; M (m, K, K) with least margin 1; residual (m,): the gradient of the Lagrangian over
    that of R; multiplier (m,): the smallest one over the largest, of the margins held; violation (m,): of the margins; active (m,): margins
    that are 1, held or not; lowest (m,): smallest eigenvalue of the Lagrangian's Hessian along the margins held (inf where they leave no
    direction), relative to the largest; is_minimum (m,) bool: all of these tell a strict local minimum.
    """

    R: Floats
    rank: NDArray[np.int64]
    singular: Floats
    M: Floats
    residual: Floats
    multiplier: Floats
    violation: Floats
    active: NDArray[np.int64]
    lowest: Floats
    is_minimum: NDArray[np.bool_]


def max_margin(K: int, depth: int, *, starts: int = 20, seed: int = 0, keep: int = 8) -> MarginCodes:
    """Search the codes of K classes at depth L: from the `keep` lowest local minima of F at a tiny penalty, of `starts` starts a rank.

    ValueError unless K >= 2 and depth >= 1.
    """
    for name, value, least in (("K", K, 2), ("depth", depth, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"max_margin: {name} is {value!r}, but must be a whole number, at least {least}")
    problem = Problem(balanced(K, 1), width=K, depth=depth, features="free", lam_w=LAMBDA, lam_h=LAMBDA)
    soft = local_minima(problem, starts=starts, seed=seed, keep=keep)
    codes = [_exact(M, int(r), depth) for M, r in zip(soft.logits, soft.rank, strict=True) if margins(M).min() > 0]
    return _record(codes, depth)


def margins(M: Floats) -> Floats:
    """m_cc - m_jc, (..., K, K), 0 on the diagonal replaced by infinity."""
    K = M.shape[-1]
    return np.asarray(np.diagonal(M, axis1=-2, axis2=-1)[..., None, :] - M + np.where(np.eye(K) > 0, np.inf, 0.0))


@dataclass(frozen=True)
class Barrier:
    """-strength sum log(m_cc - m_jc - 1), infinite outside."""

    strength: float
    depth: int

    def fit(self, X: Floats) -> Floats:
        """(B,)."""
        slack = margins(X) - 1
        inside = np.where(np.isinf(slack), 1.0, np.maximum(slack, 0.0))
        with np.errstate(divide="ignore"):
            return np.asarray(-self.strength * np.log(inside).sum(axis=(-2, -1)))

    def slope(self, X: Floats) -> Floats:
        """(B, K, K)."""
        force = self.strength / (margins(X) - 1)
        return np.asarray(force - np.eye(X.shape[-1]) * force.sum(axis=-2, keepdims=True))

    def curves(self, X: Floats) -> Floats:
        """(K, K, K) of one X, the column last."""
        K = X.shape[-1]
        weight = self.strength / (margins(X[0]) - 1) ** 2  # (j, c)
        own = np.eye(K)[:, None, :]  # (i, 1, c): 1 where i is the column's class
        Q = np.eye(K)[:, :, None] * weight[None] - own * weight[None] - weight[:, None, :] * own.swapaxes(0, 1)
        return np.asarray(Q + own * own.swapaxes(0, 1) * weight.sum(axis=0))

    def penalty(self, s: Floats) -> Floats:
        """((L+1)/2) sum s^p."""
        return schatten(s, self.depth)


@dataclass(frozen=True)
class Lagrangian:
    """The linear part -sum_jc y_jc (m_cc - m_jc - 1) of the Lagrangian."""

    y: Floats
    depth: int

    def fit(self, X: Floats) -> Floats:
        """(B,)."""
        return np.asarray((self.slope(X) * X).sum(axis=(-2, -1)) + self.y.sum())

    def slope(self, X: Floats) -> Floats:
        """(B, K, K), the same everywhere."""
        return np.broadcast_to(self.y - np.diag(self.y.sum(axis=0)), X.shape)

    def curves(self, X: Floats) -> Floats:
        """Zero."""
        return np.zeros((X.shape[-1],) * 3)

    def penalty(self, s: Floats) -> Floats:
        """((L+1)/2) sum s^p."""
        return schatten(s, self.depth)


class Code(NamedTuple):
    """One code M = U diag(s) Vt and what it is worth; see `MarginCodes`."""

    point: Found
    residual: float
    multiplier: float
    violation: float
    lowest: float


def _exact(M: Floats, rank: int, depth: int) -> Code:
    """Follow the barrier down, then Newton's method on the active margins; which these are is corrected by signs."""
    X = 1.5 * M / margins(M).min()
    for strength in BARRIERS:
        point = polish(Barrier(float(strength), depth), X, rank)
        X, rank = (point.U * point.s) @ point.Vt, len(point.s)
    slack = margins(X) - 1
    tight, y = slack < TIGHT, BARRIERS[-1] / slack
    for _ in range(8):
        code, y = _on_active(point, np.where(tight, y, 0.0), tight, depth)
        wrong = tight & (y < 0) if code.residual < SETTLED else np.zeros_like(tight)
        missing = margins((code.point.U * code.point.s) @ code.point.Vt) < 1 - 1e-12
        if not (wrong | missing & ~tight).any():
            break
        tight = tight & ~wrong | missing
    return code


def _on_active(point: Found, y: Floats, tight: NDArray[np.bool_], depth: int) -> tuple[Code, Floats]:
    """Newton's method on the Lagrangian, the margins `tight` equal to 1 (least squares where they depend): the best code and its y."""
    best, kept = _judged(point, y, tight, depth), y
    for _ in range(8):
        F = Lagrangian(y, depth)
        chart = chart_at(F, point)
        A = _rows(chart, tight)
        n, k = len(chart.gradient), len(A)
        system = np.block([[chart.hessian, -A.mT], [A, np.zeros((k, k))]])
        short = 1 - margins((point.U * point.s) @ point.Vt)[tight]
        move = np.linalg.lstsq(system, np.concatenate([-chart.gradient, short]), rcond=1e-12)[0]
        X = moved_in(chart, point.s, move[:n])
        if X is None:
            break
        y = y.copy()
        y[tight] += move[n:]
        point = at_rank(F, X, len(point.s))
        if len(point.s) < len(best.point.s):
            break
        code = _judged(point, y, tight, depth)
        if code.residual + code.violation >= best.residual + best.violation:
            break
        best, kept = code, y
    return best, kept


def _rows(chart: Chart, tight: NDArray[np.bool_]) -> Floats:
    """Slopes of the active margins in the coordinates of a chart, (k, n)."""
    j, c = np.nonzero(tight)
    left, right = chart.U[c] - chart.U[j], chart.Vt[:, c].mT
    return np.asarray((left[:, :, None] * right[:, None, :])[:, chart.mask])


def _judged(point: Found, y: Floats, tight: NDArray[np.bool_], depth: int) -> Code:
    """The code at a point with multipliers y."""
    X = (point.U * point.s) @ point.Vt
    chart = chart_at(Lagrangian(y, depth), point)
    A = _rows(chart, tight)
    s, V = np.linalg.svd(A)[1:]
    free = V[int(np.sum(s > 1e-9 * s[0])) :]
    curvature = np.linalg.eigvalsh(free @ chart.hessian @ free.mT) if len(free) else np.array([np.inf])
    return Code(
        point,
        chart.residual,
        float(y[tight].min() / y[tight].max()) if tight.any() else -np.inf,
        float(max(0.0, 1 - margins(X).min())),
        float(curvature[0] / np.abs(chart.values).max()),
    )


def _record(codes: list[Code], depth: int) -> MarginCodes:
    """Distinct codes, smallest R first, scaled to the least margin 1."""
    K = len(codes[0].point.U)
    M = np.stack([(c.point.U * c.point.s) @ c.point.Vt for c in codes])
    least = margins(M).min(axis=(-2, -1))
    s = np.stack([np.concatenate([c.point.s, np.zeros(K - len(c.point.s))]) for c in codes]) / least[:, None]
    R = schatten(s, depth) * 2 / (depth + 1)
    active = np.sum(margins(M / least[:, None, None]) <= 1 + WEAK, axis=(-2, -1))
    order = np.argsort(R, kind="stable")
    at = order[grouped(R[order], s[order], *EQUAL)[0]]
    worth = {name: np.array([getattr(codes[i], name) for i in at]) for name in ("residual", "multiplier", "violation", "lowest")}
    told = (worth["residual"] < 1e-8) & (worth["multiplier"] > 0) & (worth["violation"] < 1e-10) & (worth["lowest"] > 1e-9)
    rank = np.array([len(codes[i].point.s) for i in at])
    return MarginCodes(R=R[at], rank=rank, singular=s[at], M=M[at] / least[at, None, None], active=active[at], is_minimum=told, **worth)
