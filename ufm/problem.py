"""The problem: sizes, penalties and loss of a grid of unconstrained features models, checked once, at the door.

    F = sum_c (m_c/N) loss(Z_:c, y_c) + sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2) sum_c m_c ||H_:c||^2 + (lam_b/2)||b||^2

is the one convention (see `ufm.objective`); `PAPERS` converts the papers' penalties to it and back. A head other than the learned one
(`ufm.heads`) replaces W, its penalty and the bias; a radius replaces the feature penalty: H_:c stands for radius H_:c/||H_:c||.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm import heads
from ufm.heads import Head, Learned
from ufm.losses import TABLE, CrossEntropy, Loss

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """A grid of G unconstrained features models with the same sizes (K, width, depth).

    counts: (K,) or (G, K) samples per class. lam_h, lam_b: scalar or (G,); lam_w: scalar, (G,), or per layer (1, L), (G, L), W_1 first.
    lam_b None: no bias, 0.0: a free one. features: "free", "relu" (H >= 0), "relu_of_free" (H = relu(V); samples only).
    activation: after W_1 ... W_{L-1}, never on H or the logits. columns: "means" (one per class) or "samples".
    head: how W comes about (`ufm.heads`); radius: the norm that every feature column is given. Both need depth 1, free features, and 0
    for the penalties they replace; class means then stand for samples that are equal within their class.
    Held normalised: counts (G, K) integers, lam_w (G, L), lam_h (G,), lam_b (G,) or None. Raises ValueError or TypeError on bad input.
    """

    counts: Any
    width: int = field(kw_only=True)
    depth: int = field(default=1, kw_only=True)
    features: Literal["free", "relu", "relu_of_free"] = field(kw_only=True)
    activation: Literal["linear", "relu"] = field(default="linear", kw_only=True)
    loss: Loss = field(default_factory=CrossEntropy, kw_only=True)
    lam_w: Any = field(kw_only=True)
    lam_h: Any = field(kw_only=True)
    lam_b: Any = field(default=None, kw_only=True)
    head: Head = field(default_factory=Learned, kw_only=True)
    radius: float | None = field(default=None, kw_only=True)
    columns: Literal["means", "samples"] = field(default="means", kw_only=True)

    def __post_init__(self) -> None:
        self._check_options()
        self._spread_over_cells()
        self._check_columns()
        self._check_head()
        if isinstance(self.loss, CrossEntropy):
            self.loss.per_class(self.counts)

    def _check_options(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Problem: {name} is {getattr(self, name)!r}, but must be one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.loss, tuple(TABLE.values())):
            raise TypeError(
                f"Problem: loss is {self.loss!r}, but must be a loss object; use ufm.CrossEntropy(), ufm.MSE(), ufm.DotRegression(), "
                "ufm.Focal(gamma) or ufm.losses.from_autograd(value)"
            )
        for name in ("width", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"Problem: {name} is {value!r}, but must be a whole number, at least 1")

    def _spread_over_cells(self) -> None:
        """Counts and penalties as arrays over the G cells, checked and read-only."""
        counts = _counts(self.counts)
        lam_w = _penalty("lam_w", self.lam_w)
        if lam_w.ndim == 2 and lam_w.shape[1] != self.depth:
            raise ValueError(
                f"Problem: lam_w has {lam_w.shape[1]} columns, but depth = {self.depth}; give one column per weight matrix, W_1 first"
            )
        given = {"counts": counts, "lam_w": lam_w if lam_w.ndim == 2 else lam_w[:, None], "lam_h": _penalty("lam_h", self.lam_h)}
        if self.lam_b is not None:
            given["lam_b"] = _penalty("lam_b", self.lam_b)
        for name in ("lam_h", "lam_b"):
            if name in given and given[name].ndim == 2:
                raise ValueError(f"Problem: {name} has shape {given[name].shape}, but must be a scalar or (G,), one per cell")
        given |= _loss_cells(self.loss)
        lengths = {name: len(array) for name, array in given.items()}
        cells = max(lengths.values())
        for name, length in lengths.items():
            if length not in (1, cells):
                most = max(lengths, key=lambda n: lengths[n])
                raise ValueError(f"Problem: {name} has {length} cells, but {most} has {cells}; give 1 or {cells} for both")
        for name in ("counts", "lam_w", "lam_h", "lam_b"):
            if name in given:
                wide = self.depth if name == "lam_w" else given[name].shape[-1]
                shape = (cells,) if given[name].ndim == 1 else (cells, wide)
                object.__setattr__(self, name, _frozen(np.array(np.broadcast_to(given[name], shape))))

    def _check_columns(self) -> None:
        if self.columns == "means" and self.features == "relu_of_free":
            raise ValueError(
                "Problem: features='relu_of_free' with columns='means' is not exact (masks freeze sample by sample); use columns='samples'"
            )
        if self.columns == "samples" and np.any(self.samples != self.samples[0]):
            raise ValueError(
                "Problem: columns='samples' needs the same number of samples N in every cell, but the cells have "
                f"N = {', '.join(map(str, sorted(set(self.samples.tolist()))))}; use columns='means' or one problem per N"
            )

    def _check_head(self) -> None:
        if not isinstance(self.head, tuple(heads.TABLE.values())):
            raise TypeError(f"Problem: head is {self.head!r}, but must be one of ufm.heads ({', '.join(heads.TABLE)}), called")
        r = self.radius
        if r is not None and (isinstance(r, bool) or not isinstance(r, Real) or not 0 < r < np.inf):
            raise ValueError(f"Problem: radius is {r!r}, but must be a positive, finite number, or None for features of any norm")
        if self.special is None:
            return
        if self.depth != 1 or self.features != "free":
            raise ValueError(
                f"Problem: depth is {self.depth} and features is {self.features!r}, but {self.special} needs depth=1 and features='free'; "
                "use those, or head=ufm.heads.Learned() and radius=None"
            )
        fixed = {
            "lam_h": "" if r is None else f"radius={r} fixes the norm of every feature column",
            "lam_w": "" if self.head.norms is None else f"head={self.head.name} {self.head.norms}",
        }
        for name, why in fixed.items():
            if why and np.any(getattr(self, name) > 0):
                raise ValueError(f"Problem: {name} holds {getattr(self, name).max()}, but {why}; use {name}=0")
        if self.lam_b is not None and not self.head.trained:
            raise ValueError(
                f"Problem: lam_b holds {self.lam_b.max()}, but head={self.head.name} computes its bias, b = -W mu_G; use lam_b=None"
            )
        self.head.check(self.classes, self.width)

    @property
    def special(self) -> str | None:
        """The head and radius in words where they are not those of the plain model, W learned and features of any norm; None there."""
        if isinstance(self.head, Learned) and self.radius is None:
            return None
        return f"head={self.head.name}" if self.radius is None else f"head={self.head.name}, radius={self.radius:g}"

    @property
    def biased(self) -> bool:
        """Whether the logits have a bias, trained or the head's own."""
        return self.lam_b is not None or self.head.bias is not None

    @property
    def cells(self) -> int:
        """G."""
        return len(self.counts)

    @property
    def classes(self) -> int:
        """K."""
        return int(self.counts.shape[1])

    @cached_property
    def samples(self) -> Ints:
        """N of each cell, (G,)."""
        return _frozen(self.counts.sum(axis=1))

    @cached_property
    def labels(self) -> Ints:
        """Class of each column, (G, cols)."""
        if self.columns == "means":
            return np.broadcast_to(np.arange(self.classes), (self.cells, self.classes))
        return _frozen(np.stack([np.repeat(np.arange(self.classes), row) for row in self.counts]))

    @cached_property
    def multiplicity(self) -> Floats:
        """Samples each column stands for, m_c, (G, cols)."""
        return _frozen(self.counts.astype(np.float64) if self.columns == "means" else np.ones(self.labels.shape))

    def cell(self, index: int) -> Problem:
        """The problem of one cell alone."""
        return self.pick([index])

    def pick(self, indices: ArrayLike) -> Problem:
        """The grid of the given cells, in that order."""
        at = np.atleast_1d(np.asarray(indices))
        if at.dtype.kind not in "iu" or at.ndim > 1 or not at.size or at.min() < -self.cells or at.max() >= self.cells:
            raise ValueError(f"Problem.pick: indices is {indices!r}, but must be one or more whole numbers below G = {self.cells}")
        loss = self.loss
        if isinstance(loss, CrossEntropy):
            per_cell = {n: getattr(loss, n)[at] for n, rows in _loss_cells(loss).items() if len(rows) == self.cells > 1}
            loss = replace(loss, **per_cell)
        lam_b = None if self.lam_b is None else self.lam_b[at]
        return replace(self, counts=self.counts[at], lam_w=self.lam_w[at], lam_h=self.lam_h[at], lam_b=lam_b, loss=loss)


