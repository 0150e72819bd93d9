"""ReLU cross-entropy under imbalance against the scalar problems it is made of, solved at 50 digits, and against the plain objective."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from oracle import dual_point, level, mp, plain, realise_relu, relu_class
from ufm.theory import imbalance

Floats = NDArray[np.float64]

PATTERNS = {
    "balanced": [100.0] * 4,
    "step": [100.0, 100.0, 10.0, 10.0],
    "step_100": [1000.0, 1000.0, 10.0, 10.0],
    "geometric": [1000.0, 300.0, 100.0, 30.0, 10.0],
    "two": [70.0, 30.0],
    "huge": [1e9, 123456789.0, 1e5, 1.0],
}
RELATIVE = 1e-12


def penalties_at(ratio: float, counts: Floats, tilt: float = 3.0) -> tuple[float, float]:
    """(lam_w, lam_h) with lambda = ratio times the smallest class's collapse level."""
    lam = ratio * float(imbalance.collapse_level(counts).min())
    return lam * tilt, lam / tilt


def at_50_digits(counts: Floats, lam_w: float, lam_h: float, omega: Floats | None = None) -> tuple[list[object], object]:
    K, N, lam = len(counts), counts.sum(), level([lam_w, lam_h])
    known: dict[tuple[float, float], tuple[object, object]] = {}
    pairs = [(n, 1.0 if omega is None else omega[k]) for k, n in enumerate(counts)]
    for n, w in set(pairs):
        known[n, w] = relu_class(K, n, N, lam, w)
    return [known[pair][0] for pair in pairs], sum(known[pair][1] for pair in pairs)


def agree(found: Floats, exact: list[object], relative: float = RELATIVE, absolute: float = RELATIVE) -> None:
    for x, y in zip(np.ravel(found), exact, strict=True):
        assert abs(mp.mpf(float(x)) - y) <= max(relative * abs(y), absolute), (x, y)


