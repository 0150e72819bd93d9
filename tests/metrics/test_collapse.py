"""CDNV, NC4, NC5 and the signs of collapse where they are hard: near and equal classes, biases, ties, zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from metric_catalog import POINTS, stats
from ufm import frames, metrics


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6, 1e-9])
def test_cdnv_of_near_classes(apart: float) -> None:
    """Distances of near means are not lost in the Gram matrix: 60 digits against float64, to 1e-11."""
    rng = np.random.default_rng(0)
    means = 3.0 + rng.standard_normal((5, 6))
    means[:, 4:] = means[:, :1] + apart * rng.standard_normal((5, 2))
    v = rng.random(6)
    with mp.workdps(60):
        total = mpf(0)
        for k in range(6):
            for j in range(k):
                total += (mpf(v[k]) + mpf(v[j])) / 2 / sum((mpf(a) - mpf(b)) ** 2 for a, b in zip(means[:, k], means[:, j], strict=True))
        exact = float(total / 15)
    assert metrics.cdnv(means[None], v[None])[0] == pytest.approx(exact, rel=1e-11)


def test_cdnv_of_equal_means() -> None:
    """Infinite where classes with variance share a mean; no variance counts as none, also there."""
    means = np.array([[[1.0, 1.0, 0.0]]])
    assert metrics.cdnv(means, np.array([[1.0, 0.0, 0.0]]))[0] == np.inf
    assert metrics.cdnv(means, np.array([[0.0, 0.0, 6.0]]))[0] == pytest.approx(2.0)  # (3 + 3)/3
    assert metrics.cdnv(np.zeros((1, 1, 3)), np.zeros((1, 3)))[0] == 0


def test_quotient_of_equal_means() -> None:
    """All means at one point: infinite with variability, 0 without; the pseudo-inverse of zero is zero."""
    y = np.array([0, 0, 1, 1])
    s = metrics.class_statistics(np.array([[[1.0, -1.0, 1.0, -1.0]], [[0.0] * 4]]), y, 2)
    assert metrics.nc1_quotient(s).tolist() == [np.inf, 0.0]
    assert metrics.nc1(s).tolist() == [0.0, 0.0]


def test_nc4_sees_the_bias() -> None:
    """Points on a line: class 1's region is moved by the bias alone; without it half of the samples disagree."""
    means = np.array([[[0.0, 2.0]]])
    W = np.array([[[0.0], [1.0]]])
    H = np.array([[[-1.0, 0.5, 1.5, 3.0]]])
    assert metrics.nc4(H, W, means)[0] == 0.75
    assert metrics.nc4(H, W, means, np.array([[[1.0], [0.0]]]))[0] == 1.0
    assert metrics.nc4(H, W, means, np.array([[[9.0], [0.0]]]))[0] == 0.5
    assert metrics.nc4(H, W, means, np.array([[[9.0], [0.0]]]), multiplicity=[1, 1, 1, 5])[0] == 0.25


def test_one_run_goes_with_many() -> None:
    """One set of samples, or of means, against a batch of classifiers."""
    p = POINTS["balanced"]
    one = p.run(0)
    for H, means in ((one.H, one.means), (one.H, p.means), (p.H, one.means)):
        together = metrics.nc4(H, p.W, means, p.bias)
        parts = [metrics.nc4(H[b % len(H)][None], p.W[b : b + 1], means[b % len(means)][None], p.bias[b : b + 1])[0] for b in range(3)]
        assert together.tolist() == parts
    assert metrics.nc3(p.W, one.means).shape == metrics.target_distances(p.W, one.means, frames.etf_targets(4)).logits.shape == (3,)


def test_nc4_far_from_the_origin() -> None:
    """The nearest mean is found at an offset of 1e8, where squared norms differ in their last digits only."""
    means = 1e8 + np.array([[[0.0, 0.5], [0.0, 0.0]]])
    H = 1e8 + np.array([[[0.1, 0.2, 0.3, 0.4], [1.0, -2.0, 3.0, 0.0]]])
    W = np.array([[[-1.0, 0.0], [1.0, 0.0]]])
    bias = np.array([[[1e8 + 0.25], [-1e8 - 0.25]]])
    assert metrics.nc4(H, W, means, bias)[0] == 1.0


def test_nc4_ties_are_the_first_class() -> None:
    """Complete collapse: all logits and all distances are equal, and both name class 0."""
    assert metrics.nc4(np.zeros((1, 2, 5)), np.zeros((1, 3, 2)), np.zeros((1, 2, 3)))[0] == 1.0


