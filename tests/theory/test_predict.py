"""`predict`: laws that every prediction obeys, on a catalogue of problems; what has no theory, and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from oracle import bias_alone, copositive_norm, dual_point, mp, plain, realise, realise_relu, zero_norm
from ufm.losses import MSE, CrossEntropy, Focal
from ufm.problem import Problem
from ufm.records import NoTheory, Regime
from ufm.theory import predict

Floats = NDArray[np.float64]

STEP, GEOMETRIC, EQUAL = [100, 100, 10, 10], [200, 90, 40, 15], [30, 30, 30, 30]
README = [5000] * 3 + [4000] * 3 + [3000] * 4
LEVELS = np.geomspace(3e-4, 0.3, 25)


def grid(counts: list[int], features: str, loss: Any, lam_b: float | None, depth: int = 1, levels: Floats = LEVELS) -> Problem:
    """25 levels of regularisation, with unequal penalties."""
    K, tilt = len(counts), 2.0 ** np.arange(depth)
    norm = float(np.prod(tilt)) ** (1 / (depth + 1))
    lam_w, lam_h = levels[:, None] * tilt / norm, levels / norm
    return Problem(counts, width=K, depth=depth, features=features, loss=loss, lam_w=lam_w, lam_h=lam_h, lam_b=lam_b)  # type: ignore[arg-type]


WEIGHTED = CrossEntropy(class_weights=[0.4, 0.4, 2.5, 2.5])
PROBLEMS: dict[str, Problem] = {
    "relu_ce_step": grid(STEP, "relu", CrossEntropy(), None),
    "relu_ce_geometric": grid(GEOMETRIC, "relu", CrossEntropy(), None),
    "relu_ce_weighted": grid(STEP, "relu", WEIGHTED, None),
    "relu_ce_equal": grid(EQUAL, "relu", CrossEntropy(), None),
    "relu_ce_equal_bias": grid(EQUAL, "relu", CrossEntropy(), 0.0),
    "relu_ce_step_bias": grid(STEP, "relu", CrossEntropy(), 0.05),
    "relu_ce_step_free_bias": grid(STEP, "relu", CrossEntropy(), 0.0),
    "ce_equal": grid(EQUAL, "free", CrossEntropy(), None),
    "ce_equal_bias": grid(EQUAL, "free", CrossEntropy(), 0.3),
    "ce_step": grid(STEP, "free", CrossEntropy(), None),
    "ce_step_bias": grid(STEP, "free", CrossEntropy(), 0.05),
    "ce_step_free_bias": grid(STEP, "free", CrossEntropy(), 0.0),
    "ce_geometric": grid(GEOMETRIC, "free", CrossEntropy(), 0.0),
    "ce_single_minority": grid([100, 100, 100, 5], "free", CrossEntropy(), None),
    "ce_weighted": grid(STEP, "free", WEIGHTED, None),
    "mse_step": grid(STEP, "free", MSE(), None),
    "mse_geometric_relu": grid(GEOMETRIC, "relu", MSE(), None),
    "mse_step_free_bias": grid(STEP, "free", MSE(), 0.0),
    "mse_single_minority": grid([100, 100, 100, 5], "free", MSE(), 0.0),
    "mse_geometric_free_bias": grid(GEOMETRIC, "free", MSE(), 0.0),
    "mse_equal_relu_bias": grid(EQUAL, "relu", MSE(), 0.0),
    "mse_step_relu_bias": grid(STEP, "relu", MSE(), 0.0),
    "mse_deep_step": grid(STEP, "free", MSE(), None, depth=3),
    "mse_deep_step_relu": grid(STEP, "relu", MSE(), None, depth=2),
    "mse_deep_step_free_bias": grid(STEP, "free", MSE(), 0.0, depth=3),
    "mse_deep_single_minority": grid([100, 100, 100, 5], "free", MSE(), 0.0, depth=2),
}
every = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def scaled(problem: Problem, g: int, factor: float) -> Problem:
    """Cell g with every penalty but the bias's times `factor`."""
    cell = problem.cell(g)
    return replace(cell, lam_w=cell.lam_w * factor, lam_h=cell.lam_h * factor)


