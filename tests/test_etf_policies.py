"""Averaging laws by the weights they give each step, classes that are absent, and points to stay near."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from catalog import LIBRARIES, to_library
from ufm import etf, frames
from ufm.arrays import device_of, to_numpy
from ufm.etf_policies import AsReleased, Constant, Cumulative, Fixed, Lagged, Latest, Paper, Reference, averaged

LAWS: dict[str, tuple[Any, Callable[[int, int], float]]] = {
    "paper": (Paper(), lambda s, t: 2 * s / (t * (t + 1))),
    "constant": (Constant(0.3), lambda s, t: 0.7 ** (t - 1) if s == 1 else 0.3 * 0.7 ** (t - s)),
    "cumulative": (Cumulative(), lambda s, t: 1 / t),
    "latest": (Latest(), lambda s, t: float(s == t)),
}


@pytest.mark.parametrize("law", LAWS)
def test_weights_of_the_steps(law: str) -> None:
    """Step s of one-hot batches is found in the average after t steps with the law's weight, and the weights sum to 1."""
    averaging, weight = LAWS[law]
    T = 30
    state = None
    for t in range(1, T + 1):
        batch = np.zeros((T, 3))
        batch[t - 1] = 1.0
        state = averaged(state, batch, averaging=averaging)
        assert state.t == t
        expected = [weight(s, t) for s in range(1, t + 1)]
        assert state.means[:t, 0] == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert sum(expected) == pytest.approx(1)
        assert state.rate == pytest.approx(averaging.rate(t))
        assert state.weights is None


def test_the_floor_of_the_paper() -> None:
    """2/(t+1), exactly, until it is 1e-4; then that."""
    assert [Fraction(Paper().rate(t)) for t in (1, 3, 7)] == [1, Fraction(1, 2), Fraction(1, 4)]
    assert Paper().rate(19_999) == 1e-4
    assert Paper().rate(10**6) == 1e-4
    assert Paper(floor=0.01).rate(10**6) == 0.01


def test_absent_classes_keep_their_average() -> None:
    """Against a loop over classes: seen and absent stays as it is, never seen is left out, seen for the first time enters at rate 1."""
    rng = np.random.default_rng(0)
    K, steps = 5, 12
    present = rng.random((steps, 2, K)) < 0.4
    present[:, :, 4] = False
    present[:, :, 0] = True
    present[3, 1] = [True, False, True, True, False]
    stored, seen, state = np.zeros((2, 6, K)), np.zeros((2, K), dtype=bool), None
    for t in range(steps):
        batch = rng.normal(size=(2, 6, K))
        unread = np.where(present[t][:, None, :], batch, np.nan)
        state = averaged(state, unread, present=present[t])
        for b in range(2):
            for k in range(K):
                a = 2 / (t + 2) if seen[b, k] else 1.0
                if present[t, b, k]:
                    stored[b, :, k] = a * batch[b, :, k] + (1 - a) * stored[b, :, k]
                assert state.rate[b, 0, k] == (a if present[t, b, k] else 0.0)
                seen[b, k] |= present[t, b, k]
        assert state.means == pytest.approx(stored, abs=1e-15)
        assert np.array_equal(state.seen, seen)
        assert np.array_equal(state.weights, seen.astype(float))
    assert not seen[:, 4].any()


