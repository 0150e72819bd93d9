"""Ranks and balance of matrices whose answers are known: chosen singular values, balanced chains, stationary points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ufm
from ufm import metrics


def with_values(*s: float, m: int = 6, n: int = 5) -> Any:
    """A random (1, m, n) matrix with these singular values and zeros."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (m, n))
    return ((U[:, : len(s)] * s) @ V[: len(s)])[None]


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_known_spectrum(scale: float) -> None:
    """Singular values 4, 2, 2: rank 3, stable rank 24/16, participation 24^2/288, entropy of 1/2, 1/4, 1/4; scale drops out."""
    A = with_values(4.0, 2.0, 2.0) * scale
    assert metrics.singular_values(A)[0] == pytest.approx(scale * np.array([4, 2, 2, 0, 0]), abs=scale * 1e-14)
    assert metrics.numerical_rank(A)[0] == 3
    assert metrics.numerical_rank(A, rtol=0.6)[0] == 1
    assert metrics.numerical_rank(A, rtol=0.4)[0] == 3
    assert metrics.stable_rank(A)[0] == pytest.approx(1.5, rel=1e-14)
    assert metrics.participation_ratio(A)[0] == pytest.approx(2.0, rel=1e-14)
    assert metrics.effective_rank(A)[0] == pytest.approx(np.exp(1.5 * np.log(2)), rel=1e-12)


def test_default_tolerance() -> None:
    """max(m, n) 2^-52 of the largest: 1e-12 counts, 1e-17 does not."""
    assert [metrics.numerical_rank(with_values(1.0, t))[0] for t in (1e-12, 1e-17)] == [2, 1]


def test_zero_matrix() -> None:
    zero = np.zeros((2, 3, 4))
    for rank in (metrics.numerical_rank, metrics.stable_rank, metrics.effective_rank, metrics.participation_ratio):
        assert rank(zero).tolist() == [0.0, 0.0]


def chain(penalties: Any, s: Any) -> list[Any]:
    """(H, W_1, W_2) aligned and balanced: penalty_l times squared singular values agree."""
    rng = np.random.default_rng(3)
    Q = [np.linalg.qr(rng.standard_normal((k, k)))[0][:, : len(s)] for k in (7, 5, 5, 4)]
    return [((Q[i + 1] * (s / np.sqrt(lam))) @ Q[i].T)[None] for i, lam in enumerate(penalties)]


def test_balanced_chain() -> None:
    """Zero for the chain's own penalties, not for others; between 0 and 1."""
    lam, factors = (0.1, 0.3, 2.0), chain((0.1, 0.3, 2.0), np.array([3.0, 1.0, 0.5]))
    assert metrics.balance(factors, lam)[0] == pytest.approx([0, 0], abs=1e-14)
    got = metrics.balance(factors, (0.2, 0.3, 2.0))[0]
    assert got == pytest.approx([1 / 3, 0], abs=1e-14)  # |A - 2A| / |A + 2A|
    together = metrics.balance([np.repeat(W, 2, axis=0) for W in factors], (np.array([0.1, 0.2]), np.array([0.3]), 2))
    assert together == pytest.approx(np.array([[0, 0], got]), abs=1e-14)


def test_multiplicity_weighs_the_features() -> None:
    """Class means with n_k samples each are the samples."""
    rng = np.random.default_rng(0)
    H, W, n = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 3)), np.array([3, 1, 2, 5])
    samples = np.repeat(H, n, axis=2)
    assert metrics.balance((H, W), (0.1, 0.2), n) == pytest.approx(metrics.balance((samples, W), (0.1, 0.2)), rel=1e-13)
    assert np.all(metrics.balance((H, W), (0.1, 0.2), n) != metrics.balance((H, W), (0.1, 0.2)))


def test_nothing_is_balanced() -> None:
    """Zero factors, or no penalties: 0, not 0/0; one zero side: 1."""
    zero, one = np.zeros((1, 2, 2)), np.ones((1, 2, 2))
    assert metrics.balance((zero, zero), (1, 1))[0] == 0
    assert metrics.balance((one, one), (0, 0))[0] == 0
    assert metrics.balance((one, zero), (1, 1))[0] == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_minima_of_linear_chains_are_balanced(depth: int) -> None:
    """Stationarity gives lam_{l+1} W_{l+1}^T W_{l+1} = lam_l W_l W_l^T at every depth, whatever the loss."""
    lam_w = [[0.01 * (i + 1) for i in range(depth)]]
    problem = ufm.Problem([4, 2, 1], width=4, depth=depth, features="free", lam_w=lam_w, lam_h=0.004, loss=ufm.MSE())
    solution = ufm.solve(problem, seed=1)
    assert solution.value[0] < 0.49
    assert np.max(metrics.balance(solution.factors, (0.004, *lam_w[0]), problem.multiplicity)) < 1e-6


@pytest.mark.parametrize(
    ("factors", "penalties", "words"),
    [
        ((np.ones((1, 2, 3)), np.ones((1, 4, 2)), np.ones((1, 4, 1))), (1, 1, 1), r"factors\[2\] has 1 columns.*without the bias"),
        ((np.ones((1, 2, 3)), np.ones((1, 4, 2))), (1, 1, 1), "2 factors and 3 penalties"),
        ((np.ones((1, 2, 3)),), (1,), "1 factors and 1 penalties"),
        ((np.ones((1, 2, 3)), np.ones((4, 2))), (1, 1), r"factors\[1\] has shape \(4, 2\)"),
        ((np.ones((1, 2, 3)), np.ones((1, 4, 2))), (1, np.ones(3)), r"a penalty has shape \(3,\)"),
    ],
)
def test_door(factors: Any, penalties: Any, words: str) -> None:
    with pytest.raises(ValueError, match="metrics.balance: " + words):
        metrics.balance(factors, penalties)
