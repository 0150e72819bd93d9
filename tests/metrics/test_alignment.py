"""Margins by angle, distances between nearest simplex ETFs, VCI and class ranks at points where they are known exactly."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from metric_catalog import POINTS
from ufm import etf, frames, metrics
from ufm.theory import limits

P = POINTS["imbalanced"]


def rotation(d: int, seed: int = 0) -> Any:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def simplex(K: int, d: int, seed: int = 0) -> Any:
    """A simplex ETF as columns, in a random orientation, (d, K)."""
    return rotation(d, seed) @ frames.simplex_etf(K, d).T


# --- angles --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 5, 40])
def test_margins_at_collapse(K: int) -> None:
    """Every sample has K/(K-1), wherever the features and the rows are centred and whatever their sizes; own cosines are 1 about 0."""
    y = np.repeat(np.arange(K), 3)[None]
    C = simplex(K, K + 2)
    rng = np.random.default_rng(0)
    H = 3.0 * C[:, y[0]][None] + rng.standard_normal((1, K + 2, 1))
    W = 7.0 * C.T[None] + rng.standard_normal((1, 1, K + 2))
    assert metrics.cosine_margins(H, W, y) == pytest.approx(np.full((1, 3 * K), K / (K - 1)), rel=1e-13)
    assert metrics.cosine_margin(H, W, y) == pytest.approx([float(limits.cosine_margin(K))], rel=1e-13)
    assert metrics.own_cosine(3.0 * C[:, y[0]][None], C.T[None], y) == pytest.approx(1.0, rel=1e-14)


def test_margins_of_samples_and_of_their_means() -> None:
    """Columns that stand for n_k equal samples have the margins, and the mean, of the samples."""
    rng, n = np.random.default_rng(1), np.array([5, 2, 1])
    M, W, y = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 3, 4)), np.repeat(np.arange(3), n)
    H = M[:, :, y]
    each, means = metrics.cosine_margins(H, W, y), metrics.cosine_margins(M, W, np.arange(3), n)
    assert each == pytest.approx(means[:, y], rel=1e-13)
    for metric in (metrics.cosine_margin, metrics.own_cosine):
        assert metric(H, W, y) == pytest.approx(metric(M, W, np.arange(3), n), rel=1e-13)
    assert np.any(np.abs(means - metrics.cosine_margins(M, W, np.arange(3))) > 1e-3)
    assert np.array_equal(metrics.sorted_cosine_margins(H, W, y), np.sort(each, axis=1))


def test_vectors_without_a_direction() -> None:
    """A row at the mean of the rows, or a sample at mu_G, has no angle: NaN in its run only."""
    W = np.stack([np.eye(3), np.array([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]])])
    H = np.random.default_rng(0).standard_normal((2, 3, 4))
    y = [0, 1, 2, 0]
    assert np.isnan(metrics.cosine_margins(H, W, y)).any(axis=1).tolist() == [False, True]
    assert np.isnan(metrics.cosine_margin(np.zeros((1, 3, 4)), np.eye(3)[None], y)).all()
    assert np.isnan(metrics.own_cosine(np.zeros((1, 3, 4)), np.eye(3)[None], y)).all()


def test_equinorm_difference() -> None:
    """Norms 1, 2, 3 against equal ones: 1/2, whichever varies."""
    even, uneven = np.eye(3)[None], np.diag([1.0, 2.0, 3.0])[None]
    for W, means in ((even, uneven), (uneven, even)):
        assert metrics.equinorm_difference(W, means, centre="origin") == pytest.approx([0.5], rel=1e-14)
    assert metrics.equinorm_difference(uneven, 5 * uneven, centre="origin") == pytest.approx([0.0], abs=1e-15)


# --- nearest simplex ETFs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 10, 60])
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_distance_at_an_etf(K: int, scale: float) -> None:
    """Zero to the square of rounding, at d = K - 1 too; a perturbation of 1e-9 normal to the ETFs is resolved as its square."""
    for d in (K - 1, K + 3):
        C = scale * simplex(K, d)[None]
        assert np.max(metrics.etf_distance(C)) < 1e-27
        assert np.max(metrics.etf_distance(C.mT.mT, centre="origin")) < 1e-27
    lean = np.zeros((1, K + 3, K))
    lean[0] = simplex(K, K + 3)
    lean = lean / np.linalg.norm(lean)
    moved = lean + 1e-9 / np.sqrt(K) * rotation(K + 3, 1)[:, :1]  # all columns alike: off the centre
    assert metrics.etf_distance(scale * moved, centre="origin") == pytest.approx([1e-18], rel=1e-5, abs=0)
    assert metrics.etf_distance(scale * moved)[0] < 1e-27


def test_distances_are_those_of_the_closed_form() -> None:
    """`etf.distance` and `etf.nearest` find the same distance and the same frames, on means and on rows."""
    for name in ("imbalanced", "wide", "balanced", "two classes"):
        p = POINTS[name]
        K = p.classes
        for Y in (p.means, p.W.mT):
            Y = Y - Y.mean(axis=2, keepdims=True)
            unit = Y / np.linalg.norm(Y, axis=(1, 2), keepdims=True)
            assert metrics.etf_distance(Y) == pytest.approx(etf.distance(unit), rel=1e-11)
        frame_h, frame_w = (etf.nearest(Y).W.mT / np.sqrt(K) for Y in (p.means, p.W.mT))
        assert metrics.etf_separation(p.means, p.W.mT) == pytest.approx(np.sum((frame_h - frame_w) ** 2, axis=(1, 2)), rel=1e-11)


def test_no_simplex_etf_is_nearer() -> None:
    """Random rotations, from far to near, of the nearest ETF are all farther."""
    Y = P.means - P.means.mean(axis=2, keepdims=True)
    Y /= np.linalg.norm(Y, axis=(1, 2), keepdims=True)
    best, nearest, rng = metrics.etf_distance(Y), etf.nearest(Y).W.mT / 2.0, np.random.default_rng(0)
    for angle in (1e-3, 0.1, 1.0):
        for _ in range(50):
            Q = np.linalg.qr(np.eye(6) + angle * rng.standard_normal((6, 6)))[0]
            assert np.all(np.sum((Y - Q @ nearest) ** 2, axis=(1, 2)) > best)


def test_separation() -> None:
    """0 for equal frames whatever their scale and centre, 4 for opposite ones, quadratic in a small turn, symmetric."""
    A = P.means
    assert metrics.etf_separation(A, 7.0 * A + np.ones((1, 6, 1))) == pytest.approx(0.0, abs=1e-27)
    assert metrics.etf_separation(A, -A) == pytest.approx(4.0, rel=1e-13)
    turn, other = np.linalg.qr(np.eye(6) + 1e-6 * np.random.default_rng(0).standard_normal((6, 6)))[0], P.W.mT
    turn = turn * np.sign(np.diagonal(turn))
    frame = etf.nearest(A).W.mT / 2.0
    assert metrics.etf_separation(A, turn @ A) == pytest.approx(np.sum((frame - turn @ frame) ** 2, axis=(1, 2)), rel=1e-7)
    assert metrics.etf_separation(A, other) == pytest.approx(metrics.etf_separation(other, A), rel=1e-14)


def test_zero_and_coinciding_means() -> None:
    """<0> = 0 is at distance 1; without rank K - 1 the nearest ETF is not unique and a separation NaN, in its run only."""
    assert metrics.etf_distance(np.ones((1, 4, 3))) == pytest.approx([1.0], rel=1e-14)
    A = np.array(P.means)
    A[1, :, 2] = A[1, :, 3]
    got = metrics.etf_separation(A, P.W.mT)
    assert np.isnan(got).tolist() == [False, True, False]
    assert np.all(np.isfinite(metrics.etf_distance(A)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.etf_distance(np.ones((1, 2, 4))), "metrics.etf_distance: 4 classes have width 2, but a simplex ETF needs"),
        (lambda: metrics.etf_separation(np.ones((1, 2, 4)), np.ones((1, 2, 4))), "metrics.etf_separation: 4 classes have width 2, but"),
        (lambda: metrics.etf_separation(np.ones((1, 4, 1)), np.ones((1, 4, 1))), "1 classes have width 4, but a simplex ETF needs"),
        (lambda: metrics.etf_separation(P.means, P.W), "metrics.etf_separation: second has shape (3, 4, 6), but first asks for (3, 6, 4)"),
        (lambda: metrics.cosine_margin(P.H, P.W[:, :1], 0 * P.labels), "metrics.cosine_margin: W has one row, but a margin needs at least"),
        (lambda: metrics.cosine_margins(P.H, P.means, P.labels), "metrics.cosine_margins: W has shape (3, 6, 4), but H asks for"),
        (lambda: metrics.own_cosine(P.H, P.W, P.labels + 1), "metrics.own_cosine: labels runs from 1 to 4, but must lie between 0 and 3"),
        (lambda: metrics.vci(P.H, P.labels, 5), "metrics.vci: class 4 of 5 has no samples in some run"),
        (lambda: metrics.vci(P.H, P.labels, 4, weights="all"), "metrics.vci: weights is 'all', but must be one of"),
        (lambda: metrics.class_rank(P.H, P.labels, 5), "metrics.class_rank: class 4 of 5 has no samples in some run"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


# --- variability and rank ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-7, 1e-3, 1.0, 1e4])
def test_vci_of_equal_spectra(noise: float) -> None:
    """Within- and between-class variance w and b in every direction of the means' span: w/(b + w) by the default tolerance.

    Variance outside the span changes nothing but the digits: without it the index is small to its own, with it to those of 1.
    """
    K, d = 3, 5
    C, moves = simplex(K, d), noise * np.sqrt(K - 1) * np.eye(2)  # two opposite moves along each of two orthogonal directions
    plane = np.linalg.svd(C)[0][:, :2]
    steps = plane @ np.concatenate([moves, -moves], axis=1)
    H = (C[:, :, None] + steps[:, None, :]).reshape(1, d, -1)
    y = np.repeat(np.arange(K), 4)
    b, w = 1 / (K - 1), noise**2 * (K - 1) * 2 / 4
    assert metrics.vci(H, y, K) == pytest.approx([w / (b + w)], rel=1e-5, abs=0)
    outside = 2.0 * np.linalg.svd(C)[0][:, 2:3] * np.tile([1.0, -1.0, 1.0, -1.0], K)  # uncorrelated with the steps
    assert metrics.vci(H + outside, y, K) == pytest.approx([w / (b + w)], rel=1e-5, abs=2e-16)


def test_vci_at_its_ends() -> None:
    """0 at collapse, 1 where the means coincide, (m - rank)/m where some do, for means as columns too."""
    y = np.repeat(np.arange(4), 3)
    C = np.random.default_rng(0).standard_normal((1, 6, 4))
    assert metrics.vci(C[:, :, y], y, 4) == pytest.approx([0.0], abs=1e-15)
    assert metrics.vci(C, np.arange(4), 4, [3, 2, 1, 1]) == pytest.approx([0.0], abs=1e-15)
    C[:, :, 3] = C[:, :, 2]
    assert metrics.vci(C[:, :, y], y, 4) == pytest.approx([1 / 3], rel=1e-14)
    spread = np.random.default_rng(1).standard_normal((1, 6, 12))
    spread -= np.repeat(spread.reshape(1, 6, 4, 3).mean(axis=3), 3, axis=2)
    assert metrics.vci(spread, y, 4) == pytest.approx([1.0], rel=1e-13)


def test_class_rank_of_known_classes() -> None:
    """1 where the samples of a class are multiples of one, n where they are orthonormal; the mean over classes weighs them equally."""
    H = np.zeros((2, 6, 7))
    H[:, 0, :2] = [1.0, -3.0]
    H[0, :, 2:] = np.eye(6)[:, :5]
    H[1, :, 2:] = 1.0
    y = np.array([0, 0, 1, 1, 1, 1, 1])
    assert metrics.class_rank(H, y, 2) == pytest.approx([3.0, 1.0], rel=1e-14)
    order = np.random.default_rng(0).permutation(7)
    assert metrics.class_rank(H[:, :, order], y[order], 2) == pytest.approx([3.0, 1.0], rel=1e-14)
    assert metrics.nuclear_rank(np.zeros((1, 3, 4))).tolist() == [0.0]
    assert metrics.nuclear_rank(1e-200 * np.eye(3)[None]) == pytest.approx([3.0], rel=1e-14)
    assert metrics.class_rank(H[:, :, :2] * 0, y[:2], 1).tolist() == [0.0, 0.0]
