"""Reductions, factors, counts of dimensions, the first theorem, limits and crossovers, against loops and the document's numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from deep_oracle import problem as make_problem
from deep_oracle import value_and_gradient_norm
from oracle import bisect, level, mp
from ufm.records import NoTheory
from ufm.theory import deep
from ufm.theory import deep_points as points
from ufm.theory.deep_codes import Code


def test_lambda_eff() -> None:
    """The geometric mean of all penalties and n, per cell, at 50 digits, small and unequal ones too; GK25's ResNet setting is 5e-3."""
    rng = np.random.default_rng(0)
    for L in (1, 2, 5, 20):
        lam_w, lam_h, n = 10.0 ** rng.uniform(-200, 3, (4, L)), 10.0 ** rng.uniform(-200, 3, 4), rng.integers(1, 9, 4)
        got = deep.lambda_eff(n, lam_h, lam_w)
        for g in range(4):
            exact = level([*lam_w[g], lam_h[g]]) * mp.root(int(n[g]), L + 1)
            assert abs(mp.mpf(float(got[g])) - exact) <= 3e-15 * exact
    assert deep.lambda_eff(5000, 1e-6, [5e-3] * 3) == pytest.approx(5e-3, rel=1e-15)
    with pytest.raises(ValueError, match="every penalty and n positive"):
        deep.lambda_eff(1, 0.0, [1e-3])


def test_schatten_is_the_least_penalty() -> None:
    """Balanced factors attain it for unequal penalties; other factors of the same logits never cost less."""
    rng = np.random.default_rng(1)
    for L in (1, 2, 4):
        M = rng.standard_normal((5, 2)) @ rng.standard_normal((2, 5))
        lam_w, lam_h, n = 10.0 ** rng.uniform(-3, 0, L), 0.02, 3
        lam = deep.lambda_eff(n, lam_h, lam_w)
        factors = deep.balanced_factors(M, n, lam_h, lam_w, 6, rng)

        def paid(parts: tuple[np.ndarray, ...], w: np.ndarray = lam_w, h: float = n * lam_h) -> float:
            return sum(x / 2 * float((F * F).sum()) for x, F in zip([h, *w], parts, strict=True))

        assert paid(factors) == pytest.approx(float(deep.penalty(M, lam, L)), rel=1e-13)
        product = factors[0]
        for W in factors[1:]:
            product = W @ product
        assert product == pytest.approx(M, rel=1e-12, abs=1e-12)
        assert lam_w[0] * factors[1].T @ factors[1] == pytest.approx(n * lam_h * factors[0] @ factors[0].T, abs=1e-12)
        for (i, W), (_, V) in pairwise(enumerate(factors[1:])):
            assert lam_w[i + 1] * V.T @ V == pytest.approx(lam_w[i] * W @ W.T, abs=1e-12)
        for _ in range(20):
            G = np.eye(6) + 0.3 * rng.standard_normal((6, 6))
            assert paid((G @ factors[0], factors[1] @ np.linalg.inv(G), *factors[2:])) > paid(factors)


def test_frames_of_the_factors() -> None:
    """Without a generator on the first axes; with one, other factors of the same value; a width below the rank is refused."""
    M = points.at(points.pairs(6), 1e-3, 2).M
    plain = deep.balanced_factors(M, 2, 1e-3, [1e-3, 1e-3], 3)
    assert [x.shape for x in plain] == [(3, 6), (3, 3), (6, 3)]
    drawn = [deep.balanced_factors(M, 2, 1e-3, [1e-3, 1e-3], 5, np.random.default_rng(s)) for s in (0, 0, 1)]
    assert np.array_equal(drawn[0][1], drawn[1][1])
    assert not np.allclose(drawn[0][1], drawn[2][1])
    with pytest.raises(ValueError, match="d is 2, but logits of rank 3 need a width of at least 3"):
        deep.balanced_factors(M, 2, 1e-3, [1e-3, 1e-3], 2)