def factors_of(problem: Problem, found: Any, g: int) -> list[Floats]:
    """Explicit factors that realise the predicted logits; nonnegative features where the problem asks for them."""
    n = problem.counts[g].astype(float)
    Z = found.logits[g] - found.bias[g][:, None]
    if problem.features == "relu" and problem.depth == 1:
        return realise_relu(Z, found.feature_gram[g])
    return realise(Z, n, list(problem.lam_w[g]), float(problem.lam_h[g]))


def finite(found: Any) -> list[int]:
    return [int(g) for g in np.flatnonzero(np.isfinite(found.value))]


@every
def test_points_are_worth_their_value_and_have_their_grams(problem: Problem) -> None:
    """Factors that realise the logits have both Grams and, by loops, the value; no cell is half filled."""
    found, K = predict(problem), problem.classes
    assert finite(found)
    fields = (found.margins, found.logits, found.feature_gram, found.classifier_gram, found.bias)
    for field in fields:
        assert np.array_equal(np.isfinite(field).reshape(problem.cells, -1).all(axis=1), np.isfinite(found.value))
        assert np.array_equal(np.isnan(field).reshape(problem.cells, -1).all(axis=1), np.isnan(found.value))
    for g in finite(found):
        H, *W = factors_of(problem, found, g)
        end = np.eye(K)
        for layer in W:
            end = layer @ end
        scale_h, scale_w = max(found.feature_gram[g].max(), 1e-3), max(found.classifier_gram[g].max(), 1e-3)
        np.testing.assert_allclose(H.T @ H, found.feature_gram[g], atol=1e-11 * scale_h)
        np.testing.assert_allclose(end @ end.T, found.classifier_gram[g], atol=1e-11 * scale_w)
        lam_b = 0.0 if problem.lam_b is None else float(problem.lam_b[g])
        omega = getattr(problem.loss, "class_weights", None)
        name = "CE" if isinstance(problem.loss, CrossEntropy) else "MSE"
        F = plain([H, *W], found.bias[g], list(problem.counts[g]), list(problem.lam_w[g]), problem.lam_h[g], lam_b, loss=name, omega=omega)
        assert found.value[g] == pytest.approx(F, rel=1e-12)
        own = np.diag(found.logits[g])
        others = (found.logits[g].sum(axis=0) - own) / (K - 1)
        np.testing.assert_allclose(found.margins[g], own - others, atol=1e-12)


@every
def test_depth_one_points_carry_their_certificate(problem: Problem) -> None:
    """Qt has norm at most sqrt(lam_w lam_h) (spectral, or over v >= 0 where H >= 0): globally optimal."""
    if problem.depth > 1:
        return
    found = predict(problem)
    for g in finite(found):
        n, lam = problem.counts[g].astype(float), float(np.sqrt(problem.lam_w[g, 0] * problem.lam_h[g]))
        name = "CE" if isinstance(problem.loss, CrossEntropy) else "MSE"
        Q = dual_point(found.logits[g], n, loss=name, omega=getattr(problem.loss, "class_weights", None))
        if problem.lam_b is not None:
            np.testing.assert_allclose((Q * np.sqrt(n)).sum(axis=1), problem.lam_b[g] * found.bias[g], atol=1e-14)
        norm = copositive_norm(Q) if problem.features == "relu" else np.linalg.norm(Q, 2)
        assert norm <= lam * (1 + 1e-11)


@every
def test_collapsed_classes_are_those_without_features(problem: Problem) -> None:
    found = predict(problem)
    for g in finite(found):
        assert np.array_equal(found.collapsed[g], np.diag(found.feature_gram[g]) <= 1e-25)
        full = {Regime.ALL_ZERO: found.collapsed[g].all(), Regime.MINORITY_ZERO: 0 < found.collapsed[g].sum() < problem.classes}
        assert full.get(found.regime[g], not found.collapsed[g].any())


@every
def test_distance_leads_to_the_nearest_boundary(problem: Problem) -> None:
    """Scaling the penalties by e^{-distance} reaches a change of regime, and no change lies nearer."""
    found = predict(problem)
    assert np.array_equal(np.isnan(found.distance), [regime is Regime.UNKNOWN for regime in found.regime])
    for g in np.flatnonzero(np.isfinite(found.distance))[::2]:
        star = float(np.exp(-found.distance[g]))

        def regime(factor: float, g: int = int(g)) -> Regime:
            return predict(scaled(problem, g, factor)).regime[0]

        assert regime(star * (1 - 1e-9)) is not regime(star * (1 + 1e-9))
        reach = np.exp(abs(found.distance[g])) * (1 - 1e-9)
        assert {regime(f) for f in (reach, reach**0.5, 1.0, reach**-0.5, 1 / reach)} == {found.regime[g]}


