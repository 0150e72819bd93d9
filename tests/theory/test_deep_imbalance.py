"""Generalised DNC under STEP imbalance: against the convex optimum of a solver, 50-digit sums, and factors of any direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oracle import mp
from ufm.counts import balanced
from ufm.counts import step as step_counts
from ufm.objective import objective
from ufm.problem import Problem
from ufm.records import NoTheory
from ufm.solvers import solve
from ufm.theory import deep, deep_imbalance, deep_points, mse

COUNTS = [(50, 50, 50, 5, 5, 5), (50, 50, 50, 5), (9, 1, 1), (7, 2), (20, 20, 2, 2, 2, 2, 2)]


def plain_value(M: np.ndarray, counts: tuple[int, ...], lam: float, L: int) -> Any:
    """Entry by entry; singular values by mpmath."""
    K, N, p = len(counts), sum(counts), mp.mpf(2) / (L + 1)
    loss = sum(
        mp.mpf(counts[c]) / N * mp.log1p(sum(mp.exp(mp.mpf(M[j, c]) - mp.mpf(M[c, c])) for j in range(K) if j != c)) for c in range(K)
    )
    s = mp.svd_r(mp.matrix([[mp.mpf(M[j, c]) * mp.sqrt(counts[c]) for c in range(K)] for j in range(K)]), compute_uv=False)
    return loss + mp.mpf(lam) / 2 * (L + 1) * sum(x**p for x in s if x > 1e-12)


def test_value_entry_by_entry() -> None:
    """Any matrix, any depth; equal classes give `deep.value` at lambda_eff; stacks of matrices too."""
    rng = np.random.default_rng(0)
    for counts in COUNTS:
        K = len(counts)
        for L in (1, 2, 5):
            M = 3 * rng.standard_normal((K, K))
            assert abs(deep_imbalance.value(M, counts, 1e-3, L) - plain_value(M, counts, 1e-3, L)) < 1e-13
            M[0, 0] += 800  # no overflow
            assert np.isfinite(deep_imbalance.value(np.stack([M, -M]), counts, 1e-3, L)).all()
    M = rng.standard_normal((4, 4))
    same = deep.value(M, deep.lambda_eff(6, 2e-3, [1e-3, 4e-3]), 2)
    assert deep_imbalance.value(M, balanced(4, 6), mse.level([1e-3, 4e-3], 2e-3), 2) == pytest.approx(float(same), rel=1e-14)


def test_value_is_that_of_balanced_factors() -> None:
    """F_l = sqrt(g/lam_l) Q_l S^{1/(L+1)} Q_{l-1}^T of M D^{1/2}, put into the objective with unequal classes."""
    rng = np.random.default_rng(1)
    counts, lam_w, lam_h = np.array((8, 8, 2, 1)), np.array([2e-3, 1e-3, 5e-3]), 3e-3
    M, L = rng.standard_normal((4, 4)), 3
    lam = float(mse.level(lam_w, lam_h))
    U, s, Vt = np.linalg.svd(M * np.sqrt(counts))
    root = np.diag(s ** (1 / (L + 1)))
    factors = [np.sqrt(lam / lam_h) * root @ Vt / np.sqrt(counts), *(np.sqrt(lam / w) * root for w in lam_w[:-1])]
    factors.append(np.sqrt(lam / lam_w[-1]) * U @ root)
    P = Problem(counts, width=4, depth=L, features="free", lam_w=lam_w[None], lam_h=lam_h)
    assert objective(P).value([x[None] for x in factors])[0] == pytest.approx(float(deep_imbalance.value(M, counts, lam, L)), rel=1e-13)


@pytest.mark.parametrize("counts", COUNTS)
def test_generalised_dnc_is_the_optimum_at_depth_one(counts: tuple[int, ...]) -> None:
    """Proven by the solver's dual bound to 1e-9: same value and logits; columns centred; it tends to the simplex labels."""
    K, far = len(counts), []
    for lam in (1e-3, 1e-6):
        M = deep_imbalance.generalised_dnc(counts, lam)
        found = solve(Problem(np.array(counts), width=K, features="free", lam_w=lam, lam_h=lam))
        assert found.gap[0] <= 1e-9
        assert deep_imbalance.value(M, counts, lam, 1) <= found.value[0] * (1 + 1e-14)
        assert deep_imbalance.value(M, counts, lam, 1) >= found.value[0] * (1 - 1e-9)
        assert found.logits[0] - found.logits[0].mean(axis=0) == pytest.approx(M, abs=1e-4)
        assert M.sum(axis=0) == pytest.approx(np.zeros(K), abs=1e-12)
        labels = deep_imbalance.simplex_labels(K)
        far.append(np.linalg.norm(M / np.linalg.norm(M) - labels / np.linalg.norm(labels)))
    if K == 2:  # centred columns have one direction only
        assert far == pytest.approx([0.0, 0.0], abs=1e-15)
    else:
        assert 0.2 * far[0] < far[1] < 0.7 * far[0]  # like 1/log(1/lambda)


