"""How often does descent end at deep neural collapse, and at which rank otherwise?

Deep linear chain, cross-entropy, K balanced classes of n samples, one penalty lambda on every factor, all entries of all factors drawn
from N(0, scale^2/d), then the samples of a class put at their mean (the exact reduction over n; one point of panel "method" leaves them
apart). Deep neural collapse (DNC) is a local minimum up to an exact lambda_eff and rarely the global one (Garrod & Keating 2025, Figs 2
and 5). Gradient flow runs from every seed until it is stationary; each end point is named by its logits, held against the closed-form
level of its structure, and the inertia of its Hessian says whether it is a local minimum. What is not counts as unconverged.
Panels: cuts over the width and over lambda at three scales (K = 10, n = 5, L = 2, d = 70, lambda = 2^-10 where not varied); maps over
width and scale; cuts over the scale at four depths; the same seeds under other optimisers, which are different experiments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import computed, evenly, finish
from ufm import sweep
from ufm.arrays import to_numpy
from ufm.objective import chain_of
from ufm.solvers.hybrid import agreement, descend_and_polish
from ufm.starts import first_factors

SCALES = (0.5, 1.0, 2.0)
MOMENTUM = 0.9
EVERY = 50  # steps between two looks at the gradient


@dataclass(frozen=True)
class Options(Common):
    """How often does descent end at deep neural collapse? Basin probabilities over width, lambda, scale, depth and optimiser."""


@dataclass(frozen=True)
class Size:
    """Seeds of a point of a cut, of a cell of a map and of the optimisers; cells along an axis of a map and of a cut; widths, depths, K.

    exponents: of the largest, the usual and the smallest lambda, as powers of 1/2.
    """

    seeds: int = 100
    seeds_map: int = 24
    seeds_method: int = 200
    cells: int = 7
    points: int = 13
    width: int = 70
    widest: int = 200
    depths: tuple[int, ...] = (1, 2, 3, 4)
    K: int = 10
    exponents: tuple[int, int, int] = (6, 10, 12)


SIZES = {"full": Size(), "quick": Size(8, 4, 4, 3, 3, 40, 70), "smoke": Size(2, 2, 2, 2, 2, 10, 20, (1, 2), 4, (4, 4, 5))}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import deep_basins as figure

    table = computed(deep_basins, points(options), options, "basins")
    tables = {f"rows_{count}_seeds": table.where(seeds=count) for count in np.unique(table["seeds"])}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw_all)


def points(options: Options) -> list[dict[str, Any]]:
    """Every point of every panel, the longest first, so that no worker is left alone with them."""
    size = SIZES[options.size]
    most, middle, least = size.exponents
    base = {"K": size.K, "n": 5, "depth": 2, "width": size.width, "lam": 2.0**-middle, "scale": 1.0, "method": "flow", "columns": "means"}
    rest = {"settled_below": 1e-9, "steps": 200_000, "device": options.device, "seed": options.seed}
    widths = [d for d in (10, 14, 20, 28, 40, 56, 70, 80, 100, 120, 140, 170, 200) if d <= size.widest]
    strengths = [2.0**-e for e in evenly(np.arange(most, least + 0.5, 0.5).tolist(), size.points)]
    scales = np.geomspace(0.25, 4.0, size.cells).tolist()

    def panel(name: str, seeds: int, **axes: Any) -> list[dict[str, Any]]:
        usual = {key: [value] for key, value in base.items()}
        return [{"panel": name, "seeds": seeds} | rest | point for point in sweep.grid(**usual | axes)]

    found = [
        *panel("width", size.seeds, width=evenly(widths, size.points), scale=SCALES),
        *panel("lambda", size.seeds, lam=strengths, scale=SCALES),
        *panel("map", size.seeds_map, depth=size.depths[1:3], width=evenly(widths[:9], size.cells), scale=scales),
        *panel("depth", size.seeds_map, depth=size.depths, scale=scales),
        *panel("method", size.seeds_method, scale=[2.0], method=list(METHODS)),
        *panel("method", size.seeds_method, scale=[2.0], columns=["samples"]),
    ]
    return sorted(found, key=lambda p: -_effort(p))


def _effort(point: dict[str, Any]) -> float:
    many = 15 if point["method"] in ("descent", "momentum") else 1
    return float(point["seeds"] * point["width"] ** 2 * point["depth"] * many / point["lam"] ** 0.5)


def deep_basins(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: where every seed ended, what that end point is worth, and the shares over the seeds."""
    return [_row(point) for point in points]


