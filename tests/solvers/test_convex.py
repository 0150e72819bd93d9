"""The proximal references agree with the factored solver, and prove what they find."""

from __future__ import annotations

import numpy as np
import pytest

import ufm
from ufm.records import Stop
from ufm.solvers.convex import _columns, _singular_values

LAM = 0.3 * np.sqrt(50) / ufm.counts.exponential(6, 1000, 20).sum()


@pytest.mark.parametrize("lam_b", [None, 0.02, 0.0])
@pytest.mark.parametrize("loss", [ufm.CrossEntropy(), ufm.MSE()], ids=["CE", "MSE"])
def test_nuclear_norm_reference(loss: ufm.losses.Loss, lam_b: float | None) -> None:
    """Without ReLU: the same optimum from the logits and from the factors."""
    counts = ufm.counts.exponential(6, 1000, 20)
    problem = ufm.Problem(counts, width=6, features="free", lam_w=LAM, lam_h=LAM, lam_b=lam_b, loss=loss)
    reference = ufm.solve(problem, method="convex", tol=1e-11)
    found = ufm.solve(problem, tol=1e-11)
    assert reference.stop == (Stop.GAP,)
    assert found.stop == (Stop.GAP,)
    assert found.value == pytest.approx(reference.value, rel=2e-11)
    Z = [s.logits - s.logits.mean(axis=1, keepdims=True) for s in (found, reference)]
    assert Z[0] == pytest.approx(Z[1], abs=1e-4 * np.abs(Z[1]).max())


def test_group_lasso_reference() -> None:
    """With ReLU and no bias the problem separates: the group lasso is the optimum."""
    problem = ufm.Problem(ufm.counts.exponential(6, 1000, 20), width=6, features="relu", lam_w=LAM, lam_h=LAM)
    reference = ufm.solve(problem, method="convex", tol=1e-12)
    assert reference.stop == (Stop.GAP,)
    assert reference.value == pytest.approx(ufm.predict(problem).value, rel=1e-12)


def test_group_lasso_is_not_called_proven_where_classes_attract() -> None:
    """With a free bias the ReLU problem does not separate: the group lasso ends above the optimum, with an open gap."""
    problem = ufm.Problem([100, 10, 10, 10], width=8, features="relu", lam_w=2e-2, lam_h=2e-2, lam_b=0.0)
    reference = ufm.solve(problem, method="convex", tol=1e-10)
    found = ufm.solve(problem, tol=1e-10)
    assert reference.stop == (Stop.GRADIENT,)
    assert reference.gap[0] > 1e-6
    assert found.gap[0] <= 1e-10
    assert reference.value[0] > found.value[0] * (1 + 1e-7)


def test_merged_rank_is_exact() -> None:
    """Five merged minority classes: exactly K_A rows of the spectrum survive, the others are zero, not small."""
    counts = np.array([10_000] * 5 + [1000] * 5)
    lam = 1.05 * np.sqrt(1000) / counts.sum()
    problem = ufm.Problem(counts, width=10, features="free", lam_w=lam, lam_h=lam, lam_b=0.02)
    found = ufm.solve(problem, tol=1e-12)
    s = np.linalg.svd(found.factors[1][0] @ found.factors[0][0], compute_uv=False)
    assert np.sum(s > 1e-10 * s[0]) == 5
    assert np.count_nonzero(np.abs(found.factors[0][0]).sum(axis=1)) == 5
    assert found.gap[0] <= 1e-12


def test_proximal_maps_minimise_what_they_should() -> None:
    """prox(X) beats random neighbours in 0.5||Y - X||^2 + t R(Y)."""
    rng = np.random.default_rng(0)
    norms = {
        _singular_values: lambda Y: np.linalg.svd(Y, compute_uv=False).sum(),
        _columns: lambda Y: np.linalg.norm(Y, axis=0).sum(),
    }
    for prox, R in norms.items():
        X = rng.standard_normal((5, 5))
        Y = prox(X, 0.7)

        def energy(V: np.ndarray, R=R, X=X) -> float:
            return 0.5 * np.sum((V - X) ** 2) + 0.7 * R(V)

        for scale in (1e-3, 1e-1, 1.0):
            for _ in range(50):
                assert energy(Y + scale * rng.standard_normal((5, 5))) > energy(Y)


@pytest.mark.parametrize(
    "options",
    [dict(depth=2), dict(loss=ufm.Focal(1.0)), dict(columns="samples"), dict(lam_w=0.0)],
    ids=["depth", "loss", "samples", "no penalty"],
)
def test_what_has_no_convex_form_is_refused(options: dict) -> None:
    problem = ufm.Problem([3, 2], **(dict(width=2, features="free", lam_w=0.1, lam_h=0.1) | options))
    with pytest.raises(ValueError, match="convex"):
        ufm.solve(problem, method="convex")


def test_a_width_below_the_rank_is_refused() -> None:
    problem = ufm.Problem([30, 20, 10], width=1, features="relu", lam_w=1e-3, lam_h=1e-3)
    with pytest.raises(ValueError, match="width of at least 3"):
        ufm.solve(problem, method="convex")
