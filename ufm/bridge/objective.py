"""What training minimises: mean data loss, penalty and weight decay, drawn in batches and measured over the whole training set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ufm.bridge.data import Data

Loss = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[nn.Module, Tensor, int], Tensor]
Batch = tuple[Tensor, Tensor]


class Objective:
    """F = mean over the sampling of [loss + penalty] + (weight_decay/2)|theta|^2 of a model on data; batch None: all samples at once.

    The loss is a mean of one term a sample; balanced: the mean over classes of the mean over their samples. A penalty is of the features
    that `listening` hears. ValueError where model, data, batch, loss and penalty do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        loss: Loss,
        penalty: Penalty | None,
        *,
        batch: int | None,
        balanced: bool,
        augment: bool,
        weight_decay: float,
        seed: int,
    ) -> None:
        self.model, self.data, self.loss, self.penalty = model, data, loss, penalty
        self.balanced, self.augment, self.weight_decay = balanced, augment, weight_decay
        self.size, self.device = len(data.labels), data.labels.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.taught = [layer for layer in model.modules() if getattr(layer, "needs_labels", False)]
        self._heard: list[Any] | None = None  # what the body gave in the forward pass under way
        self._check(batch)
        self.parts = math.ceil(self.size / (batch or self.size))
        self.whole = data.batch() if batch is None and not augment else None
        self.counts = torch.bincount(data.labels, minlength=data.classes)
        self.by_class = torch.argsort(data.labels, stable=True)
        self.fixed = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def batches(self, draws: torch.Generator) -> Iterator[Batch]:
        """(inputs, labels) of one epoch, drawn from a generator of the data's device; the batches are equal up to one sample."""
        if self.whole is not None:
            yield self.whole
            return
        order = self._balanced(draws) if self.balanced else torch.randperm(self.size, generator=draws, device=self.device)
        for index in order.tensor_split(self.parts):
            yield self.data.batch(index, augment=draws if self.augment else None)

    def outputs(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Features (B, d), None without a penalty, and logits (B, K) of the model, in training; layers that ask for labels get them.

        Where a layer refuses numbers that are not finite, the logits are NaN: the run has diverged, and its history says so.
        """
        heard: list[Any] = []
        self._heard = heard
        try:
            logits = self._forward(inputs, labels)
        except ValueError:
            if not self._refused(inputs, labels):
                raise
            return None, (torch.stack([p.sum() for p in self.parameters]).sum() * math.nan).expand(len(labels), self.data.classes)
        finally:
            self._heard = None
        if self.penalty is None:
            return None, logits
        if len(heard) != 1:
            raise ValueError(f"train: penalty needs features, but the model's body ran {len(heard)} times in one forward pass; run it once")
        if not isinstance(heard[0], Tensor) or len(heard[0]) != len(labels):
            kind = f"a tensor of shape {tuple(heard[0].shape)}" if isinstance(heard[0], Tensor) else f"a {type(heard[0]).__name__}"
            raise ValueError(f"train: penalty needs features, but the model's body gives {kind} for {len(labels)} samples; give (B, d)")
        return heard[0], logits

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the output of the model's body is heard where a penalty asks for it."""
        if self.penalty is None:
            yield
            return
        with self.model.body.register_forward_hook(self._hear):  # type: ignore[union-attr]
            yield

    def _hear(self, body: nn.Module, args: Any, output: Any) -> None:
        if self._heard is not None:
            self._heard.append(output)

    def _forward(self, inputs: Tensor, labels: Tensor) -> Any:
        with ExitStack() as stack:
            for layer in self.taught:
                stack.enter_context(layer.labelled(labels))  # type: ignore[operator]
            return self.model(inputs)

    @torch.no_grad()
    def _refused(self, inputs: Tensor, labels: Tensor) -> bool:
        """Whether the layer that raises was given numbers that are not finite, found by a second pass."""
        given: list[tuple[Any, ...]] = []  # to the layers entered and not yet left

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.append((*args, *kwargs.values()))

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            given.pop()

        with ExitStack() as hooks, suppress(ValueError):
            for layer in self.model.modules():
                hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(leave))
            self._forward(inputs, labels)
        return bool(given) and not all(bool(torch.isfinite(x).all()) for x in given[-1] if isinstance(x, Tensor))

    def terms(self, features: Tensor | None, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data loss and penalty of a batch, Python numbers taken as constants; the weight decay is the optimiser's."""
        value = _number("loss", self.loss(logits, labels), logits)
        if self.penalty is None or features is None:
            return value, None
        return value, _number("penalty", self.penalty(self.model, features, len(features)), logits)

    def total(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss and penalty of a batch, with the gradient 0 where both are constant."""
        features, logits = self.outputs(inputs, labels)
        value, extra = self.terms(features, logits, labels)
        both = value if extra is None else value + extra
        return both if both.requires_grad else both + 0.0 * logits.sum()

    def measured(self) -> dict[str, float]:
        """loss, penalty, objective and gradient_norm over the training set, the model in training mode, whose buffers move as in a step.

        Batches are those of one fixed permutation, not varied. gradient_norm: |grad F| over the larger of the norms of its two parts, the
        loss and all penalties; 0 where both vanish, |grad F| itself without a penalty.
        """
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        slopes = [[torch.zeros_like(p, dtype=torch.float64) for p in self.parameters] for _ in range(2)]
        moving = False
        for inputs, labels in self._measured_batches():
            for i, term in enumerate(self._shared_terms(inputs, labels)):
                if term is not None:
                    sums[i] += term.detach()
                    moving |= term.requires_grad
                    self._add_slope(slopes[i], term)
        if not moving:
            raise ValueError("train: neither loss nor penalty has a gradient; compute them from what they are given, undetached")
        values = [p.detach() for p in self.parameters]
        for slope, value in zip(slopes[1], values, strict=True):
            slope += self.weight_decay * value
        both = [a + b for a, b in zip(*slopes, strict=True)]
        total, *norms = torch.stack([_norm(both), _norm(slopes[0]), _norm(slopes[1])]).tolist()
        loss, penalty = sums.tolist()
        if self.penalty is not None or self.weight_decay:
            larger = math.nan if math.isnan(total) else max(norms)
            total = total / larger if larger else 0.0
        objective = loss + penalty + self.weight_decay / 2 * float(_norm(values)) ** 2
        return {"loss": loss, "penalty": penalty, "objective": objective, "gradient_norm": total}

    def _measured_batches(self) -> Iterator[Batch]:
        for index in [None] if self.parts == 1 else self.fixed.tensor_split(self.parts):
            yield self.data.batch(index) if self.whole is None else self.whole

    def _shared_terms(self, inputs: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        """What one batch adds to the data loss and to the penalty of the training set."""
        features, logits = self.outputs(inputs, labels)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.data.classes:
            kind = f"outputs of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"train: the model gives {kind} for {len(labels)} samples of {self.data.classes} classes; "
                f"its last layer must give (B, {self.data.classes})"
            )
        sums: list[Tensor | None] = [None, None]
        for share, at in self._shares(labels):
            for i, term in enumerate(self.terms(None if features is None else features[at], logits[at], labels[at])):
                if term is not None:
                    before = sums[i]
                    sums[i] = share * term if before is None else before + share * term
        return sums

    def _shares(self, labels: Tensor) -> list[tuple[Any, Any]]:
        """(share of F, which samples) for the parts of a batch whose samples count alike."""
        if not self.balanced:
            return [(len(labels) / self.size, slice(None))]
        present = torch.bincount(labels, minlength=self.data.classes).to(torch.float64) / self.counts / self.data.classes
        return [(share, labels == k) for k, share in enumerate(present) if share > 0]

    def _add_slope(self, slope: list[Tensor], term: Tensor) -> None:
        if term.requires_grad:
            found = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
            for total, part in zip(slope, found, strict=True):
                if part is not None:
                    total += part

    def _balanced(self, draws: torch.Generator) -> Tensor:
        """N samples, each first of a class, then of its samples, drawn with replacement."""
        k = torch.randint(self.data.classes, (self.size,), generator=draws, device=self.device)
        among = torch.rand(self.size, generator=draws, device=self.device, dtype=torch.float64) * self.counts[k]
        first = torch.cumsum(self.counts, 0) - self.counts
        return self.by_class[first[k] + torch.minimum(among.long(), self.counts[k] - 1)]

    def _check(self, batch: int | None) -> None:
        if not self.parameters:
            raise ValueError("train: the model has no parameter that asks for a gradient; set requires_grad_() on those to train")
        if batch is not None and batch > self.size:
            raise ValueError(f"train: batch is {batch}, but there are {self.size} training samples; give at most that, or None for all")
        if self.penalty is not None and not isinstance(getattr(self.model, "body", None), nn.Module):
            raise ValueError(
                "train: penalty needs features, the output of the model's body, but the model has no module `body`; name the part that "
                "makes the features so, or give models.Network(body, head)"
            )
        if strange := [layer for layer in self.taught if not hasattr(layer, "labelled")]:
            raise ValueError(
                f"train: {type(strange[0]).__name__} asks for labels (needs_labels), but cannot be given them; give it a context manager "
                "labelled(labels), as NearestETFHead has"
            )
        if self.balanced and getattr(self.loss, "weight", None) is not None and getattr(self.loss, "reduction", None) == "mean":
            raise ValueError(
                "train: loss has class weights, and its weighted mean is no mean of one term a sample, which sampling='balanced' needs; "
                "leave the weights out, or give sampling='plain'"
            )
        if self.augment and self.data.inputs.ndim != 4:
            raise ValueError(f"train: augment varies pictures, but the inputs of {self.data.name!r} are none; leave it out")


def _number(name: str, value: Any, beside: Tensor) -> Tensor:
    """What a loss or a penalty gave as a tensor; ValueError for what is not one number."""
    if isinstance(value, Real):
        return beside.new_tensor(float(value))
    if not isinstance(value, Tensor) or value.ndim:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"train: {name} gives {kind}, but must give one number, the mean over the batch")
    return value


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).square().sum().sqrt()
