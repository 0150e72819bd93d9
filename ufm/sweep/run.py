"""The one loop: points in blocks to an executor, finished blocks to the store, and `run`, which is that loop over a list of points."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ufm.sweep.errors import BadPoint, SweepError, WorkerLost
from ufm.sweep.executors import IN_FLIGHT, Serial, in_flight, workers_of
from ufm.sweep.points import Point, checked, key_of
from ufm.sweep.record import Record
from ufm.sweep.store import Cell, Writer, now
from ufm.sweep.table import Table
from ufm.sweep.version import code_version
from ufm.sweep.work import Function, compute

LOG = logging.getLogger(__name__)
LARGEST_BLOCK = 64  # points, unless the caller asks for more
EVERY = 30.0  # seconds between two lines of the log


def run(
    function: Function,
    points: Iterable[Mapping[str, Any]],
    *,
    out: str | Path,
    same: Sequence[str] = (),
    executor: Executor | None = None,
    block: int | None = None,
    retry_failed: bool = False,
    version: str | None = None,
    label: str | None = None,
    durability: str = "process",
    options: Mapping[str, Any] | None = None,
) -> Table:
    """Compute function(points, seeds) -> rows for all points that `out` does not hold yet; the rows of exactly these points, in this order.

    function: module-level; rows are dicts of scalars and numpy arrays, one a point, and depend on that point and its seed only.
    same: keys in which the points of one block agree. block: points per block; by default several blocks a worker, at most 64.
    executor: any concurrent.futures.Executor; None computes here. retry_failed: compute again what had raised.
    version: of the code (see `code_version`); rows of other versions stay stored and are not used. label, options: for the record only.
    durability: "process", or "power" to survive a power cut too. A point that raises has status "failed" and its traceback.
    Raises BadPoint, CannotWrite, BadStore, SecondWriter, WorkerLost, SweepError; whatever happens, finished blocks are stored.
    """
    listed = [checked(point, f"run: point {i}") for i, point in enumerate(points)]
    with Engine(function, Path(out), tuple(same), executor, block, retry_failed, version, label, durability, options) as engine:
        return engine.evaluate(listed)


@dataclass
class Engine:
    """An open store, and the loop that fills it; the fields are the options of `run`."""

    function: Function
    out: Path
    same: tuple[str, ...]
    executor: Executor | None
    block: int | None
    retry_failed: bool
    version: str | None
    label: str | None
    durability: str
    options: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise SweepError(f"run: block is {self.block!r}, but a block holds at least one point; leave it out for a sensible size")
        self.workers: Executor = self.executor or Serial()
        self.code = self.version or code_version(self.function)

    def __enter__(self) -> Self:
        self.writer = Writer(self.out, self.code, self.durability)
        entry = {
            "label": self.label,
            "version": self.code,
            "options": self.options,
            "same": self.same,
            "block": self.block,
            "executor": type(self.workers).__name__,
            "durability": self.durability,
            "points": 0,
            "computed": 0,
            "failed": 0,
            "begun": now(),
            "ended": None,
        }
        try:
            self.record = Record(self.out, self.function, entry)
        except BaseException:
            self.writer.__exit__()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.record.entry |= {"ended": now(), "end": "complete" if error is None else f"{type(error).__name__}: {error}"}
        try:
            self.record.write()
        except SweepError:
            if error is None:
                raise
        finally:
            self.writer.__exit__()

    def evaluate(self, points: Sequence[Point]) -> Table:
        """The rows of these checked points, computed where they are not stored yet."""
        wanted = {key_of(point): point for point in points}
        stored = self.writer.status(wanted)
        done = ("ok",) if self.retry_failed else ("ok", "failed")
        pending = [point for key, point in wanted.items() if stored.get(key) not in done]
        self.record.entry["points"] += len(points)
        blocks = grouped(pending, self.same, self.block or self._sensible(len(pending)))
        if blocks:
            self._compute(deque(blocks), Progress(len(pending), self.label or "sweep"))
        return Table.of_cells(self.writer.read(points), points, self.code, self.writer.others())

    def _sensible(self, pending: int) -> int:
        return min(LARGEST_BLOCK, max(1, math.ceil(pending / (IN_FLIGHT * workers_of(self.workers)))))

    def _compute(self, waiting: deque[list[Point]], progress: Progress) -> None:
        """Keep the workers busy and store each block as it comes back; on any trouble store what is finished and cancel the rest."""
        limit = in_flight(self.workers)
        flying: set[Future[list[Cell]]] = set()
        try:
            while waiting or flying:
                while waiting and len(flying) < limit:
                    flying.add(self.workers.submit(compute, self.function, self.code, waiting[0]))
                    waiting.popleft()
                for future in wait(flying, timeout=EVERY, return_when=FIRST_COMPLETED).done:
                    self._store(future.result(), progress)
                    flying.remove(future)
                progress.say()
        except BaseException as error:
            self._salvage(flying, progress)
            self._explain(error, progress)
            raise
        finally:
            progress.close()

    def _store(self, cells: list[Cell], progress: Progress) -> None:
        self.writer.add(cells)
        failed = sum(cell.status == "failed" for cell in cells)
        self.record.entry["computed"] += len(cells)
        self.record.entry["failed"] += failed
        progress.add(len(cells), failed)

    def _salvage(self, flying: set[Future[list[Cell]]], progress: Progress) -> None:
        for future in flying:
            if not future.cancel() and future.done() and future.exception() is None:
                with suppress(SweepError):
                    self._store(future.result(), progress)

    def _explain(self, error: BaseException, progress: Progress) -> None:
        """Raise what a lost worker or a block that could not travel means; other errors explain themselves."""
        state = f"{progress.done} of {progress.total} points are stored now, {progress.total - progress.done} remain"
        if isinstance(error, BrokenExecutor):
            raise WorkerLost(
                f"run: a worker process died ({type(error).__name__}); {state}: run again to go on, with fewer workers if memory ran out"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, SweepError):
            raise SweepError(
                f"run: {type(self.workers).__name__} failed on a block ({type(error).__name__}: {error}); {state}: "
                "the function must be importable by the workers, so define it at the top of a module"
            ) from error


def grouped(points: Sequence[Point], same: Sequence[str], size: int) -> list[list[Point]]:
    """Blocks of at most `size` points that agree in the keys `same`, in the given order; BadPoint for a point without such a key."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if missing := [name for name in same if name not in point]:
            raise BadPoint(f"run: same names {missing[0]!r}, which the point {point!r:.120} lacks; name keys that all points have")
        groups.setdefault(key_of({name: point[name] for name in same}), []).append(point)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


class Progress:
    """A bar on a terminal; elsewhere a line in the log every 30 seconds."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm

        self.total, self.label, self.done, self.failed = total, label, 0, 0
        self.bar = tqdm(total=total, desc=label, unit="point", mininterval=0.5, disable=None)
        self.begun = self.said = time.monotonic()

    def add(self, done: int, failed: int) -> None:
        """Count a finished block."""
        self.done += done
        self.failed += failed
        if failed:
            self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update(done)

    def say(self) -> None:
        """Write a line, if it is time and there is no bar."""
        moment = time.monotonic()
        if self.bar.disable and moment - self.said >= EVERY:
            self.said = moment
            left = f"{(moment - self.begun) / self.done * (self.total - self.done):.0f} s" if self.done else "unknown time"
            LOG.info("%s: %d of %d points done, %d failed, %s left", self.label, self.done, self.total, self.failed, left)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
