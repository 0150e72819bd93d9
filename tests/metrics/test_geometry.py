"""Distances to Grams, duality, lengths, angles and margins: exact frames, theory's Grams, a solved problem, near and zero vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

import ufm
from metric_catalog import POINTS
from ufm import frames, metrics
from ufm.theory import imbalance

RNG = np.random.default_rng(0)
P = POINTS["imbalanced"]


def rotated(M: Any, d: int, seed: int = 0) -> Any:
    """Rows of M as columns in d dimensions, in a random orientation, (1, d, K)."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    return (Q[:, : M.shape[1]] @ M.T)[None]


@pytest.mark.parametrize("scale", [1.0, 1e-120, 1e120])
@pytest.mark.parametrize("K", [2, 3, 10])
def test_simplex_etf(K: int, scale: float) -> None:
    """At a simplex ETF of any size, orientation and centre every distance is 0, and the kernel is sqrt(2K/(K-1))."""
    means = rotated(frames.simplex_etf(K, K), K + 2) + 3.0 * (scale == 1.0)
    means, W = scale * means, (means - means.mean(axis=2, keepdims=True)).swapaxes(1, 2)
    zero = [metrics.nc2(means), metrics.nc3(W, means), metrics.nc3_normalised(W, means), metrics.equinorm(means)]
    zero += [metrics.equiangularity(means), metrics.maximal_angle(means), metrics.duality_distance(W, means)]
    zero += [metrics.distance_kernel(means).variance, metrics.log_distance_kernel(means).variance]
    zero += [metrics.nc2(W.swapaxes(1, 2), centre="origin")]
    assert np.array(zero) == pytest.approx(0, abs=1e-14)
    assert metrics.duality_cosine(W, means) == pytest.approx(1, rel=1e-14)
    assert metrics.distance_kernel(means).mean == pytest.approx(np.sqrt(2 * K / (K - 1)), rel=1e-14)


def test_raw_duality_and_bias() -> None:
    """W = C^T and b = -W mu_G make both zero; another centre or scale does not."""
    means, counts = P.means, P.counts
    share = counts[:, None, :] / counts.sum(axis=1)[:, None, None]
    mu = np.sum(means * share, axis=2, keepdims=True)
    W = (means - mu).swapaxes(1, 2)
    assert metrics.nc3_raw(W, means, centre="samples", counts=counts) == pytest.approx(0, abs=1e-14)
    assert metrics.bias_term(W, means, -W @ mu, counts=counts) == pytest.approx(0, abs=1e-14)
    assert metrics.nc3_raw(W, means).min() > 0.1
    assert metrics.bias_term(W, means, -W @ mu, centre="classes").min() > 0.01


def test_zero_grams() -> None:
    """<0> = 0: zero is at distance 1 from every target, and at 0 from a zero target."""
    zero, eye = np.zeros((1, 3, 3)), np.eye(3)
    assert metrics.gram_distance(zero, eye)[0] == pytest.approx(1, rel=1e-15)
    assert metrics.gram_distance(eye[None], zero)[0] == pytest.approx(1, rel=1e-15)
    assert metrics.gram_distance(zero, zero)[0] == 0
    assert metrics.nc2(np.ones((1, 4, 3)))[0] == pytest.approx(1, rel=1e-15)
    assert metrics.equinorm(np.zeros((1, 4, 3)))[0] == 0
    assert metrics.gram_distance(1e-200 * eye[None], 1e200 * eye)[0] == 0
    assert metrics.gram_distance(-eye[None], eye)[0] == pytest.approx(2, rel=1e-15)


