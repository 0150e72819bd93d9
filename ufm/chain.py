"""The factor chain of any depth: Z = W_L s(W_{L-1} ... s(W_1 A_0)) + b 1^T, with A_0 = H, or relu(V) for relu_of_free features.

Factors (H, W_1, ..., W_L[, b]) act in that order: H (B, d, cols), W_l (B, d, d), W_L (B, K, d), b (B, K, 1). s is the identity or the
ReLU, whose slope at 0 is taken as 0. Everything here is positively homogeneous of degree one in each factor (b apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ufm.arrays import Array, by_transpose, namespace

Factors = tuple[Array, ...]


@dataclass(frozen=True)
class Chain:
    """Which map the factors make: depth L, whether A_0 = relu(H), whether s is the ReLU, whether the last factor is a bias."""

    depth: int
    features_rectified: bool = False
    hidden_rectified: bool = False
    bias: bool = False

    def shapes(self, width: int, classes: int, cols: int) -> list[tuple[int, int]]:
        """The shape of each factor, without the batch axis."""
        inner = [(width, width)] * (self.depth - 1)
        return [(width, cols), *inner, (classes, width), *([(classes, 1)] if self.bias else [])]

    def rectified(self, layer: int) -> bool:
        """Whether A_layer went through a ReLU."""
        return self.features_rectified if layer == 0 else self.hidden_rectified


def forward(chain: Chain, factors: Sequence[Array]) -> tuple[Array, list[Array]]:
    """(W_L A_{L-1}, [A_0, ..., A_{L-1}]): the logits before the bias, and the inputs of each weight matrix."""
    layers = [rectify(factors[0]) if chain.features_rectified else factors[0]]
    for layer in range(1, chain.depth):
        pre = factors[layer] @ layers[-1]
        layers.append(rectify(pre) if chain.hidden_rectified else pre)
    return factors[chain.depth] @ layers[-1], layers


def pullback(chain: Chain, factors: Sequence[Array], layers: Sequence[Array], slope: Array) -> list[Array]:
    """Gradients in (H, W_1, ..., W_L) of a function of the logits with gradient `slope` (B, K, cols)."""
    gradients, error = [], slope
    for layer in range(chain.depth, 0, -1):
        gradients.append(by_transpose(error, layers[layer - 1]))
        error = _masked(chain, layers, layer - 1, factors[layer].mT @ error)
    return [error, *reversed(gradients)]


def push(chain: Chain, factors: Sequence[Array], layers: Sequence[Array], moves: Sequence[Array]) -> tuple[Array, list[Array]]:
    """The change of (W_L A_{L-1}, [A_0, ..., A_{L-1}]) to first order when the factors move along `moves`."""
    changes = [_masked(chain, layers, 0, moves[0])]
    for layer in range(1, chain.depth):
        change = moves[layer] @ layers[layer - 1] + factors[layer] @ changes[-1]
        changes.append(_masked(chain, layers, layer, change))
    return moves[chain.depth] @ layers[-1] + factors[chain.depth] @ changes[-1], changes


def push_pullback(
    chain: Chain,
    factors: Sequence[Array],
    layers: Sequence[Array],
    slope: Array,
    moves: Sequence[Array],
    changes: Sequence[Array],
    slope_change: Array,
) -> list[Array]:
    """The change of `pullback` when factors, layers and slope move along moves, changes and slope_change."""
    out, error, error_change = [], slope, slope_change
    for layer in range(chain.depth, 0, -1):
        out.append(by_transpose(error_change, layers[layer - 1]) + by_transpose(error, changes[layer - 1]))
        error_change = moves[layer].mT @ error + factors[layer].mT @ error_change
        error_change = _masked(chain, layers, layer - 1, error_change)
        error = _masked(chain, layers, layer - 1, factors[layer].mT @ error)
    return [error_change, *reversed(out)]


def rectify(x: Array) -> Array:
    return namespace(x).clip(x, 0.0, None)


def _masked(chain: Chain, layers: Sequence[Array], layer: int, x: Array) -> Array:
    return x * namespace(x).astype(layers[layer] > 0, x.dtype) if chain.rectified(layer) else x
