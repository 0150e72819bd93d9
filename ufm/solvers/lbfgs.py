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
from ufm.coordinates import NEGLIGIBLE, Coordinates
from ufm.records import Stop

DECREASE, SLOPE, NOISE = 1e-4, 0.9, 1e-15  # Armijo share; largest accepted slope ratio; relative rounding of values
PROGRESS = 1e-6  # relative decrease since the last progress that counts as progress
FLOOR = 1e-11  # below this scale-free norm a run that no longer improves has met float64


@dataclass(frozen=True)
class LBFGS:
    """Options: history length, tolerance on the scale-free gradient norm, most gradient evaluations (of all or of each run), patience.

    The last line search may overrun max_steps.

    A run stalls after `patience` evaluations without progress at float64's floor, twenty times as many above it.
    """

    memory: int = 5
    tol: float = 1e-10
    max_steps: int | NDArray[np.int64] = 20_000
    patience: int = 30


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where each run ended: x (B, n), value (B,) in the units of the function, stop (B,) and gradient evaluations steps (B,)."""

    x: Array
    value: Array
    stop: tuple[Stop, ...]
    steps: NDArray[np.int64]


@dataclass(eq=False)
class _Pairs:
    """The last m pairs of every run and the newest gradient: rows s_1..s_m, y_1..y_m, p of `rows` (B, 2m + 1, n), and their products.

    sy[:, i, j] = s_i.y_j where pair j is not older than i, yy[:, i, j] = y_i.y_j; slots in `order` from oldest to newest; a pair without
    positive curvature is zero.
    """

    rows: Array
    sy: Array
    yy: Array
    order: list[int]

    @classmethod
    def empty(cls, x: Array, m: int) -> _Pairs:
        xp, B = namespace(x), x.shape[0]
        rows = xp.zeros((B, 2 * m + 1, x.shape[1]), dtype=x.dtype, device=device_of(x))
        sy, yy = (xp.zeros((B, m, m), dtype=x.dtype, device=device_of(x)) for _ in range(2))
        return cls(rows, sy, yy, [])

    def pick(self, runs: Array) -> _Pairs:
        """The given runs alone."""
        rows, sy, yy = (namespace(a).take(a, runs, axis=0) for a in (self.rows, self.sy, self.yy))
        return _Pairs(rows, sy, yy, self.order)

    def push(self, s: Array, y: Array, p: Array) -> Array:
        """Replace the oldest pair by (s, y), the gradient by p, and return the products (B, 2m + 1) of every row with p."""
        xp, m = namespace(s), self.sy.shape[1]
        y = xp.where(s == 0, 0.0, y)  # coordinates held at their bound stay out of the metric
        useless = xp.vecdot(s, y) <= 1e-14 * norm(s) * norm(y)
        if bool(xp.any(useless)):
            s, y = (xp.where(useless[:, None], 0.0, a) for a in (s, y))
        slot = len(self.order) if len(self.order) < m else self.order[0]
        self.order = [*[i for i in self.order if i != slot], slot]
        self.rows[:, slot, :], self.rows[:, m + slot, :], self.rows[:, 2 * m, :] = s, y, p
        products = self.rows @ self.rows[:, m + slot :: m - slot, :].mT  # with y and p, (B, 2m + 1, 2)
        self.sy[:, :, slot] = products[:, :m, 0]
        self.yy[:, slot, :], self.yy[:, :, slot] = products[:, m : 2 * m, 0], products[:, m : 2 * m, 0]
        return products[:, :, 1]

    def direction(self, products: Array) -> Array:
        """Minus the inverse Hessian of L-BFGS times p, in the compact form of Byrd, Nocedal & Schnabel 1994."""
        xp, m = namespace(products), self.sy.shape[1]
        at = xp.asarray(self.order, device=device_of(products))
        sy, yy = (xp.take(xp.take(a, at, axis=1), at, axis=2) for a in (self.sy, self.yy))
        D = xp.linalg.diagonal(sy)  # (B, age)
        gamma = self._scale(D, xp.linalg.diagonal(yy))[:, None]
        R = xp.triu(sy) + xp.astype(D <= 0, D.dtype)[:, :, None] * xp.eye(len(self.order), dtype=D.dtype, device=device_of(D))
        along_s, along_y = (xp.take(a, at, axis=1)[:, :, None] for a in (products[:, :m], products[:, m : 2 * m]))
        u = xp.linalg.solve(R, along_s)
        on_s = xp.linalg.solve(R.mT, D[:, :, None] * u + gamma[:, :, None] * (yy @ u - along_y))[:, :, 0]
        back = xp.asarray(np.argsort(self.order), device=device_of(products))
        weights = xp.concat([_spread(-on_s, back, m), _spread(gamma * u[:, :, 0], back, m), -gamma], axis=1)
        return (weights[:, None, :] @ self.rows)[:, 0, :]

    def _scale(self, sy: Array, yy: Array) -> Array:
        """s.y/y.y of each run's newest usable pair, 1 where there is none; (B, age) in, (B,) out."""
        xp = namespace(sy)
        gamma = xp.ones_like(sy[:, 0])
        for i in range(sy.shape[1]):
            gamma = xp.where(sy[:, i] > 0, sy[:, i] / xp.where(yy[:, i] > 0, yy[:, i], 1.0), gamma)
        return gamma


