"""Plain networks to train: an MLP, the CIFAR forms of ResNet-18 and ResNet-20, and deep linear or deep ReLU heads.

A body maps inputs to features (B, d) and has `out_features` = d; a head maps features to logits (B, K). Under `seeded(s)` a network comes
out the same whatever was drawn before: `with models.seeded(0): net = models.Network(models.mlp((64, 128, 32)), nn.Linear(32, 10))`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["linear", "relu"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules made inside draw their first weights from this seed; torch's own generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Network(nn.Module):
    """head(body(x)); labels, where given, go to the head, which must take them (as `NearestETFHead` does)."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Inputs (B, ...) -> logits (B, K)."""
        features = self.body(inputs)
        logits: Tensor = self.head(features) if labels is None else self.head(features, labels)
        return logits


class MLP(nn.Sequential):
    """A flattening layer, then linear layers with what follows each; `out_features` is the width of the features."""

    out_features: int


def mlp(widths: Sequence[int], *, batch_norm: bool = False, relu_features: bool = True, bias: bool = True) -> MLP:
    """The body x -> relu(V_m ... relu(V_1 x + c_1) ... + c_m), V_l of widths[l] x widths[l-1]; the last width is that of the features.

    batch_norm: after each linear layer, which then has no bias of its own. relu_features=False leaves the last ReLU out.
    Torch's own first weights. ValueError for less than two widths, or one below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"models.mlp: widths is {tuple(widths)}, but an MLP has an input and a feature width, each at least 1")
    layers: list[nn.Module] = [nn.Flatten()]
    for at, (wide, out) in enumerate(pairwise(widths), 2):
        layers += [nn.Linear(wide, out, bias=bias and not batch_norm)]
        layers += [nn.BatchNorm1d(out)] if batch_norm else []
        layers += [nn.ReLU()] if relu_features or at < len(widths) else []
    body = MLP(*layers)
    body.out_features = widths[-1]
    return body


def deep_head(width: int, classes: int, depth: int, activation: Activation = "linear", bias: bool = False) -> nn.Sequential:
    """The head W_L s(W_{L-1} ... s(W_1 h)) + b of `depth` = L layers, s the ReLU or nothing.

    W_1 ... W_{L-1} are width x width, W_L is classes x width; bias: of the last layer alone, as in `ufm.Problem`.
    """
    if depth < 1 or activation not in ("linear", "relu"):
        raise ValueError(
            f"models.deep_head: depth is {depth} and activation {activation!r}; give a depth of at least 1 and 'linear' or 'relu'"
        )
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width, bias=False)]
        layers += [nn.ReLU()] if activation == "relu" else []
    return nn.Sequential(*layers, nn.Linear(width, classes, bias=bias))


def weights(head: nn.Module) -> list[Tensor]:
    """The matrices W_1, ..., W_L of a head in the order they act, parameters or buffers as the head has them; ValueError without any."""
    found = [layer.weight for layer in head.modules() if isinstance(getattr(layer, "weight", None), Tensor) and layer.weight.ndim == 2]
    if not found:
        raise ValueError(f"models.weights: {type(head).__name__} holds no weight matrix; give a linear layer or a chain of them")
    return found  # type: ignore[return-value]


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3 x 3 convolutions, the first with the stride (He et al. 2016).

    Where the shape changes the shortcut is a 1 x 1 convolution with BatchNorm (their option B), or every stride-th pixel with zeros for
    the new channels, half on either side (option A, without parameters).
    """

    def __init__(self, channels: int, out: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(channels, out, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv3(out, out, 1), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = _projection(channels, out, stride) if projected else _Padded(out - channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, H/stride, W/stride)."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class _Padded(nn.Module):
    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.new, self.stride = new, stride

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


class ResNet(nn.Module):
    """A 3 x 3 stem, stages of residual blocks, each but the first on half the sides with twice the channels, and the mean over pixels."""

    def __init__(self, channels: int, width: int, stages: Sequence[int], projected: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())
        made, at = [], width
        for stage, blocks in enumerate(stages):
            out = width * 2**stage
            made += [Block(at if i == 0 else out, out, 2 if stage and i == 0 else 1, projected) for i in range(blocks)]
            at = out
        self.blocks = nn.Sequential(*made)
        self.out_features = at
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> features (B, out_features), all nonnegative."""
        features: Tensor = self.blocks(self.stem(images)).mean(dim=(2, 3))
        return features


def resnet18(channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-18 for small pictures: four stages of two blocks, 8 * width features; 11,173,962 parameters with a layer of 10 classes."""
    return ResNet(channels, width, (2, 2, 2, 2), projected=True)


def resnet20(channels: int = 3, width: int = 16) -> ResNet:
    """ResNet-20 of He et al. 2016: three stages of three blocks, 4 * width features; 269,722 parameters with a layer of 10 classes."""
    return ResNet(channels, width, (3, 3, 3), projected=False)


def _conv3(channels: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)


def _projection(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
