"""Policies of a running nearest ETF: how class means are averaged over steps, what U is kept near, what absent classes count as.

Options are frozen; the state of the average is the record `Averaged`, made anew at every step. Centred class means H_t (..., d, K) of step
t = 1, 2, ... enter as a_t H_t + (1 - a_t) (stored), the stored part without gradient, so the gradient in H_t is a_t times `pullback`'s.
Source: Markou, Ajanthan, Gould, NeurIPS 2024 (arXiv 2411.01248) and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np

from ufm.arrays import Array, device_of, like, namespace, readable, to_numpy
from ufm.etf import Form, nearest
from ufm.frames import helmert


class Averaging(Protocol):
    """A law of averaging: the rate a_t of step t = 1, 2, ...; a_1 = 1."""

    def rate(self, t: int) -> float: ...


@dataclass(frozen=True)
class Paper:
    """a_t = max(2/(t+1), floor): step s weighs 2s/(t(t+1)) at time t, until the floor is reached near t = 2/floor."""

    floor: float = 1e-4

    def __post_init__(self) -> None:
        _share("Paper", "floor", self.floor)

    def rate(self, t: int) -> float:
        return max(2.0 / (_step("Paper", t) + 1), self.floor)


@dataclass(frozen=True)
class Constant:
    """a_1 = 1, then a_t = a: step s > 1 weighs a (1-a)^{t-s}, an exponential moving average."""

    a: float

    def __post_init__(self) -> None:
        _share("Constant", "a", self.a)

    def rate(self, t: int) -> float:
        return 1.0 if _step("Constant", t) == 1 else self.a


@dataclass(frozen=True)
class Cumulative:
    """a_t = 1/t: every step weighs 1/t."""

    def rate(self, t: int) -> float:
        return 1.0 / _step("Cumulative", t)


@dataclass(frozen=True)
class Latest:
    """a_t = 1: no averaging."""

    def rate(self, t: int) -> float:
        _step("Latest", t)
        return 1.0


class Averaged(NamedTuple):
    """The average after step t: all that the next step needs.

    means (..., d, K); weights (..., K), 1 or 0 for a class left out, as `etf.nearest` takes them, None where every class counts; rate
    (..., 1, K): what the gradient in `means` is multiplied by to be the one in the batch's means; seen (..., K): classes flagged as seen.
    """

    t: int
    means: Array
    weights: Array | None
    rate: Array
    seen: Array


class Missing(Protocol):
    """What becomes of classes absent from a batch."""

    def step(self, before: Averaged | None, batch: Array, present: Array, centre: Array | None, t: int, a: float) -> Averaged:
        """Step t at rate a: batch (..., d, K) with zeros for absent classes, present (..., K) of booleans, centre (..., d, 1)."""


@dataclass(frozen=True)
class Fixed:
    """An absent class keeps its average if it was ever seen, else it is left out: weight 0, zero column, no gradient.

    A class seen for the first time enters at rate 1, whatever the step.
    """

    def step(self, before: Averaged | None, batch: Array, present: Array, centre: Array | None, t: int, a: float) -> Averaged:
        xp = namespace(batch)
        old = xp.zeros_like(present) if before is None else before.seen
        seen = old | present
        rate = xp.astype(present, batch.dtype)
        rate = xp.where(old, a * rate, rate)[..., None, :]
        means = batch * rate if before is None else batch * rate + before.means * (1 - rate)
        every = readable(seen) and bool(xp.all(seen))
        return Averaged(t, means, None if every else xp.astype(seen, batch.dtype), rate, seen)


@dataclass(frozen=True)
class AsReleased:
    """The released code: a class absent and not flagged as seen gets the mean of all samples, uncentred, in the batch and in the average.

    Classes are flagged only in incomplete batches, so one that was in complete batches alone counts as not seen. Both are defects.
    """

    def step(self, before: Averaged | None, batch: Array, present: Array, centre: Array | None, t: int, a: float) -> Averaged:
        xp = namespace(batch)
        if centre is None:
            raise ValueError("etf_policies.averaged: missing is AsReleased(), which needs the mean of the samples; give centre=")
        stored = xp.zeros_like(batch) if before is None else before.means
        seen = xp.zeros_like(present) if before is None else before.seen
        filled = xp.where((present | seen)[..., None, :], stored, centre)
        rate = a * xp.astype(present, batch.dtype)[..., None, :]
        means = xp.where(present[..., None, :], a * batch + (1 - a) * stored, filled)
        return Averaged(t, means, None, rate, seen | (present & ~xp.all(present, axis=-1, keepdims=True)))


def averaged(
    before: Averaged | None,
    batch: Array,
    *,
    averaging: Averaging | None = None,
    missing: Missing | None = None,
    present: Array | None = None,
    centre: Array | None = None,
) -> Averaged:
    """One step of the running average: a_t batch + (1 - a_t) before, t = 1 where before is None.

    batch (..., d, K): class means about the mean of the samples; columns of classes that are not `present` (..., K) are not read. centre
    (..., d, 1): that mean, which AsReleased needs. Policies are Paper() and Fixed() by default. ValueError for shapes that do not fit.
    """
    xp = namespace(batch)
    t = 1 if before is None else before.t + 1
    shape = (*batch.shape[:-2], batch.shape[-1])
    if present is None:
        present = xp.ones(shape, dtype=xp.bool, device=device_of(batch))
    if type(present) is not type(batch) or tuple(present.shape) != shape or present.dtype != xp.bool:
        got = f"{type(present).__name__} of {getattr(present, 'dtype', 'no dtype')} and shape {tuple(getattr(present, 'shape', ()))}"
        rule = f"{type(batch).__name__} of booleans and shape {shape}"
        raise ValueError(f"etf_policies.averaged: present is a {got}, but must be a {rule}; convert it")
    if centre is not None and tuple(np.shape(centre)) != (*batch.shape[:-1], 1):
        raise ValueError(
            f"etf_policies.averaged: centre is {np.shape(centre)}, but must be {(*batch.shape[:-1], 1)}; give one mean a problem"
        )
    if before is not None and tuple(before.means.shape) != tuple(batch.shape):
        raise ValueError(f"etf_policies.averaged: batch is {tuple(batch.shape)}, but before {tuple(before.means.shape)}; keep to one shape")
    batch = xp.where(present[..., None, :], batch, 0.0)
    return (missing or Fixed()).step(before, batch, present, centre, t, (averaging or Paper()).rate(t))


class Proximal(Protocol):
    """What U is kept near: the `prox` of `etf.nearest`."""

    def point(self, means: Array, previous: Array | None, form: Form, weights: Any = None) -> Array: ...


@dataclass(frozen=True)
class Lagged:
    """The previous U; at first the nearest one without a proximal term.

    In the full form that is V Q^T + u 1^T/sqrt(K), V of the reduced form, Q = helmert(K).T, u = (I - V V^T) eye(d, K) 1, normalised.
    """

    def point(self, means: Array, previous: Array | None, form: Form, weights: Any = None) -> Array:
        """(..., d, m) for class means (..., d, K) with the weights of `etf.nearest`."""
        if previous is not None:
            return previous
        V = nearest(means, weights=weights).U
        if form == "reduced":
            return V
        xp = namespace(V)
        d, K = means.shape[-2:]
        if d < K:
            raise ValueError(
                f"etf_policies.Lagged: means has width {d}, but the full form of {K} classes needs {K}; use width >= {K} or form='reduced'"
            )
        axis = xp.argmin(xp.sum(V * V, axis=-1), axis=-1)[..., None] == xp.arange(d, dtype=xp.int64, device=device_of(V))
        ones, far = (_normal(V, x) for x in (like(np.eye(d, K).sum(axis=1)[:, None], V), xp.astype(axis, V.dtype)[..., None]))
        u = xp.where(xp.linalg.vector_norm(ones, axis=-2, keepdims=True) > 1e-3, ones, far)  # far: of the axis farthest from V
        u = _normal(V, u / xp.linalg.vector_norm(u, axis=-2, keepdims=True))
        u = u / xp.linalg.vector_norm(u, axis=-2, keepdims=True)
        return V @ like(helmert(K), V) + u / sqrt(K)


@dataclass(frozen=True, eq=False)
class Reference:
    """Always the same U, (d, m) or (..., d, m)."""

    U: Any

    def point(self, means: Array, previous: Array | None, form: Form, weights: Any = None) -> Array:
        """(..., d, m) for class means (..., d, K)."""
        U = like(self.U if type(self.U) is type(means) else np.array(to_numpy(self.U)), means)
        return namespace(means).broadcast_to(U, (*means.shape[:-2], *U.shape[-2:]))


def _normal(V: Array, u: Array) -> Array:
    """(I - V V^T) u."""
    return u - V @ (V.mT @ u)


def _share(policy: str, name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"etf_policies.{policy}: {name} is {value!r}, but must be a number in (0, 1]")


def _step(policy: str, t: int) -> int:
    if t < 1:
        raise ValueError(f"etf_policies.{policy}: t is {t!r}, but steps count from 1")
    return t
