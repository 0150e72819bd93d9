"""The spectrum of F's Hessian against torch's own Hessian, against spectra known in closed form, and against itself by other means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

import catalog
import ufm
from catalog import PROBLEMS
from test_objective import torch_parts
from ufm.landscape import Spectrum, hessian
from ufm.theory import deep
from ufm.theory import deep_points as points

over = pytest.mark.parametrize


def dense_hessian_by_torch(problem: ufm.Problem, run: int, per_cell: int, factors: Any) -> Any:
    """The whole Hessian of one run in weighted coordinates, H = H' diag(m)^{-1/2}, by double backward."""
    torch = pytest.importorskip("torch")
    cell = run // per_cell
    root_m = np.sqrt(problem.multiplicity[cell])
    at = [factors[0][run] * root_m, *(f[run] for f in factors[1:])]
    ends = np.cumsum([0, *(f.size for f in at)])
    unit = torch.tensor(1.0 / root_m)

    def F(x: Any) -> Any:
        parts = [x[a:b].reshape(f.shape) for a, b, f in zip(ends, ends[1:], at, strict=False)]
        return sum(torch_parts(problem, cell, [parts[0] * unit, *parts[1:]]))

    return torch.autograd.functional.hessian(F, torch.tensor(np.concatenate([f.ravel() for f in at]))).numpy()


@over("problem", [p for _, p in PROBLEMS], ids=[n for n, _ in PROBLEMS])
def test_eigenvalues_are_torch_s(problem: ufm.Problem) -> None:
    """Every problem of the catalogue, at a random point: eigenvalues and their signs, to 1e-12 of the largest."""
    factors = catalog.factors(problem)
    got = hessian(problem, factors)
    assert np.all(got.method == "dense")
    for run in range(problem.cells):
        exact = np.linalg.eigvalsh(dense_hessian_by_torch(problem, run, 1, factors))
        size = np.abs(exact).max()
        assert got.coordinates[run] == len(exact)
        assert got.eigenvalues[run] == pytest.approx(exact, abs=1e-12 * size)
        assert got.scale[run] == pytest.approx(size)
        assert got.asymmetry[run] < 1e-13
        if not np.isnan(got.negative[run]):
            assert got.negative[run] == got.at_least[run] == np.sum(exact < -1e-11 * size)
            assert got.positive[run] == np.sum(exact > 1e-11 * size)
    assert np.all(got.is_minimum == 0)
    assert all("not stationary" in reason for reason in got.reason)
    assert np.all(np.isnan(got.index))


HELD = [(n, p) for n, p in PROBLEMS if p.features == "relu" and p.loss.name == "CE"][::4]


@over("problem", [p for _, p in HELD], ids=[n for n, _ in HELD])
def test_held_features_are_left_out(problem: ufm.Problem) -> None:
    """Features at their bound drop out of the matrix: the eigenvalues are those of the rest of torch's Hessian."""
    factors = catalog.factors(problem)
    factors[0][:, 0] = 0.0
    factors[0][-1, 1, :2] = 0.0
    got = hessian(problem, factors)
    for run in range(problem.cells):
        free = np.concatenate([factors[0][run].ravel() > 0, *(np.ones(f[run].size, dtype=bool) for f in factors[1:])])
        exact = np.linalg.eigvalsh(dense_hessian_by_torch(problem, run, 1, factors)[np.ix_(free, free)])
        assert got.coordinates[run] == free.sum()
        assert got.eigenvalues[run, : free.sum()] == pytest.approx(exact, abs=1e-12 * np.abs(exact).max())
        assert np.all(np.isnan(got.eigenvalues[run, free.sum() :]))
    assert got.eigenvalues.shape[1] == got.coordinates.max()


# --- closed forms --------------------------------------------------------------------------------------------------------------------


def balanced_factors(M: Any, width: int, depth: int, n: int = 1) -> list[Any]:
    """Factors of equal singular values with W_L ... W_1 H = M, a unit's frame chosen at random at every interface."""
    U, s, Vt = np.linalg.svd(np.sqrt(n) * M)
    r = int(np.sum(s > 1e-9 * s[0]))
    rng, root = np.random.default_rng(5), s[:r] ** (1 / (depth + 1))
    frames = [np.linalg.qr(rng.standard_normal((width, r)))[0] for _ in range(depth)]
    ends = [Vt[:r].swapaxes(0, 1), *frames, U[:, :r]]
    factors = [(b * root) @ a.swapaxes(0, 1) for a, b in pairwise(ends)]
    factors[0] = factors[0] / np.sqrt(n)
    return [f[None] for f in factors]


