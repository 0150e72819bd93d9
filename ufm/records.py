"""What the calls of `ufm` return: named records, and the two enumerations every result speaks in."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import to_numpy

Floats = NDArray[np.float64]


class NoTheory(ValueError):
    """The problem as a whole has no theorem here; the message names the hypothesis that fails."""


class Regime(Enum):
    """The one list of regime names; the value is what a map's legend says."""

    DISTINCT = "all classes distinct"
    MERGED = "some classes merged, not zero"
    MINORITY_ZERO = "some classes at zero"
    ALL_ZERO = "all features at zero"
    UNKNOWN = "unknown"


class Stop(Enum):
    """Why a run ended; the value is the message."""

    GAP = "the proven relative gap is within the tolerance"
    GRADIENT = "the scale-free gradient norm is within the tolerance"
    STALLED = "no step decreases the objective any further in float64"
    STEPS = "the largest number of steps was taken"
    TIME = "the flow reached its last time"
    CLOCK = "the seconds asked for ran out"
    ROUNDS = "the largest number of repair rounds was made without a proof"
    DIVERGED = "the objective became infinite or NaN"

    @property
    def stationary(self) -> bool:
        """Whether the run ended because nothing moved any more."""
        return self in (Stop.GRADIENT, Stop.STALLED)


class Saved:
    """Saving to and loading from one npz file: arrays, tuples and dicts of arrays, enumerations and None; never pickles."""

    def save(self, path: str | Path) -> None:
        """Write the record to `path` (npz); the file appears whole or not at all."""
        flat: dict[str, Any] = {"ufm_record": np.asarray(type(self).__name__)}
        for f in fields(self):  # type: ignore[arg-type]
            flat.update(_flatten(f.name, getattr(self, f.name)))
        path = Path(path)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with open(part, "xb") as file:
                np.savez(file, **flat)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record that `save` wrote; ValueError if the file holds anything else."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                flat = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{cls.__name__}.load: {path} is not a readable npz file ({error}); give a file written by save") from error
        if str(flat.get("ufm_record")) != cls.__name__:
            raise ValueError(f"{cls.__name__}.load: {path} does not hold a {cls.__name__}; give a file written by {cls.__name__}.save")
        try:
            return cls(**{f.name: _unflatten(f.name, flat) for f in fields(cls)})  # type: ignore[arg-type]
        except KeyError as error:
            raise ValueError(f"{cls.__name__}.load: {path} lacks or misnames {error}; it was written by another version") from error


