"""The nearest simplex ETF: what defines it, tried on a catalogue of inputs and back ends; its gradient against four independent routes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf
from scipy.linalg import polar as scipy_polar

from catalog import LIBRARIES, to_library
from etf_oracle import dense_gradient, dense_pullback, frame_of, nearest_point, normalised
from ufm import etf, frames, polar
from ufm.arrays import device_of, to_numpy
from ufm.etf import distance, nearest, pullback

METHODS = ("auto", "svd", "gram", "newton-schulz")


def haar(rng: Any, d: int, m: int) -> Any:
    return np.linalg.qr(rng.normal(size=(d, m)))[0]


def spectrum(rng: Any, d: int, K: int, s: Any) -> Any:
    """Centred class means with the K - 1 singular values s."""
    return (haar(rng, d, K - 1) * s) @ haar(rng, K - 1, K - 1).T @ frames.helmert(K)


def collapsed(rng: Any, d: int, K: int, noise: float = 0.0) -> Any:
    """An ETF of length 3 about a far centre, plus noise."""
    return 3 * haar(rng, d, K - 1) @ frames.helmert(K) + noise * rng.normal(size=(d, K))


INPUTS: dict[str, Callable[[Any, int, int], Any]] = {
    "random": lambda rng, d, K: rng.normal(size=(d, K)),
    "far from the origin": lambda rng, d, K: rng.normal(size=(d, K)) + 1e3 * rng.normal(size=(d, 1)),
    "collapsed": collapsed,
    "near collapse": lambda rng, d, K: collapsed(rng, d, K, 1e-5),
    "ill-conditioned": lambda rng, d, K: spectrum(rng, d, K, np.geomspace(1, 1e-8, K - 1)),
    "badly conditioned": lambda rng, d, K: spectrum(rng, d, K, np.geomspace(1, 1e-3, K - 1)),
    "rank lost": lambda rng, d, K: spectrum(rng, d, K, np.where(np.arange(K - 1) < K // 2, 1.0, 0.0)),
    "tiny": lambda rng, d, K: 1e-30 * rng.normal(size=(d, K)),
    "huge": lambda rng, d, K: 1e30 * rng.normal(size=(d, K)),
}
SIZES = [(3, 2), (1, 2), (7, 5), (5, 5), (4, 5), (64, 10), (80, 50), (30, 31)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", INPUTS)
def test_it_is_a_simplex_etf_and_the_nearest(kind: str, method: Any) -> None:
    """Unit rows, cosines -1/(K-1), U^T U = I in the spectral norm, U^T A symmetric and semidefinite: a maximum of <U, A>.

    So it is whatever the back end, which may have been replaced.
    """
    rng = np.random.default_rng(1)
    for d, K in SIZES:
        for dtype in (np.float64, np.float32):
            n = nearest(INPUTS[kind](rng, d, K).astype(dtype), method=method)
            limit = 1e-14 * K if dtype is np.float64 else 1e-6
            loose = limit if dtype is np.float64 else 1e-5
            U = n.U.astype(np.float64)
            off = np.linalg.norm(U.T @ U - np.eye(K - 1), 2)
            assert n.W.dtype == n.U.dtype == n.distance.dtype == dtype
            assert off <= limit
            assert off - 1e-15 * K <= n.orthogonality <= K**0.125 * off + 1e-15 * K
            assert n.W @ n.W.T == pytest.approx(K / (K - 1) * (np.eye(K) - 1 / K), abs=loose)
            A = n.posed.A.astype(np.float64)
            assert np.linalg.norm(n.posed.means) == pytest.approx(1, abs=loose)
            S = U.T @ A
            assert np.abs(S - S.T).max() <= 10 * loose * np.linalg.norm(A, 2)
            assert np.linalg.eigvalsh(S + S.T)[0] >= -10 * loose * np.linalg.norm(A, 2)
            assert n.method == "svd" or method != "svd"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [k for k in INPUTS if k != "rank lost"])
def test_against_the_definition(kind: str, method: Any) -> None:
    """W of the polar factor that SciPy finds of (2/sqrt(K-1)) Ht M without its null direction; s, V, condition, distance are right."""
    rng = np.random.default_rng(2)
    for d, K in SIZES:
        X = INPUTS[kind](rng, d, K)
        n = nearest(X, method=method)
        scale = 1e-15 * K * max(1.0, np.abs(X).max() / np.linalg.norm(X - X.mean(axis=1, keepdims=True)))
        A = 2 * normalised(X) @ frame_of(K, "reduced")
        U = scipy_polar(A)[0]
        s = np.linalg.svd(A, compute_uv=False)
        error = scale / s[-1] * (s[0] / s[-1] if n.method == "gram" else 1)
        assert n.W == pytest.approx(np.sqrt(K) * frame_of(K, "reduced") @ U.T, abs=error)
        loss = 20 * scale * (s[0] / s[-1] if n.method == "gram" else 1)
        assert np.sort(n.s)[::-1] == pytest.approx(s, abs=loss)
        assert (n.U @ n.V * n.s) @ n.V.T == pytest.approx(A, abs=loss)
        assert n.s_min == min(n.s)
        assert n.condition == max(n.s) / min(n.s)
        direct = np.linalg.norm(normalised(X) - n.W.T / np.sqrt(K)) ** 2
        assert n.distance == pytest.approx(direct, rel=1e-6, abs=scale**2)
        nuclear = np.linalg.svd(normalised(X) @ (np.eye(K) - 1 / K), compute_uv=False).sum()
        assert n.distance == pytest.approx(2 - 2 * nuclear / np.sqrt(K - 1), abs=10 * scale)


def test_no_frame_is_nearer() -> None:
    """A thousand rotations, near and far, are all farther than the closed form; with weights, a proximal term, any frame."""
    rng = np.random.default_rng(3)
    X, w, P = rng.normal(size=(6, 4)), np.array([1.0, 2.0, 5.0, 0.5]), haar(rng, 6, 4)
    for options in (
        {},
        {"weights": w},
        {"form": "full", "prox": P, "delta": 0.3},
        {"form": "full", "prox": P, "relative_delta": 2.0, "weights": w},
        {"frame": np.eye(4), "weights": w},
        {"frame": frames.pairs(4)},
    ):
        n = nearest(X, **options)
        F, delta = n.posed.frame, n.posed.delta
        v = 4 * w / w.sum() if "weights" in options else np.ones(4)
        Y = X if options.get("frame", np.zeros(1)).sum() else X - X @ v[:, None] / 4
        Y = Y / np.sqrt(np.sum(v * Y**2))

        def value(U: Any, Y: Any = Y, F: Any = F, v: Any = v, delta: float = delta) -> float:
            return float(np.sum(v * (Y - U @ F.T) ** 2)) + (delta / 2 * float(np.sum((U - P) ** 2)) if delta else 0.0)

        best = value(n.U)
        assert n.distance == pytest.approx(best - (delta / 2 * np.sum((n.U - P) ** 2) if delta else 0.0), abs=1e-14)
        for trial in range(1000):
            U = haar(rng, *n.U.shape) if trial % 2 else scipy_polar(n.U + 1e-3 * rng.normal(size=n.U.shape))[0]
            assert value(U) > best


@pytest.mark.parametrize(("d", "K"), [(3, 2), (5, 5), (20, 10), (130, 100)])
def test_the_full_form(d: int, K: int) -> None:
    """U by the formula; at delta -> 0 the reduced form's W and gradient, and the same for delta = 0, whatever the free direction."""
    rng = np.random.default_rng(4)
    X, P, g = rng.normal(size=(d, K)), haar(rng, d, K), rng.normal(size=(K, d))
    F = frame_of(K, "full")
    for delta in (0.1, 1e-3):
        n = nearest(X, form="full", prox=P, delta=delta)
        assert n.U == pytest.approx(nearest_point(normalised(X), F, P, delta), abs=1e-13 / delta)
        relative = nearest(X, form="full", prox=P, relative_delta=delta * (K - 1) / 2)
        assert relative.posed.delta == pytest.approx(delta, rel=1e-15)
        assert relative.W == pytest.approx(n.W, abs=1e-13)
    reduced = nearest(X)
    expected = pullback(reduced, g)
    for options in ({"prox": P, "delta": 1e-8}, {}):
        n = nearest(X, form="full", **options)
        close = 3e-6 if options else 1e-12
        assert n.W == pytest.approx(reduced.W, abs=close)
        assert np.abs(pullback(n, g) - expected).max() <= 10 * close * np.abs(expected).max()


