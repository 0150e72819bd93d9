"""The batched minimiser against SciPy's L-BFGS-B, run by run from the same starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

import ufm
from catalog import LIBRARIES, PROBLEMS, factors, to_library
from ufm.arrays import to_numpy
from ufm.coordinates import Coordinates, balanced
from ufm.records import Stop
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.starts import first_factors

SMOOTH = [(name, p) for name, p in PROBLEMS if "autograd" not in name and p.activation == "linear" and p.features != "relu_of_free"]


def starts_of(problem: ufm.Problem, runs: int, seed: int = 0) -> tuple[Coordinates, Any]:
    frame = balanced(problem, runs)
    return frame, frame.from_factors(first_factors(problem, ufm.starts.balanced(), runs, seed, frame.objective.chain))


def scipy_run(frame: Coordinates, x: Any, row: int, gtol: float = 1e-10) -> Any:
    one = frame.pick(np.array([row]))
    bounds = [(low, None) for low in np.where(np.isfinite(one.lower), one.lower, None)]

    def function(z: Any) -> Any:
        value, gradient = one.value_and_gradient(z[None])
        return value[0], gradient[0]

    options = dict(maxiter=20000, maxfun=40000, ftol=0, gtol=gtol)
    return minimize(function, x[row], jac=True, method="L-BFGS-B", bounds=bounds, options=options)


@pytest.mark.parametrize(("name", "problem"), SMOOTH[::3], ids=[n for n, _ in SMOOTH[::3]])
def test_end_points_are_stationary_minima(name: str, problem: ufm.Problem) -> None:
    """Every run of a smooth problem ends feasible, stationary, and not above its start."""
    frame, x = starts_of(problem, 2)
    found = minimise(frame, x, LBFGS(tol=1e-8, max_steps=50_000))
    assert np.all(found.x >= frame.lower)
    assert np.all(found.value <= frame.value_and_gradient(x)[0])
    settled = frame.scale_free_norm(found.x) <= 1.01e-8
    vanishing = np.sum(found.x**2, axis=1) < 1e-12  # at zero the norm has no scale left
    assert np.all(settled | vanishing), found.stop


def test_convex_problems_end_where_scipy_ends() -> None:
    """Without ReLU all starts lead to one value: SciPy's, to 1e-12."""
    problem = ufm.Problem(ufm.counts.exponential(6, 500, 20), width=7, features="free", lam_w=2e-3, lam_h=1e-4, lam_b=0.01)
    frame, x = starts_of(problem, 4)
    found = minimise(frame, x, LBFGS(tol=1e-10))
    reference = [scipy_run(frame, x, row).fun for row in range(4)]
    assert found.value == pytest.approx(reference, rel=1e-12)


def test_bounds_hold_and_are_active_where_scipy_has_them() -> None:
    """From the same starts the ReLU problem reaches the same minimum, with the same features at the bound."""
    problem = ufm.Problem([60, 30, 10], width=12, features="relu", lam_w=5e-3, lam_h=5e-4)
    frame, x = starts_of(problem, 3)
    found = minimise(frame, x, LBFGS(tol=1e-11))
    for row in range(3):
        reference = scipy_run(frame, x, row)
        assert found.value[row] == pytest.approx(reference.fun, rel=1e-12)
    H = frame.unpack(found.x)[0]
    assert np.all(H >= 0)
    gram = np.swapaxes(H, 1, 2) @ H
    assert np.all(np.abs(gram[:, ~np.eye(3, dtype=bool)]) <= 1e-9 * gram.max())


