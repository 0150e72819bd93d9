"""What a worker does: compute a block of points, and where that fails each point alone, so that only the guilty one fails."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ufm.sweep.points import RESERVED, Point, canonical, key_of, seed_of
from ufm.sweep.store import Cell, encode, now

Function = Callable[[list[Point], list[int]], list[dict[str, Any]]]


class BadRows(ValueError):
    """What the function returned is no list of rows that can be stored."""


def compute(function: Function, version: str, points: list[Point]) -> list[Cell]:
    """The cells of a block, in its order; what the function raises is stored as the failure of a point, with its traceback."""
    begun = time.perf_counter()
    try:
        results: list[Any] = [("ok", *result, None) for result in _rows(function, points)]
    except Exception as raised:
        results = [("failed", None, None, _told(raised))]
    if len(results) < len(points):
        return [cell for point in points for cell in compute(function, version, [point])]
    seconds = (time.perf_counter() - begun) / len(points)  # of a row: its share of the block
    return [
        Cell(key_of(point), version, canonical(point), status, result, arrays, error, seconds, platform.node(), now())
        for point, (status, result, arrays, error) in zip(points, results, strict=True)
    ]


def _rows(function: Function, points: list[Point]) -> list[tuple[str, bytes | None]]:
    rows: Any = function([dict(point) for point in points], [seed_of(point) for point in points])
    if not isinstance(rows, (list, tuple)) or len(rows) != len(points):
        got = f"{len(rows)} rows" if isinstance(rows, (list, tuple)) else type(rows).__name__
        raise BadRows(f"the function returned {got} for {len(points)} points; return a list with one dict a point")
    return [_checked(row, point) for row, point in zip(rows, points, strict=True)]


def _checked(row: Any, point: Point) -> tuple[str, bytes | None]:
    if not isinstance(row, Mapping):
        raise BadRows(f"the function returned {type(row).__name__} as a row; return a dict of names and values")
    for name in row:
        if not isinstance(name, str) or not name or name in point or name in RESERVED:
            raise BadRows(
                f"the function returned a column {name!r}; names are text, not empty, and neither a key of the point nor 'status'"
            )
    try:
        return encode(row)
    except TypeError as error:
        raise BadRows(
            f"the function returned a value that cannot be stored: {error}; return scalars, or arrays of numbers or text"
        ) from None


def _told(error: Exception) -> str:
    """The traceback from the function's own frame on; of bad rows the sentence alone."""
    if isinstance(error, BadRows):
        return str(error)
    frames = error.__traceback__
    for _ in range(2):  # compute and _rows
        frames = frames.tb_next if frames else None
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return text.encode("utf-8", "backslashreplace").decode()
