"""The dual bound is a bound, it is tight at optima, and it says so when it has nothing to say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import catalog
import ufm
from ufm.certificate import certify, copositive_norm, dual_norm
from ufm.records import Regime

CONVEX = [
    (name, p)
    for name, p in catalog.PROBLEMS
    if p.depth == 1 and (p.loss.name in ("CE", "MSE") or (p.loss.name == "DR" and p.lam_b is None))
]


def values_nearby(problem: ufm.Problem, factors: Any, tries: int = 30) -> Any:
    """F at many points around and far from `factors`: none may lie below a lower bound."""
    from ufm.objective import objective

    F = objective(problem)
    rng = np.random.default_rng(3)
    for scale in np.logspace(-3, 1, tries):
        point = [f + scale * rng.standard_normal(f.shape) for f in factors]
        if problem.features == "relu":
            point[0] = np.abs(point[0])
        yield F.value(tuple(point))


@pytest.mark.parametrize(("name", "problem"), CONVEX, ids=[n for n, _ in CONVEX])
def test_the_bound_of_any_point_is_below_every_value(name: str, problem: ufm.Problem) -> None:
    """A random point proves a lower bound that neither its own value nor any other point's value undercuts."""
    factors = catalog.factors(problem)
    worth = certify(problem, factors)
    assert np.all(np.isfinite(worth.lower))
    assert np.all(worth.lower <= worth.value)
    for value in values_nearby(problem, factors):
        assert np.all(worth.lower <= value * (1 + 1e-13))
    best = ufm.solve(problem, runs=1, method="lbfgs", tol=1e-9) if problem.columns == "means" else None
    if best is not None:
        assert np.all(worth.lower <= best.value * (1 + 1e-12))


@pytest.mark.parametrize(("name", "problem"), CONVEX, ids=[n for n, _ in CONVEX])
def test_the_bound_is_tight_at_the_solution(name: str, problem: ufm.Problem) -> None:
    """Every convex problem of the catalogue is solved to a proven relative gap of 1e-9."""
    solution = ufm.solve(problem, runs=2)
    assert np.all(solution.gap <= 1e-9), solution.stop


@pytest.mark.parametrize("columns", ["means", "samples"])
def test_samples_prove_what_their_means_prove(columns: str) -> None:
    """A collapsed point has the same value, bound and gap whether its columns are samples or class means."""
    counts = [4, 2, 1]
    make = dict(width=4, features="relu", lam_w=0.05, lam_h=0.02, lam_b=0.1)
    means = ufm.Problem(counts, columns="means", **make)
    samples = ufm.Problem(counts, columns="samples", **make)
    H, W, b = catalog.factors(means)
    worth = certify(means, (H, W, b))
    spread = certify(samples, (np.repeat(H, counts, axis=2), W, b))
    assert spread.lower == pytest.approx(worth.lower, rel=1e-13)
    assert spread.gap == pytest.approx(worth.gap, rel=1e-12)
    assert spread.rho == pytest.approx(worth.rho, rel=1e-13)
    assert spread.regime == worth.regime


def test_an_uncollapsed_sample_point_is_bounded_too() -> None:
    """Averaging slopes over a class keeps the bound valid: it lies below the optimum of the same problem."""
    problem = ufm.Problem([3, 2], width=3, features="relu", lam_w=0.05, lam_h=0.02, columns="samples")
    worth = certify(problem, catalog.factors(problem))
    optimum = ufm.predict(problem).value
    assert worth.lower <= optimum * (1 + 1e-14)
    assert worth.gap > 0


def brute_force(A: Any) -> float:
    """max v'Av over v >= 0 on the unit sphere, by fine search in three dimensions."""
    angles = np.linspace(0, np.pi / 2, 1201)
    s, t = np.meshgrid(angles, angles)
    v = np.stack([np.sin(s) * np.cos(t), np.sin(s) * np.sin(t), np.cos(s)]).reshape(3, -1)
    return float(np.max(np.sum(v * (A @ v), axis=0)))


@pytest.mark.parametrize("seed", range(12))
def test_the_copositive_norm_against_a_search(seed: int) -> None:
    """All sign patterns of a 3 x 3 Gram matrix, against a fine search over the nonnegative sphere."""
    Q = np.random.default_rng(seed).standard_normal((4, 3))
    value, how, atoms = copositive_norm(Q.T @ Q)
    assert "exact" in how
    assert value == pytest.approx(brute_force(Q.T @ Q), rel=2e-6)
    for v in atoms:
        assert np.all(v >= 0)
        assert np.linalg.norm(v) == pytest.approx(1)
        assert v @ Q.T @ Q @ v > 1


