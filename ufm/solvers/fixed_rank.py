"""The reduced problem of deep linear chains: F as a function of the class logits, and Newton's method among matrices of one rank.

    F(X)/g = sum_c (m_c/(g N)) loss(x_c m_c^{-1/2}, c) + ((L+1)/2) sum_i s_i(X)^p,   p = 2/(L+1),   g = (lam_h prod_l lam_w[l])^{1/(L+1)}

X = Z D^{1/2}, (K, K), holds the logits of the class means, weighted by D = diag(m). F(X) is the least F of any factors with these logits,
and every critical point of a linear chain with free features and a loss convex in the logits is one of F on the matrices of its rank; for
L >= 2 it is a minimum of the chain iff it is one there, as a new singular value s costs s^p. From the Schatten reduction of Garrod &
Keating 2025 (arXiv 2410.23169).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ufm.coordinates import balanced
from ufm.losses import Loss, Targets
from ufm.problem import Problem

Floats = NDArray[np.float64]

ITERATIONS, ESCAPES = 60, 8  # Newton steps, and steps off saddles among them
FLAT = 1e-9  # eigenvalues below this share of the largest are zero
FAINT = 1e-2  # singular values below this share of the largest (or of 0.1) are dropped where that lowers F
SETTLED, FLOOR = 1e-9, 1e-14  # relative residuals below which a point is stationary, and cannot be improved


@dataclass(frozen=True, eq=False)
class Reduced:
    """F/g of one cell, or of several when its arrays hold several; X is (B, K, K)."""

    loss: Loss
    targets: Targets
    weight: Floats  # (B, 1, K)
    scale: Floats  # (B, 1, K)
    unit: Floats  # (B,)
    depth: int

    @classmethod
    def of(cls, problem: Problem, runs: int = 1) -> Reduced:
        """The reduced problem of every cell, `runs` times; columns are class means."""
        frame = balanced(replace(problem, columns="means", width=1, depth=1, lam_w=_joint(problem), lam_h=_joint(problem)), runs)
        F = frame.objective
        assert F.column_scale is not None
        return cls(F.loss, F.targets, F.column_weight, F.column_scale, frame.unit, problem.depth)

    def pick(self, at: NDArray[np.int64]) -> Reduced:
        """The given runs alone."""
        targets = self.targets.map(lambda x: x[at])
        return replace(self, targets=targets, weight=self.weight[at], scale=self.scale[at], unit=self.unit[at])

    def fit(self, X: Floats) -> Floats:
        """The loss part, (B,)."""
        return np.asarray(np.vecdot(self.loss.value(X * self.scale, self.targets), self.weight[:, 0]))

    def slope(self, X: Floats) -> Floats:
        """Its gradient, (B, K, K)."""
        return np.asarray(self.loss.slope(X * self.scale, self.targets) * self.weight * self.scale)

    def curves(self, X: Floats) -> Floats:
        """Its second derivative in each column of one X (1, K, K): (K, K, K), the column last."""
        moves = np.eye(X.shape[-1])[:, :, None] * self.scale
        return np.asarray(self.loss.curve(X * self.scale, self.targets, moves) * self.weight * self.scale)

    def penalty(self, s: Floats) -> Floats:
        """((L+1)/2) sum_i s_i^p of singular values (..., r)."""
        return schatten(s, self.depth)


def schatten(s: Floats, depth: int) -> Floats:
    """((L+1)/2) sum_i s_i^p, (...), of singular values (..., r)."""
    return np.asarray((depth + 1) / 2 * (s ** (2 / (depth + 1))).sum(axis=-1))


def _joint(problem: Problem) -> Floats:
    """g of each cell, (G,)."""
    lam = np.concatenate([problem.lam_h[:, None], problem.lam_w], axis=1)
    return np.asarray(np.exp(np.log(lam).mean(axis=1)))


class Convex(Protocol):
    """What Newton's method asks of F: a fit convex in X, column by column, with slope and curves, and the penalty ((L+1)/2) sum s^p."""

    @property
    def depth(self) -> int: ...

    def fit(self, X: Floats) -> Floats: ...

    def slope(self, X: Floats) -> Floats: ...

    def curves(self, X: Floats) -> Floats: ...

    def penalty(self, s: Floats) -> Floats: ...


