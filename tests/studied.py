"""A study run as its command line runs it, in this process: what it said and its exit status."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from studies import __main__


def smoke(name: str, out: Path) -> CompletedProcess[str]:
    """`python -m studies NAME --smoke --out OUT` without a new interpreter and without workers."""
    arguments = [name, "--smoke", "--executor", "serial", "--out", str(out)]
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained):
        status = __main__.main(arguments)
    return CompletedProcess(arguments, status, said.getvalue(), complained.getvalue())


def again(name: str, out: Path, patch: pytest.MonkeyPatch, broken: Mapping[str, Any]) -> list[str]:
    """What the same command says over the rows it has left, where computing (the names broken) and drawing anything would fail."""
    for target, value in broken.items():
        patch.setattr(target, value)
    return told(smoke(name, out))


def told(done: CompletedProcess[str]) -> list[str]:
    """What a run said, but for its files."""
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("file: ")]


def no_figure(stored: Path, out: Path) -> list[Path]:
    """Stands for the drawing of a study."""
    return []