def test_step_is_critical_at_every_depth() -> None:
    """Where its scales are found it is stationary in every direction of M's range: F does not fall along random small rotations."""
    rng = np.random.default_rng(2)
    counts, L, lam = (50, 50, 50, 5, 5, 5), 2, 1e-4
    point = deep_points.at(deep_imbalance.step(counts), lam, L)
    assert point.value == pytest.approx(float(deep_imbalance.value(point.M, counts, lam, L)), rel=1e-13)
    for _ in range(10):
        X = rng.standard_normal((6, 6))
        moved = [deep_imbalance.value((np.eye(6) + h * X) @ point.M, counts, lam, L) for h in (1e-4, -1e-4)]
        assert abs(moved[0] - moved[1]) / 2e-4 < 1e-8
    ray = deep_points.levels(deep_imbalance.along(deep_imbalance.generalised_dnc(counts, lam), counts), lam, L)
    assert point.value < ray.value


@pytest.mark.parametrize("counts", COUNTS[:3])
@pytest.mark.parametrize("depth", [1, 3])
def test_scale_along_a_ray(counts: tuple[int, ...], depth: int) -> None:
    """It is the lowest point of the ray beyond small scales, on a fine grid of the plain sum."""
    K, lam = len(counts), 1e-4
    for M in (deep_imbalance.simplex_labels(K), deep_imbalance.generalised_dnc(counts, lam)):
        level = deep_points.levels(deep_imbalance.along(M, counts), np.array([lam, 1e3]), depth)
        beta = level.scales[0, 0]
        assert np.isnan(level.value[1])
        assert level.value[0] == pytest.approx(float(plain_value(beta * M, counts, lam, depth)), rel=1e-13)
        around = beta * np.geomspace(0.5, 2, 401)
        values = [float(deep_imbalance.value(b * M, counts, lam, depth)) for b in around]
        assert min(values) >= level.value[0] * (1 - 1e-14)
        assert abs(around[np.argmin(values)] / beta - 1) < 4e-3


@pytest.mark.parametrize("faint", [1e-2, 1e-5, 1e-8])
def test_rays_of_faint_singular_values_are_found_too(faint: float) -> None:
    """A square with a little of the simplex labels: its scale along the ray is the lowest point of a fine grid, however faint."""
    counts, lam, depth = (6, 6, 2, 2), 1e-3, 3
    M = deep_points.polygon(4).pattern(np.ones(1)) + faint * deep_imbalance.simplex_labels(4)
    level = deep_points.levels(deep_imbalance.along(M, counts), lam, depth)
    grid = [float(plain_value(b * M, counts, lam, depth)) for b in level.scales[0] * np.geomspace(0.5, 2, 401)]
    assert level.value == pytest.approx(grid[200], rel=1e-12)
    assert level.value <= min(grid) * (1 + 1e-13)


def test_lower_rank_overtakes() -> None:
    """From the depth told on, pairs and the polygon lie below generalised DNC and below the simplex labels, at every lambda where it is."""
    counts = step_counts(6, 5, 10)
    for lam in (1e-8, 1e-5, 2e-4):
        for X in (deep_imbalance.generalised_dnc(counts, lam), deep_imbalance.simplex_labels(6)):
            for code in (deep_points.pairs(6), deep_points.polygon(6)):
                M = code.pattern(np.ones(1))
                first = deep_imbalance.overtaking_depth(M, X, counts)
                assert 2 <= first <= 12
                for L in (first, first + 1, 3 * first):
                    low, high = (deep_points.levels(deep_imbalance.along(Y, counts), lam, L).value for Y in (M, X))
                    assert low < high or np.isnan(high)
    assert deep_imbalance.overtaking_depth(M, deep_imbalance.simplex_labels(6), counts) > 2


def test_the_depth_told_is_exact_for_the_penalties() -> None:
    """Balanced pairs against DNC of K classes at equal gaps: m 2^p < K - 1, first true at L = 2 for K = 6, at L = 3 for K = 4."""
    for K, expected in ((4, 3), (6, 2), (10, 2)):
        M = deep_points.pairs(K).pattern(np.ones(1))
        assert deep_imbalance.overtaking_depth(M, deep_imbalance.simplex_labels(K), np.ones(K)) == expected
    assert [deep_imbalance.least_rank(K) for K in (2, 3, 9)] == [1, 2, 2]
    assert deep_imbalance.diagonally_superior(deep_points.polygon(9).pattern(np.ones(1)))
    assert not deep_imbalance.diagonally_superior(np.ones((3, 3)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: deep_imbalance.step([5, 5, 5]), ValueError, "classes of two sizes; for one size use deep_points.dnc"),
        (lambda: deep_imbalance.step([9, 5, 3]), ValueError, "classes of two sizes"),
        (lambda: deep_imbalance.generalised_dnc([50, 50, 1, 1], 0.5), NoTheory, "lambda_eff is 0.5"),
        (lambda: deep_imbalance.along(np.ones((3, 3)), [1, 1, 1]), ValueError, "own entry is the largest"),
        (lambda: deep_imbalance.overtaking_depth(-np.eye(3), np.eye(3), [1, 1, 1]), ValueError, "overtaking_depth: M is"),
        (
            lambda: deep_imbalance.overtaking_depth(np.eye(3), np.eye(3), [1, 1, 1]),
            NoTheory,
            "rank of M is 3, but must be below 3",
        ),
        (lambda: deep_imbalance.overtaking_depth(np.eye(3), -np.eye(3), [1, 1, 1]), ValueError, "largest gap of X is -1"),
        (lambda: deep_imbalance.least_rank(1), ValueError, "K is 1"),
    ],
)
def test_door(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