def test_prox_in_the_reduced_form() -> None:
    """A large delta draws U to the proximal point, a small one leaves it."""
    rng = np.random.default_rng(5)
    X, P = rng.normal(size=(6, 5)), haar(rng, 6, 4)
    far = [np.linalg.norm(nearest(X, prox=P, delta=delta).U - P) for delta in (1e-9, 1.0, 1e3)]
    assert all(a > b for a, b in pairwise(far))
    assert far[0] == pytest.approx(np.linalg.norm(nearest(X).U - P), abs=1e-6)
    assert far[2] < 2e-3


def test_weights() -> None:
    """Equal weights change nothing, nor does their scale, nor a common shift of the means; a heavier class is matched better."""
    rng = np.random.default_rng(6)
    X, w = rng.normal(size=(7, 5)), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert nearest(X, weights=np.full(5, 3.0)).W == pytest.approx(nearest(X).W, abs=1e-14)
    n = nearest(X, weights=w)
    assert nearest(X, weights=7 * w).W == pytest.approx(n.W, abs=1e-14)
    assert nearest(X + rng.normal(size=(7, 1)), weights=w).W == pytest.approx(n.W, abs=1e-13)
    heavy = nearest(X, weights=np.array([1e6, 1e6, 1.0, 1.0, 1.0]))
    gap = X[:, 0] - X[:, 1]
    assert (heavy.W[0] - heavy.W[1]) @ gap == pytest.approx(np.linalg.norm(heavy.W[0] - heavy.W[1]) * np.linalg.norm(gap), rel=1e-4)


