"""Columns for other programs: the bytes of CSV and netCDF files, and xarray datasets."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.sweep.errors import SweepError

Columns = Mapping[str, NDArray[Any]]  # (n, ...) each


def csv_bytes(columns: Columns, stored: Mapping[str, Sequence[Any]]) -> bytes:
    """One line a row; scalars as `stored`, None as nothing, floats by repr, so that reading them back is exact."""
    spread: list[tuple[str, Sequence[Any]]] = []
    for name, values in columns.items():
        if values.ndim == 1:
            spread.append((name, stored[name]))
        else:
            flat = values.reshape(len(values), -1)
            spread += [(f"{name}_{m + 1}", flat[:, m].tolist()) for m in range(flat.shape[1])]
    header = [name for name, _ in spread]
    if twice := {name for name in header if header.count(name) > 1}:
        raise SweepError(f"table.to_csv: an array spreads over {min(twice)!r}, which is a column already; rename one of them")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*(values for _, values in spread), strict=True))
    return text.getvalue().encode()


def netcdf_bytes(columns: Columns, about: str) -> bytes:
    """netCDF-3 over the dimension `row`, which has no 64-bit integers, booleans or strings.

    Whole numbers become int32 where all of a column fit, float64 where all are within 2^53, else SweepError; booleans int8; text
    characters in UTF-8 with the attribute _Encoding, which xarray reads back as text. Array axes are dimensions name_0, name_1, ...
    """
    from scipy.io import netcdf_file

    rows = len(columns["status"])
    if not rows:
        raise SweepError("table.to_netcdf: the table has no rows, but a netCDF-3 dimension has at least one")
    buffer = io.BytesIO()
    file: Any = netcdf_file(buffer, "w", version=2)
    file.ufm_sweep = about
    file.createDimension("row", rows)
    for name, values in columns.items():
        if not name.isascii():
            raise SweepError(f"table.to_netcdf: the column {name!r} has no netCDF-3 name; rename it in ASCII, or use to_npz")
        packed = _packed(name, values)
        axes = dimensions(name, packed)
        for axis, size in zip(axes[1:], packed.shape[1:], strict=True):
            file.createDimension(axis, size)
        variable = file.createVariable(name, packed.dtype, axes)
        variable[:] = packed
        if values.dtype.kind == "U":
            variable._Encoding = "utf-8"
    file.flush()
    data = buffer.getvalue()
    file.close()
    return data


def dimensions(name: str, values: NDArray[Any]) -> list[str]:
    """Row, and an own dimension for each axis of an array."""
    return ["row", *(f"{name}_{axis}" for axis in range(values.ndim - 1))]


def dataset(columns: Columns, keys: Collection[str], about: str) -> Any:
    """An xarray.Dataset over `row` with `keys` as coordinates; set_index and unstack make a grid of it."""
    try:
        from xarray import Dataset
    except ImportError as error:
        raise ImportError("table.to_xarray needs xarray; install the extra: pip install ufm[export]") from error
    data = {name: (dimensions(name, values), values) for name, values in columns.items()}
    return Dataset({n: v for n, v in data.items() if n not in keys}, {n: v for n, v in data.items() if n in keys}, {"ufm_sweep": about})


def _packed(name: str, values: NDArray[Any]) -> NDArray[Any]:
    kind = values.dtype.kind
    if kind == "U":
        text = np.char.encode(values, "utf-8")
        width = max(1, text.dtype.itemsize)
        return text.astype(f"S{width}").view("S1").reshape(*values.shape, width)
    if kind == "b":
        return values.astype(np.int8)
    if kind in "iu":
        largest = max(int(values.max(initial=0)), -int(values.min(initial=0)))
        if largest > 2**53:
            raise SweepError(
                f"table.to_netcdf: the column {name!r} holds {largest}, but netCDF-3 is exact up to 2^53 only; use to_npz or to_csv"
            )
        return values.astype(np.int32 if largest < 2**31 else np.float64)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
