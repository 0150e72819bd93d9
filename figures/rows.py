"""Reading the rows of a study back: columns by name, laid out on the grid they were computed on."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]


class BadRows(ValueError):
    """The rows are missing or not those of this figure's study; the message says which and what to do."""


def read(path: Path, study: str, numbers: Sequence[str], words: Mapping[str, Sequence[str]]) -> Columns:
    """The named columns of a CSV file, `numbers` as floats, `words` (column -> allowed) as text; BadRows if it is not one of `study`."""
    remedy = f"give the rows.csv of `python -m studies {study}` with --rows"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
    except OSError as error:
        raise BadRows(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRows(f"{path} is not a CSV file; {remedy}") from error
    missing = [name for name in (*words, *numbers) if not table or table[0].get(name) is None]
    if missing:
        raise BadRows(f"{path} has no column {missing[0]!r}; {remedy}")
    try:
        columns: Columns = {name: np.array([float(row[name]) for row in table]) for name in numbers}
    except (TypeError, ValueError) as error:
        raise BadRows(f"{path} holds something else than numbers where numbers belong ({error}); {remedy}") from error
    for name, allowed in words.items():
        strange = {row[name] for row in table}.difference(allowed)
        if strange:
            raise BadRows(f"{path} holds {strange.pop()!r} in column {name!r}, not one of {', '.join(allowed)}; {remedy}")
    return columns | {name: np.array([row[name] for row in table]) for name in words}


def pick(columns: Columns, where: NDArray[np.bool_]) -> Columns:
    """The rows that `where` selects."""
    return {name: column[where] for name, column in columns.items()}


def on_grid(columns: Columns, x: str, y: str) -> Columns:
    """Columns as arrays (ny, nx) over the rising values of the columns x and y; BadRows unless every cell is there exactly once."""
    (xs, i), (ys, j) = (np.unique(columns[name], return_inverse=True) for name in (x, y))
    cell = j * xs.size + i
    if min(xs.size, ys.size) < 2 or not np.array_equal(np.sort(cell), np.arange(xs.size * ys.size)):
        raise BadRows(f"the rows hold {cell.size} cells, not {xs.size} times {ys.size} over {x} and {y}, each once; run the study again")
    order = np.argsort(cell)
    return {name: column[order].reshape(ys.size, xs.size) for name, column in columns.items()}