def test_a_class_left_out_distorts_nothing() -> None:
    """With weight 0 for a class its column is not seen, the others' frame is that of their own problem, and their gradient too."""
    rng = np.random.default_rng(7)
    X, K = rng.normal(size=(7, 5)), 5
    w = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    others = [0, 1, 3, 4]
    n, alone = nearest(X, weights=w), nearest(X[:, others])
    X[:, 2] += 100
    assert nearest(X, weights=w).s_min < 1e-15
    shrink = np.sqrt((K - 1) / (K - 2)) / np.sqrt(K / (K - 1))
    for W in (n.W, nearest(X, weights=w).W):
        assert (W - W[:1])[others] * shrink == pytest.approx(alone.W - alone.W[:1], abs=1e-13)
    g = rng.normal(size=(K, 7))
    g[2] = 0
    g -= np.where(np.arange(K)[:, None] == 2, 0, g.sum(axis=0) / 4)  # of a function of the others' differences
    grad = pullback(n, g)
    assert np.array_equal(grad[:, 2], np.zeros(7))
    assert grad[:, others] * shrink == pytest.approx(pullback(alone, g[others]), abs=1e-12)


FRAMES = {
    "orthogonal": np.eye(5),
    "simplex": frames.simplex_etf(5),
    "pairs": frames.pairs(5),
    "polygon": frames.polygon(5),
    "unequal": np.diag([1.0, 2.0, 3.0, 4.0, 5.0])[:, :4] - 0.1,
}


@pytest.mark.parametrize("name", FRAMES)
def test_any_frame(name: str) -> None:
    """W W^T is the frame's Gram of trace K; full and reduced forms agree; means are centred exactly where the frame is."""
    rng = np.random.default_rng(8)
    X, F = rng.normal(size=(8, 5)), FRAMES[name]
    n, full = nearest(X, frame=F), nearest(X, frame=F, form="full")
    assert n.W @ n.W.T == pytest.approx(5 * F @ F.T / np.sum(F * F), abs=1e-13)
    assert full.distance == pytest.approx(n.distance, abs=1e-13)
    assert full.W == pytest.approx(n.W, abs=1e-12)
    Y = X - X.mean(axis=1, keepdims=True) if abs(F.sum(axis=0)).max() < 1e-12 else X
    assert distance(Y / np.linalg.norm(Y), F) == pytest.approx(n.distance, abs=1e-14)
    if name == "simplex":
        assert n.W == pytest.approx(nearest(X).W, abs=1e-13)


def rounded(F: Any) -> list[Any]:
    """F in single precision, and as written with eight digits."""
    return [F.astype(np.float32), np.round(F, 8)]


@pytest.mark.parametrize("name", ["simplex", "pairs", "polygon"])
def test_a_rounded_frame_is_centred_and_of_its_rank(name: str) -> None:
    """A frame known to six digits, such as a nearest ETF's W in single precision, is taken for the centred one that it rounds."""
    rng = np.random.default_rng(28)
    X, weights, P = rng.normal(size=(8, 5)) + 30, rng.uniform(0.5, 2, size=5), haar(rng, 8, 8)
    exact = FRAMES[name] - FRAMES[name].mean(axis=0)
    near = P[:, : np.linalg.matrix_rank(exact)]
    Y = X - X.mean(axis=1, keepdims=True)
    for G in (exact, exact @ P[: exact.shape[1]]):
        for F in rounded(G):
            for options in ({}, {"weights": weights}):
                got, ideal = nearest(X, frame=F, **options), nearest(X, frame=G, **options)
                assert got.W == pytest.approx(ideal.W, abs=1e-5)
                assert got.distance == pytest.approx(ideal.distance, abs=1e-6)
            got, ideal = (nearest(X, frame=frame, prox=near, delta=1e-3) for frame in (F, G))
            assert got.distance == pytest.approx(ideal.distance, abs=1e-3)  # what is near depends on the basis of the frame's span
            assert distance(Y, F) == pytest.approx(distance(Y, G), rel=1e-6)
    single = Y.astype(np.float32)
    assert nearest(single, frame=nearest(single, frame=rounded(exact)[0]).W).distance == pytest.approx(
        nearest(X, frame=exact).distance, abs=1e-5
    )


def test_distance() -> None:
    """The closed formula, for any scale and centre; and to the square of the rounding error at an ETF."""
    rng = np.random.default_rng(9)
    Y = rng.normal(size=(3, 6, 4)) + 2
    got = distance(Y)
    for b in range(3):
        nuclear = np.linalg.svd(Y[b] @ (np.eye(4) - 1 / 4), compute_uv=False).sum()
        assert got[b] == pytest.approx(1 + np.sum(Y[b] ** 2) - 2 * nuclear / np.sqrt(3), rel=1e-13)
    assert distance(haar(rng, 6, 3) @ frames.helmert(4) / np.sqrt(3)) < 1e-30
    assert distance(np.zeros((6, 4))) == pytest.approx(1, abs=1e-15)


# Back ends


