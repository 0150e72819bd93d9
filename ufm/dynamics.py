"""Descent on a whole problem grid: one loop as a generator, `iterate`, under a convenience call, `simulate`.

A rule (`ufm.rules`) moves all runs of a batch together; every so many steps the loop yields a Snapshot, at which runs are tested and the
finished and diverged ones leave. A probe is a function of a Snapshot, (B', ...) out for its B' runs; PROBES names the ready ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm import metrics
from ufm.arrays import Array, block_size, device_of, keep_freed_memory, namespace, place, threads_for, to_numpy
from ufm.chain import forward
from ufm.coordinates import Coordinates, balanced
from ufm.etf import NearestETF
from ufm.headed import Headed, coordinates
from ufm.problem import Problem
from ufm.records import Stop, Trajectory
from ufm.rules import GradientFlow, Rule, StabilisedFlow
from ufm.starts import BalancedNormal, Given, Start, first_factors, seeds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The live runs after `step` steps: which runs (B',) of the batch, their factors, time, value F, scale-free gradient_norm, and stop.

    stop (B',): why a run ends here, None where it goes on. Arrays of numbers are numpy's, factors and logits those of the device. With a
    head or radius of the problem's own (`ufm.headed`) factors are (z, W[, b]), the features as used and what the next step starts with;
    the norms under a radius and the running average of a nearest-ETF head are not in them, so that a run begun from them is another run.
    """

    step: int
    runs: Ints
    factors: tuple[Array, ...]
    time: Floats
    value: Floats
    gradient_norm: Floats
    stop: tuple[Stop | None, ...]
    batch: Problem
    frame: Coordinates

    @cached_property
    def problem(self) -> Problem:
        """The problem with one cell for each of these runs."""
        return self.batch.pick(self.runs)

    @cached_property
    def statistics(self) -> metrics.ClassStatistics:
        """Moments per class of the features, the inputs of the last weight matrix."""
        features = forward(self.frame.objective.chain, self.factors)[1][-1]
        return metrics.class_statistics(features, self.problem.labels, self.problem.classes, self.problem.multiplicity)

    @property
    def penalties(self) -> list[Floats]:
        """Of H, W_1, ..., W_L, (B',) each."""
        return [self.problem.lam_h, *self.problem.lam_w.T]

    @cached_property
    def logits(self) -> Array:
        """(B', K, cols), bias included."""
        return self.frame.logits(self.factors)

    @property
    def nearest(self) -> NearestETF | None:
        """With a nearest-ETF head the record of `etf.nearest` that W is from: s_min, condition, distance, ... (B',); else None."""
        return self.frame.guide.nearest if isinstance(self.frame, Headed) and self.frame.guide is not None else None


Probe = Callable[[Snapshot], Any]


def iterate(
    problem: Problem,
    rule: Rule,
    factors: Sequence[Any],
    *,
    steps: int,
    every: int,
    tol: float | None = None,
    cells: Ints | None = None,
    device: str = "numpy",
) -> Iterator[Snapshot]:
    """Run `rule` from `factors`, one run for each cell of `problem`, and yield a Snapshot after 0, every, 2 every, ..., `steps` steps.

    Runs whose scale-free gradient norm is at most tol, whose clock says so, or that diverged, leave after the Snapshot that says why.
    cells (B,): which entry of options per cell each run takes; by default its own.
    """
    frame, gauge = coordinates(problem, device), balanced(problem, device=device) if problem.special is None else None
    runs = np.arange(problem.cells)
    x = frame.from_factors([place(np.asarray(f), device) for f in factors])
    frame = frame.renewed(x)
    state = rule.start(frame, x, runs if cells is None else cells)
    taken = 0
    while True:
        snapshot = _snapshot(problem, frame, gauge, rule, x, state, runs, taken, steps, tol)
        yield snapshot
        staying = np.array([reason is None for reason in snapshot.stop])
        if not staying.any():
            return
        if not staying.all():
            at = namespace(x).asarray(np.flatnonzero(staying), device=device_of(x))
            frame, gauge, x = frame.pick(at), None if gauge is None else gauge.pick(at), namespace(x).take(x, at, axis=0)
            state = tuple(namespace(x).take(part, at, axis=0) for part in state)
            runs = runs[staying]
        for _ in range(min(every, steps - taken)):
            x, state = rule.advance(frame, x, state)
            frame = frame.renewed(x)
            taken += 1


