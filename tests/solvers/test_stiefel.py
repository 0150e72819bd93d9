"""pymanopt against closed forms, and the laws of every run on a manifold: own derivatives, own judgement, no clock, no global state."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import jacobian
from numpy.typing import NDArray

from ufm import etf
from ufm.records import Stop
from ufm.solvers.manifolds import Flat, Manifold, Oblique, Sphere, Stiefel, draw, project
from ufm.solvers.riemannian import STEPS, Function, inner
from ufm.solvers.stiefel import minimise, nearest_etf, nearest_frame, scaled

Floats = NDArray[np.float64]

TR, CG, SD = STEPS


def means_of(kind: str, d: int, K: int) -> Floats:
    """Class means (d, K) that are random, near collapse, of half the rank, or of condition 1e6 (all about their mean)."""
    rng = np.random.default_rng([d, K])
    Y = rng.standard_normal((d, K))
    P, s, Qt = np.linalg.svd(Y - Y.mean(axis=1, keepdims=True), full_matrices=False)
    r = min(d, K - 1)
    half = max(1, r // 2)
    return {
        "random": lambda: Y,
        "collapsed": lambda: P[:, :r] @ Qt[:r] + 1e-5 * Y,
        "deficient": lambda: (P[:, :half] * s[:half]) @ Qt[:half],
        "ill": lambda: (P[:, :r] * np.geomspace(1, 1e-6, r)) @ Qt[:r],
    }[kind]()


class Oracle:
    """The inner problem written out by class, and its solution from numpy's SVD."""

    def __init__(self, means: Floats, form: str, delta: float = 0.0, prox: Floats | None = None, weights: Any = None) -> None:
        self.K = K = means.shape[1]
        self.w = np.ones(K) if weights is None else np.asarray(weights, dtype=float) / np.mean(weights)
        centred = means - (means @ self.w / K)[:, None]
        centred = centred - (centred @ self.w / K)[:, None]
        self.Y = centred / np.sqrt(sum(self.w[k] * centred[:, k] @ centred[:, k] for k in range(K)))
        if form == "full":
            self.F = (np.eye(K) - 1 / K) / np.sqrt(K - 1)
        else:
            Q = np.zeros((K, K - 1))
            for j in range(1, K):
                Q[:j, j - 1], Q[j, j - 1] = 1, -j
                Q[:, j - 1] /= np.sqrt(j * (j + 1))
            self.F = Q / np.sqrt(K - 1)
        self.delta, self.prox = delta, np.zeros((means.shape[0], self.F.shape[1])) if prox is None else prox
        self.A = 2 * sum(self.w[k] * np.outer(self.Y[:, k], self.F[k]) for k in range(K)) + delta * self.prox
        P, self.s, Qt = np.linalg.svd(self.A, full_matrices=False)
        self.U = P @ Qt

    def value(self, U: Floats) -> float:
        off = [self.Y[:, k] - U @ self.F[k] for k in range(self.K)]
        return float(sum(self.w[k] * off[k] @ off[k] for k in range(self.K)) + 0.5 * self.delta * np.sum((U - self.prox) ** 2))

    def gradient_norm(self, U: Floats) -> float:
        """Of <U, A>, which is the objective's up to constants: the tangent part by its definition, normal part U sym(U^T A)."""
        C = U.T @ self.A
        return float(np.linalg.norm(self.A - U @ (C + C.T) / 2))


FORMS = {
    "reduced": dict(form="reduced"),
    "full": dict(form="full"),
    "full, 1e-8": dict(form="full", delta=1e-8),
    "full, 1e-3": dict(form="full", delta=1e-3),
    "full, 0.1": dict(form="full", delta=0.1),
    "reduced, 0.1": dict(form="reduced", delta=0.1),
}
SIZES = [(2, 3), (3, 2), (4, 4), (20, 4), (64, 10), (512, 10), (512, 100)]
KINDS = ("random", "collapsed", "deficient", "ill")


def cases() -> list[Any]:
    """(d, K, kind, form, solver); those that take long are slow."""
    rows = []
    for d, K in SIZES:
        for kind in KINDS:
            for form in FORMS:
                for solver in (TR, CG):
                    if form.startswith("full") and d < K:
                        continue
                    if K == 100 and kind == "ill" and form in ("full", "full, 1e-8"):
                        continue  # more than two minutes of CPU a run: the reduced form stands for both
                    fast = K <= 10 and (kind != "ill" or (K <= 4 and solver == TR)) and (d <= 64 or form in ("reduced", "full, 1e-3"))
                    fast = fast and (solver == TR or form in ("reduced", "full", "full, 0.1"))
                    rows.append(pytest.param(d, K, kind, form, solver, marks=() if fast else pytest.mark.slow))
    return rows


