"""Gradient flow through stiffness: explicit Runge-Kutta-Chebyshev steps of second order, each run at its own stage of its own step.

A step of s stages is stable for h sigma <= 0.65 (s^2 - 1), sigma the largest curvature, so a time T costs about T (1.5 sigma/h)^{1/2}
gradients, where other explicit steps take about T sigma of them (Verwer, Hundsdorfer & Sommeijer 1990; Sommeijer, Shampine & Verwer 1998).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, device_of, like, namespace, norm, to_numpy
from ufm.coordinates import Coordinates
from ufm.flow import Clock, State, check_flow, field, first_step, flow_clock, rms

DAMPING = 2 / 13
BETA = 2 / 3 * (1 - 2 / 15 * DAMPING)  # stable for h sigma <= BETA (s^2 - 1)
MOST_STAGES = 200
SAFETY = 1.2  # over the estimate of sigma, which comes from below
PROBES, AGREED, RENEWED = 30, 0.02, 10  # most power iterations, the relative change that ends them, kept steps before the next
REACH = 1e-3  # length of a probe over that of x: long enough not to hang on the kinks of a ReLU chain


class _Run(NamedTuple):
    """Where each run is: numbers (B, 1) and vectors (B, n).

    stage j >= 1: the point evaluated next is the j-th of `stages`; j <= 0: it is a probe of sigma, and at most -j more follow. longest:
    the cap of h; age: steps kept since the last probe; slope: the field at x; move, before: this stage and the last, less x; along:
    towards the largest curvature.
    """

    time: Array
    h: Array
    longest: Array
    stage: Array
    stages: Array
    sigma: Array
    age: Array
    slope: Array
    move: Array
    before: Array
    along: Array


@dataclass(frozen=True)
class StabilisedFlow:
    """dx/dt = -grad F(x) by Runge-Kutta-Chebyshev steps of order 2, whose cost grows like the square root of the stiffness.

    One step of the loop is one gradient of every run: a stage, or a probe of the largest curvature (power iteration on differences of
    gradients). x is the last point kept. A step is kept where the root mean square of its error over atol + rtol |x| is at most 1, and is
    at most one over the smallest penalty, the slowest rate of the flow, which ends at stationary points to any accuracy. until and
    normalised as in GradientFlow. On ReLU chains flows come to slide along kinks, where the steps of every flow shrink: use descent there.
    Raises ValueError on bounded features, H >= 0: Chebyshev stages do not stop at bounds.
    """

    until: float = np.inf
    rtol: float = 1e-4
    atol: float = 1e-7
    normalised: bool = False

    def __post_init__(self) -> None:
        check_flow("StabilisedFlow", self)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        if function.bounded:
            raise ValueError("rules.StabilisedFlow: features='relu' bounds H >= 0, where its stages cannot stop; use rules.GradientFlow")
        xp = namespace(x)
        slope = field(function, x, self.normalised)
        h = first_step(x, slope, self.rtol, self.atol, self.until)
        zero, none = xp.zeros_like(h), xp.zeros_like(x)
        along = none + like(np.cos(np.arange(x.shape[1]) ** 2.0), x)  # in no symmetric subspace
        longest = zero + np.inf if self.normalised else _slowest(function, x)
        return _Run(zero, h, longest, zero - PROBES, zero + 2, zero, zero, slope, _probe(x, along), none, along)

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        xp, run = namespace(x), _Run(*state)
        slope = field(function, x + run.move, self.normalised)
        probed, ended = run.stage <= 0, run.stage >= run.stages
        error = _at(ended, self._error, x, run.h, run.slope, slope, run.move)
        found = _at(probed, _curvature, run.slope, slope, run.move)
        kept = ended & (error <= 1.0)  # False where NaN
        following = self._decided(run, probed, ended, kept, error, found)
        mu, nu, own, first = _weights(run.stage, run.stages)
        begin, turned = _first_weight(following.stages) * following.h, probed | ended

        move, before, along, base = run.move, run.before, run.along, run.slope  # overwritten from here on: new arrays cost as much as sums
        _put(probed & (found > 0), along, lambda at: at(slope) - at(base))
        _put(kept, x, lambda at: at(x) + at(move))
        _put(kept, base, lambda at: at(slope))
        _put(turned & ~kept, slope, lambda at: at(base))
        for vector in (move, before):
            _put(ended & ~xp.isfinite(error), vector, lambda at: 0.0 * at(base))
        before *= xp.where(turned, 0.0, nu)
        before += xp.where(turned, 0.0, mu) * move
        before += xp.where(turned, begin, own * run.h) * slope
        before += xp.where(turned, 0.0, first * run.h) * base
        _put(following.stage <= 0, before, lambda at: _probe(at(x), at(along)))
        return x, following._replace(slope=base, move=before, before=move, along=along)

    def _error(self, x: Array, h: Array, slope: Array, slope_new: Array, move: Array) -> Array:
        """The error of a step over its tolerance, (B, 1)."""
        xp = namespace(x)
        size = self.atol + self.rtol * xp.maximum(xp.abs(x), xp.abs(x + move))
        return rms((0.4 * h * (slope + slope_new) - 0.8 * move) / size)

    def _decided(self, run: _Run, probed: Array, ended: Array, kept: Array, error: Array, found: Array) -> _Run:
        """The numbers of what follows: the next stage, the first one of a step (stage = 1), or a probe (stage <= 0)."""
        xp = namespace(error)
        time = xp.where(kept, run.time + run.h, run.time)
        age = xp.where(probed, 0.0, run.age + xp.astype(kept, error.dtype))
        settled = (xp.abs(found - run.sigma) <= AGREED * found) | (run.stage == 0)
        probing = (probed & ~settled) | (ended & (~kept | (age >= RENEWED)))
        sigma = xp.where(probed, found, run.sigma)

        bound = xp.clip(SAFETY * sigma, 1e-300, None)
        factor = xp.where(xp.isfinite(error), xp.clip(0.8 * (error + 1e-12) ** (-1 / 3), 0.2, 3.0), 0.2)
        h = xp.minimum(xp.where(ended, run.h * factor, run.h), xp.minimum(run.longest, BETA * (MOST_STAGES**2 - 1) / bound))
        h = xp.minimum(h, xp.clip(self.until - time, 0.0, None))
        stages = xp.clip(xp.ceil(xp.sqrt(1 + h * bound / BETA)), 2.0, MOST_STAGES)
        turned = probed | ended
        stage = xp.where(probing, xp.where(probed, run.stage + 1, -float(PROBES)), xp.where(turned, 1.0, run.stage + 1))
        h, stages = xp.where(turned, h, run.h), xp.where(turned, stages, run.stages)
        return run._replace(time=time, h=h, stage=stage, stages=stages, sigma=sigma, age=age)

    def clock(self, state: State, taken: int) -> Clock:
        return flow_clock(state[0], self.until)


def _slowest(function: Coordinates, x: Array) -> Array:
    """One over the smallest positive penalty of each run, infinity where there is none, (B, 1)."""
    xp = namespace(x)
    penalty = xp.ones_like(x) if function.penalty is None else function.penalty
    return xp.max(xp.where(penalty > 0, 1.0 / xp.where(penalty > 0, penalty, 1.0), np.inf), axis=1, keepdims=True)


def _probe(x: Array, along: Array) -> Array:
    """A short move along a direction, (B, n)."""
    return REACH * ((norm(x) + REACH) / norm(along))[:, None] * along


def _curvature(slope: Array, slope_new: Array, move: Array) -> Array:
    """The size of the Hessian along a move, (B, 1)."""
    return (norm(slope_new - slope) / norm(move))[:, None]


def _at(mask: Array, function: Callable[..., Array], *arrays: Array) -> Array:
    """A function of the runs where the mask (B, 1) is true, infinity elsewhere, (B, 1)."""
    out = namespace(*arrays).full_like(mask, np.inf, dtype=arrays[0].dtype)
    _put(mask, out, lambda at: function(*map(at, arrays)))
    return out


def _put(mask: Array, out: Array, function: Callable[[Callable[[Array], Array]], Array]) -> None:
    """Overwrite the runs of `out` where the mask (B, 1) is true by a function of them; `at` takes these runs of an array."""
    rows = np.flatnonzero(to_numpy(mask))
    if len(rows):
        xp = namespace(out)
        index = xp.asarray(rows, device=device_of(out))
        out[mask[:, 0]] = function(lambda array: xp.take(array, index, axis=0))


def _weights(stage: Array, stages: Array) -> tuple[Array, Array, Array, Array]:
    """mu, nu, mu~, gamma~ of the stage after `stage`, (B, 1) each, for stages less x (so nu_2 = 0); `stage` is taken as 1 where it is less.

    b_j = T_j''(w)/T_j'(w)^2, b_1 = 1/w, b_0 = b_2, a_j = 1 - b_j T_j(w), w = 1 + damping/s^2, v = T_s'(w)/T_s''(w):
    mu_j = 2 b_j w/b_{j-1}, nu_j = -b_j/b_{j-2}, mu~_j = 2 b_j v/b_{j-1}, gamma~_j = -a_{j-1} mu~_j.
    """
    xp = namespace(stage)
    j = xp.clip(stage + 1, 2.0, None)
    angle = _angle(stages)
    T, first, second = _chebyshev(xp.concat([j, xp.clip(j - 1, 2.0, None), xp.clip(j - 2, 2.0, None), stages], axis=1), angle)
    w, b = xp.cosh(angle), second / first**2
    one, two = xp.where(j == 2, 1 / w, b[:, 1:2]), xp.where(j == 3, 1 / w, b[:, 2:3])
    v = first[:, 3:] / second[:, 3:]
    a = xp.where(j == 2, 0.0, 1 - one * T[:, 1:2])
    own = 2 * b[:, :1] * v / one
    return 2 * b[:, :1] * w / one, xp.where(j == 2, 0.0, -b[:, :1] / two), own, -a * own


def _first_weight(stages: Array) -> Array:
    """mu~_1 = b_1 v."""
    angle = _angle(stages)
    _, first, second = _chebyshev(stages, angle)
    return first / second / namespace(stages).cosh(angle)


def _angle(stages: Array) -> Array:
    """arcosh(1 + damping/s^2), without cancellation."""
    return 2 * namespace(stages).asinh((DAMPING / 2) ** 0.5 / stages)


def _chebyshev(j: Array, angle: Array) -> tuple[Array, Array, Array]:
    """T_j, T_j', T_j'' at w = cosh(angle)."""
    xp = namespace(j)
    w, v = xp.cosh(angle), xp.sinh(angle)
    T, first = xp.cosh(j * angle), j * xp.sinh(j * angle) / v
    return T, first, (j * j * T - w * first) / (v * v)