def test_residual_sees_what_is_not_critical() -> None:
    """It is the scale-free gradient norm of balanced factors up to a factor of order 1, on any matrix."""
    rng = np.random.default_rng(2)
    for L in (1, 2, 4):
        M = 2 * rng.standard_normal((4, 4))
        factors = deep.balanced_factors(M, 1, 1e-2, [1e-2] * L, 4)
        F, gradient = value_and_gradient_norm(make_problem(4, 1, 4, [1e-2] * L, 1e-2), factors)
        assert pytest.approx(F, rel=1e-13) == float(deep.value(M, 1e-2, L))
        assert float(deep.residual(M, 1e-2, L)) > 0.3 * gradient > 0.1
    published = np.kron(np.eye(3), [[1.0, -1], [-1, 1]])[:5, :5]
    published[4, 4] = 1.0
    beta = points.at(points.relaxed_pairs(5), 1e-4, 3).scales[0] / 2
    assert deep.residual(beta * published, 1e-4, 3) > 0.1  # the published witness at odd K is not critical


def test_theorem_one() -> None:
    """m 2^p < 2m - 1 is exactly (K >= 4 and L >= 3) or (K >= 6 and L = 2); there pairs are below DNC wherever DNC exists."""
    for K in range(2, 41):
        for L in range(1, 30):
            assert deep.dnc_is_never_optimal(K, L, K) == ((K >= 4 and L >= 3) or (K >= 6 and L == 2))
    for K in (4, 6, 10, 100):
        for L in (2, 3, 10):
            if not deep.dnc_is_never_optimal(K, L, K):
                continue
            lam = points.largest(points.dnc(K), L) * np.geomspace(1e-28, 0.999, 40)
            dnc = points.levels(points.dnc(K), lam, L)
            other = np.fmin(points.levels(points.pairs(K), lam, L).value, np.log(K))
            assert np.all(other < dnc.value)
    with pytest.raises(NoTheory, match="a width of at least K = 6"):
        deep.dnc_is_never_optimal(6, 2, 5)


def test_limit_constants() -> None:
    """The table at L = 2, and the formulas of the candidates."""
    table = {4: 3, 5: 4, 6: 4.762, 7: 5.712, 8: 6.350, 9: 7.311, 10: 7.937, 12: 9.524}
    for K, best in table.items():
        constants = deep.margin_constants(K, 2)
        assert min(constants.values()) == pytest.approx(best, abs=6e-4)
        assert min(constants, key=lambda name: constants[name]).startswith("DNC" if K < 6 else f"{K // 2} pairs")
    for L in (2, 3, 7):
        p = 2 / (L + 1)
        found = deep.margin_constants(10, L)
        assert found["DNC of 10 classes"] == pytest.approx(9, rel=1e-14)
        assert found["5 pairs"] == pytest.approx(5 * 2**p, rel=1e-14)
        assert found["10-gon"] == pytest.approx(2 * (10 / (2 * (1 - np.cos(np.pi / 5)))) ** p, rel=1e-13)
        assert found["T(5)"] == pytest.approx(4 * 3**p, rel=1e-14)
        assert deep.margin_constants(7, L)["3 pairs and a class, relaxed"] == pytest.approx(3 * 2**p + (6 / 7) ** (p / 2), rel=1e-14)
        assert deep.margin_constants(8, L)["square antiprism"] == pytest.approx(2 * 4**p + 8 ** (p / 2), rel=1e-14)
        assert deep.margin_constants(12, L)["icosahedron"] == pytest.approx(3 * (4 / (1 - 5**-0.5)) ** p, rel=1e-14)
    assert points.blocks([3, 1]).margin_constant(2) == np.inf
    assert points.blocks([4, 2]).margin_constant(2) == pytest.approx(3 * (4 / 3) ** (2 / 3) + 2 ** (2 / 3), rel=1e-14)