def sound(A: Any, spoil: Callable[[Any], Any] = lambda U: U) -> Any:
    P, s, Vt = np.linalg.svd(A, full_matrices=False)
    return Vt.mT, s, lambda: spoil(P @ Vt)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "not orthogonal": lambda A: sound(A, lambda U: 1.2 * U),
    "NaN": lambda A: sound(A, lambda U: np.nan * U),
    "NaN everywhere": lambda A: (np.nan * sound(A)[0], np.nan * sound(A)[1], lambda: np.nan * A),
    "orthogonal, but wrong": lambda A: sound(A, lambda U: U[..., ::-1].copy()),
    "one column turned": lambda A: sound(A, lambda U: U * np.where(np.arange(A.shape[-1]) == 0, -1, 1)),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_auto_skips_eigenvalues_only_where_they_would_be_refused(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above FEW columns one solve may say that the condition number is past CONDITION: never wrongly, at any scale."""
    rng, m = np.random.default_rng(3), polar.FEW + 20
    conditions = np.array([1.0, 5.0, 29.9, 300.0, 1e5, 1e12])
    A = np.stack([haar(rng, m + 9, m) * np.geomspace(1, 1 / c, m) @ haar(rng, m, m).T for c in conditions])
    A = np.concatenate([A, A[:1] * 0, A[:1] * (np.arange(m) > 0)])
    for size in (1e-90, 1.0, 1e80):
        past = to_numpy(polar._past(to_library(library, size * A)))
        assert past.tolist() == [False] * 3 + [True] * 3 + [False, True]
    called = []
    gram = polar.BACKENDS["gram"]
    monkeypatch.setitem(polar.BACKENDS, "gram", lambda A: called.append(A.shape) or gram(A))
    factor, names = polar.polar(to_library(library, A[3:6]))
    assert (names, called) == (("svd",) * 3, [])
    assert np.abs(to_numpy(factor.U) - np.stack([scipy_polar(a)[0] for a in A[3:6]]))[:2].max() < 1e-9
    _, names = polar.polar(to_library(library, A[1:5]))
    assert (names, len(called)) == (("gram", "gram", "svd", "svd"), 1)


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("method", ["auto", "gram", "newton-schulz"])
def test_a_wrong_back_end_is_replaced(fault: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where no back end is left, nothing is returned."""
    X = np.random.default_rng(10).normal(size=(3, 7, 5))
    expected = nearest(X, method="svd")
    monkeypatch.setitem(polar.BACKENDS, polar.ROUTES[method][0], BROKEN[fault])
    n = nearest(X, method=method)
    assert n.method == ("svd",) * 3
    assert np.array_equal(n.W, expected.W)
    assert nearest(X[0], method=method).method == "svd"
    monkeypatch.setitem(polar.BACKENDS, "svd", BROKEN[fault])
    with pytest.raises(ArithmeticError, match="no back end's factor"):
        nearest(X, method=method)


def test_only_problems_that_fail_are_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of mixed conditions each problem is what it is alone, under its own back end; the SVD sees the bad ones only."""
    rng = np.random.default_rng(11)
    kinds = ["random", "ill-conditioned", "collapsed", "rank lost", "badly conditioned", "near collapse"]
    X = np.stack([INPUTS[k](rng, 30, 6) for k in kinds])
    alone = [nearest(x) for x in X]
    seen = []

    def svd(A: Any) -> Any:
        seen.append(A.shape)
        return sound(A)

    monkeypatch.setitem(polar.BACKENDS, "svd", svd)
    n = nearest(X.reshape(2, 3, 30, 6))
    assert seen == [(3, 30, 5)]
    assert n.method == tuple(a.method for a in alone) == ("gram", "svd", "gram", "svd", "svd", "gram")
    for b, a in enumerate(alone):
        at = divmod(b, 3)
        assert n.W[at] == pytest.approx(a.W, abs=1e-12)
        assert n.s_min[at] == pytest.approx(a.s_min, abs=1e-15)
        assert n.orthogonality[at] < 1e-14


@pytest.mark.parametrize(("method", "kind", "used"), [
    ("auto", "random", "gram"),
    ("auto", "badly conditioned", "svd"),
    ("gram", "badly conditioned", "gram"),
    ("gram", "ill-conditioned", "svd"),
    ("newton-schulz", "ill-conditioned", "newton-schulz"),
    ("newton-schulz", "rank lost", "svd"),
    ("svd", "random", "svd"),
])  # fmt: skip
def test_choice(method: Any, kind: str, used: str) -> None:
    assert nearest(INPUTS[kind](np.random.default_rng(12), 64, 10), method=method).method == used


@pytest.mark.slow
@pytest.mark.parametrize("d", [999, 2048])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_classes(d: int, dtype: Any, method: Any) -> None:
    """U^T U = I in the spectral norm to the same limits."""
    X = np.random.default_rng(13).normal(size=(d, 1000)).astype(dtype)
    n = nearest(X if d > 999 else X + 3 * np.eye(d, 1000, dtype=dtype) * d**0.5, method=method)
    U = n.U.astype(np.float64)
    assert np.linalg.norm(U.T @ U - np.eye(999), 2) <= (1e-11 if dtype is np.float64 else 1e-6)


# The gradient


def directional(X: Any, grad: Any, function: Callable[[Any], Any], rng: Any, h: float, trials: int) -> float:
    """The largest relative error of <grad, E> against central differences of `function` in random directions E."""
    worst = 0.0
    for _ in range(trials):
        E = rng.normal(size=X.shape)
        E *= np.linalg.norm(X) / np.linalg.norm(E)
        slope = (function(X + h * E) - function(X - h * E)) / (2 * h)
        worst = max(worst, abs(slope - np.sum(grad * E)) / (np.linalg.norm(grad) * np.linalg.norm(E)))
    return worst


GRADIENTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "d > K": (7, 5, {}),
    "d = K": (5, 5, {}),
    "d = K - 1": (4, 5, {}),
    "two classes": (3, 2, {}),
    "full, d > K": (7, 5, {"form": "full", "delta": 0.1}),
    "full, d = K": (5, 5, {"form": "full", "delta": 0.1}),
    "relative": (7, 5, {"form": "full", "relative_delta": 0.5}),
    "prox, reduced": (4, 5, {"delta": 0.1}),
    "weights": (7, 5, {"weights": [1.0, 2.0, 3.0, 4.0, 5.0]}),
    "weights and prox": (6, 5, {"weights": [1.0, 2.0, 3.0, 4.0, 0.5], "form": "full", "delta": 0.2}),
    "orthogonal frame": (7, 5, {"frame": np.eye(5)}),
    "pairs": (7, 5, {"frame": frames.pairs(5)}),
    "pairs, weights": (3, 5, {"frame": frames.pairs(5), "weights": [1.0, 2.0, 3.0, 4.0, 5.0], "delta": 0.1}),
}


def with_prox(rng: Any, d: int, K: int, options: dict[str, Any]) -> dict[str, Any]:
    if "delta" in options or "relative_delta" in options:
        m = K if options.get("form") == "full" else options["frame"].shape[1] if "frame" in options else K - 1
        return options | {"prox": haar(rng, d, m)}
    return options


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str) -> None:
    """torch's check in double precision, of every entry, in a batch of two."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(14)
    d, K, options = GRADIENTS[name]
    options = with_prox(rng, d, K, options)
    if "prox" in options:
        options |= {"prox": torch.asarray(options["prox"])[None] * torch.ones((2, 1, 1), dtype=torch.float64)}

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, X: Any) -> Any:
            ctx.nearest = nearest(X, **options)
            return ctx.nearest.W

        @staticmethod
        def backward(ctx: Any, grad_W: Any) -> Any:
            return pullback(ctx.nearest, grad_W)

    X = torch.asarray(rng.normal(size=(2, d, K))).requires_grad_()
    assert torch.autograd.gradcheck(Layer.apply, (X,), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("d", "K"), [(3, 2), (5, 5), (4, 5), (12, 10), (13, 12), (11, 12), (40, 12)])
