"""Every rule against a slow and obvious run of the same thing: torch's optimisers sample by sample, SciPy's integrator, textbook loops."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import plain
from catalog import LIBRARIES, PROBLEMS, factors, to_library
from test_objective import on, torch_parts
from ufm import rules
from ufm.arrays import device_of, norm, to_numpy
from ufm.coordinates import Coordinates, weighted
from ufm.dynamics import Snapshot, iterate
from ufm.problem import Problem
from ufm.rules import AGD, TABLE, Adam, GradientDescent, GradientFlow, StabilisedFlow

EACH = pytest.mark.parametrize("problem", [p for _, p in PROBLEMS], ids=[n for n, _ in PROBLEMS])
SIZES: dict[str, Any] = dict(width=4, lam_w=0.02, lam_h=0.01)
PLAIN = Problem([5, 3, 2], features="free", lam_b=0.05, **SIZES)
RELU = Problem([5, 3, 2], features="relu", **SIZES)


FLOW: dict[str, Any] = dict(rtol=1e-9, atol=1e-10)


def walk(problem: Problem, rule: Any, at: Any, steps: int, every: int = 1) -> list[Snapshot]:
    """The snapshots of a rule from factors (B, rows, cols) each."""
    return list(iterate(problem, rule, at, steps=steps, every=every))


def end(problem: Problem, rule: Any, at: Any, steps: int) -> Any:
    return walk(problem, rule, at, steps, steps)[-1].factors


def ends(path: list[Snapshot]) -> list[Any]:
    """Where each run of a path ended, factor by factor."""
    last = {int(run): [f[i] for f in s.factors] for s in path for i, run in enumerate(s.runs)}
    assert sorted(last) == list(range(len(last)))
    return [np.stack([last[run][i] for run in range(len(last))]) for i in range(len(path[0].factors))]


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Factor by factor the same, to `tolerance` of the largest entry of the factor."""
    for mine, theirs in zip(got, expected, strict=True):
        mine, theirs = to_numpy(mine), to_numpy(theirs)
        assert mine.shape == theirs.shape
        assert np.max(np.abs(mine - theirs)) <= tolerance * max(np.max(np.abs(theirs)), 1e-3)


def by_sample(problem: Problem, cell: int, run: Any) -> tuple[Problem, list[Any]]:
    """One run as the run of a problem of samples, those of a class starting equal."""
    if problem.columns == "samples":
        return problem, list(run)
    samples, at = plain.expanded(problem, cell, run)
    return samples, [np.array(x, dtype=np.float64) for x in at]


class HeavyBall:
    """x + mu (x - previous) - step g, entry by entry, with the interface of torch's optimisers."""

    def __init__(self, leaves: Any, step: float, momentum: float) -> None:
        self.leaves, self.eta, self.mu = leaves, step, momentum
        self.previous = [x.detach().clone() for x in leaves]

    def zero_grad(self) -> None:
        for x in self.leaves:
            x.grad = None

    def step(self) -> None:
        for i, x in enumerate(self.leaves):
            before = x.detach().clone()
            x.data = before - self.eta * x.grad + self.mu * (before - self.previous[i])
            self.previous[i] = before


def torch_run(problem: Problem, cell: int, run: Any, optimiser: Callable[[Any], Any], steps: int, scale: Any = 1.0) -> list[Any]:
    """Factors after `steps` of a torch optimiser on torch's own F; features are `scale` times the first leaf, clamped at 0 after steps."""
    import torch

    first, *others = run
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (first / scale, *others)]
    optimise = optimiser(leaves)
    for _ in range(steps):
        optimise.zero_grad()
        sum(torch_parts(problem, cell, [leaves[0] * torch.as_tensor(scale), *leaves[1:]])).backward()
        optimise.step()
        if problem.features == "relu":
            leaves[0].data.clamp_(min=0)
    return [leaves[0].detach().numpy() * scale, *(x.detach().numpy() for x in leaves[1:])]


# --- descent -------------------------------------------------------------------------------------------------------------------------


