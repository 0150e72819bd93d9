"""Mean squared error: every direction against its scalar problem at 50 digits, every point against the plain objective."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from oracle import centred_optimum, centred_targets, deep_direction, dual_point, level, mp, plain, realise, realise_relu
from ufm.theory import imbalance, mse

Floats = NDArray[np.float64]

COUNTS = {
    "balanced": [100.0] * 4,
    "peer": [200.0, 100.0, 50.0, 50.0],
    "two_groups": [100.0, 100.0, 10.0, 10.0],
    "different": [70.0, 40.0, 25.0, 10.0],
    "huge": [1e9, 1e9, 12345.0, 1.0],
}


def penalties(depth: int, lam: float) -> tuple[Floats, float]:
    """Unequal penalties of geometric mean lam."""
    tilt = 2.0 ** np.arange(-depth, depth + 1, 2)
    return lam * tilt[:-1], lam * float(tilt[-1])


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("ratio", [1e-250, 1e-8, 0.3, 1 - 1e-9, 1 + 1e-9, 2.0])
@pytest.mark.parametrize("mu", [1.0, 130.0, 1e9])
def test_each_direction_solves_its_scalar_problem(depth: int, ratio: float, mu: float) -> None:
    """z sigma minimises (s - sigma)^2/(2N) + (L+1)(lam/2) s^{2/(L+1)}; zero against interior is exact within 1e-9 of the jump."""
    N = 3.7 * mu
    lam_w, lam_h = penalties(depth, ratio * float(mse.collapse_level([mu], N, depth)[0]))
    exact, value = deep_direction(mp.sqrt(mu), N, level([*lam_w, lam_h]), depth)
    t = mse.shortfall(mse.strength([mu], N, lam_w, lam_h), depth)
    assert (t[0] == 1) == (exact == 1) == (ratio > 1)
    assert abs(float(t[0]) - exact) <= 1e-12 * exact
    assert abs(float(mse.optimal_value([mu], N, lam_w, lam_h)) - value) <= 1e-12 * value


def test_penalties_of_1e_300_each() -> None:
    for depth in (1, 3):
        t = mse.shortfall(mse.strength([100.0], 400.0, np.full(depth, 1e-300), 1e-300), depth)
        exact = 400 * level([1e-300] * (depth + 1)) * mp.mpf(100) ** -(mp.mpf(depth) / (depth + 1))
        assert abs(float(t[0]) - exact) <= 1e-12 * exact


@pytest.mark.parametrize("M", [2, 3, 6])
def test_first_order_jump(M: int) -> None:
    """At the threshold b/n_k = (M-1)^{(M-1)/M}/M, x^M = z/(1-z) falls from M - 1 to 0, and both points have the same value."""
    n, N, lam_h = 80.0, 300.0, 1e-3
    b = n * (M - 1) ** ((M - 1) / M) / M
    lam_w = np.full(M, ((b / (M * N)) ** M / (N * lam_h)) ** (1 / M))
    below, above = (mse.shortfall(mse.strength([n], N, lam_w * f, lam_h), M)[0] for f in (1 - 1e-10, 1 + 1e-10))
    assert (1 - below) / below == pytest.approx(M - 1, rel=1e-7)
    assert above == 1
    assert float(mse.optimal_value([n], N, lam_w * (1 - 1e-12), lam_h)) == pytest.approx(n / (2 * N), rel=1e-11)


def test_depth_one_transition_is_continuous() -> None:
    lam_w, lam_h = penalties(1, float(mse.collapse_level([80.0], 300.0, 1)[0]) * (1 - 1e-9))
    assert 1 - mse.shortfall(mse.strength([80.0], 300.0, lam_w, lam_h), 1)[0] == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("ratio", [1e-3, 0.55, 0.95])
def test_without_bias_at_50_digits_and_by_loops(counts: list[float], depth: int, ratio: float) -> None:
    """Logits and value against the scalar problems; explicit factors have the Grams and the value."""
    n = np.array(counts)
    lam_w, lam_h = penalties(depth, ratio * float(mse.collapse_level(n, n.sum(), depth)[0]))
    exact = [deep_direction(mp.sqrt(x), n.sum(), level([*lam_w, lam_h]), depth) for x in counts]
    found = mse.without_bias(n, lam_w, lam_h)
    for k, (t, _) in enumerate(exact):
        assert abs(float(found.logits[k]) - (1 - t)) <= 1e-12
        assert (found.logits[k] == 0) == (t == 1)
    value, F = sum(v for _, v in exact), float(mse.optimal_value(n, n.sum(), lam_w, lam_h))
    assert abs(F - value) <= 1e-12 * value
    H, *W = realise(np.diag(found.logits), n, list(lam_w), lam_h)
    end = W[0]
    for layer in W[1:]:
        end = layer @ end
    scaled = H.T @ H / np.sqrt(np.outer(found.features, found.features) + (np.outer(found.features, found.features) == 0))
    np.testing.assert_allclose(scaled, np.diag(1.0 * (found.features > 0)), atol=1e-10)
    np.testing.assert_allclose(end @ end.T, np.diag(found.classifier), atol=1e-12 * max(1.0, found.classifier.max()))
    assert pytest.approx(plain([H, *W], np.zeros(len(n)), n, list(lam_w), lam_h, loss="MSE"), rel=1e-12) == F


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_centred_spectrum_at_50_digits(counts: list[float]) -> None:
    """Singular values, each to 1e-13 of itself even where counts span nine decades; vectors orthonormal and matched."""
    n = np.array(counts)
    found = mse.centred_spectrum(n)
    exact = sorted(mp.svd_r(centred_targets(counts), compute_uv=False), reverse=True)[:-1]
    assert all(abs(mp.sqrt(mp.mpf(float(x))) - y) <= 1e-13 * y for x, y in zip(found.squared, exact, strict=True))
    for X in (found.left, found.right):
        np.testing.assert_allclose(X.T @ X, np.eye(len(n) - 1), atol=1e-13)
    C = (np.eye(len(n)) - n[:, None] / n.sum()) * np.sqrt(n)
    np.testing.assert_allclose((found.left * np.sqrt(found.squared)) @ found.right.T, C, atol=1e-14 * np.sqrt(n.max()))


def test_centred_spectrum_of_many_classes() -> None:
    """K = 300 different counts: the trace and Frobenius identities, and numpy's singular values."""
    n = np.arange(1.0, 301.0)[::-1] ** 2
    found = mse.centred_spectrum(n)
    assert found.squared.sum() == pytest.approx(n.sum() - (n * n).sum() / n.sum(), rel=1e-13)
    C = (np.eye(300) - n[:, None] / n.sum()) * np.sqrt(n)
    np.testing.assert_allclose(np.sqrt(found.squared), np.linalg.svd(C, compute_uv=False)[:-1], atol=1e-11)
    np.testing.assert_allclose(C @ found.right, found.left * np.sqrt(found.squared), atol=1e-10)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("ratio", [1e-3, 0.6, 0.97])
