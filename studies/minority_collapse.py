"""When does minority collapse happen, at the optimum and where descent ends?

K classes of unequal size, cross-entropy, features nonnegative (ReLU) or free. Theory (Dang et al. 2024), ReLU without bias: the features
of class k vanish once kappa^2 K/(K-1) >= n_k, kappa = N lambda, lambda = sqrt(lam_w lam_h). Maps over the imbalance ratio n_max/n_min and
the strength kappa^2/n_min: every cell is solved to a proven relative gap and held against the prediction for the same problem; then
projected gradient descent with momentum runs from random starts, and a seed counts as killed if a class that the optimum keeps has ended
at zero. Panels: K = 10; K = 10 with a free and with a penalised bias; K = 4 and K = 100; cuts over initial scale, width and momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

import ufm
from studies.command import Options as Common
from studies.command import finish
from ufm import metrics, sweep
from ufm.arrays import to_numpy
from ufm.theory.boundaries import boundaries

N_MAX = 5000  # samples of the largest class, as in CIFAR-10-LT
RATIOS, STRENGTHS = (1.0, 1000.0), (0.03, 30.0)
BIASES = {"none": None, "free": 0.0, "penalised": 0.01}  # lam_b
REACHED = 1e-5  # relative excess over the optimum's value at which descent that kills nothing has found it
EVERY = 100  # steps of descent between two looks at its gradient
SAME = (
    "panel",
    "K",
    "width",
    "features",
    "bias",
    "scale",
    "step_for",
    "momentum",
    "descents",
    "steps",
    "tol",
    "settled_below",
    "dead_below",
    "device",
)

PATTERNS = {
    "step": lambda K, ratio: ufm.counts.step(K, n_min := round(N_MAX / ratio), N_MAX / n_min),
    "exponential": lambda K, ratio: ufm.counts.exponential(K, N_MAX, ratio),
}


@dataclass(frozen=True)
class Options(Common):
    """When does minority collapse happen? Phase diagrams over imbalance and regularisation: theory, certified optima, descent."""


@dataclass(frozen=True)
class Size:
    """Cells along an axis and most steps of a descent, at K <= 10 and at K = 100; descents a cell and a point of a cut; bisections."""

    cells: int = 40
    cells_large: int = 20
    descents: int = 16
    descents_cut: int = 64
    steps: int = 8000
    steps_large: int = 2500
    bisections: int = 9


SIZES = {"full": Size(), "quick": Size(10, 3, 16, 16, 2000, 400, 7), "smoke": Size(3, 2, 2, 2, 300, 50, 3)}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import minority_collapse as figure

    common: dict[str, Any] = dict(out=options.folder, same=SAME, retry_failed=options.retry_failed, options=options.plain())
    with options.workforce() as executor:
        cells = points(options)
        large = [point for point in cells if point["K"] == 100]
        sweep.run(minority_collapse, large, block=2, executor=executor, label="K = 100", **common)
        table = sweep.run(minority_collapse, cells, block=32, executor=executor, label="all panels", **common)
        rows, between, exact = ([], [], []) if table.failures else edges(table, options)
        refined = sweep.refine(
            minority_collapse,
            rows,
            axis="strength",
            between=between,
            sign="distinct",
            steps=SIZES[options.size].bisections,
            log=True,
            executor=executor,
            label="boundary",
            **common,
        )
    tables = {f"rows_K{K}": table.where(K=K) for K in np.unique(table["K"])} | ({"boundary": refined} if rows else {})
    said = {} if table.failures else summary(table) | accuracy(refined, exact)
    return finish(options.folder, tables, said, figure.draw_all)


def usual(options: Options) -> dict[str, Any]:
    """What the points of all panels have unless they say otherwise.

    step_for: scale of a balanced start for which the step of descent is chosen; settled_below: scale-free gradient norm at which descent
    ends; dead_below: share of its norm at the optimum below which a class counts as zero.
    """
    return {
        "tol": 1e-9,
        "momentum": 0.9,
        "scale": 1.0,
        "step_for": 1.0,
        "steps": SIZES[options.size].steps,
        "descents": 0,
        "settled_below": 1e-4,
        "dead_below": 1e-2,
        "device": options.device,
        "seed": options.seed,
    }


def points(options: Options) -> list[dict[str, Any]]:
    """Every cell of every panel."""
    size = SIZES[options.size]
    base = usual(options)
    ratios, strengths = np.geomspace(*RATIOS, size.cells), np.geomspace(*STRENGTHS, size.cells)
    few = dict(ratio=np.geomspace(*RATIOS, size.cells_large), strength=np.geomspace(*STRENGTHS, size.cells_large))

    def panel(name: str, K: int, **axes: Any) -> list[dict[str, Any]]:
        one = {"panel": [name], "K": [K], "width": [2 * K], "features": ["relu"], "pattern": ["step"], "bias": ["none"]}
        return [base | point for point in sweep.grid(**one | axes)]

    def slower(scale: float) -> dict[str, Any]:
        """Equal flow time from starts that need smaller steps."""
        return {"step_for": [max(1.0, scale)], "steps": [round(max(1.0, scale) ** 2 * size.steps)]}

    at = dict(ratio=[100.0], strength=[0.1, 0.3, 0.6, 0.85], descents=[size.descents_cut])
    row = dict(ratio=few["ratio"], strength=few["strength"][[np.abs(few["strength"] - 0.8).argmin()]], descents=[size.descents])
    return [  # the longest first, so that no worker is left alone with them
        *panel("many classes, descent", 100, **row, scale=[0.3], step_for=[0.3], momentum=[0.98], steps=[size.steps_large]),
        *panel("many classes", 100, **few),
        *(
            point
            for momentum in (0.0, 0.5, 0.8, 0.9, 0.95)  # equal flow times: step/(1 - momentum) a step
            for point in panel("momentum", 10, momentum=[momentum], steps=[round(10 * (1 - momentum) * size.steps)], **at)
        ),
        *panel("width", 10, width=[10, 11, 12, 15, 20, 30, 40, 60, 80], **at),
        *(point for s in np.geomspace(0.01, np.sqrt(10), 11) for point in panel("scale", 10, scale=[s], **at | slower(s))),
        *panel("map", 10, features=["relu", "free"], pattern=list(PATTERNS), ratio=ratios, strength=strengths, descents=[size.descents]),
        *panel("few classes", 4, ratio=ratios, strength=strengths, descents=[size.descents]),
        *panel("bias", 10, bias=["free", "penalised"], pattern=list(PATTERNS), ratio=ratios, strength=strengths),
    ]


def minority_collapse(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a cell: the certified optimum, the prediction, whether they agree, and where descent from random starts ended."""
    problem = problem_of(points)
    seeds = [sweep.seed_of({name: value for name, value in point.items() if name != "device"}) for point in points]  # equal on all devices
    start = apart(problem) if problem.classes == 100 else None  # a third of the time of a random one there; the proof is the same
    found = ufm.solve(problem, seed=seeds, start=start, tol=points[0]["tol"], device=points[0]["device"])
    rows = at_optimum(problem, found)
    for row, edge in zip(rows, np.stack(boundaries(problem), axis=1), strict=True):
        row |= dict(zip(("strength_merged", "strength_zero", "strength_all"), (row["N"] * edge) ** 2 / row["n_min"], strict=True))
    if points[0]["descents"]:
        for row, ends in zip(rows, descent(problem, found, points[0], seeds), strict=True):
            row |= ends
    return rows