def test_values_tend_to_the_constants() -> None:
    """value/((lambda/2)(L+1) R (log 1/lambda)^p) -> 1, like log log/log."""
    for K in (5, 8, 12):
        for code in points.candidates(K):
            for L in (2, 4):
                lam = np.array([1e-10, 1e-20, 1e-300])
                ratio = points.levels(code, lam, L).value / (lam / 2 * (L + 1) * code.margin_constant(L) * np.log(1 / lam) ** (2 / (L + 1)))
                assert abs(ratio[2] - 1) < 0.03
                assert abs(ratio[2] - 1) < abs(ratio[0] - 1)


@pytest.mark.parametrize(
    ("first", "second", "L", "expected"),
    [
        (points.dnc(4), points.pairs(4), 2, 0.011760),
        (points.dnc(5), points.relaxed_pairs(5), 2, 1.2357e-4),
    ],
)
def test_crossovers(first: Code, second: Code, L: int, expected: float) -> None:
    """The document's numbers; the order changes within 1e-12; the two matrices have the same value there by the plain formula."""
    lam = deep.crossover(first, second, L, 1e-9, 0.05)
    assert lam == pytest.approx(expected, rel=6e-5)
    gaps = [points.levels(first, x, L).value - points.levels(second, x, L).value for x in (lam * (1 - 1e-12), lam * (1 + 1e-12))]
    assert gaps[0] < 0 < gaps[1]
    assert deep.crossover(second, first, L, 1e-9, 0.05) == pytest.approx(lam, rel=1e-12)


def test_crossover_at_50_digits() -> None:
    """K = 4, L = 2: DNC above pairs just above it and below them just below, each at a scale found by mpmath."""

    def dnc(lam: Any) -> Any:
        a = bisect(lambda x: lam - x**third / (mp.exp(x) + 3), 1, 40)
        return mp.log1p(3 * mp.exp(-a)) + 3 * lam / 2 * 3 * a ** (2 * third)

    def pairs(lam: Any) -> Any:
        def curve(b: Any) -> Any:
            e = mp.exp(-b)
            return 2 ** (-2 * third) / 2 * b**third * (2 * e * e + 2 * e) / (1 + e * e + 2 * e)

        b = bisect(lambda x: lam - curve(x), 1, 40)
        return mp.log1p(mp.exp(-2 * b) + 2 * mp.exp(-b)) + 3 * lam / 2 * 2 * (2 * b) ** (2 * third)

    third, found = mp.mpf(1) / 3, mp.mpf(deep.crossover(points.dnc(4), points.pairs(4), 2, 1e-6, 0.05))
    for lam, sign in ((found * (1 - mp.mpf("1e-12")), 1), (found * (1 + mp.mpf("1e-12")), -1)):
        assert sign * (pairs(lam) - dnc(lam)) > 0


def test_crossover_door() -> None:
    with pytest.raises(NoTheory, match=r"do not change order between 1e-06 and 0.001"):
        deep.crossover(points.dnc(6), points.pairs(6), 2, 1e-6, 1e-3)
    with pytest.raises(NoTheory, match="or one does not exist there"):
        deep.crossover(points.dnc(4), points.pairs(4), 2, 1e-6, 0.9)


def test_orbit_dimensions() -> None:
    """Ratio DNC to pairs: above 1 already at d = K by our count (1.20 at K = 4, 1.25 at K = 6), growing to (K-1)/r."""
    for K, expected in ((4, 1.20), (6, 1.25)):
        ratios = [deep.orbit_dimension(K - 1, 2, d) / deep.orbit_dimension(K // 2, 2, d) for d in (K, 2 * K, 4 * K, 10**6)]
        assert ratios[0] == pytest.approx(expected, abs=5e-3)
        assert ratios == sorted(ratios)
        assert ratios[-1] == pytest.approx((K - 1) / (K // 2), rel=1e-5)
        assert deep.published_orbit_dimension(K - 1, 2, K) == 2 * (K - 1)
    with pytest.raises(ValueError, match="d is 2, but logits of rank 3"):
        deep.orbit_dimension(3, 2, 2)
