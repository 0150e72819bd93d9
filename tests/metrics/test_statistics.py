"""Class statistics and the NC1 made of them: residuals, multiplicities, d x d brute force, precision, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import loops
from metric_catalog import POINTS, stats
from ufm import metrics

CHOICES = [(c, w) for c in ("classes", "samples") for w in ("classes", "samples")]


@pytest.mark.parametrize("where", POINTS)
def test_from_scatter(where: str) -> None:
    """Sigma_W as a d x d matrix gives the same record, hence the same metrics."""
    p = POINTS[where]
    s = stats(p)
    scatter = np.stack([loops.sigma_w(p.H[b], p.labels[b], p.classes, p.multiplicity[b]) for b in range(len(p.H))])
    other = metrics.from_scatter(p.counts, s.means, s.variances, scatter)
    for a, b in zip((s.counts, s.coordinates, s.within), (other.counts, other.coordinates, other.within), strict=True):
        assert a.shape == b.shape
        assert a == pytest.approx(b, rel=1e-9, abs=1e-13 * np.abs(b).max())
    for c, w in CHOICES:
        assert metrics.nc1(other, centre=c, weights=w) == pytest.approx(metrics.nc1(s, centre=c, weights=w), rel=1e-7)


def test_multiplicity_is_repetition() -> None:
    """A column that stands for m samples counts as m equal columns."""
    p = POINTS["imbalanced"].run(0)
    m = p.multiplicity[0]
    repeated = metrics.class_statistics(np.repeat(p.H, m, axis=2), np.repeat(p.labels[0], m), p.classes)
    for c, w in CHOICES:
        assert metrics.nc1(stats(p), centre=c, weights=w) == pytest.approx(metrics.nc1(repeated, centre=c, weights=w), rel=1e-12)
    assert stats(p).variances == pytest.approx(repeated.variances, rel=1e-12)
    assert stats(p).counts.tolist() == repeated.counts.tolist()


def test_class_mean_columns_have_no_variance() -> None:
    """One column per class, with multiplicity n_k: exactly zero variability, the means themselves, and the counts."""
    means = np.random.default_rng(0).standard_normal((2, 6, 4)) + 1e6
    s = metrics.class_statistics(means, np.arange(4), 4, np.array([5, 3, 2, 1]))
    assert np.array_equal(s.means, means)
    assert not s.variances.any()
    assert not s.within.any()
    assert s.counts.tolist() == [[5, 3, 2, 1]] * 2
    assert metrics.nc1(s).tolist() == metrics.nc1_quotient(s).tolist() == metrics.cdnv(s.means, s.variances).tolist() == [0.0, 0.0]


def test_labels_shared_or_per_run() -> None:
    p = POINTS["balanced"]
    shared = metrics.class_statistics(p.H, p.labels[0], 4)
    each = metrics.class_statistics(p.H, np.repeat(p.labels[:1], 3, axis=0), 4, np.ones(24))
    for name in ("counts", "means", "variances", "coordinates", "within"):
        assert getattr(shared, name) == pytest.approx(getattr(each, name), rel=1e-13, abs=1e-14)
        assert getattr(shared, name).shape == getattr(each, name).shape


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 1e-300, 1e-17, 1e-9, 1.0, 1e9]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    scale=st.sampled_from([0.0, 1e-12, 1.0]),
    single=st.booleans(),
    d=st.integers(1, 6),
)
def test_never_negative(seed: int, noise: float, offset: float, scale: float, single: bool, d: int) -> None:
    """NC1 in all its forms, CDNV and variances are at least 0 and a number: collapsed data, far means, equal means, single precision."""
    rng = np.random.default_rng(seed)
    y = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    H = offset + scale * rng.standard_normal((1, d, 4))[:, :, y] + noise * rng.standard_normal((1, d, 8))
    s = metrics.class_statistics(H.astype(np.float32) if single else H, y, 4)
    values = [metrics.nc1(s, centre=c, weights=w) for c, w in CHOICES] + [metrics.nc1_quotient(s, centre=c, weights=w) for c, w in CHOICES]
    values += [metrics.cdnv(s.means, s.variances), np.min(s.variances, axis=1)]
    assert np.all(np.array(values) >= 0)  # false for NaN


def test_never_negative_by_rounding() -> None:
    """Variability at right angles to the means leaves rounding of either sign in their direction, and NC1 at least 0."""
    angle = np.linspace(0, np.pi, 200)
    means = np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, :, None] * np.array([1.0, -1.0])
    across = 1e3 * np.stack([-np.sin(angle), np.cos(angle)], axis=1)[:, :, None]
    s = metrics.from_scatter([1, 1], means, np.full((200, 2), 1e6), across @ across.mT)
    assert np.all(metrics.nc1(s) >= 0)
    assert np.max(metrics.nc1(s)) < 1e-9


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
def test_exactly_collapsed_samples_far_from_the_origin(offset: float) -> None:
    """Equal samples have no variance beyond the square of rounding: the mean of 7 equal numbers need not be that number."""
    y = np.repeat(np.arange(3), 7)
    H = (offset + np.random.default_rng(0).standard_normal((1, 5, 3)))[:, :, y]
    s = metrics.class_statistics(H, y, 3)
    assert np.max(s.variances) <= (1e-31 * max(offset, 1.0)) ** 2 * 1e10
    assert metrics.nc1(s)[0] < 1e-30


def test_mean_far_from_the_origin() -> None:
    """An offset of 1e6 leaves NC1 the ten digits that the entries keep; E[xx^T] - mu mu^T would leave none."""
    p = POINTS["imbalanced"]
    far = p.H + 1e6
    near = far - 1e6  # what the entries of `far` hold
    for c, w in CHOICES:
        a, b = (metrics.nc1(metrics.class_statistics(X, p.labels, 4, p.multiplicity), centre=c, weights=w) for X in (far, near))
        assert a == pytest.approx(b, rel=1e-8)


def exact_nc1(H: Any, y: Any, K: int) -> Any:
    """tr(Sigma_B^+ Sigma_W)/K with 60 digits for d = K - 1, where Sigma_B is invertible."""
    with mp.workdps(60):
        d, N = H.shape
        X = mp.matrix([[mpf(float(x)) for x in row] for row in H])
        mu = [[sum(X[i, j] for j in range(N) if y[j] == k) / sum(y == k) for i in range(d)] for k in range(K)]
        g = [sum(mu[k][i] for k in range(K)) / K for i in range(d)]
        B, W = mp.zeros(d), mp.zeros(d)
        for i in range(d):
            for j in range(d):
                B[i, j] = sum((mu[k][i] - g[i]) * (mu[k][j] - g[j]) for k in range(K)) / K
                W[i, j] = sum((X[i, c] - mu[y[c]][i]) * (X[j, c] - mu[y[c]][j]) for c in range(N)) / N
        product = mp.inverse(B) * W
        return float(sum(product[i, i] for i in range(d)) / K)


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6])
def test_nearly_merged_means(apart: float) -> None:
    """Two means at a relative distance t: NC1 goes like 1/t^2 and loses the digits of t; through a d x d matrix, those of t^2."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((3, 4))
    means[:, 3] = means[:, 2] + apart * rng.standard_normal(3)
    y = np.repeat(np.arange(4), 5)
    H = means[:, y] + 0.1 * apart * rng.standard_normal((3, 20))
    got = metrics.nc1(metrics.class_statistics(H[None], y, 4))[0]
    assert got == pytest.approx(exact_nc1(H, y, 4), rel=1e-14 / apart + 1e-13)