def test_angles_of_zero_vectors_are_unknown() -> None:
    """A class at zero has no direction: NaN, in its run only."""
    means = np.stack([np.eye(3), np.eye(3) * np.array([1.0, 1.0, 0.0])])
    W = np.ones((2, 3, 3))
    for value in (
        metrics.equiangularity(means, centre="origin"),
        metrics.maximal_angle(means, centre="origin"),
        metrics.duality_cosine(W, means, centre="origin"),
        metrics.duality_distance(W, means, centre="origin"),
        *metrics.distance_kernel(means, centre="origin"),
        *metrics.log_distance_kernel(means, centre="origin"),
    ):
        assert np.isnan(value).tolist() == [False, True]


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-9])
def test_kernels_of_near_directions(apart: float) -> None:
    """Near unit vectors keep the digits of their angle: against 40 digits, to the rounding of the unit vectors themselves."""
    X = np.random.default_rng(1).standard_normal((4, 5))
    X[:, 4] = 2 * X[:, 0] + apart * X[:, 1]
    with mp.workdps(40):
        U = [[mpf(x) for x in column] for column in X.T]
        U = [[x / mp.sqrt(sum(y * y for y in u)) for x in u] for u in U]
        apart_ = [mp.sqrt(sum((a - b) ** 2 for a, b in zip(U[k], U[j], strict=True))) for k in range(5) for j in range(k)]
        mean, log = float(sum(apart_) / 10), float(-sum(mp.log(x) for x in apart_) / 10)
        variance = float(sum((x - sum(apart_) / 10) ** 2 for x in apart_) / 10)
    kernel, logs = metrics.distance_kernel(X[None], centre="origin"), metrics.log_distance_kernel(X[None], centre="origin")
    assert kernel.mean[0] == pytest.approx(mean, rel=1e-14)
    assert kernel.variance[0] == pytest.approx(variance, rel=1e-13)
    assert logs.mean[0] == pytest.approx(log, abs=1e-16 / apart)


