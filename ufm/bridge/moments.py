"""What one layer has shown so far: class moments from batches in turn, in float64, without cancellation, and the samples where asked.

With p_k the first sample seen of class k, the sums of x - p_k and of |x - p_k|^2 give mean and variance: where a class is collapsed the
differences are exact, however far from the origin, and as p_k is itself a sample the relative error of a variance is at most a few
N 2^-53, whatever the order of the data. The scatter is kept as a triangular factor, each batch entering by its residuals about its own
class means and by the shift of these (Chan, Golub & LeVeque 1983), so that spectra keep their small singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

BLOCK = 1 << 16  # float64 numbers that stay in a core's cache; an accelerator takes a layer at once
CPU = torch.device("cpu")
ROWS = 1024  # fewest rows worth a triangular factor


@dataclass(frozen=True, eq=False)
class Batch:
    """Labels (n,) on the layer's device; on the CPU samples per class (K,) and the first sample of each, n where there is none."""

    labels: Tensor
    counts: Tensor
    first: Tensor

    @classmethod
    def of(cls, labels: Tensor, classes: int) -> Self:
        """From labels on the CPU."""
        n = labels.shape[0]
        first = torch.full((classes,), n).scatter_reduce_(0, labels, torch.arange(n), "amin")
        return cls(labels, torch.bincount(labels, minlength=classes).to(torch.float64), first)

    def to(self, device: torch.device) -> Batch:
        """The same with its labels on the device."""
        return Batch(self.labels.to(device), self.counts, self.first)


@dataclass(frozen=True)
class Asked:
    """What is kept beside means and variances: the scatter's factor, the largest entry of each sample and coordinate, the samples."""

    scatter: bool
    extremes: bool
    samples: bool


