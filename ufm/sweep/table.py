"""Tables: the rows of a sweep by column, picked, laid on a grid, and exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.sweep import export
from ufm.sweep.errors import BadStore, SweepError
from ufm.sweep.points import Point, sort_key
from ufm.sweep.store import CELLS, Cell, decode, npz_bytes, read_all, write_whole


@dataclass(frozen=True, eq=False)
class Table:
    """One row a point: what was asked, what came out, and the error where it failed (None where it did not).

    `table[name]` is a column, the points' keys first: (n,) of bool, int64, float64 or text, or (n, ...) for arrays, whose shapes must
    agree. A missing value (a failed point, None, or a key that other rows have) is NaN, which makes whole numbers and booleans
    float64, and "" in text; numbers among text become text; `values(name)` has them as they were stored, None where missing.
    version: of the code; other_versions: how many rows of other versions the store holds. names: the columns; picking keeps them.
    """

    points: Sequence[Point]
    results: Sequence[dict[str, Any]]
    errors: Sequence[str | None]
    version: str
    other_versions: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found = dict.fromkeys(name for rows in (self.points, self.results) for row in rows for name in row)
        object.__setattr__(self, "names", self.names or tuple(found))

    @classmethod
    def of_cells(cls, cells: Sequence[Cell], points: Sequence[Point] | None, version: str, others: int) -> Table:
        """The table of stored cells, the points as given or (None) as stored; BadStore if a cell cannot be read."""
        try:
            listed = [json.loads(cell.point) for cell in cells] if points is None else list(points)
            return cls(listed, [decode(cell.result, cell.arrays) for cell in cells], [cell.error for cell in cells], version, others)
        except Exception as error:
            raise BadStore(f"a row of {CELLS} cannot be read ({error}); the file is damaged: move it away and run again") from error

    def __len__(self) -> int:
        return len(self.points)

    @property
    def status(self) -> NDArray[np.str_]:
        """(n,) of "ok" and "failed"."""
        return np.array(["ok" if error is None else "failed" for error in self.errors], dtype="U6")

    @property
    def failures(self) -> list[tuple[Point, str]]:
        """The failed points with their tracebacks."""
        return [(point, error) for point, error in zip(self.points, self.errors, strict=True) if error is not None]

    def values(self, name: str) -> list[Any]:
        """The column as stored, row by row; None where missing. SweepError for an unknown name."""
        if name not in self.names:
            raise SweepError(f"table: there is no column {name!r}; the columns are: {', '.join(self.names) or 'none'}")
        return [point.get(name, result.get(name)) for point, result in zip(self.points, self.results, strict=True)]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return column(name, self.values(name))

    def pick(self, rows: ArrayLike) -> Table:
        """The rows where a mask (n,) is true, or those of these numbers, in their order."""
        chosen = np.asarray(rows) if np.size(rows) else np.array([], dtype=np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "biu" or (chosen.dtype.kind == "b" and len(chosen) != len(self)):
            raise SweepError(
                f"table.pick: got {chosen.dtype} of shape {chosen.shape}, but a mask of {len(self)} booleans or row numbers are needed"
            )
        take = (np.flatnonzero(chosen) if chosen.dtype.kind == "b" else chosen).tolist()
        return replace(self, **{part: [getattr(self, part)[i] for i in take] for part in ("points", "results", "errors")})  # type: ignore[arg-type]

    def where(self, **equal: Any) -> Table:
        """The rows whose columns have these values; 1 and 1.0 are equal here, and None is a missing value."""
        mask = np.ones(len(self), dtype=np.bool_)
        for name, value in equal.items():
            mask &= np.array(_equal(self.values(name), value), dtype=np.bool_)
        return self.pick(mask)

    def on_grid(self, x: str, y: str) -> dict[str, NDArray[Any]]:
        """The columns and the status as (ny, nx, ...) arrays, the axes themselves as (nx,) and (ny,), rising.

        SweepError unless each pair of an x and a y has exactly one row.
        """
        (xs, i), (ys, j) = (self._axis(name) for name in (x, y))
        cell = j * len(xs) + i
        rows = np.bincount(cell, minlength=len(xs) * len(ys))
        if (rows > 1).any():
            twins = np.flatnonzero(cell == np.argmax(rows > 1))
            differ = [name for name in self.names if name in self.points[0] and len({str(self.values(name)[t]) for t in twins}) > 1]
            raise SweepError(
                f"table.on_grid: {len(twins)} rows have {_place(x, xs, y, ys, int(cell[twins[0]]))}, but a cell has one; "
                f"pick rows by {', '.join(differ) or 'number'} first"
            )
        if not rows.all():
            raise SweepError(
                f"table.on_grid: {np.sum(rows == 0)} of {len(rows)} cells have no row, the first at "
                f"{_place(x, xs, y, ys, int(np.argmin(rows)))}; compute them, or pick rows that fill a grid"
            )
        order = np.argsort(cell)
        cells = {name: values[order].reshape(len(ys), len(xs), *values.shape[1:]) for name, values in self._columns().items()}
        return cells | {x: xs, y: ys}

    def _axis(self, name: str) -> tuple[NDArray[Any], NDArray[np.intp]]:
        values = self[name]
        if values.ndim != 1 or any(value is None or value != value for value in self.values(name)):
            raise SweepError(
                f"table.on_grid: {name!r} is no axis, for it has arrays, or rows without a value; name a key that all points have"
            )
        return np.unique(values, return_inverse=True)

    def to_csv(self, path: str | Path) -> Path:
        """Write CSV: floats to the last bit, arrays spread into name_1 ... name_m (C order), missing scalars empty, and the status."""
        stored = {name: self.values(name) for name in self.names} | {"status": self.status.tolist()}
        return write_whole(Path(path), export.csv_bytes(self._columns(), stored))

    def to_npz(self, path: str | Path) -> Path:
        """Write one array per column, and the status."""
        return write_whole(Path(path), npz_bytes(self._columns()))

    def to_netcdf(self, path: str | Path) -> Path:
        """Write netCDF-3 (see `export.netcdf_bytes` for its types), with the code version and counts of rows as JSON in `ufm_sweep`."""
        return write_whole(Path(path), export.netcdf_bytes(self._columns(), self._about()))

    def to_xarray(self) -> Any:
        """An xarray.Dataset over `row`, the points as coordinates; ImportError where xarray is missing."""
        return export.dataset(self._columns(), {name for point in self.points for name in point}, self._about())

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: self[name] for name in self.names} | {"status": self.status}

    def _about(self) -> str:
        return json.dumps({"version": self.version, "rows": len(self), "failed": len(self.failures)})


def load(out: str | Path, version: str | None = None) -> Table:
    """All rows of a folder that one code version computed (None: that of the latest run), sorted by the points' values, as numbers.

    `other_versions` of the table says how many rows of other versions there are. Readable while a sweep is running.
    Raises BadStore, and SweepError for a version without rows.
    """
    cells, chosen, counts = read_all(Path(out), version)
    table = Table.of_cells(cells, None, chosen, sum(counts.values()) - len(cells))
    return table.pick(sorted(range(len(table)), key=lambda i: sort_key(table.points[i])))


def column(name: str, values: Sequence[Any]) -> NDArray[Any]:
    """The array of a column's stored values, None where missing."""
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    if np.ndarray in kinds:
        return _stacked(name, values, present)
    if str in kinds:
        return np.array(["" if value is None else str(value) for value in values])
    if len(present) == len(values) and kinds in ({bool}, {int}, {int, bool}):
        return np.array(values, dtype=np.bool_ if kinds == {bool} else np.int64)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _stacked(name: str, values: Sequence[Any], present: Sequence[Any]) -> NDArray[Any]:
    shapes = sorted({np.shape(value) for value in present})
    texts = {np.asarray(value).dtype.kind == "U" for value in present}
    if len(shapes) > 1 or len(texts) > 1:
        raise SweepError(
            f"table: the column {name!r} has values of shapes {', '.join(map(str, shapes[:4]))}, but arrays of a column agree in shape; "
            "pick rows where they do, or take values(name)"
        )
    missing = np.full(shapes[0], "" if texts == {True} else np.nan)
    return np.stack([missing if value is None else value for value in values])


def _equal(values: Sequence[Any], wanted: Any) -> list[bool]:
    return [bool(np.array_equal(value, wanted)) if isinstance(value, np.ndarray) else bool(value == wanted) for value in values]


def _place(x: str, xs: NDArray[Any], y: str, ys: NDArray[Any], cell: int) -> str:
    return f"{x}={xs[cell % len(xs)].item()!r}, {y}={ys[cell // len(xs)].item()!r}"