def sgd_run(problem: Problem, run: Any, step: float, momentum: float, steps: int) -> Any:
    """What a user writes in torch: SGD with weight decay on the mean cross-entropy of all samples, H clamped at 0."""
    import torch

    problem, run = by_sample(problem, 0, run)
    leaves = [torch.tensor(x, requires_grad=True) for x in run]
    decay = [problem.lam_h[0], *problem.lam_w[0], *([] if problem.lam_b is None else problem.lam_b)]
    groups = [{"params": [x], "weight_decay": float(lam)} for x, lam in zip(leaves, decay, strict=True)]
    optimiser = torch.optim.SGD(groups, lr=step, momentum=momentum)
    labels = torch.tensor(problem.labels[0].copy())
    for _ in range(steps):
        optimiser.zero_grad()
        Z = leaves[1] @ leaves[0]
        torch.nn.functional.cross_entropy((Z + leaves[2] if len(leaves) > 2 else Z).T, labels).backward()
        optimiser.step()
        if problem.features == "relu":
            leaves[0].data.clamp_(min=0)
    return [x.detach().numpy() for x in leaves]


@pytest.mark.parametrize("columns", ["means", "samples"])
@pytest.mark.parametrize(("problem", "momentum"), [(PLAIN, 0.0), (PLAIN, 0.9), (RELU, 0.0)], ids=["free", "momentum", "relu"])
def test_descent_is_sgd_with_weight_decay(problem: Problem, momentum: float, columns: Any) -> None:
    """1,000 steps of torch's SGD on all samples, to 1e-12: on class means and on samples, with momentum, and with H clamped at 0."""
    at = factors(problem)
    one = replace(problem, columns=columns)
    samples = by_sample(problem, 0, [x[0] for x in at])[1]
    expected = sgd_run(problem, [x[0] for x in at], 0.3, momentum, 1000)
    begin = at if columns == "means" else [x[None] for x in samples]
    got = [x[0] for x in end(one, GradientDescent(0.3, momentum), begin, 1000)]
    close(by_sample(one, 0, got)[1], expected, 1e-12)
    assert problem.features != "relu" or np.any(expected[0] == 0)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_projected_heavy_ball(momentum: float) -> None:
    """x_{t+1} = P(x_t - eta g + mu (x_t - x_{t-1})), the momentum that of the projected points: a loop in numpy, gradient by hand."""
    at, n = factors(RELU), RELU.counts[0]
    H, W = at[0][0], at[1][0]
    H0, W0 = H, W
    for _ in range(1000):
        E = np.exp(W @ H)
        P = (E / E.sum(axis=0) - np.eye(3)) * n / n.sum()
        g_h, g_w = (W.T @ P) / n + 0.01 * H, P @ H.T + 0.02 * W  # per sample: the step on H' is this one on H
        H, H0 = np.maximum(H - 0.1 * g_h + momentum * (H - H0), 0), H
        W, W0 = W - 0.1 * g_w + momentum * (W - W0), W
    assert np.any(H == 0)
    close([x[0] for x in end(RELU, GradientDescent(0.1, momentum), at, 1000)], [H, W], 1e-12)


@pytest.mark.parametrize("columns", ["means", "samples"])
@pytest.mark.parametrize("problem", [PLAIN, RELU], ids=["free", "relu"])
@pytest.mark.parametrize(("epsilon", "steps"), [(1e-3, 1000), (1e-8, 150)])
def test_adam_is_torchs(problem: Problem, columns: Any, epsilon: float, steps: int) -> None:
    """torch.optim.Adam on H' = H diag(m)^{1/2} of class means, or on H of samples, then clamped at 0, to 1e-12.

    Near an optimum a small epsilon divides rounding by rounding, and no two programs go on alike; 1,000 steps need a large one.
    """
    import torch

    one = replace(problem, columns=columns)
    at, rule = factors(one), Adam(0.01, 0.8, 0.95, epsilon)

    def optimiser(leaves: Any) -> Any:
        return torch.optim.Adam(leaves, lr=0.01, betas=(0.8, 0.95), eps=epsilon)

    expected = torch_run(one, 0, [x[0] for x in at], optimiser, steps, 1 / np.sqrt(one.multiplicity[0]))
    close([x[0] for x in end(one, rule, at, steps)], expected, 1e-12)


def test_adams_defaults_are_torchs() -> None:
    import torch

    defaults = torch.optim.Adam([torch.zeros(1)]).defaults
    assert (Adam().step, (Adam().beta1, Adam().beta2), Adam().epsilon) == (defaults["lr"], defaults["betas"], defaults["eps"])