@pytest.mark.parametrize(("d", "K", "kind", "form", "solver"), cases())
def test_never_below_the_closed_form(d: int, K: int, kind: str, form: str, solver: Any) -> None:
    """Not below the SVD's objective by more than 1e-12, and at it where the run succeeded, as trust regions always do.

    How far U is from U*: with g the gradient, S = sym(U^T A) >= 0 gives A + g = U S, so that U is the polar factor of A + g, and
    <U - U*, g> >= (s_min(A) + s_min(S))/2 ||U - U*||^2: at most 2 ||g||/s_min(A) in the Frobenius norm, for W too. Where s_K = 0 only in
    the full form's null direction, the same with s_{K-1} on the other directions gives ||W - W*|| <= 4 sqrt(K/(K-1)) ||g||/s_{K-1}. To
    ||g|| is added 2e-14, rounding.
    """
    rng = np.random.default_rng(7)
    options: dict[str, Any] = dict(FORMS[form])
    if "delta" in options:
        options["prox"] = np.linalg.qr(rng.standard_normal((d, K if options["form"] == "full" else K - 1)))[0]
    means = means_of(kind, d, K)
    oracle = Oracle(means, **options)
    found = nearest_etf(means, **options, solver=solver, seed=3, max_steps=None if solver == TR else 1500)
    (run,) = found.runs
    assert np.abs(found.U.T @ found.U - np.eye(found.U.shape[1])).max() < 1e-12
    assert run.gradient_norm == pytest.approx(oracle.gradient_norm(found.U), rel=1e-3, abs=1e-14)
    assert run.value == pytest.approx(oracle.value(found.U), abs=1e-13)
    least = oracle.value(oracle.U)
    closed = etf.nearest(means, **options)
    assert run.value >= min(least, oracle.value(closed.U)) - 1e-12
    assert bool(found.success) == (run.gradient_norm <= 1e-10) == (run.stop is Stop.GRADIENT)
    hard = kind in ("ill", "deficient") or options.get("delta") == 1e-8
    assert found.success or (solver == CG and hard)
    if found.success:
        assert run.value <= least + 1e-12
        g, scale = run.gradient_norm + 2e-14, np.sqrt(K / (K - 1))
        full_rank = oracle.s[-1] > 1e-12
        W = np.sqrt(K) * oracle.F @ oracle.U.T
        if full_rank:
            assert np.linalg.norm(found.U - oracle.U) <= 2 * g / oracle.s[-1]
            assert np.linalg.norm(found.W - W) <= scale * 2 * g / oracle.s[-1]
        elif oracle.s[K - 2] > 1e-12:
            assert options["form"] == "full"
            assert np.linalg.norm(found.W - W) <= scale * 4 * g / oracle.s[K - 2]


@pytest.mark.parametrize("solver", [TR, CG, SD])
@pytest.mark.parametrize("seed", range(4))
def test_both_components(seed: int, solver: Any) -> None:
    """On O(n), at d = K and at d = K - 1 in the reduced form, every start ends in the right component."""
    for d, K, form in ((4, 4, "full"), (3, 4, "reduced"), (1, 2, "reduced")):
        Y = np.random.default_rng([d, seed]).standard_normal((d, K))
        prox = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
        options: dict[str, Any] = dict(form=form, delta=0.1, prox=prox)
        oracle = Oracle(Y, **options)
        found = nearest_etf(Y, **options, solver=solver, seed=seed)
        assert found.success
        assert found.runs[0].component == (round(np.linalg.det(oracle.U)),)
        assert np.abs(found.U - oracle.U).max() <= 1e-8


def test_a_saddle_is_left() -> None:
    """A start where the gradient vanishes but which is no minimum, though its component is right."""
    oracle = Oracle(means_of("random", 6, 4), "reduced")
    P, _, Qt = np.linalg.svd(oracle.A, full_matrices=False)
    for signs in ([1, 1, -1], [-1, -1, -1]):
        saddle = (P * signs) @ Qt
        assert oracle.gradient_norm(saddle) < 1e-14
        found = nearest_etf(means_of("random", 6, 4), start=saddle)
        assert np.abs(found.U - oracle.U).max() < 1e-9


