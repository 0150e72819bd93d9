"""Which structure is optimal in deep linear models, and where does it change?

Cross-entropy, balanced classes, d = K; of all penalties and class sizes only lambda_eff matters (`ufm.theory.deep`). Atlas over K, L and
lambda_eff = u lambda_zero(K, L), lambda_zero the penalty from which on zero is best: every cell is searched at every rank from random and
structured starts (`ufm.solvers.search`), the lowest ends polished to the floor of float64, and winners of neighbouring cells carried
over. Between cells with different winners the crossover is refined by following both, and searched for a third. Panel "margin": the
limit lambda -> 0, codes of least Schatten norm at unit margin. For L >= 2 all this is best found, not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from figures.optima import confirmed, crossovers, flat
from studies.command import Options as Common
from studies.command import computed, finish
from ufm import sweep
from ufm.coordinates import balanced
from ufm.solvers.fixed_rank import Found, Reduced, polish
from ufm.solvers.max_margin import max_margin
from ufm.solvers.search import Minima, local_minima
from ufm.theory import deep, deep_points, deep_stability

Floats = NDArray[np.float64]

SAME = ("panel", "K", "depth")
LEAST = 3e-6  # lambda_eff/lambda_zero of the first cell; the last two cells meet at 1
FEW = 3  # random starts a rank where a crossover is searched for a third structure
EXACT, LOWER = 1e-9, 1e-10  # relative agreement with a closed form; relative decrease that counts as lower
MOST = 12  # crossovers of one K and L that a row has room for


@dataclass(frozen=True)
class Options(Common):
    """Which structure is optimal in deep linear models? Atlas over classes, depth and penalty, crossovers, and the limit of no penalty."""


@dataclass(frozen=True)
class Size:
    """Classes and depths, cells along lambda, random starts a rank, and those of the limit lambda -> 0."""

    K: tuple[int, ...] = tuple(range(3, 21))
    depths: tuple[int, ...] = tuple(range(1, 9))
    cells: int = 20
    starts: int = 20
    margin_starts: int = 20


SIZES = {"full": Size(), "quick": Size(tuple(range(3, 10)), (1, 2, 3, 5), 10, 5, 4), "smoke": Size((3, 4), (1, 2), 5, 2, 2)}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import deep_optimum as figure

    table = computed(deep_optimum, points(options), options, "atlas and limit", same=SAME)
    if table.failures:
        return finish(options.folder, {"rows": table}, {}, figure.draw_all)
    tables = {"cells": flat(table), "crossovers": crossovers(table), "margins": table.where(panel="margin")}
    return finish(options.folder, tables, summary(tables), figure.draw_all)


def points(options: Options) -> list[dict[str, Any]]:
    """A point for each K and L, the longest first: all its cells along lambda, and the limit."""
    size = SIZES[options.size]
    pairs = sorted(((K, L) for K in size.K for L in size.depths), key=lambda pair: (-pair[0], -pair[1]))
    atlas = [{"panel": "atlas", "K": K, "depth": L, "cells": size.cells, "starts": size.starts} for K, L in pairs]
    margin = [{"panel": "margin", "K": K, "depth": L, "starts": size.margin_starts} for K, L in pairs]
    return [point | {"seed": options.seed} for point in (*atlas, *margin)]


def deep_optimum(points: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: the cells of one K and L as arrays along lambda, or the codes of the limit."""
    return [PANELS[point["panel"]](point, seed) for point, seed in zip(points, seeds, strict=True)]


class End(NamedTuple):
    """A local minimum at lambda_eff: where, F, its share of penalty, and how many starts of the cell's own search reached it."""

    lam: float
    point: Found
    value: float
    penalty: float
    reached: int