@pytest.mark.parametrize("counts", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("ratio", [1e-6, 0.01, 0.5, 0.999, 1.3, 40.0])
def test_margins_and_value_solve_the_scalar_problems(counts: list[float], ratio: float) -> None:
    """M_k minimises omega pi log(1 + (K-1)e^{-M}) + c sqrt(n) M, and F* is the sum of the minima."""
    n = np.array(counts)
    lam_w, lam_h = penalties_at(ratio, n)
    M, F = at_50_digits(n, lam_w, lam_h)
    agree(imbalance.margins(n, lam_w, lam_h), M)
    agree(imbalance.optimal_value(n, lam_w, lam_h), [F], absolute=0.0)
    assert np.array_equal(imbalance.collapsed(n, lam_w, lam_h), np.array([m == 0 for m in M]))


@pytest.mark.parametrize("counts", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("side", [-1e-9, 1e-9])
def test_every_threshold_is_bracketed(counts: list[float], side: float) -> None:
    """1e-9 below its level each class survives with the margin of the scalar problem; 1e-9 above it is at zero."""
    n = np.array(counts)
    for k, star in enumerate(imbalance.collapse_level(n)):
        lam = float(star) * (1 + side)
        M, F = at_50_digits(n, lam, lam)
        assert imbalance.collapsed(n, lam, lam)[k] == (side > 0) == (M[k] == 0)
        agree(imbalance.margins(n, lam, lam), M)
        agree(imbalance.optimal_value(n, lam, lam), [F], absolute=0.0)
        assert imbalance.collapse_count(n, lam, lam)[k] == pytest.approx(n[k], rel=3e-9)
        assert (imbalance.collapse_count(n, lam, lam)[k] >= n[k]) == (side > 0)


@pytest.mark.parametrize("counts", [[1e9] + [1.0] * 999, [1e9] * 500 + [7.0] * 500, [1e9, 1.0]], ids=["one_giant", "halves", "two"])
@pytest.mark.parametrize("penalties", [(1e-300, 1e-300), (1e-300, 1.0), (1e-3, 1e-290), (1e-9, 1e-9)])
def test_extreme_counts_and_penalties(counts: list[float], penalties: tuple[float, float]) -> None:
    """Products of penalties that underflow, K = 1000 and counts of 1e9 lose no digits."""
    n = np.array(counts)
    M, F = at_50_digits(n, *penalties)
    agree(imbalance.margins(n, *penalties), M)
    agree(imbalance.optimal_value(n, *penalties), [F], absolute=0.0)


@pytest.mark.parametrize("K", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("side", [-1e-9, 1e-9, -1e-6])
def test_near_the_threshold_for_every_K(K: int, side: float) -> None:
    n = np.full(K, 17.0)
    lam = float(imbalance.complete_collapse_level(n)) * (1 + side)
    M, F = at_50_digits(n, lam, lam)
    agree(imbalance.margins(n, lam, lam), M)
    agree(imbalance.optimal_value(n, lam, lam), [F], absolute=0.0)
    assert imbalance.collapsed(n, lam, lam).all() == (side > 0)


@pytest.mark.parametrize("counts", [c for name, c in PATTERNS.items() if name != "huge"])
@pytest.mark.parametrize("ratio", [0.05, 0.7, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_grams_are_those_of_a_certified_optimum(counts: list[float], ratio: float, weighted: bool) -> None:
    """W, H built from the Gram of H have the Gram of W, the value F*, and a dual point inside the copositive cone (rho <= 1)."""
    n = np.array(counts)
    omega = np.linspace(0.5, 2.0, len(n)) if weighted else None
    lam_w, lam_h = penalties_at(ratio, n)
    M = imbalance.margins(n, lam_w, lam_h, omega)
    Z = imbalance.logits(M)
    H, W = realise_relu(Z, imbalance.feature_gram(n, M, lam_w, lam_h))
    gram = imbalance.classifier_gram(n, M, lam_w, lam_h)
    scale = gram.max() or 1.0
    np.testing.assert_allclose(W @ H, Z, rtol=0, atol=1e-13)
    np.testing.assert_allclose(W @ W.T, gram, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(gram.sum(axis=1), 0, atol=1e-13 * scale)  # sum_k w_k = 0
    F = plain([H, W], np.zeros(len(n)), n, [lam_w], lam_h, omega=omega)
    assert imbalance.optimal_value(n, lam_w, lam_h, omega) == pytest.approx(F, rel=1e-13)
    for penalty in (lam_w * (W * W).sum(), lam_h * (n * H * H).sum()):
        assert imbalance.balance(n, M, lam_w, lam_h) == pytest.approx(penalty, rel=1e-12, abs=1e-300)
    products = (Q := dual_point(Z, n, omega=omega)).T @ Q
    assert np.all(products - np.diag(np.diag(products)) <= 1e-18)
    assert np.sqrt(np.diag(products).max()) <= np.sqrt(lam_w * lam_h) * (1 + 1e-12)


def test_the_formula_of_the_rows() -> None:
    """w_k = sqrt(lam_h/lam_w)/sqrt(K(K-1)) (K sqrt(n_k) h_k - sum_m sqrt(n_m) h_m), by loops."""
    n, (lam_w, lam_h), K = np.array(PATTERNS["geometric"]), (2e-3, 1e-5), 5
    M = imbalance.margins(n, lam_w, lam_h)
    assert np.all(M > 0)
    H = np.diag(np.sqrt(imbalance.feature_norms(n, M, lam_w, lam_h)))
    total = sum(np.sqrt(n[m]) * H[:, m] for m in range(K))
    W = np.stack([np.sqrt(lam_h / lam_w) / np.sqrt(K * (K - 1)) * (K * np.sqrt(n[k]) * H[:, k] - total) for k in range(K)])
    np.testing.assert_allclose(W @ W.T, imbalance.classifier_gram(n, M, lam_w, lam_h), rtol=1e-12, atol=1e-14)
    norms = np.linalg.norm(W, axis=1)
    np.testing.assert_allclose(W @ W.T / np.outer(norms, norms), imbalance.classifier_cosines(n, M), atol=1e-13)
    np.testing.assert_allclose(W @ H / np.outer(norms, np.diag(H)), imbalance.alignment(n, M), atol=1e-13)


def test_collapsed_classes_share_their_row() -> None:
    n = np.array(PATTERNS["step"])
    lam_w, lam_h = penalties_at(1.5, n)
    M = imbalance.margins(n, lam_w, lam_h)
    assert list(M == 0) == [False, False, True, True]
    assert imbalance.classifier_cosines(n, M)[2, 3] == pytest.approx(1.0, abs=1e-14)
    assert np.isnan(imbalance.alignment(n, M)[:, 2:]).all()
    assert np.isfinite(imbalance.alignment(n, M)[:, :2]).all()
    assert np.isnan(imbalance.classifier_cosines(n, np.zeros(4))).all()


def test_balanced_is_an_orthogonal_frame_under_a_simplex() -> None:
    """cos(w_k, w_l) = -1/(K-1), cos(w_k, h_k) = sqrt((K-1)/K)."""
    n, K = np.full(6, 50.0), 6
    M = imbalance.margins(n, 1e-4, 1e-4)
    expected = np.full((K, K), -1 / (K - 1)) + np.eye(K) * (1 + 1 / (K - 1))
    np.testing.assert_allclose(imbalance.classifier_cosines(n, M), expected, atol=1e-14)
    np.testing.assert_allclose(np.diag(imbalance.alignment(n, M)), np.sqrt((K - 1) / K), atol=1e-14)


@pytest.mark.parametrize(("K", "minority"), [(4, None), (10, None), (10, 3), (7, 5)])
def test_step_ratios(K: int, minority: int | None) -> None:
    """The minority is at zero from R* on, the majority too from the second ratio on."""
    small, n_min, lam = K // 2 if minority is None else minority, 10.0, 1e-3
    first = float(imbalance.step_ratio(K, n_min, lam, lam, minority))
    last = float(imbalance.step_complete_ratio(K, n_min, lam, lam, minority))
    assert 1 < first < last

    def dead(R: float) -> list[bool]:
        found = imbalance.collapsed(np.array([n_min * R] * (K - small) + [n_min] * small), lam, lam)
        return [bool(found[0]), bool(found[-1])]

    assert [dead(first * (1 - 1e-9)), dead(first * (1 + 1e-9))] == [[False, False], [False, True]]
    assert [dead(last * (1 - 1e-9)), dead(last * (1 + 1e-9))] == [[False, True], [True, True]]
    if minority is None:
        assert first == pytest.approx(2 * np.sqrt((K - 1) / (K**3 * n_min * lam * lam)) - 1, rel=1e-13)
        assert (1 + last) ** 2 / last == pytest.approx(4 * (K - 1) / (K**3 * n_min * lam * lam), rel=1e-12)


def test_step_without_any_surviving_majority() -> None:
    assert np.isnan(imbalance.step_complete_ratio(4, 1.0, 1.0, 1.0))


def test_dead_subsets_cost_their_gains() -> None:
    """F_S = F* + sum gain_k > F*, the value of the plain objective at the point without the classes of S."""
    n = np.array(PATTERNS["geometric"])
    lam_w, lam_h = penalties_at(0.6, n)
    M, best = imbalance.margins(n, lam_w, lam_h), float(imbalance.optimal_value(n, lam_w, lam_h))
    gains = imbalance.dead_subset_gain(n, lam_w, lam_h)
    assert np.all(gains > 0)
    for S in ([0], [4], [1, 3], [0, 1, 2, 3, 4]):
        dead = np.isin(np.arange(5), S)
        kept = np.where(dead, 0.0, M)
        point = realise_relu(imbalance.logits(kept), imbalance.feature_gram(n, kept, lam_w, lam_h))
        F = plain(point, np.zeros(5), n, [lam_w], lam_h)
        found = float(imbalance.dead_subset_value(n, lam_w, lam_h, dead))
        assert found == pytest.approx(F, rel=1e-13)
        assert found == pytest.approx(best + gains[S].sum(), rel=1e-13)
        assert found > best


@pytest.mark.parametrize("side", [1e-9, 1e-4, 0.3])
def test_gain_vanishes_to_second_order(side: float) -> None:
    n = np.array(PATTERNS["step"])
    lam = float(imbalance.collapse_level(n).min()) * (1 - side)
    M, F = relu_class(4, n[3], n.sum(), mp.mpf(lam))
    gain = mp.mpf(float(n[3])) / mp.mpf(float(n.sum())) * mp.log(4) - F
    found = imbalance.dead_subset_gain(n, lam, lam)[3]
    assert abs(mp.mpf(float(found)) - gain) <= max(1e-12 * gain, 1e-17)
    assert M > 0
    assert imbalance.dead_subset_gain(n, lam / (1 - 2 * side), lam / (1 - 2 * side))[3] == 0


@pytest.mark.parametrize("side", [-1e-9, 1e-9])
def test_balanced_class_weights_reverse_the_order(side: float) -> None:
    """omega_k = N/(K n_k): collapse iff kappa^2 >= N^2 (K-1)/(K^3 n_k), the majority first; omega ~ n^{-1/2} levels all thresholds."""
    n, K = np.array(PATTERNS["step"]), 4
    omega = n.sum() / (K * n)
    lam = np.sqrt((K - 1) / K**3 / 100.0) * (1 + side)
    assert list(imbalance.collapsed(n, lam, lam, omega)) == [side > 0, side > 0, False, False]
    agree(imbalance.margins(n, lam, lam, omega), at_50_digits(n, lam, lam, omega)[0])
    even = imbalance.collapse_level(n, n**-0.5)
    np.testing.assert_allclose(even, even[0], rtol=1e-15)


def test_only_kappa_matters() -> None:
    """F and W H depend on the penalties through lam_w lam_h alone."""
    n, s = np.array(PATTERNS["geometric"]), 2.0 ** np.arange(-40, 41, 10)
    lam_w, lam_h = 1e-4 * s, 1e-4 / s
    np.testing.assert_allclose(imbalance.margins(n, lam_w, lam_h), np.tile(imbalance.margins(n, 1e-4, 1e-4), (9, 1)), rtol=1e-14)
    np.testing.assert_allclose(imbalance.optimal_value(n, lam_w, lam_h), imbalance.optimal_value(n, 1e-4, 1e-4), rtol=1e-14)
    np.testing.assert_allclose(imbalance.kappa(n, lam_w, lam_h), n.sum() * 1e-4, rtol=1e-14)


def test_slow_approach_to_the_limit() -> None:
    """K = 4, R = 100, lam_w = N lam_h = lambda: cos(w_min, w_min') is 0.584, 0.511, 0.478 at 1e-3, 1e-8, 1e-30; limit 0.467."""
    n = np.array(PATTERNS["step_100"])
    for lam, expected in ((1e-3, 0.584), (1e-8, 0.511), (1e-30, 0.4785)):
        M = imbalance.margins(n, lam, lam / n.sum())
        assert imbalance.classifier_cosines(n, M)[2, 3] == pytest.approx(expected, abs=5e-4)
    rows = imbalance.limit_geometry(n).classifier_gram
    assert rows[2, 3] / rows[2, 2] == pytest.approx(((10 + 1) / 2 - 2) / ((10 + 1) / 2 + 2), rel=1e-13)
    assert rows[2, 3] / rows[2, 2] == pytest.approx(0.467, abs=5e-4)
    assert rows[0, 0] / rows[2, 2] == pytest.approx((5.5 + 20) / (5.5 + 2), rel=1e-13)


def test_limit_geometry_is_the_limit() -> None:
    n = np.array(PATTERNS["step_100"])
    M = imbalance.margins(n, 1e-300, 1e-300)
    limit = imbalance.limit_geometry(n)
    for X, Y in zip(limit, (imbalance.classifier_gram(n, M, 1, 1), imbalance.feature_gram(n, M, 1, 1), imbalance.logits(M)), strict=True):
        assert np.linalg.norm(X) == pytest.approx(1.0, rel=1e-14)
        np.testing.assert_allclose(X, Y / np.linalg.norm(Y), atol=3e-3)
    assert limit.feature_gram[0, 0] / limit.feature_gram[2, 2] == pytest.approx(100**-0.5, rel=1e-13)


def test_oversampling_is_the_problem_of_the_larger_counts() -> None:
    """Balancing the counts by repetition gives the balanced closed form with N = sum r_k n_k."""
    n = imbalance.oversampled([100, 100, 10, 10], [1, 1, 10, 10])
    np.testing.assert_array_equal(n, [100.0] * 4)
    M, _ = relu_class(4, 100, 400, level([1e-4, 1e-4]))
    agree(imbalance.margins(n, 1e-4, 1e-4), [M] * 4)


def test_grids_broadcast() -> None:
    """Counts (G, K), penalties (G,) and weights (G, K) give each cell its own answer."""
    n, lam = np.array([PATTERNS["step"], PATTERNS["step_100"]]), np.array([1e-3, 1e-4])
    omega = np.array([[1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 1.0, 3.0]])
    M = imbalance.margins(n, lam, 2 * lam, omega)
    grams = imbalance.classifier_gram(n, M, lam, 2 * lam)
    for g in range(2):
        np.testing.assert_array_equal(M[g], imbalance.margins(n[g], lam[g], 2 * lam[g], omega[g]))
        np.testing.assert_array_equal(grams[g], imbalance.classifier_gram(n[g], M[g], lam[g], 2 * lam[g]))


def test_zero_penalties_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lam_h holds 0\.0, but the closed forms need positive penalties"):
        imbalance.margins([1, 2], 1.0, 0.0)