class Found(NamedTuple):
    """Where Newton's method ended: X = U diag(s) Vt of rank r, F/g, the relative residual, negative and zero eigenvalues, the smallest one.

    U (K, r), s (r,), Vt (r, K); eigenvalues are those of F on the matrices of rank r.
    """

    U: Floats
    s: Floats
    Vt: Floats
    value: float
    residual: float
    negative: int
    flat: int
    lowest: float


def polish(F: Convex, X: Floats, rank: int) -> Found:
    """Minimise one F from X (K, K), where it is finite, among the matrices of rank `rank`; directions that are better dropped are dropped.

    Newton steps with |eigenvalues|, backtracking, and steps off saddles: the end is a minimum, to the floor of float64. Rank 0 is zero.
    """
    point = at_rank(F, X, rank)
    for _ in range(ESCAPES):
        settled = _settled(F, point)
        point = _off_saddle(F, settled) if settled.negative else settled
        if point is settled:
            break
    return settled


def _settled(F: Convex, point: Found) -> Found:
    """The stationary point that Newton steps lead to, or where they stop."""
    last: Found | None = None
    for _ in range(ITERATIONS):
        if not len(point.s):
            break
        chart = chart_at(F, point)
        point = point._replace(residual=chart.residual, negative=chart.negative, flat=chart.flat, lowest=float(chart.values[0]))
        if last is not None and last.residual < SETTLED and len(last.s) == len(point.s) and point.residual > 0.5 * last.residual:
            return last
        last, moved = point, _step(F, point, chart) if chart.residual > FLOOR else None
        if moved is None:
            break
        point = moved
    return point


def at_rank(F: Convex, X: Floats, rank: int) -> Found:
    """X at the given rank, without the faint directions that F is lower without."""
    U, s, Vt = np.linalg.svd(X)
    r = min(rank, int(np.sum(s > 1e-12 * s[0]))) if s[0] > 0 else 0

    def value(r: int) -> float:
        return float(F.fit(((U[:, :r] * s[:r]) @ Vt[:r])[None])[0] + F.penalty(s[:r]))

    best = value(r)
    while r and s[r - 1] < FAINT * max(s[0], 0.1) and (lower := value(r - 1)) <= best:
        r, best = r - 1, lower
    return Found(U[:, :r], s[:r], Vt[:r], best, 0.0, 0, 0, np.nan)


class Chart(NamedTuple):
    """The matrices of rank r around X: frames U, V (K, K), gradient and Hessian (n, n) of F, its eigenvalues and vectors.

    mask (K, K): where the n coordinates lie; residual: the gradient over that of the penalty.
    """

    U: Floats
    Vt: Floats
    gradient: Floats
    hessian: Floats
    values: Floats
    vectors: Floats
    mask: NDArray[np.bool_]
    residual: float
    negative: int
    flat: int


