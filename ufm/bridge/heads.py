"""Classifiers that are simplex ETFs, in place of a network's last `nn.Linear`: the simulator's heads and options, as modules.

    z = tau h/|h|  (z = h without a radius),     logits = W z + b,     b = -W mu_G,  mu_G the mean of z over the batch

In training W (of the nearest ETF) and b are made anew from every batch and left in the buffers `weight` and `bias`; in evaluation they are
frozen. Under torch.distributed class sums and counts are those of all processes, so buffers are equal everywhere and gradients that DDP
averages are those of one process with the whole batch, where all batches are of one size. A feature that is exactly 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf, nan
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ufm import heads
from ufm.arrays import like, readable, to_numpy
from ufm.bridge.backward import nearest_etf, no_autocast, over_processes
from ufm.etf_policies import Averaged, averaged

Classifier = tuple[Tensor, Tensor | None]  # W (K, d), b (K,)
HALF = (torch.float16, torch.bfloat16)


class _ETFHead(nn.Module):
    """What both heads share: features to z, z to logits, buffers, checks."""

    needs_labels: ClassVar[bool] = False  # in training
    kept: ClassVar[tuple[str, ...]]  # buffers whose dtype no conversion of the module changes
    weight: Tensor
    bias: Tensor | None
    step: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: heads.FixedETF | heads.NearestETF,
        radius: float | None,
        precision: torch.dtype,
        synchronise: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.options = in_features, out_features, options
        self.radius, self.precision, self.synchronise = radius, precision, synchronise
        self._check_options()
        self._labels: Tensor | None = None
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device, dtype=dtype))
        self.register_buffer("bias", None if options.bias is None else torch.zeros(out_features, device=device, dtype=dtype))
        self.register_buffer("step", torch.zeros((), device=device, dtype=torch.int64))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (B, d), in evaluation (..., d) -> logits of K classes, in the dtype that `nn.Linear` would give."""
        self._check_features(features)
        with no_autocast(features):
            z = self._scaled(features)
            W, b = self._classifier(z, labels)
        return nn.functional.linear(z, W.to(z.dtype), None if b is None else b.to(z.dtype))

    @contextmanager
    def labelled(self, labels: Tensor) -> Iterator[None]:
        """Inside, training takes these labels (B,) where `forward` is given none: for a model that calls it with features only."""
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, radius={self.radius}, options={self.options}"

    def _renewed(self, z: Tensor, labels: Tensor | None) -> Classifier:
        """W and b of a training step from z, in the precision of the head, kept in the buffers."""
        raise NotImplementedError

    def _classifier(self, z: Tensor, labels: Tensor | None) -> Classifier:
        if self.training:
            return self._renewed(z.to(torch.promote_types(z.dtype, self.precision)), labels)
        if not self._ready():
            raise RuntimeError(
                f"{self._name}: it is in evaluation mode but has seen no batch in training, so it has no classifier yet; train it, or "
                "load its state_dict"
            )
        return self.weight, self.bias

    def _ready(self) -> bool:
        return not readable(self.step) or int(self.step) > 0

    def _scaled(self, features: Tensor) -> Tensor:
        x = features.float() if features.dtype in HALF else features
        if self.radius is None:
            return x
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, self.precision))
        return x * (self.radius / torch.where(norm > 0, norm, inf)).to(x.dtype)

    def _sums(self, z: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of z (B, d) over each column of members (B, M), (M, d), and the number of members, (M, 1), over all processes."""
        both = torch.cat([members.mT @ z, members.sum(dim=0)[:, None]], dim=1)
        if self.synchronise and dist.is_available() and dist.is_initialized():
            both = over_processes(both)
        if readable(both) and not bool(torch.isfinite(both).all()):
            raise ValueError(f"{self._name}: features hold NaN or infinity, but must be finite; look for a step size that is too long")
        return both[:, :-1], both[:, -1:]

    def _offset(self, W: Tensor, centre: Tensor) -> Tensor | None:
        """b = -W mu_G, (K,), mu_G (d,)."""
        if self.options.bias is None:
            return None
        b = -(W @ centre)
        return b if self.options.bias == "attached" else b.detach()

    @torch.no_grad()
    def _keep(self, **buffers: Tensor | None) -> None:
        """Write values into buffers, in place: they never are part of a graph."""
        for name, value in buffers.items():
            if value is not None:
                getattr(self, name).copy_(value)
        self.step += 1

    def reset_parameters(self) -> None:
        """As made, no batch seen; needed after `to_empty`."""
        for buffer in self.buffers():
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ETFHead:
        exact = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_options(self) -> None:
        for name, value, least in (("in_features", self.in_features, 1), ("out_features", self.out_features, 2)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{self._name}: {name} is {value!r}, but must be a whole number, at least {least}")
        r = self.radius
        if r is not None and (isinstance(r, bool) or not isinstance(r, Real) or not 0 < r < inf):
            raise ValueError(f"{self._name}: radius is {r!r}, but must be a positive, finite number, or None for features of any norm")
        if self.precision not in (torch.float32, torch.float64):
            raise ValueError(f"{self._name}: precision is {self.precision!r}, but must be torch.float32 or torch.float64")
        try:
            self.options.check(self.out_features, self.in_features)
        except ValueError as error:
            raise ValueError(f"{self._name}: {str(error).removeprefix('Problem: ')}") from None

    def _check_features(self, features: Tensor) -> None:
        shape, d = tuple(features.shape), self.in_features
        if not shape or shape[-1] != d or (self.training and (len(shape) != 2 or not shape[0])):
            rule = f"(B, {d}) with B >= 1" if self.training else f"(..., {d})"
            raise ValueError(f"{self._name}: features have shape {shape}, but must be {rule}; give one row a sample")
        if not features.dtype.is_floating_point:
            raise TypeError(f"{self._name}: features have dtype {features.dtype}, but must be real floating-point numbers; convert them")
        kind = features.device.type
        if features.dtype in HALF and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            raise TypeError(
                f"{self._name}: features have dtype {features.dtype} outside autocast, but half precision is taken under torch.autocast "
                "only; keep the model in float32 and use autocast"
            )


class NearestETFHead(_ETFHead):
    """W is at every training step the simplex ETF nearest to the running average of the class means of z about mu_G.

    options: `ufm.heads.NearestETF`, all of them; classes absent from a batch follow its `missing`. The gradient passes through W exactly,
    where options.gradient is on. Where averaged means say nothing (of one class only, or all equal) W stays as before, at first
    that of the unit vectors, without a gradient through it. Training needs labels (B,): `head(features, labels)`, or
    `with head.labelled(labels): model(inputs)`. dtype: of weight and bias, torch's default; precision: what the ETF is computed and the
    average kept in, whatever the module is converted to. synchronise: class sums over all processes of torch.distributed.
    ValueError for a width below K - 1 (K in the full form). Source: Markou, Ajanthan, Gould, NeurIPS 2024 (arXiv 2411.01248).
    """

    needs_labels: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("average", "frame")
    options: heads.NearestETF
    average: Tensor
    frame: Tensor
    seen: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        options: heads.NearestETF | None = None,
        radius: float | None = 5.0,
        precision: torch.dtype = torch.float64,
        synchronise: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = heads.NearestETF() if options is None else options
        if not isinstance(options, heads.NearestETF):
            raise TypeError(f"NearestETFHead: options is {options!r:.60}, but must be a ufm.heads.NearestETF, called")
        super().__init__(in_features, out_features, options, radius, precision, synchronise, device, dtype)
        d, K = in_features, out_features
        self.register_buffer("average", torch.zeros(d, K, device=device, dtype=precision))
        self.register_buffer("frame", torch.zeros(d, K if options.form == "full" else K - 1, device=device, dtype=precision))
        self.register_buffer("seen", torch.zeros(K, device=device, dtype=torch.bool))

    def _renewed(self, z: Tensor, labels: Tensor | None) -> Classifier:
        labels = self._checked(labels, z)
        classes = torch.arange(self.out_features, device=z.device)
        sums, counts = self._sums(z, (labels[:, None] == classes).to(z.dtype))
        centre = sums.sum(dim=0) / counts.sum()
        batch = (sums / counts.clamp(min=1)).mT - centre[:, None]
        average = self._averaged(batch.detach(), counts[:, 0] > 0, centre.detach()[:, None])
        noise = 8 * torch.finfo(z.dtype).eps * counts.detach().sum().sqrt()
        W, U = self._nearest(batch, average, noise * centre.detach().abs().max())
        b = self._offset(W, centre)
        self._keep(weight=W, bias=b, average=average.means, frame=U, seen=average.seen)
        return W, b

    def _averaged(self, batch: Tensor, present: Tensor, centre: Tensor) -> Averaged:
        before = None
        if self._ready():  # rate and weights of the step before are not needed for the next
            taken = int(self.step) if readable(self.step) else 1
            before = Averaged(taken, self.average.to(batch.dtype), None, batch.new_full((1, self.out_features), nan), self.seen)
        policies: Any = {"averaging": self.options.averaging, "missing": self.options.missing}
        return averaged(before, batch, present=present, centre=centre, **policies)

    def _nearest(self, batch: Tensor, average: Averaged, least: Tensor) -> tuple[Tensor, Tensor]:
        """W (K, d), with the gradient in the batch's means where the options want it, and U (d, m)."""
        options, means, previous = self.options, average.means, self.frame.to(batch.dtype) if self._ready() else None
        if average.weights is not None:
            own = 1.0 if options.weights is None else like(to_numpy(options.weights), average.weights)
            options = replace(options, weights=own * average.weights)
        if not _apart(means, options.weights, least):
            if previous is not None:
                return self.weight.to(batch.dtype, copy=True), previous
            options, means = replace(self.options, gradient=False), torch.eye(*means.shape, dtype=means.dtype, device=means.device)
        given = batch if options.gradient else batch.detach()
        found: tuple[Tensor, Tensor] = nearest_etf(given, means, average.rate, options, previous)
        return found

    def _checked(self, labels: Tensor | None, z: Tensor) -> Tensor:
        """The labels (B,) as int64 beside z."""
        labels = self._labels if labels is None else labels
        if labels is None:
            raise ValueError(
                "NearestETFHead: no labels are given, but in training W is made from the class means of the batch; call "
                "head(features, labels), or model(inputs) inside `with head.labelled(labels):`, or eval() first"
            )
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"NearestETFHead: labels are of {kind}, but must be a tensor of whole numbers; give class indices as int64")
        if tuple(labels.shape) != tuple(z.shape[:1]):
            raise ValueError(f"NearestETFHead: labels have shape {tuple(labels.shape)} for {len(z)} features, but must be ({len(z)},)")
        if readable(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.out_features:
            raise ValueError(
                f"NearestETFHead: labels run from {int(labels.min())} to {int(labels.max())}, but must lie in 0 ... "
                f"{self.out_features - 1}; set out_features to the number of classes"
            )
        return labels.to(z.device, torch.int64)


class FixedETFHead(_ETFHead):
    """W is a simplex ETF that never moves, that of `ufm.heads.FixedETF(rotation, seed, bias)`; labels are not needed, and not read.

    b = -W mu_G is made anew in every training step and stands still in evaluation. Others as for `NearestETFHead`.
    """

    kept: ClassVar[tuple[str, ...]] = ("frame",)
    options: heads.FixedETF
    frame: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rotation: Literal["canonical", "random"] = "canonical",
        seed: int = 0,
        bias: heads.Bias = "detached",
        radius: float | None = 5.0,
        precision: torch.dtype = torch.float64,
        synchronise: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, heads.FixedETF(rotation, seed, bias), radius, precision, synchronise, device, dtype)
        self.register_buffer("frame", torch.zeros(out_features, in_features, device=device, dtype=precision))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.frame.copy_(like(self.options.weights(self.out_features, self.in_features), self.frame))
        self.weight.copy_(self.frame)

    def _renewed(self, z: Tensor, labels: Tensor | None) -> Classifier:
        W, b = self.frame.to(z.dtype, copy=True), None  # a graph holds no buffer: DDP writes into them
        if self.bias is not None:
            sums, counts = self._sums(z, torch.ones(len(z), 1, dtype=z.dtype, device=z.device))
            b = self._offset(W, sums[0] / counts[0])
        self._keep(bias=b)
        return W, b

    def _ready(self) -> bool:
        return self.bias is None or super()._ready()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedETFHead:
        before = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != before:
            self.weight = self.frame.to(self.weight, copy=True)
        return self


def _apart(means: Tensor, weights: Any, least: Tensor) -> bool:
    """Whether the averaged means (d, K) of the classes that count differ by more than rounding and `least`."""
    if not readable(means):
        return True
    if weights is not None:
        means = means[:, like(to_numpy(weights), means) > 0]
    if means.shape[1] < 2:
        return False
    spread, noise = means - means.mean(dim=1, keepdim=True), 8 * torch.finfo(means.dtype).eps * means.abs().max()
    return bool(spread.abs().max() > torch.maximum(noise, least))
