"""Automatic gradient descent against the authors' loop written sample by sample, and its orthogonal start."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from typing import Any

import numpy as np
import pytest

import plain
import ufm
from catalog import PROBLEMS, factors
from test_objective import torch_parts
from test_rules import by_sample, close, walk
from ufm import starts
from ufm.chain import Chain
from ufm.coordinates import Coordinates, weighted
from ufm.objective import chain_of
from ufm.problem import Problem
from ufm.rules import AGD

UNBIASED = [(n, p) for n, p in PROBLEMS if p.lam_b is None]
EACH = pytest.mark.parametrize("problem", [p for _, p in UNBIASED], ids=[n for n, _ in UNBIASED])


def published(problem: Problem, cell: int, run: Any, gain: float, steps: int) -> tuple[list[Any], list[float]]:
    """The loop of the authors' code on torch's own F: features stored a sample a row, weights as they are; and each step's logarithm."""
    import torch

    stored = [torch.tensor(np.array(x).T if i == 0 else np.array(x), requires_grad=True) for i, x in enumerate(run)]
    logs = []
    for _ in range(steps):
        for p in stored:
            p.grad = None
        sum(torch_parts(problem, cell, [stored[0].T, *stored[1:]])).backward()
        G = 0.0
        for p in stored:
            G += sqrt(p.shape[0] / p.shape[1]) * float(p.grad.norm())
        G /= len(stored)
        logs.append(log(0.5 * (1 + sqrt(1 + 4 * G))))
        for p in stored:
            factor = sqrt(p.shape[0] / p.shape[1]) / p.grad.norm()
            p.data -= gain * logs[-1] / len(stored) * torch.nan_to_num(factor, posinf=0.0) * p.grad
        if problem.features == "relu":
            stored[0].data.clamp_(min=0)
    arrays = [p.detach().numpy() for p in stored]
    return [arrays[0].T, *arrays[1:]], logs


@EACH
def test_five_steps_are_the_published_ones(problem: Problem) -> None:
    """On every problem without a bias, class means or samples, of any depth: factors to 1e-11, time gain times the logarithms' sum."""
    at = factors(problem)
    last = walk(problem, AGD(0.3), at, 5, 5)[-1]
    for cell in range(problem.cells):
        samples, run = by_sample(problem, cell, [x[cell] for x in at])
        expected, logs = published(samples, cell, run, 0.3, 5)
        close(by_sample(problem, cell, [x[cell] for x in last.factors])[1], expected, 1e-11)
        assert last.time[cell] == pytest.approx(0.3 * sum(logs), rel=1e-11)
        assert last.value[cell] == pytest.approx(plain.value(samples, cell, expected), rel=1e-10)


@pytest.mark.parametrize("features", ["free", "relu"])
@pytest.mark.parametrize("depth", [1, 3])
def test_means_move_as_their_samples(features: Any, depth: int) -> None:
    """Samples of a class that start equal take the steps of their mean, unequal classes too: 100 of them, from the start of AGD itself."""
    problem = Problem([7, 4, 1], width=4, depth=depth, features=features, lam_w=0.01, lam_h=0.005)
    at = starts.first_factors(problem, starts.agd(), 1, 3, chain_of(problem))
    samples, run = by_sample(problem, 0, [x[0] for x in at])
    means, each = walk(problem, AGD(), at, 100, 20), walk(samples, AGD(), [x[None] for x in run], 100, 20)
    for mine, theirs in zip(means, each, strict=True):
        close(by_sample(problem, 0, [x[0] for x in mine.factors])[1], [x[0] for x in theirs.factors], 1e-10)
        assert mine.time == pytest.approx(theirs.time, rel=1e-11)


def test_runs_are_alone() -> None:
    """Cells and runs of a batch step as each does by itself: every run has its own logarithm, sizes and N."""
    grid = Problem([[5, 3, 2], [20, 10, 1]], width=4, features="free", lam_w=0.02, lam_h=[0.01, 0.02])
    together = ufm.simulate(grid, AGD(2.0), runs=3, seed=1, steps=20, start=starts.agd())
    for g in range(2):
        alone = ufm.simulate(grid.cell(g), AGD(2.0), runs=2, seed=1, steps=20, start=starts.agd())
        for a, b in zip(together.factors, alone.factors, strict=True):
            assert a[3 * g : 3 * g + 2] == pytest.approx(b, rel=1e-12)


def test_no_gradient_no_step() -> None:
    """A factor without gradient stays, one of size 1e-150 does not divide by zero, and nothing becomes NaN."""
    problem = Problem([2, 2], width=3, features="free", lam_w=0.0, lam_h=0.0)
    zero = [np.zeros((1, 3, 2)), np.zeros((1, 2, 3))]
    last = walk(problem, AGD(), zero, 3, 3)[-1]
    assert all(np.all(x == 0) for x in last.factors)
    assert last.time == 0
    H = np.zeros((1, 3, 2))
    W = np.random.default_rng(0).standard_normal((1, 2, 3))  # with H = 0 only H has a gradient
    after = walk(problem, AGD(), [H, W], 1)[-1]
    assert np.array_equal(after.factors[1], W)
    assert np.any(after.factors[0] != 0)
    tiny = walk(problem, AGD(), [1e-150 * np.ones((1, 3, 2)), 1e-150 * W], 3, 3)[-1]
    assert all(np.all(np.isfinite(x)) for x in tiny.factors)


