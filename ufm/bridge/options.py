"""How to train: the options of `train`, checked, and nothing that moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class SGD:
    """u <- momentum u + g, theta <- theta - lr u (Nesterov: theta - lr (g + momentum u)); g includes the weight decay."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _within("SGD", "lr", self.lr, 0.0, math.inf)
        _within("SGD", "momentum", self.momentum, 0.0, 1.0)
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov is True, but needs a momentum; give momentum=0.9, say")

    def made(self, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
        """Torch's optimiser."""
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=weight_decay, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam:
    """Kingma & Ba 2015; g includes the weight decay (not AdamW)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _within("Adam", "lr", self.lr, 0.0, math.inf)
        _within("Adam", "beta1", self.beta1, 0.0, 1.0)
        _within("Adam", "beta2", self.beta2, 0.0, 1.0)
        _within("Adam", "epsilon", self.epsilon, 0.0, math.inf)

    def made(self, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
        """Torch's optimiser, its step in one kernel."""
        return torch.optim.Adam(parameters, self.lr, (self.beta1, self.beta2), self.epsilon, weight_decay, fused=True)


@dataclass(frozen=True)
class Training:
    """How to train: epochs passes over the data, by `optimiser` (SGD or Adam), in batches of at most `batch` samples (None: all at once).

    schedule of the rate, by epoch e of E: "constant"; "cosine", (1 + cos(pi e/E))/2; "step", `factor` at each share of E in `milestones`.
    weight_decay: the optimiser's, of all parameters: (weight_decay/2)|theta|^2 in the objective. sampling: "plain", each sample once an
    epoch, in batches equal up to one sample; "balanced", N draws an epoch, first of a class, then of a sample. augment: vary pictures
    (`Data.batch`). every: epochs between records; tol: stop at a record whose scale-free gradient norm is within it. dtype: of data and
    model, which `train` converts to it in place.
    """

    epochs: int
    optimiser: SGD | Adam
    batch: int | None = None
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    factor: float = 0.1
    weight_decay: float = 0.0
    sampling: Literal["plain", "balanced"] = "plain"
    augment: bool = False
    every: int = 10
    tol: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("every", 1), ("seed", 0), *([] if self.batch is None else [("batch", 1)])):
            object.__setattr__(self, name, _whole(name, getattr(self, name), least))
        if not isinstance(self.optimiser, SGD | Adam):
            raise ValueError(f"Training: optimiser is {self.optimiser!r}, but there are SGD(lr, ...) and Adam(lr, ...)")
        if self.schedule not in list(SCHEDULES):
            raise ValueError(f"Training: schedule is {self.schedule!r}, but there are {', '.join(SCHEDULES)}")
        if self.sampling not in ("plain", "balanced"):
            raise ValueError(f"Training: sampling is {self.sampling!r}, but there are plain and balanced")
        if self.sampling == "balanced" and self.batch is None:
            raise ValueError("Training: sampling is 'balanced' on full batches, but those are never drawn; give batch=, or weight the loss")
        if not isinstance(self.milestones, tuple | list) or not all(isinstance(at, Real) and 0.0 < at < 1.0 for at in self.milestones):
            raise ValueError(f"Training: milestones is {self.milestones!r}, but must be a tuple of shares of the epochs, between 0 and 1")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Training: dtype is {self.dtype}, but must be torch.float32 or torch.float64")
        _within("Training", "factor", self.factor, 0.0, math.inf)
        _within("Training", "weight_decay", self.weight_decay, 0.0, math.inf)
        _within("Training", "tol", 0.0 if self.tol is None else self.tol, 0.0, math.inf)

    def rate(self, epoch: int) -> float:
        """The optimiser's lr during this epoch, counted from 0."""
        return self.optimiser.lr * SCHEDULES[self.schedule](self, epoch / self.epochs)


SCHEDULES: dict[str, Callable[[Training, float], float]] = {
    "constant": lambda training, share: 1.0,
    "cosine": lambda training, share: (1.0 + math.cos(math.pi * share)) / 2.0,
    "step": lambda training, share: training.factor ** sum(share >= at - 1e-12 for at in training.milestones),
}


def _whole(name: str, value: Any, least: int) -> int:
    """The value as an int; ValueError unless it is a whole number, at least `least` and below 2^63."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**63:
        raise ValueError(
            f"Training: {name} is {value!r}, but must be a whole number of at least {least}{' and below 2^63' * (name == 'seed')}"
        )
    return int(value)


def _within(call: str, name: str, value: Any, low: float, high: float) -> None:
    """ValueError unless low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) < high:
        raise ValueError(
            f"{call}: {name} is {value!r}, but must be a finite number, at least {low:g}{f' and below {high:g}' * (high < math.inf)}"
        )
