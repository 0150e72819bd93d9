"""Batched L-BFGS with bounds x_i >= 0: one loop for all runs; a run leaves the batch when it is done.

Two-metric projection (Bertsekas 1982): coordinates at their bound whose gradient points outwards are held, the others move along the
L-BFGS direction and are projected. A step is accepted on sufficient decrease, or, once values can no longer tell steps apart, on the
slope (the approximate Wolfe condition of Hager & Zhang 2005), which resolves minimisers to the accuracy of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, device_of, namespace, norm, to_numpy
from ufm.objective import Balanced
from ufm.records import Stop

DECREASE, SLOPE, NOISE = 1e-4, 0.9, 1e-15  # Armijo share; largest accepted slope ratio; relative rounding of values
FLOOR = 1e-11  # below this scale-free norm a run that no longer improves has met float64
NEGLIGIBLE = 1e-28  # squared gradient over value: nothing left to gain in float64


@dataclass(frozen=True)
class LBFGS:
    """Options: history length, tolerance on the scale-free gradient norm, largest number of gradient evaluations, patience in stalls."""

    memory: int = 8
    tol: float = 1e-10
    max_steps: int = 20_000
    patience: int = 30


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where each run ended: x (B, n), value (B,) in the units of the function, stop (B,) and gradient evaluations steps (B,)."""

    x: Array
    value: Array
    stop: tuple[Stop, ...]
    steps: NDArray[np.int64]


def minimise(function: Balanced, x: Array, options: LBFGS) -> Minimum:
    """Minimise every run of `function` from x (B, n)."""
    xp = namespace(x)
    batch = x.shape[0]
    f, g = function.value_and_gradient(x)
    end_x, end_f = xp.asarray(x, copy=True), xp.asarray(f, copy=True)
    stop = np.full(batch, Stop.STEPS, dtype=object)
    steps = np.ones(batch, dtype=np.int64)
    runs = np.arange(batch)  # which run each row of the batch is
    used = np.ones(batch, dtype=np.int64)
    pairs: list[tuple[Array, Array, Array]] = []  # (s, y, 1/(s.y) or 0), oldest first
    best, stale = np.full(batch, np.inf), np.zeros(batch, dtype=np.int64)
    while True:
        p = function.projected(x, g)
        size = norm(p)
        scale = norm(x if function.penalty is None else function.penalty * x)
        done = (size <= options.tol * scale) | (size * size <= NEGLIGIBLE * xp.abs(f))
        relative = to_numpy(size / xp.where(scale > 0, scale, 1.0))
        stale = np.where(relative < 0.9 * best, 0, stale + 1)
        best = np.minimum(best, relative)
        flags = {
            Stop.GRADIENT: to_numpy(done),
            Stop.DIVERGED: ~np.isfinite(to_numpy(f)),
            Stop.STALLED: stale > np.where(relative < FLOOR, options.patience, 10 * options.patience),
            Stop.STEPS: used >= options.max_steps,
        }
        leaving = np.zeros(len(runs), dtype=bool)
        for reason, flag in flags.items():
            stop[runs[flag & ~leaving]] = reason
            leaving |= flag
        if leaving.any():
            rows = _indices(np.flatnonzero(leaving), x)
            at = _indices(runs[leaving], x)
            end_x[at, ...], end_f[at] = xp.take(x, rows, axis=0), xp.take(f, rows, axis=0)
            steps[runs[leaving]] = used[leaving]
            if leaving.all():
                return Minimum(end_x, end_f, tuple(stop), steps)
            keep = np.flatnonzero(~leaving)
            at = _indices(keep, x)
            function = function.pick(at)
            x, f, g, p = (xp.take(a, at, axis=0) for a in (x, f, g, p))
            pairs = [tuple(xp.take(a, at, axis=0) for a in pair) for pair in pairs]  # type: ignore[misc]
            runs, used, best, stale = runs[keep], used[keep], best[keep], stale[keep]
        d = _direction(function, x, g, p, pairs)
        x_new, f_new, g_new, evaluations = _search(function, x, f, g, d)
        used += evaluations
        s, y = x_new - x, g_new - g
        pairs.append(_pair(s, y))
        pairs = pairs[-options.memory :]
        x, f, g = x_new, f_new, g_new