def problem_of(points: Sequence[dict[str, Any]]) -> ufm.Problem:
    """The grid of these points: kappa^2 = (N lambda)^2 = strength * n_min, lam_w = lam_h = lambda."""
    first = points[0]
    counts = np.array([PATTERNS[point["pattern"]](point["K"], point["ratio"]) for point in points])
    lam = np.sqrt(np.array([point["strength"] for point in points]) * counts[:, -1]) / counts.sum(axis=1)
    return ufm.Problem(counts, width=first["width"], features=first["features"], lam_w=lam, lam_h=lam, lam_b=BIASES[first["bias"]])


def apart(problem: ufm.Problem) -> ufm.starts.Given:
    """Every class alone on a coordinate of its own, in balanced units."""
    G, K, d = problem.cells, problem.classes, problem.width
    H, W = np.zeros((G, d, K)), np.zeros((G, K, d))
    H[:, :K], W[:, :, :K] = np.eye(K), np.eye(K) - 1 / K
    q = 3 * (problem.samples / K)[:, None, None] ** 0.25
    return ufm.starts.given([9 * H / q, q * W])


def at_optimum(problem: ufm.Problem, found: ufm.Solution) -> list[dict[str, Any]]:
    """The certified optimum of each cell beside its prediction."""
    theory = ufm.predict(problem)
    margins = metrics.margins(to_numpy(found.logits), np.arange(problem.classes), against="mean")
    rows = []
    for g, counts in enumerate(problem.counts):
        same = found.regime[g] == theory.regime[g] and np.array_equal(found.collapsed[g], theory.collapsed[g])
        known = theory.regime[g] != ufm.Regime.UNKNOWN
        rows.append(
            {
                "counts": counts,
                "n_min": int(counts[-1]),
                "N": int(counts.sum()),
                "lam": float(problem.lam_h[g]),
                "lam_b": None if problem.lam_b is None else float(problem.lam_b[g]),
                "value": found.value[g],
                "gap": found.gap[g],
                "rho": found.rho[g],
                "gradient_norm": found.gradient_norm[g],
                "stop": found.stop[g].name,
                "regime": found.regime[g].name,
                "dead": int(found.collapsed[g].sum()),
                "distinct": found.regime[g] == ufm.Regime.DISTINCT,
                "margins": margins[g],
                "predicted_value": theory.value[g],
                "predicted_regime": theory.regime[g].name,
                "difference": found.value[g] / theory.value[g] - 1,
                "distance": theory.distance[g],
                "agree": bool(same) if known else None,
            }
        )
    return rows