def _snapshot(
    problem: Problem,
    frame: Coordinates,
    gauge: Coordinates | None,
    rule: Rule,
    x: Array,
    state: tuple[Array, ...],
    runs: Ints,
    taken: int,
    steps: int,
    tol: float | None,
) -> Snapshot:
    factors = frame.to_factors(x)
    worth = frame.stationarity(x) if gauge is None else gauge.stationarity(gauge.from_factors(factors))
    value, size, flat = map(to_numpy, (frame.value(x), *worth))
    clock = rule.clock(state, taken)
    stop = np.full(len(runs), Stop.STEPS if taken >= steps else None, dtype=object)
    if clock.done is not None:
        stop[to_numpy(clock.done)] = Stop.TIME
    if tol is not None:
        stop[flat] = Stop.STALLED
        stop[size <= tol] = Stop.GRADIENT
    stop[~(np.isfinite(value) & np.isfinite(size))] = Stop.DIVERGED
    return Snapshot(taken, runs, factors, to_numpy(clock.time), value, size, tuple(stop), problem, frame)


def simulate(
    problem: Problem,
    rule: Rule,
    *,
    runs: int = 1,
    seed: int | Sequence[int] = 0,
    steps: int,
    tol: float | None = None,
    every: int | None = None,
    probes: Sequence[str | Probe] = (),
    start: Start | Given | None = None,
    device: str = "numpy",
    progress: Callable[[int], Any] | None = None,
) -> Trajectory:
    """Follow a rule of `ufm.rules` on every cell of `problem` from `runs` starts each, for at most `steps` steps.

    every: steps between records (default: about a hundred records). At a record a run ends where its scale-free gradient norm is at most
    tol (or nothing is left to gain in float64), or where F is no longer finite (Stop.DIVERGED: a result, with what was recorded until
    then). probes: names of PROBES, or functions of a Snapshot. start: starts.balanced(1.0) by default; run r of cell g draws from the
    seed (seed, r), or (seed[g], r). progress(done) is called after each block of runs. Returns a Trajectory of B = G * runs runs,
    cell-major. Raises ValueError or TypeError on bad options.
    """
    probe_of = _checked(problem, rule, runs, steps, tol, every, probes)
    every = every or max(1, steps // 100)
    frame = coordinates(problem.cell(0))
    start = BalancedNormal() if start is None else start
    factors = first_factors(problem, start, runs, seeds("simulate", seed, problem.cells), frame.objective.chain)
    cells = np.repeat(np.arange(problem.cells), runs)
    rows = problem.pick(cells)
    book = _Book.empty(factors, np.unique([*range(0, steps, every), steps]))
    logits = problem.classes * problem.labels.shape[1]
    block = block_size(BYTES_PER_COORDINATE * (logits + sum(rows * cols for rows, cols in frame.shapes)), device)
    keep_freed_memory()
    with threads_for(problem.width), np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(cells), block):
            part = np.arange(first, min(first + block, len(cells)))
            mine = [f[part] for f in factors]
            for snapshot in iterate(rows.pick(part), rule, mine, steps=steps, every=every, tol=tol, cells=cells[part], device=device):
                book.write(part[snapshot.runs], snapshot, probe_of)
            if progress is not None:
                progress(len(part))
    return book.trajectory(coordinates(rows), device)


BYTES_PER_COORDINATE = 8 * 18  # and logit of a run: blocks of 16 runs of 6,000 coordinates, or 200 of 400 with 100 logits
OWN_RECORDS = ("value", "gradient_norm", "time")


@dataclass(eq=False)
class _Book:
    """The records of all runs as they come in, numpy arrays filled with NaN."""

    step: Ints
    records: dict[str, Floats]
    stop: NDArray[np.object_]
    steps: Ints
    factors: list[Floats]

    @classmethod
    def empty(cls, factors: Sequence[Floats], step: Ints) -> _Book:
        batch = len(factors[0])
        return cls(step, {}, np.full(batch, None), np.zeros(batch, dtype=np.int64), [np.array(f) for f in factors])

    def write(self, runs: Ints, snapshot: Snapshot, probe_of: dict[str, Probe]) -> None:
        own = {name: getattr(snapshot, name) for name in OWN_RECORDS}
        at = np.searchsorted(self.step, snapshot.step)
        for name, numbers in (own | {name: _probed(name, probe, snapshot) for name, probe in probe_of.items()}).items():
            if name not in self.records:
                self.records[name] = np.full((len(self.stop), len(self.step), *numbers.shape[1:]), np.nan)
            self.records[name][runs, at] = numbers
        for i in np.flatnonzero([reason is not None for reason in snapshot.stop]):
            self.stop[runs[i]], self.steps[runs[i]] = snapshot.stop[i], snapshot.step
            for end, factor in zip(self.factors, snapshot.factors, strict=True):
                end[runs[i]] = to_numpy(factor[i, ...])

    def trajectory(self, frame: Coordinates, device: str) -> Trajectory:
        own = {name: self.records.pop(name) for name in OWN_RECORDS}
        with np.errstate(over="ignore", invalid="ignore"):
            logits = frame.logits(self.factors)
        *ends, Z = (place(part, device) for part in (*self.factors, logits))
        return Trajectory(self.step, **own, probes=self.records, stop=tuple(self.stop), steps=self.steps, factors=tuple(ends), logits=Z)