def test_an_unseen_class_distorts_nothing() -> None:
    """The nearest frame of the average tells the seen classes apart as their own frame does, and only theirs is the gradient."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(6, 4))
    state = averaged(None, np.concatenate([X, np.full((6, 1), np.nan)], axis=1), present=np.array([True] * 4 + [False]))
    n, alone = etf.nearest(state.means, weights=state.weights), etf.nearest(X)
    shrink = np.sqrt(4 / 3) / np.sqrt(5 / 4)
    assert (n.W - n.W[:1])[:4] * shrink == pytest.approx(alone.W - alone.W[:1], abs=1e-13)
    grad = etf.pullback(n, rng.normal(size=(5, 6))) * state.rate
    assert np.array_equal(grad[:, 4], np.zeros(6))
    assert np.all(np.isfinite(grad))


class Released:
    """The moving average of the released code, line by line in numpy: one problem, columns are classes."""

    def __init__(self, d: int, K: int) -> None:
        self.previous, self.seen, self.count = np.zeros((d, K)), np.zeros(K, dtype=bool), 0

    def step(self, batch: Any, present: Any, centre: Any) -> Any:
        batch = batch.copy()
        if not present.all():
            batch[:, ~present] = centre
            self.seen = self.seen | present
            if self.previous.sum() != 0:
                unsampled, sampled = ~present & ~self.seen, ~present & self.seen
                batch[:, unsampled] = centre
                self.previous[:, unsampled] = centre
                batch[:, sampled] = self.previous[:, sampled]
        a = 2 / (self.count + 2)
        self.previous = a * batch + (1 - a) * self.previous
        self.count += 1
        return self.previous


def test_as_released() -> None:
    """Both defects, step by step: the uncentred fill that enters the average, and flags that complete batches do not set."""
    rng = np.random.default_rng(2)
    present = np.ones((9, 5), dtype=bool)
    present[2, [1, 3]] = present[4, 1] = present[5, [0, 2]] = present[7, 1] = False
    theirs, state = Released(6, 5), None
    for t in range(9):
        batch, centre = rng.normal(size=(6, 5)), 3 + rng.normal(size=(6, 1))
        state = averaged(state, np.where(present[t], batch, np.nan), missing=AsReleased(), present=present[t], centre=centre)
        assert state.means == pytest.approx(theirs.step(batch, present[t], centre), abs=1e-14)
        assert np.array_equal(state.seen, theirs.seen)
        assert state.weights is None
        if t == 2:
            assert np.array_equal(state.means[:, 1], centre[:, 0])  # seen in two complete batches, and yet overwritten
        if t == 7:
            assert not np.array_equal(state.means[:, 1], centre[:, 0])


def test_as_released_and_absent_at_first() -> None:
    centre = np.full((3, 1), 7.0)
    state = averaged(None, np.ones((3, 4)), missing=AsReleased(), present=np.array([True, True, True, False]), centre=centre)
    assert np.array_equal(state.means, np.concatenate([np.ones((3, 3)), centre], axis=1))


@pytest.mark.parametrize(("d", "K"), [(8, 5), (5, 5), (3, 2)])
def test_the_first_proximal_point(d: int, K: int) -> None:
    """Orthonormal, as near to the means as any U, free direction nearest to eye(d, K) 1; later the previous U; W stays."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(4, d, K))
    X[1] = np.eye(d, K)  # and so eye(d, K) 1 is not in the span of the centred means
    if d > K:
        X[2, :, :] = 0.0
        X[2, : K - 1, : K - 1] = np.eye(K - 1)
        X[2, :K, :] += 10 * rng.normal(size=(K, 1)) * (np.arange(K)[:, None] == 0)
    U = Lagged().point(X, None, "full")
    n = etf.nearest(X)
    assert U.mT @ U == pytest.approx(np.broadcast_to(np.eye(K), (4, K, K)), abs=1e-13)
    assert U @ (np.eye(K) - 1 / K) == pytest.approx(n.U @ frames.helmert(K), abs=1e-13)
    for b in range(4):
        ones = np.eye(d, K).sum(axis=1)
        left = ones - n.U[b] @ (n.U[b].T @ ones)
        if np.linalg.norm(left) > 0.01:
            assert U[b].sum(axis=1) / np.sqrt(K) == pytest.approx(left / np.linalg.norm(left), abs=1e-12)
    near = etf.nearest(X, form="full", prox=U, delta=1e-3)
    assert near.W == pytest.approx(n.W, abs=1e-12)
    assert Lagged().point(X, near.U, "full") is near.U
    assert np.array_equal(Lagged().point(X, None, "reduced"), n.U)


def test_the_free_direction_in_the_span() -> None:
    """Where eye(d, K) 1 lies in the span of the centred means, another direction is taken."""
    K, d = 4, 6
    ones = np.eye(d, K).sum(axis=1) / 2
    others = np.linalg.qr(np.concatenate([ones[:, None], np.random.default_rng(4).normal(size=(d, 2))], axis=1))[0]
    X = others @ frames.helmert(K)
    U = Lagged().point(X, None, "full")
    assert U.T @ U == pytest.approx(np.eye(K), abs=1e-13)
    V = etf.nearest(X).U
    assert U @ (np.eye(K) - 1 / K) == pytest.approx(V @ frames.helmert(K), abs=1e-13)
    far = np.eye(d)[np.argmin(np.linalg.norm(V, axis=1))]
    far -= V @ (V.T @ far)
    assert U.sum(axis=1) / np.sqrt(K) == pytest.approx(far / np.linalg.norm(far), abs=1e-12)


