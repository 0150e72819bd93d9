"""What all studies share: the options of the command line, the executor, and what is left behind and said at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ufm import sweep
from ufm.arrays import place


@dataclass(frozen=True)
class Options:
    """Options of every study."""

    smoke: bool = False
    """the smallest run, in seconds"""
    quick: bool = False
    """a smaller run, in a minute or two"""
    out: Path | None = None
    """folder for rows, record and figures; by default out/NAME, with what differs: out/NAME-quick-seed1"""
    seed: int = 0
    """of all random starts; part of every point"""
    device: Literal["numpy", "cpu", "cuda"] = "numpy"
    """where to compute: numpy, or torch on cpu or cuda"""
    workers: int | None = None
    """processes; as many as there are CPUs by default"""
    executor: Literal["loky", "serial", "dask"] = "loky"
    """what runs the blocks of points"""
    retry_failed: bool = False
    """compute again the points that have raised"""

    def __post_init__(self) -> None:
        if self.smoke and self.quick:
            raise ValueError("--smoke and --quick exclude each other; give one")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, but a seed is at least 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}, but at least one process is needed")

    @property
    def folder(self) -> Path:
        """Where everything goes; sizes, seeds and devices do not mix in one folder."""
        marks = (self.size, "full"), (f"seed{self.seed}", "seed0"), (self.device, "numpy")
        name = [type(self).__module__.rpartition(".")[2], *(mark for mark, usual in marks if mark != usual)]
        return self.out or Path("out") / "-".join(name)

    @property
    def size(self) -> str:
        """Which size of the study: smoke, quick or full."""
        return "smoke" if self.smoke else "quick" if self.quick else "full"

    def plain(self) -> dict[str, Any]:
        """The options as text and numbers, for the record."""
        return dataclasses.asdict(self) | {"out": str(self.folder)}

    def workforce(self) -> AbstractContextManager[Executor]:
        """The executor asked for; messages of long runs go to standard error."""
        place(np.zeros(1), self.device)  # a device that is not there is said now, not point by point
        self._refuse_a_mixture()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ufm").setLevel(logging.INFO)
        return sweep.executors.named(self.executor, self.workers)

    def _refuse_a_mixture(self) -> None:
        """SweepError where the folder holds a run of another size, seed or device: no figure could tell their rows apart."""
        try:
            before = json.loads((self.folder / "study.json").read_text())["runs"][-1]["options"]
        except (OSError, ValueError, LookupError, TypeError):
            return  # none, or none of ours, which the store says
        mine = self.plain()
        for name in ("smoke", "quick", "seed", "device"):
            if isinstance(before, dict) and before.get(name, mine[name]) != mine[name]:
                raise sweep.SweepError(
                    f"--out {self.folder} holds a run with {name} = {before[name]}, not {mine[name]}; give another folder"
                )


def evenly(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values, spread evenly, both ends included; all where there are no more."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))]


def span(values: Any, none: str = "unknown") -> str:
    """Median and range of what is known of some values, how many that is where some are not; `none` where none is."""
    found = np.asarray(values, dtype=np.float64)
    known = found[np.isfinite(found)]
    if not known.size:
        return none
    few = f", {known.size} of {found.size}" if known.size < found.size else ""
    return f"{np.median(known):.4g} ({known.min():.4g} to {known.max():.4g}{few})"


def computed(
    function: Callable[..., list[dict[str, Any]]],
    points: Sequence[dict[str, Any]],
    options: Options,
    label: str,
    same: Sequence[str] = (),
) -> sweep.Table:
    """The rows of the points, one a block: those stored, and those missing computed by the executor asked for."""
    with options.workforce() as executor:
        return sweep.run(
            function,
            points,
            out=options.folder,
            same=same,
            block=1,
            executor=executor,
            retry_failed=options.retry_failed,
            options=options.plain(),
            label=label,
        )


def finish(out: Path, tables: Mapping[str, sweep.Table], summary: Mapping[str, Any], draw: Callable[[Path, Path], list[Path]]) -> int:
    """Export the tables as NAME.csv, .npz and .nc, draw the figures, say what came out; the exit status, 1 where points failed."""
    files = [
        write(out / f"{name}.{kind}")
        for name, t in tables.items()
        for kind, write in (("csv", t.to_csv), ("npz", t.to_npz), ("nc", t.to_netcdf))
    ]
    for name, value in summary.items():
        print(f"{name}: {value}")
    failures = [failure for table in tables.values() for failure in table.failures]
    if failures:
        point, error = failures[0]
        print(f"failed: {len(failures)} points, the first {point}: {error.strip().splitlines()[-1]}", file=sys.stderr)
        print(f"their tracebacks are stored in {out}, no figure is drawn; compute them again with --retry-failed", file=sys.stderr)
    for path in [out / "study.json", *files, *([] if failures else draw(out, out))]:
        print(f"file: {path}")
    return 1 if failures else 0
