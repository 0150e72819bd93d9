"""Minimising on manifolds with pymanopt: a user's own cost, the nearest simplex ETF, the nearest frame. No other module knows pymanopt.

pymanopt's optimisers move the point; value, gradient, Hessian product and judgement are ours (`ufm.solvers.riemannian`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, like, to_numpy
from ufm.etf import Form, NearestETF, Posed, finished, pose
from ufm.frames import by_rank
from ufm.polar import factor_of
from ufm.solvers.manifolds import Flat, Manifold, Oblique, Sphere, Stiefel
from ufm.solvers.riemannian import Function, Minimum, Options, Points, Solver, Watch, best_component, first_points

Floats = NDArray[np.float64]

ROUGH = 1e-3  # gradient norm of the first part of a run with a free scale


def minimise(
    cost: Callable[..., Any],
    *manifolds: Manifold,
    gradient: Callable[..., Any] | None = None,
    hessian: Callable[..., Any] | None = None,
    solver: Solver = "trust-regions",
    start: Any = None,
    seed: int = 0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    max_time: float | None = None,
    finish: bool = True,
) -> Minimum:
    """Minimise cost(X_1, X_2, ...), one array per manifold, from one start and, on O(n), from its mirror image in the other component.

    Without `gradient` the cost is written with autograd.numpy and differentiated. gradient(X_1, ...) gives one Euclidean gradient per
    manifold, hessian(X_1, ..., V_1, ...) its derivative along V (trust regions and the finish need it). start: one array per manifold,
    or None: uniform points drawn from `seed`. finish: Newton steps after the optimiser. A start that is a saddle is kept: success says
    that the gradient vanishes, no more. Raises ValueError or TypeError on bad input.
    """
    options = Options(solver, tol, max_steps, max_time, finish)
    options.check("stiefel.minimise")
    if not manifolds or not all(isinstance(m, Manifold) for m in manifolds):
        raise TypeError(
            f"stiefel.minimise: manifolds are {manifolds!r}, but must be one or more of Stiefel(rows, columns), Oblique(rows, columns), "
            "Sphere(shape), Flat(shape)"
        )
    for name, function in (("cost", cost), ("gradient", gradient), ("hessian", hessian)):
        if not callable(function) and (function is not None or name == "cost"):
            raise TypeError(f"stiefel.minimise: {name} is {function!r}, but must be a function of {len(manifolds)} arrays")
    if gradient is None:
        if hessian is not None:
            raise ValueError("stiefel.minimise: hessian is given without gradient; give both, or neither for autograd")
        gradient, hessian = differentiated(cost, len(manifolds))
    elif hessian is None and solver == "trust-regions":
        raise ValueError("stiefel.minimise: solver='trust-regions' needs hessian beside gradient; give it, or use 'conjugate-gradient'")
    return best_component(Function(manifolds, cost, gradient, hessian), first_points(manifolds, start, seed), options, move)


@dataclass(frozen=True, eq=False)
class IteratedETF(NearestETF):
    """A NearestETF found step by step: the record of `etf.nearest`, and the run of each problem of the batch, row-major."""

    runs: tuple[Minimum, ...]

    @property
    def success(self) -> NDArray[np.bool_]:
        """Whether each problem's gradient norm is within the tolerance, (...)."""
        return np.array([run.success for run in self.runs]).reshape(self.U.shape[:-2])