def descent(problem: ufm.Problem, found: ufm.Solution, point: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Where projected gradient descent with momentum ends, per cell: the share of seeds that killed a class which the optimum keeps."""
    G, runs, d, K = problem.cells, point["descents"], problem.width, problem.classes
    # about the loss's largest curvature at a balanced start of scale `step_for`; heavy ball is stable up to 2 (1 + momentum) over that
    curvature = (np.sqrt(d) + np.sqrt(K)) ** 2 / np.sqrt(problem.samples * K) * point["step_for"] ** 2
    path = ufm.simulate(
        problem,
        ufm.rules.GradientDescent(2 / curvature, point["momentum"]),
        runs=runs,
        seed=seeds,
        steps=point["steps"],
        every=EVERY,
        tol=point["settled_below"],
        probes=("class_norms",),
        start=ufm.starts.balanced(point["scale"]),
        device=point["device"],
    )
    norms = path.last("class_norms").reshape(G, runs, K)
    at_best = np.linalg.norm(to_numpy(found.factors[0]), axis=1)[:, None, :]
    killed = (norms <= point["dead_below"] * at_best) & ~found.collapsed[:, None, :]
    settled = np.array([stop.stationary for stop in path.stop]).reshape(G, runs)
    excess = path.last("value").reshape(G, runs) / found.value[:, None] - 1
    gradient = path.last("gradient_norm").reshape(G, runs)
    steps = path.steps.reshape(G, runs)
    rows = []
    for g in range(G):
        dead = int(killed[g].any(axis=1).sum())
        low, high = sweep.wilson(dead, runs)
        rows.append(
            {
                "killed": dead / runs,
                "killed_low": low,
                "killed_high": high,
                "killed_classes": killed[g].sum(axis=1).mean(),
            }
            | {
                "settled": settled[g].mean(),
                "reached": np.mean((excess[g] <= REACHED) & ~killed[g].any(axis=1)),
                "excess": np.median(excess[g]),
            }
            | {"descent_gradient": gradient[g].max(), "descent_steps": np.median(steps[g])}
        )
    return rows


def edges(table: sweep.Table, options: Options) -> tuple[list[dict[str, Any]], list[tuple[float, float]], list[float]]:
    """Where classes cease to be distinct on the maps: for each ratio the row to refine, the two neighbouring cells, theory's boundary."""
    rows, between, exact = [], [], []
    rest = usual(options) | {"steps": 1, "tol": 1e-12}
    for features, pattern in product(("relu", "free"), PATTERNS):
        cells = table.where(panel="map", features=features, pattern=pattern).on_grid("ratio", "strength")
        own = {"panel": "boundary", "K": 10, "width": 20, "features": features, "pattern": pattern, "bias": "none"}
        for i, ratio in enumerate(cells["ratio"]):
            for j in np.flatnonzero(np.diff(cells["distinct"][:, i].astype(int)))[:1]:
                rows.append(own | {"ratio": ratio} | rest)
                between.append((cells["strength"][j], cells["strength"][j + 1]))
                exact.append(cells["strength_merged"][j, i])
    return rows, between, exact


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    gap, difference, agree = (np.array(table[name], dtype=np.float64) for name in ("gap", "difference", "agree"))
    return {
        "cells": len(table),
        "proven within the tolerance": int(np.sum(gap <= table["tol"])),
        "with a closed form": int(np.sum(np.isfinite(difference))),
        "largest relative difference of values": float(np.nanmax(np.abs(difference))),
        "regimes known": int(np.sum(np.isfinite(agree))),
        "regimes agree": int(np.nansum(agree)),
    }


def accuracy(refined: sweep.Table, exact: list[float]) -> dict[str, Any]:
    """How far the measured boundaries lie from theory's."""
    if not exact:
        return {}
    return {
        "boundary points refined": len(refined),
        "largest relative distance to theory": float(np.max(np.abs(refined["estimate"] / exact - 1))),
    }