def test_tolerance_drops_directions() -> None:
    """A direction whose eigenvalue of Sigma_B is rtol of the largest or less counts as zero; the default keeps 1e-13, drops 1e-17."""
    y = np.repeat(np.arange(3), 2)
    for t, kept in ((3e-7, True), (3e-9, False)):
        means = np.array([[1.0, -1.0, 0.0], [t, t, -2 * t]])
        H = means[:, y] + 1e-9 * np.array([[1, -1] * 3, [1, -1] * 3])
        s = metrics.class_statistics(H[None], y, 3)
        one = 1e-18 / (2 / 3) / 3
        two = 1e-18 / (2 * t * t) / 3
        assert metrics.nc1(s)[0] == pytest.approx(one + two if kept else one, rel=1e-6)
        assert metrics.nc1(s, rtol=1e-20)[0] == pytest.approx(one + two, rel=1e-6)
        assert metrics.nc1(s, rtol=1e-2)[0] == pytest.approx(one, rel=1e-6)


def test_centres_and_weights_differ_under_imbalance() -> None:
    """The four forms and the two quotients are different numbers where classes are, and one number where they are balanced."""
    for where, distinct in (("imbalanced", 4), ("balanced", 1)):
        s = stats(POINTS[where])
        for metric in (metrics.nc1, metrics.nc1_quotient):
            values = [metric(s, centre=c, weights=w)[0] for c, w in CHOICES]
            assert len(set(np.round(np.array(values) / values[0], 9))) == distinct


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"H": np.zeros((2, 3))}, ValueError, "shape \\(2, 3\\).*runs first"),
        ({"H": [[[1.0]]]}, TypeError, "H is a list"),
        ({"H": np.zeros((1, 2, 3), dtype=complex)}, TypeError, "complex128.*real"),
        ({"H": np.zeros((1, 2, 3), dtype=bool)}, TypeError, "bool.*real"),
        ({"labels": np.array([0, 1])}, ValueError, "labels has shape \\(2,\\)"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, TypeError, "float64.*integers"),
        ({"labels": np.array([0, 1, 2])}, ValueError, "from 0 to 2.*between 0 and 1"),
        ({"labels": np.array([0, -1, 1])}, ValueError, "from -1 to 1"),
        ({"labels": np.array([0, 0, 0])}, ValueError, "class 1 of 2 has no samples"),
        ({"labels": [[0, 1, 1], [0, 0, 0]], "H": np.zeros((2, 2, 3))}, ValueError, "class 1 of 2 has no samples in some run"),
        ({"multiplicity": np.ones(2)}, ValueError, "multiplicity has shape \\(2,\\)"),
        ({"multiplicity": [1, 0, 1]}, ValueError, "not positive"),
    ],
)
def test_door(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"H": np.zeros((1, 2, 3)), "labels": np.array([0, 1, 1]), "classes": 2, "multiplicity": None} | change
    with pytest.raises(error, match="metrics.class_statistics: .*" + words):
        metrics.class_statistics(*arguments.values())


def test_door_of_scatter_and_choices() -> None:
    s = stats(POINTS["balanced"])
    with pytest.raises(ValueError, match=r"from_scatter: scatter has shape \(3, 2, 2\), but means asks for \(3, 7, 7\)"):
        metrics.from_scatter(s.counts, s.means, s.variances, np.zeros((3, 2, 2)))
    for metric in (metrics.nc1, metrics.nc1_quotient):
        with pytest.raises(ValueError, match="centre is 'origin'"):
            metric(s, centre="origin")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="weights is 'mean'"):
            metric(s, weights="mean")  # type: ignore[arg-type]
