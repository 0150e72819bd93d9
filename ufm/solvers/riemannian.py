"""Minimising a function on manifolds, whoever moves the point: value, gradient norm and judgement are ours (numpy only).

A run succeeds when the norm of our Riemannian gradient is within the tolerance. It ends there, or when neither that norm nor the value
has got better for a while; Newton steps that heed the gradient alone then finish it, since values cannot tell points apart that are
closer than about sqrt(eps). The clock stops nothing unless asked to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ufm.records import Stop
from ufm.solvers.manifolds import Manifold, component, components, draw

Floats = NDArray[np.float64]
Points = list[Floats]
Solver = Literal["trust-regions", "conjugate-gradient", "steepest-descent"]

STEPS = {"trust-regions": 500, "conjugate-gradient": 5_000, "steepest-descent": 20_000}  # most iterations of a run
PATIENCE = {"trust-regions": 20, "conjugate-gradient": 30, "steepest-descent": 30}  # iterations without progress that end one
PROGRESS = 1e-14  # relative decrease of the value that counts as progress; a gradient norm lower by a tenth does, too
OFF = 1e-3  # how far a given start may lie from its manifold
NEWTON, INNER = 20, 500  # most steps of the finish, and most Hessian products of each
FORCING = 1e-6  # least share of the gradient that a step is asked to leave


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimisation on manifolds ended: the best of the components tried.

    points: one array per manifold; value; gradient_norm: of the Riemannian gradient, our own; success: whether it is within the
    tolerance; component: per manifold, the sign of the determinant on O(n), 0 where there is one component; iterations, newton steps of
    the finish, evaluations of the cost and products with the Hessian, of all components; stop: why the best one ended.
    """

    points: tuple[Floats, ...]
    value: float
    gradient_norm: float
    success: bool
    stop: Stop
    solver: str
    component: tuple[int, ...]
    iterations: int
    newton: int
    evaluations: int
    products: int


@dataclass(frozen=True)
class Options:
    """How to minimise: pymanopt's optimiser, tolerance on our own gradient norm, most iterations (None: STEPS), seconds, the finish."""

    solver: Solver = "trust-regions"
    tol: float = 1e-10
    max_steps: int | None = None
    max_time: float | None = None
    finish: bool = True

    def check(self, call: str) -> None:
        """ValueError on bad options, in the name of `call`."""
        if self.solver not in STEPS:
            raise ValueError(f"{call}: solver is {self.solver!r}, but must be one of {', '.join(map(repr, STEPS))}")
        if not isinstance(self.tol, Real) or not 0 < self.tol < math.inf:
            raise ValueError(f"{call}: tol is {self.tol!r}, but must be a positive number, the largest gradient norm of a success")
        steps = self.max_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1):
            raise ValueError(f"{call}: max_steps is {steps!r}, but must be a whole number, at least 1, or None")
        if self.max_time is not None and (not isinstance(self.max_time, Real) or not self.max_time > 0):
            raise ValueError(f"{call}: max_time is {self.max_time!r}, but must be a positive number of seconds, or None for no limit")


@dataclass(eq=False)
class Function:
    """A cost on a product of manifolds: value, Riemannian gradient, Riemannian Hessian product; counts its calls.

    cost(*points) -> number; gradient(*points) and hessian(*points, *moves) -> Euclidean ones, an array per manifold.
    """

    parts: tuple[Manifold, ...]
    cost: Callable[..., Any]
    gradient: Callable[..., Sequence[Any]]
    hessian: Callable[..., Sequence[Any]] | None
    evaluations: int = 0
    products: int = 0
    lowest: float = math.inf
    held: tuple[Points, Points] = field(default_factory=lambda: ([], []))  # last point, and its multipliers

    def value(self, X: Points) -> float:
        self.evaluations += 1
        value = float(self.cost(*X))
        self.lowest = min(self.lowest, value)
        return value

    def slope(self, X: Points) -> Points:
        G = self.gradient(*X)
        S = [m.multiplier(x, g) for m, x, g in zip(self.parts, X, G, strict=True)]
        self.held = (list(X), S)
        return [g - m.times(x, s) for m, x, g, s in zip(self.parts, X, G, S, strict=True)]

    def curve(self, X: Points, V: Points) -> Points:
        self.products += 1
        if len(self.held[0]) != len(X) or not all(a is b for a, b in zip(self.held[0], X, strict=True)):
            self.slope(X)
        assert self.hessian is not None
        raw = zip(self.parts, X, V, self.hessian(*X, *V), self.held[1], strict=True)
        bent = [(m, x, h - m.times(v, s)) for m, x, v, h, s in raw]
        return [h - m.times(x, m.multiplier(x, h)) for m, x, h in bent]


def inner(V: Points, Z: Points) -> float:
    """The inner product of two moves."""
    return float(sum(np.vdot(v, z) for v, z in zip(V, Z, strict=True)))


@dataclass(eq=False)
class Watch:
    """When a run ends: called once an iteration with the gradient norm, it returns a reason or None."""

    function: Function
    options: Options
    stop: Stop = Stop.STALLED
    iterations: int = 0
    best: float = math.inf
    mark: float = math.inf
    since: int = 0
    began: float = field(default_factory=time.monotonic)

    def __call__(self, *, gradient_norm: Any, iteration: int, **others: Any) -> str | None:
        options, lowest = self.options, self.function.lowest
        self.iterations = iteration
        self.since = 0 if gradient_norm < 0.9 * self.best or lowest < self.mark - PROGRESS * abs(lowest) else self.since + 1
        if self.since == 0:
            self.best, self.mark = min(self.best, float(gradient_norm)), lowest
        endings = {
            Stop.GRADIENT: gradient_norm <= options.tol,
            Stop.STALLED: self.since >= PATIENCE[options.solver] or math.isnan(gradient_norm),
            Stop.STEPS: iteration >= (options.max_steps or STEPS[options.solver]),
            Stop.CLOCK: options.max_time is not None and time.monotonic() - self.began >= options.max_time,
        }
        reason = next((stop for stop, ended in endings.items() if ended), None)
        self.stop = reason or self.stop
        return None if reason is None else reason.value


