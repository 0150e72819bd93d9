"""Laws of heads and radius: gradients are those of torch autograd through an SVD and of finite differences, runs those of a plain loop."""

from __future__ import annotations

import re
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import ufm
from ufm import etf, heads, starts
from ufm.arrays import place, to_numpy
from ufm.dynamics import PROBES, Snapshot, iterate, simulate
from ufm.etf_policies import AsReleased, Constant, Cumulative, Latest, Paper, Reference
from ufm.headed import coordinates
from ufm.heads import FixedETF, Learned, NearestETF, UnitRows
from ufm.losses import MSE, CrossEntropy, DotRegression, Focal
from ufm.problem import Problem
from ufm.records import NoTheory, Stop, Trajectory
from ufm.rules import AGD, Adam, GradientDescent, GradientFlow, StabilisedFlow

PAPER = NearestETF(form="full", delta=1e-3)
NOTHING: dict[str, Any] = {"features": "free", "lam_w": 0.0, "lam_h": 0.0}


def guided(head: Any = None, counts: Any = (3, 3, 3, 3), radius: float | None = 5.0, columns: Any = "samples", **others: Any) -> Problem:
    options = NOTHING | {"width": 6} | others
    return Problem(counts, head=NearestETF() if head is None else head, radius=radius, columns=columns, **options)


UNEVEN = [[4, 3, 2, 1], [1, 2, 3, 4]]
# every head, form, bias, loss, kind of counts and columns, with and without a radius, at least once
CASES: dict[str, Problem] = {
    "nearest": guided(),
    "nearest, uneven grid": guided(counts=UNEVEN),
    "nearest, class means": guided(counts=UNEVEN, columns="means"),
    "nearest, no radius": guided(radius=None, lam_h=0.02, counts=UNEVEN),
    "nearest, no radius, class means": guided(radius=None, lam_h=[0.02, 0.03], counts=UNEVEN, columns="means"),
    "paper": guided(PAPER, loss=CrossEntropy(temperature=2.0)),
    "paper, uneven": guided(PAPER, counts=UNEVEN),
    "relative delta, cumulative": guided(NearestETF(relative_delta=0.05, averaging=Cumulative()), loss=MSE()),
    "a fixed reference": guided(NearestETF(delta=0.1, prox=Reference(np.eye(6, 3)), averaging=Constant(0.3))),
    "detached": guided(NearestETF(bias="detached"), counts=UNEVEN, loss=MSE()),
    "no bias": guided(NearestETF(bias=None, averaging=Latest()), counts=UNEVEN, loss=DotRegression()),
    "dot regression": guided(counts=UNEVEN, loss=DotRegression()),
    "focal, as released": guided(NearestETF(missing=AsReleased()), loss=Focal(1.0)),
    "class weights": guided(NearestETF(weights=[1.0, 2.0, 0.5, 3.0]), counts=UNEVEN),
    "narrowest": guided(width=3),
    "square": guided(PAPER, width=4),
    "no gradient": guided(NearestETF(gradient=False), counts=UNEVEN),
    "fixed": guided(FixedETF(), counts=UNEVEN),
    "fixed, random, attached": guided(FixedETF("random", seed=3, bias="attached"), counts=UNEVEN, loss=MSE()),
    "fixed, no bias, class means": guided(FixedETF(bias=None), radius=None, lam_h=0.1, counts=UNEVEN, columns="means"),
    "unit rows": guided(UnitRows(), counts=UNEVEN),
    "unit rows, bias, class means": guided(UnitRows(), radius=None, lam_h=0.1, lam_b=0.2, counts=UNEVEN, columns="means"),
    "learned, radius, bias": guided(Learned(), lam_w=[0.1, 0.2], lam_b=0.3, counts=UNEVEN),
}
EACH = pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
NEAREST = {name: p for name, p in CASES.items() if isinstance(p.head, NearestETF)}


