"""Problems other codes ship, with exact values to hold against: deep linear MSE, and cross-entropy as a nuclear-norm programme."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

import ufm
from ufm.records import Regime, Stop

LONG_TAIL = ufm.counts.exponential(100, 5000, 100)
README = [5000] * 3 + [4000] * 3 + [3000] * 4  # the merging example of Hong & Ling's code, by its README


def deep_linear_oracle(n: list[int], depth: int, lam: float, bias: bool) -> float:
    """sum over the singular values s_i of Y of min_s (s - s_i)^2/(2N) + (L+1)(lam/2) s^{2/(L+1)}, at 50 digits."""
    N, p = sum(n), depth + 1
    with mpmath.workdps(50):
        Y = mpmath.diag([mpmath.sqrt(k) for k in n])
        if bias:
            Y = Y - mpmath.matrix([[mpmath.mpf(a) * mpmath.sqrt(b) / N for b in n] for a in n])
        total = mpmath.mpf(0)
        for sigma in mpmath.svd_r(Y, compute_uv=False):

            def energy(s: Any, sigma: Any = sigma) -> Any:
                return (s - sigma) ** 2 / (2 * N) + p * mpmath.mpf(lam) / 2 * s ** (mpmath.mpf(2) / p)

            best = energy(mpmath.mpf(0))
            grid = [sigma * i / 400 for i in range(1, 401)]
            at = min(grid, key=energy)
            low, high = at - sigma / 400, min(at + sigma / 400, sigma)
            for _ in range(160):  # golden section on the cell around the best grid point
                a, b = low + (high - low) * mpmath.mpf("0.382"), low + (high - low) * mpmath.mpf("0.618")
                low, high = (low, b) if energy(a) < energy(b) else (a, high)
            total += min(best, energy((low + high) / 2))
        return float(total)


# name -> counts, depth, bias, width
DEEP_LINEAR = {
    "balanced, depth 1, bias": ([100] * 4, 1, True, 64),
    "balanced, depth 1": ([100] * 4, 1, False, 64),
    "balanced, depth 3": ([100] * 4, 3, False, 64),
    "balanced, depth 6": ([100] * 4, 6, False, 64),
    "imbalanced, depth 1": ([200, 100, 50, 50], 1, False, 64),
    "imbalanced, depth 3": ([200, 100, 50, 50], 3, False, 64),
    "imbalanced, depth 6": ([200, 100, 50, 50], 6, False, 64),
    "imbalanced, hidden 2048": ([200, 100, 50, 50], 1, False, 2048),
}


@pytest.mark.parametrize("name", list(DEEP_LINEAR))
def test_deep_linear_mse_settings(name: str) -> None:
    """Eight settings of the deep linear MSE model: solver, theory and oracle to 1e-12, proven."""
    n, depth, bias, width = DEEP_LINEAR[name]
    problem = ufm.Problem(n, width=width, depth=depth, features="free", loss=ufm.MSE(), lam_w=5e-4, lam_h=5e-4, lam_b=0.0 if bias else None)
    oracle = deep_linear_oracle(n, depth, 5e-4, bias)
    found = ufm.solve(problem, tol=1e-12)
    assert found.value[0] == pytest.approx(oracle, rel=1e-12)
    assert ufm.predict(problem).value[0] == pytest.approx(oracle, rel=1e-12)
    assert found.gap[0] <= 1e-12
    assert found.stop == (Stop.GAP,)


def hong_ling(n: Any, lam_z: float) -> ufm.Problem:
    """Cross-entropy, no ReLU, the peer's bias penalty 0.01 |b|^2 (lam_b = 0.02)."""
    return ufm.Problem(n, width=len(n), features="free", lam_w=lam_z, lam_h=lam_z, lam_b=0.02)


