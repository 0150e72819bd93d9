"""What a study leaves behind: a folder with `rows.csv` (one row a cell, exact floats) and `study.json` (how they were made)."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import ufm

Row = dict[str, Any]

PACKAGES = ("numpy", "scipy", "matplotlib")


class CannotWrite(OSError):
    """The results have nowhere to go; the message says why and what to do."""


def folder(path: Path) -> Path:
    """`path` as a folder that takes files, made if missing; CannotWrite otherwise."""
    if path.exists() and not path.is_dir():
        raise CannotWrite(f"--out {path} is a file; give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise CannotWrite(f"--out {path} cannot be written to ({error.strerror}); give another folder") from error


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write the rows as CSV, the first row's keys as header; floats are `repr`, so reading them back is exact."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(rows[0])
    table.writerows([_plain(value) for value in row.values()] for row in rows)
    return write(path, text.getvalue())


def write_study(path: Path, name: str, question: str, options: Any, *, seconds: float) -> Path:
    """Write how the rows were made: command, options, versions, commit, machine, time."""
    record = {
        "study": name,
        "question": question,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "options": {key: _plain(value) for key, value in dataclasses.asdict(options).items()},
        "device": getattr(options, "device", "numpy"),
        "versions": {"python": platform.python_version(), "ufm": ufm.__version__} | {package: _version(package) for package in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "seconds": round(seconds, 1),
    }
    return write(path, json.dumps(record, indent=2) + "\n")


def write(path: Path, text: str) -> Path:
    """Write a text file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written ({error.strerror}); give another folder with --out") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the clone these studies lie in; None without git or without a commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