def _spread(values: Array, back: Array, m: int) -> Array:
    """Coefficients by age (B, age) -> by slot (B, m), zero for empty slots."""
    xp = namespace(values)
    empty = xp.zeros((values.shape[0], m - values.shape[1]), dtype=values.dtype, device=device_of(values))
    return xp.concat([xp.take(values, back, axis=1), empty], axis=1)


def minimise(function: Coordinates, x: Array, options: LBFGS) -> Minimum:
    """Minimise every run of `function` from x (B, n)."""
    xp = namespace(x)
    batch = x.shape[0]
    f, g = function.value_and_gradient(x)
    end_x, end_f = xp.asarray(x, copy=True), xp.asarray(f, copy=True)
    stop, budget = np.full(batch, Stop.STEPS, dtype=object), np.broadcast_to(options.max_steps, batch)
    steps = np.ones(batch, dtype=np.int64)
    runs = np.arange(batch)  # which run each row of the batch is
    used = np.ones(batch, dtype=np.int64)
    pairs = _Pairs.empty(x, options.memory)
    best, lowest, stale = np.full(batch, np.inf), np.full(batch, np.inf), np.zeros(batch, dtype=np.int64)
    p, d, tried = function.projected(x, g), None, used
    while True:
        size = norm(p)
        scale = norm(x if function.penalty is None else function.penalty * x)
        flat = to_numpy(size * size <= NEGLIGIBLE * xp.abs(f))
        relative = to_numpy(size / xp.where(scale > 0, scale, 1.0))
        value = to_numpy(f)
        better = (relative < 0.9 * best) | (value < lowest - PROGRESS * np.abs(value))
        best, lowest = np.where(better, np.minimum(relative, best), best), np.where(better, value, lowest)
        stale = np.where(better, 0, stale + tried)
        flags = {
            Stop.GRADIENT: to_numpy(size <= options.tol * scale),
            Stop.DIVERGED: ~np.isfinite(value),
            Stop.STALLED: flat | (stale > np.where(relative < FLOOR, options.patience, 20 * options.patience)),
            Stop.STEPS: used >= budget[runs],
        }
        leaving = np.zeros(len(runs), dtype=bool)
        for reason, flag in flags.items():
            stop[runs[flag & ~leaving]] = reason
            leaving |= flag
        if leaving.any():
            rows, at = indices(np.flatnonzero(leaving), x), mask_of(runs[leaving], batch, x)
            end_x[at], end_f[at] = xp.take(x, rows, axis=0), xp.take(f, rows, axis=0)
            steps[runs[leaving]] = used[leaving]
            if leaving.all():
                return Minimum(end_x, end_f, tuple(stop), steps)
            keep = np.flatnonzero(~leaving)
            at = indices(keep, x)
            function, pairs = function.pick(at), pairs.pick(at)
            x, f, g, p = (xp.take(a, at, axis=0) for a in (x, f, g, p))
            d = None if d is None else xp.take(d, at, axis=0)
            runs, used, best, lowest, stale = (a[keep] for a in (runs, used, best, lowest, stale))
        d = _first_step(x, p) if d is None else _downhill(x, g, p, d)
        x_new, f_new, g_new, tried = search(function, x, f, g, d)
        used += tried
        p = function.projected(x_new, g_new)
        d = pairs.direction(pairs.push(x_new - x, g_new - g, p))
        x, f, g = x_new, f_new, g_new