def step(K: int, large: int, small: int, share: float) -> tuple[list[int], float]:
    n = [large] * (K // 2) + [small] * (K // 2)
    return n, share * np.sqrt(small) / sum(n)


# name -> (counts, lambda_Z), gap, rank; share 1 is the merging threshold
NUCLEAR: dict[str, tuple[tuple[Any, float], float, int]] = {
    "README, lambda/10": ((README, 5e-4), 1e-12, 9),
    "K = 10, R = 2": (step(10, 2000, 1000, 0.5), 1e-12, 9),
    "K = 10, R = 10": (step(10, 10_000, 1000, 0.5), 1e-12, 9),
    "K = 10, R = 10, merged": (step(10, 10_000, 1000, 1.05), 1e-12, 5),
    "K = 50, R = 10": (step(50, 5000, 500, 0.1), 1e-10, 49),
    "K = 50, R = 10, merged": (step(50, 5000, 500, 1.05), 1e-10, 25),
    "K = 100, R = 10": (step(100, 5000, 500, 0.1), 1e-10, 99),
    "K = 100, long tail": ((LONG_TAIL, 0.3 * np.sqrt(50) / LONG_TAIL.sum()), 1e-10, 99),
    "K = 100, R = 10, merged": (step(100, 5000, 500, 1.05), 1e-10, 50),
}


@pytest.mark.parametrize("name", list(NUCLEAR))
def test_nuclear_norm_cross_entropy(name: str) -> None:
    """Proven gap and exact rank: the coordinates beyond the rank are exactly zero, the others far from it."""
    (n, lam_z), gap, rank = NUCLEAR[name]
    found = ufm.solve(hong_ling(n, lam_z), tol=gap)
    assert found.gap[0] <= gap
    H, W = found.factors[0][0], found.factors[1][0]
    assert np.count_nonzero(H.any(axis=1) & W.any(axis=0)) == rank
    s = np.linalg.svd(W @ H, compute_uv=False)
    assert s[rank - 1] > 1e-6 * s[0]
    assert np.all(s[rank:] < 1e-13 * s[0])


def test_the_trivial_readme_case_is_called_trivial() -> None:
    """lambda_Z = 0.005 is 2.8 times over the threshold sqrt(n_max)/N: Z = 0, rank 0, and both theory and solver say so."""
    problem = hong_ling(README, 5e-3)
    theory, found = ufm.predict(problem), ufm.solve(problem, tol=1e-12)
    assert theory.regime == found.regime == (Regime.ALL_ZERO,)
    assert np.exp(theory.distance[0]) == pytest.approx(5e-3 / (np.sqrt(5000) / 39000), rel=5e-3)
    assert found.gap[0] <= 1e-12
    assert found.value[0] == pytest.approx(theory.value[0], rel=1e-12)
    assert not found.factors[0].any()
    assert not found.factors[1].any()


@pytest.mark.parametrize("small", [0.99, 1.01])
def test_minority_merging_at_the_hong_ling_number(small: float) -> None:
    """Without ReLU the minority predictions coincide iff kappa^2 >= n_B, for 5 + 5 and 3 + 7 classes, with and without bias."""
    for minority in (5, 7):
        n = ufm.counts.step(10, 100, 10, minority=minority)
        lam = np.sqrt(100 * small) / n.sum()
        for lam_b in (None, 0.02, 0.0):
            problem = ufm.Problem(n, width=10, features="free", lam_w=lam, lam_h=lam, lam_b=lam_b)
            found = ufm.solve(problem, tol=1e-11)
            expected = Regime.MERGED if small > 1 else Regime.DISTINCT
            assert found.regime == ufm.predict(problem).regime == (expected,)


@pytest.mark.parametrize(("depth", "over"), [(2, 1.01), (2, 1.15), (3, 1.05), (3, 1.3), (6, 1.02), (6, 1.3)])
@pytest.mark.parametrize("counts", [[100] * 4, [200, 100, 50, 50]], ids=["balanced", "imbalanced"])
def test_beyond_the_first_order_jump(counts: list[int], depth: int, over: float) -> None:
    """Between a class's first-order transition and its spinodal the living direction is a local minimum: the dead one is found."""

    def at(level: float) -> ufm.Problem:
        return ufm.Problem(counts, width=6, depth=depth, features="free", loss=ufm.MSE(), lam_w=level, lam_h=level)

    largest = np.exp(-ufm.predict(at(1.0)).distance[0])  # the transition of the largest class, the nearest from far above
    smallest = largest * (min(counts) / max(counts)) ** (depth / (depth + 1))
    assert not ufm.predict(at(smallest * 0.999)).collapsed.any()
    cell = at(smallest * over)
    theory, found = ufm.predict(cell), ufm.solve(cell, runs=6)
    assert theory.collapsed.any()
    assert found.value == pytest.approx(theory.value[0], rel=1e-10)
    assert np.all(found.gap <= 1e-9)
    assert np.all(found.collapsed == theory.collapsed)
