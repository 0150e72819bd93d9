"""How much faster do features collapse when the classifier is at every step the nearest simplex ETF (Markou, Ajanthan & Gould 2024)?

Free features normalised to radius tau = 5, cross-entropy, no penalties, balanced classes, 2,000 iterations of AGD with gain 10 from
orthogonal starts, the same for every head: a trained classifier with unit rows ("standard"), a fixed ETF, and the nearest ETF with the
gradient through it on and off, in closed form or by pymanopt's trust regions. Every run is held against what no run can pass: the floor
of the loss and the mean cosine margin K/(K-1) (`theory.limits`). UFM-10 has d = 512 and n = 100 as in the paper; its sizes of UFM-100,
-200 and -1000 could not be read, and are d = 1024 and n = 50, 25, 5 here. UFM-1000 is one seed and 200 iterations unless --whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import computed, evenly, finish, span
from ufm import metrics, sweep
from ufm.arrays import keep_freed_memory, to_numpy
from ufm.dynamics import Snapshot, iterate
from ufm.objective import chain_of
from ufm.starts import first_factors
from ufm.theory import limits

Floats = NDArray[np.float64]
Name = Literal["UFM-10", "UFM-100", "UFM-200", "UFM-1000"]

RADIUS, GAIN = 5.0, 10.0
STEPS, SEEDS = 2000, 5  # of the paper
FLOOR, MARGIN = 1e-6, 1e-4  # a run is at collapse within this of the loss's floor, and of the margin's limit
SHOWN = 201  # margins kept of a run, evenly over the sorted ones
HEADS = (("standard", None), ("fixed", None), ("nearest", True), ("nearest", False))  # each with its gradient through W


@dataclass(frozen=True)
class Options(Common):
    """How much faster do features collapse with the nearest simplex ETF as classifier? UFM-10 to UFM-1000, four heads, AGD."""

    models: tuple[Name, ...] = ()
    """which sizes; by default all of them, UFM-10 alone with --quick, a tiny one with --smoke"""
    solver: Literal["closed", "pymanopt"] = "closed"
    """what finds the nearest ETF; rows of both may share a folder, and a figure"""
    runs: int | None = None
    """seeds of each head, fewer or more than the study's own"""
    whole: bool = False
    """all seeds and iterations of UFM-1000 too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoke and self.models:
            raise ValueError("--models goes with sizes that it names, but --smoke has a size of its own; leave one out")
        if self.runs is not None and self.runs < 1:
            raise ValueError(f"--runs is {self.runs}, but at least one seed is needed")


class Model(NamedTuple):
    """Classes, width and samples of a class."""

    K: int
    width: int
    n: int


MODELS = {
    "UFM-10": Model(10, 512, 100),
    "UFM-100": Model(100, 1024, 50),
    "UFM-200": Model(200, 1024, 25),
    "UFM-1000": Model(1000, 1024, 5),
    "UFM-4": Model(4, 8, 3),
}


@dataclass(frozen=True)
class Size:
    """Models, iterations and seeds; the same of UFM-1000 unless whole."""

    models: tuple[str, ...] = ("UFM-10", "UFM-100", "UFM-200", "UFM-1000")
    steps: int = STEPS
    seeds: int = SEEDS
    largest: tuple[int, int] = (200, 1)


SIZES = {"full": Size(), "quick": Size(("UFM-10",), 300, 2, (20, 1)), "smoke": Size(("UFM-4",), 40, 2)}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import guided_etf as figure

    table = computed(guided_etf, points(options), options, "guided runs")
    tables = {f"rows_{model}": table.where(model=model) for model in dict.fromkeys(table.values("model"))}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every head, gradient and seed of every model, the longest runs first, so that no worker is left alone with them."""
    size = SIZES[options.size]
    found = []
    for name in options.models or size.models:
        steps, seeds = size.largest if name == "UFM-1000" and not options.whole else (size.steps, size.seeds)
        rest = {"gain": GAIN, "radius": RADIUS, "steps": steps}
        found += [
            {"model": name, **MODELS[name]._asdict(), "head": head, "gradient": gradient}
            | {"solver": options.solver if head == "nearest" else None, "run": run, "seed": options.seed, "device": options.device}
            | rest
            for head, gradient in HEADS
            for run in range(options.runs or seeds)
        ]
    return sorted(found, key=lambda p: -p["steps"] * p["width"] * p["n"] * p["K"] * (p["K"] + 100))


