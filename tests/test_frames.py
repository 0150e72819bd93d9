"""Frames and Gram targets: what defines them, against loops, published ratios and the released script's formula."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import numpy as np
import pytest

from ufm import frames, metrics
from ufm.counts import step
from ufm.problem import PAPERS
from ufm.theory import imbalance


@pytest.mark.parametrize("K", [2, 3, 4, 17])
def test_helmert(K: int) -> None:
    """Orthonormal rows that sum to zero, the first (1, -1, 0, ...)/sqrt(2)."""
    basis = frames.helmert(K)
    assert basis.shape == (K - 1, K)
    assert basis @ basis.T == pytest.approx(np.eye(K - 1), abs=1e-15)
    assert basis.sum(axis=1) == pytest.approx(0, abs=1e-15)
    assert basis[0, :2] == pytest.approx([sqrt(0.5), -sqrt(0.5)])
    assert np.array_equal(np.triu(basis, 2), np.zeros_like(basis))


@pytest.mark.parametrize("K", [2, 3, 10])
@pytest.mark.parametrize("extra", [None, -1, 0, 5])
def test_simplex_etf(K: int, extra: int | None) -> None:
    """Unit rows with cosines -1/(K-1), in the width asked for."""
    M = frames.simplex_etf(K, None if extra is None else K + extra)
    assert M.shape == (K, K + (extra or 0))
    expected = [[1.0 if k == j else -1 / (K - 1) for j in range(K)] for k in range(K)]
    assert M @ M.T == pytest.approx(np.array(expected), abs=1e-15)
    assert M.sum(axis=0) == pytest.approx(0, abs=2e-15)


def test_symmetric_etf() -> None:
    M = frames.simplex_etf(4)
    assert np.array_equal(M, M.T)


@pytest.mark.parametrize(("K", "d"), [(1, None), (3, None), (3, 5)])
def test_orthogonal_frame(K: int, d: int | None) -> None:
    M = frames.orthogonal_frame(K, d)
    assert M.shape == (K, d or K)
    assert np.array_equal(M @ M.T, np.eye(K))


def test_plain_targets() -> None:
    for target in frames.etf_targets(3):
        assert target == pytest.approx(np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2]]) / 3)
    assert all(np.array_equal(target, np.eye(3)) for target in frames.orthogonal_targets(3))


def test_imbalanced_targets() -> None:
    """T by the two cases of its definition, the others entry by entry, in a batch."""
    rng = np.random.default_rng(0)
    n, M = rng.integers(1, 9, (2, 5)), rng.random((2, 5))
    got = frames.imbalanced_targets(n, M)
    for b in range(2):
        m = [sqrt(n[b, k]) * M[b, k] for k in range(5)]
        for k in range(5):
            for j in range(5):
                others = sum(m[i] for i in range(5) if i not in (k, j))
                T = 16 * m[k] + others if k == j else -4 * (m[k] + m[j]) + others
                assert got.classifier[b, k, j] == pytest.approx(T, rel=1e-13)
                assert got.features[b, k, j] == pytest.approx(M[b, k] / sqrt(n[b, k]) if k == j else 0)
                assert got.logits[b, j, k] == pytest.approx(M[b, k] * (float(k == j) - 1 / 5))


def test_the_classifier_of_the_features() -> None:
    """Orthogonal means of the predicted lengths give a classifier with the predicted Gram, and rows that sum to zero."""
    n, M = np.array([9, 4, 2, 1]), np.array([3.0, 2.0, 1.0, 0.0])
    target = frames.imbalanced_targets(n, M)
    means = np.sqrt(target.features)[None]
    W = frames.imbalanced_classifier(means, n)
    assert metrics.gram_distance(W @ W.mT, target.classifier)[0] == pytest.approx(0, abs=1e-15)
    assert metrics.gram_distance(W @ means, target.logits)[0] == pytest.approx(0, abs=1e-15)
    assert W.sum(axis=1) == pytest.approx(0, abs=1e-14)
    assert np.array_equal(W, frames.imbalanced_classifier(means, n[None]))


@pytest.mark.parametrize("K", [4, 10])
@pytest.mark.parametrize("R", [1, 10, 100])
def test_seli_ratios_under_step_imbalance(K: int, R: int) -> None:
    """Norm ratios and the minority's cosine of Thrampoulidis et al. 2022, s = sqrt((R+1)/2)."""
    target = frames.seli_targets(step(K, 3, R))
    s, q = sqrt((R + 1) / 2), 1 - 2 / K
    W, H = target.classifier, target.features
    assert W[0, 0] / W[-1, -1] == pytest.approx((q * sqrt(R) + s / K) / (q + s / K), rel=1e-12)
    assert H[0, 0] / H[-1, -1] == pytest.approx((q / sqrt(R) + 1 / (K * s)) / (q + 1 / (K * s)), rel=1e-12)
    assert W[-1, -2] / W[-1, -1] == pytest.approx((s - 2) / (K - 2 + s), rel=1e-11, abs=1e-12)
    assert target.logits == pytest.approx(np.eye(K) - 1 / K)


