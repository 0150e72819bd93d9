"""The linear layers of a network's head, and the classifier W h + b that the last of them multiply to."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

Layers = dict[str, nn.Module]
TF32 = 2.0**-10  # what accelerators may round the factors of a float32 product to


def linear_layers(name: str, head: nn.Module) -> tuple[Layers, list[str]]:
    """The head's layers with a weight matrix in the order they act, by name, and the names of those behind the last activation.

    A head with a weight (K, d) is its own only layer, linear where `check` says so; in a Sequential the first is named as the head, which
    its features enter, the others as in `named_modules`. Identity and dropout are no activation. ValueError for any other head, for one
    that ends in an activation, and for a Sequential with a `forward` of its own.
    """
    if _linear(head):
        return {name: head}, [name]
    layers: Layers = {}
    tail: list[str] = []
    plain = type(head).forward is nn.Sequential.forward
    for child, module in zip(head._modules, head, strict=True) if plain and isinstance(head, nn.Sequential) else ():  # repeats included
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


def check(name: str, layer: nn.Module, features: Tensor, logits: Tensor) -> None:
    """ValueError unless a head's layer gave W h + b for the first of its `features` (n, d), up to the rounding of their precision."""
    W, b = product([layer])
    known = tuple(W.shape) == (*logits.shape[1:], features.shape[1]) and W.shape[0] == b.shape[0]
    if known:
        h, z = (x.to(W.device, torch.float64).mT for x in (scaled(layer, features[:1]), logits[:1]))
        error, size = torch.abs(W @ h + b - z), W.abs() @ h.abs() + b.abs()
        relative, least = _rounding(features, layer.weight, logits)  # type: ignore[arg-type]
        known = not bool(((error > relative * size + least) & (error < inf)).any())  # features that are not finite have their own error
    if not known:
        raise ValueError(
            f"Monitor.watch: the {type(layer).__name__} at {name!r}, with a weight {tuple(W.shape)}, does not give W h + b of the features "
            f"(n, {features.shape[1]}) that enter it; give a linear head, such as nn.Linear or one of ufm.bridge, or watch it in layers="
        )


def _rounding(*tensors: Tensor) -> tuple[float, float]:
    """Of the coarsest of these precisions and autocast's: relative error of a product, and what underflows."""
    kind = tensors[0].device.type
    dtypes = [x.dtype for x in tensors] + [torch.get_autocast_dtype(kind)] * torch.is_autocast_enabled(kind)
    coarsest = max((torch.finfo(dtype) for dtype in dtypes), key=lambda info: info.eps)
    return (1e-10 if coarsest.eps < 1e-10 else 2 * max(coarsest.eps, TF32)), coarsest.tiny


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
    return b.detach().to(torch.float64).reshape(-1, 1) if isinstance(b, Tensor) else W.new_zeros(W.shape[0], 1)


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
    return isinstance(W, Tensor) and W.ndim == 2 and W.is_floating_point()