class Model:
    """Deep linear cross-entropy with K classes at depth L, n = 1, as a function of lambda_eff."""

    def __init__(self, K: int, depth: int, seed: int) -> None:
        self.K, self.depth, self.seed = K, depth, seed

    def problem(self, lam: Any) -> ufm.Problem:
        """A cell for each lambda_eff."""
        return ufm.Problem(ufm.counts.balanced(self.K, 1), width=self.K, depth=self.depth, features="free", lam_w=lam, lam_h=lam)

    def search(self, lam: Any, starts: int) -> Minima:
        """The lowest local minima at each lambda_eff."""
        return local_minima(self.problem(lam), starts=starts, seed=self.seed, keep=4)

    def end(self, lam: float, M: Floats, rank: int, reached: int = 0) -> End:
        """The local minimum that Newton's method reaches at lambda_eff from M."""
        F = Reduced.of(self.problem(lam))
        point = polish(F, M, rank)
        return End(lam, point, float(point.value * F.unit[0]), float(F.penalty(point.s) * F.unit[0]), reached)

    def follow(self, end: End, lam: float) -> End:
        """The same minimum at another penalty, or what it becomes."""
        return self.end(lam, logits(end), len(end.point.s))

    def best(self, found: Minima, cell: int, lam: float) -> End:
        """The lowest of one cell of a search."""
        row = found.of(cell)[0]
        return self.end(lam, found.logits[row], int(found.rank[row]), int(found.reached[row]))


def logits(end: End) -> Floats:
    """M (K, K)."""
    return np.asarray((end.point.U * end.point.s) @ end.point.Vt)


