"""Proximal references for L = 1: the convex form of the problem in X = Z D^{1/2}, one run at a time.

    min_{X, b}  sum_k (n_k/N) loss(x_k/sqrt(n_k) + b, k) + (lam_b/2)||b||^2 + sqrt(lam_w lam_h) R(X)

R is the nuclear norm without ReLU: exact (Hong & Ling 2023). With ReLU R(X) = sum_k ||x_k||, the group lasso, whose optimum is that of the
ReLU problem exactly where the dual slopes of different classes do not attract (the separable case; the certificate tells).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.certificate import dual_bound, relative_gap
from ufm.coordinates import Coordinates, balanced
from ufm.losses import ConvexLoss
from ufm.problem import Problem
from ufm.records import Stop
from ufm.solvers.outcome import Outcome

Floats = NDArray[np.float64]

CHECK = 20  # iterations between two looks at the gap


def convex(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    """Accelerated proximal gradient with restarts (O'Donoghue & Candès 2015) from the logits of x (B, n); numpy on the CPU only."""
    if not has_convex_form(rows).all():
        raise ValueError(
            "solve: method='convex' needs depth=1, features 'free' or 'relu', columns='means', a convex loss, lam_w > 0 and lam_h > 0; "
            "use method='robust'"
        )
    if device != "numpy":
        raise ValueError(f"solve: method='convex' is a reference on device 'numpy' only, not {device!r}; use method='robust'")
    ends = [proximal(rows.cell(i), x[i : i + 1], tol, max_steps) for i in range(len(x))]
    rank = max(end.rank for end in ends)
    if rank > rows.width:
        raise ValueError(f"solve: method='convex' found rank {rank}, but width is {rows.width}; use a width of at least {rank}")
    steps = np.array([end.steps for end in ends])
    return Outcome(np.concatenate([end.x for end in ends]), tuple(end.stop for end in ends), steps, np.ones_like(steps))


def has_convex_form(rows: Problem) -> NDArray[np.bool_]:
    """Where the proximal references apply, (B,)."""
    shape = rows.depth == 1 and rows.features != "relu_of_free" and rows.columns == "means" and isinstance(rows.loss, ConvexLoss)
    return np.asarray(shape & np.all(rows.lam_w > 0, axis=1) & (rows.lam_h > 0))


class Proximal(NamedTuple):
    """x (1, n) where one run ended, in as many coordinates as there are; rank of its logits; why it stopped; gradient evaluations."""

    x: Floats
    rank: int
    stop: Stop
    steps: int


class _Point(NamedTuple):
    X: Floats  # (K, K)
    b: Floats  # (K, 1), in balanced units; zeros without bias


def proximal(cell: Problem, x: Floats, tol: float, max_steps: int) -> Proximal:
    """One run (x (1, n), one cell), to the relative gap tol or until the proximal step stands still."""
    frame = balanced(cell)
    shrink = _singular_values if cell.features == "free" else _columns
    parts = frame.unpack(x)
    point = _Point((parts[1] @ parts[0])[0], parts[2][0] if cell.lam_b is not None else np.zeros((cell.classes, 1)))
    previous, momentum, L = point, 1.0, 1.0
    heavy = 1.0 if cell.lam_b is None else float(frame.scales[-1][0, 0, 0] ** 2 * cell.samples[0])  # curvature of b over that of X
    stop, step = Stop.STEPS, 0
    while step < max_steps:
        next_momentum = 0.5 * (1 + np.sqrt(1 + 4 * momentum**2))
        ahead = _Point(*(p + (momentum - 1) / next_momentum * (p - q) for p, q in zip(point, previous, strict=True)))
        slope = _slope(frame, ahead)
        while True:
            new = _Point(shrink(ahead.X - slope.X / L, 1 / L), ahead.b - slope.b / (heavy * L))
            move = _Point(*(p - q for p, q in zip(new, ahead, strict=True)))
            step += 1
            bend = sum(float(np.sum((s - t) * m)) for s, t, m in zip(_slope(frame, new), slope, move, strict=True))
            length = sum(h * float(np.sum(m * m)) for m, h in zip(move, (1.0, heavy), strict=True))
            if bend <= 1.001 * L * length or step >= max_steps:
                break
            L = max(2 * L, bend / length)
        uphill = sum(h * float(np.sum(m * (p - q))) for m, p, q, h in zip(move, new, point, (1.0, heavy), strict=True)) < 0
        previous, point = point, new
        momentum, L = (1.0 if uphill else next_momentum), L * 0.99
        still = L * float(np.linalg.norm(move.X)) <= 1e-3 * tol * float(np.linalg.norm(slope.X))
        if (still or step % CHECK < 2) and _gap(cell, frame, point) <= tol:
            stop = Stop.GAP
            break
        if still:
            stop = Stop.GRADIENT
            break
    return Proximal(*_factored(cell, frame, point), stop, step)


def _slope(frame: Coordinates, point: _Point) -> _Point:
    """Gradient of the smooth part of F/unit: the loss of the chain with features I and weights X, and the bias's penalty."""
    bias = frame.objective.chain.bias
    slopes = frame.objective.loss_part([np.eye(len(point.X))[None], point.X[None], *([point.b[None]] if bias else [])])[1]
    pull = (frame.objective.penalties[-1] * point.b)[0] if bias else 0.0
    return _Point(slopes[1][0], slopes[2][0] + pull if bias else np.zeros_like(point.b))


def _singular_values(X: Floats, by: float) -> Floats:
    """prox of the nuclear norm: singular values lowered by `by`, at least 0."""
    U, s, Vt = np.linalg.svd(X)
    return np.asarray((U * np.maximum(s - by, 0.0)) @ Vt)


def _columns(X: Floats, by: float) -> Floats:
    """prox of sum_k ||x_k||: columns shortened by `by`, at least to 0."""
    size = np.linalg.norm(X, axis=0)
    return np.asarray(X * np.maximum(1 - by / np.where(size > 0, size, 1.0), 0.0))


def _gap(cell: Problem, frame: Coordinates, point: _Point) -> float:
    x, _ = _factored(cell, frame, point)
    return float(relative_gap(frame.value(x) * frame.unit, dual_bound(cell, frame.to_factors(x)).lower)[0])


def _factored(cell: Problem, frame: Coordinates, point: _Point) -> tuple[Floats, int]:
    """(x, rank): balanced factors with W H = Z along the singular vectors, or with ReLU one private coordinate per live class.

    Where the rank exceeds the width only the strongest directions fit.
    """
    if cell.features == "free":
        U, s, Vt = np.linalg.svd(point.X)
    else:
        s = np.linalg.norm(point.X, axis=0)
        U, Vt = point.X / np.where(s > 0, s, 1.0), np.eye(cell.classes)
    rank = int(np.sum(s > 1e-14 * s.max(initial=0.0)))
    live = np.sort(np.argsort(-s)[: min(rank, cell.width)])
    bias = [] if cell.lam_b is None else [point.b[None]]
    return np.asarray(frame.aligned(U[None, :, live], s[None, live], Vt[None, live], bias)), rank