def heavy_ball(step: float, momentum: float) -> Callable[[Any], Any]:
    return lambda leaves: HeavyBall(leaves, step, momentum)


@EACH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_five_steps_of_descent(problem: Problem, momentum: float) -> None:
    """Class means move as their samples do in a loop over torch's automatic derivatives, on every problem; F is that of `plain`."""
    at = factors(problem)
    last = walk(problem, GradientDescent(0.05, momentum), at, 5, 5)[-1]
    for cell in range(problem.cells):
        samples, run = by_sample(problem, cell, [x[cell] for x in at])
        expected = torch_run(samples, cell, run, heavy_ball(0.05, momentum), 5)
        close(by_sample(problem, cell, [x[cell] for x in last.factors])[1], expected, 1e-12)
        assert last.value[cell] == pytest.approx(plain.value(samples, cell, expected), rel=1e-12)
        assert last.time[cell] == 5 * 0.05


@EACH
def test_five_steps_of_adam(problem: Problem) -> None:
    """torch.optim.Adam on torch's own F of the weighted features, on every problem."""
    import torch

    at = factors(problem)
    last = walk(problem, Adam(0.05), at, 5, 5)[-1]
    for cell in range(problem.cells):
        scale = 1 / np.sqrt(problem.multiplicity[cell])
        expected = torch_run(problem, cell, [x[cell] for x in at], lambda leaves: torch.optim.Adam(leaves, lr=0.05), 5, scale)
        close([x[cell] for x in last.factors], expected, 1e-9)
        assert last.value[cell] == pytest.approx(plain.value(problem, cell, expected), rel=1e-9)
        assert last.time[cell] == 5 * 0.05


MEANS = {
    "deep": dict(width=4, depth=3, features="free"),
    "bias": dict(width=4, features="free", lam_b=0.02),
    "free_bias": dict(width=4, depth=2, features="free", lam_b=0.0),
    "relu": dict(width=4, features="relu"),
    "deep_relu": dict(width=4, depth=2, features="relu"),
    "relu_chain": dict(width=4, depth=2, features="free", activation="relu"),
}


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_means_descend_as_their_samples(kind: str, momentum: float) -> None:
    """Samples of a class that start equal stay equal, and take the steps of their mean: 200 of them, to 1e-12."""
    problem = Problem([7, 4, 1], lam_w=0.01, lam_h=0.005, **MEANS[kind])
    at = factors(problem)
    samples, run = by_sample(problem, 0, [x[0] for x in at])
    rule = GradientDescent(0.1, momentum)
    means, each = walk(problem, rule, at, 200, 20), walk(samples, rule, [x[None] for x in run], 200, 20)
    for mine, theirs in zip(means, each, strict=True):
        close(by_sample(problem, 0, [x[0] for x in mine.factors])[1], [x[0] for x in theirs.factors], 1e-12)
        assert mine.value == pytest.approx(theirs.value, rel=1e-12)
        if problem.lam_b is None:  # a bias has its own scale in balanced coordinates
            assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-9)


@pytest.mark.parametrize("kind", MEANS)
def test_means_flow_as_their_samples(kind: str) -> None:
    """The flows agree to their tolerance; steps differ, as the error is a mean over other coordinates."""
    problem = Problem([7, 4, 1], lam_w=0.01, lam_h=0.005, **MEANS[kind])
    at = factors(problem)
    samples, run = by_sample(problem, 0, [x[0] for x in at])
    rule = GradientFlow(until=3.0, rtol=1e-11, atol=1e-12)
    means, each = walk(problem, rule, at, 2000, 20)[-1], walk(samples, rule, [x[None] for x in run], 2000, 20)[-1]
    assert means.time == each.time == 3.0
    close(by_sample(problem, 0, [x[0] for x in means.factors])[1], [x[0] for x in each.factors], 1e-9)


def test_adam_on_means_is_another_run() -> None:
    """Adam divides by the size of each gradient, so its steps on means are not those on samples."""
    at = factors(PLAIN)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in at])
    means, each = end(PLAIN, Adam(0.01), at, 50), end(samples, Adam(0.01), [x[None] for x in run], 50)
    assert np.max(np.abs(by_sample(PLAIN, 0, [x[0] for x in means])[1][0] - each[0][0])) > 0.05


