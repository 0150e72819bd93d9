"""Laws of the objective and of its balanced coordinates, tried on every problem of the catalogue.

Oracles: the loops of `plain`, torch's automatic derivatives of an F written with torch's own losses, differences, and many digits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

import plain
from catalog import LIBRARIES, PROBLEMS, autograd_ce, factors, to_library
from ufm.arrays import device_of, to_numpy
from ufm.coordinates import Coordinates, balanced
from ufm.losses import CrossEntropy
from ufm.objective import Objective, chain_of, objective
from ufm.problem import Problem

R = 2  # runs of every cell


def _without_penalties() -> list[tuple[str, Problem]]:
    """Some problems of the catalogue without the penalty of the features, of a layer, of anything, or of the first cell alone."""
    found = []
    for i, (name, p) in enumerate(PROBLEMS[::7]):
        some = p.lam_w * (np.arange(p.depth) != i % p.depth)
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("h0", {"lam_h": 0.0}),
            ("w0", {"lam_w": some}),
            ("all0", {"lam_h": 0.0, "lam_w": 0.0, "lam_b": None if p.lam_b is None else 0.0}),
            ("cell0", {"lam_h": p.lam_h * (np.arange(p.cells) > 0)}),
        ]
        found += [(f"{name}-{kind}", replace(p, **change)) for kind, change in kinds[i % 4 :: 2]]
    return found


UNPENALISED = _without_penalties()
CASES = [*PROBLEMS, *UNPENALISED]


def over(cases: list[tuple[str, Problem]]) -> Any:
    return pytest.mark.parametrize("problem", [p for _, p in cases], ids=[n for n, _ in cases])


EACH = over(CASES)
MEANS = over([(n, p) for n, p in CASES if p.columns == "means"])
NATIVE = over([(n, p) for n, p in PROBLEMS if p.loss.name != "autograd"])


def moves(problem: Problem, seed: int = 1) -> list[Any]:
    """A direction in the factors, of norm 1 in every run."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(f.shape) for f in factors(problem, R)]
    size = np.sqrt(sum(np.sum(p * p, axis=(1, 2)) for p in parts))
    return [p / size[:, None, None] for p in parts]


def step(at: Any, along: Any, size: float) -> list[Any]:
    return [f + size * v for f, v in zip(at, along, strict=True)]


def inner(a: Any, b: Any) -> Any:
    """Sum of products over all factors, per run."""
    return sum(np.sum(x * y, axis=(1, 2)) for x, y in zip(a, b, strict=True))


def same(got: Any, expected: Any, tolerance: float) -> None:
    """Equal shapes, and entries equal to `tolerance` of the largest in the array."""
    assert got.shape == expected.shape
    assert np.all(np.isfinite(got))
    assert np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected))


# --- value ---------------------------------------------------------------------------------------------------------------------------


