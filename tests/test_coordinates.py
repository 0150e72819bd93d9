"""Laws of the weighted coordinates H' = H diag(m)^{1/2}, tried on every problem; `test_objective` holds those of the balanced ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import plain
from catalog import LIBRARIES, PROBLEMS, factors, to_library
from test_objective import CASES, agree, on
from ufm.coordinates import balanced, weighted
from ufm.objective import objective
from ufm.problem import Problem

R = 2  # runs of every cell
EACH = pytest.mark.parametrize("problem", [p for _, p in CASES], ids=[n for n, _ in CASES])


def root_m(problem: Problem, run: int) -> Any:
    return np.array([m for _, m in plain.columns(problem, run // R)], dtype=np.float64) ** 0.5


@EACH
def test_only_features_are_weighted(problem: Problem) -> None:
    """x holds H diag(m)^{1/2}, then every other factor bit for bit; factors come back."""
    at, frame = factors(problem, R), weighted(problem, R)
    x = frame.from_factors(at)
    first, *others = frame.unpack(x)
    for b in range(problem.cells * R):
        assert first[b] == pytest.approx(at[0][b] * root_m(problem, b), rel=1e-15)
    assert all(np.array_equal(part, f) for part, f in zip(others, at[1:], strict=True))
    assert all(f == pytest.approx(g, rel=1e-15) for f, g in zip(frame.to_factors(x), at, strict=True))
    assert np.all(frame.unit == 1)


@EACH
def test_penalties_are_the_problems_own(problem: Problem) -> None:
    """Every coordinate of a factor carries that factor's penalty: lam_h/2 ||H'||^2 is lam_h/2 sum_c m_c ||h_c||^2."""
    at, frame = factors(problem, R), weighted(problem, R)
    x = frame.from_factors(at)
    levels = frame.unpack(np.ones_like(x) * (1.0 if frame.penalty is None else frame.penalty))
    for b in range(problem.cells * R):
        cell = b // R
        lam = [problem.lam_h[cell], *problem.lam_w[cell], *([] if problem.lam_b is None else [problem.lam_b[cell]])]
        assert [float(np.ptp(level[b])) for level in levels] == [0.0] * len(lam)
        assert [float(level[b].flat[0]) for level in levels] == pytest.approx(lam, rel=1e-15)


@EACH
def test_value_and_gradient_are_the_natural_ones(problem: Problem) -> None:
    """F is that of `plain`, the gradient in H' is that in H over m^{1/2}; asked for together, in parts or alone, the same bits."""
    at, frame, f = factors(problem, R), weighted(problem, R), objective(problem, R)
    x = frame.from_factors(at)
    value, gradient = frame.value_and_gradient(x)
    for b in range(problem.cells * R):
        assert value[b] == pytest.approx(plain.value(problem, b // R, [part[b] for part in at]), rel=1e-13)
    H, *others = f.value_and_gradient(at)[1]
    natural = [np.stack([H[b] / root_m(problem, b) for b in range(len(H))]), *others]
    for got, expected in zip(frame.unpack(gradient), natural, strict=True):
        assert np.max(np.abs(got - expected)) <= 1e-13 * np.max(np.abs(expected))
    for coordinates, y in ((frame, x), (balanced(problem, R), balanced(problem, R).from_factors(at))):
        before = y.copy()
        alone = coordinates.gradient(y)
        assert np.array_equal(alone, coordinates.value_and_gradient(y)[1])
        again = alone.copy()
        alone += 1.0  # an array of its own: what the caller does with it changes nothing
        assert np.array_equal(y, before)
        assert np.array_equal(coordinates.gradient(y), again)


@EACH
def test_means_and_samples_have_one_gradient(problem: Problem) -> None:
    """A step along -grad on class means is the step of every sample of the class, as samples of a class move alike."""
    if problem.columns == "samples":
        return
    at = factors(problem)
    frame, samples = weighted(problem), replace(problem, columns="samples")
    many = [np.concatenate([np.repeat(at[0][g : g + 1], problem.counts[g], axis=2) for g in range(problem.cells)]), *at[1:]]
    each = weighted(samples)
    mine = frame.to_factors(frame.gradient(frame.from_factors(at)))
    theirs = each.to_factors(each.gradient(each.from_factors(many)))
    for g in range(problem.cells):
        assert np.repeat(mine[0][g], problem.counts[g], axis=1) == pytest.approx(theirs[0][g], rel=1e-12, abs=1e-14)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-14)


@EACH
def test_bounds(problem: Problem) -> None:
    """Features of H >= 0 are projected, nothing else is; without bounds a point is its own projection."""
    for frame in (weighted(problem, R), balanced(problem, R)):
        x = np.random.default_rng(0).standard_normal(frame.from_factors(factors(problem, R)).shape)
        first, *others = frame.unpack(frame.project(x))
        assert np.array_equal(first, np.maximum(frame.unpack(x)[0], 0) if problem.features == "relu" else frame.unpack(x)[0])
        assert all(np.array_equal(a, b) for a, b in zip(others, frame.unpack(x)[1:], strict=True))
        assert frame.bounded == np.any(np.isfinite(frame.lower)) == (problem.features == "relu")
        assert frame.pick(np.array([0])).bounded == frame.bounded


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "numpy"])
def test_every_library_agrees(library: str) -> None:
    """torch, the strict reference and its second device give numpy's numbers, in their own arrays."""

    def move(x: Any) -> Any:
        return to_library(library, x)

    for _, problem in PROBLEMS[::4]:
        at, frame = factors(problem, R), weighted(problem, R)
        x = frame.from_factors(at)
        moved = on(move, frame)
        got = [moved.from_factors([move(f) for f in at]), moved.gradient(move(x)), moved.value(move(x)), *moved.to_factors(move(x))]
        agree(got, [x, frame.gradient(x), frame.value(x), *frame.to_factors(x)], move(x))