@pytest.mark.parametrize("problem", [p for _, p in PROBLEMS[::5]], ids=[n for n, _ in PROBLEMS[::5]])
@pytest.mark.parametrize("name", TABLE)
def test_a_step_knows_the_point_and_the_state_alone(problem: Problem, name: str) -> None:
    """Both may be overwritten, but copies of them lead to the same bits, and steps stay within the bounds."""
    frame, rule = weighted(problem), RULES[name]
    if (name == "StabilisedFlow" and frame.bounded) or (name == "AGD" and problem.lam_b is not None):
        return
    x = frame.from_factors(factors(problem))
    state = rule.start(frame, x, np.arange(problem.cells))
    for _ in range(30 if name == "StabilisedFlow" else 3):
        copies = [a.copy() for a in (x, *state)]
        x, state = rule.advance(frame, x, state)
        other, following = rule.advance(frame, copies[0], tuple(copies[1:]))
        assert all(np.array_equal(a, b) for a, b in zip((x, *state), (other, *following), strict=True))
        assert np.all(x >= frame.lower)


RULES = {
    "GradientDescent": GradientDescent(0.1, 0.9),
    "Adam": Adam(0.01),
    "AGD": AGD(0.5),
    "GradientFlow": GradientFlow(rtol=1e-4),
    "StabilisedFlow": StabilisedFlow(),
}


def test_the_table_names_every_rule() -> None:
    """The public name of a rule is its name in the table; rules of equal options are equal, a step per cell included."""
    assert all(getattr(rules, name) is kind for name, kind in TABLE.items())
    assert list(RULES) == list(TABLE)
    assert GradientDescent(np.array([0.1, 0.2])) == GradientDescent([0.1, 0.2])
    assert len({GradientDescent(np.array([0.1, 0.2])), GradientDescent((0.1, 0.2)), GradientDescent(0.1)}) == 2


# --- flow ----------------------------------------------------------------------------------------------------------------------------


def torch_flow(problem: Problem, cell: int, run: Any, until: float, rtol: float = 1e-12) -> list[Any]:
    """Gradient flow of one run on samples by SciPy's integrator of order 8, gradients by torch; no projection."""
    import torch

    shapes = [x.shape for x in run]
    cuts = np.cumsum([x.size for x in run])[:-1]

    def field(_: float, y: Any) -> Any:
        leaves = [torch.tensor(part.reshape(s), requires_grad=True) for part, s in zip(np.split(y, cuts), shapes, strict=True)]
        sum(torch_parts(problem, cell, leaves)).backward()
        return -np.concatenate([x.grad.numpy().ravel() for x in leaves])

    found = solve_ivp(field, (0, until), np.concatenate([x.ravel() for x in run]), method="DOP853", rtol=rtol, atol=rtol, t_eval=[until])
    return [part.reshape(s) for part, s in zip(np.split(found.y[:, -1], cuts), shapes, strict=True)]


SMOOTH = [(n, p) for n, p in PROBLEMS if p.activation == "linear" and p.features != "relu_of_free" and "autograd" not in n][::5]


@pytest.mark.parametrize("problem", [p for _, p in SMOOTH], ids=[n for n, _ in SMOOTH])
def test_flow_is_scipys(problem: Problem) -> None:
    """The flow of class means is that of their samples, to the tolerance asked for."""
    H, *others = factors(problem)
    at = [H + 0.5 if problem.features == "relu" else H, *others]
    path = walk(problem, GradientFlow(until=0.5, **FLOW), at, 2000, 20)
    assert path[-1].step < 2000
    cell = problem.cells - 1
    samples, run = by_sample(problem, cell, [x[cell] for x in at])
    close(by_sample(problem, cell, [x[cell] for x in ends(path)])[1], torch_flow(samples, cell, run, 0.5, 1e-10), 1e-8)


def test_flow_over_a_long_time() -> None:
    at = factors(PLAIN)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in at])
    got = walk(PLAIN, GradientFlow(until=100.0, rtol=1e-10, atol=1e-11), at, 20_000, 50)[-1].factors
    close(by_sample(PLAIN, 0, [x[0] for x in got])[1], torch_flow(samples, 0, run, 100.0), 1e-9)