def test_against_the_declarative_node(d: int, K: int, method: Any) -> None:
    """The dense linear system of the implicit-function theorem gives the same gradient to 1e-12, near collapse and away from it."""
    rng = np.random.default_rng(15)
    for X in (rng.normal(size=(d, K)) + 0.5 * np.sqrt(d) * np.eye(d, K), collapsed(rng, d, K, 0.1), collapsed(rng, d, K)):
        g = rng.normal(size=(K, d))
        forms = [("reduced", None, 0.0)] + ([("full", haar(rng, d, K), 0.1)] if d >= K else [])
        for form, prox, delta in forms:
            n = nearest(X, form=form, prox=prox, delta=delta, method=method)
            expected = dense_pullback(X, g, form, prox, delta)
            assert np.abs(pullback(n, g) - expected).max() <= 1e-12 * np.abs(expected).max()


def test_the_block_of_the_node_is_the_symmetric_factor() -> None:
    """2 F^T F + delta I - sym(U^T f_U) = V diag(s) V^T at the solution."""
    rng = np.random.default_rng(16)
    X, P, F = rng.normal(size=(7, 5)), haar(rng, 7, 5), frame_of(5, "full")
    n = nearest(X, form="full", prox=P, delta=0.1)
    f_U = 2 * (n.U @ F.T - normalised(X)) @ F + 0.1 * (n.U - P)
    block = 2 * F.T @ F + 0.1 * np.eye(5) - 0.5 * (n.U.T @ f_U + f_U.T @ n.U)
    assert (n.V * n.s) @ n.V.T == pytest.approx(block, abs=1e-14)


def test_the_oracle_itself() -> None:
    """The dense system's gradient against central differences of its own forward pass."""
    rng = np.random.default_rng(17)
    Y, P, G, F = rng.normal(size=(6, 4)), haar(rng, 6, 4), rng.normal(size=(6, 4)), frame_of(4, "full")
    grad = dense_gradient(Y, F, nearest_point(Y, F, P, 0.3), G, P, 0.3)
    assert directional(Y, grad, lambda Y: float(np.sum(G * nearest_point(Y, F, P, 0.3))), rng, 1e-5, 10) < 1e-9


@pytest.mark.parametrize("d", [128, 100, 99])
def test_a_hundred_classes_against_differences(d: int) -> None:
    rng = np.random.default_rng(18)
    X, g = rng.normal(size=(d, 100)) + 3 * np.sqrt(d) * np.eye(d, 100), rng.normal(size=(100, d))
    grad = pullback(nearest(X), g)
    assert directional(X, grad, lambda X: float(np.sum(g * nearest(X).W)), rng, 1e-5, 5) < 1e-9


