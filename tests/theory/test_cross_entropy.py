"""Balanced closed forms, the bias alone, and the exact zero, merging and block conditions of cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from oracle import bias_alone, bisect, descend, dual_point, level, mp, plain, realise, realise_relu, relu_class, relu_zero_norm, zero_norm
from ufm.theory import blocks, cross_entropy, imbalance

Floats = NDArray[np.float64]

UNEQUAL = {
    "two_groups": [100.0, 100.0, 100.0, 10.0, 10.0, 10.0],
    "three_groups": [90.0, 90.0, 40.0, 40.0, 10.0],
    "single_majority": [100.0, 20.0, 20.0, 20.0],
    "all_different": [50.0, 30.0, 20.0],
}
BIASES = {"none": None, "free": 0.0, "small": 1e-3, "large": 10.0}


def etf_margin(K: int, n: float, lam: object, omega: float = 1.0) -> object:
    """min over beta >= 0 of omega log(1 + (K-1)e^{-beta}) + (K-1) lam sqrt(n) beta, by its derivative."""

    def slope(beta: object) -> object:
        e = (K - 1) * mp.exp(-beta)
        return (K - 1) * lam * mp.sqrt(n) - omega * e / (1 + e)

    return mp.mpf(0) if slope(mp.mpf(0)) >= 0 else bisect(slope, 0, 4000)


def bias_of(shares: Floats, lam_b: float | None) -> Floats:
    return cross_entropy.bias_alone(shares, lam_b)


@pytest.mark.parametrize("K", [2, 3, 10, 1000])
@pytest.mark.parametrize("n", [1.0, 100.0, 1e9])
@pytest.mark.parametrize("ratio", [1e-4, 0.5, 1 - 1e-9, 1 + 1e-9, 3.0])
@pytest.mark.parametrize("relu", [False, True])
def test_balanced_margins_at_50_digits(K: int, n: float, ratio: float, relu: bool) -> None:
    """The margin minimises the scalar objective and vanishes exactly from the level on."""
    lam = float(cross_entropy.balanced_level(K, n, relu=relu)) * ratio
    found = float(cross_entropy.balanced_margin(K, n, lam, lam, relu=relu))
    if relu:
        exact, value = relu_class(K, n, K * n, mp.mpf(lam))
        value *= K
    else:
        exact = etf_margin(K, n, mp.mpf(lam))
        value = mp.log1p((K - 1) * mp.exp(-exact)) + (K - 1) * mp.mpf(lam) * mp.sqrt(n) * exact
    assert (found == 0) == (exact == 0) == (ratio > 1)
    assert abs(found - exact) <= max(1e-12 * exact, 1e-12)
    assert abs(float(cross_entropy.balanced_value(K, n, lam, lam, relu=relu)) - value) <= 1e-12 * value


def test_balanced_at_tiny_penalties() -> None:
    """lam_w = lam_h = 1e-300: the product underflows, the margin does not."""
    exact = etf_margin(10, 100.0, level([1e-300, 1e-300]))
    assert abs(float(cross_entropy.balanced_margin(10, 100.0, 1e-300, 1e-300)) - exact) <= 1e-12 * exact


@pytest.mark.parametrize("relu", [False, True])
def test_balanced_weight_scales_the_loss(relu: bool) -> None:
    """omega multiplies the loss: F(omega, lambda) = omega F(1, lambda/omega)."""
    weighted = cross_entropy.balanced_value(5, 30.0, 1e-3, 1e-3, relu=relu, weight=2.5)
    assert float(weighted) == pytest.approx(2.5 * float(cross_entropy.balanced_value(5, 30.0, 4e-4, 4e-4, relu=relu)), rel=1e-14)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [1 - 1e-6 - 1e-9, 1e-6, 1e-9], [1.4, 0.2, 0.2, 0.05]])
@pytest.mark.parametrize("lam_b", [1e-300, 1e-6, 1e-2, 1.0, 1e6])
def test_bias_alone_at_50_digits(shares: list[float], lam_b: float) -> None:
    if lam_b == 1e-300:  # the limit, to this accuracy
        b = [mp.log(mp.mpf(p)) for p in shares]
        exact = [x - sum(b) / len(b) for x in b]
    else:
        exact = bias_alone(shares, lam_b)
    found = cross_entropy.bias_alone(np.array(shares), lam_b)
    scale = max(abs(x) for x in exact)
    assert all(abs(float(x) - y) <= 1e-12 * max(scale, abs(y)) for x, y in zip(found, exact, strict=True))
    top = mp.log(sum(mp.exp(x) for x in exact))
    value = sum(mp.mpf(p) * (top - x) for p, x in zip(shares, exact, strict=True)) + mp.mpf(lam_b) / 2 * sum(x * x for x in exact)
    assert abs(float(cross_entropy.bias_alone_value(np.array(shares), found, lam_b)) - value) <= 1e-12 * value


def test_free_bias_is_the_log_prior_and_the_limit_of_small_penalties() -> None:
    p = np.array([0.6, 0.3, 0.1])
    free = cross_entropy.bias_alone(p, 0.0)
    np.testing.assert_allclose(cross_entropy.softmax(free), p, rtol=1e-14)
    np.testing.assert_allclose(cross_entropy.bias_alone(p, 1e-14), free, rtol=1e-11)
    assert free.sum() == pytest.approx(0, abs=1e-14)
    assert not cross_entropy.bias_alone(p, None).any()


@pytest.mark.parametrize("counts", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize("lam_b", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_zero_level_is_the_spectral_norm(counts: list[float], lam_b: float | None, weighted: bool) -> None:
    """Grouping equal classes does not change ||(I - s 1^T) diag(a)||."""
    n = np.array(counts)
    omega = np.where(n == n.max(), 0.5, 1.5) if weighted else np.ones(len(n))
    s = cross_entropy.softmax(bias_of(omega * n / n.sum(), lam_b))
    found = cross_entropy.zero_level(cross_entropy.groups(n, omega), s)
    assert abs(found - zero_norm(counts, list(s), list(omega))) <= 1e-14


@pytest.mark.parametrize("counts", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize("lam_b", BIASES.values(), ids=BIASES)
def test_relu_zero_level_tries_every_support(counts: list[float], lam_b: float | None) -> None:
    n, omega = np.array(counts), np.linspace(1.0, 2.0, len(counts))
    for w in (np.ones(len(n)), np.sort(omega)):
        s = cross_entropy.softmax(bias_of(w * n / n.sum(), lam_b))
        found = cross_entropy.relu_zero_level(cross_entropy.groups(n, w), s)
        assert found.lower == found.upper == pytest.approx(relu_zero_norm(n, s, w), rel=1e-12)


def test_relu_zero_level_of_one_heavy_class_has_a_support_of_several() -> None:
    """A free bias towards one class makes the other columns agree, so that the maximiser is no vertex."""
    n = np.array([1000.0, 10.0, 10.0, 10.0])
    found = cross_entropy.relu_zero_level(cross_entropy.groups(n), n / n.sum())
    assert found.lower > np.sqrt(10.0) / 1030 * 1.2
    assert found.lower == pytest.approx(relu_zero_norm(n, n / n.sum(), np.ones(4)), rel=1e-12)


def test_relu_zero_level_without_bias_is_complete_collapse() -> None:
    n = np.array([50.0, 40.0, 30.0, 20.0, 10.0])
    found = cross_entropy.relu_zero_level(cross_entropy.groups(n), np.full(5, 0.2))
    assert found.lower == found.upper == pytest.approx(float(imbalance.complete_collapse_level(n)), rel=1e-15)


def test_relu_zero_level_of_many_different_classes_is_bounded() -> None:
    """Too many supports to try: a vertex from below, the spectral norm from above."""
    n = np.linspace(1000, 1, 30).round()
    pi = n / n.sum()
    found = cross_entropy.relu_zero_level(cross_entropy.groups(n), pi)
    assert found.lower < found.upper == pytest.approx(float(zero_norm(list(n), list(pi))), rel=1e-12)


def test_readme_case_is_trivial() -> None:
    """5000x3, 4000x3, 3000x4, lam_b = 0.02, sqrt(lam_w lam_h) = 0.005: 2.76 times the level, which is sqrt(5000)/39000 to 1 %."""
    n = np.array([5000.0] * 3 + [4000.0] * 3 + [3000.0] * 4)
    b = bias_alone(list(n / n.sum()), 0.02)
    s = [mp.exp(x) for x in b]
    exact = zero_norm(list(n), [x / sum(s) for x in s])
    found = cross_entropy.zero_level(cross_entropy.groups(n), cross_entropy.softmax(bias_of(n / n.sum(), 0.02)))
    assert abs(found - exact) <= 1e-12 * exact
    assert found == pytest.approx(np.sqrt(5000) / 39000, rel=0.01)
    assert 0.005 / found == pytest.approx(2.76, abs=0.005)


def near_collapse(counts: list[float], lam_b: float | None) -> tuple[Any, Any, Any, float, float]:
    """(counts, groups, bias alone by group, level of complete collapse, level of the block solution)."""
    n = np.array(counts)
    cell = cross_entropy.groups(n)
    b = bias_of(n / n.sum(), lam_b)
    start, zero = np.zeros(len(cell.members)), cross_entropy.zero_level(cell, cross_entropy.softmax(b))
    start[cell.label] = b
    return n, cell, start, zero, blocks.between_zero_level(cell, zero, lam_b, start)


@pytest.mark.parametrize("counts", [c for name, c in UNEQUAL.items() if name != "all_different"])
@pytest.mark.parametrize("lam_b", BIASES.values(), ids=BIASES)
def test_block_point_is_certified_above_its_level(counts: list[float], lam_b: float | None) -> None:
    """From the level on: stationary in b, value of the plain objective, dual norm lambda; just below it the dual norm exceeds lambda."""
    n, cell, start, zero, between = near_collapse(counts, lam_b)
    assert cell.attraction.min() < between <= zero * (1 + 1e-15)
    for factor in (1 - 1e-9, 1 + 1e-9, 1.05):
        lam = min(between * factor, zero * (1 - 1e-12))
        point = blocks.block_point(cell, lam, lam_b, start)
        Z = blocks.expand(cell, point)
        Q = dual_point(Z, n)
        norm = np.linalg.norm(Q, 2)
        if between < zero * (1 - 1e-6):
            assert (norm > lam * (1 + 1e-13)) == (factor < 1) == (point.between > lam)
        if factor > 1:
            assert norm <= lam * (1 + 1e-11)
        if lam_b is not None:
            np.testing.assert_allclose((Q * np.sqrt(n)).sum(axis=1), lam_b * point.bias[cell.label], atol=1e-15)
        H, W = realise(Z - point.bias[cell.label][:, None], n, [3 * lam], lam / 3)
        F = plain([H, W], point.bias[cell.label], n, [3 * lam], lam / 3, lam_b or 0.0)
        assert point.value == pytest.approx(F, rel=1e-13)
        features, classifier = blocks.block_grams(cell, point, 3 * lam, lam / 3)
        np.testing.assert_allclose(H.T @ H, features, atol=1e-13 * max(1, features.max()))
        np.testing.assert_allclose(W @ W.T, classifier, atol=1e-13 * max(1, classifier.max()))


@pytest.mark.parametrize("counts", [c for name, c in UNEQUAL.items() if name != "all_different"])
@pytest.mark.parametrize("lam_b", BIASES.values(), ids=BIASES)
def test_block_level_is_crossed_once(counts: list[float], lam_b: float | None) -> None:
    """Between the smallest attraction and complete collapse the certificate changes sign once, at the level found."""
    _, cell, start, zero, between = near_collapse(counts, lam_b)
    levels = np.geomspace(cell.attraction.min() * 0.3, zero * (1 - 1e-9), 60)
    certified = [blocks.block_point(cell, lam, lam_b, start).between <= lam for lam in levels]
    assert certified == list(levels >= between)


def test_block_closed_form_of_two_groups_without_bias() -> None:
    """Between vanishes iff K k_B/(K - k_A(1 - e^{-alpha/k_A}))^2 + (a_B/lambda)^2 k_A/K <= 1, alpha the scalar root, at 50 digits."""
    kA, kB, nA, nB = 3, 3, 100, 10
    K, N = kA + kB, 3 * nA + 3 * nB
    aA, aB = mp.sqrt(nA) / N, mp.sqrt(nB) / N

    def excess(lam: object) -> object:
        def pull(alpha: object) -> object:
            e = mp.exp(-alpha / kA)
            return lam - aA * (kA * e + kB) / (mp.exp(alpha * (1 - mp.mpf(1) / kA)) + (kA - 1) * e + kB)

        e = mp.exp(-bisect(pull, 0, 60) / kA)
        return 1 - (K * kB / (K - kA * (1 - e)) ** 2 + (aB / lam) ** 2 * kA / K)

    exact = bisect(excess, aB, aA * (1 - mp.mpf(10) ** -30))
    cell = cross_entropy.groups(np.array([nA] * 3 + [nB] * 3))
    found = blocks.between_zero_level(cell, float(aA), None, np.zeros(2))
    assert abs(found - exact) <= 1e-13 * exact


@pytest.mark.parametrize("lam_b", [None, 0.0, 0.01], ids=["none", "free", "small"])
@pytest.mark.parametrize(("place", "regime"), [(0.9, "distinct"), (1.1, "merged"), ("above", "zero")])
def test_descent_finds_the_predicted_regime(lam_b: float | None, place: float | str, regime: str) -> None:
    """L-BFGS from a random start: minority means differ, coincide but are not zero, or are zero, as the two levels say."""
    n = np.array([100.0, 100.0, 30.0, 30.0])
    cell = cross_entropy.groups(n)
    b = bias_of(n / n.sum(), lam_b)
    zero = cross_entropy.zero_level(cell, cross_entropy.softmax(b))
    between = blocks.between_zero_level(cell, zero, lam_b, b[[0, 2]])
    merging = cross_entropy.merging_level(cell)
    assert merging == pytest.approx(np.sqrt(30) / 260, rel=1e-15)
    assert merging * 1.1 < between < zero
    lam = 0.3 * between + 0.7 * zero if place == "above" else merging * float(place)
    F, _, H = descend(n, 4, lam, lam, lam_b)
    point = blocks.block_point(cell, lam, lam_b, b[[0, 2]])
    differ, size = np.linalg.norm(H[:, 2] - H[:, 3]), np.linalg.norm(H[:, 2])
    assert (differ > 1e-3 * np.linalg.norm(H)) == (regime == "distinct")
    assert (size > 1e-3 * np.linalg.norm(H)) == (regime != "zero")
    assert (F < point.value * (1 - 1e-7)) == (regime != "zero")
    if regime == "zero":
        assert pytest.approx(point.value, rel=1e-11) == F


def test_merging_is_by_count_and_weight() -> None:
    """A group is of classes equal in both; single classes never merge."""
    cell = cross_entropy.groups([40, 10, 10, 5], [1.0, 1.0, 2.0, 1.0])
    assert cross_entropy.merging_level(cell) == np.inf
    cell = cross_entropy.groups([40, 10, 10, 10], [1.0, 0.5, 2.0, 2.0])
    assert cross_entropy.merging_level(cell) == pytest.approx(2 * np.sqrt(10) / 70)
    assert sorted(cell.members.tolist()) == [1, 1, 2]


def test_relu_balanced_frame_realises_the_value() -> None:
    K, n = 5, 20.0
    M = float(cross_entropy.balanced_margin(K, n, 2e-3, 5e-4, relu=True))
    Z = M * (np.eye(K) - 1 / K)
    counts = np.full(K, n)
    H, W = realise_relu(Z, imbalance.feature_gram(counts, np.full(K, M), 2e-3, 5e-4))
    F = plain([H, W], np.zeros(K), counts, [2e-3], 5e-4)
    assert float(cross_entropy.balanced_value(K, n, 2e-3, 5e-4, relu=True)) == pytest.approx(F, rel=1e-13)