def test_flow_converges_with_its_tolerance() -> None:
    """The error is in proportion to rtol (a little better), and the number of steps grows like rtol^{-1/5}."""
    at = factors(PLAIN)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in at])
    exact = torch_flow(samples, 0, run, 10.0)
    error, steps = [], []
    tolerances = 10.0 ** -np.arange(5, 12)
    for rtol in tolerances:
        path = walk(PLAIN, GradientFlow(until=10.0, rtol=rtol, atol=rtol), at, 20_000)
        error.append(
            max(np.max(np.abs(a - b)) for a, b in zip(by_sample(PLAIN, 0, [x[0] for x in path[-1].factors])[1], exact, strict=True))
        )
        steps.append(path[-1].step)
    assert np.all(np.array(error) < 30 * tolerances)
    assert 0.9 < np.polyfit(np.log(tolerances), np.log(error), 1)[0] < 1.3
    assert -0.23 < np.polyfit(np.log(tolerances), np.log(steps), 1)[0] < -0.15


def test_one_flow_step_has_order_five() -> None:
    """Halving a step divides the error of one step by 2^6."""
    at = factors(PLAIN)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in at])
    frame, rule, errors = weighted(PLAIN), GradientFlow(rtol=1.0, atol=1e9), []  # every step is kept
    for h in (0.8, 0.4, 0.2):
        x = frame.from_factors(at)
        time, _, field = rule.start(frame, x, np.arange(1))
        new, (time, *_) = rule.advance(frame, x, (time, np.full((1, 1), h), field))
        assert time == h
        exact = torch_flow(samples, 0, run, h, 1e-13)
        errors.append(
            max(np.max(np.abs(a - b)) for a, b in zip(by_sample(PLAIN, 0, [f[0] for f in frame.to_factors(new)])[1], exact, strict=True))
        )
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx(6.0, abs=0.4)


STEP = Problem([100, 100, 1, 1], width=4, features="relu", lam_w=1e-2, lam_h=1e-4)


def test_flow_descends() -> None:
    """F rises in no step, with and without bounds, at any tolerance; in ReLU chains at the default one, as larger steps jump over kinks."""
    chain = replace(STEP, depth=3, lam_w=1e-2, activation="relu", features="free")
    for problem, rtol in ((STEP, 1e-2), (STEP, 1e-6), (replace(STEP, features="free"), 1e-2), (chain, 1e-6)):
        at = [np.concatenate([factors(problem, seed=seed)[i] for seed in range(8)]) for i in range(problem.depth + 1)]
        path = walk(problem.pick([0] * 8), GradientFlow(until=100.0, rtol=rtol), at, 400)
        value = np.full((8, len(path)), np.nan)
        for t, s in enumerate(path):
            value[s.runs, t] = s.value
        assert np.nanmax(np.diff(value, axis=1)) <= 1e-14


def test_projected_flow_is_the_limit_of_projected_descent() -> None:
    """Extrapolated from two steps of descent; entries hit the bound, stay while the gradient points out, and leave when it turns."""
    runs, until, tight = 48, 8.0, Problem([4, 4, 4], width=3, features="relu", lam_w=1e-2, lam_h=1e-3)
    H, W = [np.concatenate([factors(tight, seed=seed, scale=1.5)[i] for seed in range(runs)]) for i in range(2)]
    at = [H * (np.random.default_rng(0).random(H.shape) < 0.5), W]
    flow = walk(tight.pick([0] * runs), GradientFlow(until=until, rtol=1e-7), at, 20_000)
    steps = np.repeat([1 / 128, 1 / 256], runs)
    twice = walk(
        tight.pick([0] * 2 * runs), GradientDescent(steps), [np.concatenate([x, x]) for x in at], round(until * 256), round(until * 128)
    )
    for got, coarse, fine in zip(ends(flow), twice[1].factors, twice[2].factors, strict=True):
        error = np.max(np.abs(got - (2 * fine[runs:] - coarse[:runs])), axis=(1, 2))
        assert np.max(error) <= 1e-3, np.sort(error)[-8:]
        assert np.median(error) <= 1e-4

    hit = left = held = late = 0
    for before, after in pairwise(flow):
        stay = np.isin(before.runs, after.runs)
        frame = weighted(tight.pick([0] * int(stay.sum())))
        x, y = frame.from_factors([f[stay] for f in before.factors]), frame.from_factors(after.factors)
        bound = np.isfinite(frame.lower)
        outward = bound & (x == 0) & (frame.gradient(x) > 0) & (frame.gradient(y) > 0)
        assert np.all(y[outward] == 0)
        hit, left, held = hit + np.sum(bound & (x > 0) & (y == 0)), left + np.sum(bound & (x == 0) & (y > 0)), held + np.sum(outward)
        late = left if before.step < 10 else late
    assert min(hit, left - late) > 3, (hit, left, late)
    assert held > 1000


