"""Rules of descent: options only, one explicit step each; gradient flow by an embedded Runge-Kutta pair.

x is a batch (B, n) in weighted coordinates H' = H diag(m)^{1/2}, where a step on class means is the step on all samples
(`ufm.coordinates`); P is the projection on H >= 0, the identity for other features. A rule is a frozen dataclass with three methods:
`start` makes the state (a tuple of arrays, runs first), `advance` takes x and state one step on, `clock` reads the time. Adding one is
adding a class and a line in TABLE.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, like, namespace
from ufm.coordinates import Coordinates

State = tuple[Array, ...]


class Clock(NamedTuple):
    """Time of each run (B,), and whether the rule has nothing left to do (B,) or None where that never happens."""

    time: Array
    done: Array | None


class Rule(Protocol):
    """What `simulate` needs of a rule; `cells` (B,) is the cell of each run, for options given per cell."""

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State: ...

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]: ...

    def clock(self, state: State, taken: int) -> Clock: ...


@dataclass(frozen=True)
class GradientDescent:
    """x_{t+1} = P(x_t - step grad F(x_t) + momentum (x_t - x_{t-1})), Polyak's heavy ball (Polyak 1964); time is step * t.

    step: scalar, or (G,) per cell; momentum in [0, 1). Without bounds this is SGD with momentum and weight decay on the full batch.
    """

    step: Any
    momentum: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", _steps("GradientDescent", self.step))
        _check("GradientDescent", "momentum", self.momentum, 0.0, 1.0)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        return (_per_run(self.step, cells, x), x)

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        eta, previous = state
        new = function.gradient(x)  # in place from here on: new arrays cost as much as the sums
        new *= -eta
        new += x
        if self.momentum:
            move = x - previous
            move *= self.momentum
            new += move
        return function.project(new), (eta, x)

    def clock(self, state: State, taken: int) -> Clock:
        return Clock(state[0][:, 0] * taken, None)


@dataclass(frozen=True)
class Adam:
    """m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, x <- P(x - step (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + epsilon)) (Kingma & Ba 2015).

    g is the gradient of F, penalties included. On class means this is Adam on H', another run than Adam on the samples: take
    columns="samples" for that. Time is step * t.
    """

    step: Any = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", _steps("Adam", self.step))
        _check("Adam", "beta1", self.beta1, 0.0, 1.0)
        _check("Adam", "beta2", self.beta2, 0.0, 1.0)
        _check("Adam", "epsilon", self.epsilon, 0.0, np.inf)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        xp = namespace(x)
        eta = _per_run(self.step, cells, x)
        return (eta, xp.zeros_like(x), xp.zeros_like(x), xp.zeros_like(eta))

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        xp = namespace(x)
        eta, m, v, t = state
        g, t = function.gradient(x), t + 1.0
        m, v = self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * g * g
        rate = eta / (1 - self.beta1**t)
        return function.project(x - rate * m / (xp.sqrt(v / (1 - self.beta2**t)) + self.epsilon)), (eta, m, v, t)

    def clock(self, state: State, taken: int) -> Clock:
        return Clock(state[0][:, 0] * taken, None)


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
    step of the loop is one trial. until: the flow time at which a run ends, met exactly. Explicit: steps are at most about 3.3 over the
    largest curvature, and the scale-free gradient norm settles near ten times rtol.
    """

    until: float = np.inf
    rtol: float = 1e-6
    atol: float = 1e-9

    def __post_init__(self) -> None:
        for name in ("until", "rtol", "atol"):
            _check("GradientFlow", name, getattr(self, name), 0.0, np.inf, reach=name == "until")

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        xp = namespace(x)
        field = self._field(function, x)
        size = self.atol + self.rtol * xp.abs(x)
        length, speed = _rms(x / size), _rms(field / size)
        usual = xp.minimum(length, speed) > 1e-5  # False at zero and at stationary points (Hairer, Norsett & Wanner 1993, II.4)
        h = xp.where(usual, 0.01 * length / xp.where(usual, speed, 1.0), 1e-6)
        return (xp.zeros_like(h), xp.clip(h, None, self.until), field)

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        xp = namespace(x)
        time, h, first = state
        fields = [first]
        for weights in STAGES[:-1]:
            fields.append(self._field(function, x + h * _combined(weights, fields)))
        x_new = function.project(x + h * _combined(STAGES[-1], fields))
        fields.append(self._field(function, x_new))
        size = self.atol + self.rtol * xp.maximum(xp.abs(x), xp.abs(x_new))
        error = _rms(h * _combined(ERROR, fields) / size)
        kept = error <= 1.0  # False where NaN
        factor = xp.where(xp.isfinite(error), xp.clip(0.9 * (error + 1e-12) ** -0.2, 0.2, 5.0), 0.2)
        time = xp.where(kept, time + h, time)
        h = xp.minimum(h * factor, xp.clip(self.until - time, 0.0, None))
        return xp.where(kept, x_new, x), (time, h, xp.where(kept, fields[-1], first))

    def clock(self, state: State, taken: int) -> Clock:
        time = state[0][:, 0]
        return Clock(time, time >= self.until * (1 - 1e-15))

    def _field(self, function: Coordinates, x: Array) -> Array:
        return -function.projected(x, function.gradient(x))


def _combined(weights: tuple[float, ...], fields: list[Array]) -> Array:
    return sum((w * k for w, k in zip(weights[1:], fields[1:], strict=False) if w), start=weights[0] * fields[0])


def _rms(x: Array) -> Array:
    xp = namespace(x)
    return xp.sqrt(xp.mean(x * x, axis=1, keepdims=True))


def _per_run(option: Any, cells: NDArray[np.int64], x: Array) -> Array:
    """An option of every cell as a column (B, 1) beside x."""
    values = np.atleast_1d(np.asarray(option, dtype=np.float64))
    if values.size > 1 and cells.max() >= values.size:
        raise ValueError(
            f"simulate: the rule's step has {values.size} entries, but the problem has more cells; give a scalar or one per cell"
        )
    return like(values[cells % values.size][:, None], x)


def _steps(rule: str, value: Any) -> float | tuple[float, ...]:
    """A step as a number, or as one per cell; ValueError naming the rule otherwise."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0)
    if array.dtype.kind not in "iuf" or array.ndim > 1 or not array.size or not np.all(np.isfinite(array) & (array > 0)):
        raise ValueError(f"rules.{rule}: step is {value!r:.60}, but must be a positive, finite number, or (G,) of them, one per cell")
    return tuple(map(float, array)) if array.ndim else float(array)


def _check(rule: str, name: str, value: Any, low: float, high: float, reach: bool = False) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not (low <= value < high or (reach and value == high)) or (name not in ("momentum", "beta1", "beta2") and value == low):
        raise ValueError(f"rules.{rule}: {name} is {value!r}, but must lie between {low:g} and {high:g}")


TABLE = {"GradientDescent": GradientDescent, "Adam": Adam, "GradientFlow": GradientFlow}