def started(problem: Problem, runs: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Factors (H, W[, b]) of every run; H far from any sphere, biases not 0."""
    rng = np.random.default_rng(seed)
    B, K, d = problem.cells * runs, problem.classes, problem.width
    H = (1.0 + rng.random((B, 1, problem.labels.shape[1]))) * rng.standard_normal((B, d, problem.labels.shape[1]))
    return [H, rng.standard_normal((B, K, d)), *([0.3 * rng.standard_normal((B, K, 1))] if problem.biased else [])]


# --- the oracle: one run of one cell in torch, sample by sample -------------------------------------------------------------------------


class Past(NamedTuple):
    """What a nearest-ETF head remembers: steps so far, averaged means (d, K), U."""

    t: int
    average: Any
    U: Any


NEVER = Past(0, None, None)


def summed(loss: Any, logits: Any, y: int) -> Any:
    import torch

    if isinstance(loss, MSE):
        return 0.5 * ((logits - torch.eye(len(logits), dtype=torch.float64)[y]) ** 2).sum()
    if isinstance(loss, DotRegression):
        return 0.5 * (logits[y] - 1) ** 2
    log_p = torch.log_softmax(logits / float(getattr(loss, "temperature", 1.0)), dim=0)[y]
    return -log_p if isinstance(loss, CrossEntropy) else -((1 - log_p.exp()) ** loss.gamma) * log_p


def polar(A: Any) -> Any:
    import torch

    P, _, Qt = torch.linalg.svd(A, full_matrices=False)
    return P @ Qt


def nearest_frame(head: NearestETF, Hbar: Any, past: Past) -> tuple[Any, Any]:
    """(W, U) by sections 3, 4 and 6 of the derivation, from products with M or an orthonormal basis of its range drawn by QR."""
    import torch

    d, K = Hbar.shape
    M = torch.eye(K, dtype=torch.float64) - 1 / K
    weights = torch.ones(K, dtype=torch.float64) if head.weights is None else torch.tensor(head.weights, dtype=torch.float64)
    weights = weights * K / weights.sum()
    Y = Hbar - (Hbar * weights).sum(1, keepdim=True) / K
    Y = Y / (Y**2 * weights).sum().sqrt()
    rows = np.asarray(ufm.frames.helmert(K))
    basis = M if head.form == "full" else torch.tensor(rows.T)
    data = 2 / sqrt(K - 1) * (Y * weights) @ basis
    delta = head.delta if head.relative_delta is None else head.relative_delta * 2 / (K - 1)
    if delta:
        near = past.U
        if isinstance(head.prox, Reference):
            near = torch.tensor(head.prox.U)
        elif near is None:
            near = polar(Y @ torch.tensor(rows.T)).detach()
            if head.form == "full":
                u = torch.eye(d, K, dtype=torch.float64).sum(1)
                u = u - near @ (near.T @ u)
                near = near @ torch.tensor(rows) + (u / u.norm())[:, None] / sqrt(K)
        data = data + delta * near
    U = polar(data)
    return sqrt(K / (K - 1)) * basis @ U.T, U.detach()


def oracle(problem: Problem, cell: int, trained: list[Any], past: Past) -> tuple[Any, Past, tuple[Any, ...]]:
    """F of one run, differentiable in its trained matrices (H, W, b); with the new memory and (z, W, b)."""
    import torch

    head, tau = problem.head, problem.radius
    X, counts, labels = trained[0], problem.counts[cell].tolist(), problem.labels[cell].tolist()
    m = [1 if problem.columns == "samples" else counts[y] for y in labels]
    z = [X[:, c] if tau is None else tau * X[:, c] / X[:, c].norm() for c in range(X.shape[1])]
    centre = sum(w * col for w, col in zip(m, z, strict=True)) / sum(counts)
    W, b = (trained[1], trained[2] if len(trained) > 2 else 0.0) if head.trained else (None, 0.0)
    if isinstance(head, FixedETF):
        W = torch.tensor(head.weights(problem.classes, problem.width))
    if isinstance(head, NearestETF):
        means = [sum(w * c for w, c, y in zip(m, z, labels, strict=True) if y == k) / counts[k] for k in range(len(counts))]
        batch, a = torch.stack(means, dim=1) - centre[:, None], head.averaging.rate(past.t + 1)
        average = a * batch + (0 if past.t == 0 else (1 - a) * past.average)
        W, U = nearest_frame(head, average, past)
        past = Past(past.t + 1, average.detach(), U)
        W = W if head.gradient else W.detach()
    if head.bias is not None:
        b = -(W @ centre) if head.bias == "attached" else -(W @ centre).detach()
    b = b.reshape(-1) if not isinstance(b, float) else b
    F = sum(w * summed(problem.loss, W @ col + b, y) for w, col, y in zip(m, z, labels, strict=True)) / sum(counts)
    if tau is None:
        F = F + problem.lam_h[cell] / 2 * sum(w * (col**2).sum() for w, col in zip(m, z, strict=True))
    if head.trained:
        F = F + problem.lam_w[cell, 0] / 2 * (W**2).sum() + (problem.lam_b[cell] / 2 * (b**2).sum() if problem.lam_b is not None else 0)
    return F, past, (torch.stack(z, dim=1), W, b)


def leaves(problem: Problem, factors: Any, run: int) -> list[Any]:
    import torch

    given = factors if problem.head.trained else factors[:1]
    given = [f[run] for f in given]
    if isinstance(problem.head, UnitRows):
        given[1] = given[1] / np.linalg.norm(given[1], axis=1, keepdims=True)
    return [torch.tensor(f, requires_grad=True) for f in given]


def weighted_root(problem: Problem, run: int) -> Any:
    return np.sqrt(problem.multiplicity[run])[None, :]


# --- gradients ---------------------------------------------------------------------------------------------------------------------------


@EACH
def test_blocks_of_rows_change_nothing(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient, descent and an AGD step in blocks of a row or two are those of whole matrices."""
    start = started(problem, seed=1)
    found = []
    for cached in (1 << 20, 200):
        monkeypatch.setattr("ufm.arrays.CACHED_BYTES", cached)
        frame = coordinates(problem)
        x = frame.from_factors(start)
        frame = frame.renewed(x)
        moved, gradient = np.array(x), frame.gradient(x)
        if problem.lam_b is None:
            rule = AGD(0.3)
            moved, _ = rule.advance(frame, moved, rule.start(frame, moved, np.arange(problem.cells)))
        found.append(np.stack([x, gradient, moved]))
    assert found[1] == pytest.approx(found[0], rel=1e-12, abs=1e-15)


@EACH
def test_gradient_is_that_of_autograd(problem: Problem) -> None:
    """Value, gradient in every trained part, W and b at the first and third step, features moved in between."""
    pytest.importorskip("torch")
    frame = coordinates(problem)
    pasts = [NEVER] * problem.cells
    for t in range(3):
        factors = started(problem, seed=t)
        x = frame.from_factors(factors)
        frame = frame.renewed(x)
        gradient, value, made = frame.unpack(frame.gradient(x)), frame.value(x), frame.to_factors(x)
        value_2, gradient_2 = frame.value_and_gradient(x)
        assert value_2 == pytest.approx(value, rel=1e-13)
        assert frame.unpack(gradient_2)[0] == pytest.approx(gradient[0], rel=1e-12, abs=1e-15)
        moved, step = np.array(x), np.full((len(x), 1), 0.01)
        frame.descend(moved, step)
        assert moved == pytest.approx(x - step * frame.gradient(x), rel=1e-13, abs=1e-15)
        for g in range(problem.cells):
            parts = leaves(problem, factors, g)
            F, pasts[g], (z, W, b) = oracle(problem, g, parts, pasts[g])
            F.backward()
            assert float(value[g]) == pytest.approx(F.item(), rel=1e-12)
            expected = [p.grad.numpy() for p in parts]
            expected[0] = expected[0] / weighted_root(problem, g)
            for i, (mine, other) in enumerate(zip(gradient, expected, strict=True)):
                assert mine[g] == pytest.approx(other, rel=1e-9, abs=1e-11 * np.abs(other).max()), i
            assert made[0][g] == pytest.approx(z.detach().numpy(), rel=1e-13)
            assert made[1][g] == pytest.approx(W.detach().numpy(), rel=1e-11, abs=1e-12)
            if problem.biased:
                assert made[2][g, :, 0] == pytest.approx(b.detach().numpy(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", ["nearest", "nearest, uneven grid", "nearest, class means", "paper, uneven", "square", "class weights"])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    """Of x -> F with the nearest ETF solved anew at every x, the average and the previous U held; gradient=False is the part W held."""
    problem = NEAREST[name]
    before = coordinates(problem)
    before = before.renewed(before.from_factors(started(problem, seed=1)))
    x = before.from_factors(started(problem, seed=2))
    frame, h = before.renewed(x), 1e-5
    v = np.random.default_rng(3).standard_normal(x.shape)
    ahead, behind = (before.renewed(y).value(y) for y in (x + h * v, x - h * v))
    assert np.sum(frame.gradient(x) * v, axis=1) == pytest.approx((ahead - behind) / (2 * h), rel=1e-7)
    off = replace(frame, head=replace(problem.head, gradient=False))
    direct = (frame.value(x + h * v) - frame.value(x - h * v)) / (2 * h)
    assert np.sum(off.gradient(x) * v, axis=1) == pytest.approx(direct, rel=1e-7)
    assert np.abs(off.gradient(x) - frame.gradient(x)).max() > 1e-3 * np.abs(frame.gradient(x)).max()


def test_at_exact_collapse_the_gradient_is_finite_and_through_w_nothing_comes() -> None:
    """Features on an ETF: W is theirs, the loss at its floor, the gradient zero with and without the part through W."""
    problem = guided(counts=[3] * 5, width=7)
    M = ufm.frames.simplex_etf(5, 7).T[None]
    frame = coordinates(problem)
    x = frame.from_factors([np.repeat(M, 3, axis=2)])
    for _ in range(3):
        frame = frame.renewed(x)
        assert frame.value(x) == pytest.approx(np.log1p(4 * np.exp(-5 * 5 / 4)), rel=1e-13)
        assert np.abs(frame.gradient(x)).max() < 1e-15
        assert frame.to_factors(x)[1][0] == pytest.approx(M[0].T, abs=1e-14)


def test_the_guard_is_the_head_s() -> None:
    """guard reaches `etf.pullback`: it bounds the gradient where two classes coincide, and 0 is the exact one."""
    size = []
    for guard in (0.0, 0.05):
        problem = guided(NearestETF(form="full", delta=1e-6, guard=guard))
        H = started(problem)[0]
        H[:, :, 3:6] = H[:, :, :3] + 1e-9
        frame = coordinates(problem)
        x = frame.from_factors([H])
        size.append(float(np.linalg.norm(frame.renewed(x).gradient(x))))
    assert size[0] > 1e3 * size[1]


@pytest.mark.parametrize("law", [Paper(), Constant(0.2), Cumulative(), Latest()], ids=lambda law: type(law).__name__)
def test_the_running_average(law: Any) -> None:
    """Step s weighs a_s (1 - a_{s+1}) ... (1 - a_t); with the paper's law 2s/(t(t+1)); W is the nearest ETF to that average."""
    problem = guided(NearestETF(averaging=law), counts=UNEVEN)
    frame = coordinates(problem)
    seen = []
    for t in range(1, 7):
        x = frame.from_factors(started(problem, seed=t))
        frame = frame.renewed(x)
        z = frame.to_factors(x)[0]
        means = np.stack([[z[g][:, problem.labels[g] == k].mean(axis=1) for k in range(4)] for g in range(2)]).transpose(0, 2, 1)
        seen.append(means - z.mean(axis=2, keepdims=True))
    a = [law.rate(t) for t in range(1, 7)]
    weights = [a[s] * np.prod([1 - later for later in a[s + 1 :]]) for s in range(6)]
    if isinstance(law, Paper):
        assert weights == pytest.approx([2 * s / 42 for s in range(1, 7)], rel=1e-14)
    expected = sum(w * h for w, h in zip(weights, seen, strict=True))
    assert frame.guide is not None
    assert frame.guide.average.means == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert frame.guide.average.t == 6
    assert frame.guide.nearest.W == pytest.approx(etf.nearest(expected).W, abs=1e-11)


# --- runs --------------------------------------------------------------------------------------------------------------------------------


def plain_run(problem: Problem, cell: int, factors: Any, run: int, rule: Any, steps: int) -> tuple[list[float], list[Any]]:
    """F at every step and the trained matrices at the end, one run at a time; Adam's and Polyak's formulas on the matrices."""
    import torch

    parts = leaves(problem, factors, run)
    root = [torch.tensor(weighted_root(problem, run)), *([torch.ones(1, dtype=torch.float64)] * 2)]
    memory = [[torch.zeros_like(p), torch.zeros_like(p)] for p in parts]
    past, values = NEVER, []
    for t in range(steps + 1):
        F, past, _ = oracle(problem, cell, parts, past)
        values.append(F.item())
        if t == steps:
            return values, parts
        F.backward()
        moved = []
        for i, p in enumerate(parts):
            x, g = p.detach() * root[i], p.grad / root[i]
            if isinstance(rule, Adam):
                memory[i][0] = rule.beta1 * memory[i][0] + (1 - rule.beta1) * g
                memory[i][1] = rule.beta2 * memory[i][1] + (1 - rule.beta2) * g**2
                m, v = memory[i][0] / (1 - rule.beta1 ** (t + 1)), memory[i][1] / (1 - rule.beta2 ** (t + 1))
                new = x - rule.step * m / (v.sqrt() + rule.epsilon)
            else:
                new = x - rule.step * g + (rule.momentum * (x - memory[i][0]) if t else 0.0)
                memory[i][0] = x
            if i == 1 and isinstance(problem.head, UnitRows):
                new = new / new.norm(dim=1, keepdim=True)
            moved.append((new / root[i]).requires_grad_())
        parts = moved
    raise AssertionError


@pytest.mark.parametrize("rule", [GradientDescent(0.3, 0.9), Adam(0.05)], ids=["momentum", "adam"])
@EACH
def test_steps_are_those_of_a_plain_loop(problem: Problem, rule: Any) -> None:
    """Four steps of every run of a grid, F at each and the features at the end, against one run at a time in torch."""
    pytest.importorskip("torch")
    factors = started(problem, runs=2)
    found = simulate(problem, rule, runs=2, steps=4, every=1, start=starts.given(factors))
    rows = problem.pick(np.repeat(np.arange(problem.cells), 2))
    for b in range(rows.cells):
        values, ends = plain_run(rows, b, factors, b, rule, 4)
        assert found.value[b] == pytest.approx(values, rel=1e-9)
        X = ends[0].detach().numpy()
        z = X if problem.radius is None else problem.radius * X / np.linalg.norm(X, axis=0)
        assert found.factors[0][b] == pytest.approx(z, rel=1e-8, abs=1e-8)
        for mine, end in zip(found.factors[1:], ends[1:], strict=False):
            assert mine[b] == pytest.approx(end.detach().numpy(), rel=1e-8, abs=1e-8)


def rows_of(found: Trajectory, runs: Any) -> tuple[Any, ...]:
    return (found.value[runs], found.gradient_norm[runs], np.array(found.stop)[runs], *(f[runs] for f in found.factors), found.logits[runs])


@EACH
def test_runs_do_not_depend_on_their_company(problem: Problem) -> None:
    """Alone or in a grid, and where others leave early: the same numbers."""
    grid = problem.pick([0, 0, problem.cells - 1])
    options: dict[str, Any] = {"steps": 40, "every": 8, "probes": ["nc1"]}
    free = simulate(grid, GradientDescent(0.5), runs=2, seed=[1, 2, 3], **options)
    tol = float(np.sort(free.gradient_norm.min(axis=1))[2:4].mean())
    found = simulate(grid, GradientDescent(0.5), runs=2, seed=[1, 2, 3], tol=tol, **options)
    assert len(set(found.stop)) == 2
    for g in range(3):
        alone = simulate(grid.cell(g), GradientDescent(0.5), runs=2, seed=g + 1, tol=tol, **options)
        for mine, other in zip(rows_of(found, slice(2 * g, 2 * g + 2)), rows_of(alone, slice(None)), strict=True):
            assert np.array_equal(mine, other) if mine.dtype == object else np.allclose(mine, other, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["nearest, no radius", "paper", "unit rows, bias, class means"])
def test_a_run_that_diverges_leaves_the_others_alone(name: str) -> None:
    """A far too long step for one cell: DIVERGED, and the other as it is alone; the same on torch."""
    problem = replace(CASES[name], radius=None, loss=MSE()).pick([0, 0])
    for device in ("numpy", "cpu"):
        found = simulate(problem, GradientDescent([1e9, 0.05]), steps=60, every=5, device=device)
        assert found.stop == (Stop.DIVERGED, Stop.STEPS)
        alone = simulate(problem.cell(1), GradientDescent(0.05), steps=60, every=5, device=device)
        assert found.value[1] == pytest.approx(alone.value[0], rel=1e-11)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@EACH
def test_torch_takes_the_same_steps(problem: Problem, device: str) -> None:
    pytest.importorskip("torch")
    for rule in (GradientDescent(0.3, 0.5), Adam(0.01, epsilon=1e-3)):
        ours = simulate(problem, rule, steps=10, every=5, probes=["nc3"])
        theirs = simulate(problem, rule, steps=10, every=5, probes=["nc3"], device=device)
        assert theirs.value == pytest.approx(ours.value, rel=1e-10)
        assert theirs.gradient_norm == pytest.approx(ours.gradient_norm, rel=1e-8)
        for mine, other in zip((*ours.factors, ours.logits), (*theirs.factors, theirs.logits), strict=True):
            assert other.device.type == device
            assert to_numpy(other) == pytest.approx(mine, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("head", [NearestETF(), PAPER, NearestETF(gradient=False), FixedETF(), UnitRows(), Learned()], ids=lambda h: h.name)
def test_class_means_stand_for_equal_samples(head: Any) -> None:
    """Descent with momentum on class means is descent on samples that are equal within their class."""
    problem = guided(head, counts=[4, 2, 3, 1], columns="means")
    H, *rest = started(problem)
    rule, options = GradientDescent(0.4, 0.8), {"steps": 30, "every": 10}
    few = simulate(problem, rule, start=starts.given([H, *rest]), **options)
    samples = replace(problem, columns="samples")
    many = simulate(samples, rule, start=starts.given([H[:, :, samples.labels[0]], *rest]), **options)
    assert many.value == pytest.approx(few.value, rel=1e-11)
    assert many.gradient_norm == pytest.approx(few.gradient_norm, rel=1e-9)
    assert many.factors[0] == pytest.approx(few.factors[0][:, :, samples.labels[0]], rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(
    ("head", "rule"),
    [
        (NearestETF(), GradientDescent(20.0)),
        (NearestETF(gradient=False), Adam(0.05)),
        (PAPER, AGD(10.0)),
        (FixedETF("random"), AGD(10.0)),
    ],
    ids=["exact", "off", "paper", "fixed"],
)
def test_runs_reach_the_floor(head: Any, rule: Any) -> None:
    """log(1 + (K-1) exp(-tau K/(K-1))), from orthogonal starts, never below it; margins tau K/(K-1), features on the sphere."""
    problem = guided(head, counts=[3] * 10, width=12)
    found = simulate(problem, rule, runs=2, steps=1000, every=50, start=starts.orthogonal(), probes=["margins"])
    excess = found.value - np.log1p(9 * np.exp(-5 * 10 / 9))
    assert excess.min() > -1e-13
    assert np.all(excess[:, -1] < 1e-4)
    assert np.all(excess[:, -1] < 1e-3 * excess[:, 0])
    assert found.last("margins") == pytest.approx(5 * 10 / 9, abs=0.1)
    assert np.linalg.norm(found.factors[0], axis=1) == pytest.approx(5.0, rel=1e-13)
    assert np.linalg.norm(found.factors[1], axis=2) == pytest.approx(1.0, rel=1e-12)
    assert np.all(found.last("gradient_norm") < 0.1 * found.gradient_norm[:, 0])


def test_unit_rows_stay_unit_rows() -> None:
    problem = guided(UnitRows(), counts=[3] * 4, lam_b=0.0)
    seen = []
    for rule in (GradientDescent(0.5, 0.9), Adam(0.05)):
        factors = [f[0] for f in started(problem)]
        for at in iterate(problem, rule, [f[None] for f in factors], steps=20, every=1):
            assert np.linalg.norm(at.factors[1], axis=2) == pytest.approx(1.0, rel=1e-14)
            seen.append(at.value[0])
        assert seen[-1] < seen[0]


# --- what comes out ----------------------------------------------------------------------------------------------------------------------


@EACH
def test_factors_logits_and_files(problem: Problem, tmp_path: Path) -> None:
    """factors are (z, W[, b]) with logits W z + b whose loss is the last value; a file gives them back; a run can go on from them."""
    found = simulate(problem, GradientDescent(0.2), runs=2, steps=10, every=5)
    z, W, *b = found.factors
    assert len(b) == problem.biased
    assert found.logits == pytest.approx(W @ z + (b[0] if b else 0.0), rel=1e-12)
    if problem.radius is not None:
        assert np.linalg.norm(z, axis=1) == pytest.approx(problem.radius, rel=1e-13)
    if problem.head.bias is not None:
        weight = np.repeat(problem.multiplicity / problem.samples[:, None], 2, axis=0)
        assert b[0] == pytest.approx(-W @ (z @ weight[:, :, None]), rel=1e-11, abs=1e-13)
    found.save(tmp_path / "run.npz")
    again = Trajectory.load(tmp_path / "run.npz")
    assert all(np.array_equal(a, c) for a, c in zip((*found.factors, found.logits), (*again.factors, again.logits), strict=True))
    on = simulate(problem, GradientDescent(0.2), runs=2, steps=1, start=starts.given(found.factors))
    if not isinstance(problem.head, NearestETF):
        assert on.value[:, 0] == pytest.approx(found.last("value"), rel=1e-12)
        assert on.gradient_norm[:, 0] == pytest.approx(found.last("gradient_norm"), rel=1e-7)
    assert np.all(np.isfinite(on.value))


@EACH
def test_the_gradient_norm_is_that_in_the_features_as_used(problem: Problem) -> None:
    """By autograd at (z, W, b): tangent to the sphere of z and to unit rows, and the same whatever the norms of the x_c."""
    pytest.importorskip("torch")
    factors = started(problem)
    at = next(iter(iterate(problem, GradientDescent(0.1), factors, steps=1, every=1)))
    for g in range(problem.cells):
        parts = leaves(problem, [at.factors[0], *factors[1:]], g)
        F, *_ = oracle(problem, g, parts, NEVER)
        F.backward()
        slopes = [p.grad.numpy() for p in parts]
        slopes[0] = slopes[0] / weighted_root(problem, g)
        if isinstance(problem.head, UnitRows):
            W = parts[1].detach().numpy()
            slopes[1] = slopes[1] - W * np.sum(W * slopes[1], axis=1, keepdims=True)
        assert at.gradient_norm[g] == pytest.approx(np.sqrt(sum((s**2).sum() for s in slopes)), rel=1e-8)


def test_probes_see_the_head() -> None:
    """z, W and b as used, the record of `etf.nearest` beside them, run by run, also after some have left."""

    def condition(at: Snapshot) -> Any:
        assert at.nearest is not None
        assert np.array_equal(at.nearest.W, at.factors[1])
        assert len(at.nearest.method) == len(at.runs)
        assert at.statistics.means == pytest.approx(at.factors[0].reshape(len(at.runs), 6, 4, 3).mean(axis=3), rel=1e-12)
        again = etf.nearest(at.frame.guide.average.means)  # type: ignore[attr-defined]
        assert at.nearest.condition == pytest.approx(again.condition, rel=1e-9)
        back = etf.pullback(at.nearest, np.ones_like(at.factors[1]) * np.arange(6.0))
        assert back == pytest.approx(etf.pullback(again, np.ones_like(at.factors[1]) * np.arange(6.0)), rel=1e-7, abs=1e-12)
        return at.nearest.condition

    problem = guided().pick([0, 0, 0])
    found = simulate(problem, GradientDescent([0.01, 20.0, 1.0]), steps=100, every=5, tol=0.02, probes=[condition])
    assert len(set(found.steps.tolist())) > 1
    assert np.all((found.last("condition") >= 1.0) & (found.last("condition") < 3.0))
    assert next(iter(iterate(guided(FixedETF()), Adam(), started(guided()), steps=1, every=1))).nearest is None


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_takes_every_head(name: str) -> None:
    for problem in list(CASES.values())[::3]:
        found = simulate(problem, GradientDescent(0.1), runs=2, steps=4, every=2, probes=[name])
        assert found.probes[name].shape[:2] == (2 * problem.cells, 3)


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_the_stiefel_solver_takes_the_place_of_the_closed_form(device: str) -> None:
    """The same short run by pymanopt's trust regions, by name and as a function; it is handed the previous U as its start."""
    pytest.importorskip("pymanopt")
    from ufm.solvers.stiefel import nearest_etf

    handed = []

    def solve(means: Any, *, start: Any, **options: Any) -> Any:
        handed.append(start)
        return nearest_etf(means, start=start, solver="conjugate-gradient", **options)

    for head in (NearestETF(), PAPER):
        problem = guided(head).pick([0, 0])
        options: dict[str, Any] = {"steps": 3, "every": 1, "start": starts.orthogonal(), "device": device, "runs": 2}
        closed = simulate(problem, AGD(10.0), **options)
        for solver in ("stiefel", solve):
            found = simulate(replace(problem, head=replace(head, solver=solver)), AGD(10.0), **options)
            assert found.value == pytest.approx(closed.value, rel=1e-9)
            assert to_numpy(found.factors[1]) == pytest.approx(to_numpy(closed.factors[1]), abs=1e-7)
    assert len(handed) == 8
    assert handed[0] is None
    assert handed[1].shape == (4, 6, 3)


# --- heads on their own ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "d"), [(2, 1), (2, 3), (4, 3), (4, 4), (4, 9), (10, 64)])
def test_fixed_etfs(K: int, d: int) -> None:
    """Unit rows with cosines -1/(K-1); canonical M eye(K, d) from d = K on; random by seed, another for another seed."""
    gram = np.where(np.eye(K, dtype=bool), 1.0, -1 / (K - 1))
    canonical, random = FixedETF().weights(K, d), FixedETF("random").weights(K, d)
    for W in (canonical, random):
        assert W.shape == (K, d)
        assert W @ W.T == pytest.approx(gram, abs=1e-14)
    if d >= K:
        assert canonical == pytest.approx(sqrt(K / (K - 1)) * (np.eye(K) - 1 / K) @ np.eye(K, d), abs=1e-15)
    assert np.array_equal(random, FixedETF("random").weights(K, d))
    if d > 1:
        assert np.abs(random - FixedETF("random", seed=1).weights(K, d)).max() > 0.01


def test_random_fixed_etfs_are_haar() -> None:
    """The mean over seeds vanishes and no coordinate is special."""
    W = np.stack([FixedETF("random", seed=s).weights(3, 4) for s in range(4000)])
    assert np.abs(W.mean(axis=0)).max() < 5 * 0.5 / sqrt(4000)
    assert np.mean(W**2, axis=0) == pytest.approx(0.25, abs=0.02)


def test_grids_keep_head_and_radius() -> None:
    problem = guided(PAPER, counts=UNEVEN, radius=3.0)
    assert problem.cell(1).head is problem.head
    assert problem.pick([1, 0]).radius == 3.0
    assert problem.special == "head=NearestETF, radius=3"
    plain = Problem([3, 2], width=2, features="free", lam_w=0.1, lam_h=0.1)
    assert (plain.special, plain.head, plain.radius) == (None, Learned(), None)


# --- doors -------------------------------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"head": "etf"}, "Problem: head is 'etf', but must be one of ufm.heads (Learned, UnitRows, FixedETF, NearestETF), called"),
    ({"head": NearestETF}, "Problem: head is <class 'ufm.heads.NearestETF'>, but must be one of ufm.heads"),
    ({"radius": 0.0}, "Problem: radius is 0.0, but must be a positive, finite number, or None"),
    ({"radius": True}, "Problem: radius is True, but must be a positive"),
    ({"radius": [5.0]}, "Problem: radius is [5.0], but must be a positive"),
    ({"depth": 2}, "Problem: depth is 2 and features is 'free', but head=NearestETF, radius=5 needs depth=1 and features='free'; use"),
    ({"features": "relu"}, "Problem: depth is 1 and features is 'relu', but head=NearestETF, radius=5 needs depth=1"),
    ({"head": Learned(), "features": "relu"}, "Problem: depth is 1 and features is 'relu', but head=Learned, radius=5 needs depth=1"),
    ({"lam_h": 0.1}, "Problem: lam_h holds 0.1, but radius=5.0 fixes the norm of every feature column; use lam_h=0"),
    ({"lam_w": 0.2}, "Problem: lam_w holds 0.2, but head=NearestETF computes W from the features; use lam_w=0"),
    ({"head": FixedETF(), "lam_w": 0.2}, "Problem: lam_w holds 0.2, but head=FixedETF fixes W; use lam_w=0"),
    ({"head": UnitRows(), "lam_w": 0.2}, "Problem: lam_w holds 0.2, but head=UnitRows keeps every row of W at norm 1; use lam_w=0"),
    ({"lam_b": 0.0}, "Problem: lam_b holds 0.0, but head=NearestETF computes its bias, b = -W mu_G; use lam_b=None"),
    ({"width": 2}, "Problem: width is 2, but head=NearestETF needs at least 3 for an ETF of 4 classes; use width >= 3"),
    ({"head": PAPER, "width": 3}, "Problem: width is 3, but head=NearestETF needs at least 4 for an ETF of 4 classes; use width >= 4"),
    ({"head": FixedETF(), "width": 2}, "Problem: width is 2, but head=FixedETF needs at least 3 for an ETF of 4 classes"),
    ({"head": NearestETF(weights=[1.0, 2.0])}, "Problem: head=NearestETF has weights [1.0, 2.0], but needs one >= 0 for each of 4 classes"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[s[:40] for _, s in BAD])
def test_bad_problems(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(sentence)}") as caught:
        guided(**changes)
    assert "\n" not in str(caught.value)


BAD_HEADS: list[tuple[Any, dict[str, Any], str]] = [
    (FixedETF, {"rotation": "haar"}, "heads.FixedETF: rotation is 'haar', but must be one of 'canonical', 'random'"),
    (FixedETF, {"seed": -1}, "heads.FixedETF: seed is -1, but must be a whole number, at least 0"),
    (FixedETF, {"seed": 0.5}, "heads.FixedETF: seed is 0.5"),
    (FixedETF, {"bias": True}, "heads.FixedETF: bias is True, but must be one of 'attached', 'detached', None"),
    (NearestETF, {"form": "helmert"}, "heads.NearestETF: form is 'helmert', but must be one of 'reduced', 'full'"),
    (NearestETF, {"method": "qdwh"}, "heads.NearestETF: method is 'qdwh', but must be one of 'auto'"),
    (NearestETF, {"gradient": "on"}, "heads.NearestETF: gradient is 'on', but must be one of True, False"),
    (NearestETF, {"solver": "pymanopt"}, "heads.NearestETF: solver is 'pymanopt', but must be 'closed', 'stiefel' or a function"),
    (NearestETF, {"averaging": Paper}, "heads.NearestETF: averaging is <class 'ufm.etf_policies.Paper'>, but must be a policy of"),
    (NearestETF, {"missing": "fixed"}, "heads.NearestETF: missing is 'fixed', but must be a policy of ufm.etf_policies, called"),
    (NearestETF, {"delta": -1.0}, "heads.NearestETF: delta is -1.0, but must be a finite number, at least 0"),
    (NearestETF, {"delta": None}, "heads.NearestETF: delta is None, but must be a finite number"),
    (NearestETF, {"guard": float("nan")}, "heads.NearestETF: guard is nan, but must be a finite number, at least 0"),
    (NearestETF, {"relative_delta": "1"}, "heads.NearestETF: relative_delta is '1', but must be a finite number"),
]


@pytest.mark.parametrize(("head", "options", "sentence"), BAD_HEADS, ids=[s[:40] for *_, s in BAD_HEADS])
def test_bad_heads(head: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(sentence)}"):
        head(**options)


def test_what_does_not_apply_says_so() -> None:
    """solve, certify, classify and hessian in one sentence, predict as NoTheory, flows and starts without a direction at `simulate`."""
    for problem in (guided(), guided(Learned()), guided(UnitRows(), radius=None)):
        factors = [f for f in started(problem) if f is not None]
        sentence = f"solve, certify, hessian, classify: the problem has {re.escape(str(problem.special))}, but they apply to head=Learned()"
        with pytest.raises(ValueError, match=sentence):
            ufm.solve(problem)
        for call in (ufm.certify, ufm.classify, ufm.hessian):
            with pytest.raises(ValueError, match=sentence):
                call(problem, factors)
        with pytest.raises(NoTheory, match="classifier is learned and features are penalised"):
            ufm.predict(problem)
        for rule in (GradientFlow(), StabilisedFlow()):
            with pytest.raises(ValueError, match=r"^simulate: rule is .*Flow, but the problem has .*, and a flow needs head=Learned"):
                simulate(problem, rule, steps=1)
    H, W, _ = started(guided())
    with pytest.raises(ValueError, match=r"^simulate: a feature column of the start is 0, but radius=5 sets its norm"):
        simulate(guided(FixedETF(bias=None)), Adam(), steps=1, start=starts.given([np.where(np.arange(12) == 3, 0.0, H), W]))
    with pytest.raises(ValueError, match=r"^simulate: a row of W of the start is 0, but head=UnitRows sets its norm"):
        simulate(guided(UnitRows()), Adam(), steps=1, start=starts.given([H, 0.0 * W]))


def test_second_derivatives_are_refused() -> None:
    frame = coordinates(guided())
    x = frame.from_factors([place(f, "numpy") for f in started(guided())])
    with pytest.raises(ValueError, match=r"^Headed\.hessian_product: second derivatives are given for head=Learned"):
        frame.hessian_product(x, x)


def test_the_table_lists_every_head() -> None:
    assert set(heads.TABLE.values()) == {Learned, UnitRows, FixedETF, NearestETF}


def test_a_run_whose_class_means_coincide_leaves_the_others_alone() -> None:
    """Every frame is as near to equal means: the run goes on with some frame, the other is that of a batch of its own."""
    problem = ufm.Problem([3] * 4, width=5, features="free", lam_w=0, lam_h=0, head=ufm.heads.NearestETF(bias=None), columns="samples")
    H = np.random.default_rng(0).standard_normal((2, 5, 12))
    H[0] = H[0, :, :1]
    W = np.zeros((2, 4, 5))
    both = ufm.simulate(problem, ufm.rules.GradientDescent(0.1), runs=2, steps=4, start=ufm.starts.given([H, W]))
    alone = ufm.simulate(problem, ufm.rules.GradientDescent(0.1), steps=4, start=ufm.starts.given([H[1:], W[1:]]))
    assert np.all(np.isfinite(both.value))
    assert both.value[1] == pytest.approx(alone.value[0], rel=1e-12)


def test_a_run_without_a_direction_leaves_the_others_alone() -> None:
    """Where the classes that have a weight are at one place in one run, that run starts at the unit vectors' ETF."""
    problem = ufm.Problem(
        [2] * 3,
        width=4,
        features="free",
        lam_w=0,
        lam_h=0,
        head=NearestETF(weights=[1.0, 1.0, 0.0], bias=None),
        radius=2.0,
        columns="samples",
    )
    H, W = np.random.default_rng(4).normal(size=(2, 4, 6)), np.zeros((2, 3, 4))
    H[0, :, 2:4] = H[0, :, :2]
    both = ufm.simulate(problem, ufm.rules.GradientDescent(0.1), steps=4, runs=2, start=ufm.starts.given([H, W]))
    alone = ufm.simulate(problem, ufm.rules.GradientDescent(0.1), steps=4, start=ufm.starts.given([H[1:], W[1:]]))
    assert np.all(np.isfinite(both.value))
    assert both.value[1] == pytest.approx(alone.value[0], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delta": 0.1, "relative_delta": 0.1}, "heads.NearestETF: delta is 0.1 and relative_delta 0.1, but they are one number"),
        ({"weights": [1, 2, -1, 1]}, "has weights [1, 2, -1, 1], but needs one >= 0 for each of 4 classes"),
        ({"weights": [0, 0, 0, 1]}, "has weights [0, 0, 0, 1], but needs one >= 0 for each of 4 classes, all finite and two above 0"),
        ({"weights": [1, np.inf, 1, 1]}, "has weights [1, inf, 1, 1], but needs one >= 0 for each of 4 classes, all finite"),
        ({"solver": "a function"}, "heads.NearestETF: solver is 'a function', but must be 'closed', 'stiefel' or a function"),
        ({"prox": Reference(np.zeros((2, 5, 3))), "delta": 0.1}, "has a reference of 3 axes, but needs one U (d, m)"),
    ],
)
def test_head_options_are_told_at_the_door(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ufm.Problem([3] * 4, width=5, features="free", lam_w=0, lam_h=0, head=ufm.heads.NearestETF(**options), columns="samples")
