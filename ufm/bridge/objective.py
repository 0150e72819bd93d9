"""What training minimises: mean data loss, penalty and weight decay, drawn in batches and measured over the whole training set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ufm.bridge.data import Data

Loss = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[nn.Module, Tensor, int], Tensor]
Batch = tuple[Tensor, Tensor]


class Objective:
    """F = mean over the sampling of [loss + penalty] + (weight_decay/2)|theta|^2 of a model on data; batch None: all samples at once.

    balanced: the mean over classes of the mean over their samples. ValueError where model, data, batch and penalty do not fit.
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
        self.parted = hasattr(model, "body") and hasattr(model, "head")
        self.taught = [layer for layer in model.modules() if getattr(layer, "needs_labels", False)]
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
        """Features (B, d), None of a model without a body, and logits (B, K), in training; heads that ask for labels get them.

        Where features are not finite and the head refuses them, the logits are NaN: the run has diverged, and its history says so.
        """
        if not self.parted:
            with ExitStack() as stack:
                for layer in self.taught:
                    stack.enter_context(layer.labelled(labels))  # type: ignore[operator]
                return None, self.model(inputs)
        features = self.model.body(inputs)  # type: ignore[operator]
        try:
            return features, self.model.head(features, labels) if self.taught else self.model.head(features)  # type: ignore[operator]
        except ValueError:
            if bool(torch.isfinite(features).all()):
                raise
            return features, (features.sum(dim=1, keepdim=True) * math.nan).expand(-1, self.data.classes)

    def terms(self, features: Tensor | None, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data loss and penalty of a batch; the weight decay is the optimiser's."""
        value = self.loss(logits, labels)
        return value, None if self.penalty is None or features is None else self.penalty(self.model, features, len(features))

    def measured(self) -> dict[str, float]:
        """loss, objective and gradient_norm over the training set, the model in training mode, whose buffers move as in a step.

        Batches are those of one fixed permutation, not varied. gradient_norm: |grad F| over the larger of the norms of its two parts, the
        loss and all penalties; 0 where both vanish, |grad F| itself without a penalty.
        """
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        slopes = [[torch.zeros_like(p, dtype=torch.float64) for p in self.parameters] for _ in range(2)]
        for inputs, labels in self._measured_batches():
            for i, term in enumerate(self._shared_terms(inputs, labels)):
                if term is not None:
                    sums[i] += term.detach()
                    self._add_slope(slopes[i], term)
        values = [p.detach() for p in self.parameters]
        for slope, value in zip(slopes[1], values, strict=True):
            slope += self.weight_decay * value
        both = [a + b for a, b in zip(*slopes, strict=True)]
        total, *norms = torch.stack([_norm(both), _norm(slopes[0]), _norm(slopes[1])]).tolist()
        loss, penalty = sums.tolist()
        if self.penalty is not None or self.weight_decay:
            larger = math.nan if math.isnan(total) else max(norms)
            total = total / larger if larger else 0.0
        return {"loss": loss, "objective": loss + penalty + self.weight_decay / 2 * float(_norm(values)) ** 2, "gradient_norm": total}

    def _measured_batches(self) -> Iterator[Batch]:
        for index in [None] if self.parts == 1 else self.fixed.tensor_split(self.parts):
            yield self.data.batch(index) if self.whole is None else self.whole

    def _shared_terms(self, inputs: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        """What one batch adds to the data loss and to the penalty of the training set."""
        features, logits = self.outputs(inputs, labels)
        if logits.ndim != 2 or logits.shape[1] != self.data.classes:
            raise ValueError(
                f"train: the model gives outputs of shape {tuple(logits.shape)} for {len(labels)} samples of {self.data.classes} classes; "
                f"its last layer must give (B, {self.data.classes})"
            )
        sums: list[Tensor | None] = [None, None]
        for share, at in self._shares(labels):
            for i, term in enumerate(self.terms(None if features is None else features[at], logits[at], labels[at])):
                if term is not None:
                    if term.ndim:
                        name = ("loss", "penalty")[i]
                        raise ValueError(
                            f"train: {name} gives shape {tuple(term.shape)}, but must give one number, the mean over the batch"
                        )
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
        if self.penalty is not None and not self.parted:
            raise ValueError("train: penalty needs features, but the model has no body and head; give models.Network(body, head)")
        if self.augment and self.data.inputs.ndim != 4:
            raise ValueError(f"train: augment varies pictures, but the inputs of {self.data.name!r} are none; leave it out")


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).square().sum().sqrt()