def test_nc5_of_a_shared_direction() -> None:
    means = np.array([[[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]])
    expected = (1 + 0 + 0.5**0.5) / 3
    assert metrics.nc5(means, [3.0, 0.0])[0] == pytest.approx(expected, rel=1e-15)
    assert metrics.nc5(means, np.array([[-1e-200, 0.0]]))[0] == pytest.approx(expected, rel=1e-15)
    assert np.isnan(metrics.nc5(means, [0.0, 0.0])[0])


def test_minority_at_zero() -> None:
    """Two classes at zero: their rows coincide, their cosine is 1, two columns of W H are one, their samples are dead."""
    rng = np.random.default_rng(0)
    means = np.abs(rng.standard_normal((1, 6, 5)))
    means[:, :, 3:] = 0.0
    W = rng.standard_normal((1, 5, 6))
    W[:, 4] = W[:, 3]
    assert (metrics.class_norms(means)[0] == 0).tolist() == [False, False, False, True, True]
    assert metrics.smallest_row_distance(W)[0] == 0
    assert metrics.row_cosines(W, [3, 4])[0] == pytest.approx([1.0], abs=1e-15)
    assert metrics.distinct_columns(W @ means)[0] == 4
    assert metrics.group_spread(W @ means, [0, 0, 0, 1, 1])[0, 1] == 0
    assert metrics.group_spread(W @ means, [0, 0, 0, 1, 1])[0, 0] > 0.1
    assert metrics.dead_samples(means)[0] == 2
    assert metrics.dead_coordinates(means)[0] == 0
    assert metrics.dead_coordinates(means * np.array([[[1], [0], [1], [0], [0], [1]]]))[0] == 3


def test_distinct_columns_with_a_tolerance() -> None:
    """Distances relative to the longest column, also where the Gram matrix would see nothing of them."""
    Z = np.array([[[1.0, 1.0 + 1e-9, 1.0 + 1e-5, 0.0], [2.0, 2.0, 2.0, 0.0]]])
    assert [metrics.distinct_columns(s * Z, rtol)[0] for s in (1.0, 1e-90) for rtol in (0.0, 1e-12, 1e-8, 1e-3)] == [4, 4, 3, 2] * 2
    assert metrics.distinct_columns(np.zeros((1, 3, 4)))[0] == 1


def test_smallest_row_distance_of_near_rows() -> None:
    W = np.array([[[3.0, 4.0], [3.0, 4.0 + 2.0**-40], [-5.0, 0.0]]])
    assert metrics.smallest_row_distance(W)[0] == 2.0**-40


def test_a_thousand_classes() -> None:
    """CDNV at K = 1000 by row sums: v_k counts half of sum_l 1/||mu_k - mu_l||^2."""
    rng = np.random.default_rng(0)
    means, v = rng.standard_normal((1, 40, 1000)), rng.random((1, 1000))
    means[:, :, 7] = means[:, :, 3] + 1e-8
    total = 0.0
    for k in range(1000):
        apart = np.sum((means[0] - means[0][:, k : k + 1]) ** 2, axis=0)
        total += v[0, k] * np.sum(1 / np.delete(apart, k))
    assert metrics.cdnv(means, v)[0] == pytest.approx(total / 999000, rel=1e-12)


P = POINTS["balanced"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.cdnv(P.means, P.variances[:, :2]), r"cdnv: variances has shape \(3, 2\), but means asks for \(3, 4\)"),
        (lambda: metrics.cdnv(P.means[:, :, :1], P.variances[:, :1]), "cdnv: there is one class"),
        (lambda: metrics.nc4(P.H, P.W[:, :2], P.means), r"nc4: W has shape \(3, 2, 7\), but means asks for \(3, 4, 7\)"),
        (lambda: metrics.nc4(P.H[:, :2], P.W, P.means), r"nc4: H has shape \(3, 2, 24\)"),
        (lambda: metrics.nc4(P.H, P.W, P.means, P.bias[:, :, 0]), r"nc4: bias has shape \(3, 4\), but must be \(B, K, 1\)"),
        (lambda: metrics.nc4(P.H, P.W, P.means, P.bias[:, :2]), r"nc4: bias has shape \(3, 2, 1\), but W"),
        (lambda: metrics.nc5(P.means, [1.0]), r"nc5: direction has shape \(1,\), but must be \(7,\)"),
        (lambda: metrics.nc5(P.means, np.ones((2, 7))), r"nc5: direction has shape \(2, 7\), but must be \(7,\) or \(3, 7\)"),
        (lambda: metrics.nc4(P.H, P.W[:2], P.means), r"nc4: W has shape \(2, 4, 7\)"),
        (lambda: metrics.smallest_row_distance(P.W[:, :1]), "smallest_row_distance: there is one class"),
        (lambda: metrics.row_cosines(P.W, [0, 4]), r"row_cosines: rows is \[0, 4\].*between 0 and 3"),
        (lambda: metrics.row_cosines(P.W, [0]), "row_cosines: there is one class"),
        (lambda: metrics.row_cosines(P.W, [0.0, 1.0]), "row_cosines: rows is"),
        (lambda: metrics.group_spread(P.means, [0, 0, 2, 2]), "group_spread: groups is .* without a gap"),
        (lambda: metrics.group_spread(P.means, [0, 0]), "group_spread: groups is"),
    ],
)
def test_door(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match="metrics." + words):
        call()


def test_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        stats(P).means = None
