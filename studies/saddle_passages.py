"""The staircase of the loss: at which saddles does gradient flow linger on its way, and are they the catalogued critical points?

Deep linear chain, cross-entropy, K = 10 balanced classes of n = 5, d = 70, lambda = 2^-10, normal starts of several scales, L = 2 and 3.
Gradient flow from many seeds until it is stationary. A passage is a dip of the scale-free gradient norm; from there Newton's method on the
gradient, at the rank the point has, finds the critical point passed: its value, its index and how far it was. It is catalogued if its value
is that of a block simplex, polygon or rectified simplex of its rank. End points are named alike. Then plain gradient descent with step 0.5
(the setting of Garrod & Keating 2025, Fig. 1) repeats the runs that ended highest and lowest in rank and the one with most passages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import finish
from ufm import sweep
from ufm.arrays import to_numpy
from ufm.landscape import Critical, critical_near
from ufm.theory import deep, deep_points
from ufm.theory.deep_codes import Code

Floats = NDArray[np.float64]

SAME = ("panel", "K", "n", "width", "depth", "lam", "scale", "steps", "every", "settled_below", "device")
STEP, RTOL = 0.5, 1e-4  # of descent, of the flow
RISE = 2.0  # what the gradient norm must grow by after a dip, and have fallen by before it
MOST = 6  # passages kept of a run
LEVEL = 1e-8  # relative difference up to which a critical point is at a catalogued level
SETTLED = 1e-3  # scale-free gradient norm of an end point, and share of its norm to the minimum it is at


@dataclass(frozen=True)
class Options(Common):
    """At which saddles does gradient flow linger? The staircase of the loss against the catalogue of critical points."""


@dataclass(frozen=True)
class Size:
    """Seeds and scales of the start at each depth, most steps and steps between records of descent; classes, width and penalty."""

    seeds: tuple[int, int] = (200, 100)
    scales: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5, 1.0, 2.0), (1.0, 2.0))
    descent: tuple[int, int] = (100_000, 100)
    K: int = 10
    width: int = 70
    lam: float = 2.0**-10


SIZES = {
    "full": Size(),
    "quick": Size((16, 0), ((1.0, 2.0), ()), (60_000, 150)),
    "smoke": Size((4, 0), ((1.0,), ()), (12_000, 60), 6, 24, 2.0**-8),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import saddle_passages as figure

    common: dict[str, Any] = dict(out=options.folder, same=SAME, retry_failed=options.retry_failed, options=options.plain())
    with options.workforce() as executor:
        table = sweep.run(saddle_passages, points(options), block=16, executor=executor, label="passages", **common)
        shown = [] if table.failures else chosen(table, options)
        paths = sweep.run(saddle_passages, shown, block=1, executor=executor, label="paths", **common)
    said = {} if table.failures or paths.failures else summary(table)
    return finish(options.folder, {"passages": table, "paths": paths}, said, figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """A point a run."""
    size = SIZES[options.size]
    one = {"panel": ["run"], "K": [size.K], "n": [5], "width": [size.width], "lam": [size.lam]}
    how = {"steps": 20_000, "every": 5, "settled_below": 1e-7, "device": options.device, "seed": options.seed}
    each = zip((2, 3), size.scales, size.seeds, strict=True)
    return [point | how for L, scales, seeds in each if seeds for point in sweep.grid(**one, depth=[L], scale=scales, run=range(seeds))]


def chosen(table: sweep.Table, options: Options) -> list[dict[str, Any]]:
    """The points of the runs to show, L = 2: the first settled run of the highest rank, of the lowest, and that with most passages."""
    settled = table.pick(table["settled"] & (table["depth"] == 2))
    rows = settled if len(settled) else table
    steps, every = SIZES[options.size].descent
    at = [int(np.argmax(rows["rank"])), int(np.argmin(rows["rank"])), int(np.argmax(rows["passages"]))]
    wanted = sorted({tuple((name, rows[name][i]) for name in (*SAME, "run", "seed")) for i in at})
    return [
        {name: value.item() if hasattr(value, "item") else value for name, value in point}
        | {"panel": "path", "steps": steps, "every": every}
        for point in wanted
    ]


def saddle_passages(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a run: its passages and its end; for the panel "path" also its records."""
    from threadpoolctl import threadpool_limits

    first = points[0]
    # a path starts where the run of the same name does
    seeds = [sweep.seed_of({name: point[name] for name in ("K", "n", "width", "depth", "lam", "scale", "run", "seed")}) for point in points]
    problem = problem_of(first, len(points))
    path = ufm.simulate(
        problem,
        ufm.rules.GradientDescent(STEP) if first["panel"] == "path" else ufm.rules.StabilisedFlow(rtol=RTOL, atol=1e-3 * RTOL),
        seed=seeds,
        steps=first["steps"],
        every=first["every"],
        tol=first["settled_below"],
        probes=("singular_values", "balance", class_logits),
        start=ufm.starts.normal(first["scale"]),
        device=first["device"],
    )
    with threadpool_limits(1):
        return [_row(problem.cell(0), point, path, b) for b, point in enumerate(points)]