def atlas(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every cell of one K and L: the best found, what it is and what it is worth; deep neural collapse beside it; the crossovers."""
    K, depth = point["K"], point["depth"]
    model = Model(K, depth, seed)
    top = zero_level(model)
    lam = levels(point["cells"]) * top.lam
    found = model.search(lam, point["starts"])
    ends = carried(model, [model.best(found, j, float(lam[j])) for j in range(len(lam))])
    names = named(model, ends)
    collapse = deep_points.levels(deep_points.dnc(K), lam, depth)
    dnc, alpha = collapse.value, np.where(np.isnan(collapse.value), 1.0, collapse.scales[..., 0])
    value = np.array([end.value for end in ends])
    changes = changed(model, ends)
    worth = ufm.hessian(model.problem(lam), factors(model, ends))
    index = np.where(np.isnan(dnc), np.nan, deep_stability.dnc_index(K, alpha, depth) if depth > 1 else 0.0)
    runner_up = [found.value[found.of(j)[1]] / found.value[found.of(j)[0]] - 1 if len(found.of(j)) > 1 else np.nan for j in range(len(lam))]
    return {
        "lambda_zero": top.lam,
        "lam": lam,
        "value": value,
        "rank": np.array([len(end.point.s) for end in ends]),
        "name": np.array(names),
        "gradient_norm": worth.gradient_norm,
        "is_minimum": worth.is_minimum,
        "negative": worth.negative,
        "reached": np.array([end.reached for end in ends]),
        "made": found.starts,
        "kinds": found.kinds,
        "runner_up": np.array(runner_up),
        "evaluations": found.steps,
        "dnc": dnc,
        "dnc_excess": dnc / value - 1,
        "dnc_index": index,
    } | listed(model, changes)


def levels(cells: int) -> Floats:
    """lambda_eff/lambda_zero of the cells, in equal ratios; the last one is beyond 1 by half a cell."""
    return np.asarray(LEAST ** (1 - np.arange(cells) / (cells - 1.5)))


def zero_level(model: Model) -> End:
    """The penalty up to which something beats zero: from the catalogue's, up along the best found until none is below zero there."""
    zero = np.zeros((model.K, model.K))
    if model.depth == 1:
        return model.end(1 / model.K, zero, 0)
    lams = np.geomspace(1e-2, 1, 200) * 2 / model.K
    codes = [*deep_points.candidates(model.K), deep_points.blocks([2] + [1] * (model.K - 2))]
    values = np.stack([np.nan_to_num(deep_points.levels(code, lams, model.depth).value, nan=np.inf) for code in codes])
    lam = float(lams[np.flatnonzero(values.min(axis=0) < np.log(model.K))[-1]])
    for _ in range(6):
        end = model.best(model.search(lam, FEW), 0, lam)
        if not len(end.point.s) or end.value >= np.log(model.K) * (1 - LOWER):
            break
        high = lam
        while len(end.point.s) and (after := model.follow(end, high)).value < np.log(model.K) and len(after.point.s):
            end, high = after, 1.1 * high
        lam = crossing(model, end, model.end(high, zero, 0)).lam
    return model.end(lam, zero, 0)


def carried(model: Model, ends: list[End]) -> list[End]:
    """Each cell's best or, where lower, what a neighbour's best becomes there: once up and once down."""
    for order in (range(1, len(ends)), range(len(ends) - 2, -1, -1)):
        for j in order:
            trial = model.follow(ends[j - order.step], ends[j].lam)
            if trial.value < ends[j].value * (1 - LOWER):
                ends[j] = trial
    return ends


def changed(model: Model, ends: Sequence[End]) -> list[tuple[End, End]]:
    """Both structures at each crossover between neighbouring cells; at L = 1 there is none, zero is reached continuously at 1/K."""
    if model.depth == 1:
        return []
    return [pair for low, high in pairwise(ends) for pair in between(model, low, high, 3)]


def between(model: Model, low: End, high: End, depth: int) -> list[tuple[End, End]]:
    """The crossovers from one best to another; none where they are one branch. A third structure that is lower there is taken in."""
    if same(model.follow(low, high.lam), high) and same(model.follow(high, low.lam), low):
        return []
    here = crossing(model, low, high)
    pair = model.follow(low, here.lam), here
    third = model.best(model.search(here.lam, FEW), 0, here.lam)
    if depth and third.value < here.value * (1 - EXACT):
        return between(model, low, third, depth - 1) + between(model, third, high, depth - 1)
    return [pair]


def crossing(model: Model, low: End, high: End) -> End:
    """`high` followed down to where `low` has the same value: Newton's method in log lambda, in which the slope of F is its penalty."""
    left, right, lam = low.lam, high.lam, float(np.sqrt(low.lam * high.lam))
    for _ in range(100):
        a, b = model.follow(low, lam), model.follow(high, lam)
        jumps = [jump(low, a), jump(high, b)]
        lost = [np.isinf(size) or (same(a, b) and size == max(jumps)) for size in jumps]
        lower = not lost[0] and (lost[1] or a.value < b.value)  # the first is still the lower one
        low, left = (a, lam) if lower and not lost[0] else (low, lam if lower else left)
        high, right = (b, lam) if not lower and not lost[1] else (high, right if lower else lam)
        slope = a.penalty - b.penalty
        step = float(np.clip((b.value - a.value) / slope, -1, 1)) if slope and not any(lost) else np.nan
        after = lam * np.exp(step)
        if abs(step) < 1e-13 or right / left - 1 < 1e-12:
            break
        lam = float(after) if left < after < right else float(np.sqrt(left * right))
    return model.follow(high, lam)


def jump(before: End, after: End) -> float:
    """How far the singular values moved, relatively; infinite where the rank changed."""
    if len(before.point.s) != len(after.point.s):
        return np.inf
    return float(np.abs(np.log(after.point.s / before.point.s)).max(initial=0.0))


def same(a: End, b: End) -> bool:
    """Whether two ends at one penalty are one minimum, by value and singular values."""
    equal = len(a.point.s) == len(b.point.s) and abs(a.value - b.value) <= LOWER * abs(b.value)
    return bool(equal and np.allclose(a.point.s, b.point.s, rtol=1e-5))


def factors(model: Model, ends: Sequence[End]) -> list[Floats]:
    """Balanced factors of every end, (B, rows, cols)."""
    frame, K = balanced(model.problem(np.array([end.lam for end in ends]))), model.K
    U, s, Vt = np.linalg.svd(np.stack([logits(end) for end in ends]))
    s = np.where(np.arange(K) < np.array([len(end.point.s) for end in ends])[:, None], s, 0.0)
    return [np.asarray(f) for f in frame.to_factors(frame.aligned(U, s, Vt, []))]


def named(model: Model, ends: Sequence[End]) -> list[str]:
    """What the catalogue calls each end, where the value is that of its closed form; "other, rank r" elsewhere."""
    point = ufm.classify(model.problem(np.array([end.lam for end in ends])), factors(model, ends), inertia=False)
    exact = (point.kind == "zero") | (np.abs(point.excess) <= EXACT)
    return [
        str(name) if known else f"other, rank {len(end.point.s)}"
        for name, known, end in zip(point.name, exact, ends, strict=True)
    ]  # fmt: skip


def listed(model: Model, changes: Sequence[tuple[End, End]]) -> dict[str, Any]:
    """Crossovers as columns of room MOST: where, from what to what, and how far the two values differ there."""
    if len(changes) > MOST:
        raise ValueError(f"deep_optimum: {len(changes)} crossovers at K = {model.K}, L = {model.depth}, but rows have room for {MOST}")
    names = [named(model, pair) for pair in changes]
    empty = MOST - len(changes)
    return {
        "at": np.array([b.lam for _, b in changes] + [np.nan] * empty),
        "mismatch": np.array([abs(a.value / b.value - 1) for a, b in changes] + [np.nan] * empty),
        "from_rank": np.array([float(len(a.point.s)) for a, _ in changes] + [np.nan] * empty),
        "to_rank": np.array([float(len(b.point.s)) for _, b in changes] + [np.nan] * empty),
        "from_name": np.array([pair[0] for pair in names] + [""] * empty),
        "to_name": np.array([pair[1] for pair in names] + [""] * empty),
    }


def margin(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """The best codes of the limit lambda -> 0, and the catalogue's."""
    found = max_margin(point["K"], point["depth"], starts=point["starts"], seed=seed, keep=6)
    known = deep.margin_constants(point["K"], point["depth"])
    best = int(np.flatnonzero(found.is_minimum)[0])
    name = min(known, key=lambda code: abs(known[code] - found.R[best]))
    exact = abs(known[name] / found.R[best] - 1) <= EXACT
    return {
        "R": found.R[best],
        "code_rank": int(found.rank[best]),
        "code": name if exact else f"other, rank {found.rank[best]}",
        "residual": found.residual[best],
        "multiplier": found.multiplier[best],
        "curvature": found.lowest[best],
        "active": int(found.active[best]),
        "second": found.R[best + 1] if len(found.R) > best + 1 else None,
        "catalogue": min(known.values()),
        "catalogue_code": min(known, key=lambda code: known[code]),
        "dnc_R": float(point["K"] - 1),
        "codes": len(found.R),
    }


PANELS = {"atlas": atlas, "margin": margin}


def code_of(name: str, K: int) -> Any:
    """The closed form that `ufm.classify` calls by this name; None where there is none."""
    known = {"zero": deep_points.zero(K), "DNC": deep_points.dnc(K), f"{K}-gon": deep_points.polygon(K)}
    known |= {code.name: code for code in deep_points.candidates(K)}
    if K % 2:
        known["relaxed pairs"] = deep_points.relaxed_pairs(K)
    if name.startswith("blocks "):
        known[name] = deep_points.blocks([int(size) for size in name.removeprefix("blocks ").split("+")])
    return known.get(name)


def exact_crossover(K: int, depth: int, names: tuple[str, str], lam: float) -> float:
    """The closed-form crossover of two catalogued structures near lam; NaN where one has no closed form there."""
    codes = [code_of(name, K) for name in names]
    if None in codes:
        return np.nan
    try:
        return deep.crossover(codes[0], codes[1], depth, lam * 0.9999, lam * 1.0001)
    except ufm.NoTheory:
        return np.nan


def summary(tables: dict[str, sweep.Table]) -> dict[str, Any]:
    """What a reader wants to know first."""
    cells, changes, margins = (tables[name] for name in ("cells", "crossovers", "margins"))
    exact = [
        exact_crossover(int(K), int(L), (str(a), str(b)), float(lam))
        for K, L, a, b, lam in zip(*(changes[name] for name in ("K", "depth", "from_name", "to_name", "lam")), strict=True)
    ]
    off = np.abs(changes["lam"] / np.array(exact) - 1) if len(changes) else np.zeros(0)
    other = np.char.startswith(cells["name"].astype(str), "other")
    better = margins["R"] < margins["catalogue"] * (1 - EXACT)
    return {
        "cells": len(cells),
        "starts": int(cells["made"].sum()),
        "gradient evaluations": int(cells["evaluations"].sum()),
        "largest scale-free gradient of a best": float(cells["gradient_norm"].max()),
        "genuine minima": f"{np.sum(cells['is_minimum'] == 1)} of {len(cells)}",
        "confirmed (genuine, reached by two starts or more, or zero)": f"{np.sum(confirmed(cells))} of {len(cells)}",
        "best without a closed form": int(other.sum()),
        "deep neural collapse is best at L >= 2": int(np.sum((cells["name"] == "DNC") & (cells["depth"] > 1))),
        "crossovers": len(changes),
        "crossovers with a closed form": int(np.isfinite(off).sum()),
        "their largest relative distance to it": float(np.nanmax(off, initial=0.0)),
        "limits below the catalogue": f"{better.sum()} of {len(margins)}",
    }