@every
def test_regimes_come_in_order(problem: Problem) -> None:
    """With more regularisation: distinct, merged, minority at zero, all at zero; the last is reached."""
    order = [Regime.UNKNOWN, Regime.DISTINCT, Regime.MERGED, Regime.MINORITY_ZERO, Regime.ALL_ZERO]
    seen = [order.index(regime) for regime in predict(problem).regime]
    assert seen == sorted(seen)
    assert seen[-1] == 4
    assert len(set(seen)) >= 2


@every
def test_grids_are_predicted_cell_by_cell(problem: Problem) -> None:
    whole = predict(problem)
    for g in (0, 11, 24):
        alone = predict(problem.cell(g))
        assert (alone.regime[0], alone.source[0]) == (whole.regime[g], whole.source[g])
        for name in ("value", "distance", "collapsed", "margins", "logits", "feature_gram", "classifier_gram", "bias"):
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(whole, name)[g], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["relu_ce_step", "mse_step", "ce_equal"])
def test_samples_and_means_are_one_theory(name: str) -> None:
    problem = PROBLEMS[name]
    for a, b in ((predict(problem), predict(replace(problem, columns="samples"))),):
        np.testing.assert_array_equal(a.value, b.value)
        np.testing.assert_array_equal(a.logits, b.logits)


def test_rectified_features_have_the_infimum_of_nonnegative_ones() -> None:
    problem = PROBLEMS["relu_ce_step"]
    other = replace(problem, features="relu_of_free", columns="samples")
    np.testing.assert_array_equal(predict(problem).value, predict(other).value)


def test_a_bias_changes_nothing_when_classes_are_equal() -> None:
    for features in ("relu", "free"):
        without, with_bias = (predict(grid(EQUAL, features, CrossEntropy(), lam_b)) for lam_b in (None, 0.1))
        np.testing.assert_allclose(without.logits, with_bias.logits, atol=1e-14)
        np.testing.assert_allclose(without.value, with_bias.value, rtol=1e-14)
        assert not with_bias.bias.any()


def test_the_peers_readme_example_is_trivial() -> None:
    """All features at zero, 2.76 times beyond the level; the value is that of the best bias alone, at 50 digits."""
    found = predict(Problem(README, width=10, features="free", lam_w=0.005, lam_h=0.005, lam_b=0.02))
    assert found.regime == (Regime.ALL_ZERO,)
    assert np.exp(found.distance[0]) == pytest.approx(2.76, abs=0.005)
    shares = [x / sum(README) for x in README]
    b = bias_alone(shares, 0.02)
    top = mp.log(sum(mp.exp(x) for x in b))
    exact = sum(mp.mpf(p) * (top - x) for p, x in zip(shares, b, strict=True)) + mp.mpf(0.01) * sum(x * x for x in b)
    assert abs(found.value[0] - exact) <= 1e-13 * exact
    np.testing.assert_allclose(found.logits[0], np.tile([[float(x)] for x in b], (1, 10)), atol=1e-13)
    assert found.collapsed.all()
    assert not found.feature_gram.any()


def test_unequal_free_cross_entropy_knows_its_regime_without_a_closed_form() -> None:
    """Below complete collapse: DISTINCT or MERGED with distance, and a source that says what is missing."""
    found = predict(PROBLEMS["ce_step"])
    for regime in (Regime.DISTINCT, Regime.MERGED):
        g = found.regime.index(regime)
        assert np.isnan(found.value[g])
        assert np.isfinite(found.distance[g])
        assert "no closed form: cross-entropy, free features, unequal classes" in found.source[g]
    level, merging = np.sqrt(PROBLEMS["ce_step"].lam_w[:, 0] * PROBLEMS["ce_step"].lam_h), np.sqrt(10) / 220
    assert [r is Regime.DISTINCT for r in found.regime] == list(level < merging)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("relu_ce_step_bias", "nonnegative features, a bias and unequal classes"),
        ("mse_step_relu_bias", "nonnegative features, free bias and unequal classes"),
    ],
)
def test_cells_without_theory_say_why(name: str, says: str) -> None:
    found = predict(PROBLEMS[name])
    assert says in found.source[0]
    assert (found.regime[0], np.isnan(found.value[0]), np.isnan(found.distance[0])) == (Regime.UNKNOWN, True, True)
    assert found.regime[-1] is Regime.ALL_ZERO
    assert found.distance[-1] > 0