@pytest.mark.parametrize("K", [6, 14, 20])
def test_upper_bounds_are_above_every_direction(K: int) -> None:
    """Exact or not, no nonnegative direction exceeds rho; where it is called exact, one attains it."""
    rng = np.random.default_rng(K)
    for _ in range(5):
        Q = rng.standard_normal((K, K))
        A = Q.T @ Q
        value, how, atoms = copositive_norm(A)
        V = np.maximum(rng.standard_normal((K, 4000)), 0.0)
        V = np.concatenate(
            [V, np.eye(K), *(np.eye(K)[:, list(s)].sum(axis=1, keepdims=True) for s in itertools.combinations(range(K), 2))], axis=1
        )
        V = V / np.maximum(np.linalg.norm(V, axis=0), 1e-300)
        assert np.max(np.sum(V * (A @ V), axis=0)) <= value * (1 + 1e-12)
        if "exact" in how:
            assert max(v @ A @ v for v in atoms) == pytest.approx(value, rel=1e-9)


def test_supports_with_an_antisymmetric_leading_vector_do_not_count() -> None:
    """(1, -1)/sqrt(2) leads a 2 x 2 block but is no nonnegative direction, although its entries sum to exactly zero."""
    A = np.array([[1, -0.5, 0.3], [-0.5, 1, 0.3], [0.3, 0.3, 1]])
    value, how, atoms = copositive_norm(A)
    assert value == pytest.approx(brute_force(A), rel=2e-6)
    assert value == pytest.approx(1.3, rel=1e-12)
    assert "exact" in how
    assert np.all(np.isfinite(atoms))
    signs = np.array([[1, 1, -1], [1, -1, 1], [-1, 1, 1]])
    Q = np.concatenate([signs, -signs + 2 * np.eye(3)], axis=1)
    value, _, atoms = copositive_norm(Q.T @ Q)
    assert np.all(np.isfinite(atoms))
    assert max(v @ Q.T @ Q @ v for v in atoms) == pytest.approx(value, rel=1e-9)


def test_sign_rules_need_no_search() -> None:
    """Nonpositive products: the largest column; nonnegative ones: Perron; blocks: the larger of both."""
    negative = np.array([[2.0, -1.0], [-1.0, 3.0]])
    positive = np.array([[2.0, 1.0], [1.0, 2.0]])
    block = np.block([[negative, -0.1 * np.ones((2, 2))], [-0.1 * np.ones((2, 2)), positive]])
    assert copositive_norm(negative)[:2] == (3.0, "signs (exact)")
    assert copositive_norm(positive)[0] == pytest.approx(3.0, rel=1e-15)
    assert copositive_norm(block)[0] == pytest.approx(3.0, rel=1e-15)
    assert copositive_norm(block)[1] == "signs (exact)"


def test_without_relu_rho_is_the_spectral_norm() -> None:
    Q = np.random.default_rng(0).standard_normal((3, 5, 5))
    rho, how, atoms = dual_norm(Q, rectified=False)
    assert rho == pytest.approx(np.linalg.norm(Q, 2, axis=(1, 2)), rel=1e-14)
    assert set(how) == {"spectral (exact)"}
    assert all(len(a) == np.sum(np.linalg.svd(q, compute_uv=False) > 1) for a, q in zip(atoms, Q, strict=True))


def test_a_dead_subset_point_is_found_out() -> None:
    """Classes wrongly at zero: stationary, but rho > 1 and a gap at least the true one."""
    counts = ufm.counts.step(4, 20, 10)
    problem = ufm.Problem(counts, width=4, features="relu", lam_w=1e-3, lam_h=1e-3)
    solution = ufm.solve(problem)
    H, W = (f.copy() for f in solution.factors)
    H[:, :, 3] = 0.0
    start = ufm.starts.given((np.where(H > 1e-12, H, 0.0), W - W.mean(axis=1, keepdims=True)))
    dead = certify(problem, tuple(np.asarray(f) for f in start.factors))
    assert dead.rho > 1.01
    assert dead.gap >= 1 - solution.value / dead.value
    assert dead.collapsed.tolist() == [[False, False, False, True]]
    assert dead.regime == (Regime.MINORITY_ZERO,)


def test_zero_is_proven_above_its_threshold_only() -> None:
    """W = H = 0 is optimal iff kappa^2 K/(K-1) >= n_max, with ReLU; iff kappa^2 >= n without, balanced."""
    n, K, N = 30, 5, 150
    for features, level in (("relu", np.sqrt(n * (K - 1) / K) / N), ("free", np.sqrt(n) / N)):
        for factor, proven in ((1.001, True), (0.999, False)):
            problem = ufm.Problem([n] * K, width=K, features=features, lam_w=level * factor, lam_h=level * factor)
            worth = certify(problem, (np.zeros((1, K, K)), np.zeros((1, K, K))))
            assert worth.regime == (Regime.ALL_ZERO,)
            assert worth.gradient_norm == 0
            assert bool(worth.gap[0] < 1e-14) is proven
            assert worth.rho == pytest.approx(1 / factor, rel=1e-12)


