"""Theory, solver and certificate know nothing of each other, and agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ufm
from ufm.records import Regime


def random_problem(rng: np.random.Generator, model: str) -> dict[str, Any]:
    """K 2-50, counts 1-10^5, both penalties over six decades, kappa^2 from far below to above the thresholds."""
    K = int(rng.integers(2, 51))
    n = np.sort(np.rint(10 ** rng.uniform(0, 5, K)).astype(int))[::-1]
    n = np.full(K, n[0]) if model == "balanced" else n
    kappa = np.sqrt(10 ** rng.uniform(-6, 0.3) * rng.choice(n))
    tilt = 10 ** rng.uniform(-3, 3)
    return dict(counts=n, lam_w=kappa / n.sum() * tilt, lam_h=kappa / n.sum() / tilt, extra=int(rng.integers(0, K + 1)))


MODELS: dict[str, dict[str, Any]] = {
    "relu CE, imbalanced": dict(features="relu"),
    "relu CE, weighted": dict(features="relu", weighted=True),
    "relu MSE, imbalanced": dict(features="relu", loss=ufm.MSE()),
    "free MSE, imbalanced": dict(features="free", loss=ufm.MSE()),
    "free MSE, free bias": dict(features="free", loss=ufm.MSE(), lam_b=0.0),
    "free CE, balanced": dict(features="free", counts="balanced"),
    "free CE, balanced, bias": dict(features="free", counts="balanced", lam_b=0.01),
    "relu CE, balanced, free bias": dict(features="relu", counts="balanced", lam_b=0.0),
}
EACH = {"relu CE, imbalanced": 100}  # the model this package is about gets the most; the others 20 each: 240 in all


@pytest.mark.parametrize("model", list(MODELS))
def test_predict_solve_and_certify_agree(model: str) -> None:
    """On random problems the certified value is the closed form's to 1e-10, the gap at most 1e-8, the dead classes the same."""
    rng = np.random.default_rng(sorted(MODELS).index(model))
    for _ in range(EACH.get(model, 20)):
        options = dict(MODELS[model])
        drawn = random_problem(rng, options.pop("counts", "any"))
        K, width = len(drawn["counts"]), len(drawn["counts"]) + drawn.pop("extra")
        if options.pop("weighted", False):
            options["loss"] = ufm.CrossEntropy(class_weights=10 ** rng.uniform(-1, 1, K))
        problem = ufm.Problem(**drawn, width=width, **options)
        theory, found = ufm.predict(problem), ufm.solve(problem)
        assert np.isfinite(theory.value[0]), theory.source
        assert found.gap[0] <= 1e-8, problem
        assert found.value[0] == pytest.approx(theory.value[0], rel=1e-10)
        near = np.abs(theory.distance[0]) < 1e-4
        assert near or found.regime == theory.regime
        if "CE" in model and not near:
            assert np.array_equal(found.collapsed[0], theory.collapsed[0]) or theory.regime[0] is Regime.ALL_ZERO


def test_geometry_of_certified_points() -> None:
    """Margins, feature Gram, classifier Gram and logits of a certified run are the theorem's."""
    counts = ufm.counts.exponential(10, 5000, 100)
    for lam in (1e-5, 1e-4, 5e-4):
        problem = ufm.Problem(counts, width=12, features="relu", lam_w=10 * lam, lam_h=lam / 10)
        theory, found = ufm.predict(problem), ufm.solve(problem, tol=1e-12)
        H, W = (f[0] for f in found.factors)
        for got, expected in ((H.T @ H, theory.feature_gram[0]), (W @ W.T, theory.classifier_gram[0]), (found.logits[0], theory.logits[0])):
            assert got == pytest.approx(expected, abs=1e-7 * np.abs(expected).max())


def test_value_depends_on_the_product_of_the_penalties_only() -> None:
    """kappa invariance without bias: same value, logits and gap for the same lam_w lam_h."""
    problem = ufm.Problem([50, 20, 5], width=4, features="relu", lam_w=[1e-2, 1e-4, 1.0], lam_h=[1e-3, 1e-1, 1e-5])
    found = ufm.solve(problem, tol=1e-11)
    assert found.value == pytest.approx(found.value[0], rel=1e-13)
    assert found.logits == pytest.approx(np.broadcast_to(found.logits[:1], found.logits.shape), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_width_equal_to_the_live_classes(seed: int) -> None:
    """d = number of live classes, reported separately: the same optimum, proven, some classes being at zero."""
    rng = np.random.default_rng(seed)
    n = np.sort(np.rint(10 ** rng.uniform(0, 4, 12)).astype(int))[::-1]
    lam = np.sqrt(1.0 * np.median(n)) / n.sum()
    wide = ufm.Problem(n, width=12, features="relu", lam_w=lam, lam_h=lam)
    live = int(np.sum(~ufm.predict(wide).collapsed[0]))
    assert 0 < live < 12
    narrow = ufm.Problem(n, width=live, features="relu", lam_w=lam, lam_h=lam)
    found = ufm.solve(narrow, runs=5, start=ufm.starts.balanced(0.1))
    assert np.all(found.gap <= 1e-8)
    assert found.value == pytest.approx(ufm.predict(wide).value[0], rel=1e-10)