def _probed(name: str, probe: Probe, snapshot: Snapshot) -> Floats:
    numbers = np.asarray(to_numpy(probe(snapshot)), dtype=np.float64)
    if numbers.shape[:1] != (len(snapshot.runs),):
        raise ValueError(
            f"simulate: probe {name} gave shape {numbers.shape} for {len(snapshot.runs)} runs; give (B,) or (B, m), runs first"
        )
    return numbers


def _checked(
    problem: Problem, rule: Rule, runs: int, steps: int, tol: float | None, every: int | None, probes: Sequence[str | Probe]
) -> dict[str, Probe]:
    """The probes by name; TypeError or ValueError where an option of `simulate` is off."""
    if not isinstance(problem, Problem):
        raise TypeError(f"simulate: problem is {problem!r}, but must be a ufm.Problem")
    if isinstance(rule, type) or not hasattr(rule, "advance"):
        raise TypeError(f"simulate: rule is {rule!r}, but must be one of ufm.rules, called: ufm.rules.GradientDescent(step)")
    for name, value in (("runs", runs), ("steps", steps), ("every", 1 if every is None else every)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"simulate: {name} is {value!r}, but must be a whole number, at least 1")
    if tol is not None and not (isinstance(tol, Real) and 0 < tol < 1):
        raise ValueError(f"simulate: tol is {tol!r}, but must lie between 0 and 1, or be None to take every step")
    if problem.special is not None and isinstance(rule, (GradientFlow, StabilisedFlow)):
        raise ValueError(
            f"simulate: rule is {type(rule).__name__}, but the problem has {problem.special}, and a flow needs head=Learned() and "
            "radius=None; use GradientDescent with a small step, Adam or AGD"
        )
    cells = np.size(getattr(rule, "step", 1.0))
    if cells not in (1, problem.cells):
        raise ValueError(
            f"simulate: the rule's step has {cells} entries, but the problem has G = {problem.cells} cells; give 1 or {problem.cells}"
        )
    named = [_named(probe) for probe in probes]
    names, taken = [*OWN_RECORDS, *(name for name, _ in named)], ", ".join(OWN_RECORDS)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"simulate: two records would be named {name}; give each probe a __name__ of its own, and none of {taken}")
    return dict(named)


# name -> what is recorded of the live runs; features and classifier are those of the last layer
PROBES: dict[str, Probe] = {
    "class_norms": lambda at: metrics.class_norms(at.statistics.means),
    "margins": lambda at: metrics.margins(at.logits, at.problem.labels, against="mean"),
    "nc1": lambda at: metrics.nc1(at.statistics),
    "nc1_quotient": lambda at: metrics.nc1_quotient(at.statistics),
    "cdnv": lambda at: metrics.cdnv(at.statistics.means, at.statistics.variances),
    "nc2": lambda at: metrics.nc2(at.statistics.means),
    "nc3": lambda at: metrics.nc3(at.factors[at.problem.depth], at.statistics.means),
    "equinorm": lambda at: metrics.equinorm(at.statistics.means),
    "equiangularity": lambda at: metrics.equiangularity(at.statistics.means),
    "singular_values": lambda at: metrics.singular_values(at.logits),
    "effective_rank": lambda at: metrics.effective_rank(at.logits),
    "balance": lambda at: metrics.balance(at.factors[: at.problem.depth + 1], at.penalties, at.problem.multiplicity),
}


def _named(probe: str | Probe) -> tuple[str, Probe]:
    if callable(probe):
        return getattr(probe, "__name__", type(probe).__name__), probe
    if not isinstance(probe, str) or probe not in PROBES:
        raise ValueError(
            f"simulate: there is no probe named {probe!r}; the probes are {', '.join(PROBES)}, or give a function of a Snapshot"
        )
    return probe, PROBES[probe]
