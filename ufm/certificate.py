"""What a point is proven to be worth: stationarity, a dual bound, and from it the relative gap to the infimum over all widths.

For L = 1 and a convex loss, any slopes q_k = -(n_k/N) g_k with dual norm gamma°(Q D^{-1/2}) <= sqrt(lam_w lam_h) prove

    F* >= -sum_k (n_k/N) loss*(g_k) - ||sum_k q_k||^2/(2 lam_b)      (free bias: sum_k q_k = 0 instead; no bias: no such term)

gamma° is the spectral norm without ReLU, and rho = max {||Qt v|| : v >= 0, ||v|| = 1} with it
(the convex form of the ReLU model of Dang et al. 2024).
Deep linear MSE has von Neumann's bound. Everything else is NaN: not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, to_numpy
from ufm.coordinates import balanced
from ufm.losses import ConvexLoss, Targets
from ufm.objective import objective
from ufm.problem import Problem
from ufm.records import Certificate, Regime

Floats = NDArray[np.float64]

ENUMERATED = 15  # largest component whose supports are all tried
SAME = 1e-5  # logits that differ by less than this share of the largest are one prediction
ZERO = 1e-6  # mean features shorter than this share of the longest are zero


class Dual(NamedTuple):
    """The dual side of a batch of points: lower (B,) bound, rho (B,), bound (B,) names, atoms: one array (a, K) of violating v per run."""

    lower: Floats
    rho: Floats
    bound: NDArray[np.str_]
    atoms: list[Floats]
    Qt: Floats


def certify(problem: Problem, factors: Sequence[Array]) -> Certificate:
    """The certificate of every run; factors (H, W_1, ..., W_L[, b]) with B = G * runs first axes, cell-major, on any device.

    ValueError where the factors do not fit the problem. A point that cannot be proven has gap and lower NaN, and says why in `bound`.
    """
    rows, points = per_run("certify", problem, factors)
    value = objective(rows).value(points)
    frame = balanced(rows)
    norms = frame.scale_free_norm(frame.from_factors(points))
    dual = dual_bound(rows, points)
    regime, collapsed = regimes(rows, points, value)
    return Certificate(value, dual.lower, relative_gap(value, dual.lower), norms, dual.rho, dual.bound, regime, collapsed)


def per_run(call: str, problem: Problem, factors: Sequence[Array]) -> tuple[Problem, tuple[Floats, ...]]:
    """The problem with one cell per run, and the factors in numpy; the door of every call that takes factors, named in its errors."""
    if not isinstance(problem, Problem):
        raise TypeError(f"{call}: problem is {problem!r}, but must be a ufm.Problem")
    try:
        points = tuple(np.asarray(to_numpy(f), dtype=np.float64) for f in factors)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{call}: factors is {factors!r:.60}, but must be the arrays (H, W_1, ..., W_L[, b])") from error
    chain = objective(problem.pick([0])).chain
    shapes = chain.shapes(problem.width, problem.classes, problem.labels.shape[1])
    got = [p.shape for p in points]
    if len(points) != len(shapes) or any(len(g) != 3 or g[1:] != s or g[0] != got[0][0] for g, s in zip(got, shapes, strict=False)):
        raise ValueError(f"{call}: the factors have shapes {got}, but the problem needs {[('B', *s) for s in shapes]}, the same B for all")
    batch = got[0][0]
    if batch == 0 or batch % problem.cells:
        raise ValueError(f"{call}: the factors hold {batch} runs, but the problem {problem.cells} cells; give as many runs for each")
    if not all(np.all(np.isfinite(p)) for p in points):
        raise ValueError(f"{call}: the factors hold NaN or infinity; give finite points")
    if problem.features == "relu" and np.any(points[0] < 0):
        raise ValueError(f"{call}: the features hold negative entries, but features='relu' asks for H >= 0")
    return problem.pick(np.repeat(np.arange(problem.cells), batch // problem.cells)), points


def relative_gap(value: Floats, lower: Floats) -> Floats:
    """(value - lower)/value; 0 for a negative gap of rounding size, NaN below (a bound that fails is no proof)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = 1.0 - lower / value
    return np.where(gap >= 0, gap, np.where(gap > -1e-13, 0.0, np.nan))


