"""Every catalogued point through the objective itself, by balanced factors; tied codes against their general form; who wins where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from deep_oracle import cross_entropy, problem, value_and_gradient_norm
from oracle import mp
from ufm.theory import cross_entropy as plain_theory
from ufm.theory import deep
from ufm.theory import deep_points as points
from ufm.theory.deep_codes import Code, Tied

Floats = NDArray[np.float64]

CATALOGUE: dict[str, Code | Tied] = {
    "dnc2": points.dnc(2),
    "dnc3": points.dnc(3),
    "dnc9": points.dnc(9),
    "pairs4": points.pairs(4),
    "pairs10": points.pairs(10),
    "cross-polytope": points.cross_polytope(6),
    "2,8": points.blocks([2, 8]),
    "2,2,6": points.blocks([2, 2, 6]),
    "5,3,2,1": points.blocks([5, 3, 2, 1]),
    "2,1": points.blocks([2, 1]),
    "5-gon": points.polygon(5),
    "8-gon": points.polygon(8),
    "T4": points.rectified_simplex(4),
    "T5": points.rectified_simplex(5),
    "icosahedron": points.icosahedron(),
    "antiprism": points.square_antiprism(),
    "relaxed3": points.relaxed_pairs(3),
    "relaxed5": points.relaxed_pairs(5),
    "relaxed9": points.relaxed_pairs(9),
    "zero": points.zero(4),
}
LONELY = ("5,3,2,1", "2,1")  # a class alone has a slope of order 1 that cancels only to rounding


def unequal(lam: float, n: int, L: int) -> tuple[list[float], float]:
    """lam_w, lam_h of effective level lam, two decades apart."""
    tilt = 10.0 ** np.linspace(-1, 1, L + 1)
    return list(lam * tilt[:-1]), float(lam * tilt[-1] / n)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("L", [1, 2, 3, 6])
def test_critical_through_the_objective(name: str, L: int) -> None:
    """Scale-free gradient norm <= 1e-12 and the closed-form value to 1e-13, for several n, widths, frames and unequal penalties."""
    code, K = CATALOGUE[name], CATALOGUE[name].classes
    top = points.largest(code, L) if isinstance(code, Code) else 0.5 / K
    top = 0.1 if np.isinf(top) else top
    rng = np.random.default_rng(L)
    for share, n, extra in ((1e-25, 3, 0), (1e-8, 1, 2), (1e-2, 5, 0), (0.7, 2, 3)):
        if name in LONELY and share < 1e-2:
            continue
        lam_w, lam_h = unequal(share * top, n, L)
        lam = float(deep.lambda_eff(n, lam_h, lam_w))
        assert lam == pytest.approx(share * top, rel=1e-14)
        branches = ("large",) if isinstance(code, Tied) or L == 1 or share < 1e-10 else ("large", "small")
        for branch in branches:
            point = points.at(code, lam, L, branch)  # type: ignore[arg-type]
            factors = deep.balanced_factors(point.M, n, lam_h, lam_w, K + extra, rng if extra else None)
            assert [x.shape for x in factors] == [(K + extra, K), *[(K + extra, K + extra)] * (L - 1), (K, K + extra)]
            value, gradient = value_and_gradient_norm(problem(K, n, K + extra, lam_w, lam_h), factors)
            assert value == pytest.approx(float(point.value), rel=1e-13)
            assert np.linalg.matrix_rank(point.M, tol=1e-9 * np.abs(point.M).max()) == point.rank if point.rank else not point.M.any()
            assert deep.value(point.M, lam, L) == pytest.approx(float(point.value), rel=1e-13)
            if point.rank:
                assert gradient <= 1e-12
                assert deep.residual(point.M, lam, L) <= 1e-12
                assert deep.residual(1.001 * point.M, lam, L) > 1e-5
            else:
                assert gradient == 0 == deep.residual(point.M, lam, L)


@pytest.mark.parametrize("name", ["dnc9", "pairs10", "2,2,6", "relaxed5", "antiprism", "zero"])
def test_vectorised_over_lambda(name: str) -> None:
    lam = np.array([[1e-30, 1e-9], [1e-3, 1e-2]])
    many = points.at(CATALOGUE[name], lam, 3)
    K = CATALOGUE[name].classes
    assert many.M.shape == (2, 2, K, K)
    for i in np.ndindex(2, 2):
        one = points.at(CATALOGUE[name], lam[i], 3)
        for field in ("M", "scales", "value", "fit", "penalty"):
            assert getattr(many, field)[i] == pytest.approx(getattr(one, field), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize(("name", "L"), [("relaxed5", 2), ("relaxed9", 3), ("relaxed3", 2), ("antiprism", 4), ("antiprism", 2)])
@pytest.mark.parametrize("lam", [1e-30, 1e-6, 1e-2])
def test_tied_values_at_50_digits(name: str, L: int, lam: float) -> None:
    """Value against mpmath's cross-entropy and singular values of the document's form of M."""
    point = points.at(CATALOGUE[name], lam, L)
    x = [mp.mpf(float(s)) for s in point.scales]
    K = CATALOGUE[name].classes
    if name == "antiprism":
        angle = [mp.pi * k / 2 for k in range(4)] + [mp.pi * k / 2 + mp.pi / 4 for k in range(4)]
        M = mp.matrix(
            [[x[0] / 4 * mp.cos(angle[i] - angle[j]) + x[1] / 8 * (1 if i // 4 == j // 4 else -1) for j in range(8)] for i in range(8)]
        )
    else:
        t, alpha, w = x
        pair = [[(1 if i == j else -1) if i // 2 == j // 2 and max(i, j) < K - 1 else 0 for j in range(K)] for i in range(K)]
        v = [-alpha] * (K - 1) + [w]
        M = mp.matrix([[t / 2 * pair[i][j] + ((i == K - 1) - mp.mpf(1) / K) * v[j] for j in range(K)] for i in range(K)])
    singular = [s for s in mp.svd_r(M, compute_uv=False) if s > mp.mpf(10) ** -30]
    assert len(singular) == point.rank
    exact = cross_entropy(M) + mp.mpf(lam) / 2 * (L + 1) * sum(s ** (mp.mpf(2) / (L + 1)) for s in singular)
    assert abs(mp.mpf(float(point.value)) - exact) <= 1e-14 * exact


@pytest.mark.parametrize("K", [3, 5, 9])
@pytest.mark.parametrize("L", [2, 3])
def test_relaxed_pairs_minimise_the_general_form(K: int, L: int) -> None:
    """M = (t/2) pairs + s u v^T with free angles x, y: no small change of (t, s, x, y) lowers F, a few raise it, and each is stationary."""
    m, lam = K // 2, 1e-4
    point = points.at(points.relaxed_pairs(K), lam, L)
    t, alpha, w = point.scales
    unit = np.sqrt(1 - 1 / K)
    s = unit * np.hypot(w, np.sqrt(2 * m) * alpha)
    pair = np.kron(np.eye(m), [[1.0, -1], [-1, 1]])

    def form(z: Floats) -> Floats:
        u, v = (np.append(np.full(2 * m, np.cos(a) / np.sqrt(2 * m)), np.sin(a)) for a in z[2:])
        return np.asarray(np.pad(z[0] / 2 * pair, (0, 1)) + z[1] * np.outer(u, v))

    best = np.array([t, s, np.arctan2(unit, -np.sqrt(2 * m) / K), np.arctan2(w, -np.sqrt(2 * m) * alpha)])
    best[2] = np.arctan2((1 - 1 / K) / unit, -np.sqrt(2 * m) / K / unit)
    assert form(best) == pytest.approx(point.M, rel=1e-12, abs=1e-12)
    F = float(deep.value(point.M, lam, L))
    for direction in np.concatenate([np.eye(4), np.random.default_rng(0).standard_normal((20, 4))]):
        for step in (1e-3, -1e-3):
            assert deep.value(form(best + step * direction), lam, L) > F
        slope = (deep.value(form(best + 1e-5 * direction), lam, L) - deep.value(form(best - 1e-5 * direction), lam, L)) / 2e-5
        assert abs(slope) < 1e-4 * lam


def test_relaxed_pairs_beat_the_unrelaxed() -> None:
    """Below the centred witness (one scale, the lone column beta (e_K - 1/K)), which is below the published one."""
    for K, L, lam in ((5, 2, 1e-4), (7, 3, 1e-3), (9, 6, 1e-6)):
        beta = np.linspace(0.5, 3, 40) * np.log(1 / lam)
        published = np.zeros((40, K, K))
        published[:, :-1, :-1] = np.kron(np.eye(K // 2), [[1.0, -1], [-1, 1]])
        published[:, -1, -1] = 1
        centred = published.copy()
        centred[:, :-1, -1] = -1 / K
        centred[:, -1, -1] = 1 - 1 / K
        values = [deep.value(beta[:, None, None] * P, lam, L).min() for P in (published, centred)]
        assert points.at(points.relaxed_pairs(K), lam, L).value < values[1] < values[0]


def test_where_tied_codes_exist() -> None:
    """From 1e-30 on without a gap up to some penalty, none above it: the value grows and scales shrink along the branch."""
    lam = np.geomspace(1e-30, 0.3, 400)
    for code in (*(points.relaxed_pairs(K) for K in (3, 5, 9, 101)), points.square_antiprism()):
        for L in (2, 5, 20):
            found = points.levels(code, lam, L)
            there = ~np.isnan(found.value)
            last = int(np.flatnonzero(there)[-1])
            assert there[: last + 1].all()
            assert lam[last] > 0.3 * points.largest(points.dnc(code.classes), L)
            assert np.all(np.diff(found.value[there]) > 0)


SAME: dict[str, tuple[Callable[[], Code | Tied], Callable[[], Code | Tied]]] = {
    "triangle is DNC": (lambda: points.polygon(3), lambda: points.dnc(3)),
    "T(3) is DNC": (lambda: points.rectified_simplex(3), lambda: points.dnc(3)),
    "square is two pairs": (lambda: points.polygon(4), lambda: points.pairs(4)),
    "T(4) is three pairs": (lambda: points.rectified_simplex(4), lambda: points.pairs(6)),
    "two classes: a pair is DNC": (lambda: points.pairs(2), lambda: points.dnc(2)),
}


@pytest.mark.parametrize("name", SAME)
def test_coincidences(name: str) -> None:
    lam = np.array([1e-20, 1e-6, 1e-2])
    one, other = (make() for make in SAME[name])
    for L in (1, 2, 5):
        a, b = points.at(one, lam, L), points.at(other, lam, L)
        assert a.value == pytest.approx(b.value, rel=1e-13)
        assert a.rank == b.rank
        if other.name.startswith("DNC"):
            assert np.array_equal(a.index, b.index)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6, 8, 10, 12])
def test_depth_one_is_dnc(K: int) -> None:
    """At L = 1 DNC has the value of the convex theory and no catalogued code is below it, up to lambda = 1/K."""
    lam = np.array([1e-12, 1e-6, 1e-3, 0.3 / K, 0.9 / K])
    dnc = points.levels(points.dnc(K), lam, 1).value
    assert dnc == pytest.approx(plain_theory.balanced_value(K, 1, lam, lam), rel=1e-13)
    for code in points.candidates(K)[1:]:
        other = points.levels(code, lam, 1).value
        assert np.all(~(other < dnc * (1 - 1e-13)))
    assert np.isnan(points.levels(points.dnc(K), 1 / K, 1).value)


def test_two_classes() -> None:
    """K = 2: DNC below zero until the penalty makes zero better; no strip, no unstable direction on the large root."""
    for L in (2, 3, 10):
        lam = np.array([1e-20, 1e-5, 1e-2])
        point = points.at(points.dnc(2), lam, L)
        assert np.all(point.value < np.log(2))
        assert np.array_equal(point.index, [0, 0, 0])  # type: ignore[arg-type]


def test_partial_solutions_near_the_top() -> None:
    """K = 3, L = 5, lambda_eff = 0.1: a pair and a class at zero is below both DNC and zero."""
    partial = float(points.at(points.blocks([2, 1]), 0.1, 5).value)
    assert partial < min(float(points.at(points.dnc(3), 0.1, 5).value), np.log(3))
