"""What all studies share: the options of the command line, the executor, and what is left behind and said at the end."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
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
    """folder for rows, record and figures; out/NAME by default, out/NAME-quick or -smoke for those"""
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
        """Where everything goes; sizes do not mix in one folder."""
        name = type(self).__module__.rpartition(".")[2]
        return self.out or Path("out") / (name if self.size == "full" else f"{name}-{self.size}")

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
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ufm").setLevel(logging.INFO)
        return sweep.executors.named(self.executor, self.workers)


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