def test_options_reach_the_problem() -> None:
    """Class weights, another frame, the scale-free delta: the same U as the closed form, whose own tests are elsewhere."""
    rng = np.random.default_rng(1)
    Y, frame, weights = rng.standard_normal((9, 5)), rng.standard_normal((5, 3)), np.array([1.0, 2, 3, 0.5, 5])
    prox = np.linalg.qr(rng.standard_normal((9, 4)))[0]
    some: list[dict[str, Any]] = [dict(weights=weights), dict(frame=frame), dict(frame=frame, weights=weights)]
    for options in [*some, dict(relative_delta=0.3, prox=prox), dict(weights=weights, relative_delta=0.3, prox=prox)]:
        expected = etf.nearest(Y, **options)
        found = nearest_etf(Y, **options)
        assert np.abs(found.U - expected.U).max() < 1e-8
        assert found.distance == pytest.approx(expected.distance, abs=1e-13)
    left_out = dict(weights=np.array([1.0, 2, 0, 3, 4]))
    assert nearest_etf(Y, **left_out).distance == pytest.approx(etf.nearest(Y, **left_out).distance, abs=1e-13)
    weighted = Oracle(Y, "reduced", weights=weights)
    assert np.abs(nearest_etf(Y, weights=weights).U - weighted.U).max() < 1e-8


