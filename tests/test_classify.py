"""What an end point is called: every catalogued point by its own name in any order of classes, nothing else by a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catalog
import ufm
from ufm.landscape.classify import CLOSE
from ufm.landscape.structures import invariants, partitions
from ufm.theory import deep, deep_relu, deep_relu_ce
from ufm.theory import deep_points as points
from ufm.theory.deep_codes import Code

over = pytest.mark.parametrize


def setting(code: Any, L: int, lam: float, branch: Any = "large", *, n: int = 2, extra: int = 1, seed: int = 0) -> tuple[ufm.Problem, Any]:
    """(problem, factors) at a code: unequal penalties, random frames, classes in a random order."""
    rng, K = np.random.default_rng(seed), code.classes
    tilt = 10.0 ** np.linspace(-0.5, 0.5, L + 1)
    lam_w, lam_h = lam * tilt[:-1], lam * tilt[-1] / n
    H, *weights = deep.balanced_factors(points.at(code, lam, L, branch).M, n, lam_h, lam_w, K + extra, rng)
    order = rng.permutation(K)
    factors = [H[:, order], *weights[:-1], weights[-1][order]]
    problem = ufm.Problem([n] * K, width=K + extra, depth=L, features="free", lam_w=lam_w[None], lam_h=lam_h)
    return problem, [f[None] for f in factors]


# name, code -> kind and name it must get; some codes are one thing by two names
NAMES = [
    (points.dnc(2), "dnc", "DNC"),
    (points.dnc(5), "dnc", "DNC"),
    (points.dnc(10), "dnc", "DNC"),
    (points.polygon(3), "dnc", "DNC"),
    (points.relaxed_pairs(3), "dnc", "DNC"),
    (points.blocks([4]), "dnc", "DNC"),
    (points.pairs(4), "blocks", "2 pairs"),
    (points.polygon(4), "blocks", "2 pairs"),
    (points.pairs(10), "blocks", "5 pairs"),
    (points.rectified_simplex(4), "blocks", "3 pairs"),
    (points.blocks([2, 8]), "blocks", "blocks 2+8"),
    (points.blocks([6, 2, 2]), "blocks", "blocks 2+2+6"),
    (points.blocks([3, 3]), "blocks", "blocks 3+3"),
    (points.blocks([4, 2, 1]), "blocks", "blocks 1+2+4"),
    (points.blocks([2, 1]), "blocks", "blocks 1+2"),
    (points.relaxed_pairs(5), "code", "relaxed pairs"),
    (points.relaxed_pairs(9), "code", "relaxed pairs"),
    (points.polygon(5), "code", "5-gon"),
    (points.polygon(8), "code", "8-gon"),
    (points.rectified_simplex(5), "code", "T(5)"),
    (points.icosahedron(), "code", "icosahedron"),
    (points.square_antiprism(), "code", "square antiprism"),
]


@over(("code", "kind", "name"), NAMES, ids=[f"{code.name}-{code.classes}" for code, *_ in NAMES])
@over(("L", "share"), [(1, 0.6), (2, 1e-3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1e-3), (2, 0.6), (3, 0.6)))])
def test_every_catalogued_point_by_its_name(code: Any, kind: str, name: str, L: int, share: float) -> None:
    """Name, rank, level to rounding, singular values, index of DNC; on the small root the name says so, and zero is not meant."""
    lam = share * (points.largest(code, L) if isinstance(code, Code) else 0.4 / code.classes)
    for branch in ("large", "small") if L > 1 and isinstance(code, Code) else ("large",):
        point = points.at(code, lam, L, branch)  # type: ignore[arg-type]
        got = ufm.classify(*setting(code, L, lam, branch))
        assert (got.kind[0], got.name[0]) == (kind, name + (", small root" if branch == "small" else ""))
        assert got.rank[0] == point.rank
        assert got.rank_gap[0] > 1e9
        assert got.singular_values[0] == pytest.approx(
            np.linalg.svd(point.M, compute_uv=False), rel=1e-9, abs=1e-12 * np.abs(point.M).max()
        )
        assert got.level[0] == pytest.approx(float(point.value), rel=1e-12)
        assert abs(got.excess[0]) < 1e-12
        assert got.gradient_norm[0] < 1e-10
        assert not got.polished[0]
        if kind == "dnc" and not np.isnan(got.negative[0]):
            assert got.negative[0] == points.at(points.dnc(code.classes), lam, L, branch).index  # type: ignore[arg-type]
            assert got.is_minimum[0] == (got.negative[0] == 0)
            assert got.zero[0] == deep.orbit_dimension(point.rank, L, code.classes + 1)


def test_scales_on_different_branches() -> None:
    """Block sizes on their own branches each are found; two pairs on two branches are critical too, but in no catalogue."""
    K, L, code = 5, 2, points.blocks([3, 2])
    lam = 0.7 * points.largest(code, L)
    large, small = (code.scales(np.asarray(lam), L, branch) for branch in ("large", "small"))
    for choice, remark in (((0, 0), ""), ((0, 1), ", small root"), ((1, 0), ", small root"), ((1, 1), ", small root")):
        M = code.pattern(np.where(choice, small, large))
        problem = ufm.Problem([1] * K, width=K, depth=L, features="free", lam_w=lam, lam_h=lam)
        got = ufm.classify(problem, [f[None] for f in deep.balanced_factors(M, 1, lam, [lam] * L, K)])
        assert got.name[0] == "blocks 2+3" + remark
        assert abs(got.excess[0]) < 1e-12
    a, b = (float(points.pairs(4).scales(np.asarray(lam), L, branch)[0]) for branch in ("large", "small"))
    pair = np.array([[1.0, -1.0], [-1.0, 1.0]])
    M = np.block([[a * pair, np.zeros((2, 2))], [np.zeros((2, 2)), b * pair]])
    problem = ufm.Problem([1] * 4, width=4, depth=L, features="free", lam_w=lam, lam_h=lam)
    got = ufm.classify(problem, [f[None] for f in deep.balanced_factors(M, 1, lam, [lam] * L, 4)])
    assert got.gradient_norm[0] < 1e-6
    assert (got.kind[0], got.name[0]) == ("other", f"other, rank {got.rank[0]}")
    assert np.isnan(got.level[0])


def test_a_grid_of_runs_is_its_runs() -> None:
    """Cells of different penalties and runs of different structures at once: each run as it is alone."""
    K, L, d, lam = 6, 2, 7, np.array([1e-3, 1e-2])
    problem = ufm.Problem([1] * K, width=d, depth=L, features="free", lam_w=lam, lam_h=lam)
    codes = [points.dnc(K), points.pairs(K), points.polygon(K), points.blocks([3, 3]), points.zero(K)]
    each = [deep.balanced_factors(points.at(code, x, L).M, 1, x, [x] * L, d, np.random.default_rng(0)) for x in lam for code in codes]
    factors = [np.stack(some) for some in zip(*each, strict=True)]
    got = ufm.classify(problem, factors)
    assert list(got.name) == ["DNC", "3 pairs", "6-gon", "blocks 3+3", "zero"] * 2
    for b in range(10):
        alone = ufm.classify(problem.cell(b // 5), [f[b : b + 1] for f in factors])
        for f in fields(ufm.EndPoint):
            mine, theirs = getattr(got, f.name)[b], getattr(alone, f.name)[0]
            assert np.array_equal(mine, theirs) or mine == pytest.approx(theirs, rel=1e-13, abs=1e-13, nan_ok=True), f.name


@over("L", [1, 2, 3])
def test_zero(L: int) -> None:
    """No logits, exactly or almost: rank 0, level F(0) = log K; a minimum unless L = 1 and lambda_eff < 1/K."""
    K = 4
    for lam, least in ((0.4, 1), (0.05, L > 1)):
        problem = ufm.Problem([1] * K, width=5, depth=L, features="free", lam_w=lam, lam_h=lam)
        some = catalog.factors(problem)
        for size in (0.0, 1e-17) if L > 1 or least else (0.0,):
            got = ufm.classify(problem, [size * f for f in some])
            assert (got.kind[0], got.name[0], got.rank[0]) == ("zero", "zero", 0)
            assert np.isinf(got.rank_gap[0])
            assert got.level[0] == pytest.approx(np.log(K), rel=1e-15)
            assert abs(got.excess[0]) < 1e-14
            assert got.is_minimum[0] == least
    got = ufm.classify(problem, [1e-3 * f for f in some], polish=False)
    assert got.name[0] == "unconverged"
    got = ufm.classify(problem, [1e-3 * f for f in some])
    assert (got.name[0], got.polished[0]) == (("zero", True) if L > 1 else ("unconverged", False))


@over(("code", "name"), [(points.pairs(6), "3 pairs"), (points.blocks([5, 2]), "blocks 2+5")], ids=["pairs", "blocks"])
@over("off", [1e-4, 3e-6])
def test_a_point_nearby_is_polished(code: Any, name: str, off: float) -> None:
    """Not stationary: unconverged as it is, its own name after the polish; the value is that of the polished point."""
    problem, factors = setting(code, 2, 1e-3)
    rng = np.random.default_rng(1)
    moved = [f * (1 + off * rng.standard_normal(f.shape)) for f in factors]
    raw, got = ufm.classify(problem, moved, polish=False), ufm.classify(problem, moved)
    assert (raw.kind[0], raw.name[0], raw.polished[0]) == ("other", "unconverged", False)
    assert np.isnan([raw.negative[0], raw.zero[0], raw.is_minimum[0], raw.level[0]]).all()
    assert raw.value[0] > got.value[0] > 0
    assert (got.name[0], got.polished[0], got.negative[0]) == (name, True, 0)
    assert abs(got.excess[0]) < 1e-12
    assert got.gradient_norm[0] <= 1e-10


@over("far", [1e-3, 0.3])
def test_a_point_that_is_on_its_way_elsewhere_stays_unconverged(far: float) -> None:
    """Off a saddle, and anywhere at random: the polish would change value and rank, so nothing is polished and the reason says what."""
    if far < 0.1:
        problem, factors = setting(points.dnc(6), 2, 0.9 * points.largest(points.dnc(6), 2))
        factors = [f * (1 + far * np.random.default_rng(0).standard_normal(f.shape)) for f in factors]
    else:
        problem = ufm.Problem([1] * 6, width=7, depth=2, features="free", lam_w=1e-3, lam_h=1e-3)
        factors = catalog.factors(problem, scale=far)
    got, raw = ufm.classify(problem, factors), ufm.classify(problem, factors, polish=False)
    assert (got.kind[0], got.name[0], got.polished[0]) == ("other", "unconverged", False)
    assert got.value[0] == raw.value[0]
    assert got.rank[0] == 5  # cross-entropy does not see the mean of a column
    assert "not polished: that changes the value by -" in got.reason[0]
    assert f"the rank from {got.rank[0]} to" in got.reason[0]


def test_rank_and_value_each_refuse_a_polish() -> None:
    """Too large by a half: the same rank, another value. A faint fourth direction that L = 1 gives up: the same value, another rank."""
    problem, factors = setting(points.pairs(6), 2, 1e-3)
    got = ufm.classify(problem, [1.5 * f for f in factors])
    assert got.name[0] == "unconverged"
    assert "the rank from 3 to 3" in got.reason[0]
    problem = ufm.Problem([9, 9, 9, 1], width=5, features="free", loss=ufm.MSE(), lam_w=0.05, lam_h=0.05)
    H, W = ufm.solve(problem, tol=1e-12).factors
    assert ufm.classify(problem, [H, W]).name[0] == "other, rank 3"
    left, right = np.linalg.svd(H[0])[0][:, 3], np.eye(4)[3]
    H, W = H + 0.04 * np.outer(left, right), W + 0.04 * np.outer(right, left)
    got = ufm.classify(problem, [H, W])
    assert got.name[0] == "unconverged"
    assert "the rank from 4 to 3" in got.reason[0]
    assert abs(float(got.reason[0].split("the value by ")[1].split(" %")[0])) < 0.1


def test_a_diverged_run_does_not_stop_the_others() -> None:
    """Factors so large that the value overflows, or only large: "diverged", no numbers; the run beside them is what it is."""
    problem, factors = setting(points.pairs(4), 2, 1e-2)
    many = [np.concatenate([f, 1e6 * f, 1e60 * f, 1e130 * f]) for f in factors]
    got = ufm.classify(problem, many)
    assert list(got.name) == ["2 pairs", *["diverged"] * 3]
    assert list(got.kind) == ["blocks", *["other"] * 3]
    assert np.isnan(got.gradient_norm[1:]).all()
    assert np.isnan(got.singular_values[1:]).all()
    assert not (got.value[1:] <= 1e8).any()
    assert list(got.rank) == [2, 0, 0, 0]
    assert got.is_minimum[0] == 1


def test_without_inertia() -> None:
    """inertia=False: the same but for the counts, which are NaN."""
    problem, factors = setting(points.polygon(5), 2, 1e-3)
    got, whole = ufm.classify(problem, factors, inertia=False), ufm.classify(problem, factors)
    assert np.isnan([got.negative[0], got.zero[0], got.is_minimum[0]]).all()
    assert whole.is_minimum[0] == 1
    for f in fields(ufm.EndPoint):
        if f.name not in ("negative", "zero", "is_minimum", "reason"):
            assert getattr(got, f.name)[0] == pytest.approx(getattr(whole, f.name)[0]) if f.type != "NDArray[np.str_]" else True


def test_samples_are_averaged() -> None:
    """Columns that are samples, and factors of torch: the same end point."""
    torch = pytest.importorskip("torch")
    problem, (H, *weights) = setting(points.pairs(4), 2, 1e-2, n=3)
    samples = replace(problem, columns="samples")
    got, means = (
        ufm.classify(samples, [torch.tensor(np.repeat(H, 3, axis=2)), *map(torch.tensor, weights)]),
        ufm.classify(problem, [H, *weights]),
    )
    assert got.name[0] == means.name[0] == "2 pairs"
    assert got.singular_values[0] == pytest.approx(means.singular_values[0], abs=1e-12)
    assert got.zero[0] == means.zero[0]


# --- beyond the catalogue of cross-entropy -------------------------------------------------------------------------------------------


@over("L", [1, 2, 4])
@over("activation", ["linear", "relu"])
def test_squared_error(L: int, activation: Any) -> None:
    """The orthogonal frame z I is DNC with its level; a critical point of lower rank (linear) has none."""
    K, lam = 4, 0.02
    if (L, activation) == (1, "relu"):
        return
    problem = ufm.Problem([1] * K, width=K + 1, depth=L, features="free", activation=activation, loss=ufm.MSE(), lam_w=lam, lam_h=lam)
    z = 1.0
    for _ in range(200):
        z = 1 - K * lam * z ** -((L - 1) / (L + 1))
    rng = None if activation == "relu" else np.random.default_rng(0)
    for rank in (K, K - 2):
        M = z * np.diag(np.arange(K) < rank)
        got = ufm.classify(problem, [f[None] for f in deep.balanced_factors(M, 1, lam, [lam] * L, K + 1, rng)])
        assert got.rank[0] == rank
        if rank == K:
            assert (got.kind[0], got.name[0]) == ("dnc", "DNC")
            assert got.level[0] == pytest.approx((1 - z) ** 2 / 2 + lam / 2 * (L + 1) * K * z ** (2 / (L + 1)), rel=1e-13)
            assert abs(got.excess[0]) < 1e-13
        else:
            assert got.name[0] == f"other, rank {rank}"


@over("loss", [ufm.MSE(), ufm.CrossEntropy()], ids=["mse", "ce"])
@over("L", [2, 3, 4])
def test_relu_constructions(loss: Any, L: int) -> None:
    """Deep ReLU chains: the orthogonal frame, the graph solution and shifted pairs by level and logits, whatever the hidden layers do."""
    K, lam, d = 6, 2e-3, 8
    squared = loss.name == "MSE"
    problem = ufm.Problem([2] * K, width=d, depth=L, features="free", activation="relu", loss=loss, lam_w=lam, lam_h=lam / 2)
    cases = [("dnc", "DNC", [deep_relu.orthogonal(K, L)])]
    cases += [("graph", "graph solution", [deep_relu.graph(4, L)])] if L > 2 else []
    cases += (
        []
        if squared
        else [("blocks", "shifted pairs", deep_relu_ce.paired(K, L)), ("code", "nonnegative T(4)", [deep_relu_ce.graph_code(4, L)])]
    )
    for kind, name, blocks in cases:
        levels = deep_relu.squared_error(blocks, lam) if squared else deep_relu_ce.cross_entropy(blocks, lam)
        factors = deep_relu.factors(blocks, levels.scales, 2, lam / 2, [lam] * L, d, centred=not squared)
        got = ufm.classify(problem, [f[None] for f in factors], polish=False)
        assert (got.kind[0], got.name[0]) == (kind, name)
        assert got.level[0] == pytest.approx(float(levels.value), rel=1e-13)
        assert abs(got.excess[0]) < 1e-12
        assert ("not stationary: scale-free gradient norm" in got.reason[0]) == (not got.gradient_norm[0] <= 1e-6)
        other = ufm.classify(problem, [1.01 * f[None] for f in factors], polish=False)
        assert other.name[0] == "unconverged"
        dear = ufm.classify(problem, [factors[0][None] * 1.1, factors[1][None] / 1.1, *(f[None] for f in factors[2:])], polish=False)
        assert dear.singular_values == pytest.approx(got.singular_values, rel=1e-12, abs=1e-12)
        assert dear.name[0] == "unconverged"


def test_solved_relu_chains_are_named_by_their_level() -> None:
    """K = 4, L = 2: descent ends at DNC, at kinks where no gradient vanishes: named where the value is the level to 1e-6."""
    problem = ufm.Problem([1] * 4, width=6, depth=2, features="free", activation="relu", loss=ufm.MSE(), lam_w=3e-3, lam_h=3e-3)
    solution = ufm.solve(problem, method="lbfgs", runs=6, seed=0, max_steps=2000)
    got = ufm.classify(problem, solution.factors, inertia=False)
    level = float(deep_relu.squared_error([deep_relu.orthogonal(4, 2)], 3e-3).value)
    assert np.all(got.value >= level * (1 - 1e-12))
    assert list(got.name == "DNC") == list(got.value <= level * (1 + 1e-6))
    assert np.sum(got.name == "DNC") > 2


def test_collapse_without_a_closed_form() -> None:
    """Nonnegative features, label smoothing, a penalty of 0: DNC by its shape, no level; unequal counts: no collapse, no catalogue."""
    for options in (
        {"features": "relu"},
        {"features": "free", "loss": ufm.CrossEntropy(label_smoothing=0.1)},
        {"features": "free", "loss": ufm.MSE(), "lam_b": 0.01},
    ):
        problem = ufm.Problem([2] * 4, width=5, lam_w=5e-3, lam_h=5e-3, **options)
        got = ufm.classify(problem, ufm.solve(problem, runs=2, seed=1).factors)
        assert list(got.kind) == ["dnc"] * 2
        assert np.isnan(got.level).all()
        assert np.isnan(got.excess).all()
        assert (got.rank == 3).all()
        assert "no closed form" in got.reason[0]
    problem = ufm.Problem([[4, 2, 1, 1], [2, 2, 2, 2]], width=5, features="free", lam_w=5e-3, lam_h=5e-3)
    got = ufm.classify(problem, ufm.solve(problem, seed=1).factors)
    assert list(got.name) == ["other, rank 3", "DNC"]
    assert list(np.isnan(got.level)) == [True, False]


# --- reading logits ------------------------------------------------------------------------------------------------------------------


@over("code", [points.polygon(5), points.relaxed_pairs(5), points.blocks([3, 2]), points.blocks([2, 2, 1])], ids=lambda c: c.name)
def test_invariants_are_those_of_relabelled_classes(code: Any) -> None:
    """K = 5, against all 120 orders: unchanged by each; of entries shuffled outside the diagonal, close only if some order is."""
    M = points.at(code, 1e-3, 2).M
    M = M / np.abs(M).max()
    orders = [np.ix_(p, p) for p in permutations(range(5))]
    mine = invariants(M[None])[0]
    assert np.abs(np.stack([invariants(M[None][:, *o])[0] for o in orders]) - mine).max() < 1e-12
    rng, outside, strangers = np.random.default_rng(0), ~np.eye(5, dtype=bool), 0
    for _ in range(200):
        N = M.copy()
        N[outside] = rng.permutation(M[outside])
        distance = min(np.abs(N[o] - M).max() for o in orders)
        assert (np.abs(invariants(N[None])[0] - mine).max() <= CLOSE) == (distance < 1e-9)
        strangers += distance > 1e-9
    assert strangers > 100


def test_partitions() -> None:
    """Sizes of the sets of classes that a chain of logits connects, rounding aside."""
    M = np.zeros((3, 6, 6))
    for b, edges in enumerate([[(0, 3), (3, 5), (5, 1)], [], [(0, 1), (2, 3), (5, 4)]]):
        for i, j in edges:
            M[b, i, j] = -1.0
    M += 1e-7 * np.random.default_rng(0).standard_normal(M.shape) + np.eye(6)
    assert partitions(M) == [(4, 1, 1), (1,) * 6, (2, 2, 2)]


def test_files(tmp_path: Path) -> None:
    """Saved and loaded bit for bit, texts too."""
    got = ufm.classify(*setting(points.polygon(5), 2, 1e-3))
    got.save(tmp_path / "end.npz")
    back = ufm.EndPoint.load(tmp_path / "end.npz")
    for f in fields(ufm.EndPoint):
        assert np.array_equal(getattr(got, f.name), getattr(back, f.name))


SMALL = ufm.Problem([1, 1], width=2, features="free", lam_w=0.1, lam_h=0.1)


@over(
    ("call", "says"),
    [
        (lambda: ufm.classify(SMALL, catalog.factors(SMALL)[:1]), "classify: the factors have shapes"),
        (lambda: ufm.classify(SMALL, [np.inf * f for f in catalog.factors(SMALL)]), "classify: the factors hold NaN or infinity"),
        (lambda: ufm.classify("SMALL", catalog.factors(SMALL)), "classify: problem is 'SMALL'"),
        (lambda: ufm.classify(SMALL, 3), "classify: factors is 3"),
    ],
)
def test_bad_input_is_told(call: Callable[[], Any], says: str) -> None:
    """Each refusal names this call."""
    with pytest.raises((TypeError, ValueError), match=says):
        call()