def test_coinciding_directions() -> None:
    X = np.array([[[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]])
    assert metrics.distance_kernel(X, centre="origin").mean[0] == pytest.approx(2 * 2**0.5 / 3)
    assert metrics.log_distance_kernel(X, centre="origin").mean[0] == np.inf
    assert np.isnan(metrics.log_distance_kernel(X, centre="origin").variance[0])


COUNTS = np.array([[40, 20, 20, 10, 2], [8, 8, 8, 8, 8]])
LAM_W, LAM_H = np.array([0.02, 0.002]), np.array([0.011, 0.004])


def test_theory_is_at_its_targets() -> None:
    """The Grams and logits of the closed form, with a class at zero in the first cell, are the targets with the same margins."""
    M = imbalance.margins(COUNTS, LAM_W, LAM_H)
    assert (M == 0).tolist() == [[False] * 4 + [True], [False] * 5]
    target = frames.imbalanced_targets(COUNTS, M)
    for gram, name in (
        (imbalance.feature_gram(COUNTS, M, LAM_W, LAM_H), "features"),
        (imbalance.classifier_gram(COUNTS, M, LAM_W, LAM_H), "classifier"),
        (imbalance.logits(M), "logits"),
    ):
        assert metrics.gram_distance(gram, getattr(target, name)) == pytest.approx(0, abs=1e-14)
        other = frames.imbalanced_targets(COUNTS, M + np.arange(5.0))
        assert metrics.gram_distance(gram, getattr(other, name)).min() > 1e-2


def test_balanced_targets() -> None:
    """Equal counts and margins: orthogonal features, a simplex ETF as classifier and as logits."""
    target = frames.imbalanced_targets(np.full(4, 7), np.full(4, 2.0))
    for gram, other in zip(target, (np.eye(4), *frames.etf_targets(4)[1:]), strict=True):
        assert metrics.gram_distance(gram[None], other) == pytest.approx(0, abs=1e-15)


def test_limit_of_the_targets() -> None:
    """Equal margins are theory's limit of vanishing penalties."""
    limit = imbalance.limit_geometry(COUNTS)
    target = frames.imbalanced_targets(COUNTS, np.ones(5))
    for mine, theirs in ((target.features, limit.feature_gram), (target.classifier, limit.classifier_gram), (target.logits, limit.logits)):
        assert metrics.gram_distance(mine, theirs) == pytest.approx(0, abs=1e-14)


def test_a_solved_problem_is_at_its_targets() -> None:
    """The four distances of Dang et al. at a minimum found by descent are below 1e-6; those of a wrong model are not."""
    counts = [12, 8, 4, 3]
    problem = ufm.Problem(counts, width=6, features="relu", lam_w=4e-3, lam_h=1e-3)
    solution = ufm.solve(problem, runs=2, seed=0)
    H, W = solution.factors
    target = frames.imbalanced_targets(counts, imbalance.margins(counts, 4e-3, 1e-3))
    distances = metrics.target_distances(W, H, target)
    found = [*distances, metrics.nc2_h(H, target.features), metrics.nc2_w(W, H, counts)]
    assert np.max(np.array(found)) < 1e-6
    assert metrics.nc2_w(W, H, np.ones(4)).min() > 1e-2
    for name in ("features", "classifier"):
        assert getattr(metrics.target_distances(W, H, frames.seli_targets(counts)), name).min() > 1e-2


def test_relu_of_the_means() -> None:
    """nc2_h drops negative entries of the means; without any it is the features' distance."""
    target = frames.imbalanced_targets([3, 2], [1.0, 1.0])
    means = np.array([[[1.0, -5.0], [-7.0, 1.0]]])
    assert metrics.nc2_h(means, target.features) == metrics.nc2_h(np.maximum(means, 0), target.features)
    assert metrics.nc2_h(means, frames.orthogonal_targets(2).features) == pytest.approx(0, abs=1e-15)
    assert metrics.target_distances(np.eye(2)[None], means, target).features[0] > 0.1


def test_margins() -> None:
    Z = np.array([[[3.0, 0.0], [1.0, 2.0], [-1.0, 7.0]]])
    assert metrics.margins(Z, [0, 1]).tolist() == [[2.0, -5.0]]
    assert metrics.margins(Z, [0, 1], "mean").tolist() == [[3.0, -1.5]]
    assert metrics.sorted_margins(Z, [0, 1]).tolist() == [[-5.0, 2.0]]
    M = np.array([2.0, 1.0, 0.5])
    for against in ("max", "mean"):
        assert metrics.margins(imbalance.logits(M)[None], [0, 1, 2], against)[0] == pytest.approx(M, rel=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.nc2(P.means, centre="samples"), "nc2: centre is 'samples'.*give counts="),
        (lambda: metrics.nc2(P.means, centre="mean"), "nc2: centre is 'mean', but must be one of 'classes'"),
        (lambda: metrics.nc2(P.means, centre="samples", counts=[1, 2]), r"nc2: counts has shape \(2,\), but must be \(4,\) or \(3, 4\)"),
        (lambda: metrics.nc2(P.means, centre="samples", counts=[1, 2, 3, 0]), "nc2: counts holds .* not positive"),
        (lambda: metrics.nc2(P.means[:, :, :1]), "nc2: means has one column"),
        (lambda: metrics.nc3(P.W.swapaxes(1, 2), P.means), r"nc3: W has shape \(3, 6, 4\), but means asks for \(3, 4, 6\)"),
        (lambda: metrics.nc2(P.means[0]), r"nc2: means has shape \(6, 4\), but must be \(B, d, K\), runs first; use means\[None\]"),
        (lambda: metrics.bias_term(P.W, P.means, P.bias[:, :2], counts=P.counts), "bias_term: bias has shape"),
        (lambda: metrics.gram_distance(P.W, np.eye(2)), r"gram_distance: target has shape \(1, 2, 2\), but gram asks for \(3, 4, 6\)"),
        (lambda: metrics.margins(P.logits, P.labels, "min"), "margins: against is 'min'"),
        (lambda: metrics.margins(P.logits[:, :1], P.labels), "margins: logits has one row"),
        (lambda: metrics.margins(P.logits, P.labels[:, :2]), "margins: labels has shape"),
        (lambda: metrics.nc2_w(P.W, P.means, [1, 2]), "nc2_w: counts has shape"),
    ],
)
def test_door(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match="metrics." + words):
        call()
