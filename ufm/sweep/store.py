"""The store `cells.sqlite`: one row a computed point, written by one process, never lost, half-written or overwritten."""

from __future__ import annotations

import io
import json
import os
import platform
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.request import pathname2url

import numpy as np

from ufm.sweep.errors import BadStore, CannotWrite, SecondWriter, SweepError
from ufm.sweep.points import Point, key_of, scalar

CELLS, LOCK = "cells.sqlite", "cells.lock"
APPLICATION, SCHEMA = 0x75666D73, 1  # "ufms" in the header of the file, and the version of the table below
SYNCHRONOUS = {"process": "normal", "power": "full"}  # what a committed row survives: a killed process, or the mains too
PATIENCE = 30.0  # seconds a commit waits for a reader, where the file system has no write-ahead log
TABLES = """
CREATE TABLE cells (key TEXT NOT NULL, version TEXT NOT NULL, point TEXT NOT NULL, status TEXT NOT NULL, result TEXT, arrays BLOB,
                    error TEXT, seconds REAL NOT NULL, host TEXT NOT NULL, finished_at TEXT NOT NULL, PRIMARY KEY (key, version));
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Cell(NamedTuple):
    """A row of the store: status "ok" or "failed"; result JSON whose arrays are {"array": i} into the npz `arrays`; error text."""

    key: str
    version: str
    point: str
    status: str
    result: str | None
    arrays: bytes | None
    error: str | None
    seconds: float
    host: str
    finished_at: str


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def encode(row: Mapping[str, Any]) -> tuple[str, bytes | None]:
    """A result as JSON and npz; TypeError naming the entry that is no scalar and no array of numbers, booleans or text."""
    plain: dict[str, Any] = {}
    arrays: list[Any] = []
    for name, value in row.items():
        if _is_array(value):
            plain[name] = {"array": len(arrays)}
            arrays.append(value)
        else:
            try:
                plain[name] = scalar(value)
            except TypeError as error:
                raise TypeError(f"{name} is {error}") from None
    return json.dumps(plain, separators=(",", ":")), npz_bytes({f"arr_{i}": array for i, array in enumerate(arrays)}) if arrays else None


def _is_array(value: Any) -> bool:
    plain = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    return plain and value.ndim > 0 and value.dtype.kind in "biufU" and value.dtype != np.longdouble


def decode(result: str | None, arrays: bytes | None) -> dict[str, Any]:
    """The result that `encode` wrote; nothing for a failed point."""
    row = json.loads(result) if result else {}
    if arrays:
        with np.load(io.BytesIO(arrays), allow_pickle=False) as stored:
            row = {name: stored[f"arr_{value['array']}"] if isinstance(value, dict) else value for name, value in row.items()}
    return row


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """What np.savez would write, with any names and no time of day: equal arrays give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
    return file.getvalue()


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file that appears whole or not at all; CannotWrite if the disk refuses."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written ({error.strerror or error}); free some space, or give another place") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


