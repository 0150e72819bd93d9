"""Functions that worker processes of these tests can import, and a sweep to be killed as a whole."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np

from ufm import sweep
from ufm.sweep.store import Writer

POINTS = sweep.grid(depth=[1, 2], kind=["a", "b"], lam=np.geomspace(1e-3, 1e2, 7))
LIVES = 200


def random_rows(points, seeds):
    """A row of every kind of value, from the point's seed alone."""
    rows = []
    for point, seed in zip(points, seeds, strict=True):
        draw = np.random.default_rng(seed).standard_normal(5)
        kinds = dict(few=draw[:2] > 0, some=np.array(["x", "yé"]), count=np.arange(3), single=draw.astype(np.float32))
        rows.append(dict(value=draw.sum() * point["lam"], trace=draw, text=f"{seed}", sure=bool(draw[0] > 0), none=None, **kinds))
    return rows


def guilty(points, seeds):
    """Raises at every third x, unless its file `mended` is there."""
    _noted(points)
    for point in points:
        if point["x"] % 3 == 0 and not Path(point["folder"], "mended").exists():
            raise ZeroDivisionError(f"no inverse of x={point['x']}")
    return [{"y": 10 * point["x"]} for point in points]


def deadly(points, seeds):
    """Kills its own process at x = 5, unless its file `mended` is there."""
    _noted(points)
    for point in points:
        if point["x"] == 5 and not Path(point["folder"], "mended").exists():
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
    return [{"y": 10 * point["x"]} for point in points]


def edge(points, seeds):
    """Positive above the line x = 0.1 + 0.5 row."""
    _noted(points)
    return [{"height": p["x"] - (0.1 + 0.5 * p["row"]), "above": p["x"] > 0.1 + 0.5 * p["row"]} for p in points]


def slow(points, seeds):
    """A few milliseconds and 4 kB a point."""
    _noted(points)
    time.sleep(0.004 * len(points))
    return [{"y": 10 * point["x"], "trace": np.full(500, point["x"], dtype=np.float64)} for point in points]


def _noted(points):
    """One line for each evaluation, in one write, so that lines of several processes do not mix."""
    for point in points:
        if "folder" in point:
            line = f"{point['x']!r} {point.get('row')}\n"
            file = os.open(Path(point["folder"], "evaluations"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, line.encode())
            os.close(file)


def evaluations(folder):
    """The noted evaluations."""
    path = Path(folder, "evaluations")
    return path.read_text().splitlines() if path.exists() else []


def life(out, executor, task, deaths):
    """A sweep or a refinement that acknowledges each stored row on stdout, and kills its process group after `deaths` commits."""
    add, commits = Writer.add, itertools.count(1)

    def acknowledged(writer, cells):
        add(writer, cells)
        sys.stdout.write("".join(f"{cell.key}\n" for cell in cells))
        sys.stdout.flush()
        if next(commits) == deaths:
            os.killpg(0, signal.SIGKILL)

    Writer.add = acknowledged
    with sweep.executors.named(executor, 2) as workers:
        TASKS[task](out, workers)


def refinement(out, workers):
    """Twenty halvings on three rows."""
    rows = [{"row": row, "folder": str(out)} for row in range(3)]
    return sweep.refine(edge, rows, axis="x", between=[(-1.0, 3.0)] * 3, sign="height", steps=20, out=out, executor=workers, version="1")


def campaign(out, workers):
    """A second of work in small blocks."""
    return sweep.run(slow, [{"x": x, "folder": str(out)} for x in range(LIVES)], out=out, executor=workers, block=3, version="1")


TASKS = {"refinement": refinement, "campaign": campaign}


def stored(out):
    """Everything of the store but times and hosts."""
    cells = sqlite3.connect(Path(out, "cells.sqlite"))
    try:
        return sorted(cells.execute("SELECT key, version, point, status, result, arrays, error FROM cells").fetchall())
    finally:
        cells.close()


if __name__ == "__main__":
    life(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