def exact_slopes(X: Any, g: Any, directions: list[Any]) -> list[float]:
    """d <g, W> along each direction, by differences of step 1e-25 in 80 digits; W by Newton-Schulz in the Helmert form."""
    with mp.workdps(80):
        d, K = X.shape
        F = mp.matrix(K, K - 1)
        for j in range(1, K):
            for i in range(j):
                F[i, j - 1] = 1 / mp.sqrt(j * (j + 1))
            F[j, j - 1] = -j / mp.sqrt(mpf(j * (j + 1)))

        def value(step: Any, E: Any) -> Any:
            A = mp.matrix([[mpf(float(X[i, k])) + step * mpf(float(E[i, k])) for k in range(K)] for i in range(d)]) * F
            U = A / mp.mnorm(A, "f")
            for _ in range(60):
                defect = mp.eye(K - 1) - U.T * U
                U = U + U * defect / 2
                if mp.mnorm(defect, "f") < mpf(10) ** -45:
                    break
            W = mp.sqrt(mpf(K) / (K - 1)) * F * U.T
            return mp.fsum(mpf(float(g[k, i])) * W[k, i] for k in range(K) for i in range(d))

        h = mpf(10) ** -25
        return [float((value(h, E) - value(-h, E)) / (2 * h)) for E in directions]


@pytest.mark.parametrize(("d", "K"), [(7, 5), (4, 5), (5, 5)])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-3])
def test_at_collapse(d: int, K: int, noise: float) -> None:
    """Accurate to 1e-12 at and near exact collapse, against 80 digits."""
    rng = np.random.default_rng(19)
    X, g = collapsed(rng, d, K, noise), rng.normal(size=(K, d))
    grad = pullback(nearest(X), g)
    directions = [rng.normal(size=(d, K)) for _ in range(4)]
    for E, slope in zip(directions, exact_slopes(X, g, directions), strict=True):
        assert np.sum(grad * E) == pytest.approx(slope, abs=1e-12 * np.linalg.norm(grad) * np.linalg.norm(E))


def test_differentiating_an_svd_fails_at_collapse() -> None:
    """What the closed gradient is for: torch's own, through the SVD, is not finite or wrong there."""
    torch = pytest.importorskip("torch")
    K = 4
    Q = torch.asarray(frames.helmert(K)).mT
    X = torch.asarray(np.concatenate([frames.helmert(K), np.zeros((2, K))])).requires_grad_()
    P, _, Vh = torch.linalg.svd(X @ Q, full_matrices=False)
    W = (K / (K - 1)) ** 0.5 * Q @ (P @ Vh).mT
    g = torch.asarray(np.random.default_rng(20).normal(size=(K, K + 1)))
    W.backward(g)
    grad = pullback(nearest(X.detach()), g)
    assert bool(torch.all(torch.isfinite(grad)))
    assert not float(torch.max(torch.abs(X.grad - grad))) <= 1e-3


