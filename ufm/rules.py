"""Rules of descent and flow: options only, one explicit step each; the flows are those of `ufm.flow` and `ufm.stabilised`.

x is a batch (B, n) in weighted coordinates H' = H diag(m)^{1/2}, where a step on class means is the step on all samples
(`ufm.coordinates`); P is the projection on H >= 0, the identity for other features. A rule is a frozen dataclass with three methods:
`start` makes the state (a tuple of arrays, runs first), `advance` takes x and state one step on (and may overwrite both), `clock` reads
the time. Adding one is adding a class and a line in TABLE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, flatten, like, namespace, norm, row_blocks
from ufm.coordinates import Coordinates
from ufm.flow import Clock, GradientFlow, State, check
from ufm.stabilised import StabilisedFlow


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
        check("GradientDescent", "momentum", self.momentum, 0.0, 1.0)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        eta = _per_run(self.step, cells, x)
        return (eta, namespace(x).asarray(x, copy=True)) if self.momentum else (eta,)

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        if not self.momentum:
            function.descend(x, state[0])
            return function.project(x), state
        eta, previous = state
        move = x - previous
        move *= self.momentum
        previous = namespace(x).asarray(x, copy=True)
        function.descend(x, eta)
        x += move
        return function.project(x), (eta, previous)

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
        check("Adam", "beta1", self.beta1, 0.0, 1.0)
        check("Adam", "beta2", self.beta2, 0.0, 1.0)
        check("Adam", "epsilon", self.epsilon, 0.0, np.inf)

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


@dataclass(frozen=True)
class AGD:
    """p <- P(p - gain (eta/L) sigma_p g_p/||g_p||_F) for each of the L trained matrices p, g_p the gradient of F; g_p = 0 moves nothing.

    eta = log((1 + sqrt(1 + 4 G))/2), G = (1/L) sum_p sigma_p ||g_p||_F, and sigma_p = sqrt(rows/columns) of p as networks store it:
    sqrt(N/d) for features (a sample a row), sqrt(K/d) for the classifier. On class means this is AGD on samples that start equal in each
    class. Time is gain times the sum of all eta. A trained bias is refused, as the authors' code does: it has no sigma.
    Source: Bernstein, Mingard, Huang, Azizan & Yue 2023 (arXiv 2304.05187).
    """

    gain: float = 1.0

    def __post_init__(self) -> None:
        check("AGD", "gain", self.gain, 0.0, np.inf)

    def start(self, function: Coordinates, x: Array, cells: NDArray[np.int64]) -> State:
        if function.objective.chain.bias and function.shapes[-1][1] == 1:
            raise ValueError("rules.AGD: the problem has a trained bias, but AGD moves matrices only; use lam_b=None, or another rule")
        xp = namespace(x)
        samples = xp.sum(function.scales[0] ** -2, axis=(1, 2))[:, None]  # a column of m samples is scaled by 1/sqrt(m)
        (width, _), *others = function.shapes
        fixed = like(np.sqrt([[rows / columns for rows, columns in others]]), x)
        sigma = xp.concat([xp.sqrt(samples / width), xp.broadcast_to(fixed, (x.shape[0], len(others)))], axis=1)
        return (sigma, xp.zeros_like(samples))

    def advance(self, function: Coordinates, x: Array, state: State) -> tuple[Array, State]:
        xp = namespace(x)
        sigma, time = state  # (B, L), (B, 1)
        gradient = function.gradient(x)
        slopes = function.unpack(gradient)
        sizes = xp.stack([norm(flatten(g)) for g in slopes], axis=1)
        G = xp.mean(sigma * sizes, axis=1, keepdims=True)
        eta = xp.log1p(2.0 * G / (1.0 + xp.sqrt(1.0 + 4.0 * G)))
        rates = self.gain / len(slopes) * eta * sigma / xp.where(sizes == 0, 1.0, sizes)
        for i, (part, g) in enumerate(zip(function.unpack(x), slopes, strict=True)):  # views of x, changed in place
            for rows in row_blocks(part):
                own = part[:, rows, :]
                own -= rates[:, i, None, None] * g[:, rows, :]
        return function.project(x), (sigma, time + self.gain * eta)

    def clock(self, state: State, taken: int) -> Clock:
        return Clock(state[1][:, 0], None)


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


TABLE = {"GradientDescent": GradientDescent, "Adam": Adam, "AGD": AGD, "GradientFlow": GradientFlow, "StabilisedFlow": StabilisedFlow}
__all__ = ["AGD", "TABLE", "Adam", "Clock", "GradientDescent", "GradientFlow", "Rule", "StabilisedFlow", "State"]