def _row(point: dict[str, Any]) -> dict[str, Any]:
    reached = METHODS[point["method"]](problem_of(point, point["columns"]), start_of(point), point)
    problem = problem_of(point, "means")
    factors = [to_numpy(f) for f in reached.factors]
    factors[0], spread = _class_means(factors[0], point)
    ends = ufm.classify(problem, factors)
    converged = (ends.is_minimum == 1) & reached.settled
    dnc, K = converged & (ends.kind == "dnc"), point["K"]
    ranks = np.bincount(ends.rank[converged], minlength=K + 1)[: K + 1]
    low, high = sweep.wilson(int(dnc.sum()), point["seeds"])
    some = bool(converged.any())
    return {
        "dnc": dnc.mean(),
        "dnc_low": low,
        "dnc_high": high,
        "converged": converged.mean(),
        "ranks": ranks,
        "mean_rank": ends.rank[converged].mean() if some else None,
        "mean_rank_error": ends.rank[converged].std(ddof=1) / np.sqrt(converged.sum()) if converged.sum() > 1 else None,
        "structures": ", ".join(f"{name}: {count}" for name, count in Counter(ends.name[converged].tolist()).most_common()),
        "unconverged": ", ".join(f"{why}: {count}" for why, count in Counter(ends.reason[~converged].tolist()).most_common()),
        "named": int(np.isfinite(ends.level[converged]).sum()),
        "excess": np.nanmax(np.abs(ends.excess[converged]), initial=0.0) if some else None,
        "gradient": float(np.max(ends.gradient_norm[converged])) if some else None,
        "within_class": float(np.max(spread)),
        "evaluations": int(reached.evaluations.sum()),
        "lam_eff": point["lam"] * point["n"] ** (1 / (point["depth"] + 1)),
        "rank_of_seed": ends.rank,
        "name_of_seed": np.where(converged, ends.name, "unconverged"),
        "value_of_seed": ends.value,
        "evaluations_of_seed": reached.evaluations,
    }


def problem_of(point: dict[str, Any], columns: Any) -> ufm.Problem:
    """The problem of a point, on class means or on samples."""
    counts, lam = ufm.counts.balanced(point["K"], point["n"]), point["lam"]
    return ufm.Problem(counts, width=point["width"], depth=point["depth"], features="free", lam_w=lam, lam_h=lam, columns=columns)


def start_of(point: dict[str, Any]) -> ufm.starts.Given:
    """N(0, scale^2/d) on samples, equal for all methods, lambda and columns; for class means the means of those samples."""
    problem = problem_of(point, "samples")
    seed = sweep.seed_of({name: point[name] for name in ("K", "n", "depth", "width", "scale", "seed")})
    factors = first_factors(problem, ufm.starts.normal(point["scale"]), point["seeds"], seed, chain_of(problem))
    return ufm.starts.given(factors if point["columns"] == "samples" else (_class_means(factors[0], point)[0], *factors[1:]))