@EACH
def test_value_is_the_sum_over_loops(problem: Problem) -> None:
    """F of every run is that of its cell, runs of a cell following each other; its two parts are the losses and the penalties."""
    at, f = factors(problem, R), objective(problem, R)
    value, loss, penalty = f.value(at), f.loss_part(at)[0], f.penalty_part(at)[0]
    assert value.shape == (problem.cells * R,)
    for b in range(problem.cells * R):
        exact = plain.parts(problem, b // R, [x[b] for x in at])
        assert value[b] == pytest.approx(sum(exact), rel=1e-13)
        assert (loss[b], penalty[b]) == pytest.approx(exact, rel=1e-13)


@EACH
def test_one_value(problem: Problem) -> None:
    """value, value_and_gradient and the two parts agree bit for bit, and the gradient is the sum of the parts'."""
    at, f = factors(problem, R), objective(problem, R)
    value, gradient = f.value_and_gradient(at)
    assert np.array_equal(value, f.value(at))
    assert np.array_equal(value, f.loss_part(at)[0] + f.penalty_part(at)[0])
    for whole, loss, penalty, x in zip(gradient, f.loss_part(at)[1], f.penalty_part(at)[1], at, strict=True):
        assert whole.shape == loss.shape == penalty.shape == x.shape
        assert np.array_equal(whole, loss + penalty)


@EACH
def test_inputs_are_left_alone(problem: Problem) -> None:
    """No factor, coordinate or move changes in a call."""
    at, v, f, frame = factors(problem, R), moves(problem), objective(problem, R), balanced(problem, R)
    x, u = frame.from_factors(at), frame.pack(v)
    before = [a.copy() for a in (*at, *v, x, u)]
    f.value_and_gradient(at)
    f.hessian_product(at, v)
    frame.value_and_gradient(x)
    frame.hessian_product(x, u)
    frame.scale_free_norm(x)
    assert all(np.array_equal(a, b) for a, b in zip(before, (*at, *v, x, u), strict=True))
    assert np.array_equal(frame.value_and_gradient(x)[1], frame.value_and_gradient(x)[1])


@MEANS
def test_class_means_stand_for_their_samples(problem: Problem) -> None:
    """Equal samples: F of the means is F of the samples, and a mean's gradient is the sum of its samples', in loops and in arrays."""
    at, f = factors(problem, R), objective(problem, R)
    _, gradient = f.value_and_gradient(at)
    for b in range(problem.cells * R):
        cell, run = problem.cell(b // R), [x[b] for x in at]
        wide, spread = plain.expanded(cell, 0, run)
        assert plain.value(wide, 0, spread) == pytest.approx(plain.value(cell, 0, run), rel=1e-14)
        value, (H, *others) = objective(wide).value_and_gradient([np.array(x)[None] for x in spread])
        assert value[0] == pytest.approx(f.value(at)[b], rel=1e-14)
        of_class = np.repeat(np.arange(problem.classes), cell.counts[0])
        gathered = np.stack([H[0][:, of_class == k].sum(axis=1) for k in range(problem.classes)], axis=1)
        for got, expected in zip([gathered, *(x[0] for x in others)], gradient, strict=True):
            same(got, expected[b], 1e-13)


def test_a_scalar_adjustment_is_the_log_prior() -> None:
    """logit_adjustment = tau shifts logit k by tau log(n_k/N)."""
    problem = dict(PROBLEMS)["free-means-linear1-b0.0-ce_adjusted-G2K3"]
    at, tau = factors(problem, R), 0.7
    shift = tau * np.log(problem.counts / problem.counts.sum(axis=1, keepdims=True))
    named, spelt = (objective(replace(problem, loss=CrossEntropy(logit_adjustment=a)), R) for a in (tau, shift))
    assert named.value(at) == pytest.approx(spelt.value(at), rel=1e-15)
    shifted = [*at[:-1], at[-1] + np.repeat(shift, R, axis=0)[:, :, None]]
    assert named.value(at) == pytest.approx(objective(replace(problem, loss=CrossEntropy()), R).value(shifted), rel=1e-14)


# --- derivatives ---------------------------------------------------------------------------------------------------------------------


def torch_parts(problem: Problem, cell: int, run: Any) -> tuple[Any, Any]:
    """The losses' and the penalties' sum of one run, written with torch's own losses."""
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    H, weights, biases = run[0], run[1 : problem.depth + 1], run[problem.depth + 1 :]
    counts = torch.tensor(problem.counts[cell])
    classes, m = torch.arange(len(counts)), counts.double()
    if problem.columns == "samples":
        classes = torch.repeat_interleave(classes, counts)
        m = torch.ones(len(classes), dtype=torch.float64)
    features = torch.relu(H) if problem.features == "relu_of_free" else H
    Z = features
    for i, W in enumerate(weights):
        Z = W @ (torch.relu(Z) if problem.activation == "relu" and i else Z)
    Z = (Z + biases[0] if biases else Z).T  # (cols, K)
    loss, onehot = problem.loss, torch.nn.functional.one_hot(classes, len(counts)).double()

    def option(given: Any) -> Any:
        return torch.tensor(np.broadcast_to(given, problem.counts.shape)[cell].copy())

    if loss.name == "MSE" or (loss.name == "autograd" and loss.function is not autograd_ce):
        each = mse_loss(Z, onehot, reduction="none").sum(dim=1) / 2
    elif loss.name == "DR":
        each = (Z[torch.arange(len(classes)), classes] - 1) ** 2 / 2
    elif loss.name == "focal":
        log_p = -cross_entropy(Z, classes, reduction="none")
        each = -((1 - torch.exp(log_p)) ** loss.gamma) * log_p
    elif loss.name == "autograd":
        each = cross_entropy(Z, classes, reduction="none")
    else:
        Z = Z / option(loss.temperature)
        if loss.logit_adjustment is not None:
            prior = torch.log(counts.double() / counts.sum()) if loss.logit_adjustment.ndim == 0 else 1.0
            Z = Z + prior * option(loss.logit_adjustment)
        omega = option(1.0 if loss.class_weights is None else loss.class_weights)
        each = omega[classes] * cross_entropy(Z, classes, reduction="none", label_smoothing=loss.label_smoothing)
    penalty = problem.lam_h[cell] / 2 * torch.sum(m * features**2)
    for lam, W in zip(problem.lam_w[cell], weights, strict=True):
        penalty = penalty + lam / 2 * torch.sum(W**2)
    for b in biases:
        penalty = penalty + problem.lam_b[cell] / 2 * torch.sum(b**2)
    return torch.sum(m * each) / counts.sum(), penalty


@EACH
def test_derivatives_against_torch(problem: Problem) -> None:
    """Value, gradient and Hessian product are those torch finds for its own F, by backward and double backward."""
    torch = pytest.importorskip("torch")
    at, v, f = factors(problem, R), moves(problem), objective(problem, R)

    def total(*inputs: Any) -> Any:
        return sum(sum(torch_parts(problem, b // R, [x[b] for x in inputs])) for b in range(problem.cells * R))

    inputs = tuple(torch.tensor(x, requires_grad=True) for x in at)
    gradient = torch.autograd.grad(total(*inputs), inputs)
    value, second = torch.autograd.functional.hvp(total, inputs, tuple(torch.tensor(x) for x in v))
    assert f.value(at).sum() == pytest.approx(float(value), rel=1e-13)
    for got, expected in zip([*f.value_and_gradient(at)[1], *f.hessian_product(at, v)], [*gradient, *second], strict=True):
        same(got, expected.numpy(), 1e-12)


@EACH
def test_derivatives_against_differences(problem: Problem) -> None:
    """F changes along a unit move as its gradient says, and the gradient as the Hessian product says."""
    at, v, f, h = factors(problem, R), moves(problem), objective(problem, R), 1e-5
    (ahead, up), (behind, down) = f.value_and_gradient(step(at, v, h)), f.value_and_gradient(step(at, v, -h))
    assert (ahead - behind) / (2 * h) == pytest.approx(inner(f.value_and_gradient(at)[1], v), abs=1e-9)
    for plus, minus, product in zip(up, down, f.hessian_product(at, v), strict=True):
        assert (plus - minus) / (2 * h) == pytest.approx(product, abs=1e-9)


@EACH
def test_hessian_is_symmetric_and_linear(problem: Problem) -> None:
    """u.Hv = v.Hu, and H(2u - 3v) = 2Hu - 3Hv, run by run."""
    at, u, v, f = factors(problem, R), moves(problem), moves(problem, 2), objective(problem, R)
    Hu, Hv = f.hessian_product(at, u), f.hessian_product(at, v)
    size = np.sqrt(inner(Hu, Hu) * inner(Hv, Hv))
    assert np.all(np.abs(inner(u, Hv) - inner(v, Hu)) <= 1e-14 * (1 + size))
    both = f.hessian_product(at, [2 * a - 3 * b for a, b in zip(u, v, strict=True)])
    for got, a, b in zip(both, Hu, Hv, strict=True):
        assert got == pytest.approx(2 * a - 3 * b, abs=1e-14 * (1 + size.max()))


@EACH
def test_slope_is_the_gradient_in_the_logits(problem: Problem) -> None:
    """sum_c (m_c/N) slope_c . dZ_c is the change of the loss part along a move, Z read off the same factors."""
    at, v, f, h = factors(problem, R), moves(problem), objective(problem, R), 1e-5
    change = (f.logits(step(at, v, h)) - f.logits(step(at, v, -h))) / (2 * h)
    along = np.sum(f.slope(at) * change * f.column_weight, axis=(1, 2))
    assert f.logits(at).shape == f.slope(at).shape == (problem.cells * R, problem.classes, problem.labels.shape[1])
    assert along == pytest.approx(inner(f.loss_part(at)[1], v), abs=1e-9)


@over([(n, p) for n, p in CASES if p.features == "relu_of_free"])
def test_penalty_of_relu_of_free_features_is_of_the_features(problem: Problem) -> None:
    """The penalty of V is that of relu(V); where V < 0 neither the gradient nor the Hessian sees it."""
    at, f = factors(problem, R), objective(problem, R)
    dead = at[0] < 0
    clipped = [np.maximum(at[0], 0.0), *at[1:]]
    free = objective(replace(problem, features="free"), R)
    assert dead.any()
    assert np.array_equal(f.value(at), free.value(clipped))
    assert np.array_equal(f.penalty_part(at)[0], free.penalty_part(clipped)[0])
    assert np.all(f.value_and_gradient(at)[1][0][dead] == 0)
    assert np.all(f.hessian_product(at, moves(problem))[0][dead] == 0)
    frame = balanced(problem, R)
    assert np.all(frame.unpack(frame.parts(frame.from_factors(at))[2])[0][dead] == 0)


def margins_of_sixty(depth: int) -> tuple[Problem, list[Any]]:
    """A problem with penalties of 1e-28, and factors whose true logits lead by about 60."""
    rng = np.random.default_rng(depth)
    loss = CrossEntropy(class_weights=[0.7, 1.0, 1.9])
    problem = Problem([5, 2, 1], width=4, depth=depth, features="free", loss=loss, lam_w=1e-28, lam_h=2e-28, lam_b=3e-28)
    weights = [rng.standard_normal((4, 4)) for _ in range(depth - 1)] + [rng.standard_normal((3, 4))]
    product = weights[0] if depth == 1 else np.linalg.multi_dot(weights[::-1])
    b = rng.standard_normal((3, 1))
    H = np.linalg.pinv(product) @ (60.0 * np.eye(3) + rng.standard_normal((3, 3)) - b)
    return problem, [x[None] for x in (H, *weights, b)]


def exact_loss(problem: Problem, run: list[Any]) -> Any:
    """The losses' sum of exact numbers, as papers write it."""
    H, *weights, b = run
    for W in weights:
        H = [[sum(W[i][j] * H[j][c] for j in range(len(H))) for c in range(3)] for i in range(len(W))]
    n, omega, total = problem.counts[0], problem.loss.class_weights, mpf(0)
    for c in range(3):
        z = [H[i][c] + b[i][0] for i in range(3)]
        total += mpf(int(n[c])) / int(n.sum()) * mpf(float(omega[c])) * (mp.log(sum(mp.exp(x) for x in z)) - z[c])
    return total


@pytest.mark.parametrize("depth", [1, 2])
def test_no_cancellation_at_large_margins(depth: int) -> None:
    """Losses of e^-60 and every entry of their gradient have a relative accuracy of 1e-10, in natural and in balanced coordinates."""
    problem, at = margins_of_sixty(depth)
    natural, frame = objective(problem), balanced(problem)
    value, slopes = natural.loss_part(at)
    x = frame.from_factors(at)
    total, inside, _ = frame.parts(x)
    assert value[0] < 1e-23
    with mp.workdps(130):
        h, run = mpf("1e-40"), [[[mpf(float(v)) for v in row] for row in factor[0]] for factor in at]
        exact = exact_loss(problem, run)
        assert abs(mpf(float(value[0])) / exact - 1) < 1e-10
        penalty = sum(float(lam) / 2 * np.sum(f * f) for lam, f in zip([1e-28] * depth + [3e-28], at[1:], strict=True))
        penalty += 1e-28 * np.sum(problem.counts[0] * np.sum(at[0] ** 2, axis=1))
        assert float(frame.unit[0]) * total[0] == pytest.approx(float(exact) + penalty, rel=1e-10)
        for factor, slope, scaled, scale in zip(run, slopes, frame.unpack(inside), frame.scales, strict=True):
            scale = np.broadcast_to(scale[0], slope[0].shape)
            for i, row in enumerate(factor):
                for j, entry in enumerate(row):
                    row[j] = entry + h
                    up = exact_loss(problem, run)
                    row[j] = entry - h
                    derivative = (up - exact_loss(problem, run)) / (2 * h)
                    row[j] = entry
                    assert abs(mpf(float(slope[0, i, j])) / derivative - 1) < 1e-10
                    in_unit = derivative * mpf(float(scale[i, j])) / mpf(float(frame.unit[0]))
                    assert abs(mpf(float(scaled[0, i, j])) / in_unit - 1) < 1e-10


# --- runs ----------------------------------------------------------------------------------------------------------------------------


def everything(f: Objective, frame: Coordinates, at: Any, v: Any) -> list[Any]:
    """All results of both, each with the runs axis first."""
    x, u = frame.from_factors(at), frame.pack(v)
    natural = [f.logits(at), f.value(at), f.slope(at), *f.value_and_gradient(at)[1], *f.hessian_product(at, v)]
    scaled = [x, *frame.to_factors(x), *frame.value_and_gradient(x), frame.hessian_product(x, u)]
    return [*natural, *scaled, frame.scale_free_norm(x), frame.projected(x, u)]


@EACH
def test_runs_are_independent(problem: Problem) -> None:
    """Changing one run changes no bit of the others, and does change its own."""
    at, v, f, frame = factors(problem, R), moves(problem), objective(problem, R), balanced(problem, R)
    before, last = everything(f, frame, at, v), problem.cells * R - 1
    changed = [np.concatenate([a[:last], 3.0 * a[last:]]) for a in at]
    after = everything(f, frame, changed, v)
    assert all(np.array_equal(x[:last], y[:last]) for x, y in zip(before, after, strict=True))
    assert before[1][last] != after[1][last]


@EACH
def test_a_run_alone_is_a_row_of_the_batch(problem: Problem) -> None:
    """Picked runs, in any order, give the rows they have in the batch; so does the cell's own problem."""
    at, v, f, frame = factors(problem, R), moves(problem), objective(problem, R), balanced(problem, R)
    rows = everything(f, frame, at, v)
    last = problem.cells * R - 1
    for picked in ([last, 0], [0]):
        runs = np.array(picked)
        alone = everything(f.pick(runs), frame.pick(runs), [a[runs] for a in at], [a[runs] for a in v])
        for got, row in zip(alone, rows, strict=True):
            same(got, row[runs], 1e-14)
    cell = problem.cell(problem.cells - 1)
    alone = everything(objective(cell), balanced(cell), [a[-1:] for a in at], [a[-1:] for a in v])
    for got, row in zip(alone, rows, strict=True):
        same(got, row[-1:], 1e-14)


def test_pick_picks_every_array() -> None:
    """A picked objective holds the picked runs and nothing else, a picked frame too."""
    problem = demanding()
    f, frame, runs = objective(problem, R), balanced(problem, R), np.array([2, 1])
    picked = frame.pick(runs)
    wholes = [*held(f), *held(frame.objective), frame.unit, *frame.scales, frame.penalty]
    parts = [*held(f.pick(runs)), *held(picked.objective), picked.unit, *picked.scales, picked.penalty]
    assert all(np.array_equal(part, whole[runs]) for whole, part in zip(wholes, parts, strict=True))
    assert np.array_equal(picked.lower, frame.lower)


def held(f: Objective) -> list[Any]:
    """Every array an objective holds."""
    found: list[Any] = []

    def collect(x: Any) -> Any:
        found.append(x)
        return x

    f.map(collect)
    return found


def demanding() -> Problem:
    """One problem whose objective holds every kind of array."""
    loss = CrossEntropy(0.05, class_weights=[0.5, 1.0, 2.0], logit_adjustment=0.5, temperature=[2.0, 1.0, 0.5])
    counts, lam_w = [[3, 2, 1], [2, 2, 2]], [[0.02, 0.03], [0.04, 0.05]]
    return Problem(counts, width=4, depth=2, features="relu", loss=loss, lam_w=lam_w, lam_h=[0.01, 0.02], lam_b=0.3)


# --- balanced coordinates ------------------------------------------------------------------------------------------------------------


def naive_frame(problem: Problem, cell: int) -> tuple[float, list[Any], list[float]]:
    """(unit, scale of each factor, penalty of each factor in this unit) of one cell, as their definitions say."""
    lam, L = [float(problem.lam_h[cell]), *(float(x) for x in problem.lam_w[cell])], problem.depth
    m = np.array([m for _, m in plain.columns(problem, cell)], dtype=np.float64)
    unit, scales, levels = 1.0, [1.0] * (L + 1), lam
    if min(lam) > 0:
        unit = float(np.prod(lam)) ** (1 / (L + 1))
        scales, levels = [(unit / x) ** 0.5 for x in lam], [1.0] * (L + 1)
    scales = [scales[0] / m**0.5, *scales[1:]]
    if problem.lam_b is not None:
        curvature = float(problem.lam_b[cell]) / unit + float(np.mean(m**0.5))
        scales, levels = [*scales, curvature**-0.5], [*levels, float(problem.lam_b[cell]) / unit / curvature]
    return unit, scales, levels


@EACH
def test_scales_and_penalties_are_the_definitions(problem: Problem) -> None:
    """Every factor is its scale times its coordinates, and carries its penalty in this unit: 1, but for a bias, where all are positive."""
    at, frame = factors(problem, R), balanced(problem, R)
    x = frame.from_factors(at)
    penalty = np.ones_like(x) * (1.0 if frame.penalty is None else frame.penalty)
    for b in range(problem.cells * R):
        unit, scales, levels = naive_frame(problem, b // R)
        assert frame.unit[b] == pytest.approx(unit, rel=1e-14)
        for part, level, factor, scale, expected in zip(frame.unpack(x), frame.unpack(penalty), at, scales, levels, strict=True):
            assert part[b] * scale == pytest.approx(factor[b], rel=1e-14)
            assert level[b] == pytest.approx(np.full_like(level[b], expected), rel=1e-14)
        if min([problem.lam_h[b // R], *problem.lam_w[b // R]]) > 0:
            assert all(np.all(level[b] == 1) for level in frame.unpack(penalty)[: problem.depth + 1])


@EACH
def test_coordinates_invert(problem: Problem) -> None:
    """unpack and pack undo each other bit for bit, to_factors and from_factors to rounding."""
    at, frame = factors(problem, R), balanced(problem, R)
    x = frame.from_factors(at)
    assert x.shape == (problem.cells * R, sum(a[0].size for a in at))
    assert frame.shapes == tuple(a.shape[1:] for a in at) == tuple(chain_of(problem).shapes(problem.width, problem.classes, at[0].shape[2]))
    assert np.array_equal(frame.pack(frame.unpack(x)), x)
    assert all(np.array_equal(a, b) for a, b in zip(frame.unpack(frame.pack(at)), at, strict=True))
    for got, factor in zip(frame.to_factors(x), at, strict=True):
        assert got == pytest.approx(factor, rel=1e-15)
    assert frame.from_factors(frame.to_factors(x)) == pytest.approx(x, rel=1e-15)


@EACH
def test_balanced_value_is_the_natural_one_in_its_unit(problem: Problem) -> None:
    """unit * value(x) = F(factors), both ways to ask for it; the logits are the same."""
    at, f, frame = factors(problem, R), objective(problem, R), balanced(problem, R)
    x = frame.from_factors(at)
    assert frame.unit * frame.value_and_gradient(x)[0] == pytest.approx(f.value(at), rel=1e-13)
    assert frame.unit * frame.objective.value(frame.unpack(x)) == pytest.approx(f.value(at), rel=1e-13)
    assert frame.objective.logits(frame.unpack(x)) == pytest.approx(f.logits(at), rel=1e-13, abs=1e-14)


@EACH
def test_chain_rule(problem: Problem) -> None:
    """unit * grad_x = scale * grad_factor, part by part, and unit * Hess_x v = scale * Hess (scale v)."""
    at, v, f, frame = factors(problem, R), moves(problem), objective(problem, R), balanced(problem, R)
    x, unit = frame.from_factors(at), frame.unit[:, None, None]
    _, inside, penalty = frame.parts(x)
    pairs = [
        (frame.value_and_gradient(x)[1], f.value_and_gradient(at)[1]),
        (inside, f.loss_part(at)[1]),
        (penalty, f.penalty_part(at)[1]),
        (frame.pack(frame.objective.value_and_gradient(frame.unpack(x))[1]), f.value_and_gradient(at)[1]),
        (frame.hessian_product(x, frame.pack(v)), f.hessian_product(at, [s * a for s, a in zip(frame.scales, v, strict=True)])),
    ]
    for flat, natural in pairs:
        for got, scale, expected in zip(frame.unpack(flat), frame.scales, natural, strict=True):
            same(unit * got, scale * expected, 1e-13)


@EACH
def test_lower_bounds(problem: Problem) -> None:
    """0 for the features of H >= 0, and none elsewhere."""
    frame = balanced(problem, R)
    first, *others = frame.unpack(frame.lower[None])
    assert np.all(first == (0.0 if problem.features == "relu" else -np.inf))
    assert all(np.all(x == -np.inf) for x in others)


def on_the_bound(problem: Problem) -> Any:
    """Factors with about half of the features exactly 0."""
    first, *others = factors(problem, R)
    return [first * (np.random.default_rng(3).random(first.shape) < 0.5), *others]


@EACH
def test_projection_drops_what_points_out(problem: Problem) -> None:
    """Of any direction, only positive components at H = 0 of nonnegative features are dropped; the others keep every bit."""
    frame = balanced(problem, R)
    x = frame.from_factors(on_the_bound(problem))
    direction = np.random.default_rng(4).standard_normal(x.shape)
    got, features = frame.projected(x, direction), problem.width * problem.labels.shape[1]
    dropped = 0
    for b, i in np.ndindex(x.shape):
        out = problem.features == "relu" and i < features and x[b, i] == 0 and direction[b, i] > 0
        assert got[b, i] == (0.0 if out else direction[b, i])
        dropped += out
    assert (dropped > 0) == (problem.features == "relu")


@EACH
@pytest.mark.parametrize("place", [factors, on_the_bound])
def test_scale_free_norm_is_its_definition(problem: Problem, place: Any) -> None:
    """||P grad F|| / max(||grad of losses||, ||grad of penalties||) in balanced coordinates, the plain norm without penalties."""
    torch = pytest.importorskip("torch")
    at = place(problem, R) if place is factors else place(problem)
    frame = balanced(problem, R)
    norms = frame.scale_free_norm(frame.from_factors(at))
    for b in range(problem.cells * R):
        unit, scales, levels = naive_frame(problem, b // R)
        x = [torch.tensor(a[b] / s, requires_grad=True) for a, s in zip(at, scales, strict=True)]
        run = [torch.tensor(s, dtype=torch.float64) * part for s, part in zip(scales, x, strict=True)]
        loss, penalty = (part / unit for part in torch_parts(problem, b // R, run))
        pulls = [torch.autograd.grad(part, x, retain_graph=True, allow_unused=True, materialize_grads=True) for part in (loss, penalty)]
        down, up = (np.concatenate([g.numpy().ravel() for g in pull]) for pull in pulls)
        gradient = down + up
        if problem.features == "relu":
            at_zero = np.zeros(len(gradient), dtype=bool)
            at_zero[: at[0][b].size] = at[0][b].ravel() == 0
            gradient[at_zero & (gradient > 0)] = 0.0
        size = max(np.linalg.norm(down), np.linalg.norm(up)) if max(levels) > 0 else 1.0
        assert norms[b] == pytest.approx(np.linalg.norm(gradient) / size, rel=1e-12)


@EACH
@pytest.mark.parametrize("t", [1e-6, 7.0])
def test_scale_free_norm_knows_only_the_product_of_penalties(problem: Problem, t: float) -> None:
    """lam_w[0] t and lam_h / t: the same F/unit, gradient and norm at the same x, so long as all penalties are positive."""
    if np.any(problem.lam_h == 0) or np.any(problem.lam_w == 0):
        lam_w, lam_h = problem.lam_w, problem.lam_h
        frame, other = balanced(problem, R), balanced(replace(problem, lam_w=t * lam_w, lam_h=lam_h / t), R)
        assert np.array_equal(frame.unit == 1, np.repeat((lam_h == 0) | np.any(lam_w == 0, axis=1), R))
        assert np.array_equal(frame.unit == 1, other.unit == 1)
        return
    layer = np.where(np.arange(problem.depth) == 0, t, 1.0)
    frame, other = balanced(problem, R), balanced(replace(problem, lam_w=problem.lam_w * layer, lam_h=problem.lam_h / t), R)
    x = frame.from_factors(on_the_bound(problem))
    value, gradient = frame.value_and_gradient(x)
    value_too, gradient_too = other.value_and_gradient(x)
    assert value_too == pytest.approx(value, rel=1e-13)
    same(gradient_too, gradient, 1e-13)
    assert other.scale_free_norm(x) == pytest.approx(frame.scale_free_norm(x), rel=1e-13)


@over([(n, p) for n, p in CASES if p.lam_b is None])
def test_scale_free_norm_vanishes_at_zero(problem: Problem) -> None:
    """All factors zero without a bias: no gradient of either part, and the norm is 0, not 0/0."""
    frame = balanced(problem, R)
    nothing = [np.zeros_like(a) for a in factors(problem, R)]
    assert np.all(frame.scale_free_norm(frame.from_factors(nothing)) == 0)


@over([(n, p) for n, p in CASES if p.columns == "means" and p.lam_b is None])
def test_scale_free_norm_of_means_is_that_of_samples(problem: Problem) -> None:
    """The m^{1/2} in the coordinates makes a step of the means a step of each of their samples: equal norms."""
    at = on_the_bound(problem)
    frame = balanced(problem, R)
    norms = frame.scale_free_norm(frame.from_factors(at))
    for b in range(problem.cells * R):
        wide, spread = plain.expanded(problem.cell(b // R), 0, [a[b] for a in at])
        samples = balanced(wide)
        got = samples.scale_free_norm(samples.from_factors([np.array(x)[None] for x in spread]))
        assert got[0] == pytest.approx(norms[b], rel=1e-12)


# --- libraries and devices -----------------------------------------------------------------------------------------------------------


def on(function: Any, frame: Coordinates) -> Coordinates:
    """A frame with `function` applied to every array it holds."""
    penalty = None if frame.penalty is None else function(frame.penalty)
    scales = tuple(function(s) for s in frame.scales)
    return replace(
        frame,
        objective=frame.objective.map(function),
        unit=function(frame.unit),
        penalty=penalty,
        scales=scales,
        lower=function(frame.lower),
    )


def agree(got: list[Any], expected: list[Any], kind: Any) -> None:
    """The same numbers, in arrays of the library, dtype and device of `kind`."""
    for mine, theirs in zip(got, expected, strict=True):
        assert (type(mine), mine.dtype, device_of(mine)) == (type(kind), kind.dtype, device_of(kind))
        assert mine.shape == theirs.shape
        size = np.abs(theirs)
        assert np.all(np.abs(to_numpy(mine) - theirs) <= 1e-13 * size + 1e-14 * max(1.0, size.max()))


@EACH
@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "numpy"])
def test_every_library_agrees(problem: Problem, library: str) -> None:
    """torch, the strict reference and its second device give numpy's numbers, in their own arrays."""

    def move(x: Any) -> Any:
        return to_library(library, x)

    at, v, f, frame = on_the_bound(problem), moves(problem), objective(problem, R), balanced(problem, R)
    at_on, v_on = [move(a) for a in at], [move(a) for a in v]
    agree(everything(f.map(move), on(move, frame), at_on, v_on), everything(f, frame, at, v), at_on[0])
    runs = np.array([1, 0])
    picked, x = on(move, frame).pick(move(runs)), frame.from_factors(at)[:2]
    agree([*picked.value_and_gradient(move(x))], [*frame.pick(runs).value_and_gradient(x)], at_on[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cases", [PROBLEMS, UNPENALISED], ids=["penalised", "unpenalised"])
def test_built_on_a_device(cases: list[tuple[str, Problem]], device: str) -> None:
    """objective and balanced place every array themselves, in double precision, and give numpy's numbers there."""
    torch = pytest.importorskip("torch")
    for _, problem in cases:
        at, v = on_the_bound(problem), moves(problem)
        at_on, v_on = [torch.asarray(a).to(device) for a in at], [torch.asarray(a).to(device) for a in v]
        f, frame = objective(problem, R, device=device), balanced(problem, R, device=device)
        expected = everything(objective(problem, R), balanced(problem, R), at, v)
        agree(everything(f, frame, at_on, v_on), expected, at_on[0])


@NATIVE
def test_meta_device(problem: Problem) -> None:
    """Nothing is made on the default device or read back: tensors without memory go through, in the right shapes."""
    torch = pytest.importorskip("torch")

    def move(x: Any) -> Any:
        return torch.asarray(np.array(x)).to("meta")

    at, v, f, frame = factors(problem, R), moves(problem), objective(problem, R), balanced(problem, R)
    f_on, frame_on, at_on, v_on = f.map(move), on(move, frame), [move(a) for a in at], [move(a) for a in v]
    x_on, u_on = frame_on.from_factors(at_on), frame_on.pack(v_on)
    value, gradient = f_on.value_and_gradient(at_on)
    whole, flat = frame_on.value_and_gradient(x_on)
    product = frame_on.hessian_product(x_on, u_on)
    of_run, as_factors, as_x = (
        [value, whole, frame_on.scale_free_norm(x_on)],
        [*gradient, *f_on.hessian_product(at_on, v_on)],
        [flat, product],
    )
    as_factors += frame_on.to_factors(x_on)
    assert {(x.device.type, x.dtype) for x in (*of_run, *as_factors, *as_x)} == {("meta", torch.float64)}
    assert {tuple(x.shape) for x in of_run} == {(problem.cells * R,)}
    assert [tuple(x.shape) for x in as_factors] == 3 * [a.shape for a in at]
    assert {tuple(x.shape) for x in as_x} == {(problem.cells * R, sum(a[0].size for a in at))}


@pytest.mark.parametrize("away", ["meta", "strict_device1"])
@pytest.mark.parametrize("coordinates", ["natural", "balanced"])
def test_misplaced_array_is_noticed(away: str, coordinates: str) -> None:
    """With any one array of the objective left behind on the CPU, the gradient refuses: the checks above can fail."""
    problem = demanding()
    home = "torch" if away == "meta" else "strict"

    def move(x: Any) -> Any:
        return to_library("torch", x).to("meta") if away == "meta" else to_library(away, x)

    f = objective(problem, R) if coordinates == "natural" else balanced(problem, R).objective
    at, v = [move(a) for a in factors(problem, R)], [move(a) for a in moves(problem)]
    assert len(held(f)) == (11 if coordinates == "natural" else 13)
    for stays in range(len(held(f))):
        count = iter(range(len(held(f))))
        misplaced = f.map(lambda x, count=count, stays=stays: to_library(home, x) if next(count) == stays else move(x))
        with pytest.raises((RuntimeError, ValueError), match="device"):
            misplaced.value_and_gradient(at)
    f.map(move).value_and_gradient(at)
    f.map(move).hessian_product(at, v)