def test_runs_do_not_depend_on_their_company() -> None:
    """A run alone, in a batch, or in another order takes the same path."""
    problem = ufm.Problem([30, 20, 10], width=5, features="relu", lam_w=5e-3, lam_h=5e-4)
    frame, x = starts_of(problem, 6)
    together = minimise(frame, x, LBFGS(tol=1e-9))
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = minimise(frame.pick(order), x[order], LBFGS(tol=1e-9))
    assert np.array_equal(shuffled.steps, together.steps[order])
    assert shuffled.value == pytest.approx(together.value[order], rel=1e-15)
    for row in range(6):
        alone = minimise(frame.pick(np.array([row])), x[row : row + 1], LBFGS(tol=1e-9))
        assert alone.value[0] == pytest.approx(together.value[row], rel=1e-13)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_ends_at_the_same_point(library: str) -> None:
    problem = ufm.Problem([4, 2, 1], width=3, features="relu", lam_w=0.02, lam_h=0.02, lam_b=0.1)
    frame, x = starts_of(problem, 3)
    expected = minimise(frame, x, LBFGS(tol=1e-8))

    def move(array: Any) -> Any:
        return to_library(library, array)

    placed = Coordinates(
        frame.objective.map(move),
        move(frame.unit),
        None if frame.penalty is None else move(frame.penalty),
        tuple(map(move, frame.scales)),
        frame.shapes,
        move(frame.lower),
    )
    found = minimise(placed, move(x), LBFGS(tol=1e-8))
    assert to_numpy(found.value) == pytest.approx(expected.value, rel=1e-13)
    assert set(found.stop) == {Stop.GRADIENT}


def test_slopes_resolve_what_values_cannot() -> None:
    """Gradients fall to 1e-13 of their parts, far below the square root of the rounding of values."""
    problem = ufm.Problem(ufm.counts.exponential(10, 5000, 100), width=10, features="free", lam_w=1e-3, lam_h=1e-5)
    frame, x = starts_of(problem, 4)
    found = minimise(frame, x, LBFGS(tol=1e-13))
    assert np.all(frame.scale_free_norm(found.x) <= 1e-13)


def test_why_a_run_ended() -> None:
    """Steps run out, a diverging loss and a met tolerance each leave their name."""
    problem = ufm.Problem([3, 2], width=2, features="free", lam_w=0.01, lam_h=0.01)
    frame, x = starts_of(problem, 2)
    assert minimise(frame, x, LBFGS(max_steps=3)).stop == (Stop.STEPS, Stop.STEPS)
    assert minimise(frame, x, LBFGS()).stop == (Stop.GRADIENT, Stop.GRADIENT)
    with np.errstate(all="ignore"):
        broken = minimise(frame, np.stack([x[0], np.full_like(x[0], 1e200)]), LBFGS())
    assert broken.stop == (Stop.GRADIENT, Stop.DIVERGED)


def test_optima_at_penalties_of_1e_28_resolve() -> None:
    """Margins of about 60 are found to 1e-9 although the losses there are about 1e-26."""
    n = np.array([4, 2, 1])
    problem = ufm.Problem(n, width=12, features="relu", lam_w=1e-28, lam_h=1e-28)
    solution = ufm.solve(problem, tol=1e-8)
    theory = ufm.predict(problem)
    assert solution.gap[0] <= 1e-8
    assert solution.value == pytest.approx(theory.value, rel=1e-10)
    Z = solution.logits[0]
    margins = np.diagonal(Z) - (Z.sum(axis=0) - np.diagonal(Z)) / 2
    assert margins == pytest.approx(theory.margins[0], rel=1e-6)


def test_deep_relu_chains_do_not_rise() -> None:
    """Nonsmooth problems may stall, but end below their start and say so."""
    problem = ufm.Problem([4, 4, 4], width=5, depth=3, features="free", activation="relu", lam_w=0.003, lam_h=0.003)
    frame, x = starts_of(problem, 4)
    found = minimise(frame, x, LBFGS(tol=1e-7))
    assert np.all(found.value < frame.value_and_gradient(x)[0])
    assert set(found.stop) <= {Stop.GRADIENT, Stop.STALLED}
    assert factors(problem)[0].shape == (1, 5, 3)