def test_seli_factors_give_the_logits() -> None:
    """V L^{1/2} and L^{1/2} U^T D^{-1/2} multiply to I - 11^T/K; a batch is its cells; equal counts are the ETF."""
    n = np.array([[7, 4, 2], [5, 5, 5]])
    both = frames.seli_targets(n)
    for b in range(2):
        one = frames.seli_targets(n[b])
        assert all(np.allclose(x[b], y, rtol=1e-13, atol=1e-14) for x, y in zip(both, one, strict=True))
        root_d = np.diag(np.sqrt(n[b]))
        Z = one.logits @ root_d  # Z Z^T = (V L V^T)^2, and Z^T Z = (D^{1/2} features D^{1/2})^2
        assert Z @ Z.T == pytest.approx(one.classifier @ one.classifier, abs=1e-12)
        G = root_d @ one.features @ root_d
        assert Z.T @ Z == pytest.approx(G @ G, abs=1e-12)
    for target in (both.features, both.classifier):
        assert metrics.gram_distance(target[1:], frames.etf_targets(3).features) == pytest.approx(0, abs=1e-14)


CIFAR10 = np.repeat([1000, 2000, 3000, 4000, 5000], 2)
MNIST = CIFAR10 // 10
CIFAR100 = np.repeat([100, 200, 300, 400, 500], 20)
WD, FD = 1e-4, 1e-5  # the published weight_decay and feature_decay_rate


def test_released_margins() -> None:
    """The script's expression, term by term; feature decay cancels; too strong a decay gives 0."""
    got = frames.released_margins(CIFAR10, WD, FD)
    for n, M in zip(CIFAR10, got, strict=True):
        inside = 9 * (n**0.5 / (30000 * (FD / 2 * WD / 2) ** 0.5 * (9 / 10 * WD / FD) ** 0.5) - 1)
        assert M == pytest.approx(log(inside), rel=1e-14)
    assert got == pytest.approx(frames.released_margins(CIFAR10, WD, 7 * FD), rel=1e-14)
    assert frames.released_margins([4, 1], [1e-4, 0.3, 9.0], 1.0).shape == (3, 2)
    assert frames.released_margins([4, 1], 9.0, 1.0).tolist() == [0.0, 0.0]
    assert (frames.released_margins([40, 1], 0.1, 1.0) > 0).tolist() == [True, False]
    equal = imbalance.margins(CIFAR10, WD / 2, WD / 2)
    assert frames.released_margins(CIFAR10, WD, WD) == pytest.approx(equal, rel=1e-13)  # lambda/2 in place of lambda


@pytest.mark.parametrize(("counts", "low", "high"), [(CIFAR10, 0.010, 0.017), (CIFAR100, 0.010, 0.017), (MNIST, 0.0035, 0.0065)])
def test_floor_of_the_released_metric(counts: Any, low: float, high: float) -> None:
    """A network exactly at its own optimum, of CE/2 with a minibatch-sum feature decay, scores this in the released NC2_H, NC2_WWT, NC3_WH.

    The margins of the naive reading lam_w = wd, lam_h = fd are a third set, different from both.
    """
    to = PAPERS["half_loss_minibatch"].to_ufm(WD, FD, N=int(counts.sum()), batch=256)
    margins = [
        imbalance.margins(counts, to.lam_w, to.lam_h),
        frames.released_margins(counts, WD, FD),
        imbalance.margins(counts, WD, FD),
    ]
    own, released, naive = (frames.imbalanced_targets(counts, M) for M in margins)
    for a, b, c in zip(own, released, naive, strict=True):
        assert low < metrics.gram_distance(a[None], b)[0] < high
        assert metrics.gram_distance(a[None], c)[0] > 1.5e-3
        assert metrics.gram_distance(b[None], c)[0] > 1.5e-3
        assert metrics.gram_distance(a[None], a)[0] < 1e-15


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frames.helmert(1), "helmert: K is 1.*at least 2"),
        (lambda: frames.simplex_etf(1), "simplex_etf: K is 1"),
        (lambda: frames.simplex_etf(10, 3), "simplex_etf: d is 3.*at least 9.*10 classes spans 9"),
        (lambda: frames.simplex_etf(2.0), "simplex_etf: K is 2.0"),  # type: ignore[arg-type]
        (lambda: frames.simplex_etf(True), "simplex_etf: K is True"),
        (lambda: frames.orthogonal_frame(3, 2), "orthogonal_frame: d is 2"),
        (lambda: frames.etf_targets(1), "etf_targets: K is 1"),
        (lambda: frames.orthogonal_targets(0), "orthogonal_targets: K is 0"),
        (lambda: frames.imbalanced_targets([3, 0], [1.0, 1.0]), "imbalanced_targets: counts holds 0.0"),
        (lambda: frames.imbalanced_targets([3, 1], [1.0, -1.0]), "imbalanced_targets: margins holds -1.0"),
        (lambda: frames.imbalanced_targets([3, 1], [1.0, np.nan]), "imbalanced_targets: margins holds nan"),
        (lambda: frames.seli_targets([3]), r"seli_targets: counts has shape \(1,\)"),
        (lambda: frames.released_margins([3, 1], 0.0, 1.0), "released_margins: lam_w is 0.0"),
        (lambda: frames.imbalanced_classifier(np.ones((1, 2, 3)), [3, 1]), "imbalanced_classifier: counts has 2 classes, but means has 3"),
    ],
)
def test_door(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match="frames." + words):
        call()