def test_free_bias_at_50_digits_and_by_loops(counts: list[float], depth: int, ratio: float) -> None:
    """Logits and value against mpmath's SVD; explicit factors have the Grams and the value; b = n/N is stationary."""
    n = np.array(counts)
    spectrum = mse.centred_spectrum(n)
    lam_w, lam_h = penalties(depth, ratio * float(mse.collapse_level(spectrum.squared, n.sum(), depth)[0]))
    Z, value = centred_optimum(counts, [*lam_w, lam_h])
    found, F = mse.with_free_bias(n, spectrum, lam_w, lam_h), float(mse.optimal_value(spectrum.squared, n.sum(), lam_w, lam_h))
    assert abs(F - value) <= 1e-12 * value
    centred = found.logits - found.bias[:, None]
    for j in range(len(n)):
        for k in range(len(n)):
            assert abs(mp.mpf(float(centred[j, k])) - Z[j, k]) <= 2e-12
    H, *W = realise(centred, n, list(lam_w), lam_h)
    end = W[0]
    for layer in W[1:]:
        end = layer @ end
    if n.max() < 1e6:  # numpy's SVD in `realise` loses the small directions otherwise
        np.testing.assert_allclose(H.T @ H, found.feature_gram, atol=1e-12 * found.feature_gram.max())
    np.testing.assert_allclose(end @ end.T, found.classifier_gram, atol=1e-12 * found.classifier_gram.max())
    assert plain([H, *W], found.bias, n, list(lam_w), lam_h, loss="MSE") == pytest.approx(F, rel=1e-11)
    np.testing.assert_allclose(found.logits @ n / n.sum(), n / n.sum(), atol=1e-12)