def test_reference() -> None:
    """The same U for every problem and step."""
    X = np.zeros((3, 6, 4), dtype=np.float32)
    U = Reference(np.eye(6, 4)).point(X, None, "full")
    assert U.dtype == np.float32
    assert np.array_equal(U, np.broadcast_to(np.eye(6, 4), (3, 6, 4)))


@pytest.mark.parametrize("form", ["reduced", "full"])
def test_the_first_point_knows_the_weights(form: etf.Form) -> None:
    """Near it, W is the weighted nearest ETF; so the mean of a class of weight 0 changes nothing of the others' rows."""
    X, weights = np.random.default_rng(6).normal(size=(6, 4)), np.array([100.0, 1.0, 1.0, 0.0])
    near = etf.nearest(X, form=form, weights=weights, prox=Lagged().point(X, None, form, weights), relative_delta=0.5)
    assert near.W[:3] @ near.U == pytest.approx(etf.nearest(X, weights=weights).W[:3] @ near.U, abs=1e-12)
    moved = X + 5 * np.eye(4)[3]
    other = etf.nearest(moved, form=form, weights=weights, prox=Lagged().point(moved, None, form, weights), relative_delta=0.5)
    assert other.distance == pytest.approx(near.distance, abs=1e-13)


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries(library: str) -> None:
    """Dtype, device and numbers are kept by every policy."""
    rng = np.random.default_rng(5)
    X, present = rng.normal(size=(2, 6, 4)), np.array([[True, True, True, False], [True] * 4])
    x, here, centre = (to_library(library, a) for a in (X, present, X[:, :, :1]))
    for missing in (Fixed(), AsReleased()):
        first = averaged(None, x, missing=missing, present=here, centre=centre)
        second = averaged(first, x, missing=missing, present=here, centre=centre)
        plain = averaged(None, X, missing=missing, present=present, centre=X[:, :, :1])
        assert to_numpy(first.means) == pytest.approx(plain.means)
        for got in (second.means, second.rate, *([] if second.weights is None else [second.weights])):
            assert (got.dtype, device_of(got)) == (x.dtype, device_of(x))
    for policy in (Lagged(), Reference(np.eye(6, 4))):
        U = policy.point(x, None, "full")
        assert (U.dtype, device_of(U)) == (x.dtype, device_of(x))
        assert to_numpy(U) == pytest.approx(policy.point(X, None, "full"), abs=1e-12)


def test_meta_device() -> None:
    torch = pytest.importorskip("torch")
    X = torch.empty((2, 6, 4), dtype=torch.float64, device="meta")
    for missing in (Fixed(), AsReleased()):
        state = averaged(averaged(None, X, missing=missing, centre=X[..., :1]), X, missing=missing, centre=X[..., :1])
        assert state.means.device.type == state.rate.device.type == "meta"
    for policy in (Lagged(), Reference(np.eye(6, 4)), Reference(torch.eye(6, 4))):
        assert policy.point(X, None, "full").device.type == "meta"


GOOD = np.ones((6, 4))
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rate": (lambda: Constant(0.0), "Constant: a is 0.0, but must be a number in (0, 1]"),
    "floor": (lambda: Paper(floor=2.0), "etf_policies.Paper: floor is 2.0, but must be a number in (0, 1]"),
    "step": (lambda: Paper().rate(0), "etf_policies.Paper: t is 0, but steps count from 1"),
    "present": (lambda: averaged(None, GOOD, present=np.ones(3, dtype=bool)), "present is a ndarray of bool and shape (3,), but must be"),
    "numbers": (lambda: averaged(None, GOOD, present=np.ones(4)), "present is a ndarray of float64 and shape (4,), but must be"),
    "a list": (
        lambda: averaged(None, GOOD, present=[True] * 4),
        "present is a list of no dtype and shape (), but must be a ndarray of booleans",
    ),
    "centre's shape": (lambda: averaged(None, GOOD, centre=GOOD[:, 0]), "centre is (6,), but must be (6, 1)"),
    "shape": (lambda: averaged(averaged(None, GOOD), GOOD.T), "batch is (4, 6), but before (6, 4); keep to one shape"),
    "centre": (
        lambda: averaged(None, GOOD, missing=AsReleased()),
        "missing is AsReleased(), which needs the mean of the samples;",
    ),
    "width": (lambda: Lagged().point(np.eye(3, 4), None, "full"), "means has width 3, but the full form of 4 classes needs 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
