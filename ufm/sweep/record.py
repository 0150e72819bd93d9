"""The record `study.json`: how the rows of a folder were made, one entry a run, the latest last."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ufm.sweep.errors import BadStore
from ufm.sweep.store import write_whole

RECORD = "study.json"
KEPT = 100  # entries; of older ones only the number is kept
PACKAGES = (__name__.partition(".")[0], "numpy", "scipy", "torch")


class Record:
    """The entry of this run in the folder's record, written when it begins and when it ends; BadStore if the file is another's."""

    def __init__(self, out: Path, function: Callable[..., Any], entry: dict[str, Any]) -> None:
        self.path = out / RECORD
        self.all = _read(self.path)
        runs = [*self.all["runs"], entry | _surroundings(function)]
        self.entry = runs[-1]
        self.all = {"ufm_sweep": 1, "dropped": self.all["dropped"] + max(0, len(runs) - KEPT), "runs": runs[-KEPT:]}
        self.write()

    def write(self) -> None:
        """Put the record on the disk."""
        write_whole(self.path, (json.dumps(self.all, indent=2, default=str) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["ufm_sweep"] == 1 and isinstance(record["runs"], list) and isinstance(record["dropped"], int):
            return record  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {"dropped": 0, "runs": []}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadStore(f"{path} is no record of ufm.sweep; it is left as it is: move it away, or give another out=")


def _surroundings(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        folder = Path(inspect.getsourcefile(function) or "").parent
    except TypeError:
        folder = Path()
    status = _git(folder, "status", "--porcelain")
    return {
        "function": f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__qualname__)}",
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "commit": _git(folder, "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "machine": {"host": platform.node(), "system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says of the tree the function lies in; None without git or without a commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
