"""Deep ReLU chains with cross-entropy and balanced classes: levels of constructions, and when deep neural collapse is not optimal.

    F = sum_b (k_b/K) log(1 + sum_j m_j e^{-z_b g_j}) + (lambda_eff/2)(L+1) sum_b C_b z_b^p,   p = 2/(L+1)

for a direct sum of `deep_relu.Block`s with gaps g_j (own minus other logit at scale 1) and centred heads; a class of another block has
gap 1. The linear level of DNC, `deep_points.dnc`, has C = K - 1 and gaps 1; it bounds ReLU DNC from below where the ReLU does not
lower the ratio of global mean to centred class means (Assumption 1 of the source). Source: Garrod & Keating 2025 (arXiv 2410.23169),
Theorem 7; the sharper conditions are derived here.
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


def paired(K: int, depth: int) -> list[Block]:
    """Shifted pairs, and beside them for odd K the last class alone on a unit of its own."""
    return [shifted_pairs(K - K % 2, depth), *(deep_relu.orthogonal(1, depth) for _ in range(K % 2))]


def code(blocks: Sequence[Block]) -> Code:
    """The direct sum as a `deep_codes.Code` for `deep_points.levels`, `largest` and `deep.crossover`, at the depth of its blocks only.

    Its Parts have sigma = 1 and rank = C; the pattern is the class logits, columns centred.
    """
    K = sum(block.classes for block in blocks)
    parts = []
    for block in blocks:
        gaps, many = zip(*block.inside, (1.0, K - block.classes), strict=True)
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

    At every lambda_eff. For even K it includes (K-1)^{L+1} 4^{L-1} > 8 K^3 (2K+4)^{L-2}. False decides nothing. NoTheory if d < K.
    """
    _wide("dnc_is_not_optimal", K, d)
    return any(sum(deep_relu.cost(block, K) for block in blocks) < K - 1 for blocks in competitors(K, depth))


def competitors(K: int, depth: int) -> Iterator[list[Block]]:
    """Shifted pairs, and every graph on k <= K classes beside an orthogonal frame of the others: all gaps at least 1."""
    if depth >= 2 and K >= 2:
        yield paired(K, depth)
    for r in range(3, K + 1):
        rest = K - r * (r - 1) // 2
        if rest >= 0 and depth >= 3:
            yield [deep_relu.graph(r, depth), *([deep_relu.orthogonal(rest, depth)] if rest else [])]


def _wide(call: str, K: int, d: int) -> None:
    if d < K:
        raise NoTheory(f"deep_relu_ce.{call}: d is {d}, but the theorem needs a width of at least K = {K}")
