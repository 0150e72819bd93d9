"""The spectrum at DNC against dense Hessians of the factor objective, its index on every side, the stability line, blocks, nullities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deep_oracle import hessian, problem
from oracle import mp
from ufm.theory import deep, deep_scale
from ufm.theory import deep_points as points
from ufm.theory import deep_stability as stability

Floats = NDArray[np.float64]


def numerical(code: Any, lam: float, L: int, d: int, branch: Any = "large", seed: int = 0) -> Floats:
    """Eigenvalues of the dense Hessian at the code's point, n = 1, common penalty, random frames."""
    M = points.at(code, lam, L, branch).M
    rng = np.random.default_rng(seed)
    H = hessian(problem(code.classes, 1, d, [lam] * L, lam), deep.balanced_factors(M, 1, lam, [lam] * L, d, rng))
    return np.linalg.eigvalsh(H)


def dnc_lambda(K: int, alpha: float, L: int) -> float:
    return float(deep_scale.strength(points.dnc(K).parts[0], alpha, L))


# K, L, d, scale: thin strip (.788 < alpha < .888 at K = 4, L = 2), below and above a_c, small root, K = 2 and 3, L = 1
SPECTRA = [
    (4, 2, 4, 0.82, 2 + 3),
    (4, 2, 5, 0.88, 2 + 3),
    (4, 2, 4, 0.90, 2),
    (4, 2, 6, 1.0, 2),
    (4, 2, 4, 1.3, 2),
    (4, 2, 4, 1.36, 0),
    (4, 2, 4, 6.0, 0),
    (4, 2, 4, 0.4, 2 + 3 + 1),
    (6, 2, 7, 1.5, 9),
    (6, 2, 6, 2.1, 0),
    (5, 3, 5, 2.0, 5),
    (5, 3, 5, 2.6, 0),
    (4, 4, 4, 1.0, None),
    (3, 2, 4, 3.0, 0),
    (3, 2, 3, 0.8, None),
    (2, 2, 3, 1.0, None),
    (2, 3, 2, 4.0, 0),
    (4, 1, 5, 2.0, 0),
    (7, 2, 7, 20.0, 0),
]


@pytest.mark.parametrize(("K", "L", "d", "alpha", "index"), SPECTRA)
def test_spectrum_and_index(K: int, L: int, d: int, alpha: float, index: int | None) -> None:
    """Every eigenvalue with its multiplicity, to 1e-13 of the largest; multiplicities add up; the index, and in the catalogue too."""
    lam = dnc_lambda(K, alpha, L)
    turn = deep_scale.fold(points.dnc(K).parts[0], L)
    point = points.at(points.dnc(K), lam, L, "large" if alpha > turn else "small")
    assert point.scales[0] == pytest.approx(alpha, rel=1e-12)
    dense = numerical(points.dnc(K), lam, L, d, "large" if alpha > turn else "small")
    closed = stability.dnc_spectrum(K, alpha, L, d)
    assert closed.multiplicities.sum() == dense.size == 2 * K * d + (L - 1) * d * d
    expected = np.sort(np.repeat(closed.eigenvalues, closed.multiplicities))
    assert dense == pytest.approx(expected, abs=1e-13 * np.abs(dense).max())
    negative = int((dense < -1e-11 * np.abs(dense).max()).sum())
    assert stability.dnc_index(K, alpha, L) == negative
    assert point.index == negative
    assert index is None or index == negative
    assert int((np.abs(dense) < 1e-12 * np.abs(dense).max()).sum()) == deep.orbit_dimension(K - 1, L, d)


def test_more_samples_and_unequal_penalties() -> None:
    """n samples with one common penalty: eigenvalues times n^{-1/(L+1)}, and positive ones within classes; unequal: the same index."""
    K, L, d, n = 4, 2, 4, 3
    lam_eff = dnc_lambda(K, 1.0, L)
    lam = lam_eff * n ** (-1 / (L + 1))
    means = points.at(points.dnc(K), lam_eff, L).M
    H, *W = deep.balanced_factors(means, n, lam, [lam] * L, d)
    P = problem(K, n, d, [lam] * L, lam)
    samples = type(P)(P.counts[0], width=d, depth=L, features="free", lam_w=lam, lam_h=lam, columns="samples")
    dense = np.linalg.eigvalsh(hessian(samples, [np.repeat(H, n, axis=1), *W]))
    closed = stability.dnc_spectrum(K, 1.0, L, d)
    inside = (n - 1) * K * d
    expected = np.repeat(closed.eigenvalues, closed.multiplicities) * n ** (-1 / (L + 1))
    left = list(dense)
    for value in expected:
        at = int(np.argmin(np.abs(np.array(left) - value)))
        assert left.pop(at) == pytest.approx(value, abs=1e-13 * dense.max())
    assert len(left) == inside
    assert min(left) > 0
    lam_w, lam_h = [lam_eff / 10, lam_eff * 20], lam_eff / 2
    unequal = np.linalg.eigvalsh(hessian(problem(K, 1, d, lam_w, lam_h), deep.balanced_factors(means, 1, lam_h, lam_w, d)))
    assert int((unequal < -1e-11 * unequal.max()).sum()) == stability.dnc_index(K, 1.0, L) == 2


