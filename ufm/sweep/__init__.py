"""Sweeps of any function over many points: parallel, resumable, safe to kill, and open about how the rows were made.

    points = sweep.grid(depth=[1, 2, 3], lam=np.geomspace(1e-4, 1e-1, 40))
    with sweep.executors.named("loky", workers=4) as executor:
        table = sweep.run(function, points, out="results/map", same=["depth"], executor=executor)
    table = sweep.load("results/map")       the same rows, later

`function(points, seeds)` returns a dict a point. A point is known by its values, its seed follows from them, and its row is kept under
them and the version of the code: no row depends on order, block or worker, and what is stored is never computed again. This room knows
nothing of the models. Importing it loads numpy and the standard library only.
"""

from ufm.sweep import executors
from ufm.sweep.errors import BadPoint, BadStore, CannotWrite, SecondWriter, SweepError, WorkerLost
from ufm.sweep.intervals import wilson
from ufm.sweep.points import grid, integers, log_uniform, random, seed_of, uniform
from ufm.sweep.refine import refine
from ufm.sweep.run import run
from ufm.sweep.table import Table, load

__all__ = [
    "BadPoint",
    "BadStore",
    "CannotWrite",
    "SecondWriter",
    "SweepError",
    "Table",
    "WorkerLost",
    "executors",
    "grid",
    "integers",
    "load",
    "log_uniform",
    "random",
    "refine",
    "run",
    "seed_of",
    "uniform",
    "wilson",
]
