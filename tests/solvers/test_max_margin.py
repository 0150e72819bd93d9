"""Codes of least Schatten norm with unit margins: the known constants, the conditions of a minimum by other means."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from ufm.solvers.max_margin import Barrier, margins, max_margin
from ufm.theory import deep

Floats = NDArray[np.float64]

# L = 2: K -> rank and R*, to four digits, found by an independent search
PRINTED = {4: (3, 3.0), 5: (4, 4.0), 6: (3, 4.762), 7: (4, 5.712), 8: (4, 6.350), 9: (5, 7.311), 10: (5, 7.937), 12: (6, 9.524)}


@pytest.mark.parametrize("K", [K if K < 7 else pytest.param(K, marks=pytest.mark.slow) for K in PRINTED])
def test_two_layers(K: int) -> None:
    """The printed table, and the catalogue's constant to 1e-13."""
    found = max_margin(K, 2, starts=4, keep=2)
    rank, R = PRINTED[K]
    assert found.rank[0] == rank
    assert found.R[0] == pytest.approx(R, abs=5e-4)
    assert found.R[0] == pytest.approx(min(deep.margin_constants(K, 2).values()), rel=1e-13)
    assert found.is_minimum[0]


SLOW = [(8, 3, False), (9, 3, True), (10, 3, False), (10, 8, False), (12, 3, True)]


@pytest.mark.parametrize(
    ("K", "depth", "below"), [(3, 5, False), (6, 3, False), (7, 4, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_never_above_the_catalogue(K: int, depth: int, below: bool) -> None:
    """At most the least constant of the catalogue; some codes without a closed form are lower."""
    found, known = max_margin(K, depth, starts=4, keep=3), min(deep.margin_constants(K, depth).values())
    assert found.R[0] <= known * (1 + 1e-13)
    assert (found.R[0] < known * (1 - 1e-4)) == below


def test_one_layer_is_convex() -> None:
    """One layer: R is the nuclear norm, convex, and its minimum is the simplex, K - 1."""
    for K in (2, 3, 6):
        found = max_margin(K, 1, starts=2)
        assert len(found.R) == 1
        assert found.R[0] == pytest.approx(K - 1, rel=1e-13)


def kkt_residual(M: Floats, rank: int, depth: int) -> float:
    """Distance of the slope of R to the cone of the active margins, in the tangent space of rank-`rank` matrices, relative."""
    K = len(M)
    U, s, Vt = np.linalg.svd(M)
    p = 2 / (depth + 1)

    def tangent(E: Floats) -> Floats:
        C = U.T @ E @ Vt.T
        C[rank:, rank:] = 0
        return C.ravel()

    slope = tangent((U[:, :rank] * p * s[:rank] ** (p - 1)) @ Vt[:rank])
    rows = []
    for c in range(K):
        for j in range(K):
            if j != c and M[c, c] - M[j, c] - 1 < 1e-9:
                E = np.zeros((K, K))
                E[c, c], E[j, c] = 1, -1
                rows.append(tangent(E))
    return float(nnls(np.array(rows).T, slope)[1] / np.linalg.norm(slope))


@pytest.mark.parametrize(("K", "depth"), [(5, 2), (6, 3), pytest.param(9, 4, marks=pytest.mark.slow)])
def test_every_code_meets_the_conditions(K: int, depth: int) -> None:
    """By hand: margins at least 1, R from the singular values, multipliers >= 0 by nonnegative least squares."""
    found = max_margin(K, depth, starts=4, keep=4)
    assert np.all(np.diff(found.R) > 0)
    for i in np.flatnonzero(found.is_minimum):
        M, r = found.M[i], found.rank[i]
        gaps = [M[c, c] - M[j, c] for c in range(K) for j in range(K) if j != c]
        assert min(gaps) == pytest.approx(1, abs=1e-13)
        assert sum(gap < 1 + 1e-9 for gap in gaps) == found.active[i]
        s = np.linalg.svd(M, compute_uv=False)
        assert s[r:].max(initial=0) < 1e-13 * s[0]
        assert found.R[i] == pytest.approx((s[:r] ** (2 / (depth + 1))).sum(), rel=1e-13)
        assert kkt_residual(M, int(r), depth) < 1e-9


@pytest.mark.parametrize(("K", "depth"), [(4, 2), (5, 2), pytest.param(5, 3, marks=pytest.mark.slow)])
def test_sequential_quadratic_programming_returns_to_the_codes(K: int, depth: int) -> None:
    """From a tilted copy of each code, SLSQP over factors A B of its rank comes back to its R."""
    found, p = max_margin(K, depth, starts=4, keep=3), 2 / (depth + 1)
    rng = np.random.default_rng(1)
    for M, r, R in zip(found.M, found.rank, found.R, strict=True):
        U, s, Vt = np.linalg.svd(M)
        start = np.concatenate([(U[:, :r] * s[:r]).ravel(), Vt[:r].ravel()])

        def matrix(x: Floats, r: int = int(r)) -> Floats:
            return x[: K * r].reshape(K, r) @ x[K * r :].reshape(r, K)

        def norm(x: Floats, r: int = int(r)) -> float:
            return float((np.linalg.svd(matrix(x), compute_uv=False)[:r] ** p).sum())

        def slack(x: Floats) -> Floats:
            gaps = margins(matrix(x))
            return np.asarray(gaps[np.isfinite(gaps)] - 1)

        end = minimize(
            norm,
            start * (1 + 0.01 * rng.standard_normal(len(start))),
            method="SLSQP",
            constraints={"type": "ineq", "fun": slack},
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert end.fun == pytest.approx(R, rel=1e-6)


def test_barrier_slope_and_curves() -> None:
    """Against differences."""
    F, rng = Barrier(0.3, 3), np.random.default_rng(0)
    X = 4 * np.eye(4) + 0.5 * rng.standard_normal((4, 4))
    E, h = rng.standard_normal((4, 4)), 1e-5
    low, high = (X + sign * h * E for sign in (-1, 1))
    assert ((F.fit(high[None]) - F.fit(low[None])) / (2 * h))[0] == pytest.approx((F.slope(X[None])[0] * E).sum(), rel=1e-7)
    change = (F.slope(high[None]) - F.slope(low[None]))[0] / (2 * h)
    curves = F.curves(X[None])
    assert np.stack([curves[:, :, c] @ E[:, c] for c in range(4)], axis=1) == pytest.approx(change, rel=1e-6)
    assert np.isinf(F.fit(-X[None])[0])


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="K is 1"):
        max_margin(1, 2)
    with pytest.raises(ValueError, match="depth is 0"):
        max_margin(3, 0)


def test_a_failing_divide_and_conquer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK's can fail on the Hessian of a symmetric code, which has few distinct eigenvalues; QR iteration gives the same code."""
    expected = max_margin(4, 2, starts=2, seed=0, keep=2)

    def fails(A: Floats) -> tuple[Floats, Floats]:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigh", fails)
    found = max_margin(4, 2, starts=2, seed=0, keep=2)
    assert found.R == pytest.approx(expected.R, rel=1e-12)
    assert found.is_minimum.tolist() == expected.is_minimum.tolist()
