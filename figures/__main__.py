"""`python -m figures` lists the figures; `python -m figures NAME [--rows DIR] [--out DIR]` draws one from stored rows."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from figures import FIGURES
from ufm.sweep import SweepError


@dataclass(frozen=True)
class Options:
    """Draw a figure from the rows a study has stored."""

    rows: Path | None = None
    """folder of the study; out/STUDY by default"""
    out: Path | None = None
    """folder for the pictures; that of the rows by default"""


def main(arguments: list[str]) -> int:
    """Draw what the command line asks for; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, FIGURES))
        listed = [f"  {name:<{width}}  {text}" for name, (_, text) in FIGURES.items()]
        print("python -m figures NAME [--rows DIR] [--out DIR]", "", *listed, sep="\n")
        return 0
    name, *rest = arguments
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the figures are: {', '.join(FIGURES)}"
        return _fail(f"figures: there is no figure named {name!r}; {remedy}")
    options = tyro.cli(Options, args=rest, prog=f"python -m figures {name}")
    folder = options.rows or Path("out") / FIGURES[name][0]
    return _draw(name, folder, options.out or folder)


def _draw(name: str, folder: Path, out: Path) -> int:
    try:
        for path in importlib.import_module(f"figures.{name}").draw(folder, out):
            print(f"file: {path}")
    except SweepError as error:
        return _fail(f"figures {name}: {error}")
    except OSError as error:
        return _fail(f"figures {name}: cannot write to {out} ({error.strerror}); give another folder with --out")
    return 0


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
