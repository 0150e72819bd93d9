"""Deep ReLU chains with balanced classes: constructions of low cost, their factors, and their values under squared error.

    F = mean loss + (lambda_eff/2)(L+1) C z^p,   p = 2/(L+1),   C = (||A||_nuc^2 prod_{l=2}^L ||W_l||_F^2)^{1/(L+1)}

for nonnegative A = W_1 H and W_2, ..., W_L that make logits of scale 1, scaled to z at the least penalty (the chain is positively
homogeneous in each factor); lambda_eff as in `ufm.theory.deep`. Features free, ReLU after W_1 ... W_{L-1}. A construction is a direct
sum of `Block`s, each with its own scale; the penalties of the blocks add up. Cross-entropy is in `deep_relu_ce`. Sources: Súkeník,
Lampert & Mondelli 2024 (arXiv 2405.14468) for squared error and strongly regular graphs; layers, direct sums and thresholds derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm import frames
from ufm.records import NoTheory
from ufm.theory import deep, deep_scale, mse
from ufm.theory.deep_points import Levels

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Block:
    """Layers (A, W_2, ..., W_L) at scale 1 of k classes, A (units, k) = W_1 H >= 0 and W_L (k, units).

    inside: (own minus other logit, how many others) for the classes of the block; own: the own logit, those of other blocks are 0.
    """

    name: str
    layers: tuple[Floats, ...]
    inside: tuple[tuple[float, int], ...]
    own: float = 1.0

    @property
    def classes(self) -> int:
        """k."""
        return int(self.layers[0].shape[1])

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """The most units of a hidden layer."""
        return max(len(layer) for layer in self.layers[:-1])

    def output(self) -> Floats:
        """W_L s(... s(W_2 A)), (k, k)."""
        A = self.layers[0]
        for W in self.layers[1:]:
            A = W @ np.maximum(A, 0.0)
        return A


def orthogonal(k: int, depth: int) -> Block:
    """Deep neural collapse of ReLU chains: every class on a unit of its own in every layer; C = k."""
    _deep_enough("orthogonal", depth, 2)
    return Block(f"orthogonal frame of {k}", (frames.orthogonal_frame(k),) * depth, ((1.0, k - 1),))


def graph(r: int, depth: int) -> Block:
    """The triangular graph, k = r(r-1)/2 classes as edges of K_r, L >= 3: A = B (vertices against edges), then W_2 ... W_{L-2} = I.

    W_{L-1} has 1 on the two vertices of its edge and -1 elsewhere: 2 (own), 0 (adjacent), -2 (disjoint); the ReLU leaves 2 I, W_L = I/2.
    C^{L+1} = (1/4) ||B||_nuc^2 r^{L-2} k^2, ||B||_nuc = (r-1) sqrt(r-2) + sqrt(2r-2). Rank r up to W_{L-1}. Needs a width of k.
    """
    _deep_enough("graph", depth, 3)
    B = frames.graph_incidence(r)
    k = B.shape[1]
    return Block(f"graph of {k}", (B, *(np.eye(r),) * (depth - 3), (2 * B - 1).T, np.eye(k) / 2), ((1.0, k - 1),))


def vertices(K: int) -> int:
    """r with K = r(r-1)/2, at least 3; NoTheory for other K."""
    r = frames.triangular_root(K)
    if r < 3:
        raise NoTheory(f"deep_relu.vertices: K is {K}, but the graph solution needs K = r(r-1)/2 with r >= 3: 3, 6, 10, 15, 21, ...")
    return r


def squared_norms(block: Block, centred_in: int | None = None) -> Floats:
    """(||A||_nuc, ||A||_nuc, ||W_2||^2, ..., ||W_L||^2), (L+1,): H and W_1 of A at their least product, then the others.

    centred_in: K, for W_L with the mean of its column over K rows taken off, which cross-entropy does not see.
    """
    A, *weights = block.layers
    nuclear = np.linalg.svd(A, compute_uv=False).sum()
    norms = np.array([nuclear, nuclear, *(float((W * W).sum()) for W in weights)])
    if centred_in is not None:
        norms[-1] -= (weights[-1].sum(axis=0) ** 2).sum() / centred_in
    return norms


def cost(block: Block, centred_in: int | None = None) -> float:
    """C, the geometric mean of `squared_norms`: (lambda_eff/2)(L+1) C z^p is the least penalty of the block at scale z.

    Costs of a direct sum add up: prod_l (f_l + g_l)^{1/(L+1)} is least, and their sum, where both blocks are balanced (Minkowski).
    """
    return float(np.exp(np.log(squared_norms(block, centred_in)).mean()))


def squared_error(blocks: Sequence[Block], lam: ArrayLike) -> Levels:
    """Scales z (..., blocks), value, fit and penalty (...) of a direct sum at lambda_eff (...); NaN where a scale does not exist.

    fit = sum_b (k_b/K)(1 - z_b)^2/2; each z is the larger root of (k_b/K)(1 - z) z^{(L-1)/(L+1)} = lambda_eff C_b. At one scale for all,
    as for one block, the value depends on lambda_eff C alone and rises in it: a smaller C is better at every lambda_eff.
    """
    depth, K = sizes("deep_relu.squared_error", blocks)
    level = np.asarray(lam, dtype=np.float64)
    scales, fit, penalty = [], np.zeros(level.shape), np.zeros(level.shape)
    for block in blocks:
        if block.own != 1 or any(gap != 1 for gap, many in block.inside if many):
            raise NoTheory(f"deep_relu.squared_error: '{block.name}' does not make the identity, the targets of squared error")
        C, share = cost(block), block.classes / K
        t = _shortfall(level * C / share, depth)
        scales.append(1 - t)
        fit += share * t**2 / 2
        penalty += level / 2 * (depth + 1) * C * (1 - t) ** deep_scale.exponent(depth)
    return Levels(np.stack(scales, axis=-1), fit + penalty, fit, penalty)


def largest(blocks: Sequence[Block]) -> float:
    """The largest lambda_eff at which every scale of `squared_error` exists: t = (L+1)/(2L) there, which is above the value 1/2 of zero."""
    depth, K = sizes("deep_relu.largest", blocks)
    return min(block.classes / K * _fold(depth)[1] / cost(block) for block in blocks)


def below_zero(blocks: Sequence[Block]) -> float:
    """The lambda_eff up to which a single block lies below the value 1/2 of zero: z >= (L-1)/L. NoTheory for several blocks."""
    if len(blocks) != 1:
        raise NoTheory(f"deep_relu.below_zero: {len(blocks)} blocks lose their classes one after the other; ask for one block")
    return mse.critical_strength(blocks[0].depth) / cost(blocks[0])


def graph_beats_dnc(r: int, depth: int) -> bool:
    """C of the graph below that of the orthogonal frame, k: (1/4) ||B||_nuc^2 r^{L-2} k^2 < k^{L+1}, at every lambda_eff.

    Under cross-entropy too: both heads are then centred alike. False says that this construction is above, not that every graph is.
    """
    return cost(graph(r, depth)) < r * (r - 1) / 2


def dnc_is_not_optimal(K: int, depth: int, d: int) -> bool:
    """Squared error: some graph on k <= K classes beside an orthogonal frame of the others costs less than DNC at the same scale.

    At every lambda_eff; true for K >= 6 with L >= 4. False decides nothing. NoTheory where the width is below K.
    """
    if d < K:
        raise NoTheory(f"deep_relu.dnc_is_not_optimal: d is {d}, but the constructions need a width of at least K = {K}")
    return depth >= 3 and any(graph_beats_dnc(r, depth) for r in range(3, K + 1) if r * (r - 1) <= 2 * K)


def factors(
    blocks: Sequence[Block], scales: ArrayLike, n: int, lam_h: float, lam_w: ArrayLike, d: int, *, centred: bool = False
) -> tuple[Floats, ...]:
    """(H, W_1, ..., W_L) of the direct sum at these scales (blocks,): penalties of all factors equal, block by block.

    H (d, K) of class means, W_l (d, d), W_L (K, d); lam_w (L,). centred: W_L without its column means, for cross-entropy. NoTheory where a
    scale does not exist (NaN); ValueError where d is below the units needed or lam_w has another depth.
    """
    depth, K = sizes("deep_relu.factors", blocks)
    z, w = np.asarray(scales, dtype=np.float64), np.asarray(lam_w, dtype=np.float64)
    units = sum(block.width for block in blocks)
    if w.shape != (depth,) or z.shape != (len(blocks),):
        raise ValueError(f"deep_relu.factors: lam_w has shape {w.shape} and scales {z.shape}, but must be ({depth},) and ({len(blocks)},)")
    if d < units:
        raise ValueError(f"deep_relu.factors: d is {d}, but these blocks have up to {units} units in a layer; use width >= {units}")
    if np.isnan(z).any():
        raise NoTheory("deep_relu.factors: a scale is NaN: the construction is not stationary at this penalty; use a smaller one")
    found = [np.zeros((d, K)), *(np.zeros((d, d)) for _ in range(depth - 1)), np.zeros((K, d))]
    lam = np.array([n * lam_h, *w])
    row = column = 0
    for block, scale in zip(blocks, z, strict=True):
        U, s, Vt = np.linalg.svd(block.layers[0], full_matrices=False)
        r = int((s > 1e-12 * s[0]).sum())
        parts = [np.sqrt(s[:r, None]) * Vt[:r], U[:, :r] * np.sqrt(s[:r]), *block.layers[1:]]
        C, norms = cost(block, K if centred else None), squared_norms(block, K if centred else None)
        each = np.sqrt(deep.lambda_eff(n, lam_h, w) * C * scale ** deep_scale.exponent(depth) / (lam * norms))
        for i, part in enumerate(parts):
            top, left = (column if i == depth else row), (column if i == 0 else row)
            found[i][top : top + part.shape[0], left : left + part.shape[1]] = each[i] * part
        row, column = row + block.width, column + block.classes
    if centred:
        found[-1] -= found[-1].mean(axis=0)
    return tuple(found)


def _shortfall(eps: Floats, depth: int) -> Floats:
    """t = 1 - z, the smaller root of t (1-t)^{(L-1)/(L+1)} = eps, NaN above its maximum.

    Its logarithm is concave and rising in log t, so Newton's method from t = eps rises to the root; slowly at the maximum only.
    """
    (last, most), q = _fold(depth), (depth - 1) / (depth + 1)
    exists = (eps > 0) & (eps <= most * (1 + 1e-15))
    e = np.where(exists, eps, most / 2)
    t = e
    for _ in range(STEPS):
        slope = np.maximum(1 - q * t / (1 - t), 1e-300)
        t = np.minimum(t * np.exp(np.minimum(-(np.log(t / e) + q * np.log1p(-t)) / slope, 50.0)), last)
    return np.where(exists, t, np.nan)


STEPS = 60  # the error halves at each step at the very maximum, and squares elsewhere


def _fold(depth: int) -> tuple[float, float]:
    """(t, eps) at the maximum of t (1-t)^{(L-1)/(L+1)}: t = (L+1)/(2L)."""
    t = (depth + 1) / (2 * depth)
    return t, t * (1 - t) ** ((depth - 1) / (depth + 1))


def sizes(call: str, blocks: Sequence[Block]) -> tuple[int, int]:
    """(L, K) of a direct sum; ValueError naming the call without blocks of one depth."""
    depths = {block.depth for block in blocks}
    if len(depths) != 1:
        raise ValueError(f"{call}: the blocks have depths {sorted(depths)}, but must have one depth; build them alike")
    return depths.pop(), sum(block.classes for block in blocks)


def _deep_enough(call: str, depth: int, least: int) -> None:
    if depth < least:
        raise NoTheory(f"deep_relu.{call}: depth is {depth}, but the construction needs at least {least} weight matrices")