@pytest.mark.parametrize("until", [1e-9, 0.1, 1 / 3, 7.77])
def test_until_is_met_exactly(until: float) -> None:
    """To the last bit or one beside it, from starts of any speed, zero included; later steps change nothing."""
    at = [np.stack([0 * x[0], x[0], 1e-6 * x[0], 30 * x[0]]) for x in factors(PLAIN)]
    frame, rule = weighted(PLAIN, 4), GradientFlow(until=until)
    x = frame.from_factors(at)
    state = rule.start(frame, x, np.arange(4))
    for _ in range(600):
        x, state = rule.advance(frame, x, state)
    clock = rule.clock(state, 600)
    assert clock.done is not None
    assert np.all(clock.done)
    assert clock.time == pytest.approx(until, rel=3e-16, abs=0)
    again, state = rule.advance(frame, x, state)
    assert np.array_equal(again, x)
    assert rule.clock(state, 601).time == pytest.approx(until, rel=3e-16, abs=0)


def test_flow_starts_from_zero() -> None:
    """At zero the bias alone moves; where nothing moves the flow stands still, without a NaN."""
    zero = [0 * x for x in factors(PLAIN)]
    last = walk(PLAIN, GradientFlow(until=50.0), zero, 500, 500)[-1]
    assert last.time == 50.0
    assert np.all(last.factors[0] == 0)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in zero])
    assert last.factors[2][0] == pytest.approx(torch_flow(samples, 0, run, 50.0)[2], rel=1e-5)
    still = replace(PLAIN, lam_b=None)
    for rule in (GradientFlow(until=50.0), GradientFlow()):
        with np.errstate(over="ignore", invalid="ignore"):
            last = walk(still, rule, zero[:2], 500, 500)[-1]
        assert np.all(last.factors[0] == 0)
        assert np.isfinite(last.value)


# --- libraries and devices -----------------------------------------------------------------------------------------------------------


def steps_on(frame: Coordinates, rule: Any, x: Any, steps: int) -> tuple[Any, Any]:
    state = rule.start(frame, x, np.arange(x.shape[0]))
    for _ in range(steps):
        x, state = rule.advance(frame, x, state)
    return x, rule.clock(state, steps)


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "numpy"])
@pytest.mark.parametrize("name", TABLE)
def test_every_library_takes_the_same_steps(name: str, library: str) -> None:
    """torch, the strict reference and its second device end where numpy does, on their own device."""

    def move(x: Any) -> Any:
        return to_library(library, x)

    for problem in [p for _, p in PROBLEMS if p.loss.name != "autograd"][::6]:
        frame = weighted(problem, 2)
        if (name == "StabilisedFlow" and frame.bounded) or (name == "AGD" and problem.lam_b is not None):
            continue
        x, steps = frame.from_factors(factors(problem, 2)), 40 if name == "StabilisedFlow" else 4
        (expected, clock), (got, moved) = (
            steps_on(frame, RULES[name], x.copy(), steps),
            steps_on(on(move, frame), RULES[name], move(x), steps),
        )
        assert (type(got), device_of(got)) == (type(move(x)), device_of(move(x)))
        digits = 1e-9 if "Flow" in name else 1e-12  # steps of the flow follow an error estimate, which cancels
        assert to_numpy(got) == pytest.approx(expected, rel=digits, abs=digits)
        assert to_numpy(moved.time) == pytest.approx(clock.time, rel=1e-8)