def _downhill(x: Array, g: Array, p: Array, d: Array) -> Array:
    """d on the coordinates that are not held; the first step again where that is not a descent direction."""
    xp = namespace(x)
    d = xp.where((p == 0) & (g > 0), 0.0, d)
    uphill = xp.vecdot(d, p) >= 0
    return xp.where(uphill[:, None], _first_step(x, p), d) if bool(xp.any(uphill)) else d


def _first_step(x: Array, p: Array) -> Array:
    """Steepest descent by a tenth of ||x||, at most the gradient's own length."""
    xp = namespace(x)
    size, reach = norm(p), 0.1 * norm(x)
    scale = xp.where((size > reach) & (reach > 0), reach / xp.where(size > 0, size, 1.0), xp.ones_like(size))
    return -scale[:, None] * p


def search(function: Coordinates, x: Array, f: Array, g: Array, d: Array) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """One accepted step per run along the projected direction; the point itself where none is found in 30 trials."""
    xp = namespace(x)
    x_new = function.project(x + d)
    f_new, g_new = function.value_and_gradient(x_new)
    evaluations = np.ones(x.shape[0], dtype=np.int64)
    move = x_new - x
    slope = xp.vecdot(g, move)
    pending = np.flatnonzero(~to_numpy(_accepted(f, f_new, slope, xp.vecdot(g_new, move))))
    t = np.ones(len(pending))
    for _ in range(30):
        if not len(pending):
            break
        at = indices(pending, x)
        part = function.pick(at)
        X, F, G, D = (xp.take(a, at, axis=0) for a in (x, f, g, d))
        tried, drop = (to_numpy(xp.take(a, at, axis=0)) for a in (f_new, slope))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            guess = -0.5 * drop / (tried - to_numpy(F) - drop)
        t = t * np.where(np.isfinite(guess), np.clip(guess, 0.1, 0.5), 0.1)
        X_new = part.project(X + xp.asarray(t, dtype=x.dtype, device=device_of(x))[:, None] * D)
        F_new, G_new = part.value_and_gradient(X_new)
        move = X_new - X
        drop_new = xp.vecdot(G, move)
        rows = mask_of(pending, x.shape[0], x)
        x_new[rows], f_new[rows], g_new[rows], slope[rows] = X_new, F_new, G_new, drop_new
        evaluations[pending] += 1
        failed = ~to_numpy(_accepted(F, F_new, drop_new, xp.vecdot(G_new, move)))
        pending, t = pending[failed], t[failed]
    if len(pending):
        at, rows = indices(pending, x), mask_of(pending, x.shape[0], x)
        x_new[rows], f_new[rows], g_new[rows] = (xp.take(a, at, axis=0) for a in (x, f, g))
    return x_new, f_new, g_new, evaluations


def _accepted(f: Array, f_new: Array, slope: Array, slope_new: Array) -> Array:
    xp = namespace(f)
    decreases = f_new <= f + DECREASE * xp.clip(slope, None, 0.0)
    flat = (f_new <= f + NOISE * xp.abs(f)) & (slope_new <= -SLOPE * slope)
    return decreases | flat


def indices(rows: NDArray[np.int64], x: Array) -> Array:
    """Row numbers as an integer array beside x."""
    return namespace(x).asarray(rows, device=device_of(x))


def mask_of(rows: NDArray[np.int64], batch: int, x: Array) -> Array:
    """(batch,) bool, true at `rows`: the one kind of index the array standard lets one assign to."""
    mask = np.zeros(batch, dtype=bool)
    mask[rows] = True
    return namespace(x).asarray(mask, device=device_of(x))