@pytest.mark.parametrize(
    ("K", "levels", "tops"),
    [
        (4, (0.162, 0.136, 0.111), (0.178, 0.175, 0.179)),
        (6, (0.102, 0.0690, 0.0423), (0.130, 0.132, 0.138)),
        (10, (0.0403, None, None), (0.0863, None, None)),
        (20, (2.3e-3, 1.4e-4, 9.1e-6), (0.049, 0.054, 0.060)),
        (50, (1.5e-7, 6.9e-11, 3.5e-14), (0.022, 0.026, 0.030)),
        (100, (1.1e-14, 1.4e-21, 1.8e-28), (0.012, 0.015, 0.018)),
    ],
)
def test_stability_table(K: int, levels: tuple[float | None, ...], tops: tuple[float | None, ...]) -> None:
    """The document's table to its digits, at 50 digits, and the index jumping by K(K-3)/2 within 1e-13 of the line."""
    for L, c, top in zip((2, 3, 5), levels, tops, strict=True):
        got = stability.stability_level(K, L)
        assert c is None or got == pytest.approx(c, rel=0.03)
        assert top is None or points.largest(points.dnc(K), L) == pytest.approx(top, rel=0.035)
        a = mp.mpf(K) * (L - 1) / (L + 1)
        exact = a ** (mp.mpf(L - 1) / (L + 1)) / (mp.exp(a) + K - 1)
        assert abs(got - exact) <= 3e-14 * exact
        assert stability.log_stability_level(K, L) == pytest.approx(float(mp.log(exact)), rel=1e-14)
        assert stability.dnc_is_stable(K, got * np.array([1 - 1e-12, 1 + 1e-12]), L).tolist() == [True, False]
        below, above = (points.at(points.dnc(K), got * f, L).index for f in (1 - 1e-12, 1 + 1e-12))
        assert (below, above) == (0, K * (K - 3) // 2)


def test_huge_numbers_of_classes() -> None:
    """K = 1000: lambda_c underflows, its logarithm does not, nothing overflows; above lambda_max nothing is stable."""
    assert stability.stability_level(1000, 5) == pytest.approx(0, abs=1e-280)
    assert stability.stability_level(1000, 20) == 0
    a = 1000 * mp.mpf(19) / 21
    assert stability.log_stability_level(1000, 20) == pytest.approx(float(mp.log(a ** (mp.mpf(19) / 21) / (mp.exp(a) + 999))), rel=1e-14)
    assert stability.dnc_index(1000, [70.0, 1e4], 20).tolist() == [1000 * 997 // 2, 0]
    assert stability.dnc_is_stable(1000, [1e-30, 1.0], 20).tolist() == [False, False]


def test_line_implies_the_rest() -> None:
    """alpha >= a_c implies the large root and AB >= C^2, for K >= 4 up to 1000 and L up to 20; the strip lies above the fold."""
    for K in (4, 5, 6, 10, 30, 100, 1000):
        for L in (2, 3, 5, 10, 20):
            turn, strip, line = deep_scale.fold(points.dnc(K).parts[0], L), stability.strip_top(K, L), stability.stable_scale(K, L)
            assert turn < strip < line
            assert stability.dnc_index(K, line * (1 + np.geomspace(1e-12, 100, 50)), L).max() == 0
            assert stability.dnc_index(K, (turn + strip) / 2, L) == K * (K - 3) // 2 + K - 1
    assert deep_scale.fold(points.dnc(4).parts[0], 2) == pytest.approx(0.788, abs=5e-4)
    assert stability.strip_top(4, 2) == pytest.approx(0.8875, abs=5e-5)


def test_three_classes() -> None:
    """K = 3: stable exactly above the strip; the index falls from 2 to 0 there, by the dense Hessian."""
    edge = stability.strip_top(3, 2)
    for alpha, index in ((edge * 0.999, 2), (edge * 1.001, 0)):
        dense = numerical(points.dnc(3), dnc_lambda(3, alpha, 2), 2, 3)
        assert int((dense < -1e-9 * dense.max()).sum()) == index == stability.dnc_index(3, alpha, 2)


# sizes, size of the block looked at, L, scale to either side of the block's line
@pytest.mark.parametrize(("sizes", "k", "L"), [((4, 2), 4, 2), ((5, 2), 5, 2), ((4, 1), 4, 2), ((4, 3), 4, 2), ((5, 1), 5, 3)])
def test_blocks(sizes: tuple[int, ...], k: int, L: int) -> None:
    """Each crossing of a block's line along the large root changes the index by k(k-3)/2, at large scales as well as at small ones."""
    K, code = sum(sizes), points.blocks(sizes)
    of = code.parts[0]
    grid = np.linspace(deep_scale.fold(of, L), 60, 20001)
    unstable = stability.block_is_unstable(k, K, grid, L)
    turns = np.flatnonzero(unstable[1:] != unstable[:-1])
    checked = 0
    for i in turns:
        lam = [float(deep_scale.strength(of, grid[i] * f, L)) for f in (0.995, 1.006)]
        if not all(1e-9 < x < points.largest(code, L) for x in lam):
            continue
        counts = []
        for x in lam:
            dense = numerical(code, x, L, K)
            counts.append(int((dense < -1e-10 * dense.max()).sum()))
        change = counts[0] - counts[1] if unstable[i] else counts[1] - counts[0]
        assert change == k * (k - 3) // 2
        checked += 1
    assert checked


def test_block_of_everything_is_dnc() -> None:
    a = np.linspace(0.1, 20, 400)
    assert np.array_equal(stability.block_is_unstable(7, 7, a, 3), a < stability.stable_scale(7, 3))


@pytest.mark.parametrize(("K", "L", "d"), [(4, 2, 4), (4, 2, 7), (6, 2, 6), (5, 2, 5)])
def test_nullity_is_the_orbit_dimension(K: int, L: int, d: int) -> None:
    """At pairs (relaxed for odd K), a minimum: nullity L[rd - r(r+1)/2], no negative eigenvalue."""
    code = points.pairs(K) if K % 2 == 0 else points.relaxed_pairs(K)
    point = points.at(code, 1e-3, L)
    dense = numerical(code, 1e-3, L, d)
    assert int((np.abs(dense) < 1e-11 * dense.max()).sum()) == deep.orbit_dimension(point.rank, L, d)
    assert dense.min() > -1e-11 * dense.max()
    assert deep.orbit_dimension(K - 1, L, d) != deep.published_orbit_dimension(K - 1, L, d)


@pytest.mark.parametrize(
    "code", [points.blocks([2, 8]), points.blocks([2, 2, 6]), points.pairs(10), points.rectified_simplex(5)], ids=lambda c: c.name
)
def test_minima_of_the_published_setting(code: Any) -> None:
    """K = 10, L = 2, n = 5, lambda = 2^-10: each is a minimum up to its orbit."""
    lam = float(deep.lambda_eff(5, 2.0**-10, [2.0**-10] * 2))
    dense = numerical(code, lam, 2, 10)
    assert dense.min() > -1e-11 * dense.max()
    assert int((dense < 1e-11 * dense.max()).sum()) == deep.orbit_dimension(points.at(code, lam, 2).rank, 2, 10)


def test_published_flatness() -> None:
    """K = 6, L = 2, d = 6, lambda = 1e-3: Frobenius, spectral norm and trace at DNC (closed) and pairs (dense)."""
    alpha = float(points.at(points.dnc(6), 1e-3, 2).scales[0])
    closed = stability.dnc_spectrum(6, alpha, 2, 6)
    for values, expected in (
        (np.repeat(closed.eigenvalues, closed.multiplicities), (0.0550, 0.0217, 0.310)),
        (numerical(points.pairs(6), 1e-3, 2, 6), (0.0602, 0.0211, 0.330)),
    ):
        assert (np.linalg.norm(values), np.abs(values).max(), values.sum()) == pytest.approx(expected, rel=3e-3)


def test_doors() -> None:
    with pytest.raises(ValueError, match="width is 3, but the multiplicities are known for width >= K = 4"):
        stability.dnc_spectrum(4, 1.0, 2, 3)
    with pytest.raises(ValueError, match="number of classes is 3"):
        stability.stable_scale(3, 2)
    with pytest.raises(ValueError, match="number of classes is 2"):
        stability.block_is_unstable(2, 6, 1.0, 2)
    with pytest.raises(ValueError, match="stable wherever it exists at depth 1"):
        stability.log_stability_level(5, 1)
    with pytest.raises(ValueError, match="K is 2 and depth 2"):
        stability.strip_top(2, 2)
