"""Laws of deep linear chains, through the objective, the Hessian, the solver and the classifier at once, over the whole catalogue.

Fast: a representative part; slow (-m slow): every K <= 8, L <= 5, code, block partition, branch and side of the stability line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, pairwise, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ufm
from ufm.objective import objective
from ufm.theory import deep, deep_scale
from ufm.theory import deep_points as points
from ufm.theory import deep_stability as stability
from ufm.theory.deep_codes import Code, Tied

Floats = NDArray[np.float64]
over = pytest.mark.parametrize
DEPTHS = range(1, 6)


def partitions(K: int, least: int = 1) -> Iterator[list[int]]:
    """The sizes of blocks that K classes can fall into."""
    if K == 0:
        yield []
    for k in range(least, K + 1):
        for rest in partitions(K - k, k):
            yield [k, *rest]


def codes(K: int) -> list[Code | Tied]:
    """Everything catalogued for K classes: codes, and all block partitions, classes alone too."""
    return points.candidates(K) + [points.blocks(sizes) for sizes in partitions(K) if 1 < len(sizes) < K]


def levels(code: Code | Tied, L: int) -> list[float]:
    """lambda_eff to either side of DNC's stability line where the code exists, one near its end and a small one."""
    top = points.largest(code, L) if isinstance(code, Code) else 0.3 / code.classes
    line = stability.stability_level(code.classes, L) if code.classes > 3 and L > 1 else np.inf
    return [lam for lam in (1e-2 * top, 0.97 * top, 0.95 * line, 1.05 * line) if lam < top]


def branches(code: Code | Tied, L: int) -> tuple[Any, ...]:
    return ("large", "small") if L > 1 and isinstance(code, Code) else ("large",)


def problem(K: int, L: int, d: int, lam_w: Any, lam_h: float, n: int = 1, **options: Any) -> ufm.Problem:
    return ufm.Problem([n] * K, width=d, depth=L, features="free", lam_w=np.broadcast_to(lam_w, (1, L)), lam_h=lam_h, **options)


def tilted(lam: float, L: int, n: int, rng: np.random.Generator) -> tuple[Floats, float]:
    """Random lam_w, lam_h within a decade or so of each other, with that lambda_eff."""
    tilt = rng.uniform(-1, 1, L + 1)
    tilt = 10.0 ** (tilt - tilt.mean())
    return lam * tilt[:-1], float(lam * tilt[-1] / n)


def located(M: Floats, lam_w: Any, lam_h: float, n: int, d: int, rng: np.random.Generator | None = None) -> list[Floats]:
    return [f[None] for f in deep.balanced_factors(M, n, lam_h, lam_w, d, rng)]


FAST = [(3, 2), (5, 1), (5, 4), (6, 2)]
SLOW = [(K, L) for K in range(2, 9) for L in DEPTHS]
fast_and_slow = over(("K", "L"), [*FAST, *(pytest.param(K, L, marks=pytest.mark.slow) for K, L in SLOW if (K, L) not in FAST)])


# --- critical, and worth what the closed form says -----------------------------------------------------------------------------------


@fast_and_slow
def test_critical_and_of_the_closed_form_s_value(K: int, L: int) -> None:
    """Scale-free gradient norm <= 1e-12 and value to 1e-13: random penalties, n, widths and frames, both roots, both sides of the line."""
    rng = np.random.default_rng([K, L])
    for code in codes(K):
        for lam, branch in product(levels(code, L), branches(code, L)):
            n, d = int(rng.integers(1, 5)), K + int(rng.integers(0, 4))
            lam_w, lam_h = tilted(lam, L, n, rng)
            point = points.at(code, lam, L, branch)
            F, at = objective(problem(K, L, d, lam_w, lam_h, n)), located(point.M, lam_w, lam_h, n, d, rng)
            (loss, slopes), (penalty, pulls) = F.loss_part(at), F.penalty_part(at)
            assert loss[0] + penalty[0] == pytest.approx(float(point.value), rel=1e-13)
            assert (loss[0], penalty[0]) == (pytest.approx(float(point.fit), rel=1e-12), pytest.approx(float(point.penalty), rel=1e-12))
            sizes = [np.sqrt(sum(float((g * g).sum()) for g in part)) for part in (slopes, pulls)]
            rest = np.sqrt(sum(float(((a + b) ** 2).sum()) for a, b in zip(slopes, pulls, strict=True)))
            alone = code.rest if isinstance(code, Code) else 0.0  # a class alone: a slope of order 1 that cancels to rounding only
            assert rest <= 1e-12 * max(sizes) or (alone and rest <= 1e-14)