class Writer:
    """The one process that may write to a folder; others may read meanwhile. Raises CannotWrite, BadStore and SecondWriter.

    An exclusive lock on the empty database `cells.lock` is held throughout: the system lets go of it however the process ends.
    """

    def __init__(self, out: Path, version: str, durability: str) -> None:
        if durability not in SYNCHRONOUS:
            raise SweepError(f"run: durability is {durability!r}, but must be one of {', '.join(map(repr, SYNCHRONOUS))}")
        self.path, self.version = out / CELLS, version
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(f"run: out={out} is no folder and cannot be made one ({error.strerror}); give another folder") from error
        self._lock = self._locked(out)
        try:
            with _sentences(self.path):
                self._cells = self._opened(SYNCHRONOUS[durability])
        except BaseException:
            self._lock.close()
            raise

    def _locked(self, out: Path) -> sqlite3.Connection:
        with _sentences(out / LOCK):
            lock = sqlite3.connect(out / LOCK, timeout=0.0, isolation_level=None)
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error as error:
                lock.close()
                if _code(error) == sqlite3.SQLITE_BUSY:
                    raise SecondWriter(
                        f"run: {out} is being written by {_writer_of(self.path)}; wait for it to end, or give another out="
                    ) from error
                raise
            return lock

    def _opened(self, synchronous: str) -> sqlite3.Connection:
        cells = sqlite3.connect(self.path, timeout=PATIENCE)
        try:
            if not _is_fresh(cells):
                _check(cells, self.path)
                if self.path.stat().st_size % _pragma(cells, "page_size") and not self.path.with_name(f"{CELLS}-wal").exists():
                    raise sqlite3.DatabaseError("its end is missing")
                if (said := cells.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(said.splitlines()[-1])
            cells.execute("PRAGMA journal_mode=wal")
            cells.execute(f"PRAGMA synchronous={synchronous}")
            if _is_fresh(cells):
                cells.executescript(f"BEGIN; PRAGMA application_id={APPLICATION}; PRAGMA user_version={SCHEMA}; {TABLES} COMMIT;")
            facts = {"writer": f"process {os.getpid()} on {platform.node()}, since {now()}", "version": self.version}
            with cells:
                cells.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
        except BaseException:
            cells.close()
            raise
        return cells

    def status(self, keys: Iterable[str]) -> dict[str, str]:
        """The status of those points that are stored with this version."""
        with _sentences(self.path):
            query = "SELECT status FROM cells WHERE key = ? AND version = ?"
            found = {key: self._cells.execute(query, (key, self.version)).fetchone() for key in keys}
        return {key: row[0] for key, row in found.items() if row}

    def add(self, cells: Sequence[Cell]) -> None:
        """Store the cells in one commit, in place of failed ones of the same name."""
        with _sentences(self.path), self._cells as open_cells:
            open_cells.executemany(f"INSERT OR REPLACE INTO cells VALUES ({', '.join('?' * len(Cell._fields))})", cells)

    def read(self, points: Sequence[Point]) -> list[Cell]:
        """The stored cells of these points, in this order."""
        with _sentences(self.path):
            query = "SELECT * FROM cells WHERE key = ? AND version = ?"
            return [Cell(*self._cells.execute(query, (key_of(point), self.version)).fetchone()) for point in points]

    def others(self) -> int:
        """The number of rows of other versions."""
        with _sentences(self.path):
            return int(self._cells.execute("SELECT count(*) FROM cells WHERE version != ?", (self.version,)).fetchone()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(sqlite3.Error):  # a single file at rest, to copy and to read anywhere; not while somebody reads it
            self._cells.execute("PRAGMA busy_timeout=0")
            self._cells.execute("PRAGMA journal_mode=delete")
        self._cells.close()
        self._lock.close()


def read_all(out: Path, version: str | None) -> tuple[list[Cell], str, dict[str, int]]:
    """The cells of a version (None: the latest run's), that version, and the number of rows of every version.

    BadStore if there is no store or it cannot be read, SweepError if it has no such version.
    """
    path = out / CELLS
    if not path.is_file():
        raise BadStore(f"load: {out} holds no {CELLS}; give a folder that ufm.sweep.run has written to")
    with _sentences(path), _reader(path) as cells:
        latest = None
        if not _is_fresh(cells):
            _check(cells, path)
            latest = cells.execute("SELECT value FROM facts WHERE name = 'version'").fetchone()
        if latest is None:
            raise BadStore(f"load: {path} is empty, for the run that made it was stopped at once; run it again")
        counts = dict(cells.execute("SELECT version, count(*) FROM cells GROUP BY version").fetchall())
        chosen = version or latest[0]
        if version is not None and version not in counts:
            stored = ", ".join(f"{name} ({count} rows)" for name, count in counts.items()) or "none"
            raise SweepError(f"load: {out} has no rows of version {version!r}; the versions stored are: {stored}")
        return [Cell(*row) for row in cells.execute("SELECT * FROM cells WHERE version = ?", (chosen,))], chosen, counts


def _is_fresh(cells: sqlite3.Connection) -> bool:
    return _pragma(cells, "application_id") == 0 and cells.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _check(cells: sqlite3.Connection, path: Path) -> None:
    if _pragma(cells, "application_id") != APPLICATION:
        raise BadStore(f"{path} is a database of another program; it is left as it is: give another out=")
    if (found := _pragma(cells, "user_version")) != SCHEMA:
        raise BadStore(f"{path} has layout {found}, but this version of ufm reads layout {SCHEMA}; use the version that wrote it")


def _pragma(cells: sqlite3.Connection, name: str) -> int:
    return int(cells.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def _reader(path: Path) -> Iterator[sqlite3.Connection]:
    cells = sqlite3.connect(f"file:{pathname2url(str(path.absolute()))}?mode=ro", timeout=PATIENCE, uri=True)
    try:
        yield cells
    finally:
        cells.close()


def _writer_of(path: Path) -> str:
    with suppress(sqlite3.Error, TypeError), _reader(path) as cells:
        return str(cells.execute("SELECT value FROM facts WHERE name = 'writer'").fetchone()[0])
    return "another process"


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the low byte of an extended code


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Say sqlite's troubles in our words."""
    try:
        yield
    except sqlite3.Error as error:
        if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise BadStore(f"{path} cannot be read ({error}); it is left as it is: move it away, or give another out=") from error
        raise CannotWrite(
            f"{path} cannot be written or opened ({error}); all rows stored before are safe: free some space, or give another out="
        ) from error