def dual_bound(rows: Problem, points: Sequence[Floats]) -> Dual:
    """The lower bound each point of a one-run-per-cell problem proves."""
    B, K = rows.counts.shape
    nothing = Dual(np.full(B, np.nan), np.full(B, np.nan), np.full(B, ""), [np.zeros((0, K))] * B, np.zeros((B, K, K)))
    if rows.depth == 1 and isinstance(rows.loss, ConvexLoss):
        return _convex_bound(rows, rows.loss, points)
    if rows.depth > 1 and rows.loss.name == "MSE" and rows.activation == "linear":
        penalties = np.concatenate([rows.lam_h[:, None], rows.lam_w], axis=1)
        cells, each = np.unique(np.concatenate([rows.counts, penalties], axis=1), axis=0, return_inverse=True)
        bounds = np.array([_von_neumann(c[: rows.classes], c[rows.classes :], rows.lam_b is not None) for c in cells])
        return nothing._replace(lower=bounds[each.reshape(-1)], bound=np.full(B, "von Neumann"))
    reason = "loss not known to be convex" if rows.depth == 1 else "no bound for this depth and loss"
    return nothing._replace(bound=np.full(B, reason))


def _convex_bound(rows: Problem, loss: ConvexLoss, points: Sequence[Floats]) -> Dual:
    """Fenchel duality at the class averages of the slopes (exact for columns that are samples, too: NC1 holds at the optimum).

    Where the bias is free, or its penalty so small that the bias term would eat the bound, the slopes are recentred first.
    """
    slopes = objective(rows).slope(points) @ _membership(rows, 1.0)  # (B, K, K)
    if rows.lam_b is None:
        return _fenchel(rows, loss, slopes)
    weight = rows.counts / rows.samples[:, None]
    recentred, free = loss.recentre(slopes, _targets(rows, loss), weight), rows.lam_b == 0
    with np.errstate(over="ignore"):
        term = np.sum(np.sum(weight[:, None, :] * slopes, axis=2) ** 2, axis=1) / (2 * np.where(free, np.inf, rows.lam_b))
    first = _fenchel(rows, loss, np.where(free[:, None, None], recentred, slopes), term)
    if not np.any(term > first.lower):
        return first
    second = _fenchel(rows, loss, recentred)
    use = second.lower > first.lower
    return Dual(
        np.where(use, second.lower, first.lower),
        np.where(use, second.rho, first.rho),
        np.where(use, second.bound, first.bound),
        [b if u else a for a, b, u in zip(first.atoms, second.atoms, use, strict=True)],
        np.where(use[:, None, None], second.Qt, first.Qt),
    )


