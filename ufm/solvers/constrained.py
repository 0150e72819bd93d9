"""Unconstrained features models whose features and weights lie on spheres or have orthonormal columns, by pymanopt.

    F(H, W) with H = tau X, the columns of X on the unit sphere (or X^T X = I), and unit rows of W (or W W^T = I)

The model with penalties on both needs none of this: `ufm.solve` finds its minimum, with proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.heads import Learned, UnitRows
from ufm.objective import objective
from ufm.problem import Problem
from ufm.solvers.manifolds import Flat, Manifold, Oblique, Stiefel
from ufm.solvers.riemannian import Minimum, Solver
from ufm.solvers.stiefel import minimise

Floats = NDArray[np.float64]


class Constrained(NamedTuple):
    """H (d, cols) with its radius, W (K, d)[, b (K, 1)], and the run that found them, whose points are X, W^T[, b]."""

    factors: tuple[Floats, ...]
    run: Minimum


def constrained(
    problem: Problem,
    *,
    orthonormal: Sequence[str] = (),
    solver: Solver = "trust-regions",
    start: Any = None,
    seed: int = 0,
    tol: float = 1e-9,
    max_steps: int | None = None,
    max_time: float | None = None,
) -> Constrained:
    """A stationary point of F, from one start, for a problem of one cell with free features and depth 1.

    problem.radius puts the feature columns on the sphere of that radius, head=UnitRows() the rows of W on the unit sphere. orthonormal
    names those of "features" (then H = radius X, X^T X = I; radius None is 1) and "weights" (W W^T = I) that are orthonormal on top.
    start: X, W^T[, b] or None: drawn from `seed`. gradient_norm is that in X, W^T and b. The rest as in `stiefel.minimise`.
    """
    manifolds = _manifolds(problem, tuple(orthonormal))
    F = objective(problem)
    radius = 1.0 if problem.radius is None else problem.radius

    def factors(X: Floats, V: Floats, *b: Floats) -> tuple[Floats, ...]:
        return tuple(f[None] for f in (radius * X, V.T, *b))

    def back(G: Sequence[Floats]) -> list[Floats]:
        return [radius * G[0][0], G[1][0].T, *(g[0] for g in G[2:])]

    n = len(manifolds)
    run = minimise(
        lambda *points: F.value(factors(*points))[0],
        *manifolds,
        gradient=lambda *points: back(F.value_and_gradient(factors(*points))[1]),
        hessian=lambda *both: back(F.hessian_product(factors(*both[:n]), factors(*both[n:]))),
        solver=solver,
        start=start,
        seed=seed,
        tol=tol,
        max_steps=max_steps,
        max_time=max_time,
    )
    return Constrained(tuple(f[0] for f in factors(*run.points)), run)


def _manifolds(problem: Problem, orthonormal: tuple[str, ...]) -> tuple[Manifold, ...]:
    """Where X, W^T[, b] lie; ValueError where the problem does not fit or has no minimum."""
    if not isinstance(problem, Problem):
        raise TypeError(f"constrained: problem is {problem!r}, but must be a ufm.Problem")
    if not set(orthonormal) <= {"features", "weights"}:
        raise ValueError(f"constrained: orthonormal is {orthonormal!r}, but may hold 'features' and 'weights' only")
    if problem.cells != 1 or problem.depth != 1 or problem.features != "free" or not isinstance(problem.head, (Learned, UnitRows)):
        raise ValueError(
            f"constrained: the problem has {problem.cells} cells, depth {problem.depth}, features {problem.features!r} and head "
            f"{problem.head.name}, but must have one cell, depth 1, free features and a trained head; use problem.cell(g) for one cell"
        )
    d, K, cols = problem.width, problem.classes, problem.labels.shape[1]
    sphere = {"features": problem.radius is not None, "weights": isinstance(problem.head, UnitRows)}
    penalty = {"features": problem.lam_h[0], "weights": problem.lam_w[0, 0]}
    parts: list[Manifold] = []
    for name, columns in (("features", cols), ("weights", K)):
        if name in orthonormal and columns > d:
            raise ValueError(
                f"constrained: {columns} orthonormal {name} need width {columns}, but the problem has {d}; use that width"
                + (", or columns='means'" if problem.columns == "samples" and name == "features" else "")
            )
        if name not in orthonormal and not sphere[name] and penalty[name] == 0:
            raise ValueError(f"constrained: the {name} are free and without a penalty, so F has no minimum; constrain or penalise them")
        kind = Stiefel if name in orthonormal else Oblique if sphere[name] else None
        parts.append(Flat((d, columns)) if kind is None else kind(d, columns))
    return (*parts, Flat((K, 1))) if problem.lam_b is not None else tuple(parts)