CHOICES = {
    "features": ("free", "relu", "relu_of_free"),
    "activation": ("linear", "relu"),
    "columns": ("means", "samples"),
}


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _counts(value: Any) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"Problem: counts is {value!r}, but must be numbers (K,) or (G, K) with rows of one length") from error
    if array.ndim not in (1, 2) or array.shape[-1] < 2 or array.dtype.kind not in "iuf" or not array.size:
        raise ValueError(
            f"Problem: counts has shape {array.shape} and type {array.dtype}, but must be numbers (K,) or (G, K) with K >= 2 classes"
        )
    bad = ~(np.isfinite(array) & (array >= 1) & (array == np.floor(array)) & (array < 2.0**53))
    if bad.any():
        raise ValueError(
            f"Problem: counts holds {array[bad][0]}, but every class needs a whole number of samples, at least 1; leave empty classes out"
        )
    return np.atleast_2d(array).astype(np.int64)


def _penalty(name: str, value: Any) -> Floats:
    if isinstance(value, bool):
        raise TypeError(f"Problem: {name} is {value}, but must be a number or an array of numbers")
    try:
        array = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"Problem: {name} is {value!r}, but must be a number or an array of numbers") from error
    if value is None:
        raise TypeError(f"Problem: {name} is None, but must be a number or an array of numbers; 0 is no penalty")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        raise ValueError(f"Problem: {name} holds {array[bad][0]}, but a penalty must be finite and at least 0")
    if array.ndim > 2 or not array.size:
        raise ValueError(f"Problem: {name} has shape {array.shape}, but must be a scalar, (G,)" + (" or (G, L)" if name == "lam_w" else ""))
    return array