def test_a_zero_penalty_has_no_closed_form() -> None:
    for loss in (CrossEntropy(), MSE()):
        found = predict(Problem(STEP, width=4, features="free", loss=loss, lam_w=[0.0, 1e-3, 1e-3], lam_h=[1e-3, 0.0, 1e-3]))
        assert ["a penalty is zero" in s for s in found.source] == [True, True, False]
        assert list(np.isnan(found.distance)) == [True, True, False]
        assert found.regime[0] is Regime.UNKNOWN
        assert not found.collapsed[:2].any()


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("relu_ce_step", 4),
        ("ce_equal", 3),
        ("mse_step", 4),
        ("mse_step_free_bias", 3),
        ("mse_deep_step", 4),
        ("mse_equal_relu_bias", 4),
        ("ce_step", 3),
    ],
)
def test_width_is_asked_of_each_cell(name: str, rank: int) -> None:
    """Enough width for the optimum's rank, and no more, is needed; cells of lower rank stay."""
    enough, short = (predict(replace(PROBLEMS[name], width=d)) for d in (rank, rank - 1))
    assert enough.regime[0] is not Regime.UNKNOWN
    assert short.regime[0] is Regime.UNKNOWN
    assert np.isnan(short.value[0])
    assert np.isnan(short.distance[0])
    assert f"width is {rank - 1}, but the optimum needs {rank}" in short.source[0]
    assert short.regime[-1] is Regime.ALL_ZERO
    assert predict(replace(PROBLEMS[name], width=1)).regime[-1] is Regime.ALL_ZERO


def test_penalised_and_free_biases_may_share_a_grid() -> None:
    for features in ("free", "relu"):
        found = predict(Problem(EQUAL, width=4, features=features, loss=MSE(), lam_w=1e-3, lam_h=1e-3, lam_b=[0.0, 0.1]))  # type: ignore[arg-type]
        assert list(np.isfinite(found.value)) == [True, False]
        assert "penalised bias" in found.source[1]


def broken(**change: Any) -> Callable[[], Problem]:
    common: dict[str, Any] = {"width": 4, "features": "free", "lam_w": 1e-3, "lam_h": 1e-3}
    return lambda: Problem(STEP, **{**common, **change})


PLAIN = r"loss is plain cross-entropy \(no smoothing, adjustment or temperature\)"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (broken(depth=2), "'cross-entropy' needs: depth is 1"),
        (broken(depth=2, features="relu"), "'ReLU cross-entropy' needs: depth is 1"),
        (broken(loss=CrossEntropy(label_smoothing=0.1)), f"'cross-entropy' needs: {PLAIN}"),
        (broken(loss=CrossEntropy(logit_adjustment=1.0)), PLAIN),
        (broken(loss=CrossEntropy(temperature=2.0), features="relu"), f"'ReLU cross-entropy' needs: {PLAIN}"),
        (broken(loss=Focal(2.0)), f"{PLAIN}.*'squared error' needs: loss is mean squared error"),
        (broken(loss=MSE(), depth=2, activation="relu"), "'squared error' needs: chain is linear"),
        (broken(loss=MSE(), lam_b=0.1), r"'squared error with bias' needs: bias is free \(lam_b = 0\) in some cell"),
        (
            broken(loss=MSE(), lam_b=0.0, depth=2, features="relu"),
            "needs: features are free.*'ReLU squared error with bias' needs: depth is 1",
        ),
    ],
)
def test_problems_without_theory_name_the_failed_hypothesis(make: Callable[[], Problem], says: str) -> None:
    with pytest.raises(NoTheory, match=says):
        predict(make())


@pytest.mark.parametrize(("name", "value"), [("radius", 1.0), ("head", Focal(1.0))])
def test_other_heads_and_normalised_features_have_no_theory(name: str, value: Any) -> None:
    problem = broken()()
    object.__setattr__(problem, name, value)
    with pytest.raises(NoTheory, match="'cross-entropy' needs: classifier is learned and features are penalised"):
        predict(problem)


