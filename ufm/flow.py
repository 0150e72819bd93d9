"""Gradient flow by an embedded Runge-Kutta pair, and what every rule of flow shares: its clock, its field, the checks of its options."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, namespace
from ufm.coordinates import Coordinates

State = tuple[Array, ...]


class Clock(NamedTuple):
    """Time of each run (B,), and whether the rule has nothing left to do (B,) or None where that never happens."""

    time: Array
    done: Array | None


# Dormand & Prince 1980: nodes' weights, and fifth minus fourth order
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class GradientFlow:
    """dx/dt = -grad F(x), projected on the tangent cone of H >= 0, by Dormand & Prince's pair of orders 5 and 4 (1980).

    Every run has its own time and step; a step is kept where the root mean square of its error over atol + rtol |x| is at most 1, and one
    step of the loop is one trial. until: the flow time at which a run ends, met exactly. normalised: the flow of log F instead, whose time
    tau, d tau = F dt, is that of a loss that falls at a steady rate; for problems without penalties. Explicit: steps are at most about 3.3
    over the largest curvature, and the scale-free gradient norm settles near ten times rtol.
    """

    until: float = np.inf
    rtol: float = 1e-6
    atol: float = 1e-9
    normalised: bool = False

    def __post_init__(self) -> None:
        check_flow("GradientFlow", self)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        slope = field(function, x, self.normalised)
        h = first_step(x, slope, self.rtol, self.atol, self.until)
        return (namespace(x).zeros_like(h), h, slope)

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        xp = namespace(x)
        time, h, first = state
        fields = [first]
        for weights in STAGES[:-1]:
            fields.append(field(function, x + h * _combined(weights, fields), self.normalised))
        x_new = function.project(x + h * _combined(STAGES[-1], fields))
        fields.append(field(function, x_new, self.normalised))
        size = self.atol + self.rtol * xp.maximum(xp.abs(x), xp.abs(x_new))
        error = rms(h * _combined(ERROR, fields) / size)
        kept = error <= 1.0  # False where NaN
        factor = xp.where(xp.isfinite(error), xp.clip(0.9 * (error + 1e-12) ** -0.2, 0.2, 5.0), 0.2)
        time = xp.where(kept, time + h, time)
        h = xp.minimum(h * factor, xp.clip(self.until - time, 0.0, None))
        return xp.where(kept, x_new, x), (time, h, xp.where(kept, fields[-1], first))

    def clock(self, state: State, taken: int) -> Clock:
        return flow_clock(state[0], self.until)


def field(function: Coordinates, x: Array, normalised: bool) -> Array:
    """-P grad F(x), or -P grad F(x)/F(x), (B, n); P projects on the tangent cone of the bounds."""
    if normalised:
        value, slope = function.value_and_gradient(x)
        slope /= value[:, None]
    else:
        slope = function.gradient(x)
    slope = function.projected(x, slope)
    slope *= -1.0
    return slope


def first_step(x: Array, slope: Array, rtol: float, atol: float, until: float) -> Array:
    """A first step for each run, (B, 1): a hundredth of |x| over |slope| in units of the tolerance (Hairer, Norsett & Wanner 1993)."""
    xp = namespace(x)
    size = atol + rtol * xp.abs(x)
    length, speed = rms(x / size), rms(slope / size)
    usual = xp.minimum(length, speed) > 1e-5  # False at zero and at stationary points
    return xp.clip(xp.where(usual, 0.01 * length / xp.where(usual, speed, 1.0), 1e-6), None, until)


def flow_clock(time: Array, until: float) -> Clock:
    """The clock of a flow whose runs have come to `time` (B, 1)."""
    return Clock(time[:, 0], time[:, 0] >= until * (1 - 1e-15))


def rms(x: Array) -> Array:
    """The root mean square of each run, (B, n) -> (B, 1)."""
    xp = namespace(x)
    return xp.sqrt(xp.mean(x * x, axis=1, keepdims=True))


def _combined(weights: tuple[float, ...], fields: list[Array]) -> Array:
    return sum((w * k for w, k in zip(weights[1:], fields[1:], strict=False) if w), start=weights[0] * fields[0])


def check(rule: str, name: str, value: Any, low: float, high: float, reach: bool = False) -> None:
    """ValueError unless an option is a number between its limits."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not (low <= value < high or (reach and value == high)) or (name not in ("momentum", "beta1", "beta2") and value == low):
        raise ValueError(f"rules.{rule}: {name} is {value!r}, but must lie between {low:g} and {high:g}")


def check_flow(rule: str, options: Any) -> None:
    """ValueError unless the options that every flow has are in order."""
    for name in ("until", "rtol", "atol"):
        check(rule, name, getattr(options, name), 0.0, np.inf, reach=name == "until")
    if not isinstance(options.normalised, bool):
        raise ValueError(f"rules.{rule}: normalised is {options.normalised!r}, but must be True (the flow of log F) or False")