def test_depth_one_is_the_soft_threshold_at_kappa() -> None:
    """Z D^{1/2} = (sigma - kappa)_+; balanced: Z = (1 - kappa/sqrt(n))_+ (I - J/K), an ETF."""
    n, lam_w, lam_h = np.full(5, 40.0), np.array([1e-3]), 2e-4
    found, kappa = mse.with_free_bias(n, mse.centred_spectrum(n), lam_w, lam_h), 200 * np.sqrt(2e-7)
    np.testing.assert_allclose(found.logits - 0.2, (1 - kappa / np.sqrt(40)) * (np.eye(5) - 0.2), atol=1e-15)
    assert found.feature_gram[0, 1] / found.feature_gram[0, 0] == pytest.approx(-1 / 4, rel=1e-12)
    assert mse.without_bias(n, lam_w, lam_h).logits == pytest.approx(1 - kappa / np.sqrt(40), rel=1e-14)


@pytest.mark.parametrize("ratio", [0.1, 0.9, 1 - 1e-9, 1 + 1e-9, 2.0])
@pytest.mark.parametrize("K", [2, 4, 7])
def test_relu_free_bias_is_certified(ratio: float, K: int) -> None:
    """Z = M(I - J/K): value of the plain objective, sum_k q_k = 0, q_k.q_l <= 0 and rho <= 1; at zero exactly from the level on."""
    n = np.full(K, 30.0)
    lam = ratio * float(imbalance.complete_collapse_level(n))
    lam_w, lam_h = 5 * lam, lam / 5
    M = mse.relu_free_bias_margin(n, lam_w, lam_h)
    assert (M[0] == 0) == (ratio > 1)
    Z, bias = imbalance.logits(M), np.full(K, 1 / K)
    H, W = realise_relu(Z, imbalance.feature_gram(n, M, lam_w, lam_h))
    F = plain([H, W], bias, n, [lam_w], lam_h, loss="MSE")
    assert float(mse.relu_free_bias_value(n, lam_w, lam_h)) == pytest.approx(F, rel=1e-13)
    np.testing.assert_allclose(W @ W.T, imbalance.classifier_gram(n, M, lam_w, lam_h), atol=1e-14)
    Q = dual_point(Z + bias[:, None], n, loss="MSE")
    np.testing.assert_allclose(Q.sum(axis=1), 0, atol=1e-16)
    products = Q.T @ Q
    assert np.all(products - np.diag(np.diag(products)) <= 1e-18)
    assert np.sqrt(products.max()) <= lam * (1 + 1e-13)


def test_only_the_product_of_penalties_matters() -> None:
    n, lam = np.array(COUNTS["peer"]), 1e-3
    for w, h in ((np.array([lam, lam]), lam), (np.array([1e-9, 1e3]), 1e-3), (np.array([1e-290, 1e290]), 1e-9)):
        assert float(mse.optimal_value(n, n.sum(), w, h)) == pytest.approx(float(mse.optimal_value(n, n.sum(), [lam, lam], lam)), rel=1e-12)
        np.testing.assert_allclose(mse.without_bias(n, w, h).logits, mse.without_bias(n, [lam, lam], lam).logits, rtol=1e-12)


def test_zero_penalties_are_refused() -> None:
    with pytest.raises(ValueError, match="the closed forms need positive penalties"):
        mse.level([1.0, 0.0], 1.0)