def guided_etf(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: the curves of its run, its end, how near that is to the floor and the limit, and what an iteration costs."""
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        return [_row(point) for point in points]


def problem_of(point: dict[str, Any]) -> ufm.Problem:
    """The problem of a point."""
    counts = ufm.counts.balanced(point["K"], point["n"])
    plain = {"features": "free", "lam_w": 0.0, "lam_h": 0.0, "columns": "samples"}
    return ufm.Problem(counts, width=point["width"], head=head_of(point), radius=point["radius"], **plain)


def head_of(point: dict[str, Any]) -> ufm.heads.Head:
    """The head of a point; the nearest ETF in its reduced form, without proximal term, with the paper's averaging."""
    if point["head"] == "standard":
        return ufm.heads.UnitRows()
    if point["head"] == "fixed":
        return ufm.heads.FixedETF()
    return ufm.heads.NearestETF(gradient=point["gradient"], solver="stiefel" if point["solver"] == "pymanopt" else "closed")


def start_of(point: dict[str, Any]) -> tuple[Floats, ...]:
    """Orthogonal features, and W where it is trained: equal for all heads, solvers and numbers of steps."""
    seed = sweep.seed_of({name: point[name] for name in ("K", "width", "n", "seed", "run")})
    problem = problem_of(point)
    return first_factors(problem, ufm.starts.agd(), 1, seed, chain_of(problem))


def stages(point: dict[str, Any]) -> list[tuple[int, int]]:
    """Steps, and steps between two records, of the runs that make up the curves: short ones for the first steps, then the run itself."""
    steps = point["steps"]
    return [*((s, s // 8) for s in (8, 64) if 8 * s <= steps), (steps, max(1, steps // min(50, max(10, steps // 20))))]


class Record(NamedTuple):
    """What is measured of a run after some iterations; the names are the columns."""

    iteration: int
    excess: float  # the loss above its floor
    margin_gap: float  # K/(K-1) less the mean cosine margin
    nc1: float
    nc3: float
    equinorm: float
    gradient_norm: float
    s_min: float  # of the nearest ETF, which W is; NaN for other heads
    condition: float


def record(snapshot: Snapshot, margins: Floats, bound: limits.Limits) -> Record:
    """The measurements of a snapshot of one run, with its cosine margins (N,)."""
    W, of, near = snapshot.factors[1], snapshot.statistics, snapshot.nearest
    found = (metrics.nc1(of), metrics.nc3(W, of.means), metrics.equinorm_difference(W, of.means))
    diagnostics = (np.nan, np.nan) if near is None else (near.s_min, near.condition)
    return Record(
        snapshot.step,
        float(snapshot.value[0] - bound.value[0]),
        float(bound.cosine_margin[0] - margins.mean()),
        *(float(to_numpy(x).flat[0]) for x in found),
        float(snapshot.gradient_norm[0]),
        *(float(to_numpy(x).flat[0]) for x in map(np.asarray if near is None else to_numpy, diagnostics)),
    )


def _row(point: dict[str, Any]) -> dict[str, Any]:
    problem, rule, start = problem_of(point), ufm.rules.AGD(point["gain"]), start_of(point)
    bound = limits.at_radius(problem)
    clock = time.process_time if point["device"] == "numpy" else time.perf_counter
    records: dict[int, Record] = {}
    for steps, every in stages(point):
        path = iterate(problem, rule, start, steps=steps, every=every, device=point["device"])
        stepping, begun = 0.0, clock()
        for snapshot, took in _timed(path, clock):
            stepping += took if snapshot.step else 0.0
            if snapshot.step not in records or snapshot.stop[0]:
                margins = to_numpy(metrics.sorted_cosine_margins(*snapshot.factors[:2], problem.labels))[0]
                records[snapshot.step] = record(snapshot, margins, bound)
        spent = clock() - begun
        if snapshot.stop[0] is ufm.Stop.DIVERGED:
            break
    finite, end = snapshot.stop[0] is not ufm.Stop.DIVERGED, records[snapshot.step]
    ends = {f"end_{name}": value for name, value in end._asdict().items() if name != "iteration"}
    return (
        curves_of(records, point)
        | ends
        | {
            "floor": float(bound.value[0]),
            "limit": float(bound.cosine_margin[0]),
            "stop": snapshot.stop[0].name,
            "taken": snapshot.step,
            "finite": finite,
            "value": float(snapshot.value[0]),
            "at_collapse": finite and end.excess <= FLOOR and end.margin_gap <= MARGIN,
            "floor_at": first_within(records, "excess", FLOOR),
            "margin_at": first_within(records, "margin_gap", MARGIN),
            "ranks": shown(point),
            "margins": margins[shown(point)],
            "step_seconds": stepping / max(snapshot.step, 1),
            "records_share": 1 - stepping / spent,
            "etf_distance": None if snapshot.nearest is None else float(to_numpy(snapshot.nearest.distance).flat[0]),
        }
    )


def _timed(path: Iterator[Snapshot], clock: Any) -> Iterator[tuple[Snapshot, float]]:
    """The snapshots of a run, each with the seconds it took to get there."""
    while True:
        begun = clock()
        snapshot = next(path, None)
        if snapshot is None:
            return
        yield snapshot, clock() - begun


def curves_of(records: dict[int, Record], point: dict[str, Any]) -> dict[str, Floats]:
    """The records by column, (T,), T the same for all runs of this length: NaN after a run that ended early."""
    steps = sorted({at for most, every in stages(point) for at in (*range(0, most, every), most)})
    blank = Record(0, *[np.nan] * (len(Record._fields) - 1))
    rows = [records.get(step, blank)._replace(iteration=step) for step in steps]
    return {name: np.array(column, dtype=np.float64) for name, column in zip(Record._fields, zip(*rows, strict=True), strict=True)}


def first_within(records: dict[int, Record], name: str, tolerance: float) -> int | None:
    """The first recorded iteration at which this is within the tolerance."""
    return next((at for at in sorted(records) if getattr(records[at], name) <= tolerance), None)


def shown(point: dict[str, Any]) -> NDArray[np.int64]:
    """Which of the sorted margins are kept."""
    return np.array(evenly(range(point["K"] * point["n"]), SHOWN))


def summary(table: sweep.Table) -> dict[str, Any]:
    """Model by model and head by head: how many runs reached the limits, how near, when, and what an iteration costs."""
    said: dict[str, Any] = {"runs": len(table), "diverged": int(np.sum(~table["finite"]))}
    for model in dict.fromkeys(table.values("model")):
        rows = table.where(model=model)
        fixed = np.median(rows.where(head="fixed")["step_seconds"])
        for head, gradient in HEADS:
            own = rows.where(head=head, gradient=gradient)
            cost = np.median(own["step_seconds"])
            said[f"{model}, {title(head, gradient, own.values('solver')[0])}"] = (
                f"{own['at_collapse'].sum()} of {len(own)} runs within {FLOOR:.0e} of the floor and {MARGIN:.0e} of the margin limit after "
                f"{own['steps'][0]} iterations; {span(own['end_excess'])} above the floor, {span(own['end_margin_gap'])} below the limit; "
                f"first within at iteration {span(own['floor_at'], 'never')} and {span(own['margin_at'], 'never')}; "
                f"{1e3 * cost:.3g} ms an iteration, {cost / fixed:.2f} of the fixed head"
            )
    return said | {"largest share of time spent on records": f"{table['records_share'].max():.2f}"}


def title(head: str, gradient: bool | None, solver: str | None) -> str:
    """The head in words."""
    if head != "nearest":
        return {"standard": "standard", "fixed": "fixed ETF"}[head]
    return f"nearest ETF, gradient {'on' if gradient else 'off'}" + (", pymanopt" if solver == "pymanopt" else "")