def nearest_etf(
    means: Array,
    *,
    weights: Any = None,
    frame: Any = None,
    prox: Array | None = None,
    delta: float = 0.0,
    relative_delta: float | None = None,
    form: Form = "reduced",
    solver: Solver = "trust-regions",
    start: Any = None,
    seed: int = 0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    max_time: float | None = None,
    finish: bool = True,
) -> IteratedETF:
    """The problem of `etf.nearest`, minimised on the Stiefel manifold instead of solved in closed form; problem by problem, in float64.

        ||(Ht - U F^T) D||_F^2 + (delta/2) ||U - prox||_F^2

    Options up to form as there. start (..., d, m) or None: drawn from `seed`, the same for every problem of a batch. Where the end is
    stationary but not the minimum (U^T A indefinite: a saddle) the problem is solved again from a drawn point. With g the gradient norm
    and s_min the least singular value of A, ||U - U*||_F <= 2 g/s_min; tol bounds g. Other options as in `minimise`; errors as in both.
    """
    options = Options(solver, tol, max_steps, max_time, finish)
    options.check("stiefel.nearest_etf")
    posed = pose(
        "stiefel.nearest_etf", means, weights=weights, frame=frame, prox=prox, delta=delta, relative_delta=relative_delta, form=form
    )
    shape = tuple(posed.A.shape)
    if start is not None and np.shape(to_numpy(start)) != shape:
        raise ValueError(
            f"stiefel.nearest_etf: start has shape {np.shape(to_numpy(start))}, but U of the {form} form has {shape}; give one like it"
        )
    near, first = (None if x is None else to_numpy(x) for x in (prox, start))
    runs = tuple(
        _procrustes(posed, at, None if near is None else near[at], None if first is None else first[at], seed, options)
        for at in np.ndindex(shape[:-2])
    )
    U = like(np.stack([run.points[0] for run in runs]).reshape(shape), posed.A)
    method = solver if len(shape) == 2 else (solver,) * len(runs)
    record = finished(posed, factor_of(posed.A, U), method)
    return IteratedETF(**{f.name: getattr(record, f.name) for f in fields(record)}, runs=runs)


def _procrustes(posed: Posed, at: tuple[int, ...], prox: Any, start: Any, seed: int, options: Options) -> Minimum:
    """One problem of a batch."""
    A, Y = (to_numpy(x)[at].astype(np.float64) for x in (posed.A, posed.means))
    d, m = A.shape
    F = to_numpy(posed.frame).astype(np.float64)
    w = np.ones(len(F)) if posed.weights is None else np.broadcast_to(to_numpy(posed.weights), (*posed.A.shape[:-2], 1, len(F)))[at][0]
    near = np.zeros_like(A) if prox is None else prox.astype(np.float64)
    curved = 2 * (F.T * w) @ F + posed.delta * np.eye(m)
    even = bool(np.all(np.abs(curved - curved[0, 0] * np.eye(m)) <= 1e-15))  # a multiple of I: the product is a scaling

    def cost(U: Floats) -> float:
        off = Y - U @ F.T
        return float(np.sum(off * off * w) + 0.5 * posed.delta * np.sum((U - near) ** 2))

    def hessian(U: Floats, V: Floats) -> list[Floats]:
        return [curved[0, 0] * V if even else V @ curved]

    def gradient(U: Floats) -> list[Floats]:
        return [hessian(U, U)[0] - A]

    manifold = (Stiefel(d, m),)
    function = Function(manifold, cost, gradient, hessian)
    found = best_component(function, first_points(manifold, start, seed, "stiefel.nearest_etf"), options, move)
    S = found.points[0].T @ A
    if start is None or not found.success or np.linalg.eigvalsh(0.5 * (S + S.T))[0] >= -2 * options.tol - 1e-14:
        return found
    return best_component(function, first_points(manifold, None, seed), options, move)


@dataclass(frozen=True, eq=False)
class NearestFrame:
    """U (..., d, m) with orthonormal columns, scale s (...) > 0, target s U F^T (..., d, K), distance (...), the run of each problem."""

    U: Floats
    scale: Floats
    target: Floats
    distance: Floats
    runs: tuple[Minimum, ...]