def _flatten(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {f"{name}/None": np.asarray(0)}
    if isinstance(value, tuple) and value and isinstance(value[0], Enum):
        return {f"{name}/{type(value[0]).__name__}": np.asarray([v.name for v in value])}
    if isinstance(value, dict):
        return {f"{name}/names": np.asarray(list(value), dtype=np.str_), **{f"{name}/at/{k}": _array(name, v) for k, v in value.items()}}
    if isinstance(value, tuple):
        return {f"{name}/len": np.asarray(len(value)), **{f"{name}/{i}": _array(name, v) for i, v in enumerate(value)}}
    return {name: _array(name, value)}


def _array(name: str, value: Any) -> Any:
    array = to_numpy(value)
    if array.dtype.kind == "O":
        raise TypeError(f"save: {name} is {type(value).__name__}, but a record holds arrays, numbers, text, enumerations and None only")
    return array


def _unflatten(name: str, flat: dict[str, Any]) -> Any:
    if name in flat:
        return flat[name] if flat[name].ndim else flat[name].item()
    for kind in (Stop, Regime):
        if f"{name}/{kind.__name__}" in flat:
            return tuple(kind[str(v)] for v in flat[f"{name}/{kind.__name__}"])
    if f"{name}/None" in flat:
        return None
    if f"{name}/names" in flat:
        return {str(key): flat[f"{name}/at/{key}"] for key in flat[f"{name}/names"]}
    return tuple(flat[f"{name}/{i}"] for i in range(int(flat[f"{name}/len"])))


@dataclass(frozen=True, eq=False)
class Prediction(Saved):
    """What theory says, per cell; NaN and a reason where it has nothing to say.

    value (G,) in nats (or squared-error units); regime (G,) of Regime; distance (G,): ln(lambda / lambda*) to the nearest regime
    boundary, lambda the geometric mean of the penalties, negative below it; collapsed (G, K) bool; margins (G, K):
    z_kk - mean_{j != k} z_jk of class k's mean feature; logits (G, K, K), column k = class k, bias included;
    feature_gram (G, K, K) of class-mean features; classifier_gram (G, K, K) of W_L ... W_1; bias (G, K), zeros without one;
    source (G,): the theorem, or why there is none.
    """

    value: Floats
    regime: tuple[Regime, ...]
    distance: Floats
    collapsed: NDArray[np.bool_]
    margins: Floats
    logits: Floats
    feature_gram: Floats
    classifier_gram: Floats
    bias: Floats
    source: NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Certificate(Saved):
    """What a point is worth, per run: stationarity, the dual bound and the relative gap it proves.

    value, lower (B,): the objective there and a lower bound of its infimum over all widths; gap (B,) = (value - lower)/value,
    NaN where nothing is proven; gradient_norm (B,), scale-free; rho (B,): dual norm over its limit (<= 1 at an optimum), an upper
    bound where `bound` is not exact; bound (B,): how rho was bounded; regime (B,) of the point; collapsed (B, K) bool.
    """

    value: Floats
    lower: Floats
    gap: Floats
    gradient_norm: Floats
    rho: Floats
    bound: NDArray[np.str_]
    regime: tuple[Regime, ...]
    collapsed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Solution(Saved):
    """End points of `solve`, per run: value, gap, gradient_norm, steps, rounds (B,), stop (B,) of Stop, factors, logits (B, K, cols).

    gap is the proven relative gap (NaN if none); regime (B,) of Regime and collapsed (B, K) describe the point; factors is
    (H, W_1, ..., W_L[, b]) with the runs first; steps counts evaluations of the gradient.
    """

    value: Floats
    gap: Floats
    gradient_norm: Floats
    rho: Floats
    regime: tuple[Regime, ...]
    collapsed: NDArray[np.bool_]
    stop: tuple[Stop, ...]
    steps: NDArray[np.int64]
    rounds: NDArray[np.int64]
    factors: tuple[Any, ...]
    logits: Any


@dataclass(frozen=True, eq=False)
class Trajectory(Saved):
    """What `simulate` saw, per run: T records of value, gradient_norm, time and probes, and the end points.

    step (T,): steps taken at each record; value, gradient_norm (scale-free), time (B, T); probes: name -> (B, T) or (B, T, m). A run that
    ended has NaN after its last record. stop (B,) of Stop; steps (B,): taken in all; factors (H, W_1, ..., W_L[, b]) and logits
    (B, K, cols) where each run ended. Under a radius H has that norm: a run begun from these factors steps as if its features had.
    """

    step: NDArray[np.int64]
    value: Floats
    gradient_norm: Floats
    time: Floats
    probes: dict[str, Floats]
    stop: tuple[Stop, ...]
    steps: NDArray[np.int64]
    factors: tuple[Any, ...]
    logits: Any

    def last(self, name: str) -> Floats:
        """The last record of `value`, `gradient_norm`, `time` or a probe, run by run, (B,) or (B, m)."""
        records = self.probes[name] if name in self.probes else getattr(self, name)
        at = np.searchsorted(self.step, self.steps)
        return np.asarray(records[np.arange(len(self.steps)), at])


@dataclass(frozen=True, eq=False)
class EndPoint(Saved):
    """What `classify` finds a point to be, per run.

    kind (B,): "zero", "dnc", "blocks", "code", "graph" or "other"; name (B,): "DNC", "blocks 2+8", "5 pairs", "T(5)", "other, rank 4",
    "unconverged", "diverged", ... singular_values (B, K) of the class logits; rank (B,): those above 1e-3 of the largest; rank_gap (B,):
    the last of them over the next. value (B,); level (B,): closed-form value of the structure named, NaN without one; excess (B,) =
    (value - level)/level. gradient_norm (B,), scale-free; polished (B,) bool: the point was moved first, and all is that of the moved one.
    negative, zero (B,): Hessian eigenvalues, is_minimum (B,): 1 or 0; all NaN where unknown or not asked for. reason (B,).
    """

    kind: NDArray[np.str_]
    name: NDArray[np.str_]
    rank: NDArray[np.int64]
    rank_gap: Floats
    singular_values: Floats
    value: Floats
    level: Floats
    excess: Floats
    gradient_norm: Floats
    polished: NDArray[np.bool_]
    negative: Floats
    zero: Floats
    is_minimum: Floats
    reason: NDArray[np.str_]
