"""Global search of deep linear chains: never above a closed form, equal to it where it wins, and every end point is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ufm
from ufm.solvers.fixed_rank import Found, Reduced, at_rank, chart_at, moved_in, polish
from ufm.solvers.search import Minima, codes, local_minima
from ufm.theory import deep, deep_points, deep_stability

Floats = NDArray[np.float64]


def linear(counts: Any, depth: int, lam: Any, width: int | None = None, **more: Any) -> ufm.Problem:
    size = len(counts) if width is None else width
    return ufm.Problem(counts, width=size, depth=depth, features="free", lam_w=lam, lam_h=lam, **more)


def catalogued(K: int, depth: int, lam: float) -> dict[str, float]:
    """The closed-form levels that exist, zero among them."""
    levels = {code.name: float(deep_points.levels(code, lam, depth).value) for code in deep_points.candidates(K)}
    return {name: value for name, value in levels.items() if np.isfinite(value)} | {"zero": float(np.log(K))}


# K, depth, lambda_eff -> the catalogued winner, or None where a code without a closed form is lower
WINNERS = [
    (3, 2, 1e-3, "DNC of 3 classes"),
    (4, 2, 1e-2, "DNC of 4 classes"),
    (4, 2, 1.3e-2, "2 pairs"),  # the crossover is at 0.01176
    (5, 2, 1e-4, "DNC of 5 classes"),
    (5, 2, 1.5e-4, "2 pairs and a class, relaxed"),  # the crossover is at 1.2357e-4
    (6, 2, 1e-5, "3 pairs"),
    (7, 2, 1e-3, "3 pairs and a class, relaxed"),
    (8, 3, 1e-3, "square antiprism"),
    (9, 4, 1e-3, None),
    pytest.param(10, 3, 1e-6, "T(5)", marks=pytest.mark.slow),
    pytest.param(10, 3, 1e-3, None, marks=pytest.mark.slow),
    pytest.param(12, 3, 1e-2, "icosahedron", marks=pytest.mark.slow),
    pytest.param(12, 3, 1e-6, None, marks=pytest.mark.slow),
    (5, 4, 0.3, "zero"),
]


@pytest.mark.parametrize(("K", "depth", "lam", "name"), WINNERS)
def test_best_found_against_the_closed_forms(K: int, depth: int, lam: float, name: str | None) -> None:
    """Never above a catalogued level; equal to the lowest to 1e-13 where that is the best known, strictly below elsewhere."""
    found = local_minima(linear(ufm.counts.balanced(K, 1), depth, lam), starts=4, keep=3)
    best, levels = found.value[0], catalogued(K, depth, lam)
    assert best <= min(levels.values()) * (1 + 1e-13)
    if name is None:
        assert best < min(levels.values()) * (1 - 1e-5)
    else:
        assert name == min(levels, key=lambda n: levels[n])
        assert best == pytest.approx(levels[name], rel=1e-13)
    assert np.all(found.gradient_norm < 1e-11)
    assert np.all(found.is_minimum == 1)
    assert np.all(np.diff(found.value) > 0)


def test_crossovers_are_seen() -> None:
    """K = 4, L = 2: both minima on either side of the known crossover, their order changing there."""
    at = deep.crossover(deep_points.dnc(4), deep_points.pairs(4), 2, 1e-3, 0.1)
    found = local_minima(linear([1] * 4, 2, at * np.array([0.999, 1.001])), starts=3)
    assert [found.rank[found.of(g)[:2]].tolist() for g in range(2)] == [[3, 2], [2, 3]]


@pytest.mark.parametrize("columns", ["means", "samples"])
def test_factors_reproduce_the_minima(columns: Any) -> None:
    """solve() returns factors of the problem's own width, counts and unequal penalties: their F, by plain sums, is the minimum's."""
    lam_w, lam_h, counts = [2e-3, 5e-4, 1e-3], 3e-4, np.array([4, 4, 2, 1])
    problem = ufm.Problem(counts, width=5, depth=3, features="free", lam_w=[lam_w], lam_h=lam_h, columns=columns)
    found, minima = ufm.solve(problem, method="multistart", runs=3), local_minima(problem, starts=3)
    assert found.value == pytest.approx(minima.value[:3], rel=1e-13)
    labels = np.repeat(np.arange(4), counts)
    for b in range(3):
        H, *W = (f[b] for f in found.factors)
        H = H if columns == "samples" else H[:, labels]
        Z = W[2] @ W[1] @ W[0] @ H
        loss = np.mean([np.log(np.exp(z - z[y]).sum()) for z, y in zip(Z.T, labels, strict=True)])
        penalty = sum(lam / 2 * (F**2).sum() for lam, F in zip([lam_h, *lam_w], [H, *W], strict=True))
        assert loss + penalty == pytest.approx(found.value[b], rel=1e-12)
    assert np.all(found.gradient_norm < 1e-11)
    assert set(found.stop) == {ufm.Stop.GRADIENT}
    assert np.all(np.isnan(found.gap))


def test_as_good_as_many_descents_with_imbalance() -> None:
    """Unequal classes: the lowest of 200 plain descents is found, and none is lower; each of their levels is a listed minimum."""
    problem = linear([9, 6, 3, 2], 2, 3e-3)
    found = local_minima(problem, starts=10)
    descents = ufm.solve(problem, method="lbfgs", runs=200, start=ufm.starts.normal(2.0), tol=1e-11).value
    assert found.value[0] == pytest.approx(descents.min(), rel=1e-11)
    assert np.abs(found.value[None, :] / descents[:, None] - 1).min(axis=1).max() < 1e-9


def test_squared_error_is_as_derived() -> None:
    """MSE, L = 2: s = z on j of the K axes, K lambda = (1 - z) z^{1/3}, F = (j (1-z)^2 + K - j)/(2K) + (3/2) lambda j z^{2/3}."""
    K, z = 4, 0.9
    lam = (1 - z) * z ** (1 / 3) / K
    found = local_minima(linear([1] * K, 2, lam, loss=ufm.MSE()), starts=5)
    j = np.arange(K, -1, -1)
    assert found.value == pytest.approx((j * (1 - z) ** 2 + K - j) / (2 * K) + 1.5 * lam * j * z ** (2 / 3), rel=1e-13)
    assert found.rank.tolist() == j.tolist()
    assert found.logits[0] == pytest.approx(z * np.eye(K), abs=1e-12)


@pytest.mark.parametrize("width", [4, 6])
def test_one_layer_is_convex(width: int) -> None:
    """L = 1: one minimum, that of the proven solver; zero is one iff lambda_eff >= 1/K."""
    problem = linear([8, 5, 2, 1], 1, 0.02, width)
    found = ufm.solve(problem, method="multistart", runs=2)
    assert found.value == pytest.approx(np.repeat(ufm.solve(problem, tol=1e-12).value, 2), rel=1e-11)
    assert np.all(np.abs(found.gap) < 1e-10)
    for lam, expected in ((0.249, 0), (0.251, 1)):
        minima = local_minima(linear([1] * 4, 1, lam), starts=2)
        assert minima.is_minimum[minima.rank == 0].tolist() == [expected]


def test_a_narrow_chain_has_no_more_rank_than_width() -> None:
    found = local_minima(linear([1] * 6, 2, 1e-3, width=2), starts=6)
    assert found.rank.max() == 2
    wide = local_minima(linear([1] * 6, 2, 1e-3), starts=6)
    assert found.value[0] == pytest.approx(wide.value[wide.rank == 2].min(), rel=1e-12)


def test_a_cell_does_not_depend_on_its_grid() -> None:
    problem = linear([2] * 5, 3, np.array([1e-3, 1e-2]))
    grid, alone = local_minima(problem, starts=4, seed=3), local_minima(problem.cell(1), starts=4, seed=3)
    own = grid.of(1)
    assert alone.value == pytest.approx(grid.value[own], rel=1e-13)
    assert alone.reached.tolist() == grid.reached[own].tolist()
    assert grid.reached.sum() == grid.starts.sum()
    assert grid.value[own[0]] <= local_minima(problem.cell(1), starts=1, seed=3).value[0] * (1 + 1e-13)


@pytest.mark.parametrize("keep", [1, 3])
def test_nor_do_the_starts_given_up_early(keep: int) -> None:
    """What is well above the lowest is that of the own cell, whatever the values beside it."""
    problem = linear([1] * 6, 2, np.array([1e-5, 3e-2, 1e-3]))
    grid = local_minima(problem, starts=5, seed=3, keep=keep)
    for g in range(3):
        alone, own = local_minima(problem.cell(g), starts=5, seed=3, keep=keep), grid.of(g)
        assert alone.value == pytest.approx(grid.value[own], rel=1e-13)
        assert alone.reached.tolist() == grid.reached[own].tolist()
        assert alone.steps[0] == grid.steps[g]


def test_results_fill_their_shape() -> None:
    """One row a run whatever was found: a single minimum (zero) is repeated."""
    found = ufm.solve(linear([1] * 3, 3, np.array([1e-2, 3.0])), method="multistart", runs=4)
    assert found.value.shape == (8,)
    assert found.value[4:] == pytest.approx(np.full(4, np.log(3)))
    assert found.logits.shape == (8, 3, 3)


def some_point(depth: int, rank: int, seed: int) -> tuple[Reduced, Found]:
    counts = np.array([5, 3, 2, 2, 1])
    F = Reduced.of(linear(counts, depth, 2e-2))
    U, V = (np.linalg.qr(np.random.default_rng([seed, side]).standard_normal((5, rank)))[0] for side in (0, 1))
    return F, at_rank(F, (U * np.linspace(3, 5, rank)) @ V.T, rank)


@pytest.mark.parametrize(("depth", "rank"), [(1, 4), (2, 1), (2, 3), (3, 5), (7, 2)])
def test_gradient_and_hessian_among_matrices_of_a_rank(depth: int, rank: int) -> None:
    """Against differences of F along the chart, of second order in the step."""
    F, point = some_point(depth, rank, 2)
    assert len(point.s) == rank
    chart = chart_at(F, point)
    rng = np.random.default_rng(5)
    for _ in range(4):
        v = rng.standard_normal(len(chart.gradient))
        h = 5e-4
        values = []
        for t in (-h, 0, h):
            X = moved_in(chart, point.s, t * v)
            assert X is not None
            assert np.linalg.matrix_rank(X, tol=1e-9) == rank
            s = np.linalg.svd(X, compute_uv=False)[:rank]
            values.append(float(F.fit(X[None])[0] + F.penalty(s)))
        assert (values[2] - values[0]) / (2 * h) == pytest.approx(chart.gradient @ v, rel=1e-4)
        assert (values[2] - 2 * values[1] + values[0]) / h**2 == pytest.approx(v @ chart.hessian @ v, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("K", "depth", "lam", "index"), [(10, 2, 0.03, 0), (10, 2, 0.05, 35), (6, 3, 0.1, 9), (20, 3, 1e-3, 170)])
def test_index_at_dnc(K: int, depth: int, lam: float, index: int) -> None:
    """Negative eigenvalues at DNC are those of the closed-form spectrum of the whole Hessian; off a saddle F falls to a minimum."""
    F, point = Reduced.of(linear([1] * K, depth, lam)), deep_points.at(deep_points.dnc(K), lam, depth)
    alpha = float(point.scales[0])
    assert deep_stability.dnc_index(K, alpha, depth) == index
    chart = chart_at(F, at_rank(F, point.M, K - 1))
    assert chart.residual < 1e-13
    assert chart.negative == index
    assert chart.flat == 0
    end = polish(F, point.M, K - 1)
    assert end.negative == 0
    assert end.residual < 1e-12
    assert (end.value * F.unit[0] < point.value * (1 - 1e-6)) == (index > 0)


def test_minima_are_minima_of_the_whole_chain() -> None:
    """ufm.hessian of the problem at its own width agrees: no negative eigenvalue, zero ones from the orbit alone."""
    problem = linear([3, 2, 2, 1], 2, 1e-2)
    found = ufm.solve(problem, method="multistart", runs=4)
    spectrum = ufm.hessian(ufm.Problem([[3, 2, 2, 1]] * 4, width=4, depth=2, features="free", lam_w=1e-2, lam_h=1e-2), found.factors)
    assert spectrum.is_minimum.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("K", range(3, 13))
def test_structured_starts_have_their_rank(K: int) -> None:
    for rank in range(1, K):
        grams = codes(K, rank)
        assert grams
        assert {np.linalg.matrix_rank(gram, tol=1e-9) for gram in grams} == {rank}


def test_minima_come_back_from_disk(tmp_path: Path) -> None:
    found = local_minima(linear([1] * 3, 2, 1e-2), starts=2)
    found.save(tmp_path / "minima.npz")
    loaded = Minima.load(tmp_path / "minima.npz")
    assert np.array_equal(loaded.logits, found.logits)
    assert np.array_equal(loaded.rank, found.rank)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"features": "relu"}, "features='free'"),
        ({"activation": "relu"}, "activation='linear'"),
        ({"lam_b": 0.1}, "lam_b=None"),
        ({"loss": ufm.Focal(2.0)}, "a convex loss"),
        ({"lam_h": 0.0}, "every penalty positive"),
    ],
)
def test_what_is_not_reduced_is_refused(change: dict[str, Any], missing: str) -> None:
    options: dict[str, Any] = {"width": 3, "depth": 2, "features": "free", "lam_w": 1e-2, "lam_h": 1e-2}
    with pytest.raises(ValueError, match=missing):
        ufm.solve(ufm.Problem([2, 2, 2], **options | change), method="multistart")


def test_options_are_checked() -> None:
    problem = linear([1] * 3, 2, 1e-2)
    with pytest.raises(ValueError, match="makes its own starts"):
        ufm.solve(problem, method="multistart", start=ufm.starts.normal())
    for name, value in (("starts", 0), ("keep", 0), ("keep", -1), ("keep", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be a whole number"):
            local_minima(problem, **{name: value})
    with pytest.raises(TypeError, match="local_minima: problem is None"):
        local_minima(None)  # type: ignore[arg-type]


def test_why_a_run_ended_is_told_against_the_tolerance() -> None:
    """Nothing comes below 1e-18 in float64, so that tolerance is not met, and the record must not say that it was."""
    problem = linear([1] * 4, 2, 1e-2)
    for tol, expected in ((1e-9, ufm.records.Stop.GRADIENT), (1e-18, ufm.records.Stop.STALLED)):
        found = ufm.solve(problem, method="multistart", runs=2, tol=tol)
        assert found.stop == (expected,) * 2
        assert np.all((found.gradient_norm <= tol) == (expected is ufm.records.Stop.GRADIENT))