def nearest_frame(
    means: Any,
    frame: Any,
    *,
    scale: Any = "free",
    solver: Solver = "trust-regions",
    seed: int = 0,
    tol: float = 1e-10,
    max_steps: int | None = None,
    max_time: float | None = None,
    finish: bool = True,
) -> NearestFrame:
    """min ||Y - s U F^T||_F^2 over orthonormal U and, with scale="free", s > 0; Y = means (..., d, K) and F = frame (K, m) as they are.

    F is replaced by as many columns as its rank, m of U, with the same Gram matrix; d >= rank. In closed form U = polar(Y F),
    s = ||Y F||_*/||F||_F^2. The runs are those of Y/||Y|| against F/||F||: roughly over U at scale 1 first, lest s change
    its sign on the way, then over (U, s). Raises ValueError on bad input.
    """
    options = Options(solver, tol, max_steps, max_time, finish)
    options.check("stiefel.nearest_frame")
    Y, F = (np.asarray(to_numpy(x), dtype=np.float64) for x in (means, frame))
    shapes = {"means": (Y, Y.ndim >= 2, "(..., d, K)"), "frame": (F, F.ndim == 2, "(K, m), a row per class")}
    for name, (x, fits, rule) in shapes.items():
        if not fits or not x.size or not np.all(np.isfinite(x)) or not np.any(x):
            raise ValueError(f"stiefel.nearest_frame: {name} has shape {x.shape}, but must be {rule}, finite and not zero")
    if scale != "free" and not (isinstance(scale, Real) and 0 < float(scale) < np.inf):
        raise ValueError(f"stiefel.nearest_frame: scale is {scale!r}, but must be 'free' or a positive number")
    F = by_rank(F)
    rank = F.shape[1]
    if Y.shape[-1] != len(F) or Y.shape[-2] < rank:
        raise ValueError(
            f"stiefel.nearest_frame: means has shape {Y.shape}, but this frame needs (..., d, {len(F)}) with d >= {rank}, its rank"
        )
    batch = Y.shape[:-2]
    runs = tuple(_scaled_procrustes(Y[at], F, scale, seed, options) for at in np.ndindex(batch))
    U = np.stack([run.points[0] for run in runs]).reshape(*batch, Y.shape[-2], rank)
    size = np.linalg.norm(Y, axis=(-2, -1)) / np.linalg.norm(F)
    t = size * np.array([float(run.points[1][0]) for run in runs]).reshape(batch) if scale == "free" else np.full(batch, float(scale))
    U, t = U * np.sign(t)[..., None, None], np.abs(t)
    target = t[..., None, None] * (U @ F.T)
    return NearestFrame(U, t, target, np.asarray(np.sum((Y - target) ** 2, axis=(-2, -1))), runs)


def _scaled_procrustes(Y: Floats, F: Floats, scale: Any, seed: int, options: Options) -> Minimum:
    """One problem: ||Y - t U F^T||^2 with Y and F of norm 1, over U and, where the scale is free, t of either sign."""
    fixed = np.array([1.0 if scale == "free" else scale * np.linalg.norm(F) / np.linalg.norm(Y)])
    Y, F = Y / np.linalg.norm(Y), F / np.linalg.norm(F)
    cost, gradient, hessian = scaled(Y, F)
    frames, still = (Stiefel(Y.shape[0], F.shape[1]),), np.zeros(1)
    at_one = Function(frames, lambda U: cost(U, fixed), lambda U: gradient(U, fixed)[:1], lambda U, V: hessian(U, fixed, V, still)[:1])
    rough = replace(options, tol=max(options.tol, ROUGH), finish=False) if scale == "free" else options
    found = best_component(at_one, first_points(frames, None, seed), rough, move)
    if scale != "free":
        return found
    return best_component(Function((*frames, Flat((1,))), cost, gradient, hessian), [found.points[0], fixed], options, move)


