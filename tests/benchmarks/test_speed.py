"""Ratios to what a user would otherwise run, measured in one process, one thread, in turns: `pytest tests/benchmarks -s`.

Nothing here asserts a time. Every comparison checks that both sides computed the same thing, then prints and stores their ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

import ufm
from ufm.coordinates import Coordinates, balanced, weighted
from ufm.dynamics import simulate
from ufm.solvers.hybrid import agreement, descend_and_polish
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.starts import first_factors

COUNTS = ufm.counts.exponential(10, 5000, 100)
BLOCK = 256


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int) -> tuple[float, float]:
    """The least CPU seconds of a call of each side over alternating turns; a turn is as many calls as take about 20 ms."""
    calls = (ours, theirs)
    times = []
    for call in calls:
        call()
        start = time.process_time()
        call()
        times.append(max(1, round(0.02 / (time.process_time() - start))))
    least = [np.inf, np.inf]
    for _ in range(turns):
        for side, call in enumerate(calls):
            start = time.process_time()
            for _ in range(times[side]):
                call()
            least[side] = min(least[side], (time.process_time() - start) / times[side])
    return least[0], least[1]


def report(benchmark: Any, what: str, ours: float, theirs: float) -> None:
    benchmark.extra_info |= {"ours_s": ours, "theirs_s": theirs, "ratio": theirs / ours}
    print(f"\n{what}: {1e6 * ours:.1f} against {1e6 * theirs:.1f} microseconds of CPU each, ratio {theirs / ours:.1f}")


def runs_of(width: int, runs: int) -> tuple[Coordinates, Any]:
    """K = 10, the counts of CIFAR-10-LT, ReLU features, no bias; every class alive."""
    problem = ufm.Problem(COUNTS, width=width, features="relu", lam_w=1e-3, lam_h=1e-5)
    frame = balanced(problem, runs)
    return frame, frame.from_factors(first_factors(problem, ufm.starts.balanced(), runs, 0, frame.objective.chain))


def lean_function(frame: Coordinates, width: int) -> Callable[[Any], tuple[float, Any]]:
    """Value and gradient of one run, written for that alone: what a careful user hands to SciPy."""
    K, n = len(COUNTS), COUNTS.astype(float)
    weight, scale, diagonal = n / n.sum() / frame.unit[0], 1 / np.sqrt(n), np.arange(K)

    def function(x: Any) -> tuple[float, Any]:
        H, W = x[: width * K].reshape(width, K), x[width * K :].reshape(K, width)
        Z = (W @ H) * scale
        R = Z - Z[diagonal, diagonal]
        top = R.max(axis=0)
        E = np.exp(R - top)
        S = E.sum(axis=0)
        P = E / S
        P[diagonal, diagonal] -= 1
        P *= weight * scale
        gradient = np.empty_like(x)
        np.matmul(W.T, P, out=gradient[: width * K].reshape(width, K))
        np.matmul(P, H.T, out=gradient[width * K :].reshape(K, width))
        gradient += x
        return float(weight @ (top + np.log(S)) + 0.5 * (x @ x)), gradient

    return function


def test_solving_a_thousand_relu_problems(benchmark: Any) -> None:
    """K = 10, d = 20: batched L-BFGS against a loop over SciPy's L-BFGS-B, same starts, same accuracy of the gradient."""
    width, runs = 20, 1000
    frame, x = runs_of(width, runs)
    function = lean_function(frame, width)
    bounds = [(0, None) if low == 0 else (None, None) for low in frame.lower]
    options = dict(maxiter=20_000, maxfun=40_000, ftol=0, gtol=1e-6)
    accuracy: list[float] = []

    def theirs(rows: range) -> Any:
        ends = np.stack([minimize(function, x[row], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x for row in rows])
        part = frame.pick(np.arange(rows.start, rows.stop))
        accuracy.append(float(np.median(part.scale_free_norm(ends))))
        return part.value_and_gradient(ends)[0]

    values = theirs(range(32))
    tol = accuracy[0]

    def ours(rows: range) -> Any:
        part = np.arange(rows.start, rows.stop)
        return minimise(frame.pick(part), x[part], LBFGS(tol=tol))

    assert np.median(np.abs(ours(range(32)).value / values - 1)) < 1e-10
    least = [np.inf, np.inf]
    total = 0.0
    for first in range(0, runs, BLOCK):
        rows = range(first, min(first + BLOCK, runs))
        start = time.process_time()
        found = ours(rows)
        middle = time.process_time()
        total += middle - start
        sample = range(first, min(first + 16, runs))
        theirs(sample)
        end = time.process_time()
        least = [min(least[0], (middle - start) / len(rows)), min(least[1], (end - middle) / len(sample))]
        assert np.all(frame.pick(np.arange(rows.start, rows.stop)).scale_free_norm(found.x) <= tol * 1.001)
    report(benchmark, f"a ReLU problem solved to {tol:.0e} (1,000 in {total:.2f} s)", *least)
    benchmark.pedantic(ours, args=(range(BLOCK),), rounds=3)


def test_gradient_of_the_objective(benchmark: Any) -> None:
    """K = 10, d = 40, L = 1, 10 columns: a batch against a loop over torch autograd, both on the weighted class-mean objective."""
    width, runs = 40, 48
    frame, x = runs_of(width, runs)
    N = int(COUNTS.sum())
    parts = [torch.tensor(p, requires_grad=True) for p in (s * q for s, q in zip(frame.scales, frame.unpack(x), strict=True))]
    labels, share, m = torch.arange(10), torch.tensor(COUNTS / N), torch.tensor(COUNTS.astype(float))
    leaves = [(parts[0][r].detach().requires_grad_(), parts[1][r].detach().requires_grad_()) for r in range(runs)]

    def theirs() -> list[Any]:
        for H, W in leaves:
            H.grad = W.grad = None
            losses = torch.nn.functional.cross_entropy((W @ H).T, labels, reduction="none")
            value = (share * losses).sum() + 0.5e-3 * (W * W).sum() + 0.5e-5 * (m * H * H).sum()
            value.backward()
        return [W.grad for _, W in leaves]

    def ours() -> Any:
        return frame.value_and_gradient(x)[1]

    expected = np.stack([g.numpy() for g in theirs()])
    got = frame.unpack(ours())[1] * frame.unit[:, None, None] / frame.scales[1]
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()
    a, b = in_turns(ours, theirs, 60)
    report(benchmark, "a gradient", a / runs, b / runs)
    benchmark(ours)


@pytest.mark.parametrize(("features", "momentum"), [("free", 0.0), ("relu", 0.9)], ids=["free", "relu_momentum"])
def test_descent(benchmark: Any, features: Any, momentum: float) -> None:
    """K = 10, d = 20, class means: `simulate` on a grid of one cell against a loop over runs of torch's SGD with weight decay.

    Theirs steps on H' with the fused, weighted cross-entropy; with bounds it clamps H' after every step and takes the heavy ball's
    momentum as x - x_previous, as ours does, by resetting the optimiser's buffer to the step that the clamp left.
    """
    runs, steps, eta = 146, 200, 0.2
    problem = ufm.Problem(COUNTS, width=20, features=features, lam_w=1e-3, lam_h=1e-5)
    start = first_factors(problem, ufm.starts.balanced(), runs, 0, weighted(problem).objective.chain)
    n, labels = torch.tensor(COUNTS.astype(float)), torch.arange(10)
    root, share = n.sqrt(), n / n.sum()
    rule = ufm.rules.GradientDescent(eta, momentum)

    def ours() -> Any:
        return simulate(problem, rule, runs=runs, steps=steps, every=steps, start=ufm.starts.given(start))

    def their_run(H: Any, W: Any) -> Any:
        X, W = (torch.tensor(H) * root).requires_grad_(), torch.tensor(W).requires_grad_()
        groups = [{"params": [X], "weight_decay": 1e-5}, {"params": [W], "weight_decay": 1e-3}]
        optimiser = torch.optim.SGD(groups, lr=eta, momentum=momentum)
        for _ in range(steps):
            optimiser.zero_grad()
            Z = (W @ X) / root
            torch.nn.functional.cross_entropy(Z.T, labels, weight=share, reduction="sum").backward()
            if features == "relu":
                before = X.detach().clone()
            optimiser.step()
            if features == "relu":
                X.data.clamp_(min=0)
                optimiser.state[X]["momentum_buffer"] = (before - X.detach()) / eta
        return [(X / root).detach().numpy(), W.detach().numpy()]

    def theirs(rows: range) -> Any:
        return [np.stack(parts) for parts in zip(*(their_run(start[0][r], start[1][r]) for r in rows), strict=True)]

    found, expected = ours(), theirs(range(8))
    for got, wanted in zip(found.factors, expected, strict=True):
        assert np.abs(got[:8] - wanted).max() <= 1e-10 * np.abs(wanted).max()
    assert (features == "relu") == bool(np.any(found.factors[0] == 0))
    a, b = in_turns(ours, lambda: theirs(range(1)), 15)
    report(benchmark, f"a step of descent ({features}, momentum {momentum})", a / runs / steps, b / steps)
    benchmark(ours)


GK = ufm.Problem(ufm.counts.balanced(10, 5), width=70, depth=2, features="free", lam_w=2.0**-10, lam_h=2.0**-10)  # GK25, Fig. 1


@pytest.mark.parametrize("n", [1, 5], ids=["means", "samples"])
def test_deep_descent(benchmark: Any, n: int) -> None:
    """K = 10, n = 5, d = 70, L = 2: `simulate` on class means against a loop over runs of torch autograd and SGD with weight decay,
    on class means too, or on the samples as a script of one's own would have it (from the same start, samples at their means).
    """
    runs, steps, eta, lam = 32, 500, 0.5, 2.0**-10
    start = first_factors(GK, ufm.starts.normal(1.0), runs, 0, weighted(GK).objective.chain)
    rule, labels, root = ufm.rules.GradientDescent(eta), torch.arange(10).repeat_interleave(n), (5 / n) ** 0.5

    def ours() -> Any:
        return simulate(GK, rule, runs=runs, steps=steps, every=steps, start=ufm.starts.given(start))

    def their_run(H: Any, W: Any, V: Any) -> Any:
        leaves = [torch.tensor(x).requires_grad_() for x in (np.repeat(H, n, axis=1) * root, W, V)]
        optimiser = torch.optim.SGD(leaves, lr=eta, weight_decay=lam)
        for _ in range(steps):
            optimiser.zero_grad()
            Z = leaves[2] @ (leaves[1] @ leaves[0]) / root
            torch.nn.functional.cross_entropy(Z.T, labels).backward()
            optimiser.step()
        X, *others = (x.detach().numpy() for x in leaves)
        return [X[:, ::n] / root, *others]

    def theirs(rows: range) -> Any:
        return [np.stack(parts) for parts in zip(*(their_run(*(f[r] for f in start)) for r in rows), strict=True)]

    found, expected = ours(), theirs(range(8))
    for got, wanted in zip(found.factors, expected, strict=True):
        assert np.abs(got[:8] - wanted).max() <= 1e-10 * np.abs(wanted).max()
    a, b = in_turns(ours, lambda: theirs(range(1)), 15)
    report(benchmark, f"a step of deep descent, theirs on {'means' if n == 1 else 'samples'}", a / runs / steps, b / steps)
    benchmark.pedantic(ours, rounds=3)


def collapsed(logits: Any) -> Any:
    """Whether each run ended at deep neural collapse: rank K - 1, and 1 - cos(M, I - 1 1^T/K) < 1e-4; with the ranks."""
    s = np.linalg.svd(logits, compute_uv=False)
    ranks = np.sum(s > 1e-3 * s[:, :1], axis=1)
    simplex = np.eye(10) - 0.1
    cosine = np.sum(logits * simplex, axis=(1, 2)) / np.linalg.norm(logits, axis=(1, 2)) / np.linalg.norm(simplex)
    return (ranks == 9) & (1 - cosine < 1e-4), ranks


@pytest.mark.slow
def test_end_points_of_deep_descent(benchmark: Any) -> None:
    """200 seeds of the same model, scale 1.5 (every rank from 5 to 9 occurs): the stabilised flow, and descent with a polish at
    lambda t = 0.1, against plain descent to 1e-8: collapsed or not for the same seeds, at a tenth of its gradients and less. The polish
    leaves saddles in its own way, so less is asked of it.

    Takes about half an hour, nearly all of it plain descent.
    """
    same: Any = dict(runs=200, seed=0, start=ufm.starts.normal(1.5), tol=1e-8)
    plain = ufm.rules.GradientDescent(0.5)
    slow = simulate(GK, plain, steps=200_000, every=100, **same)
    ours = {
        "stabilised flow": simulate(GK, ufm.rules.StabilisedFlow(), steps=20_000, every=10, **same),
        "descent and polish": descend_and_polish(GK, plain, handoff=0.1, **same),
    }
    kinds, ranks = collapsed(slow.logits)
    for name, found in ours.items():
        mine, my_ranks = collapsed(found.logits)
        of_kinds, of_ranks = agreement(kinds, mine), agreement(ranks, my_ranks)
        ratio = float(slow.steps.mean() / found.steps.mean())
        benchmark.extra_info |= {f"{name}: {what}": number for what, number in (("kinds", of_kinds), ("ranks", of_ranks), ("ratio", ratio))}
        print(f"\n{name}: collapsed {of_kinds}, ranks {of_ranks}, {slow.steps.mean():.0f} against {found.steps.mean():.0f} gradients")
        assert of_kinds.share >= (0.98 if name == "stabilised flow" else 0.95)
        assert ratio >= 10
    benchmark.pedantic(simulate, args=(GK, ufm.rules.StabilisedFlow()), kwargs=dict(same, runs=8, steps=20_000, every=10), rounds=1)
