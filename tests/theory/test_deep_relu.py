"""Constructions of deep ReLU chains under squared error: layers against loops, factors against the objective, roots at 50 digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from oracle import bisect, mp
from ufm import frames
from ufm.losses import MSE, CrossEntropy
from ufm.objective import objective
from ufm.problem import Problem
from ufm.records import NoTheory
from ufm.solvers import solve
from ufm.starts import given
from ufm.theory import deep, deep_relu, deep_relu_ce
from ufm.theory.deep_relu import Block

Floats = np.ndarray[Any, np.dtype[np.float64]]

SUMS: list[tuple[Block, ...]] = [
    (deep_relu.orthogonal(4, 2),),
    (deep_relu.orthogonal(5, 5),),
    (deep_relu.graph(3, 3),),
    (deep_relu.graph(4, 4),),
    (deep_relu.graph(5, 6),),
    (deep_relu.graph(4, 4), deep_relu.orthogonal(3, 4)),
    (deep_relu.graph(4, 5), deep_relu.graph(3, 5), deep_relu.orthogonal(1, 5)),
]
PAIRED = [
    (deep_relu_ce.shifted_pairs(2, 2),),
    (deep_relu_ce.shifted_pairs(6, 2),),
    (deep_relu_ce.shifted_pairs(8, 5),),
    (deep_relu_ce.graph_code(3, 2),),
    (deep_relu_ce.graph_code(5, 4),),
    (deep_relu_ce.graph_code(4, 3), deep_relu.orthogonal(2, 3)),
]


def relu_forward(layers: Sequence[Floats]) -> list[list[float]]:
    """Entry by entry."""
    A = [list(map(float, row)) for row in layers[0]]
    for W in layers[1:]:
        A = [[sum(float(w) * max(0.0, A[u][c]) for u, w in enumerate(row)) for c in range(len(A[0]))] for row in W]
    return A


def test_incidence() -> None:
    """Edges of K_r by hand: two edges share a vertex, both or none; all numbers of shared vertices follow the triangular graph."""
    for r in (3, 4, 7):
        B, edges = frames.graph_incidence(r), list(combinations(range(r), 2))
        assert B.shape == (r, len(edges))
        for c, edge in enumerate(edges):
            assert [v for v in range(r) if B[v, c] == 1] == list(edge)
            assert B[:, c].sum() == 2
            assert sorted((B.T @ B)[c].tolist()) == [0.0] * ((r - 2) * (r - 3) // 2) + [1.0] * (2 * (r - 2)) + [2.0]
        assert np.array_equal(B @ B.T, (r - 2) * np.eye(r) + 1)
    with pytest.raises(ValueError, match=r"frames.graph_incidence: r is 2, but must be a whole number, at least 3"):
        frames.graph_incidence(2)


@pytest.mark.parametrize("blocks", [*SUMS, *PAIRED], ids=lambda blocks: "+".join(f"{b.name}, L={b.depth}" for b in blocks))
def test_layers_make_their_output(blocks: tuple[Block, ...]) -> None:
    """A >= 0; own logits and the others as told, by loops."""
    for block in blocks:
        assert np.all(block.layers[0] >= 0)
        Z = np.array(relu_forward(block.layers))
        assert block.output() == pytest.approx(Z, abs=1e-14)
        for c in range(block.classes):
            gaps = sorted(Z[c, c] - Z[j, c] for j in range(block.classes) if j != c)
            assert Z[c, c] == pytest.approx(block.own, abs=1e-14)
            assert gaps == pytest.approx(sorted(gap for gap, many in block.inside for _ in range(many)), abs=1e-14)
        assert block.depth == len(block.layers)
        assert block.width == max(len(layer) for layer in block.layers[:-1])


def test_costs_in_closed_form() -> None:
    """C^{L+1}: k^{L+1}; (1/4) ||B||^2 r^{L-2} k^2; (2k)^2 (2k+4)^{L-2} 2k/4^{L-1}; a centred head takes off one part in K."""
    for L in (3, 4, 9):
        assert deep_relu.cost(deep_relu.orthogonal(7, L)) == pytest.approx(7, rel=1e-14)
        assert deep_relu.cost(deep_relu.orthogonal(7, L), 7) == pytest.approx((7**L * 6) ** (1 / (L + 1)), rel=1e-14)
        for r in (3, 5, 8):
            k, nuclear = r * (r - 1) / 2, (r - 1) * np.sqrt(r - 2) + np.sqrt(2 * r - 2)
            graph = deep_relu.graph(r, L)
            code = deep_relu_ce.graph_code(r, L)
            assert deep_relu.cost(code, 99) ** (L + 1) == pytest.approx(nuclear**2 * r ** (L - 2) * (r - 1) * (r - 2), rel=1e-13)
            assert deep_relu.cost(graph) ** (L + 1) == pytest.approx(nuclear**2 * r ** (L - 2) * k**2 / 4, rel=1e-13)
            assert deep_relu.cost(graph, int(k) + 5) ** (L + 1) == pytest.approx(
                nuclear**2 * r ** (L - 2) * k**2 / 4 * (1 - 1 / (k + 5)), rel=1e-13
            )
        for k in (2, 6, 14):
            pairs = deep_relu_ce.shifted_pairs(k, L)
            expected = (2 * k) ** 2 * (2 * k + 4) ** (L - 2) * 2 * k / 4 ** (L - 1)
            assert deep_relu.cost(pairs) ** (L + 1) == pytest.approx(expected, rel=1e-13)
            assert deep_relu.cost(pairs, k) == pytest.approx(deep_relu.cost(pairs), rel=1e-14)


def test_costs_of_a_sum_add_up_at_best() -> None:
    """Norms of two blocks, scaled against each other at a fixed product: never less than the sum, which balanced blocks attain."""
    rng = np.random.default_rng(0)
    first, second = (deep_relu.squared_norms(b) for b in (deep_relu.graph(5, 4), deep_relu.orthogonal(3, 4)))
    total = deep_relu.cost(deep_relu.graph(5, 4)) + 3
    balanced = second * (first / second) / np.exp(np.log(first / second).mean())
    assert np.exp(np.log(first + balanced).mean()) == pytest.approx(total, rel=1e-14)
    for _ in range(50):
        tilt = rng.standard_normal(5)
        assert np.exp(np.log(first + second * np.exp(tilt - tilt.mean())).mean()) > total


def chain(blocks: Sequence[Block], loss: str, n: int, columns: str = "means", d: int = 23) -> tuple[Problem, float, Floats]:
    """A problem of unequal penalties for these blocks, its lambda_eff and lam_w."""
    K, L = sum(b.classes for b in blocks), blocks[0].depth
    lam_w, lam_h = np.geomspace(4e-3, 1e-3, L), 7e-4
    P = Problem(
        np.full(K, n),
        width=d,
        depth=L,
        features="free",
        activation="relu",
        loss=MSE() if loss == "MSE" else CrossEntropy(),
        lam_w=lam_w[None],
        lam_h=lam_h,
        columns=columns,  # type: ignore[arg-type]
    )
    return P, float(deep.lambda_eff(n, lam_h, lam_w)), lam_w


@pytest.mark.parametrize("columns", ["means", "samples"])
@pytest.mark.parametrize("loss", ["MSE", "CE"])
@pytest.mark.parametrize("n", [1, 3])
def test_factors_have_the_closed_value_and_stationary_scales(loss: str, n: int, columns: str) -> None:
    """F of the factors is the formula; <dF/dF_l, F_l> = 0 for every factor, block by block; all penalties are equal."""
    for blocks in SUMS if loss == "MSE" else [*SUMS, *PAIRED]:
        P, lam, lam_w = chain(blocks, loss, n, columns)
        levels = (deep_relu.squared_error if loss == "MSE" else deep_relu_ce.cross_entropy)(blocks, lam)
        factors = deep_relu.factors(blocks, levels.scales, n, float(P.lam_h[0]), lam_w, P.width, centred=loss == "CE")
        assert np.all(factors[1] @ factors[0] >= -1e-14)
        H = np.repeat(factors[0], n if columns == "samples" else 1, axis=1)
        batch = [x[None] for x in (H, *factors[1:])]
        F = objective(P)
        value, gradient = F.value_and_gradient(batch)
        assert value[0] == pytest.approx(float(levels.value), rel=1e-13)
        assert F.penalty_part(batch)[0][0] == pytest.approx(float(levels.penalty), rel=1e-13)
        paid = [x / 2 * float((f * f).sum()) for x, f in zip([n * P.lam_h[0], *lam_w], factors, strict=True)]
        assert paid == pytest.approx([float(levels.penalty) / len(paid)] * len(paid), rel=1e-12)
        along = [float((g * x).sum()) for g, x in zip(gradient, batch, strict=True)]
        assert along == pytest.approx([0.0] * len(along), abs=1e-13)
        first = 0
        for block in blocks:  # the head's columns of each block, so each scale by itself
            units = slice(first, first := first + block.width)
            part = (gradient[-1][0][:, units] * factors[-1][:, units]).sum()
            assert part == pytest.approx(0.0, abs=1e-13)


def test_no_other_scales_or_split_of_the_first_layer_are_better() -> None:
    """Rescaled factors, and A = (W_1 G)(G^{-1} H), cost more."""
    rng = np.random.default_rng(1)
    blocks = (deep_relu.graph(4, 3), deep_relu.orthogonal(2, 3))
    P, lam, lam_w = chain(blocks, "MSE", 2)
    levels = deep_relu.squared_error(blocks, lam)
    factors = deep_relu.factors(blocks, levels.scales, 2, float(P.lam_h[0]), lam_w, P.width)
    for _ in range(40):
        scaled = [x * np.exp(0.1 * rng.standard_normal()) for x in factors]
        G = np.eye(P.width) + 0.1 * rng.standard_normal((P.width, P.width))
        split = [np.linalg.inv(G) @ factors[0], factors[1] @ G, *factors[2:]]
        for other in (scaled, split):
            assert objective(P).value([x[None] for x in other])[0] > float(levels.value)


def test_scales_at_50_digits() -> None:
    """t (1-t)^q = lambda C K/k to a few ulp, from tiny penalties to the fold; beyond it NaN; the value follows."""
    for blocks in SUMS:
        L, K = blocks[0].depth, sum(b.classes for b in blocks)
        top = deep_relu.largest(blocks)
        lam = top * np.array([1e-30, 1e-6, 0.1, 0.9, 1 - 1e-6, 1 + 1e-9])
        levels = deep_relu.squared_error(blocks, lam)
        assert np.isnan(levels.value[-1])
        assert levels.value[-2] > 0.4999 or len(blocks) > 1
        for i, x in enumerate(lam[:-1]):
            value = mp.mpf(0)
            for b, block in enumerate(blocks):
                C = mp.mpf(deep_relu.cost(block))
                eps, q = mp.mpf(float(x)) * C * K / block.classes, mp.mpf(L - 1) / (L + 1)
                t = bisect(lambda y, e=eps, q=q: y * (1 - y) ** q - e, 0, mp.mpf(L + 1) / (2 * L))
                assert abs(1 - levels.scales[i, b] - t) < (1e-14 if x < 0.95 * top else 1e-9) * t + mp.mpf(2) ** -53
                value += mp.mpf(block.classes) / K * t**2 / 2 + mp.mpf(float(x)) / 2 * (L + 1) * C * (1 - t) ** (mp.mpf(2) / (L + 1))
            assert abs(levels.value[i] - value) < 1e-14 * value


def test_value_depends_on_lambda_times_cost_and_rises() -> None:
    """So the order of two single blocks with output I is that of their costs, at every lambda_eff where both exist."""
    a, b = deep_relu.graph(5, 4), deep_relu.orthogonal(10, 4)
    assert deep_relu.cost(a) < deep_relu.cost(b)
    lam = np.geomspace(1e-12, 1, 60) * deep_relu.largest([b])
    first, second = (deep_relu.squared_error([x], lam / deep_relu.cost(x)).value for x in (a, b))
    assert first == pytest.approx(second, rel=1e-12, nan_ok=True)
    assert np.all(deep_relu.squared_error([a], lam).value < deep_relu.squared_error([b], lam).value)
    turn = deep_relu.below_zero([b])
    below, above = deep_relu.squared_error([b], np.array([turn * (1 - 1e-9), turn * (1 + 1e-9)])).value
    assert below < 0.5 < above
    assert deep_relu.squared_error([b], turn).scales[0] == pytest.approx(3 / 4, rel=1e-9)  # (L-1)/L


def test_thresholds() -> None:
    """The graph beats DNC iff L >= 4 and r >= 4, up to r = 59; so DNC is not optimal for K >= 6, L >= 4."""
    for L in range(3, 10):
        for r in range(3, 60):
            nuclear = (r - 1) * mp.sqrt(r - 2) + mp.sqrt(2 * r - 2)
            k = mp.mpf(r * (r - 1)) / 2
            expected = nuclear**2 * mp.mpf(r) ** (L - 2) * k**2 / 4 < k ** (L + 1)
            assert deep_relu.graph_beats_dnc(r, L) == expected == (L >= 4 and r >= 4)
    for K in range(2, 40):
        for L in (1, 2, 3, 4, 7):
            assert deep_relu.dnc_is_not_optimal(K, L, K) == (K >= 6 and L >= 4)
    assert [deep_relu.vertices(r * (r - 1) // 2) for r in range(3, 200)] == list(range(3, 200))


def test_a_sum_is_below_dnc_where_told() -> None:
    """K = 8 is no number of edges: six classes on a graph and two alone are below DNC at every lambda_eff."""
    blocks, dnc = [deep_relu.graph(4, 4), deep_relu.orthogonal(2, 4)], [deep_relu.orthogonal(8, 4)]
    lam = np.geomspace(1e-10, 1, 30) * deep_relu.largest(blocks)
    assert np.all(deep_relu.squared_error(blocks, lam).value < deep_relu.squared_error(dnc, lam).value)


def test_polishing_the_graph_leads_further_below_dnc() -> None:
    """K = 6, L = 4: descent from the construction ends at least as low, in a chain that it was never told about."""
    block = deep_relu.graph(4, 4)
    P, lam, lam_w = chain([block], "MSE", 1, "samples", d=12)
    level = deep_relu.squared_error([block], lam)
    factors = deep_relu.factors([block], level.scales, 1, float(P.lam_h[0]), lam_w, P.width)
    found = solve(P, method="lbfgs", start=given(factors), tol=1e-6)
    dnc = deep_relu.squared_error([deep_relu.orthogonal(6, 4)], lam)
    assert found.value[0] <= level.value * (1 + 1e-12) < dnc.value


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: deep_relu.vertices(8), NoTheory, r"K is 8, but the graph solution needs K = r\(r-1\)/2"),
        (lambda: deep_relu.vertices(1), NoTheory, "K is 1"),
        (lambda: deep_relu.graph(4, 2), NoTheory, "graph: depth is 2, but the construction needs at least 3"),
        (lambda: deep_relu.orthogonal(4, 1), NoTheory, "orthogonal: depth is 1"),
        (lambda: deep_relu.graph(2, 4), ValueError, "r is 2"),
        (lambda: deep_relu.dnc_is_not_optimal(6, 4, 5), NoTheory, "d is 5, but .* at least K = 6"),
        (lambda: deep_relu.squared_error([], 1e-3), ValueError, "depths"),
        (lambda: deep_relu.squared_error([deep_relu.orthogonal(2, 3), deep_relu.orthogonal(2, 4)], 1e-3), ValueError, r"depths \[3, 4\]"),
        (lambda: deep_relu.squared_error([deep_relu_ce.shifted_pairs(4, 3)], 1e-3), NoTheory, "does not make the identity"),
        (lambda: deep_relu.squared_error([deep_relu_ce.graph_code(3, 3)], 1e-3), NoTheory, "does not make the identity"),
        (lambda: deep_relu.below_zero([deep_relu.orthogonal(2, 3)] * 2), NoTheory, "2 blocks lose their classes"),
        (
            lambda: deep_relu.factors([deep_relu.graph(4, 3)], [0.9], 1, 1e-3, [1e-3] * 3, 5),
            ValueError,
            "d is 5, but these blocks have up to 6 units",
        ),
        (lambda: deep_relu.factors([deep_relu.graph(4, 3)], [0.9], 1, 1e-3, [1e-3] * 4, 6), ValueError, r"lam_w has shape \(4,\)"),
        (lambda: deep_relu.factors([deep_relu.graph(4, 3)], [np.nan], 1, 1e-3, [1e-3] * 3, 6), NoTheory, "a scale is NaN"),
    ],
)
def test_door(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