def _loss_cells(loss: Loss) -> dict[str, Floats]:
    """The loss parameters that vary by cell, (G, K) each."""
    if not isinstance(loss, CrossEntropy):
        return {}
    given = {n: getattr(loss, n) for n in ("class_weights", "logit_adjustment", "temperature")}
    return {n: np.asarray(v) for n, v in given.items() if v is not None and np.ndim(v) == 2}


class Penalties(NamedTuple):
    """Penalties in the one convention of `ufm` (sum over samples, halves): lam_w, lam_h, lam_b (None: no bias)."""

    lam_w: Any
    lam_h: Any
    lam_b: Any = None


class Convention(NamedTuple):
    """A paper's way to write the penalties: `to_ufm(w, h, b, N=..., batch=...)`, its inverse, and the objective it stands for.

    Under a loss written per sum or with a factor (CE/2), both sides minimise the same function up to that factor: same minimisers.
    """

    objective: str
    scale: Callable[[Any, Any], tuple[Any, Any, Any]]
    needs: tuple[str, ...] = ()

    def to_ufm(self, w: Any, h: Any, b: Any = None, *, N: Any = None, batch: Any = None) -> Penalties:
        """The paper's coefficients (w, h, b) as lam_w, lam_h, lam_b; ValueError where N or batch is needed and missing."""
        sw, sh, sb = self._scales(N, batch)
        return Penalties(w * sw, h * sh, None if b is None else b * sb)

    def from_ufm(self, penalties: Penalties, *, N: Any = None, batch: Any = None) -> tuple[Any, Any, Any]:
        """The coefficients (w, h, b) that stand for `penalties` in this paper; ValueError where N or batch is needed and missing."""
        sw, sh, sb = self._scales(N, batch)
        return penalties.lam_w / sw, penalties.lam_h / sh, None if penalties.lam_b is None else penalties.lam_b / sb

    def _scales(self, N: Any, batch: Any) -> tuple[Any, Any, Any]:
        for name, value in (("N", N), ("batch", batch)):
            if value is None and name in self.needs:
                raise ValueError(f"PAPERS: {name} is missing, but '{self.objective}' depends on it; give {name}=")
        return self.scale(N, batch)


# name -> (objective with coefficients w, h, b; factors (lam_w/w, lam_h/h, lam_b/b) for N samples and minibatches of size B; what it needs)
PAPERS = {
    "sum": Convention("mean loss + w/2 |W|^2 + h/2 sum_i |h_i|^2 + b/2 |b|^2 (ufm; Garrod & Keating)", lambda N, B: (1.0, 1.0, 1.0)),
    "mean": Convention("mean loss + w/2 |W|^2 + h/(2N) sum_i |h_i|^2 + b/2 |b|^2", lambda N, B: (1.0, 1.0 / N, 1.0), ("N",)),
    "summed_loss": Convention("summed loss + w/2 |W|^2 + h/2 sum_i |h_i|^2 + b/2 |b|^2", lambda N, B: (1.0 / N, 1.0 / N, 1.0 / N), ("N",)),
    "no_halves": Convention("mean loss + w |W|^2 + h sum_i |h_i|^2 + b |b|^2 (Hong & Ling 2023)", lambda N, B: (2.0, 2.0, 2.0)),
    "half_loss_minibatch": Convention(
        "mean CE/2 over a batch of B + w/2 |W|^2 + h/2 sum_batch |h_i|^2 + b/2 |b|^2, in expectation (released code of Dang et al. 2024)",
        lambda N, B: (2.0, 2.0 * B / N, 2.0),
        ("N", "batch"),
    ),
    "minibatch_sum": Convention(
        "mean loss over a batch of B + w/2 |W|^2 + h/2 sum_batch |h_i|^2 + b/2 |b|^2, in expectation",
        lambda N, B: (1.0, B / N, 1.0),
        ("N", "batch"),
    ),
    "weight_decay": Convention("mean loss; the optimiser adds w W, h h_i, b b to the gradients of W, h_i, b", lambda N, B: (1.0, 1.0, 1.0)),
}
