"""Deep ReLU chains with cross-entropy and balanced classes: levels of constructions, and when deep neural collapse is not optimal.

    F = sum_b (k_b/K) log(1 + sum_j m_j e^{-z_b g_j}) + (lambda_eff/2)(L+1) sum_b C_b z_b^p,   p = 2/(L+1)

for a direct sum of `deep_relu.Block`s with gaps g_j (own minus other logit at scale 1) and centred heads; to classes of other blocks the
gap is the own logit. The linear level of DNC, `deep_points.dnc`, has C = K - 1 and gaps 1; it bounds ReLU DNC from below where the ReLU
does not lower the ratio of global mean to centred class means (Assumption 1 of the source). Source: Garrod & Keating 2025
(arXiv 2410.23169), Theorem 7; the sharper conditions are derived here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm import frames
from ufm.records import NoTheory
from ufm.theory import deep_points, deep_relu
from ufm.theory.deep_codes import Code
from ufm.theory.deep_points import Levels
from ufm.theory.deep_relu import Block
from ufm.theory.deep_scale import part

Floats = NDArray[np.float64]


def shifted_pairs(k: int, depth: int) -> Block:
    """X = pair blocks [[1, -1], [-1, 1]], k even, L >= 2: A = X + J, W_l = X + (2/k) J, W_L = X/2^{L-1}, J all ones; output X.

    (X + 2J/k)(X + J) = 2(X + J), nonnegative throughout; C^{L+1} = (2k)^2 (2k+4)^{L-2} 2k/4^{L-1}. Gap 2 to the partner, 1 to others.
    """
    if k % 2 or k < 2:
        raise NoTheory(f"deep_relu_ce.shifted_pairs: k is {k}, but pairs need an even number of classes; put the last one beside them")
    if depth < 2:
        raise NoTheory(f"deep_relu_ce.shifted_pairs: depth is {depth}, but the construction needs at least 2 weight matrices")
    X = frames.pairs(k) @ frames.pairs(k).T
    middle = (X + 2 / k,) * (depth - 2)
    return Block(f"{k // 2} shifted pairs", (X + 1, *middle, X / 2.0 ** (depth - 1)), ((2.0, 1), (1.0, k - 2)))


def graph_code(r: int, depth: int) -> Block:
    """The code T(r) of the linear model kept nonnegative, k = r(r-1)/2, L >= 2: A = B (vertices against edges), W_l = I, W_L = B^T - 2/r.

    Output B^T B - 4/r: gap 1 to adjacent edges, 2 to disjoint ones; C^{L+1} = ||B||_nuc^2 r^{L-2} (r-1)(r-2), with ||B||_nuc as in
    `deep_relu.graph`. Below linear DNC, C < k - 1, iff r >= 8 at L = 2, r >= 5 at L = 3, 4 and 5, r >= 4 from L = 6 on. Rank r, then r - 1.
    """
    if depth < 2:
        raise NoTheory(f"deep_relu_ce.graph_code: depth is {depth}, but the construction needs at least 2 weight matrices")
    B = frames.graph_incidence(r)
    layers = (B, *(np.eye(r),) * (depth - 2), B.T - 2 / r)
    return Block(f"nonnegative T({r})", layers, ((1.0, 2 * (r - 2)), (2.0, (r - 2) * (r - 3) // 2)), 2 - 4 / r)


def paired(K: int, depth: int) -> list[Block]:
    """Shifted pairs, and beside them for odd K the last class alone on a unit of its own."""
    return [shifted_pairs(K - K % 2, depth), *(deep_relu.orthogonal(1, depth) for _ in range(K % 2))]


def code(blocks: Sequence[Block]) -> Code:
    """The direct sum as a `deep_codes.Code` for `deep_points.levels`, `largest` and `deep.crossover`, at the depth of its blocks only.

    Its Parts have sigma = 1 and rank = C; the pattern is the class logits, columns centred.
    """
    K = deep_relu.sizes("deep_relu_ce.code", blocks)[1]
    parts = []
    for block in blocks:
        gaps, many = zip(*block.inside, (block.own, K - block.classes), strict=True)
        parts.append(part(block.classes / K, gaps, many, 1.0, deep_relu.cost(block, K)))

    def pattern(x: Floats) -> Floats:
        M, first = np.zeros((*x.shape[:-1], K, K)), 0
        for i, block in enumerate(blocks):
            own = slice(first, first := first + block.classes)
            M[..., own, own] = x[..., i, None, None] * block.output()
        return np.asarray(M - M.mean(axis=-2, keepdims=True))

    return Code(" + ".join(block.name for block in blocks), K, tuple(parts), pattern)


def cross_entropy(blocks: Sequence[Block], lam: ArrayLike) -> Levels:
    """Scales (..., blocks), value, fit and penalty (...) at lambda_eff (...), largest roots; NaN where a scale does not exist."""
    return deep_points.levels(code(blocks), lam, blocks[0].depth)


def published_dnc_is_not_optimal(K: int, depth: int, d: int) -> bool:
    """Theorem 7 of Garrod & Keating: K >= 10 with L >= 5, or K >= 16 with L = 4, under Assumption 1. False decides nothing."""
    _wide("published_dnc_is_not_optimal", K, d)
    return (K >= 10 and depth >= 5) or (K >= 16 and depth == 4)


def dnc_is_not_optimal(K: int, depth: int, d: int) -> bool:
    """Some `competitors` cost less than linear DNC, K - 1, and fit no worse at equal scale: under Assumption 1 ReLU DNC is not optimal.

    At every lambda_eff; true for K >= 28 at L = 2, K >= 10 at L = 3, 4 and 5, K >= 6 from L = 6 on. False decides nothing. NoTheory where
    the width is below K.
    """
    _wide("dnc_is_not_optimal", K, d)
    return any(sum(deep_relu.cost(block, K) for block in blocks) < K - 1 for blocks in competitors(K, depth))


def competitors(K: int, depth: int) -> Iterator[list[Block]]:
    """Shifted pairs, and every graph and `graph_code` on k <= K classes beside an orthogonal frame of the others: all gaps at least 1."""
    if depth >= 2 and K >= 2:
        yield paired(K, depth)
    for r in range(4, K + 1):
        rest = K - r * (r - 1) // 2
        if rest < 0 or depth < 2:
            return
        others = [deep_relu.orthogonal(rest, depth)] if rest else []
        yield [graph_code(r, depth), *others]
        if depth >= 3:
            yield [deep_relu.graph(r, depth), *others]


def _wide(call: str, K: int, d: int) -> None:
    if d < K:
        raise NoTheory(f"deep_relu_ce.{call}: d is {d}, but the theorem needs a width of at least K = {K}")