def problem_of(point: dict[str, Any], cells: int = 1) -> ufm.Problem:
    """The problem of a point, as many times as there are runs."""
    lam = np.full(cells, point["lam"])
    counts = ufm.counts.balanced(point["K"], point["n"])
    return ufm.Problem(counts, width=point["width"], depth=point["depth"], features="free", lam_w=lam, lam_h=lam)


def class_logits(at: ufm.dynamics.Snapshot) -> Any:
    """M, flattened: the logits of the class means."""
    M = to_numpy(at.logits)
    return M.reshape(len(M), -1)


def _row(problem: ufm.Problem, point: dict[str, Any], path: ufm.Trajectory, b: int) -> dict[str, Any]:
    """What run b did."""
    K, at = point["K"], np.unique(np.where(np.isfinite(path.time[b]), path.time[b], -1.0), return_index=True)[1]
    at = at[np.isfinite(path.value[b, at])]  # a step of the flow has several gradients, and as many records of one point
    gradient, time, value = (records[b, at] for records in (path.gradient_norm, path.time, path.value))
    logits = path.probes["class_logits"][b, at].reshape(-1, K, K)
    passed = list(dips(gradient))[:MOST]
    saddles = [critical_near(problem, logits[i]) for i, _ in passed]
    passages = np.full((MOST, len(PASSAGE)), np.nan)
    for j, ((i, span), of) in enumerate(zip(passed, saddles, strict=True)):
        passages[j] = [time[i], time[span][-1] - time[span][0], value[i], gradient[i], *numbers(problem, of)]
    end = critical_near(problem, logits[-1])
    row = dict(zip(PASSAGE, passages.T, strict=True)) | {
        "passages": len(passed),
        "names": "; ".join(named(problem, of)[0] for of in saddles),
        "value": value[-1],
        "gradient": gradient[-1],
        "time": time[-1],
        "name": named(problem, end)[0],
        "settled": bool(gradient[-1] <= SETTLED and end.moved <= SETTLED and end.index == 0),
        "evaluations": int(path.steps[b]),
        "balance": float(path.probes["balance"][b, at[-1]].max()),
        "dnc_value": level(problem, "DNC"),
        "pairs_value": level(problem, "pairs"),
    }
    row |= dict(zip(("end_value", "rank", "index", "end_gradient", "end_moved", "end_difference"), numbers(problem, end), strict=True))
    if point["panel"] == "run":
        return row
    pictures = np.full((1 + MOST, K, K), np.nan)
    pictures[: 1 + len(saddles)] = [
        logits[-1],
        *(logits[i] if np.isnan(of.index) else of.M for (i, _), of in zip(passed, saddles, strict=True)),
    ]
    rest = {"times": path.time, "values": path.value, "gradients": path.gradient_norm, "spectra": path.probes["singular_values"]}
    return row | {name: records[b] for name, records in rest.items()} | {"pictures": pictures}


def numbers(problem: ufm.Problem, of: Critical) -> list[float]:
    """What a critical point is, and its value against the nearest catalogued level of its rank."""
    return [of.value, of.rank, of.index, of.gradient, of.moved, named(problem, of)[1]]