def test_the_record_is_that_of_the_closed_form() -> None:
    """Every field of a NearestETF, in the means' library and precision, and a pullback through it; a batch is its problems one by one."""
    rng = np.random.default_rng(2)
    Y, grad_W = rng.standard_normal((2, 3, 8, 5)), rng.standard_normal((2, 3, 5, 8))
    expected, found = etf.nearest(Y), nearest_etf(Y, seed=4)
    assert isinstance(found, etf.NearestETF)
    assert found.success.shape == (2, 3)
    assert found.success.all()
    assert found.method == (TR,) * 6
    for name in ("U", "W", "distance", "s_min", "condition", "orthogonality"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() < 1e-8
    assert np.abs(found.U @ ((found.V * found.s[..., None, :]) @ found.V.mT) - found.posed.A).max() < 1e-9
    assert np.abs(etf.pullback(found, grad_W) - etf.pullback(expected, grad_W)).max() < 1e-7
    alone = nearest_etf(Y[1, 2], seed=4)
    assert np.array_equal(alone.U, found.U[1, 2])
    assert alone.success.shape == ()
    again = nearest_etf(Y, seed=4, start=found.U)
    assert [run.iterations for run in again.runs] == [0] * 6


def test_nearest_etf_of_single_precision_tensors() -> None:
    """The record is of tensors of the same precision."""
    torch = pytest.importorskip("torch")
    Y = np.random.default_rng(2).standard_normal((2, 3, 8, 5))
    single = nearest_etf(torch.tensor(Y, dtype=torch.float32))
    assert single.U.dtype == single.W.dtype == single.s.dtype == torch.float32
    assert np.abs(single.W.numpy() - etf.nearest(Y).W).max() < 1e-5


@pytest.mark.parametrize(("d", "K", "m"), [(7, 5, 4), (7, 5, 2), (3, 5, 3), (2, 2, 2), (1, 3, 1), (40, 12, 12)])
@pytest.mark.parametrize("scale", ["free", 0.3])
def test_nearest_frame(d: int, K: int, m: int, scale: Any) -> None:
    """s = ||Y F||_*/||F||^2, U = polar(Y F), and ||Y||^2 - 2 s ||Y F||_* + s^2 ||F||^2 for the distance; frames of any rank."""
    rng = np.random.default_rng([d, m])
    frame = rng.standard_normal((K, m)) @ np.diag([1.0] * (m - 1) + [0.0 if m == 4 else 1.0])
    Y = 3.0 * rng.standard_normal((2, d, K))
    found = nearest_frame(Y, frame, scale=scale)
    for i in range(2):
        P, s, Qt = np.linalg.svd(Y[i] @ frame, full_matrices=False)
        t = s.sum() / np.sum(frame**2) if scale == "free" else scale
        assert found.runs[i].success
        assert found.runs[i].iterations <= 30  # of second order, in the scale too
        assert found.scale[i] == pytest.approx(t, rel=1e-9)
        r = np.linalg.matrix_rank(frame)
        assert np.abs(found.target[i] - t * P[:, :r] @ Qt[:r] @ frame.T).max() < 1e-8
        assert found.distance[i] == pytest.approx(np.sum(Y[i] ** 2) - 2 * t * s.sum() + t * t * np.sum(frame**2), rel=1e-11)
        assert np.abs(found.U[i].T @ found.U[i] - np.eye(r)).max() < 1e-12


def test_derivatives_with_a_free_scale() -> None:
    """Gradient and Hessian product of ||Y - t U F^T||^2 in both arguments, against differences along and on the manifold."""
    rng = np.random.default_rng(9)
    Y, F = rng.standard_normal((6, 4)), rng.standard_normal((4, 3))
    function = Function((Stiefel(6, 3), Flat((1,))), *scaled(Y, F))
    X = [draw(m, rng) for m in function.parts]
    V = [project(m, x, rng.standard_normal(m.shape)) for m, x in zip(function.parts, X, strict=True)]
    h = 1e-5
    ahead, behind = ([m.nearest(x + s * h * v) for m, x, v in zip(function.parts, X, V, strict=True)] for s in (1, -1))
    G, HV = function.slope(X), function.curve(X, V)
    assert (function.value(ahead) - function.value(behind)) / (2 * h) == pytest.approx(inner(G, V), rel=1e-8)
    for m, x, up, down, product in zip(function.parts, X, function.slope(ahead), function.slope(behind), HV, strict=True):
        assert np.abs(project(m, x, (up - down) / (2 * h)) - product).max() < 1e-7


CONSTRAINTS: dict[Manifold, Any] = {
    Stiefel(5, 3): lambda X: anp.dot(anp.transpose(X), X) - anp.eye(3),
    Stiefel(3, 3): lambda X: anp.dot(anp.transpose(X), X) - anp.eye(3),
    Oblique(4, 3): lambda X: anp.sum(X * X, axis=0) - 1,
    Sphere((3, 2)): lambda X: anp.sum(X * X) - 1,
    Flat((2, 3)): lambda X: 0.0 * X,
}


def tangent_basis(manifold: Manifold, X: Floats) -> Floats:
    """Orthonormal rows spanning the null space of the constraints' Jacobian at X, flat."""
    J = np.reshape(jacobian(CONSTRAINTS[manifold])(X), (-1, X.size))
    _, s, Vt = np.linalg.svd(J)
    return np.asarray(Vt[np.sum(s > 1e-9) :])


@pytest.mark.parametrize("manifold", CONSTRAINTS, ids=str)
def test_manifolds_against_their_constraints(manifold: Manifold) -> None:
    """Dimension and projection from the null space of the constraints; `nearest` lands on the manifold, moves no point of it."""
    rng = np.random.default_rng(3)
    X, V = draw(manifold, rng), rng.standard_normal(manifold.shape)
    basis = tangent_basis(manifold, X)
    assert manifold.dimension == len(basis)
    assert np.abs(project(manifold, X, V).ravel() - basis.T @ (basis @ V.ravel())).max() < 1e-14
    assert np.abs(CONSTRAINTS[manifold](X)).max() < 1e-14
    assert np.abs(manifold.nearest(X) - X).max() < 1e-14


@pytest.mark.parametrize("manifold", CONSTRAINTS, ids=str)
def test_riemannian_derivatives(manifold: Manifold) -> None:
    """Gradient and Hessian of a quartic: derivatives of the cost along curves nearest(X + tV), projected on the null space's basis."""
    rng = np.random.default_rng(5)
    X, C = draw(manifold, rng), rng.standard_normal(manifold.shape)
    function = Function((manifold,), lambda X: np.sum(C * X + X**4), lambda X: [C + 4 * X**3], lambda X, V: [12 * X**2 * V])
    basis = tangent_basis(manifold, X)
    V = (rng.standard_normal(len(basis)) @ basis).reshape(X.shape)
    G, HV, t = function.slope([X])[0], function.curve([X], [V])[0], 1e-5
    ahead, behind = (manifold.nearest(X + sign * t * V) for sign in (1, -1))
    assert (function.value([ahead]) - function.value([behind])) / (2 * t) == pytest.approx(np.sum(G * V), rel=1e-8)
    change = (function.slope([ahead])[0] - function.slope([behind])[0]) / (2 * t)
    assert np.abs(basis @ (HV - change).ravel()).max() < 1e-7
    assert np.abs(basis.T @ (basis @ HV.ravel()) - HV.ravel()).max() < 1e-13
    other = draw(manifold, rng)
    function.slope([other])
    assert np.abs(function.curve([X], [V])[0] - HV).max() == 0


@pytest.mark.parametrize("solver", [TR, CG, SD])
def test_a_users_own_cost(solver: Any) -> None:
    """Costs in autograd.numpy with known minima: least eigenvalues, two vectors in a product, a sum over unit columns."""
    rng = np.random.default_rng(8)
    S = rng.standard_normal((6, 6))
    S = S + S.T
    values = np.linalg.eigvalsh(S)
    options: dict[str, Any] = dict(solver=solver, tol=1e-8)
    plane = minimise(lambda X: anp.sum(X * anp.dot(S, X)), Stiefel(6, 2), **options)
    line = minimise(lambda x: anp.dot(x, anp.dot(S, x)), Sphere((6,)), **options)
    pair = minimise(lambda x, y: anp.dot(x, anp.dot(S, y)) + anp.sum((y - x) ** 2), Sphere((6,)), Sphere((6,)), **options)
    columns = minimise(lambda X: anp.sum(X * S), Oblique(6, 6), **options)
    mixed = minimise(lambda X, t: anp.sum((t * X - S[:, :2]) ** 2), Oblique(6, 2), Flat((2,)), **options)
    assert all(found.success and found.stop is Stop.GRADIENT for found in (plane, line, pair, columns, mixed))
    assert plane.value == pytest.approx(values[:2].sum(), rel=1e-12)
    assert line.value == pytest.approx(values[0], rel=1e-12)
    assert columns.value == pytest.approx(-np.linalg.norm(S, axis=0).sum(), rel=1e-12)
    assert mixed.value == pytest.approx(0, abs=1e-12)
    assert pair.value == pytest.approx(2 - np.abs(values - 2).max(), rel=1e-12)
    assert pair.evaluations >= pair.iterations > 0
    x, y = pair.points
    raw = [S @ y - 2 * (y - x), S.T @ x + 2 * (y - x)]
    assert pair.gradient_norm == pytest.approx(
        np.sqrt(sum(np.sum((g - p * (p @ g)) ** 2) for p, g in zip((x, y), raw, strict=True))), abs=1e-14
    )


def test_no_state_no_noise_no_clock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits twice, numpy's global state untouched, nothing printed, and a clock that leaps by hours changes nothing."""
    Y = np.random.default_rng(0).standard_normal((12, 5))
    for solver in STEPS:
        np.random.seed(5)  # noqa: NPY002
        before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
        first = nearest_etf(Y, solver=solver)
        with monkeypatch.context() as patch:
            leap = iter(range(10**9))
            patch.setattr("pymanopt.optimizers.optimizer.time.time", lambda leap=leap: 1e4 * next(leap))
            second = nearest_etf(Y, solver=solver)
        assert np.array_equal(first.U, second.U)
        assert first.runs[0].iterations == second.runs[0].iterations > 1
        assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
        assert not np.array_equal(first.U, nearest_etf(Y, solver=solver, seed=1).U)
    assert capsys.readouterr() == ("", "")


def test_limits_are_kept_and_told() -> None:
    """Steps and seconds end a run when asked to; the record says so, and that it did not succeed."""
    Y = means_of("ill", 20, 4)
    few = nearest_etf(Y, max_steps=3, finish=False).runs[0]
    assert (few.iterations, few.stop, few.success, few.newton) == (3, Stop.STEPS, False, 0)
    late = nearest_etf(Y, max_time=1e-9).runs[0]
    assert (late.iterations, late.stop, late.success) == (1, Stop.CLOCK, False)
    rough = nearest_etf(means_of("random", 20, 4), solver=CG, tol=1e-13, finish=False).runs[0]
    polished = nearest_etf(means_of("random", 20, 4), solver=CG, tol=1e-13).runs[0]
    assert (rough.stop, rough.success) == (Stop.STALLED, False)
    assert (polished.stop, polished.success) == (Stop.GRADIENT, True)
    assert polished.newton > 0


@pytest.mark.parametrize("solver", [TR, CG, SD])
def test_too_small_a_tolerance_ends_soon(solver: Any) -> None:
    """A gradient norm below rounding is not waited for, and not claimed."""
    run = nearest_etf(means_of("random", 64, 10), solver=solver, tol=1e-30).runs[0]
    assert (run.stop, run.success) == (Stop.STALLED, False)
    assert run.iterations < 300
    assert run.gradient_norm < 1e-12


ALL = np.ones((4, 3))
GOOD = np.random.default_rng(0).standard_normal((4, 3))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "equal means": (lambda: nearest_etf(ALL), ValueError, "stiefel.nearest_etf: all means"),
    "NaN": (lambda: nearest_etf(GOOD * np.nan), ValueError, "stiefel.nearest_etf: means holds NaN"),
    "narrow": (lambda: nearest_etf(GOOD[:1]), ValueError, "stiefel.nearest_etf: means has width 1"),
    "half": (lambda: nearest_etf(GOOD.astype(np.float16)), TypeError, "stiefel.nearest_etf: means has dtype float16"),
    "prox": (lambda: nearest_etf(GOOD, prox=GOOD, delta=0.1), ValueError, "stiefel.nearest_etf: prox is a ndarray of float64 and shape"),
    "start": (lambda: nearest_etf(GOOD, start=GOOD), ValueError, r"stiefel.nearest_etf: start has shape \(4, 3\)"),
    "start off": (lambda: nearest_etf(GOOD, start=GOOD[:, :2]), ValueError, "stiefel.nearest_etf: start is .* off Stiefel"),
    "solver": (lambda: nearest_etf(GOOD, solver="newton"), ValueError, "stiefel.nearest_etf: solver is 'newton'"),  # type: ignore[arg-type]
    "tol": (lambda: nearest_etf(GOOD, tol=0), ValueError, "stiefel.nearest_etf: tol is 0"),
    "steps": (lambda: nearest_etf(GOOD, max_steps=0), ValueError, "stiefel.nearest_etf: max_steps is 0"),
    "time": (lambda: nearest_etf(GOOD, max_time=-1.0), ValueError, "stiefel.nearest_etf: max_time is -1.0"),
    "frame rows": (lambda: nearest_frame(GOOD, np.eye(4)), ValueError, "stiefel.nearest_frame: means has shape"),
    "zero frame": (lambda: nearest_frame(GOOD, np.zeros((3, 2))), ValueError, "stiefel.nearest_frame: frame has shape"),
    "scale": (lambda: nearest_frame(GOOD, np.eye(3), scale=-1), ValueError, "stiefel.nearest_frame: scale is -1"),
    "no manifold": (lambda: minimise(lambda x: 0.0), TypeError, "stiefel.minimise: manifolds are"),
    "shape": (lambda: minimise(lambda x: 0.0, (3, 2)), TypeError, "stiefel.minimise: manifolds are"),  # type: ignore[arg-type]
    "no cost": (lambda: minimise(1.0, Flat((2,))), TypeError, "stiefel.minimise: cost is"),  # type: ignore[arg-type]
    "hessian alone": (
        lambda: minimise(lambda x: 0.0, Flat((2,)), hessian=lambda x, v: [v]),
        ValueError,
        "stiefel.minimise: hessian is given without",
    ),
    "no hessian": (
        lambda: minimise(lambda x: 0.0, Flat((2,)), gradient=lambda x: [x]),
        ValueError,
        "stiefel.minimise: solver='trust-regions' needs",
    ),
    "NaN cost": (lambda: minimise(lambda x: anp.sum(x) * np.nan, Sphere((2,))), ValueError, "the cost at the start is nan"),
    "wide": (lambda: Stiefel(2, 3), ValueError, "Stiefel: rows is 2"),
    "half a row": (lambda: Stiefel(2.5, 2), ValueError, "Stiefel: rows is 2.5"),  # type: ignore[arg-type]
    "sign": (lambda: Oblique(1, 3), ValueError, "Oblique: rows is 1"),
    "two points": (lambda: Sphere((1,)), ValueError, "Sphere: shape is"),
    "no tuple": (lambda: Flat(3), ValueError, "Flat: shape is 3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_pymanopt_is_loaded_when_used() -> None:
    """Importing this room loads neither pymanopt nor autograd."""
    code = "import sys, ufm.solvers.stiefel; print({'pymanopt', 'autograd'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("d", [3, 5])
def test_two_classes_whose_inner_residual_vanishes(d: int) -> None:
    """On a circle pymanopt's inner solver reaches a residual of exactly 0 and would divide by it."""
    for seed in range(12):
        means = np.random.default_rng(seed).standard_normal((d, 2))
        found = nearest_etf(means)
        assert found.success
        assert found.distance == pytest.approx(etf.nearest(means).distance, abs=1e-12)