def _pair(s: Array, y: Array) -> tuple[Array, Array, Array]:
    """(s, y, 1/(s.y)); 0 in place of 1/(s.y) where the curvature along s is not positive: such a pair is skipped."""
    xp = namespace(s)
    y = xp.where(s == 0, 0.0, y)  # coordinates held at their bound stay out of the metric
    sy = xp.vecdot(s, y)
    good = sy > 1e-14 * norm(s) * norm(y)
    return s, y, xp.where(good, 1.0 / xp.where(good, sy, 1.0), 0.0)


def _direction(function: Balanced, x: Array, g: Array, p: Array, pairs: list[tuple[Array, Array, Array]]) -> Array:
    """Minus the L-BFGS inverse Hessian times the projected gradient, on the coordinates that are not held."""
    xp = namespace(x)
    q, weights = xp.asarray(p, copy=True), []
    for s, y, inverse in reversed(pairs):
        weight = (inverse * xp.vecdot(s, q))[:, None]
        weights.append(weight)
        q -= weight * y
    q *= _first_scale(x, p, pairs)
    for (s, y, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q += (weight - (inverse * xp.vecdot(y, q))[:, None]) * s
    d = xp.where((p == 0) & (g > 0), 0.0, -q)
    uphill = xp.vecdot(d, p) >= 0
    return xp.where(uphill[:, None], -p * _first_scale(x, p, []), d)


def _first_scale(x: Array, p: Array, pairs: list[tuple[Array, Array, Array]]) -> Array:
    """s.y/y.y of the newest usable pair; before there is one, a step of a tenth of ||x||, at most the gradient's own length."""
    xp = namespace(x)
    size, reach = norm(p), 0.1 * norm(x)
    scale = xp.where(size > 0, xp.minimum(reach / xp.where(size > 0, size, 1.0), xp.ones_like(size)), 1.0)
    scale = xp.where(reach > 0, scale, xp.ones_like(size))
    for _, y, inverse in pairs[-3:]:
        usable = inverse > 0
        scale = xp.where(usable, 1.0 / xp.where(usable, inverse * xp.vecdot(y, y), 1.0), scale)
    return scale[:, None]


def _search(function: Balanced, x: Array, f: Array, g: Array, d: Array) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """One accepted step per run along the projected direction; the point itself where none is found in 30 trials."""
    xp = namespace(x)
    x_new = _project(function, x + d)
    f_new, g_new = function.value_and_gradient(x_new)
    evaluations = np.ones(x.shape[0], dtype=np.int64)
    slope = xp.vecdot(g, x_new - x)
    pending = np.flatnonzero(~to_numpy(_accepted(f, f_new, slope, xp.vecdot(g_new, x_new - x))))
    t = np.ones(len(pending))
    for _ in range(30):
        if not len(pending):
            break
        at = _indices(pending, x)
        part = function.pick(at)
        X, F, G, D = (xp.take(a, at, axis=0) for a in (x, f, g, d))
        tried, drop = (to_numpy(xp.take(a, at, axis=0)) for a in (f_new, slope))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            guess = -0.5 * drop / (tried - to_numpy(F) - drop)
        t = t * np.where(np.isfinite(guess), np.clip(guess, 0.1, 0.5), 0.1)
        X_new = _project(part, X + xp.asarray(t, dtype=x.dtype, device=device_of(x))[:, None] * D)
        F_new, G_new = part.value_and_gradient(X_new)
        move = X_new - X
        drop_new = xp.vecdot(G, move)
        x_new[at, ...], f_new[at], g_new[at, ...], slope[at] = X_new, F_new, G_new, drop_new
        evaluations[pending] += 1
        failed = ~to_numpy(_accepted(F, F_new, drop_new, xp.vecdot(G_new, move)))
        pending, t = pending[failed], t[failed]
    if len(pending):
        at = _indices(pending, x)
        x_new[at, ...], f_new[at], g_new[at, ...] = (xp.take(a, at, axis=0) for a in (x, f, g))
    return x_new, f_new, g_new, evaluations


def _accepted(f: Array, f_new: Array, slope: Array, slope_new: Array) -> Array:
    xp = namespace(f)
    decreases = f_new <= f + DECREASE * slope
    flat = (f_new <= f + NOISE * xp.abs(f)) & (slope_new <= -SLOPE * slope)
    return decreases | flat


def _project(function: Balanced, x: Array) -> Array:
    return namespace(x).where(function.bounded & (x < 0), 0.0, x)


def _indices(rows: NDArray[np.int64], x: Array) -> Array:
    return namespace(x).asarray(rows, device=device_of(x))