@pytest.mark.parametrize("rule", [*list(RULES.values())[:4], GradientDescent(list(np.linspace(0.1, 0.4, 4)))])
def test_meta_device(rule: Any) -> None:
    """Nothing is read back or made on the default device: tensors without memory go through (StabilisedFlow reads which runs turn)."""
    torch = pytest.importorskip("torch")

    def move(x: Any) -> Any:
        return torch.asarray(np.array(x)).to("meta")

    problem = replace(RELU, counts=[[5, 3, 2], [4, 4, 2]], lam_b=None if isinstance(rule, AGD) else 0.1)
    frame = on(move, weighted(problem, 2))
    got, clock = steps_on(frame, rule, move(weighted(problem, 2).from_factors(factors(problem, 2))), 2)
    assert (got.device.type, got.dtype, got.shape) == ("meta", torch.float64, (4, len(frame.lower)))
    assert clock.time.shape == (4,)
    assert norm(got).shape == (4,)


# --- options -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GradientDescent(0.0), "rules.GradientDescent: step is 0.0, but must be a positive, finite number, or (G,) of them, one"),
        (lambda: GradientDescent(np.nan), "rules.GradientDescent: step is nan, but must be"),
        (lambda: GradientDescent(None), "rules.GradientDescent: step is None, but must be"),
        (lambda: GradientDescent(True), "rules.GradientDescent: step is True, but must be"),
        (lambda: GradientDescent("0.1"), "rules.GradientDescent: step is '0.1', but must be"),
        (lambda: GradientDescent([]), "rules.GradientDescent: step is [], but must be"),
        (lambda: GradientDescent([0.1, -0.1]), "rules.GradientDescent: step is [0.1, -0.1], but must be"),
        (lambda: GradientDescent([[0.1]]), "rules.GradientDescent: step is [[0.1]], but must be"),
        (lambda: GradientDescent([[1], [2, 3]]), "rules.GradientDescent: step is [[1], [2, 3]], but must be"),
        (lambda: GradientDescent(0.1, 1.0), "rules.GradientDescent: momentum is 1.0, but must lie between 0 and 1"),
        (lambda: GradientDescent(0.1, -0.1), "rules.GradientDescent: momentum is -0.1, but must lie between 0 and 1"),
        (lambda: GradientDescent(0.1, True), "rules.GradientDescent: momentum is True, but must lie between 0 and 1"),
        (lambda: GradientDescent(0.1, "0.9"), "rules.GradientDescent: momentum is '0.9', but must lie between 0 and 1"),
        (lambda: Adam(-1.0), "rules.Adam: step is -1.0, but must be"),
        (lambda: Adam(beta1=1.0), "rules.Adam: beta1 is 1.0, but must lie between 0 and 1"),
        (lambda: Adam(beta2=np.nan), "rules.Adam: beta2 is nan, but must lie between 0 and 1"),
        (lambda: Adam(epsilon=0.0), "rules.Adam: epsilon is 0.0, but must lie between 0 and inf"),
        (lambda: AGD(0.0), "rules.AGD: gain is 0.0, but must lie between 0 and inf"),
        (lambda: AGD(None), "rules.AGD: gain is None, but must lie between 0 and inf"),
        (lambda: GradientFlow(until=0.0), "rules.GradientFlow: until is 0.0, but must lie between 0 and inf"),
        (lambda: GradientFlow(until=None), "rules.GradientFlow: until is None, but must lie between 0 and inf"),
        (lambda: GradientFlow(rtol=0), "rules.GradientFlow: rtol is 0, but must lie between 0 and inf"),
        (lambda: GradientFlow(atol=np.inf), "rules.GradientFlow: atol is inf, but must lie between 0 and inf"),
        (lambda: GradientFlow(normalised=1), "rules.GradientFlow: normalised is 1, but must be True (the flow of log F) or False"),
        (lambda: StabilisedFlow(rtol=-1e-3), "rules.StabilisedFlow: rtol is -0.001, but must lie between 0 and inf"),
        (lambda: StabilisedFlow(until=0), "rules.StabilisedFlow: until is 0, but must lie between 0 and inf"),
    ],
)  # fmt: skip
def test_options_are_checked(make: Any, sentence: str) -> None:
    """One sentence: the rule, the option, what it got, and what it must be."""
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_options_at_their_limits() -> None:
    """No momentum, no memory, and no end are options; a later change of a given array changes no rule."""
    GradientDescent(np.float32(0.5), np.int64(0)), Adam(beta1=0, beta2=0), GradientFlow(until=np.inf)
    given = np.array([0.1, 0.2])
    rule = GradientDescent(given)
    given[:] = 7.0
    assert rule.step == (0.1, 0.2)