def test_single_precision_at_collapse() -> None:
    rng = np.random.default_rng(21)
    X, g = collapsed(rng, 128, 20), rng.normal(size=(20, 128))
    exact, got = pullback(nearest(X), g), pullback(nearest(X.astype(np.float32)), g.astype(np.float32))
    assert got.dtype == np.float32
    assert np.linalg.norm(got - exact) <= 2e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("K", [10, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_guard_hardly_changes_full_rank(K: int) -> None:
    """0.05 changes a near-collapse gradient by less than 0.3 % whatever K, and 0 changes nothing."""
    rng = np.random.default_rng(22)
    n, g = nearest(collapsed(rng, K + 24, K, 1e-3)), rng.normal(size=(K, K + 24))
    free = pullback(n, g)
    assert 0 < np.linalg.norm(pullback(n, g, guard=0.05) - free) <= 0.003 * np.linalg.norm(free)
    assert np.array_equal(pullback(n, g, guard=0.0), free)
    assert np.linalg.norm(pullback(n, g, guard=1e-9) - free) <= 1e-12 * np.linalg.norm(free)


def test_the_guard_bounds_lost_ranks() -> None:
    """Five of ten classes coincide: the full form's gradient grows like 1/delta, as differences confirm; guarded it is a few times g."""
    rng = np.random.default_rng(23)
    X, g = collapsed(rng, 64, 10), rng.normal(size=(10, 64))
    X[:, 5:] = X[:, 5:].mean(axis=1, keepdims=True)
    X /= np.linalg.norm(X - X.mean(axis=1, keepdims=True))
    P = haar(rng, 64, 10)
    sizes = []
    for delta in (1e-2, 1e-3):
        n = nearest(X, form="full", prox=P, delta=delta)
        grad = pullback(n, g)
        sizes.append(np.linalg.norm(grad))
        slope = directional(X, grad, lambda X, d=delta: float(np.sum(g * nearest(X, form="full", prox=P, delta=d).W)), rng, 1e-7, 3)
        assert slope < 1e-5
    assert np.linalg.norm(pullback(n, g, guard=0.05)) < 10 * np.linalg.norm(g) < 0.1 * sizes[1]
    assert sizes[1] == pytest.approx(10 * sizes[0], rel=0.3)
    n = nearest(X)  # rank lost exactly: directions that the means leave open get nothing from outside the span of U
    reduced, Q = pullback(n, g), n.posed.frame @ n.V
    normal = reduced - n.U @ (n.U.T @ reduced)
    assert np.linalg.norm(reduced) < 10 * np.linalg.norm(g)
    assert np.sum(n.s < 1e-14) == 4
    assert np.linalg.norm(normal @ Q[:, n.s < 1e-14]) <= 1e-12 * np.linalg.norm(normal @ Q)


# Batches, libraries, the door


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_batch_is_a_loop(name: str) -> None:
    """Each problem of a (2, 3) batch, of its own weights and proximal point, is what it is alone, to rounding."""
    rng = np.random.default_rng(24)
    d, K, options = GRADIENTS[name]
    X, g = rng.normal(size=(2, 3, d, K)), rng.normal(size=(2, 3, K, d))
    single = [dict(with_prox(rng, d, K, options)) for _ in range(6)]
    if "weights" in options:
        for each in single:
            each["weights"] = rng.random(K) + 0.1
    batch = dict(options) | {
        k: np.stack([s[k] for s in single]).reshape(2, 3, *single[0][k].shape) for k in ("prox", "weights") if k in single[0]
    }
    n = nearest(X, **batch)
    grad = pullback(n, g, guard=0.01)
    for b, own in enumerate(single):
        at = divmod(b, 3)
        alone = nearest(X[at], **own)
        assert n.method[b] == alone.method
        for field in ("U", "W", "distance", "s_min"):
            assert getattr(n, field)[at] == pytest.approx(getattr(alone, field), abs=1e-12)
        expected = pullback(alone, g[at], guard=0.01)
        assert np.abs(grad[at] - expected).max() <= 1e-11 * np.abs(expected).max()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_libraries(library: str, method: Any) -> None:
    """The same on every library and device, in both precisions, problems redone included; place and type are kept."""
    rng = np.random.default_rng(25)
    X = np.stack([rng.normal(size=(7, 5)), INPUTS["ill-conditioned"](rng, 7, 5)])
    g = rng.normal(size=(2, 5, 7))
    for dtype, close in ((np.float64, 1e-7), (np.float32, 0.3)):
        for options in ({}, {"form": "full", "prox": haar(rng, 7, 5) + np.zeros((2, 1, 1)), "delta": 0.1}, {"weights": [1, 2, 3, 0.5, 4]}):
            placed = {k: to_library(library, v.astype(dtype)) if k == "prox" else v for k, v in options.items()}
            x = to_library(library, X.astype(dtype))
            n = nearest(x, method=method, **placed)
            grad = pullback(n, to_library(library, g.astype(dtype)), guard=0.05)
            for got in (n.U, n.W, n.distance, n.s_min, n.condition, n.s, n.V, grad, distance(x)):
                assert (type(got) is type(x) or got.ndim == 0, got.dtype, device_of(got)) == (True, x.dtype, device_of(x))
            plain = nearest(X, method=method, **options)
            assert to_numpy(n.W)[0] == pytest.approx(plain.W[0], abs=1e-3 * close)
            assert to_numpy(grad)[0] == pytest.approx(pullback(plain, g, guard=0.05)[0], abs=close)


@pytest.mark.parametrize("method", METHODS)
def test_meta_device(method: Any) -> None:
    """On torch's `meta` device, where a tensor left on the CPU would be an error and no value can be read."""
    torch = pytest.importorskip("torch")
    X, P = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in ((3, 7, 5), (3, 7, 5)))
    for options in ({}, {"form": "full", "prox": P, "delta": 0.1}, {"frame": np.eye(5)}, {"weights": X[0, 0, :]}):
        n = nearest(X, method=method, **options)
        grad = pullback(n, X.mT, guard=0.05)
        assert {x.device.type for x in (n.U, n.W, n.distance, n.condition, n.orthogonality, grad, distance(X))} == {"meta"}
        assert (tuple(n.W.shape), tuple(grad.shape)) == ((3, 5, 7), (3, 7, 5))


GOOD = np.random.default_rng(26).normal(size=(12, 10))
P = np.eye(12, 9)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a list": (lambda: nearest([[1.0, 2.0]]), TypeError, "means is a list, but must be an array (..., d, K)"),
    "one axis": (lambda: nearest(GOOD[0]), ValueError, "means has shape (10,), but must be (..., d, K) with K >= 2"),
    "K = 1": (lambda: nearest(GOOD[:, :1]), ValueError, "means has shape (12, 1), but must be (..., d, K) with K >= 2"),
    "too narrow": (lambda: nearest(GOOD[:3]), ValueError, "means has width 3, but a simplex ETF of 10 classes needs at least 9;"),
    "too narrow, full": (
        lambda: nearest(GOOD[:9], form="full"), ValueError, "means has width 9, but a simplex ETF of 10 classes needs at least 10;",
    ),
    "too narrow, frame": (lambda: nearest(GOOD[:9], frame=np.eye(10)), ValueError, "means has width 9, but this frame of 10 classes"),
    "NaN": (lambda: nearest(np.where(GOOD > 2, np.nan, GOOD)), ValueError, "means holds NaN or infinity, but must be finite"),
    "infinite": (lambda: nearest(np.where(GOOD > 2, np.inf, GOOD)), ValueError, "means holds NaN or infinity, but must be finite"),
    "equal": (lambda: nearest(np.full((12, 10), 0.1)), ValueError, "all means of a problem are equal, but a direction needs means"),
    "equal to rounding": (lambda: nearest(GOOD[:, :1] * np.ones(10) / 3), ValueError, "all means of a problem are equal"),
    "equal to a sum's rounding": (lambda: nearest(np.repeat(1e8 + np.arange(400.0)[:, None] / 7, 300, axis=1)), ValueError, "all means"),
    "one of two equal": (lambda: nearest(np.stack([GOOD, 0 * GOOD])), ValueError, "all means of a problem are equal"),
    "one class in": (lambda: nearest(GOOD, weights=np.eye(10)[0]), ValueError, "needs two classes with weights above 0"),
    "half": (lambda: nearest(GOOD.astype(np.float16)), TypeError, "means has dtype float16, but polar factors need float32 or"),
    "integers": (lambda: nearest(np.eye(12, 10, dtype=int)), TypeError, "means has dtype int64, but polar factors need float32"),
    "prox shape": (lambda: nearest(GOOD, prox=GOOD, delta=0.1), ValueError, "prox is a ndarray of float64 and shape (12, 10), but must be"),
    "prox alone": (lambda: nearest(GOOD, prox=P), ValueError, "delta is 0.0 and prox is given, but the two go together"),
    "delta alone": (lambda: nearest(GOOD, delta=0.1), ValueError, "delta is 0.1 and prox is not given, but the two go together"),
    "both deltas": (lambda: nearest(GOOD, delta=0.1, relative_delta=0.1), ValueError, "but they are one number"),
    "negative delta": (lambda: nearest(GOOD, prox=P, delta=-1.0), ValueError, "delta is -1.0, but must be a number >= 0"),
    "NaN delta": (lambda: nearest(GOOD, prox=P, delta=np.nan), ValueError, "delta is nan, but must be a number >= 0"),
    "form": (lambda: nearest(GOOD, form="half"), ValueError, "form is 'half', but must be 'reduced' or 'full'"),
    "method": (lambda: nearest(GOOD, method="qr"), ValueError, "method is 'qr', but must be one of 'auto', 'svd'"),
    "weights": (lambda: nearest(GOOD, weights=np.ones(9)), ValueError, "weights has shape (9,), but must be (10,)"),
    "negative weights": (lambda: nearest(GOOD, weights=np.arange(10) - 1), ValueError, "weights are [-1.  0.  1."),
    "no weight": (lambda: nearest(GOOD, weights=np.zeros(10)), ValueError, "weights are [0. 0. 0."),
    "frame": (lambda: nearest(GOOD, frame=np.eye(9)), ValueError, "frame has shape (9, 9), but must be (10, m)"),
    "orthogonal to the frame": (
        lambda: nearest(np.repeat(GOOD[:, :2], 2, axis=1), frame=frames.pairs(4)), ValueError, "means are orthogonal to this frame",
    ),
    "words": (lambda: nearest(GOOD, weights="many"), ValueError, "weights are 'many', but must be numbers; give one a class"),
    "grad_W": (lambda: pullback(nearest(GOOD), GOOD), ValueError, "grad_W is a ndarray of float64 and shape (12, 10), but must"),
    "guard": (lambda: pullback(nearest(GOOD), GOOD.T, guard=-1.0), ValueError, "etf.pullback: guard is -1.0, but must be a number >= 0"),
    "distance": (lambda: distance(GOOD[:3]), ValueError, "etf.distance: Y has width 3, but a simplex ETF of 10 classes needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    """One sentence that names the call, what it got and the rule."""
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("etf.nearest: ", "etf.pullback: ", "etf.distance: "))


def test_low_precision_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"means has dtype {dtype}, but polar factors need float32 or float64"):
            nearest(torch.asarray(GOOD).to(dtype))


def test_the_input_is_left_alone() -> None:
    X, g = GOOD.copy(), GOOD.T.copy()
    for options in ({}, {"frame": np.eye(10)}, {"weights": np.arange(1.0, 11)}):
        pullback(nearest(X, **options), g)
        distance(X)
    assert np.array_equal(X, GOOD)
    assert np.array_equal(g, GOOD.T)


def test_reachable() -> None:
    import ufm

    assert ufm.etf is etf


def test_results_are_outside_autograd() -> None:
    torch = pytest.importorskip("torch")
    means = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    near = etf.nearest(means)
    assert not near.W.requires_grad
    assert not etf.pullback(near, torch.ones(4, 6, dtype=torch.float64, requires_grad=True)).requires_grad
    assert not etf.pullback(near, torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float64))).requires_grad
    assert not etf.distance(means).requires_grad