def dips(gradient: Floats) -> Iterator[tuple[int, slice]]:
    """(record, span) of each passage: a minimum of the gradient norm, RISE times below what came before and what follows.

    span: the records around it with a gradient norm at most RISE times the minimum: how long the run lingers.
    """
    falling, at = False, 0  # the extreme so far
    for i, size in enumerate(gradient):
        if size < gradient[at] if falling else size > gradient[at]:
            at = i
        elif not falling and size <= gradient[at] / RISE:
            falling, at = True, i
        elif falling and size >= RISE * gradient[at]:
            above = np.flatnonzero(gradient[:at] > RISE * gradient[at])
            yield at, slice(int(above[-1]) + 1, i)
            falling, at = False, i


# of each passage: flow time, how long, value and gradient norm there; of the critical point: see `numbers`
PASSAGE = ("at", "lingers", "passed_value", "passed_gradient", "saddle_value", "saddle_rank", "saddle_index", "saddle_gradient")
PASSAGE = (*PASSAGE, "saddle_moved", "saddle_difference")


@cache
def catalogue(K: int, lam: float, depth: int) -> list[tuple[str, int, float]]:
    """(name, rank, value) of the closed-form critical points of K classes at lambda_eff: block simplices, polygon, rectified simplex."""
    codes = [deep_points.blocks(sizes, name=block_name(sizes)) for sizes in partitions(K) if sizes[0] > 1]
    codes += [code for code in deep_points.candidates(K)[1:] if isinstance(code, Code) and "pairs" not in code.name]
    found = [(code, deep_points.levels(code, lam, depth)) for code in codes]
    return [(code.name, int(code.spectrum(at.scales)[1].sum()), float(at.value)) for code, at in found if np.isfinite(at.value)]


def block_name(sizes: Sequence[int]) -> str:
    """DNC, pairs, or the sizes of the blocks."""
    if len(sizes) == 1:
        return "DNC"
    return "pairs" if set(sizes) == {2} else "+".join(map(str, sizes))


def partitions(K: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """The partitions of K, parts falling."""
    if K == 0:
        yield ()
    for first in range(min(K, most or K), 0, -1):
        for rest in partitions(K - first, first):
            yield (first, *rest)


def catalogue_of(problem: ufm.Problem) -> list[tuple[str, int, float]]:
    """The catalogue at the problem's lambda_eff."""
    lam = float(deep.lambda_eff(problem.counts[0, 0], problem.lam_h[0], problem.lam_w[0]))
    return catalogue(problem.classes, lam, problem.depth)


def level(problem: ufm.Problem, name: str) -> float:
    """The value of a catalogued critical point; NaN if there is none of that name."""
    return next((value for known, _, value in catalogue_of(problem) if known == name), np.nan)


def named(problem: ufm.Problem, point: Critical) -> tuple[str, float]:
    """(name, relative difference) of the catalogued level nearest to a critical point among those of its rank.

    "near NAME" where it is not that level to LEVEL; "none" where Newton's method found no critical point near.
    """
    if np.isnan(point.index):
        return "none", np.nan
    own = [(name, point.value / value - 1) for name, rank, value in catalogue_of(problem) if rank == point.rank]
    name, difference = min(own, key=lambda found: abs(found[1]), default=(f"rank {point.rank}", np.nan))
    return (name if abs(difference) <= LEVEL else f"near {name}"), difference


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    found = np.isfinite(table["saddle_index"])
    passed = np.isfinite(table["at"])
    names = [name for text in table["names"] for name in text.split("; ") if name]
    off = np.abs(table["passed_value"] / table["saddle_value"] - 1)[found]
    difference = np.abs(table["saddle_difference"])[found]
    said = {
        "runs": len(table),
        "settled at a minimum": int(table["settled"].sum()),
        "ends": counted(table["name"][table["settled"]].tolist()),
        "passages": int(passed.sum()),
        "with a critical point near": int(found.sum()),
        "critical points passed": counted(names),
    }  # fmt: skip
    if not found.any():
        return said
    return said | {
        "of them at a catalogued level": int((difference <= LEVEL).sum()),
        "of them within a thousandth of one": int((difference <= 1e-3).sum()),
        "median relative difference of plateau and critical point": float(np.median(off)),
        "median time at a plateau, times lambda": float(np.nanmedian(table["lingers"]) * table["lam"][0]),
        "indices passed": counted([f"{i:g}" for i in table["saddle_index"][found]]),
    }


def counted(names: Sequence[str]) -> str:
    """Each name and how often it comes, the most frequent first."""
    return ", ".join(f"{name}: {many}" for name, many in Counter(names).most_common())