@over("number", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_penalty_is_the_schatten_expression(number: int) -> None:
    """Random critical points: sum_l (lam_l/2)||F_l||^2 is (L+1)/2 lambda_eff sum s^p, from the product's own singular values; 1e-10."""
    rng, done = np.random.default_rng(7), 0
    while done < number:
        K, L = int(rng.integers(2, 9)), int(rng.integers(1, 6))
        some = codes(K)
        code = some[rng.integers(len(some))]
        top = points.largest(code, L) if isinstance(code, Code) else 0.1
        lam = top * 10.0 ** rng.uniform(-6, -0.01, 10)
        M = points.at(code, lam, L, branches(code, L)[-1 if rng.random() < 0.2 else 0]).M
        for x, Mx in zip(lam, M, strict=True):
            if np.isnan(Mx).any():
                continue
            n, d = int(rng.integers(1, 7)), K + int(rng.integers(0, 9))
            lam_w, lam_h = tilted(x, L, n, rng)
            at = located(Mx, lam_w, lam_h, n, d, rng)
            P = problem(K, L, d, lam_w, lam_h, n)
            s = np.linalg.svd(objective(P).logits(at)[0], compute_uv=False)
            s = s[s > 1e-12 * s[0]]
            effective = (n * lam_h * np.prod(lam_w)) ** (1 / (L + 1))
            paid = sum(p / 2 * float((f * f).sum()) for p, f in zip([n * lam_h, *lam_w], at, strict=True))
            assert paid == pytest.approx((L + 1) / 2 * effective * (s ** (2 / (L + 1))).sum(), rel=1e-10)
            assert paid == pytest.approx(float(objective(P).penalty_part(at)[0][0]), rel=1e-13)
            done += 1


@over(("K", "L"), [(4, 2), (5, 1), (6, 3)])
def test_curves_of_n_collapse_on_lambda_eff(K: int, L: int) -> None:
    """Solved from one start for n = 1, 2, 7 samples and unequal penalties: value, structure and spectrum depend on lambda_eff alone."""
    lam = np.array([3e-3, 1e-2, 3e-2, 0.3])
    ends = []
    for n, tilt in ((1, 0.0), (2, 0.0), (7, 0.5)):
        powers = 10.0 ** (tilt * np.linspace(-1, 1, L + 1))
        P = ufm.Problem([n] * K, width=K + 2, depth=L, features="free", lam_w=lam[:, None] * powers[None, :-1], lam_h=lam * powers[-1] / n)
        ends.append(ufm.classify(P, ufm.solve(P, method="lbfgs", runs=3, seed=4, tol=1e-11).factors))
    for other in ends[1:]:
        assert other.value == pytest.approx(ends[0].value, rel=1e-10)
        assert other.singular_values == pytest.approx(ends[0].singular_values, rel=1e-7, abs=1e-7)
        for name in ("name", "rank", "negative", "zero", "is_minimum"):
            assert np.array_equal(getattr(other, name), getattr(ends[0], name))
    assert len(set(ends[0].name)) >= 2


# --- inertia -------------------------------------------------------------------------------------------------------------------------


def inertia(M: Floats, lam: float, L: int, d: int, method: Any = "dense") -> tuple[int, int]:
    """(negative, zero) eigenvalues of the Hessian at balanced factors in random frames, common penalty, n = 1."""
    rng = np.random.default_rng(3)
    got = ufm.hessian(problem(len(M), L, d, lam, lam), located(M, np.full(L, lam), lam, 1, d, rng), method=method)
    assert not np.isnan(got.negative[0])
    return int(got.negative[0]), int(got.zero[0])


@fast_and_slow
def test_inertia_of_dnc(K: int, L: int) -> None:
    """Index and nullity on both branches and both sides of the line are those of the closed spectrum and of the orbit."""
    code = points.dnc(K)
    for lam, branch in product(levels(code, L), branches(code, L)):
        point = points.at(code, lam, L, branch)
        closed = stability.dnc_spectrum(K, point.scales[0], L, K + 1)
        negative, zero = inertia(point.M, lam, L, K + 1)
        assert negative == point.index == closed.multiplicities[closed.eigenvalues < -1e-12 * closed.eigenvalues.max()].sum()
        assert zero == deep.orbit_dimension(K - 1, L, K + 1) != deep.published_orbit_dimension(K - 1, L, K + 1) or K == 2


@over(("K", "L"), [(4, 2), (5, 3), (8, 2), *(pytest.param(K, L, marks=pytest.mark.slow) for K in range(4, 9) for L in range(2, 6))])
def test_jumps_of_dnc_s_index(K: int, L: int) -> None:
    """Scale falling: K(K-3)/2 across a_c, K - 1 more across the strip's top, one more across the fold; unchanged elsewhere."""
    fold = deep_scale.fold(points.dnc(K).parts[0], L)
    lines = [(stability.stable_scale(K, L), K * (K - 3) // 2), (stability.strip_top(K, L), K - 1), (fold, 1)]
    lines.sort(reverse=True)
    assert lines[-1][0] == fold or L > 3
    expected, above = 0, 3 * lines[0][0]
    for scale, jump in lines:
        for alpha in ((scale + above) / 2, scale * 1.001):
            assert index_at(K, alpha, L) == expected
        expected, above = expected + jump, scale * 0.999
    assert index_at(K, above, L) == index_at(K, above / 2, L) == expected


def index_at(K: int, alpha: float, L: int) -> int:
    """The index at M = alpha S, at the penalty where that is critical."""
    lam = float(deep_scale.strength(points.dnc(K).parts[0], alpha, L))
    return inertia(alpha * (np.eye(K) - 1 / K), lam, L, K - 1)[0]


@over(("K", "L"), [(4, 2), (8, 3), *(pytest.param(K, L, marks=pytest.mark.slow) for K in (4, 6, 8, 10, 12) for L in (2, 3, 5))])
def test_pairs_have_a_line_of_their_own(K: int, L: int) -> None:
    """K = 2m: m(m-1)/2 directions turn two pairs into each other, downhill iff 2 beta < (L-1)/(L+1) (K - 2 + 2 e^{-beta}).

    Nothing else is downhill on the large root, and the m scales are below the fold. So pairs, too, are saddles for large K.
    """
    code, m = points.pairs(K), K // 2
    fold = deep_scale.fold(code.parts[0], L)
    line = (L - 1) / (L + 1) * (K - 2) / 2
    for _ in range(60):
        line = (L - 1) / (L + 1) * (K - 2 + 2 * np.exp(-line)) / 2
    for beta in (0.3 * fold, 0.98 * fold, 1.02 * fold, 2 * fold, 0.999 * line, 1.001 * line, 2 * line, 12.0):
        lam = float(deep_scale.strength(code.parts[0], beta, L))
        negative, zero = inertia(code.pattern(np.array([beta])), lam, L, m)
        assert negative == (beta < line) * m * (m - 1) // 2 + (beta < fold) * m == stability.pairs_index(K, beta, L)
        point = points.at(code, lam, L, "large" if beta > fold else "small")
        assert point.index == negative
        assert zero == deep.orbit_dimension(m, L, m)


BLOCKS = [[2, 4], [3, 3], [2, 6], [2, 2, 4]]
ALL_BLOCKS = [sizes for K in range(4, 9) for sizes in partitions(K, 2) if len(sizes) > 1]


@over("sizes", [*BLOCKS, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ALL_BLOCKS if sizes not in BLOCKS)], ids=str)
@over("L", [2, 5])
def test_inertia_of_block_simplices(sizes: list[int], L: int) -> None:
    """The symmetric zero-diagonal directions of a block are downhill iff block_is_unstable; others come as whole representations.

    Beside them a block of size k >= 3 may have a (k-1)-fold direction and two blocks a (k-1)(k'-1)-fold one, nothing else.
    """
    K, code = sum(sizes), points.blocks(sizes)
    distinct = sorted(set(sizes), reverse=True)
    for share in (1e-5, 0.03, 0.8):
        lam = share * points.largest(code, L)
        point = points.at(code, lam, L)
        unstable = {
            k: bool(stability.block_is_unstable(k, K, a, L)) if k > 3 else False for k, a in zip(distinct, point.scales, strict=True)
        }
        for size, start in zip(sizes, np.cumsum([0, *sizes]), strict=False):
            if size > 3:
                assert (curvature(point.M, lam, L, start, size) < 0) == unstable[size]
        negative, zero = inertia(point.M, lam, L, K)
        assert zero == deep.orbit_dimension(point.rank, L, K)
        left = negative - sum(k * (k - 3) // 2 for k in sizes if unstable[k])
        assert left in mode_sums(sizes)


def curvature(M: Floats, lam: float, L: int, start: int, k: int) -> float:
    """v'Hv for v = the same symmetric X in every factor M^{1/(L+1)}: zero diagonal and row sums, on the classes of one block."""
    values, V = np.linalg.eigh(M)
    root = (V * np.maximum(values, 0.0) ** (1 / (L + 1))) @ V.T
    cycle = np.roll(np.eye(4), 1, axis=1)
    X = np.zeros(M.shape)
    X[start : start + 4, start : start + 4] = cycle + cycle.T - 2 * cycle @ cycle  # c(1) twice +1, opposite -2: rows sum to 0
    assert np.allclose(X.sum(axis=0), 0)
    assert k >= 4
    moves = [X[None]] * (L + 1)
    product_ = objective(problem(len(M), L, len(M), lam, lam)).hessian_product([root[None]] * (L + 1), moves)
    return float(sum((a * b).sum() for a, b in zip(product_, moves, strict=True)))


def mode_sums(sizes: Sequence[int]) -> set[int]:
    """Numbers of negative directions that whole representations can add up to, equal blocks alike."""
    kinds = sorted(set(sizes))
    counts = [(k - 1) * sizes.count(k) for k in kinds if k > 2]
    for a, b in combinations_with_replacement(kinds, 2):
        pairs = sizes.count(a) * sizes.count(b) if a != b else sizes.count(a) * (sizes.count(a) - 1) // 2
        counts.append((a - 1) * (b - 1) * pairs)
    return {sum(c * on for c, on in zip(counts, choice, strict=True)) for choice in product((0, 1), repeat=len(counts))}


@over(("K", "L", "d"), [(4, 2, 5), (6, 3, 6), (5, 1, 7), *(pytest.param(8, L, 9, marks=pytest.mark.slow) for L in DEPTHS)])
def test_the_orbit_s_dimension(K: int, L: int, d: int) -> None:
    """Rank of the tangent map of (Q_0 ... Q_{L-1}) -> factors, by finite differences along rotations, and the Hessian's nullity: both are
    L(rd - r(r+1)/2) at every code, equal singular values or not, and not the Grassmannian's L r(d - r).
    """
    from scipy.linalg import expm

    for code in codes(K):
        lam = 0.02 * points.largest(code, L) if isinstance(code, Code) else 1e-3
        point = points.at(code, lam, L)
        U, s, Vt = np.linalg.svd(point.M)
        r, rng = point.rank, np.random.default_rng(0)
        root = np.diag(s[:r] ** (1 / (L + 1)))
        Q = [np.linalg.qr(rng.standard_normal((d, r)))[0] for _ in range(L)]

        def factors(frames: list[Floats], U: Floats = U, Vt: Floats = Vt, root: Floats = root) -> Floats:
            chain = [Vt[: len(root)].T, *frames, U[:, : len(root)]]
            return np.concatenate([(b @ root @ a.T).ravel() for a, b in pairwise(chain)])

        tangents = []
        for layer in range(L):
            for i in range(d):
                for j in range(i):
                    A = np.zeros((d, d))
                    A[i, j], A[j, i] = 1e-4, -1e-4
                    ends = [factors([expm(sign * A) @ q if at == layer else q for at, q in enumerate(Q)]) for sign in (1, -1)]
                    tangents.append((ends[0] - ends[1]) / 2e-4)
        expected = L * (r * d - r * (r + 1) // 2)
        assert np.linalg.matrix_rank(np.array(tangents), tol=1e-6) == expected == deep.orbit_dimension(r, L, d)
        assert inertia(point.M, lam, L, d)[1] == expected
        assert (expected == deep.published_orbit_dimension(r, L, d)) == (r == 1)


# --- where descent ends --------------------------------------------------------------------------------------------------------------


@over(("K", "L"), [(2, 1), (2, 2), (2, 4), (3, 1), (5, 1), (8, 1)])
def test_two_classes_or_one_layer_always_collapse(K: int, L: int) -> None:
    """K = 2 or L = 1: every start ends at DNC or at zero, always at DNC (L = 1) below and at zero above the limit of lambda_eff."""
    top = points.largest(points.dnc(K), L)
    lam = top * np.array([1e-3, 0.1, 0.5, 0.9, 1.1, 3.0])
    for n, scale in ((1, 0.3), (3, 1.5)):
        each = lam * n ** (-1 / (L + 1))
        P = ufm.Problem([n] * K, width=K + 1, depth=L, features="free", lam_w=each, lam_h=each)
        got = ufm.classify(P, ufm.solve(P, method="lbfgs", runs=8, seed=1, start=ufm.starts.normal(scale), tol=1e-10).factors)
        kinds = got.kind.reshape(6, 8)
        assert set(kinds[:4].ravel()) == {"dnc"} if L == 1 else set(kinds[:4].ravel()) <= {"dnc", "zero"}
        assert set(kinds[4:].ravel()) == {"zero"}
        assert np.all(kinds[0] == "dnc")
        assert np.all(np.abs(got.excess) < 1e-12)
        assert np.all(got.is_minimum == 1)
        assert set(got.name) == {"DNC", "zero"}


@over(
    ("counts", "L", "loss"),
    [
        ([3, 3, 3, 3], 2, ufm.CrossEntropy()),
        ([5, 3, 2], 3, ufm.CrossEntropy()),
        ([4, 2, 2], 2, ufm.MSE()),
        ([2, 3], 1, ufm.CrossEntropy(0.1)),
    ],
)
def test_within_class_collapse_is_automatic(counts: list[int], L: int, loss: Any) -> None:
    """Columns free to differ within a class do not, at any end of descent: NC1 is rounding; balanced or not, any convex loss."""
    P = ufm.Problem(counts, width=5, depth=L, features="free", columns="samples", loss=loss, lam_w=4e-3, lam_h=2e-3)
    H, *_ = ufm.solve(P, method="lbfgs", runs=4, seed=2, tol=1e-11).factors
    statistics = ufm.metrics.class_statistics(H, P.labels[0], P.classes)
    assert np.all(np.abs(H).max(axis=(1, 2)) > 0.1)
    assert np.all(ufm.metrics.nc1_quotient(statistics) < 1e-16)


@over("code", [points.dnc(4), points.pairs(4), points.blocks([3, 1]), points.polygon(5), points.relaxed_pairs(5)], ids=lambda c: c.name)
@over("L", [1, 2, 4])
def test_deviations_within_a_class_cost(code: Any, L: int) -> None:
    """At every critical point, saddles too: moving samples of a class about their mean raises F by at least (lam_h/2)||move||^2."""
    rng, K, n = np.random.default_rng(0), code.classes, 3
    lam = 0.3 * points.largest(code, L) if isinstance(code, Code) else 0.02
    lam_w, lam_h = tilted(lam, L, n, rng)
    H, *weights = located(points.at(code, lam, L).M, lam_w, lam_h, n, K, rng)
    F = objective(problem(K, L, K, lam_w, lam_h, n, columns="samples"))
    H = np.repeat(H, n, axis=2)
    start = float(F.value([H, *weights])[0])
    _, gradient = F.value_and_gradient([H, *weights])
    assert max(np.abs(g).max() for g in gradient) < 1e-14
    for size in (1e-3, 0.1, 3.0):
        for _ in range(20):
            move = rng.standard_normal((1, K, K, n)) * np.abs(H).max() * size
            move = (move - move.mean(axis=-1, keepdims=True)).reshape(H.shape)
            raised = float(F.value([H + move, *weights])[0]) - start
            assert raised >= lam_h / 2 * float((move * move).sum()) * (1 - 1e-9) - 1e-15