def test_small_logarithms_keep_their_digits() -> None:
    """eta = log((1 + sqrt(1 + 4G))/2) = G - 3G^2/2 + ... also where G is below 1e-16: then a step is gain G/L sigma g/||g||."""
    problem = Problem([1, 1], width=2, features="free", loss=ufm.MSE(), lam_w=1e-20, lam_h=0.0)
    W = np.array([[[3.0, 4.0], [0.0, 0.0]]])
    H = np.zeros((1, 2, 2))
    frame = weighted(problem)
    rule, x = AGD(), frame.from_factors([H, W])
    sigma, time = rule.start(frame, x, np.arange(1))
    assert sigma == pytest.approx(np.ones((1, 2)))  # N = d = K
    far = replace(frame, objective=replace(frame.objective, column_weight=0.0 * frame.objective.column_weight))
    _, (_, time) = rule.advance(far, x, (sigma, time))
    assert time == pytest.approx(5e-20 / 2, rel=1e-12, abs=0)


@pytest.mark.parametrize("width", [1, 4])
def test_a_trained_bias_is_refused(width: int) -> None:
    """One sentence; a classifier of width 1 is no bias."""
    problem = Problem([3, 2], width=width, features="free", lam_w=0.1, lam_h=0.1, lam_b=0.0)
    with pytest.raises(ValueError, match=r"^rules.AGD: the problem has a trained bias, but AGD moves matrices only; use lam_b=None"):
        ufm.simulate(problem, AGD(), steps=1)
    ufm.simulate(replace(problem, lam_b=None), AGD(), steps=1)


HELD = Problem([6, 6, 6], width=4, features="free", lam_w=0.0, lam_h=0.0)
CLASSIFIER = ufm.frames.simplex_etf(3, 4)[None]


def test_only_trained_matrices_count() -> None:
    """With W held, L is 1 and G that of the features, by the shapes of the coordinates; a bias that is not trained is no bias."""
    full = weighted(HELD)
    features = full.shapes[0][0] * full.shapes[0][1]

    class Held(Coordinates):
        def gradient(self, x: Any) -> Any:
            return full.gradient(full.pack([x.reshape(1, *full.shapes[0]), CLASSIFIER]))[:, :features]

    chain = Chain(1, bias=True)
    held = Held(replace(full.objective, chain=chain), full.unit, None, full.scales, full.shapes[:1], full.lower[:features], bounded=False)
    H = np.random.default_rng(0).standard_normal((1, 4, 3))
    x = held.pack([H])
    g = held.gradient(x)
    size = np.linalg.norm(g)
    eta = log(0.5 * (1 + sqrt(1 + 4 * sqrt(18 / 4) * size)))
    expected = x - 2.0 * eta * sqrt(18 / 4) * g / size
    rule = AGD(2.0)
    got, state = rule.advance(held, x.copy(), rule.start(held, x, np.arange(1)))
    assert got == pytest.approx(expected, rel=1e-13)
    assert rule.clock(state, 1).time == pytest.approx(2.0 * eta, rel=1e-13)


def test_equality_of_options() -> None:
    assert AGD(10) == AGD(10.0) != AGD()


# --- the start -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["means", "samples"])
@pytest.mark.parametrize("depth", [1, 3])
def test_start_has_the_modular_size(columns: Any, depth: int) -> None:
    """All singular values of H diag(m)^{1/2} are scale sqrt(N/d), those of W_l scale, of W_L scale sqrt(K/d)."""
    problem = Problem([[9, 5, 1], [5, 5, 5]], width=6, depth=depth, features="free", lam_w=0.1, lam_h=0.1, columns=columns)
    H, *weights = starts.first_factors(problem, starts.agd(0.7), 2, 0, chain_of(problem))
    root = np.repeat(np.sqrt(problem.multiplicity), 2, axis=0)[:, None, :]
    for x, sigma in ((H * root, sqrt(15 / 6)), *((W, sqrt(W.shape[1] / W.shape[2])) for W in weights)):
        s = np.linalg.svd(x, compute_uv=False)
        assert s == pytest.approx(np.full(s.shape, 0.7 * sigma), rel=1e-13)


def test_start_of_samples_is_orthogonal_rows_and_columns() -> None:
    """Stored N x d with N >= d, the features have orthogonal columns of norm sqrt(N/d); the draw is that of `orthogonal`."""
    problem = Problem([40, 40], width=8, features="free", lam_w=0.1, lam_h=0.1, columns="samples")
    chain = chain_of(problem)
    H, W = (x[0] for x in starts.first_factors(problem, starts.agd(), 1, 5, chain))
    assert H @ H.T == pytest.approx(10 * np.eye(8), abs=1e-13)
    assert W @ W.T == pytest.approx(np.eye(2) / 4, abs=1e-15)
    bare = starts.first_factors(problem, starts.orthogonal(), 1, 5, chain)
    assert pytest.approx(sqrt(10) * bare[0][0], rel=1e-14) == H