def chart_at(F: Convex, at: Found) -> Chart:
    """Gradient and Hessian in the coordinates C of X(C) = (U (S + A) + U' Z) (S + A)^{-1} ((S + A) Vt + Y V't), C = [[A, Y], [Z, 0]]."""
    s, r, K = at.s, len(at.s), len(at.U)
    p = 2 / (F.depth + 1)
    U, V = (_completed(Q) for Q in (at.U, at.Vt.mT))
    X = (at.U * s) @ at.Vt
    G = U.mT @ F.slope(X[None])[0] @ V
    first, second = s ** (p - 1), (p - 1) * s ** (p - 2)
    C = G.copy()
    C[range(r), range(r)] += first
    Q = F.curves(X[None])  # (K, K, column)
    Q = U.mT @ np.moveaxis(Q, -1, 0) @ U  # (column, K, K)
    outer = V[:, :, None] * V[:, None, :]  # (column, K, K)
    H = (Q.reshape(K, K * K).mT @ outer.reshape(K, K * K)).reshape(K, K, K, K)  # i, k, j, l
    H = np.moveaxis(H, 1, 2).copy()  # i, j, k, l: C_ij against C_kl
    gap = s[:, None] - s[None, :]
    near = np.abs(gap) <= 1e-6 * (s[:, None] + s[None, :])
    mean = 0.5 * (second[:, None] + second[None, :])
    slopes = np.where(near, mean, (first[:, None] - first[None, :]) / np.where(near, 1.0, gap))
    turn = (first[:, None] + first[None, :]) / (s[:, None] + s[None, :])
    i, j = np.indices((r, r))
    H[i, j, i, j] += 0.5 * (slopes + turn)
    H[i, j, j, i] += 0.5 * (slopes - turn)
    a, b = np.indices((r, K - r))
    H[a, r + b, a, r + b] += (first / s)[:, None]
    H[r + b, a, r + b, a] += (first / s)[:, None]
    for k in range(r):  # <G', Z S^{-1} Y>
        H[r:, k, k, r:] += G[r:, r:] / s[k]
        H[k, r:, r:, k] += G[r:, r:].mT / s[k]
    mask = np.ones((K, K), dtype=bool)
    mask[r:, r:] = False
    n = mask.ravel()
    A = H.reshape(K * K, K * K)[np.ix_(n, n)]
    A = 0.5 * (A + A.mT)
    values, vectors = _eigh(A)
    zero = FLAT * np.abs(values).max()
    residual = float(np.linalg.norm(C[mask]) / np.linalg.norm(first))
    negative, flat = int(np.sum(values < -zero)), int(np.sum(np.abs(values) <= zero))
    return Chart(U, V.mT, C[mask], A, values, vectors, mask, residual, negative, flat)


def _eigh(A: Floats) -> tuple[Floats, Floats]:
    """numpy's eigh; where its divide and conquer fails, as it can at very many equal eigenvalues, QR iteration."""
    try:
        return np.linalg.eigh(A)
    except np.linalg.LinAlgError:
        from scipy.linalg import eigh

        values, vectors = eigh(A, driver="ev")
        return values, vectors


def _completed(Q: Floats) -> Floats:
    """(K, r) orthonormal columns, with a basis of their complement behind them, (K, K)."""
    rest = np.linalg.svd(Q, full_matrices=True)[0][:, Q.shape[1] :]
    return np.concatenate([Q, rest], axis=1)


def moved_in(chart: Chart, s: Floats, move: Floats) -> Floats | None:
    """X(C) for the coordinates `move`; None where the rank would be lost."""
    r, K = len(s), len(chart.U)
    C = np.zeros((K, K))
    C[chart.mask] = move
    core = np.diag(s) + C[:r, :r]
    if np.linalg.svd(core, compute_uv=False)[-1] < 0.05 * s[-1]:
        return None
    left = chart.U[:, :r] @ core + chart.U[:, r:] @ C[r:, :r]
    right = core @ chart.Vt[:r] + C[:r, r:] @ chart.Vt[r:]
    return np.asarray(left @ np.linalg.solve(core, right))


def _step(F: Convex, at: Found, chart: Chart) -> Found | None:
    """The first of the Newton step, its half, quarter, ... that lowers F, or the residual where values no longer tell; None without one."""
    size = np.maximum(np.abs(chart.values), 1e-12 * np.abs(chart.values).max())
    along = chart.vectors.mT @ chart.gradient
    move = -chart.vectors @ (along / size)
    drop = float(chart.gradient @ move)
    near = at.residual < 1e-5
    for k in range(25):
        X = moved_in(chart, at.s, 0.5**k * move)
        if X is None:
            continue
        new = at_rank(F, X, len(at.s))
        if new.value <= at.value + 1e-4 * 0.5**k * drop or (near and k == 0 and new.value <= at.value * (1 + 1e-12)):
            return new
    return None


def _off_saddle(F: Convex, at: Found) -> Found:
    """A lower point along the lowest eigenvector; the point itself where none is found."""
    chart = chart_at(F, at)
    for k in range(20):
        reach = 0.1 * 0.5**k * at.s[-1] * chart.vectors[:, 0]
        trials = [at_rank(F, X, len(at.s)) for sign in (1, -1) if (X := moved_in(chart, at.s, sign * reach)) is not None]
        lowest = min(trials, key=lambda point: point.value, default=at)
        if lowest.value < at.value:
            return lowest
    return at
