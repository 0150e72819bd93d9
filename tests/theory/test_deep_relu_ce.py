"""Deep ReLU chains with cross-entropy: levels at 50 digits, the seventh theorem as published and sharper, who lies below whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oracle import bisect, mp
from ufm.records import NoTheory
from ufm.theory import deep, deep_points, deep_relu, deep_relu_ce
from ufm.theory.deep_relu import Block

SUMS: list[list[Block]] = [
    [deep_relu.orthogonal(5, 3)],
    [deep_relu.graph(5, 4)],
    deep_relu_ce.paired(8, 4),
    deep_relu_ce.paired(9, 5),
    [deep_relu.graph(4, 4), deep_relu.orthogonal(2, 4)],
    [deep_relu_ce.graph_code(5, 3)],
    [deep_relu_ce.graph_code(4, 2), deep_relu.orthogonal(1, 2)],
]


@pytest.mark.parametrize("blocks", SUMS, ids=lambda blocks: deep_relu_ce.code(blocks).name)
def test_levels_at_50_digits(blocks: list[Block]) -> None:
    """The value is that of the logit matrix, entry by entry, with the costs; no scale nearby is better; the fold is where it ends."""
    L = blocks[0].depth
    K, costs, p = sum(b.classes for b in blocks), [], mp.mpf(2) / (L + 1)
    code = deep_relu_ce.code(blocks)
    for block in blocks:
        costs.append(deep_relu.cost(block, K))
    for share in (1e-12, 1e-3, 0.5, 0.999):
        lam = share * deep_points.largest(code, L)
        levels = deep_relu_ce.cross_entropy(blocks, lam)

        def value(x: Any, lam: float = lam) -> Any:
            M = code.pattern(np.array([float(a) for a in x]))
            assert np.abs(M.sum(axis=0)).max() < 1e-12
            loss = mp.mpf(0)
            for c in range(K):
                loss += mp.log1p(sum(mp.exp(mp.mpf(M[j, c]) - mp.mpf(M[c, c])) for j in range(K) if j != c)) / K
            return loss + mp.mpf(lam) / 2 * (L + 1) * sum(C * mp.mpf(float(a)) ** p for C, a in zip(costs, x, strict=True))

        x = levels.scales
        at = value(x)
        assert abs(levels.value - at) < 1e-13 * at
        assert levels.value == pytest.approx(float(levels.fit + levels.penalty), rel=1e-15)
        for i in range(len(blocks)):
            for step in (1e-3, -1e-3):
                assert value([*x[:i], x[i] * (1 + step), *x[i + 1 :]]) > at
    assert np.isnan(deep_relu_ce.cross_entropy(blocks, 1.001 * deep_points.largest(code, L)).value)


def test_orthogonal_scale_at_50_digits() -> None:
    """lambda C a^{p-1} = (K-1)/(e^a + K - 1), C^{L+1} = K^L (K-1); always above the linear level of DNC."""
    for K, L in ((3, 2), (10, 4), (40, 7)):
        blocks = [deep_relu.orthogonal(K, L)]
        for lam in (1e-20, 1e-4, 5e-3):
            C, p = mp.root(mp.mpf(K) ** L * (K - 1), L + 1), mp.mpf(2) / (L + 1)

            def excess(a: Any, lam: float = lam, C: Any = C, p: Any = p, K: int = K) -> Any:
                return mp.mpf(lam) * C - a ** (1 - p) * (K - 1) / (mp.exp(a) + K - 1)

            a = bisect(excess, 2, 200)
            level = deep_relu_ce.cross_entropy(blocks, lam)
            assert abs(level.scales[0] - a) < 1e-14 * a
            assert level.value == pytest.approx(float(mp.log1p((K - 1) * mp.exp(-a)) + lam / 2 * (L + 1) * C * a**p), rel=1e-14)
            assert level.value > deep_points.levels(deep_points.dnc(K), lam, L).value


def test_the_graph_beats_orthogonal_collapse_by_its_cost() -> None:
    """Same logits up to scale, so the order is that of C at every lambda_eff: L >= 4 and K >= 6, as for squared error."""
    for r in (3, 4, 5, 7):
        K = r * (r - 1) // 2
        for L in (3, 4, 6):
            graph, dnc = deep_relu.graph(r, L), deep_relu.orthogonal(K, L)
            lam = np.geomspace(1e-9, 0.99, 20) * min(deep_points.largest(deep_relu_ce.code([b]), L) for b in (graph, dnc))
            below = deep_relu_ce.cross_entropy([graph], lam).value < deep_relu_ce.cross_entropy([dnc], lam).value
            assert np.all(below == (deep_relu.cost(graph, K) < deep_relu.cost(dnc, K)))
            assert np.all(below == deep_relu.graph_beats_dnc(r, L))


def test_thresholds_of_pairs() -> None:
    """Even K: the integer condition, K >= 14 at L = 4, K >= 10 at L = 5; odd K: K >= 15, K >= 11, no worse than with equal scales."""

    def beat(K: int, L: int) -> bool:
        return sum(deep_relu.cost(b, K) for b in deep_relu_ce.paired(K, L)) < K - 1

    for L in range(2, 12):
        for K in range(2, 60):
            if K % 2 == 0:
                assert beat(K, L) == ((K - 1) ** (L + 1) * 4 ** (L - 1) > 8 * K**3 * (2 * K + 4) ** (L - 2))
            elif (2 * K) ** 2 * (2 * K + 6) ** (L - 2) * (2 * K - 1) < 4 ** (L - 1) * (K - 1) ** (L + 1):
                assert beat(K, L)
    for L, even, odd in ((4, 14, 15), (5, 10, 11)):
        assert min(K for K in range(2, 60, 2) if beat(K, L)) == even
        assert min(K for K in range(3, 60, 2) if beat(K, L)) == odd


def test_theorem_seven() -> None:
    """The published set lies in ours, which begins at K = 28 for L = 2, 10 for L = 3, 4 and 5, and 6 from L = 6 on, and has no gap."""
    for L in range(1, 9):
        ours = [K for K in range(2, 50) if deep_relu_ce.dnc_is_not_optimal(K, L, K)]
        published = [K for K in range(2, 50) if deep_relu_ce.published_dnc_is_not_optimal(K, L, K)]
        assert set(published) <= set(ours)
        assert published == {4: list(range(16, 50))}.get(L, list(range(10, 50)) if L >= 5 else [])
        assert ours == list(range({2: 28, 3: 10, 4: 10, 5: 10, 6: 6, 7: 6, 8: 6}.get(L, 50), 50))


def test_thresholds_of_the_graph_code() -> None:
    """||B||_nuc^2 r^{L-2} (r-1)(r-2) < (k-1)^{L+1}: r >= 8, 5, 5, 5, 4, 4 at L = 2 ... 7, up to r = 40, at 50 digits."""
    for L, least in zip(range(2, 8), (8, 5, 5, 5, 4, 4), strict=True):
        for r in range(4, 41):
            nuclear, k = (r - 1) * mp.sqrt(r - 2) + mp.sqrt(2 * r - 2), r * (r - 1) // 2
            expected = nuclear**2 * mp.mpf(r) ** (L - 2) * (r - 1) * (r - 2) < mp.mpf(k - 1) ** (L + 1)
            assert (deep_relu.cost(deep_relu_ce.graph_code(r, L), k) < k - 1) == expected == (r >= least)


@pytest.mark.parametrize(("K", "L"), [(28, 2), (30, 2), (10, 3), (13, 3), (10, 4), (14, 4), (10, 5), (6, 6), (9, 6), (7, 7)])
def test_the_competitor_is_below_linear_collapse(K: int, L: int) -> None:
    """At every lambda_eff where DNC exists, the best competitor's value, or log K of zero, is below that of linear DNC."""
    lam = deep_points.largest(deep_points.dnc(K), L) * np.geomspace(1e-14, 0.999, 40)
    dnc = deep_points.levels(deep_points.dnc(K), lam, L).value
    best = np.full(lam.shape, np.log(K))
    for blocks in deep_relu_ce.competitors(K, L):
        best = np.fmin(best, deep_relu_ce.cross_entropy(blocks, lam).value)
    assert np.all(best < dnc)