def test_extreme_grids_raise_no_warning() -> None:
    """Penalties from 1e-300 to 1e30 and counts of 1e9: every field finite, collapse where it must be."""
    lam = np.array([1e-300, 1e-100, 1e-20, 1.0, 1e30])
    for features, loss, lam_b, counts in (
        ("relu", CrossEntropy(), None, [10**9, 10**9, 1]),
        ("free", CrossEntropy(), 0.1, [7, 7, 7]),
        ("free", MSE(), 0.0, [10**9, 1000, 1]),
        ("relu", MSE(), None, [10**9, 1000, 1]),
    ):
        found = predict(Problem(counts, width=3, features=features, loss=loss, lam_w=lam, lam_h=lam, lam_b=lam_b))  # type: ignore[arg-type]
        assert np.isfinite(found.value).all()
        assert np.isfinite(found.feature_gram).all()
        assert found.regime[0] is Regime.DISTINCT
        assert found.regime[-1] is Regime.ALL_ZERO


def test_a_thousand_classes() -> None:
    found = predict(Problem([100] * 500 + [1] * 500, width=1000, features="relu", lam_w=2e-5, lam_h=2e-5))
    assert found.regime == (Regime.MINORITY_ZERO,)
    assert found.collapsed.sum() == 500
    found = predict(Problem([100] * 500 + [1] * 500, width=1000, features="free", lam_w=2.05e-5, lam_h=2.05e-5, lam_b=0.0))
    assert found.regime == (Regime.MERGED,)


def test_theory_loads_numpy_only() -> None:
    code = "import sys, ufm.theory; print([m for m in ('scipy', 'matplotlib', 'torch', 'pymanopt', 'autograd') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_zero_without_an_exact_level_has_no_distance() -> None:
    """Thirty different classes, H >= 0, free bias: between the bounds unknown, above the spectral norm at zero, at a distance not known."""
    n = np.linspace(1000, 1, 30).round().astype(int)
    norm = float(zero_norm([float(x) for x in n], list(n / n.sum())))
    lam = norm * np.array([0.5, 1 - 1e-9, 1 + 1e-9])
    found = predict(Problem(n, width=30, features="relu", lam_w=lam, lam_h=lam, lam_b=0.0))
    assert found.regime == (Regime.UNKNOWN, Regime.UNKNOWN, Regime.ALL_ZERO)
    assert np.isnan(found.distance).all()
    assert list(np.isfinite(found.value)) == [False, False, True]


@pytest.mark.parametrize("loss", [CrossEntropy(), MSE()], ids=["CE", "MSE"])
def test_two_classes_with_nonnegative_features_and_a_free_bias_have_a_value_only(loss: Any) -> None:
    """The bias can carry any share of either class, even at width 1: a continuum of optima, one value; a penalised bias settles it."""
    for width in (1, 2):
        free = predict(Problem([2, 2], width=width, features="relu", lam_w=1e-3, lam_h=1e-3, lam_b=0.0, loss=loss))
        assert free.regime == (Regime.UNKNOWN,)
        assert np.isfinite(free.value).all()
        assert np.isnan(free.margins).all()
        assert "two classes" in free.source[0]
    above = predict(Problem([2, 2], width=2, features="relu", lam_w=10.0, lam_h=10.0, lam_b=0.0, loss=loss))
    assert above.regime == (Regime.ALL_ZERO,)
    if loss.name == "CE":
        settled = predict(Problem([2, 2], width=2, features="relu", lam_w=1e-3, lam_h=1e-3, lam_b=0.1))
        assert settled.value == pytest.approx(free.value, rel=1e-14)
        assert settled.regime == (Regime.DISTINCT,)


def test_a_constant_adjustment_is_no_adjustment() -> None:
    """Adding one number to all logits changes nothing: the closed form still applies."""
    make = dict(width=3, features="relu", lam_w=1e-3, lam_h=1e-3)
    plain = predict(Problem([20, 10, 5], **make))
    for adjustment in (0.0, [0.7, 0.7, 0.7]):
        assert predict(Problem([20, 10, 5], loss=CrossEntropy(logit_adjustment=adjustment), **make)).value == plain.value