def test_what_cannot_be_proven_is_nan_and_says_why() -> None:
    """Losses without a conjugate and deep cross-entropy have no bound here."""
    for options, word in ((dict(loss=ufm.Focal(2.0)), "convex"), (dict(depth=2), "depth")):
        problem = ufm.Problem([3, 2], width=2, features="free", lam_w=0.01, lam_h=0.01, **options)
        worth = certify(problem, catalog.factors(problem))
        assert np.isnan(worth.gap).all()
        assert np.isnan(worth.lower).all()
        assert word in worth.bound[0]
        assert np.isfinite(worth.gradient_norm).all()


def test_free_bias_points_are_repaired_to_a_proof() -> None:
    """A point whose slopes do not sum to zero still proves a finite bound when the bias is free."""
    problem = ufm.Problem([5, 3, 2], width=3, features="relu", lam_w=0.02, lam_h=0.02, lam_b=0.0)
    worth = certify(problem, catalog.factors(problem))
    assert np.isfinite(worth.lower).all()
    assert np.all(worth.lower <= ufm.solve(problem).value)


def test_deep_linear_mse_is_bounded_by_von_neumann() -> None:
    """The bound does not depend on the point and is attained by the solution, with and without a free bias."""
    for lam_b in (None, 0.0):
        problem = ufm.Problem(
            [6, 3, 3], width=5, depth=3, features="free", loss=ufm.MSE(), lam_w=[[0.01, 0.02, 0.005]], lam_h=0.01, lam_b=lam_b
        )
        first = certify(problem, catalog.factors(problem, seed=1))
        assert first.lower == pytest.approx(certify(problem, catalog.factors(problem, seed=2)).lower, rel=1e-15)
        assert first.lower < first.value
        assert ufm.solve(problem, tol=1e-12).gap <= 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda H, W: (H,), "shapes"),
        (lambda H, W: (H[:, :, :2], W), "shapes"),
        (lambda H, W: (H[:0], W[:0]), "0 runs"),
        (lambda H, W: (-H, W), "H >= 0"),
        (lambda H, W: (H * np.nan, W), "NaN"),
        (lambda H, W: (H, W[:1]), "shapes"),
    ],
)
def test_points_that_do_not_fit_are_refused(change: Any, words: str) -> None:
    problem = ufm.Problem([[3, 2, 1], [2, 2, 2]], width=4, features="relu", lam_w=0.1, lam_h=0.1)
    H, W = catalog.factors(problem)
    with pytest.raises(ValueError, match=words) as caught:
        certify(problem, change(H, W))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("certify: ")


def test_von_neumann_without_a_penalty_proves_nothing_and_does_not_fail() -> None:
    """With one factor unpenalised the penalty of the product costs nothing: the bound is 0, the gap 1."""
    problem = ufm.Problem([3, 2], width=3, depth=2, features="free", loss=ufm.MSE(), lam_w=0.0, lam_h=0.1)
    worth = certify(problem, catalog.factors(problem))
    assert worth.lower == pytest.approx(0.0, abs=0)
    assert worth.gap == pytest.approx(1.0, abs=0)


def test_a_cell_keeps_its_proof_whatever_its_neighbours_are() -> None:
    """Deep MSE: a penalised bias beside a free one; each cell has the gap it has alone, and a penalty never lowers the bound's validity."""
    make = dict(width=3, depth=2, features="free", loss=ufm.MSE(), lam_w=0.02, lam_h=0.02)
    grid = ufm.solve(ufm.Problem([3, 2], lam_b=[0.0, 0.1], **make))
    assert grid.gap[0] <= 1e-9
    assert grid.gap[0] == pytest.approx(ufm.solve(ufm.Problem([3, 2], lam_b=0.0, **make)).gap[0], abs=1e-12)
    assert 0 < grid.gap[1] < 1
    assert np.all(grid.value * (1 - grid.gap) <= grid.value)


def test_a_bias_penalty_next_to_nothing_keeps_the_proof() -> None:
    """lam_b from 1e-300 to 1e-3: the bound stays as good as with a free bias."""
    problem = ufm.Problem(
        [30, 10, 5], width=4, features="relu", lam_w=5e-3, lam_h=5e-3, lam_b=[0.0, 1e-300, 1e-100, 1e-30, 1e-12, 1e-6, 1e-3]
    )
    found = ufm.solve(problem)
    assert np.all(found.gap <= 1e-9)
    assert np.all(np.diff(found.value) >= -1e-12)