def linear(K: int, L: int, d: int, lam: float, n: int = 1, **options: Any) -> ufm.Problem:
    """Balanced classes, a common lambda of the papers, with samples counted: the rate lam_eff is `lam`."""
    common = lam * n ** (-1 / (L + 1))
    return ufm.Problem([n] * K, width=d, depth=L, features="free", lam_w=common, lam_h=common, **options)


def dnc(K: int, L: int, alpha: float) -> tuple[float, Any]:
    """(lambda_eff, M = alpha S) of deep neural collapse with that scale."""
    return alpha ** ((L - 1) / (L + 1)) / (np.exp(alpha) + K - 1), alpha * (np.eye(K) - 1.0 / K)


def pairs(K: int, L: int, beta: float) -> tuple[float, Any]:
    """(lambda_eff, M) of antipodal pairs with that scale, K even."""
    e, e2 = np.exp(-beta), np.exp(-2 * beta)
    slope = (2 * e2 + (K - 2) * e) / (1 + e2 + (K - 2) * e)
    lam = 2 / K * 2 ** (-2 / (L + 1)) * beta ** ((L - 1) / (L + 1)) * slope
    return lam, np.kron(np.eye(K // 2), beta * np.array([[1.0, -1.0], [-1.0, 1.0]]))


def known_spectrum(K: int, L: int, d: int, alpha: float) -> Any:
    """Section 5 of the theory of deep chains: eigenvalues over lambda at DNC, with multiplicities, sorted."""
    rho, t = 1 - K / (np.exp(alpha) + K - 1), alpha / K
    A = 1 - L + t * (L + 1) * (1 + rho * (K - 2))
    B, C = 1 + t * (1 + rho), t * rho * np.sqrt((L + 1) * (K - 2))
    middle, radius = (A + B) / 2, np.hypot((A - B) / 2, C)
    table = [
        (0.0, L * (K - 1) * (2 * d - K) // 2),
        (2.0, L * (K * (K - 1) // 2 + (K - 1) * (d - K + 1))),
        (1.0, d + (d - K + 1) + (L - 1) * (d - K + 1) ** 2),
        (2 + (L + 1) * (t - 1), K * (K - 3) // 2),
        (2 + (L + 1) * (t * (1 + rho * (K - 1)) - 1), 1),
        ((L + 1) * (t + 1), (K - 1) * (K - 2) // 2),
        (middle - radius, K - 1),
        (middle + radius, K - 1),
    ]
    return np.sort(np.concatenate([np.full(m, value) for value, m in table]))


DNC = [(K, L, d, a) for K, L, d in [(4, 2, 4), (4, 2, 7), (5, 2, 6), (5, 3, 5), (6, 2, 6), (6, 3, 7), (4, 3, 5)] for a in (0.6, 2.2, 6.0)]


@over(("K", "L", "d", "alpha"), DNC)
@over("n", [1, 3])
def test_dnc_has_the_known_spectrum(K: int, L: int, d: int, alpha: float, n: int) -> None:
    """Eigenvalues, signs, nullity and verdict at balanced factors of alpha S; with n samples all eigenvalues shrink by n^{-1/(L+1)}."""
    lam, M = dnc(K, L, alpha)
    got = hessian(linear(K, L, d, lam, n), balanced_factors(M, d, L, n))
    known = lam * n ** (-1 / (L + 1)) * known_spectrum(K, L, d, alpha)
    assert got.gradient_norm[0] < 1e-13
    assert got.eigenvalues[0] == pytest.approx(known, abs=2e-14 * known[-1])
    assert got.negative[0] == got.index[0] == np.sum(known < -1e-9 * known[-1])
    assert got.zero[0] == got.orbit[0] == deep.orbit_dimension(K - 1, L, d)
    assert got.positive[0] == np.sum(known > 1e-9 * known[-1])
    assert got.null_is_orbit[0] == 1
    assert got.is_minimum[0] == (alpha >= K * (L - 1) / (L + 1))
    assert ("saddle" in got.reason[0]) == (got.negative[0] > 0)


@over(("K", "L", "d"), [(4, 2, 4), (4, 2, 7), (6, 2, 6), (6, 2, 9), (6, 3, 7)])
def test_nullity_is_the_orbit_s_dimension(K: int, L: int, d: int) -> None:
    """DNC and pairs: nullity and rank of the tangent map are L(r d - r(r+1)/2), at DNC not the Grassmannian's L r(d - r)."""
    for (lam, M), r in [(dnc(K, L, 8.0), K - 1), (pairs(K, L, 6.0), K // 2)]:
        got = hessian(linear(K, L, d, lam), balanced_factors(M, d, L))
        assert got.gradient_norm[0] < 1e-12
        assert got.zero[0] == got.orbit[0] == deep.orbit_dimension(r, L, d) == L * (r * d - r * (r + 1) / 2)
        assert got.zero[0] != L * r * (d - r)
        assert got.negative[0] == 0
        assert got.is_minimum[0] == 1
        assert "across the orbit" in got.reason[0]


@over("alpha", [1.3333, 1.3334])
def test_dnc_turns_at_the_sharp_threshold(alpha: float) -> None:
    """K = 4, L = 2: two negative eigenvalues, K(K-3)/2, just below alpha = 4/3 and none just above."""
    lam, M = dnc(4, 2, alpha)
    assert hessian(linear(4, 2, 4, lam), balanced_factors(M, 4, 2)).negative[0] == (2 if alpha < 4 / 3 else 0)


def test_at_the_threshold_the_counts_are_unknown_or_flat() -> None:
    """At alpha = 4/3 + 1e-11 the K(K-3)/2 turning directions are neither zero nor not: NaN, and no verdict."""
    for shift, counted in [(1e-11, False), (0.0, True)]:
        lam, M = dnc(4, 2, 4 / 3 + shift)
        got = hessian(linear(4, 2, 4, lam), balanced_factors(M, 4, 2))
        assert np.isnan(got.is_minimum[0])
        assert np.isnan(got.zero[0]) != counted
        assert ("flat" if counted else "not separated") in got.reason[0]
        assert counted == (got.separation[0] >= 100)
        assert np.isnan(got.null_is_orbit[0]) != counted
        assert got.zero[0] == deep.orbit_dimension(3, 2, 4) + 2 or not counted


@over("L", [1, 2, 3])
def test_the_zero_point(L: int) -> None:
    """At zero the Hessian of a deep chain is lambda I; for L = 1 it is a saddle of index (K-1) d exactly for lam < 1/K."""
    K, d = 4, 5
    for lam, index in [(0.5, 0), (0.05, (K - 1) * d if L == 1 else 0)]:
        problem = linear(K, L, d, lam)
        got = hessian(problem, [np.zeros_like(f) for f in catalog.factors(problem)])
        one = np.repeat([lam - 1 / K, lam, lam + 1 / K], [(K - 1) * d, 2 * d, (K - 1) * d])
        assert got.eigenvalues[0] == pytest.approx(one if L == 1 else np.full(2 * K * d + (L - 1) * d * d, lam), abs=1e-15)
        assert (got.negative[0], got.zero[0]) == (index, 0)
        assert got.is_minimum[0] == (index == 0)
        assert got.gradient_norm[0] == 0
    near = hessian(problem, [1e-20 * f for f in catalog.factors(problem)])
    assert near.gradient_norm[0] == 0
    assert near.is_minimum[0] == (L > 1)


@over("lam_b", [None, 0.0, 0.1])
@over("loss", [ufm.CrossEntropy(), ufm.CrossEntropy(temperature=[1.0, 1.0, 1.0, 1.0])], ids=["plain", "temperature"])
def test_the_simplex_is_a_minimum_of_the_plain_model(lam_b: Any, loss: Any) -> None:
    """L = 1: a balanced ETF has no negative eigenvalue, and is flat along its rotations and the shift of a free bias alone."""
    K, d, lam = 4, 6, 0.01
    alpha = np.log(1 / lam - K + 1)
    factors = balanced_factors(alpha * (np.eye(K) - 1 / K), d, 1)
    factors += [] if lam_b is None else [np.zeros((1, K, 1))]
    got = hessian(linear(K, 1, d, lam, lam_b=lam_b, loss=loss), factors)
    assert got.negative[0] == 0
    assert got.zero[0] == got.orbit[0] == deep.orbit_dimension(K - 1, 1, d) + (lam_b == 0.0)
    assert got.is_minimum[0] == 1


def test_a_shift_follows_the_temperature() -> None:
    """With a temperature per class the free bias may move along it, not along ones: the solved point is still a minimum."""
    problem = ufm.Problem(
        [3, 2, 1], width=4, features="free", lam_w=0.02, lam_h=0.02, lam_b=0.0, loss=ufm.CrossEntropy(temperature=[0.5, 1.0, 2.0])
    )
    got = hessian(problem, ufm.solve(problem, runs=2, tol=1e-11).factors)
    assert np.array_equal(got.zero, got.orbit)
    assert np.all(got.is_minimum == 1)


def test_an_orthogonal_frame_of_squared_errors() -> None:
    """Deep linear squared errors at Z = z I: zero eigenvalues are the orbit's, L(K d - K(K+1)/2), and the larger root is a minimum."""
    K, L, d = 3, 2, 4
    lam = 0.5 * (2 / 3) ** (1 / 3) / 3 / K

    def excess(z: float) -> float:
        return (1 - z) * z ** ((L - 1) / (L + 1)) - K * lam

    for ends, least in [((0.5, 1.0), 1), ((1e-9, 0.2), 0)]:
        z = brentq(excess, *ends, xtol=1e-16, rtol=1e-15)
        got = hessian(linear(K, L, d, lam, loss=ufm.MSE()), balanced_factors(z * np.eye(K), d, L))
        assert got.gradient_norm[0] < 1e-12
        assert got.zero[0] == deep.orbit_dimension(K, L, d)
        assert got.is_minimum[0] == least


@over(("K", "L", "d", "lam"), [(4, 2, 6, 0.02), (4, 3, 5, 0.02), (5, 2, 7, 2e-5)])
@over("tol", [1e-7, 1e-10])
def test_end_points_of_a_solver(K: int, L: int, d: int, lam: float, tol: float) -> None:
    """At points a solver left, the symmetries' eigenvalues are zero up to the gradient that is left; these end points are minima."""
    problem = linear(K, L, d, lam)
    solution = ufm.solve(problem, method="lbfgs", runs=3, seed=1, tol=tol)
    got = hessian(problem, solution.factors)
    assert np.all(got.gradient_norm <= tol)
    ranks = np.linalg.matrix_rank(solution.logits, rtol=1e-4)
    assert list(got.zero) == list(got.orbit) == [deep.orbit_dimension(int(r), L, d) for r in ranks]
    assert np.all(got.negative == 0)
    assert np.all(got.is_minimum == 1)
    lanczos = hessian(problem, solution.factors, method="lanczos")
    for name in ("negative", "zero", "positive", "is_minimum", "reason"):
        assert np.array_equal(getattr(lanczos, name), getattr(got, name))


# --- nonnegative features and the ReLU -----------------------------------------------------------------------------------------------


def test_a_dead_subset() -> None:
    """Two minority classes at zero: on the free coordinates no negative eigenvalue; the held features of dead classes are pushed."""
    problem = ufm.Problem([50, 50, 1, 1], width=2, features="relu", lam_w=0.02, lam_h=0.002)
    solution = ufm.solve(problem, method="lbfgs", tol=1e-12, runs=2)
    alive = np.sum(solution.factors[0] > 0, axis=1) > 0
    assert np.all(alive.sum(axis=1) == 2)
    got = hessian(problem, solution.factors)
    for run in range(2):
        free = np.concatenate([solution.factors[0][run].ravel() > 0, np.ones(8, dtype=bool)])
        exact = np.linalg.eigvalsh(dense_hessian_by_torch(problem, run, 2, solution.factors)[np.ix_(free, free)])
        assert got.coordinates[run] == 10
        assert got.eigenvalues[run] == pytest.approx(exact, abs=1e-12 * exact[-1])
    assert np.all(got.negative == 0)
    assert np.all(got.weakly_held == 0)
    assert np.all(got.is_minimum == 1)
    assert list(got.reason) == ["positive definite"] * 2


def test_units_of_equal_support_rotate() -> None:
    """Nonnegative features: two units alive for the same class alone rotate into each other, one zero eigenvalue for each such pair."""
    problem = ufm.Problem([10, 10, 10], width=3, features="relu", lam_w=0.02, lam_h=0.002)
    H, W = ufm.solve(problem, tol=1e-12).factors
    assert np.array_equal(np.sort(np.sum(H[0] > 0, axis=1)), [1, 1, 1])
    wide = replace(problem, width=4)
    split = np.concatenate([H, 0.8 * H[:, :1]], axis=1), np.concatenate([W, 0.8 * W[:, :, :1]], axis=2)
    split[0][:, 0] *= 0.6
    split[1][:, :, 0] *= 0.6
    got = hessian(wide, split)
    assert got.zero[0] == got.orbit[0] == 1
    assert got.negative[0] == 0
    assert got.is_minimum[0] == 1


def test_features_without_a_force() -> None:
    """Zero of the nonnegative model: held features have no force. Deep: positive definite all the same. L = 1, small lambda: not told."""
    for depth, told in [(2, True), (1, False)]:
        problem = ufm.Problem([2, 2, 2], width=3, depth=depth, features="relu", lam_w=0.01, lam_h=0.01)
        got = hessian(problem, [np.zeros_like(f) for f in catalog.factors(problem)])
        assert got.coordinates[0] == 9 * depth
        assert got.weakly_held[0] == 9
        assert got.eigenvalues[0] == pytest.approx(0.01, rel=1e-12)
        assert np.isnan(got.is_minimum[0]) != told
        assert ("positive definite" if told else "without a force") in got.reason[0]


def test_the_kink_is_no_place_for_a_hessian() -> None:
    """A hidden ReLU at zero: eigenvalues of one piece, but no verdict."""
    problem = ufm.Problem([2, 2, 2], width=3, depth=2, features="free", activation="relu", lam_w=0.01, lam_h=0.01)
    got = hessian(problem, [np.zeros_like(f) for f in catalog.factors(problem)])
    assert np.isnan(got.is_minimum[0])
    assert "kink" in got.reason[0]


def test_unseen_features_are_flat() -> None:
    """H = relu(V): every negative entry of V is a zero eigenvalue, and known to be one."""
    problem = ufm.Problem([3, 3, 3], width=3, features="relu_of_free", columns="samples", lam_w=0.02, lam_h=0.01)
    like = ufm.Problem([3, 3, 3], width=3, features="relu", lam_w=0.02, lam_h=0.01)
    H, W = ufm.solve(like, tol=1e-12).factors
    V = np.repeat(H, 3, axis=2)
    got = hessian(problem, (np.where(V > 0, V, -1.0), W))
    assert got.zero[0] == got.orbit[0] == np.sum(V == 0)
    assert got.is_minimum[0] == 1


# --- any width, from the width of the rank -------------------------------------------------------------------------------------------


def rank_points() -> list[tuple[str, ufm.Problem, list[Any]]]:
    """Stationary points of linear chains of less than full rank: minima, saddles, unequal penalties and counts, biases, samples, losses."""
    found = []
    for name, K, L, d, code, share, options in [
        ("minimum", 4, 2, 7, points.dnc(4), 0.1, {}),
        ("saddle", 6, 3, 8, points.dnc(6), 0.9, {}),
        ("pairs", 6, 4, 7, points.pairs(6), 0.1, {"lam_b": 0.1}),
        ("free bias", 4, 2, 6, points.pairs(4), 0.1, {"lam_b": 0.0}),
        ("tied", 5, 2, 7, points.relaxed_pairs(5), 0.1, {}),
        ("blocks", 6, 2, 6, points.blocks([4, 2]), 0.97, {}),
        ("plain saddle", 6, 1, 8, points.pairs(6), 0.3, {}),
        ("plain minimum", 5, 1, 6, points.dnc(5), 0.3, {"lam_b": 0.2}),
        ("zero", 4, 3, 5, points.zero(4), 0.1, {}),
        ("full rank", 4, 2, 3, points.dnc(4), 0.1, {}),
        ("plain zero", 4, 1, 5, points.zero(4), 0.1, {}),
    ]:
        lam = share * (0.1 if "zero" in name else points.largest(code, L) if name != "tied" else 0.1)
        tilt = 10.0 ** np.linspace(-0.4, 0.4, L + 1)
        lam_w, lam_h = lam * tilt[:-1], lam * tilt[-1] / 3
        at = deep.balanced_factors(points.at(code, lam, L).M, 3, lam_h, lam_w, d, np.random.default_rng(1))
        problem = ufm.Problem([3] * K, width=d, depth=L, features="free", lam_w=lam_w[None], lam_h=lam_h, **options)
        found.append((name, problem, [f[None] for f in at] + ([np.zeros((1, K, 1))] if options else [])))
    for name, counts, loss in [
        ("unequal", [7, 3, 2, 1], ufm.CrossEntropy()),
        ("weighted", [3, 2, 2], ufm.CrossEntropy(0.05)),
        ("mse", [5, 2, 1], ufm.MSE()),
    ]:
        problem = ufm.Problem(counts, width=6, depth=2, features="free", loss=loss, lam_w=[[4e-3, 9e-3]], lam_h=2e-3)
        found.append((name, problem, list(ufm.solve(problem, method="lbfgs", tol=1e-12, seed=2).factors)))
    name, problem, (H, *rest) = found[0]
    return [*found, ("samples", replace(problem, columns="samples"), [np.repeat(H, 3, axis=2), *rest])]


@over(("name", "problem", "factors"), rank_points(), ids=[n for n, *_ in rank_points()])
def test_reduced_is_dense(name: str, problem: ufm.Problem, factors: Any) -> None:
    """Every eigenvalue with its copies, all counts, sums and the verdict, from the dense matrix at full width; auto takes it."""
    got, whole = hessian(problem, factors), hessian(problem, factors, method="dense")
    assert (got.method[0], whole.method[0]) == ("reduced", "dense")
    close = 1e-12 if name in ("unequal", "weighted", "mse") else 1e-14
    assert got.eigenvalues[0] == pytest.approx(whole.eigenvalues[0], abs=close * whole.scale[0])
    for field in ("negative", "zero", "positive", "at_least", "coordinates", "orbit", "weakly_held", "is_minimum", "reason"):
        assert getattr(got, field)[0] == getattr(whole, field)[0], field
    for field in ("scale", "trace", "frobenius"):
        assert getattr(got, field)[0] == pytest.approx(getattr(whole, field)[0], rel=1e-11)
    assert whole.trace[0] == pytest.approx(whole.eigenvalues[0].sum(), rel=1e-12)
    assert whole.frobenius[0] == pytest.approx(np.linalg.norm(whole.eigenvalues[0]), rel=1e-12)
    assert got.residual[0] < 1e-11
    assert got.null_is_orbit[0] == whole.null_is_orbit[0]
    assert name not in ("saddle", "plain saddle", "plain zero") or got.negative[0] > 0
    assert name not in ("minimum", "pairs", "plain minimum", "unequal") or got.is_minimum[0] == 1


def test_a_deep_chain_is_as_unstable_as_its_core() -> None:
    """L >= 2: width beyond the rank adds no negative eigenvalue; L = 1: d - r of them for each slope above sqrt(lam_h lam_w)."""
    for L, code, lam in [(2, points.dnc(6), 0.12), (3, points.blocks([4, 2]), 0.07), (1, points.pairs(4), 0.05)]:
        M = points.at(code, lam, L).M
        K, r = code.classes, int(points.at(code, lam, L).rank)
        index = [hessian(linear(K, L, d, lam), balanced_factors(M, d, L)).negative[0] for d in (r, r + 1, r + 5, 300)]
        steps = np.diff(index)
        slopes = np.linalg.svd(ufm.objective.objective(linear(K, L, K, lam)).slope(balanced_factors(M, K, L))[0] / K, compute_uv=False)
        added = np.sum(slopes > lam * (1 + 1e-9)) if L == 1 else 0
        assert steps.tolist() == [added, 4 * added, (295 - r) * added]
        assert index[0] + (L == 1) > 0


def test_wide_chains_list_the_lowest() -> None:
    """K = 10, L = 2, d = 400: 168 000 coordinates counted exactly, the 1500 lowest eigenvalues listed, the sums of all."""
    lam, M = dnc(10, 2, 4.0)
    got = hessian(linear(10, 2, 400, lam), balanced_factors(M, 400, 2))
    known = known_spectrum(10, 2, 400, 4.0) * lam
    assert got.eigenvalues[0] == pytest.approx(known[:1500], abs=1e-13 * known[-1])
    assert (got.negative[0], got.zero[0]) == (0, deep.orbit_dimension(9, 2, 400))
    assert got.positive[0] + got.zero[0] == got.coordinates[0] == len(known)
    assert got.trace[0] == pytest.approx(known.sum(), rel=1e-12)
    assert got.frobenius[0] == pytest.approx(np.linalg.norm(known), rel=1e-12)
    assert got.is_minimum[0] == 1


@over("code", [points.pairs(8), points.blocks([6, 2])], ids=["pairs", "blocks"])
def test_a_large_core_goes_through_lanczos(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for a dense core the lowest eigenvalues at width r and all others give the same counts and verdict."""
    for share in (0.1, 0.99):
        lam = share * points.largest(code, 3)
        problem, factors = linear(8, 3, 10, lam), balanced_factors(points.at(code, lam, 3).M, 10, 3)
        whole = hessian(problem, factors)
        with monkeypatch.context() as patch:
            patch.setattr("ufm.landscape.reduction.CORE", 10)
            some = hessian(problem, factors, method="reduced")
        for name in ("negative", "zero", "positive", "orbit", "is_minimum", "reason"):
            assert getattr(some, name)[0] == getattr(whole, name)[0], name
        listed = some.eigenvalues[0]
        assert len(listed) >= whole.zero[0] + whole.negative[0]
        assert listed == pytest.approx(whole.eigenvalues[0, : len(listed)], abs=1e-11 * whole.scale[0])
        assert np.isnan(some.trace[0])
        assert whole.negative[0] > 0 or share < 0.5


def test_where_the_reduction_does_not_hold() -> None:
    """Not stationary, or more than a clear rank: NaN and a reason from "reduced", another method from "auto"."""
    problem = linear(4, 2, 7, 0.01)
    random, tiny = catalog.factors(problem), [1e-20 * f for f in catalog.factors(problem)]
    for factors, says in ((random, "not stationary"), (tiny, "do not share one clear rank")):
        got = hessian(problem, factors, method="reduced")
        assert np.isnan([got.negative[0], got.zero[0], got.positive[0], got.scale[0], got.trace[0]]).all()
        assert got.eigenvalues.shape == (1, 0)
        assert says in got.reason[0]
        assert hessian(problem, factors).method[0] == "dense"


def test_an_end_point_s_rank_is_taken_as_clear() -> None:
    """Solved to 1e-7 only: the residual says how far the point of clear rank is, and the counts are those of the solution to 1e-12."""
    problem = linear(6, 2, 9, 0.01)
    rough = hessian(problem, ufm.solve(problem, method="lbfgs", runs=4, seed=3, tol=1e-7).factors)
    fine = hessian(problem, ufm.solve(problem, method="lbfgs", runs=4, seed=3, tol=1e-12).factors)
    assert np.all(rough.method == "reduced")
    assert np.all((rough.residual > fine.residual) & (rough.residual < 1e-6))
    for name in ("negative", "zero", "positive", "is_minimum"):
        assert np.array_equal(getattr(rough, name), getattr(fine, name))


# --- by other means ------------------------------------------------------------------------------------------------------------------


def middle_sized() -> list[tuple[str, ufm.Problem, list[Any], bool]]:
    """(name, problem, factors, whether every eigenvalue below the listed ones can be counted) for Lanczos."""
    lam, M = dnc(6, 2, 1.5)
    low, N = dnc(6, 2, 6.0)
    zero = replace(linear(6, 2, 8, 0.01), lam_w=[[0.01, 0.02]])
    low_rank = linear(5, 2, 6, 0.01)
    indefinite = linear(6, 1, 8, 0.05)
    nothing = [np.zeros_like(f) for f in catalog.factors(indefinite)]
    return [
        ("saddle", linear(6, 2, 8, lam), balanced_factors(M, 8, 2), True),
        ("minimum", linear(6, 2, 8, low), balanced_factors(N, 8, 2), True),
        ("definite", zero, [np.zeros_like(f) for f in catalog.factors(zero)], True),
        ("many", indefinite, nothing, True),
        ("threshold", linear(4, 2, 6, dnc(4, 2, 4 / 3)[0]), balanced_factors(dnc(4, 2, 4 / 3)[1], 6, 2), True),
        ("random", low_rank, catalog.factors(low_rank), True),
    ]


@over(("name", "problem", "factors", "counted"), middle_sized(), ids=["saddle", "minimum", "definite", "many", "threshold", "random"])
def test_lanczos_is_dense(name: str, problem: ufm.Problem, factors: Any, counted: bool) -> None:
    """The listed eigenvalues are the lowest ones, copies and all; the negative count is that of the whole matrix, the rest NaN or exact."""
    whole = hessian(problem, factors, method="dense")
    assert name == "random" or whole.gradient_norm[0] < 1e-13
    some = hessian(problem, factors, method="lanczos", lowest=8)
    listed = some.eigenvalues[0]
    assert (some.method[0], whole.method[0]) == ("lanczos", "dense")
    for name in ("trace", "frobenius"):
        assert np.isnan(getattr(some, name)[0]) or getattr(some, name)[0] == pytest.approx(getattr(whole, name)[0], rel=1e-12)
    assert len(listed) >= whole.negative[0]
    assert listed == pytest.approx(whole.eigenvalues[0, : len(listed)], abs=1e-12 * whole.scale[0])
    assert some.negative[0] == whole.negative[0] == some.at_least[0]
    assert some.scale[0] == pytest.approx(whole.scale[0], rel=0.05)
    assert some.residual[0] < 1e-12
    assert some.asymmetry[0] < 1e-14
    assert np.isnan(whole.residual[0])
    assert some.orbit[0] == whole.orbit[0]
    assert np.isnan(some.zero[0]) == np.isnan(some.positive[0]) == (not counted)
    if counted:
        assert (some.zero[0], some.positive[0]) == (whole.zero[0], whole.positive[0])
    assert np.array_equal(some.is_minimum, whole.is_minimum, equal_nan=True)
    assert name != "minimum" or some.is_minimum[0] == 1


def test_too_many_negative_ones_are_a_lower_bound() -> None:
    """Where the runs end before the negative eigenvalues do, the count is NaN and at_least says how many were seen."""
    problem = linear(6, 1, 8, 0.05)
    got = hessian(problem, [np.zeros_like(f) for f in catalog.factors(problem)], method="lanczos", lowest=1)
    assert np.isnan(got.negative[0])
    assert 0 < got.at_least[0] < 40
    assert got.is_minimum[0] == 0
    assert "at least" in got.reason[0]


@over(("name", "longest"), [("saddle", 40), ("minimum", 16)])
def test_an_unfinished_lanczos_run_claims_no_count(name: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short, it lists nothing and counts nothing; Ritz values below zero still prove a saddle, and nothing proves a minimum."""
    monkeypatch.setattr("ufm.landscape.krylov.LONGEST", longest)
    problem, factors = next(case[1:3] for case in middle_sized() if case[0] == name)
    got = hessian(problem, factors, method="lanczos", lowest=8)
    assert np.all(np.isnan([got.negative, got.zero, got.positive]))
    assert got.eigenvalues.shape == (1, 0)
    assert got.at_least[0] <= hessian(problem, factors, method="dense").negative[0]
    assert (got.at_least[0] > 0) == (name == "saddle")
    assert got.is_minimum[0] == 0 if name == "saddle" else np.isnan(got.is_minimum[0])
    assert ("at least" if name == "saddle" else "did not converge") in got.reason[0]


def test_lanczos_is_the_same_each_time() -> None:
    """Equal seeds give equal bits; auto takes Lanczos for large problems and dense matrices for small ones, where no reduction is known."""
    lam, M = dnc(4, 2, 3.0)
    problem, factors = linear(4, 2, 38, lam), balanced_factors(M, 38, 2)
    first, second = (hessian(problem, factors, lowest=4, method="lanczos") for _ in range(2))
    assert first.method[0] == "lanczos"
    moved = [1.01 * f for f in factors]
    assert hessian(problem, moved, lowest=4).method[0] == "lanczos"
    assert first.negative[0] == 0
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert hessian(linear(3, 1, 3, 0.01), catalog.factors(linear(3, 1, 3, 0.01))).method[0] == "dense"


PAIRED = [(n, p) for n, p in PROBLEMS if p.cells == 2 and p.loss.name != "autograd"]
GRIDS = [(n, p) for n, p in PAIRED if p.features == "relu"][:3] + PAIRED[:3]


@over(("name", "problem"), GRIDS, ids=[n for n, _ in GRIDS])
def test_a_batch_is_its_runs(name: str, problem: ufm.Problem) -> None:
    """Runs are cell-major and independent: each alone with its cell gives the same numbers."""
    factors = catalog.factors(problem, runs=2)
    if problem.features == "relu":
        factors[0][2, 0, 0] = 0.0
    got = hessian(problem, factors)
    for b in range(4):
        one = hessian(problem.cell(b // 2), [f[b : b + 1] for f in factors])
        for f in fields(Spectrum):
            a, alone = getattr(got, f.name), getattr(one, f.name)
            if f.name == "eigenvalues":
                assert a[b, : alone.shape[1]] == pytest.approx(alone[0], abs=1e-15)
            elif f.name in ("reason", "negative", "zero", "positive", "at_least", "coordinates", "orbit", "weakly_held", "is_minimum"):
                assert np.array_equal(a[b], alone[0], equal_nan=a.dtype.kind == "f")


def test_torch_tensors_and_files(tmp_path: Path) -> None:
    """Factors of torch give the same spectrum, and a spectrum is saved and loaded bit for bit."""
    torch = pytest.importorskip("torch")
    problem = dict(PROBLEMS)["free-means-linear1-b0.0-ce_adjusted-G2K3"]
    factors = catalog.factors(problem)
    got = hessian(problem, [torch.tensor(f) for f in factors])
    got.save(tmp_path / "spectrum.npz")
    back = Spectrum.load(tmp_path / "spectrum.npz")
    for f in fields(Spectrum):
        for other in (back, hessian(problem, factors)):
            assert np.array_equal(getattr(got, f.name), getattr(other, f.name), equal_nan=f.name not in ("method", "reason"))


SMALL = ufm.Problem([1, 1], width=2, features="free", lam_w=0.1, lam_h=0.1)
POINT = catalog.factors(SMALL)
RELU = ufm.Problem([1, 1], width=2, depth=2, features="free", activation="relu", lam_w=0.1, lam_h=0.1)


@over(
    ("call", "says"),
    [
        (lambda: hessian(SMALL, POINT, method="svd"), "hessian: method is 'svd', but must be one of 'auto', 'reduced'"),
        (lambda: hessian(RELU, catalog.factors(RELU), method="reduced"), "hessian: method='reduced' needs a linear chain"),
        (lambda: hessian(SMALL, POINT, lowest=0), "hessian: lowest is 0, but must be a whole number"),
        (lambda: hessian(SMALL, POINT, zero=0.5), "hessian: zero is 0.5, but must be a share"),
        (lambda: hessian(SMALL, POINT[:1]), "hessian: the factors have shapes"),
        (lambda: hessian(SMALL, [np.nan * f for f in POINT]), "hessian: the factors hold NaN"),
        (lambda: hessian("SMALL", POINT), "hessian: problem is 'SMALL'"),
    ],
)
def test_bad_input_is_told(call: Callable[[], Any], says: str) -> None:
    """Each refusal names the call, the value got and the rule."""
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert says in str(error.value)