class Moments:
    """Streaming moments of K classes of features (n, d): counts (K,) on the CPU, all else in float64 where the features are."""

    def __init__(self, asked: Asked, classes: int, like: Tensor) -> None:
        n, self.width = like.shape
        self.asked, self.device = asked, like.device
        wide = max(1, BLOCK // n) if like.device.type == "cpu" and not asked.scatter else self.width
        self.columns = [slice(a, min(a + wide, self.width)) for a in range(0, self.width, wide)]
        shapes = [(classes, c.stop - c.start) for c in self.columns]
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.pivots = [torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes]
        self.totals = [torch.zeros_like(pivot) for pivot in self.pivots]
        self.squares = torch.zeros(classes, dtype=torch.float64, device=self.device)
        self.rows: list[Tensor] = []  # with Gram N Sigma_W
        self.largest = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        self.tops: list[Tensor] = []
        self.samples: list[Tensor] = []

    def add(self, X: Tensor, batch: Batch) -> None:
        """One more batch of features X (n, d), of any real dtype."""
        new = torch.nonzero((self.counts == 0) & (batch.counts > 0))[:, 0]
        born, seeds = new.to(self.device), batch.first[new].to(self.device)
        squares = torch.zeros(X.shape[0], dtype=torch.float64, device=self.device)
        for columns, pivot, total in zip(self.columns, self.pivots, self.totals, strict=True):
            if len(new):
                pivot[born] = X[seeds, columns].to(torch.float64)
            x = X[:, columns].to(torch.float64, copy=True).sub_(pivot.index_select(0, batch.labels))
            squares += torch.linalg.vecdot(x, x)
            if self.asked.scatter:
                part = torch.zeros_like(total).index_add_(0, batch.labels, x)
                self._extend(x, part, total, batch)
                total += part
            else:
                total.index_add_(0, batch.labels, x)
        self.squares.index_add_(0, batch.labels, squares)
        self.counts += batch.counts
        if self.asked.extremes:
            size = X.abs()
            self.largest = torch.maximum(self.largest, size.amax(0).to(torch.float64))
            self.tops.append(size.amax(1).to(torch.float64))
        if self.asked.samples:
            self.samples.append(X.clone())

    def _extend(self, x: Tensor, part: Tensor, total: Tensor, batch: Batch) -> None:
        """Rows of a batch, x (n, d) about the pivots with class sums `part`, after those that have the sums `total`."""
        means = part / batch.counts.clamp(min=1.0)[:, None].to(self.device)
        self.rows += [x - means.index_select(0, batch.labels), _between(total, self.counts, part, batch.counts)]
        if sum(map(len, self.rows)) > max(2 * self.width, ROWS):
            self.rows = [torch.linalg.qr(torch.cat(self.rows), mode="r").R]

    def merge(self, other: Moments) -> None:
        """Take in what another process has seen of the same layer."""
        p, q = torch.cat(self.pivots, dim=1), torch.cat(other.pivots, dim=1)
        seen, there = (c.to(self.device)[:, None] for c in (self.counts, other.counts))
        shift = torch.where((seen > 0) & (there > 0), q - p, 0.0)
        part, total = torch.cat(other.totals, dim=1), torch.cat(self.totals, dim=1)
        self.squares += other.squares + torch.linalg.vecdot(shift, 2 * part + there * shift)
        part = part + there * shift
        if self.asked.scatter:
            self.rows += [*other.rows, _between(total, self.counts, part, other.counts)]
        self.columns, self.pivots, self.totals = [slice(0, self.width)], [torch.where(seen > 0, p, q)], [total + part]
        self.counts = self.counts + other.counts
        self.largest = torch.maximum(self.largest, other.largest)
        self.tops += other.tops
        self.samples += other.samples

    def to(self, device: torch.device) -> Moments:
        """These moments on another device; the same object where it is there already."""
        if self.device == device:
            return self
        moved = object.__new__(Moments)
        moved.__dict__ = {name: _moved(value, device) for name, value in self.__dict__.items()}
        moved.counts, moved.device = self.counts, device
        return moved

    @property
    def finite(self) -> bool:
        """Whether no feature so far was infinite or NaN."""
        return bool(torch.isfinite(self.squares).all())

    def means(self) -> Tensor:
        """Class means (K, d)."""
        n = self.counts.to(self.device)[:, None]
        return torch.cat([pivot + total / n for pivot, total in zip(self.pivots, self.totals, strict=True)], dim=1)

    def variances(self) -> Tensor:
        """Mean squared distances to the class means, (K,)."""
        n = self.counts.to(self.device)
        offset = torch.stack([torch.linalg.vecdot(total, total) for total in self.totals]).sum(0)
        return ((self.squares - offset / n) / n).clamp(min=0.0)


@dataclass(eq=False)
class Seen:
    """What one process has seen: moments by layer, labels and margins of the logits by batch, whether a batch stopped half-way."""

    moments: dict[str, Moments] = field(default_factory=dict)
    labels: list[Tensor] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)
    torn: bool = False


def gathered(mine: Seen, place: torch.device) -> Seen:
    """What all processes of torch.distributed have seen, in the order of their ranks; RuntimeError where it is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("Monitor.report: distributed is True, but torch.distributed is not running; call init_process_group first")
    mine = replace(mine, moments={name: m.to(CPU) for name, m in mine.moments.items()}, margins=[m.to(CPU) for m in mine.margins])
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    whole = Seen(torn=any(part.torn for part in parts))
    for part in parts:
        for name, moments in part.moments.items():
            if name in whole.moments:
                whole.moments[name].merge(moments)
            else:
                whole.moments[name] = moments
        whole.labels += part.labels
        whole.margins += part.margins
    whole.moments = {name: m.to(place) for name, m in whole.moments.items()}
    return whole


def pooled(x: Tensor) -> Tensor:
    """Means over the pixels of (n, C, H, W), (n, C) in float64."""
    few = max(1, BLOCK // x[0].numel()) if x.device.type == "cpu" else len(x)
    return torch.cat([part.mean(dim=(2, 3), dtype=torch.float64) for part in torch.split(x, few)])


def _between(total: Tensor, counts: Tensor, part: Tensor, more: Tensor) -> Tensor:
    """sqrt(n m/(n + m)) (mean of part - mean of total) of the classes in both, the rows that two groups' scatter lacks of their union's."""
    at = torch.nonzero((counts > 0) & (more > 0))[:, 0]
    n, m = (c[at, None].to(total.device) for c in (counts, more))
    at = at.to(total.device)
    return torch.sqrt(n * m / (n + m)) * (part[at] / m - total[at] / n)


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_moved(v, device) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
