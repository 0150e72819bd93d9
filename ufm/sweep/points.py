"""Points: flat dicts of numbers, text, booleans and None, what they are called in the store, and the seeds that follow from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ufm.sweep.errors import BadPoint

Value = str | int | float | bool | None
Point = dict[str, Value]

RESERVED = ("status",)  # the column of every export that says whether a row was computed
KINDS = "text, whole numbers within 64 bits, finite float64, True, False and None"


@dataclass(frozen=True)
class Uniform:
    """An axis of `random`: uniform between low and high, in the logarithm if log, whole numbers (both ends included) if whole."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high and (self.low > 0 or not self.log)):
            rule = "0 < low <= high < inf" if self.log else "finite numbers low <= high"
            raise BadPoint(f"random: an axis runs from {self.low!r} to {self.high!r}, but needs {rule}")
        if self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise BadPoint(f"random: an axis of integers runs from {self.low!r} to {self.high!r}, but needs whole numbers at both ends")

    def draw(self, count: int, rng: np.random.Generator) -> list[Value]:
        """`count` values; a longer list starts with the shorter one."""
        if self.whole:
            return rng.integers(int(self.low), int(self.high), count, endpoint=True).tolist()  # type: ignore[no-any-return]
        shares = rng.random(count).tolist()
        if self.log:  # math, not numpy: numpy's exp differs between processors in the last bit, and points are told apart by it
            low, high = math.log(self.low), math.log(self.high)
            return [min(max(math.exp(low + (high - low) * u), self.low), self.high) for u in shares]
        return [min(self.low + (self.high - self.low) * u, self.high) for u in shares]


def uniform(low: float, high: float) -> Uniform:
    """An axis of `random`: uniform between low and high."""
    return Uniform(float(low), float(high))


def log_uniform(low: float, high: float) -> Uniform:
    """An axis of `random`: uniform in the logarithm, 0 < low <= high."""
    return Uniform(float(low), float(high), log=True)


def integers(low: int, high: int) -> Uniform:
    """An axis of `random`: whole numbers from low to high, both included, equally likely."""
    return Uniform(low, high, whole=True)


def grid(**axes: Iterable[Any]) -> list[Point]:
    """All combinations of the axes' values, the last axis fastest; BadPoint for an axis that is no list of values."""
    values = [_listed("grid", name, axis) for name, axis in axes.items()]
    return [checked(dict(zip(axes, combination, strict=True)), "grid") for combination in itertools.product(*values)]


def random(count: int, *, seed: int, **axes: Uniform | Sequence[Any]) -> list[Point]:
    """`count` points drawn independently: each axis is uniform(a, b), log_uniform(a, b), integers(a, b) or a sequence to choose from.

    Each axis has its own stream, from `seed` and its name: a larger count begins with the smaller one's points, and a new axis
    leaves the others' values as they were. Raises BadPoint.
    """
    columns = []
    for name, axis in axes.items():
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])
        if isinstance(axis, Uniform):
            columns.append(axis.draw(count, rng))
        else:
            values = _listed("random", name, axis)
            columns.append([values[i] for i in rng.integers(len(values), size=count)])
    return [checked({name: column[i] for name, column in zip(axes, columns, strict=True)}, "random") for i in range(count)]


def _listed(call: str, name: str, axis: Any) -> list[Any]:
    values = list(axis) if isinstance(axis, Iterable) and not isinstance(axis, (str, bytes, Mapping)) else []
    if not values:
        raise BadPoint(f"{call}: the axis {name} is {axis!r:.60}, but an axis is a sequence of at least one value; write {name}=[...]")
    return values


def scalar(value: Any) -> Value:
    """A Python or numpy scalar as a Python one, floats exactly; TypeError for all else."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 and value.dtype.kind in "biufU" and value.dtype != np.longdouble:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)  # np.str_ and enumerations of text too
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})")


def checked(point: Any, where: str) -> Point:
    """The point with Python's own scalars; BadPoint, in a sentence that opens with `where`, if it is no flat dict of such."""
    if not isinstance(point, Mapping):
        raise BadPoint(f"{where} is {point!r:.60}, but a point is a flat dict of names and values")
    plain: Point = {}
    for name, value in point.items():
        if not isinstance(name, str) or not name or name in RESERVED:
            raise BadPoint(f"{where} has a key {name!r}, but keys are text, not empty, and not {', '.join(RESERVED)}; rename it")
        try:
            plain[name] = scalar(value)
        except TypeError:
            raise BadPoint(f"{where} has {name}={value!r:.60}, but a point holds {KINDS} only; spread it over several keys") from None
        if isinstance(plain[name], float) and not math.isfinite(value):
            raise BadPoint(f"{where} has {name}={value!r}, but a point holds {KINDS} only; use None for 'no value'")
    return plain


def canonical(point: Mapping[str, Value]) -> str:
    """The one JSON text of a point: keys sorted, floats exact. Hence 1, 1.0 and True are three different points."""
    return json.dumps(point, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(point: Mapping[str, Value]) -> str:
    """The name of a point in the store: sha256 of its canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(point).encode()).hexdigest()


def seed_of(point: Mapping[str, Any]) -> int:
    """The seed of a point: the first 63 bits of its sha256, so that it fits int64; no code version, order or block enters.

    1 and 1.0 are different points with different seeds; the order of the keys and numpy's scalar types make no difference.
    """
    return int(key_of(checked(point, "seed_of: the point"))[:16], 16) >> 1


def sort_key(point: Mapping[str, Value]) -> tuple[Any, ...]:
    """What points are sorted by: their values, in the order of the sorted names, numbers as numbers."""
    ranked = [(name, _rank(point[name])) for name in sorted(point)]
    return (ranked, canonical(point))


def _rank(value: Value) -> tuple[int, Any]:
    if value is None:
        return (0, 0)
    return (2, value) if isinstance(value, str) else (1, value)