def _class_means(H: NDArray[np.float64], point: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (S, d, K) of H (S, d, K or N), and the largest distance from them (S,) over the norm of H."""
    grouped = H.reshape(*H.shape[:2], point["K"], -1)
    means = grouped.mean(axis=-1)
    spread = np.abs(grouped - means[..., None]).max(axis=(1, 2, 3)) / np.linalg.norm(H, axis=(1, 2))
    return means, spread


class Reached(NamedTuple):
    """Where the runs of a method ended: factors, gradient evaluations (S,), and whether each run stopped because it was stationary (S,)."""

    factors: Sequence[Any]
    evaluations: NDArray[np.int64]
    settled: NDArray[np.bool_]


def _followed(problem: ufm.Problem, start: ufm.starts.Given, point: dict[str, Any], rule: Any) -> Reached:
    path = ufm.simulate(
        problem,
        rule,
        runs=point["seeds"],
        steps=point["steps"],
        every=EVERY,
        tol=point["settled_below"],
        start=start,
        device=point["device"],
    )
    return Reached(path.factors, path.steps, _stationary(path.stop))


def _solved(problem: ufm.Problem, start: ufm.starts.Given, point: dict[str, Any]) -> Reached:
    found = ufm.solve(
        problem,
        method="lbfgs",
        runs=point["seeds"],
        start=start,
        tol=point["settled_below"],
        max_steps=point["steps"],
        device=point["device"],
    )
    return Reached(found.factors, found.steps, _stationary(found.stop))


def _handed_over(problem: ufm.Problem, start: ufm.starts.Given, point: dict[str, Any]) -> Reached:
    rule = ufm.rules.GradientDescent(_stable_step(point))
    found = descend_and_polish(problem, rule, runs=point["seeds"], start=start, tol=point["settled_below"], device=point["device"])
    return Reached(found.factors, found.steps, _stationary(found.stop))


def _stationary(stop: Sequence[ufm.Stop]) -> NDArray[np.bool_]:
    return np.array([reason.stationary for reason in stop])


def _stable_step(point: dict[str, Any]) -> float:
    """0.5 as in Garrod & Keating, smaller where a start of this scale would diverge."""
    return 0.5 / max(1.0, point["scale"])


METHODS: dict[str, Callable[[ufm.Problem, ufm.starts.Given, dict[str, Any]], Reached]] = {
    "flow": lambda problem, start, point: _followed(problem, start, point, ufm.rules.StabilisedFlow()),
    "descent": lambda problem, start, point: _followed(problem, start, point, ufm.rules.GradientDescent(_stable_step(point))),
    "momentum": lambda problem, start, point: _followed(problem, start, point, ufm.rules.GradientDescent(_stable_step(point), MOMENTUM)),
    "hybrid": _handed_over,
    "lbfgs": _solved,
}


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    seeds, converged = table["seeds"], table["converged"]
    return {
        "points": len(table),
        "runs": int(seeds.sum()),
        "certified local minima": int(np.round(seeds * converged).sum()),
        "unconverged": int(np.round(seeds * (1 - converged)).sum()),
        "at a closed-form level": int(table["named"].sum()),
        "largest relative distance to it": float(np.nanmax(table["excess"])),
        "gradient evaluations": int(table["evaluations"].sum()),
        **agreements(table),
    }


def agreements(table: sweep.Table) -> dict[str, str]:
    """In how many seeds each method ends like plain descent, and flow on samples like flow on class means: at DNC or not, at one rank."""
    rows = table.where(panel="method")
    said = {}
    for method, columns in dict.fromkeys(zip(rows["method"].tolist(), rows["columns"].tolist(), strict=True)):
        other = "flow" if columns == "samples" else "descent"
        row, reference = rows.where(method=method, columns=columns), rows.where(method=other, columns="means")
        cost = row["evaluations"][0] / reference["evaluations"][0]
        for what, of in (
            ("at DNC or not", lambda ends: ends["name_of_seed"][0] == "DNC"),
            ("at the same rank", lambda ends: ends["rank_of_seed"][0]),
        ):
            same = agreement(of(row), of(reference))
            said[f"{method} on {columns} against {other} on means, {what}"] = (
                f"{same.share:.3f} of {same.runs} ({same.low:.3f} to {same.high:.3f}), {cost:.4f} of its gradient evaluations"
            )
    return said