def scaled(Y: Floats, F: Floats) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """||Y - t U F^T||^2 as a function of U (d, m) with orthonormal columns and t (1,): value, gradient, Hessian product."""
    C, Q = Y @ F, F.T @ F

    def cost(U: Floats, t: Floats) -> float:
        return float(np.sum((Y - t * U @ F.T) ** 2))

    def gradient(U: Floats, t: Floats) -> list[Floats]:
        UQ = U @ Q
        return [2 * t * (t * UQ - C), 2 * np.array([t[0] * np.vdot(U, UQ) - np.vdot(U, C)])]

    def hessian(U: Floats, t: Floats, V: Floats, v: Floats) -> list[Floats]:
        UQ, VQ = U @ Q, V @ Q
        dU = 2 * t * (t * VQ + v * UQ) + 2 * v * (t * UQ - C)
        return [dU, 2 * np.array([v[0] * np.vdot(U, UQ) + 2 * t[0] * np.vdot(V, UQ) - np.vdot(V, C)])]

    return cost, gradient, hessian


def differentiated(cost: Callable[..., Any], arguments: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Gradient and Hessian product of a cost written with autograd.numpy, as functions of `arguments` arrays."""
    from autograd import grad

    every = list(range(arguments))
    gradient = grad(cost, argnum=every)

    def along(*points_and_moves: Any) -> Any:
        points, moves = points_and_moves[:arguments], points_and_moves[arguments:]
        return sum((g * v).sum() for g, v in zip(gradient(*points), moves, strict=True))

    product = grad(along, argnum=every)

    def hessian(*points_and_moves: Any) -> Any:
        with warnings.catch_warnings():  # of a cost that is linear in all or some of its arguments: its product is zero, as it should be
            warnings.filterwarnings("ignore", "Output seems independent of input")
            return product(*points_and_moves)[:arguments]

    return gradient, hessian


def move(function: Function, X: Points, solver: str, watch: Watch) -> Points:
    """Let pymanopt's optimiser move the points until the watch ends it."""
    from pymanopt import optimizers

    kinds = {
        "trust-regions": optimizers.TrustRegions,
        "conjugate-gradient": optimizers.ConjugateGradient,
        "steepest-descent": optimizers.SteepestDescent,
    }
    optimiser = kinds[solver](verbosity=0)
    optimiser._check_stopping_criterion = watch
    start = X[0] if len(X) == 1 else X
    end = optimiser.run(_Seen(function), initial_point=start).point
    return [end] if len(X) == 1 else list(end)


class _Seen:
    """The function as pymanopt's optimisers read it: one array, or a product's list of them."""

    def __init__(self, function: Function) -> None:
        from pymanopt import manifolds

        kinds: dict[type, Callable[[Any], Any]] = {
            Stiefel: lambda m: manifolds.Stiefel(m.rows, m.columns),
            Oblique: lambda m: manifolds.Oblique(m.rows, m.columns),
            Sphere: lambda m: manifolds.Sphere(*m.shape),
            Flat: lambda m: manifolds.Euclidean(*m.shape),
        }
        parts = [kinds[type(m)](m) for m in function.parts]
        for part, m in zip(parts, function.parts, strict=True):
            if isinstance(m, Stiefel):  # polar: of second order, so that long flat valleys are followed in long steps, unlike with QR
                # pymanopt's inner solver divides 0 by 0 once its residual is exactly 0: such a move is none
                part.retraction = lambda x, v, m=m: m.nearest(x + v) if np.all(np.isfinite(v)) else x
        self.function, self.single = function, len(parts) == 1
        self.manifold = parts[0] if self.single else manifolds.Product(parts)

    def cost(self, x: Any) -> float:
        return self.function.value([x] if self.single else x)

    def riemannian_gradient(self, x: Any) -> Any:
        return self._move(x, self.function.slope([x] if self.single else x))

    def riemannian_hessian(self, x: Any, v: Any) -> Any:
        return self._move(x, self.function.curve([x], [v]) if self.single else self.function.curve(x, v))

    def preconditioner(self, x: Any, v: Any) -> Any:
        return v

    def _move(self, x: Any, parts: Points) -> Any:
        """A tangent in pymanopt's form: a product's have arithmetic of their own."""
        return parts[0] if self.single else type(self.manifold.zero_vector(x))(parts)