def _fenchel(rows: Problem, loss: ConvexLoss, slopes: Floats, bias_term: Floats | float = 0.0) -> Dual:
    """The bound that class slopes (B, K, K) prove once scaled into the dual ball; bias_term is ||sum_k q_k||^2/(2 lam_b) before scaling."""
    n, N = rows.counts.astype(np.float64), rows.samples[:, None].astype(np.float64)
    weight = n / N
    limit = np.sqrt(rows.lam_w[:, 0]) * np.sqrt(rows.lam_h)
    Qt = -slopes * (np.sqrt(n) / N)[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        Qt = np.where(Qt == 0, 0.0, Qt / limit[:, None, None])
    rho, bound, atoms = dual_norm(Qt, rectified=rows.features != "free")
    feasible = slopes / np.maximum(rho, 1.0)[:, None, None]
    lower = -np.sum(weight * loss.conjugate(feasible, _targets(rows, loss)), axis=1) - bias_term / np.maximum(rho, 1.0) ** 2
    return Dual(lower, rho, bound, atoms, Qt)


def _targets(rows: Problem, loss: ConvexLoss) -> Targets:
    """The targets of one column per class."""
    return loss.targets(np.broadcast_to(np.eye(rows.classes), (rows.cells, rows.classes, rows.classes)), rows.counts)


def _membership(rows: Problem, power: float) -> Floats:
    """(m_c/n_k)^power where column c is of class k, else 0, (B, cols, K): averages over a class for power 1."""
    n = np.take_along_axis(rows.counts.astype(np.float64), rows.labels, axis=1)
    return np.asarray(np.eye(rows.classes)[rows.labels] * ((rows.multiplicity / n) ** power)[:, :, None])


def dual_norm(Qt: Floats, rectified: bool) -> tuple[Floats, NDArray[np.str_], list[Floats]]:
    """(rho, how it was bounded, atoms v (a, K) with ||Qt v|| > 1) for Qt (B, K, K) in units of the limit; exact or an upper bound."""
    finite = np.all(np.abs(Qt) < 1e150, axis=(1, 2))  # beyond, products overflow and nothing is proven
    Qt = np.where(finite[:, None, None], Qt, 0.0)
    if not rectified:
        _, s, Vt = np.linalg.svd(Qt)
        atoms = [Vt[i, s[i] > 1.0] for i in range(len(Qt))]
        return np.where(finite, s[:, 0], np.inf), np.full(len(Qt), "spectral (exact)"), atoms
    A = np.swapaxes(Qt, 1, 2) @ Qt
    results = [copositive_norm(a) for a in A]
    rho = np.sqrt([r[0] for r in results])
    return np.where(finite, rho, np.inf), np.array([r[1] for r in results]), [r[2] for r in results]


def copositive_norm(A: Floats) -> tuple[float, str, Floats]:
    """(max {v'Av : v >= 0, ||v|| = 1} or an upper bound of it, its name, unit atoms v (a, K) with v'Av > 1), A (K, K) psd.

    Classes split into the components of the graph A_kl > 0: products across components only lower v'Av, so the maximum is that of a
    component. In a component without negative entries it is the largest eigenvalue (Perron). Otherwise the largest eigenvalue of
    max(A, 0) bounds it from above, exactly where projected power iterations reach it; else a small one is searched over all supports.
    """
    K = len(A)
    diagonal = np.diagonal(A)
    positive = A > 1e-15 * diagonal.max(initial=0.0)
    np.fill_diagonal(positive, False)
    atoms = [np.eye(K)[k] for k in np.flatnonzero(diagonal > 1.0)]
    if not positive.any():
        return float(diagonal.max()), "signs (exact)", np.array(atoms).reshape(-1, K)
    best, name = 0.0, "signs (exact)"
    for members in _components(positive):
        part = A[np.ix_(members, members)]
        value, how, v = _component_norm(part)
        if value > 1.0:
            atom = np.zeros(K)
            atom[members] = v
            atoms.append(atom)
        best = max(best, value)
        name = how if RANK[how] > RANK[name] else name
    return best, name, np.array(atoms).reshape(-1, K)


RANK = {"signs (exact)": 0, "positive part (exact)": 1, "supports (exact)": 2, "positive part (upper bound)": 3}


def _component_norm(A: Floats) -> tuple[float, str, Floats]:
    s, V = np.linalg.eigh(np.maximum(A, 0.0))
    upper, perron = float(s[-1]), np.abs(V[:, -1])
    if np.all(A >= 0):
        return upper, "signs (exact)", perron
    v = _ascend(A, perron)
    if upper <= float(v @ A @ v) * (1 + 1e-13):
        return upper, "positive part (exact)", v
    if len(A) <= ENUMERATED:
        value, v = _best_support(A)
        return value, "supports (exact)", v
    return upper, "positive part (upper bound)", v


def _components(adjacent: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    reach = adjacent | np.eye(len(adjacent), dtype=bool)
    while True:
        further = reach @ reach
        if np.array_equal(further, reach):
            return [np.flatnonzero(row) for i, row in enumerate(reach) if row.argmax() == i]
        reach = further


def _best_support(A: Floats) -> tuple[float, Floats]:
    """The largest leading eigenvalue among the principal submatrices whose leading eigenvector is nonnegative: exact."""
    K = len(A)
    best, witness = -np.inf, np.zeros(K)
    for size in range(1, K + 1):
        supports = np.array(list(combinations(range(K), size)))
        s, V = np.linalg.eigh(A[supports[:, :, None], supports[:, None, :]])
        lead = np.where(V[:, :, -1].sum(axis=1, keepdims=True) < 0, -V[:, :, -1], V[:, :, -1])
        values = np.where(np.all(lead >= -1e-9, axis=1), s[:, -1], -np.inf)
        at = int(values.argmax())
        if values[at] > best:
            best, witness = float(values[at]), np.zeros(K)
            witness[supports[at]] = np.maximum(lead[at], 0.0)
    witness /= np.linalg.norm(witness)
    return best, witness


def _ascend(A: Floats, v: Floats) -> Floats:
    """Projected power iterations v <- (Av)_+ normalised, until they stand still: v'Av never falls."""
    for _ in range(1000):
        new: Floats = np.maximum(A @ v, 0.0)
        new /= np.linalg.norm(new)
        if np.max(np.abs(new - v)) < 1e-13:
            return new
        v = new
    return v


def _von_neumann(n: Floats, penalties: Floats, bias: bool) -> float:
    """sum_i min_s (s - sigma_i)^2/(2N) + (p/2) g s^{2/p}, p = L + 1, over the singular values of Y (with a bias: of Y with centred rows).

    ||X - Y||^2 >= sum (s_i(X) - sigma_i)^2 (von Neumann), centring raises no singular value, the Schatten reduction gives the penalty of X
    exactly, and a penalty of the bias only adds to F. n (K,) counts; penalties (p,) of all factors, g their geometric mean.
    """
    N, p, root = float(n.sum()), len(penalties), np.sqrt(n)
    Y = np.diag(root) - np.outer(n, root) / N if bias else np.diag(root)
    sigma = np.linalg.svd(Y, compute_uv=False)
    with np.errstate(divide="ignore"):
        g = float(np.exp(np.mean(np.log(penalties))))
    return float(sum(_scalar_minimum(s, N, p, g) for s in sigma))


def _scalar_minimum(sigma: float, N: float, p: int, g: float) -> float:
    """min over s in [0, sigma] of (s - sigma)^2/(2N) + (p/2) g s^{2/p}: the value at 0 or at the largest stationary point, by bisection."""

    def energy(s: float) -> float:
        return (s - sigma) ** 2 / (2 * N) + 0.5 * p * g * float(s ** (2 / p))

    def slope(s: float) -> float:
        return (s - sigma) / N + g * float(s ** (2 / p - 1))

    bottom = float((N * g * (1 - 2 / p)) ** (p / (2 * p - 2)))  # the slope is convex; its least value
    if g == 0:
        return 0.0
    if sigma <= 0 or slope(bottom) >= 0:
        return sigma**2 / (2 * N)
    low, high = bottom, sigma
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return min(energy(0.5 * (low + high)), sigma**2 / (2 * N))


def regimes(rows: Problem, points: Sequence[Floats], value: Floats) -> tuple[tuple[Regime, ...], NDArray[np.bool_]]:
    """The regime each point is in, and which classes have a zero mean feature (B, K)."""
    K = rows.classes
    frame = balanced(rows)
    H = frame.unpack(frame.from_factors(points))[0]
    if rows.features == "relu_of_free":
        H = np.maximum(H, 0.0)
    length = np.linalg.norm(H @ _membership(rows, 0.5), axis=1)  # (B, K)
    longest = length.max(axis=1)
    energy = 0.5 * np.sum(length**2, axis=1) * frame.unit
    nothing = energy <= 1e-14 * value
    collapsed = (length <= ZERO * longest[:, None]) | nothing[:, None]
    Z = objective(rows).logits(points) @ _membership(rows, 1.0)
    Z = Z - Z.mean(axis=1, keepdims=True)
    gram = np.swapaxes(Z, 1, 2) @ Z
    own = np.diagonal(gram, axis1=1, axis2=2)
    apart = own[:, :, None] + own[:, None, :] - 2 * gram  # squared distances, (B, K, K)
    live = ~collapsed[:, :, None] & ~collapsed[:, None, :] & ~np.eye(K, dtype=bool)
    merged = np.any(live & (apart <= SAME**2 * apart.max(axis=(1, 2), keepdims=True)), axis=(1, 2))
    return tuple(_regime(c, m) for c, m in zip(collapsed, merged, strict=True)), collapsed


def _regime(collapsed: NDArray[Any], merged: np.bool_) -> Regime:
    if collapsed.all():
        return Regime.ALL_ZERO
    if collapsed.any():
        return Regime.MINORITY_ZERO
    return Regime.MERGED if merged else Regime.DISTINCT