Mover = Callable[[Function, Points, str, Watch], Points]  # moves the points until the watch says why it ends


def first_points(manifolds: tuple[Manifold, ...], start: Any, seed: int, call: str = "stiefel.minimise") -> Points:
    """`start` on its manifolds, or points drawn from a Generator of `seed`."""
    if start is None:
        generator = np.random.default_rng(seed)
        return [draw(m, generator) for m in manifolds]
    given = [np.array(x, dtype=np.float64) for x in (start if isinstance(start, (list, tuple)) else [start])]
    shapes, wanted = [x.shape for x in given], [m.shape for m in manifolds]
    if shapes != wanted:
        raise ValueError(f"{call}: start has shapes {shapes}, but the manifolds are {list(manifolds)}; give one array of each shape")
    points = [m.nearest(x) for m, x in zip(manifolds, given, strict=True)]
    for m, x, p in zip(manifolds, given, points, strict=True):
        off = float(np.abs(x - p).max())
        if not off <= OFF:
            raise ValueError(f"{call}: start is {off:.1e} off {m}; give a point of it, or leave start out")
    return points


def best_component(function: Function, start: Points, options: Options, mover: Mover) -> Minimum:
    """Minimise from `start` and from its mirror images in the other components; the lowest is kept, with the work of all."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        starts = product(*(components(m, x) for m, x in zip(function.parts, start, strict=True)))
        ends = [_minimise(function, list(x), options, mover) for x in starts]
    points, value, norm, stop, _, _ = min(ends, key=lambda end: (not math.isfinite(end[1]), end[1]))
    return Minimum(
        points=tuple(points),
        value=value,
        gradient_norm=norm,
        success=norm <= options.tol,
        stop=stop,
        solver=options.solver,
        component=tuple(component(m, x) for m, x in zip(function.parts, points, strict=True)),
        iterations=sum(end[4] for end in ends),
        newton=sum(end[5] for end in ends),
        evaluations=function.evaluations,
        products=function.products,
    )


def _minimise(function: Function, X: Points, options: Options, mover: Mover) -> tuple[Points, float, float, Stop, int, int]:
    """Point, value, gradient norm, reason, iterations and Newton steps of one component."""
    function.lowest = math.inf
    value, G = function.value(X), function.slope(X)
    norm = math.sqrt(inner(G, G))
    if not math.isfinite(value + norm):
        raise ValueError(f"stiefel: the cost at the start is {value} with gradient norm {norm}; both must be finite, use another start")
    watch = Watch(function, options)
    if norm > options.tol and any(m.dimension for m in function.parts):
        with np.errstate(all="ignore"):  # vanishing gradients and steps are divided by; what comes out of that is judged below
            X = mover(function, X, options.solver, watch)
            value, G = function.value(X), function.slope(X)
            norm = math.sqrt(inner(G, G))
    newton = 0
    if options.finish and function.hessian is not None and options.tol < norm < math.inf and watch.stop is not Stop.CLOCK:
        X, norm, newton = _finish(function, X, G, options.tol)
        value = function.value(X)
    if not math.isfinite(value + norm):
        return X, value, norm, Stop.DIVERGED, watch.iterations, newton
    return X, value, norm, Stop.GRADIENT if norm <= options.tol else watch.stop, watch.iterations, newton


def _finish(function: Function, X: Points, G: Points, tol: float) -> tuple[Points, float, int]:
    """Newton steps while each halves the gradient norm: the point, its gradient norm, the steps taken."""
    norm, steps = math.sqrt(inner(G, G)), 0
    while norm > tol and steps < NEWTON:
        move = _newton_step(function, X, G, norm, 0.1 * tol)
        new = [m.nearest(x + v) for m, x, v in zip(function.parts, X, move, strict=True)]
        G_new = function.slope(new)
        norm_new = math.sqrt(inner(G_new, G_new))
        if not norm_new <= 0.5 * norm:
            break
        X, G, norm, steps = new, G_new, norm_new, steps + 1
    return X, norm, steps


def _newton_step(function: Function, X: Points, G: Points, norm: float, least: float) -> Points:
    """Conjugate gradient on Hess v = -G, to a tenth, then quadratically, not below `least`; ends at a direction without curvature."""
    move, R = [np.zeros_like(x) for x in X], [-g for g in G]
    D, square = R, norm * norm
    goal = max(least, norm * min(0.1, max(norm, FORCING)))
    for _ in range(min(INNER, sum(m.dimension for m in function.parts))):
        HD = function.curve(X, D)
        curvature = inner(D, HD)
        if not curvature > 0:
            break
        step = square / curvature
        move = [a + step * b for a, b in zip(move, D, strict=True)]
        R = [a - step * b for a, b in zip(R, HD, strict=True)]
        square, last = inner(R, R), square
        if square <= goal * goal:
            break
        D = [r + square / last * d for r, d in zip(R, D, strict=True)]
    return move
