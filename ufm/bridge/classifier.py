"""The linear layers of a network's head, and the classifier W h + b that the last of them multiply to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Layers = dict[str, nn.Module]


def linear_layers(name: str, head: nn.Module) -> tuple[Layers, list[str]]:
    """The head's layers with a weight matrix in the order they act, by name, and the names of those behind the last activation.

    A head with a weight (K, d) is its own only layer; in a Sequential the first is named as the head, which its features enter, the others
    as in `named_modules`. Identity and dropout are no activation. ValueError for any other head, and for one that ends in an activation.
    """
    if _linear(head):
        return {name: head}, [name]
    layers: Layers = {}
    tail: list[str] = []
    for child, module in head.named_children() if isinstance(head, nn.Sequential) else ():
        if _linear(module):
            path = name if not layers else f"{name}.{child}" if name else child
            layers[path] = module
            tail.append(path)
        elif not isinstance(module, (nn.Identity, nn.Dropout)):
            tail = []
    if not tail:
        raise ValueError(
            f"Monitor: head {name!r} is a {type(head).__name__} that does not end in a linear layer; name an nn.Linear, a head of "
            "ufm.bridge, or an nn.Sequential of linear layers and activations"
        )
    return layers, tail


def product(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """W (K, d) and b (K, 1) in float64 of linear layers one after the other; b is zero where none has a bias."""
    W, b = weight(layers[0]), offset(layers[0])
    for layer in layers[1:]:
        W, b = weight(layer) @ W, weight(layer) @ b + offset(layer)
    return W, b


def weight(layer: nn.Module) -> Tensor:
    """The weight matrix in float64, outside any graph."""
    W: Any = layer.weight
    return torch.as_tensor(W.detach(), dtype=torch.float64)


def offset(layer: nn.Module) -> Tensor:
    """The bias as a column in float64, zeros where there is none."""
    b, W = getattr(layer, "bias", None), weight(layer)
    return W.new_zeros(W.shape[0], 1) if b is None else b.detach().to(torch.float64)[:, None]


def scaled(layer: nn.Module, features: Tensor) -> Tensor:
    """The features a head multiplies: radius h/|h| in float64 where it has a radius, h = 0 as it is; else h itself."""
    radius = getattr(layer, "radius", None)
    if radius is None:
        return features
    h = features.to(torch.float64)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h * (float(radius) / torch.where(norm > 0, norm, 1.0))


def _linear(module: nn.Module) -> bool:
    W = getattr(module, "weight", None)
    return isinstance(W, Tensor) and W.ndim == 2
