"""The critical point near a point: where a trajectory lingers, it passes a saddle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ufm.arrays import norm
from ufm.coordinates import Coordinates, balanced
from ufm.landscape.point import Floats
from ufm.problem import Problem
from ufm.theory import deep

LIVE = 1e-2  # singular values above this share of the largest count
NEAR = 0.25  # share of a point's norm that Newton's method may move: beyond that the critical point is not the one passed


@dataclass(frozen=True, eq=False)
class Critical:
    """A critical point: value, rank, index (NaN where Newton's method found none near), scale-free gradient, how far it was, M."""

    value: float
    rank: int
    index: float
    gradient: float
    moved: float
    M: Floats


def critical_near(problem: Problem, M: Floats) -> Critical:
    """The critical point that Newton's method, damped as Levenberg and Marquardt's, finds from balanced factors of the rank of M.

    M (K, K): logits of the class means of a deep linear chain (one cell, balanced classes, one lambda for all weights); minima and saddles
    alike. moved: its distance over the norm of M cut to that rank. At an inner width of the rank the Hessian has all its negative
    eigenvalues, so they are the index at any width (L >= 2).
    """
    U, s, Vt = np.linalg.svd(M)
    rank = int(np.sum(s > LIVE * s[0]))
    n, lam = float(problem.counts[0, 0]), float(problem.lam_h[0])
    frame = balanced(replace(problem, width=rank))
    start = frame.from_factors([f[None] for f in deep.balanced_factors(U[:, :rank] * s[:rank] @ Vt[:rank], n, lam, problem.lam_w[0], rank)])
    x, curvature = _newton(frame, start)
    size = float(frame.scale_free_norm(x)[0])
    before, after = _logits(frame, start), _logits(frame, x)
    moved = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    index = float(np.sum(curvature < -1e-9 * np.abs(curvature).max())) if size <= 1e-9 and moved <= NEAR else np.nan
    return Critical(float(frame.value(x)[0] * frame.unit[0]), rank, index, size, moved, after)


def _newton(frame: Coordinates, x: Floats) -> tuple[Floats, Floats]:
    """Where Newton's method on the gradient goes from x (1, n), and the eigenvalues of the Hessian there, (n,)."""
    g, damping = frame.gradient(x), 1.0
    wide, eye = frame.pick(np.zeros(x.shape[1], dtype=int)), np.eye(x.shape[1])
    for _ in range(40):
        H = wide.hessian_product(np.repeat(x, x.shape[1], axis=0), eye)
        mu, V = np.linalg.eigh((H + H.T) / 2)
        if frame.scale_free_norm(x)[0] <= 1e-13:
            break
        weights = mu / (mu**2 + damping * float(norm(g)[0]) + 1e-14 * mu[-1] ** 2)
        trial = x - (V @ (weights * (V.T @ g[0])))[None]
        g_trial = frame.gradient(trial)
        better = norm(g_trial)[0] < norm(g)[0]
        damping = damping / 8 if better else damping * 16
        x, g = (trial, g_trial) if better else (x, g)
        if damping > 1e12:
            break
    return x, mu


def _logits(frame: Coordinates, x: Floats) -> Floats:
    return np.asarray(frame.objective.logits(frame.unpack(x))[0])
