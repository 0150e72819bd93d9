"""Regime boundaries: predictions change exactly there, in every model that has them."""

from __future__ import annotations

import numpy as np
import pytest

import ufm
from ufm.theory.boundaries import boundaries

ORDER = [ufm.Regime.DISTINCT, ufm.Regime.MERGED, ufm.Regime.MINORITY_ZERO, ufm.Regime.ALL_ZERO]
COUNTS = {
    "balanced": [50] * 6,
    "step": [500] * 3 + [20] * 3,
    "two majorities": [500] * 2 + [20] * 4,
    "exponential": ufm.counts.exponential(6, 500, 30),
    "groups": [400, 400, 90, 90, 90, 7, 7],
    "one small": [100, 100, 100, 3],
}


def problem(counts: object, lam: object = 1.0, **options: object) -> ufm.Problem:
    return ufm.Problem(counts, width=12, lam_w=lam, lam_h=lam, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("features", ["free", "relu"])
@pytest.mark.parametrize("bias", [None, 0.0, 0.01])
@pytest.mark.parametrize("name", COUNTS)
def test_predictions_change_at_the_boundaries(name: str, bias: float | None, features: str) -> None:
    """Just below a level the regime before it is predicted, just above the regime after; where the two differ by a theorem."""
    counts = np.asarray(COUNTS[name])
    levels = np.array([level[0] for level in boundaries(problem(counts, features=features, lam_b=bias))])
    assert np.all(np.diff(levels[np.isfinite(levels)]) >= -1e-15)
    for i, level in enumerate(levels):
        if not np.isfinite(level):
            assert (features, bias is None) == ("relu", False)
            continue
        below, above = ufm.predict(problem(counts, lam=level * np.array([1 - 1e-6, 1 + 1e-6]), features=features, lam_b=bias)).regime
        after = ORDER[max(j for j in range(3) if levels[j] == level) + 1]
        before = ORDER[max((j + 1 for j in range(3) if levels[j] < level), default=0)]
        if features == "relu" and bias is not None and name != "balanced":
            assert above in (after, ufm.Regime.UNKNOWN)
            assert i < 2 or above == ufm.Regime.ALL_ZERO
        else:
            assert (below, above) == (before, after)


@pytest.mark.parametrize("bias", [0.0, 0.01])
def test_with_relu_and_a_bias_the_known_boundaries_are_those_of_certified_solutions(bias: float) -> None:
    counts = np.array([300] * 3 + [20] * 3)
    known = boundaries(problem(counts, features="relu", lam_b=bias))
    for level, before, after in [(known.merged[0], "DISTINCT", "MERGED"), (known.all_zero[0], None, "ALL_ZERO")]:
        if np.isfinite(level):
            found = ufm.solve(problem(counts, lam=level * np.array([0.98, 1.02]), features="relu", lam_b=bias))
            assert np.all(found.gap <= 1e-9)
            assert found.regime[1].name == after
            assert found.regime[0].name == before or (before is None and found.regime[0].name != after)
    assert np.isfinite(known.merged[0]) == (bias == 0)
    assert np.isnan(known.minority_zero[0])


def test_class_weights_move_the_thresholds() -> None:
    """With omega = N/(K n_k) the largest class dies first, at kappa^2 = N^2 (K-1)/(K^3 n_k) (relu)."""
    counts = np.array([500, 100, 20])
    N, K = counts.sum(), 3
    loss = ufm.CrossEntropy(class_weights=N / (K * counts))
    edge = boundaries(problem(counts, features="relu", loss=loss))
    kappa = N * edge.minority_zero[0]
    assert np.isclose(kappa**2, N**2 * (K - 1) / (K**3 * 500), rtol=1e-13)


def test_other_problems_are_refused() -> None:
    for options in ({"loss": ufm.MSE()}, {"depth": 2}, {"loss": ufm.CrossEntropy(label_smoothing=0.1)}):
        with pytest.raises(ValueError, match="plain cross-entropy and depth 1 only"):
            boundaries(problem([3, 2], features="free", **options))