@pytest.mark.parametrize(("K", "L"), [(4, 5), (5, 5), (6, 4), (7, 4)])
def test_pairs_overtake_orthogonal_collapse_from_a_penalty_on(K: int, L: int) -> None:
    """Below the thresholds at every lambda_eff they win at large ones: the catalogue's search finds where, within 1e-9."""
    pairs, dnc = (deep_relu_ce.code(blocks) for blocks in (deep_relu_ce.paired(K, L), [deep_relu.orthogonal(K, L)]))
    high = 0.9 * deep_points.largest(dnc, L)
    lam = deep.crossover(pairs, dnc, L, 1e-40, high)
    gaps = [
        float(deep_points.levels(pairs, x, L).value - deep_points.levels(dnc, x, L).value) for x in (lam * (1 - 1e-9), lam * (1 + 1e-9))
    ]
    assert gaps[1] < 0 < gaps[0]
    assert sum(deep_relu.cost(b, K) for b in deep_relu_ce.paired(K, L)) > deep_relu.cost(deep_relu.orthogonal(K, L), K)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: deep_relu_ce.shifted_pairs(5, 3), "k is 5, but pairs need an even number"),
        (lambda: deep_relu_ce.shifted_pairs(4, 1), "depth is 1"),
        (lambda: deep_relu_ce.graph_code(5, 1), "graph_code: depth is 1"),
        (lambda: deep_relu_ce.dnc_is_not_optimal(10, 4, 9), "dnc_is_not_optimal: d is 9"),
        (lambda: deep_relu_ce.published_dnc_is_not_optimal(10, 5, 9), "published_dnc_is_not_optimal: d is 9"),
    ],
)
def test_door(call: Any, words: str) -> None:
    with pytest.raises(NoTheory, match=words):
        call()


@pytest.mark.parametrize("blocks", [[], [deep_relu.orthogonal(2, 2), deep_relu.orthogonal(2, 3)]], ids=["none", "two depths"])
def test_a_sum_has_one_depth(blocks: list[Block]) -> None:
    with pytest.raises(ValueError, match=r"deep_relu_ce\.code: the blocks have depths"):
        deep_relu_ce.cross_entropy(blocks, 1e-3)
