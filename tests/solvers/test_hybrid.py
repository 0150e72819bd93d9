"""Descent, then a polish: where it ends, what it costs, and the agreement of two batches of end points."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ufm import Problem, Stop, counts, simulate, solve, starts
from ufm.rules import Adam, GradientDescent
from ufm.solvers.hybrid import agreement, descend_and_polish

DEEP = Problem(counts.balanced(4, 3), width=8, depth=2, features="free", lam_w=2.0**-7, lam_h=2.0**-7)
RULE = GradientDescent(0.5)
GRID = Problem(
    counts.balanced(4, 3), width=8, depth=2, features="free", lam_w=2.0 ** -np.array([6, 8, 6]), lam_h=[2.0**-6, 2.0**-7, 2.0**-6]
)


def unequal(first: Any, second: Any) -> bool:
    return not all(np.array_equal(a, b) for a, b in zip((first.value, *first.factors), (second.value, *second.factors), strict=True))


def test_it_is_descent_then_lbfgs() -> None:
    """Each cell: `simulate` for ceil(handoff/(smallest penalty * step)) steps, then `solve` from there, bit for bit, and steps add up."""
    found = descend_and_polish(GRID, RULE, handoff=0.1, runs=3, seed=[5, 6, 7], start=starts.normal(1.2), tol=1e-10)
    for g, steps in enumerate((13, 52, 13)):
        path = simulate(GRID.cell(g), RULE, runs=3, seed=5 + g, steps=steps, start=starts.normal(1.2))
        end = solve(GRID.cell(g), runs=3, method="lbfgs", start=starts.given(path.factors), tol=1e-10)
        rows = slice(3 * g, 3 * g + 3)
        assert np.array_equal(found.value[rows], end.value)
        assert np.array_equal(found.steps[rows], end.steps + steps)
        assert all(np.array_equal(a[rows], b) for a, b in zip(found.factors, end.factors, strict=True))
    assert set(found.stop) == {Stop.GRADIENT}
    assert np.all(found.gradient_norm <= 1e-10)


def test_given_starts_and_steps_go_with_their_cells() -> None:
    """Permuting cells, their steps, seeds and given factors permutes the answer."""
    rng, order = np.random.default_rng(0), np.array([2, 0, 1])
    at = [rng.standard_normal((6, *shape)) / 3 for shape in ((8, 4), (8, 8), (4, 8))]
    steps = np.array([0.5, 0.4, 0.3])
    one = descend_and_polish(GRID, GradientDescent(steps), runs=2, start=starts.given(at))
    rows = (2 * order[:, None] + np.arange(2)).ravel()
    two = descend_and_polish(GRID.pick(order), GradientDescent(steps[order]), runs=2, start=starts.given([f[rows] for f in at]))
    assert np.array_equal(one.value[rows], two.value)
    assert np.array_equal(one.steps[rows], two.steps)


def test_it_ends_where_descent_ends_for_a_tenth_of_the_gradients() -> None:
    """Seed by seed, from starts that lead to different points; L-BFGS from the start is another experiment."""
    same: dict[str, Any] = dict(runs=40, seed=1, start=starts.normal(1.3))
    slow = simulate(DEEP, GradientDescent(0.3), steps=100_000, every=100, tol=1e-8, **same)
    fast = descend_and_polish(DEEP, GradientDescent(0.3), tol=1e-9, **same)
    end = slow.last("value")
    assert len(set(np.round(end, 6))) >= 2
    assert agreement(end, fast.value, rtol=1e-6).share >= 0.9
    assert 10 * fast.steps.mean() <= slow.steps.mean()


@pytest.mark.parametrize(
    ("first", "second", "rtol", "expected"),
    [
        (["dnc", "pairs", "zero"], ["dnc", "pairs", "other"], 0.0, 2),
        ([5, 5, 9, 9], [5, 6, 9, 9], 0.5, 3),
        ([1.0, 2.0, np.nan], [1.0 + 1e-9, 2.1, np.nan], 1e-8, 1),
        ([True, False], [True, False], 0.0, 2),
    ],
)
def test_agreement(first: Any, second: Any, rtol: float, expected: int) -> None:
    """Whole numbers and names agree exactly, numbers to rtol; the interval solves Wilson's quadratic."""
    found, z = agreement(first, second, rtol=rtol), 1.959963984540054
    assert found.runs == len(first)
    assert found.share == pytest.approx(expected / len(first))
    for p in (found.low, found.high):
        assert (found.share - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / found.runs, abs=1e-12)
    assert found.low <= found.share <= found.high


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: descend_and_polish(DEEP, Adam()), TypeError, "descend_and_polish: rule is Adam("),
        (lambda: descend_and_polish(None, RULE), TypeError, "descend_and_polish: problem is None"),
        (lambda: descend_and_polish(DEEP, RULE, handoff=0), ValueError, "descend_and_polish: handoff is 0, but must be a positive"),
        (lambda: descend_and_polish(DEEP, GradientDescent([0.1, 0.2])), ValueError, "descend_and_polish: the rule's step has 2 entries"),
        (lambda: descend_and_polish(replace(DEEP, lam_w=0.0, lam_h=0.0), RULE), ValueError, "descend_and_polish: a cell has no penalty"),
        (lambda: descend_and_polish(DEEP, GradientDescent(1e3), handoff=1e3), ValueError, "descend_and_polish: a run of cell 0 diverged"),
        (lambda: agreement([1, 2], [1]), ValueError, "agreement: first and second have shapes (2,) and (1,), but must be"),
    ],
)  # fmt: skip
def test_options_are_checked(call: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        call()


def test_unequal_sees_a_difference() -> None:
    one, two = (descend_and_polish(DEEP, RULE, runs=2, seed=seed) for seed in (0, 1))
    assert unequal(one, two)
    assert not unequal(one, descend_and_polish(DEEP, RULE, runs=2, seed=0))
