"""When does minority collapse happen?

K classes of unequal size, ReLU features of width 2K, no bias, cross-entropy. Theory: the features of class k vanish once
kappa^2 K/(K-1) >= n_k, with kappa = N lambda and lambda = sqrt(lam_w lam_h) (Dang et al. 2024). Every cell of the map
(imbalance ratio, lambda) is solved to a proven relative gap and held against the prediction for the same problem.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

import ufm
from studies import STUDIES, results
from ufm.theory.imbalance import collapse_level

K = 10
N_MAX = 5000  # samples of the largest class, as in CIFAR-10-LT
RATIOS = (1.0, 1000.0)
LAMBDAS = (5e-5, 1e-2)

PATTERNS: dict[str, Callable[[float], Any]] = {
    "exponential": lambda ratio: ufm.counts.exponential(K, N_MAX, ratio),
    "step": lambda ratio: ufm.counts.step(K, n_min := round(N_MAX / ratio), N_MAX / n_min),
}


@dataclass(frozen=True)
class Options:
    """When does minority collapse happen? A phase diagram over imbalance ratio and lambda, against theory."""

    smoke: bool = False
    """a tiny grid, in seconds"""
    quick: bool = False
    """a smaller grid"""
    out: Path = Path("out/minority_collapse")
    """folder for the rows, the record of the run and the figure"""
    seed: int = 0
    """of the random starts"""
    tol: float = 1e-9
    """proven relative gap at which a cell counts as solved"""
    device: Literal["numpy", "cpu", "cuda"] = "numpy"
    """where to compute: numpy, or torch on cpu or cuda"""

    def __post_init__(self) -> None:
        if self.smoke and self.quick:
            raise ValueError("--smoke and --quick exclude each other; give one")
        if not 0 < self.tol < 1:
            raise ValueError(f"--tol is {self.tol}, but a relative gap lies between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, but a seed is at least 0")

    @property
    def cells(self) -> int:
        """Cells along each axis."""
        return 6 if self.smoke else 20 if self.quick else 40


def main(options: Options) -> None:
    """Compute, store, draw, and say on standard output what came out."""
    from figures import minority_collapse as figure

    out, start = results.folder(options.out), time.perf_counter()
    rows = minority_collapse(options)
    seconds = time.perf_counter() - start
    stored = results.write_rows(out / "rows.csv", rows)
    record = results.write_study(out / "study.json", "minority_collapse", STUDIES["minority_collapse"], options, seconds=seconds)
    drawn = figure.draw(stored, out)
    for name, value in (summary(rows) | {"seconds": round(seconds, 1)}).items():
        print(f"{name}: {value}")
    for path in (stored, record, *drawn):
        print(f"file: {path}")


def minority_collapse(options: Options) -> list[results.Row]:
    """One row a cell: the certified optimum, the prediction, and whether they agree."""
    from tqdm import tqdm

    grid = list(product(np.geomspace(*RATIOS, options.cells), np.geomspace(*LAMBDAS, options.cells)))
    rows = []
    for pattern, counts_of in PATTERNS.items():
        lams = np.array([lam for _, lam in grid])
        problem = ufm.Problem([counts_of(ratio) for ratio, _ in grid], width=2 * K, features="relu", lam_w=lams, lam_h=lams)
        with tqdm(total=len(grid), desc=pattern, unit="cell", disable=None, mininterval=0.5) as bar:
            found = ufm.solve(problem, seed=options.seed, tol=options.tol, device=options.device, progress=bar.update)
        theory, levels = ufm.predict(problem), collapse_level(problem.counts)  # kappa^2 K/(K-1) = n_k
        for g, (ratio, lam) in enumerate(grid):
            counts, N, lam_k = problem.counts[g], problem.samples[g], levels[g]
            same = found.regime[g] == theory.regime[g] and np.array_equal(found.collapsed[g], theory.collapsed[g])
            rows.append(
                {"pattern": pattern, "ratio": ratio, "n_min": counts[-1], "n_max": counts[0], "N": N, "lam": lam}
                | {"value": found.value[g], "gap": found.gap[g], "rho": found.rho[g], "gradient_norm": found.gradient_norm[g]}
                | {"stop": found.stop[g], "steps": found.steps[g], "rounds": found.rounds[g]}
                | {"tol": options.tol, "certified": found.gap[g] <= options.tol}
                | {"regime": found.regime[g], "dead": found.collapsed[g].sum()}
                | {"predicted_value": theory.value[g], "predicted_regime": theory.regime[g], "predicted_dead": theory.collapsed[g].sum()}
                | {"distance": theory.distance[g], "difference": found.value[g] / theory.value[g] - 1, "agree": same}
                | {"lam_minority": lam_k[-1], "lam_all": lam_k[0]}
                | {f"lam_{k + 1}": lam_k[k] for k in range(K)}
            )
    return rows


def summary(rows: list[results.Row]) -> dict[str, Any]:
    """What a reader wants to know first."""
    certified = [row for row in rows if row["certified"]]
    return {
        "cells": len(rows),
        "certified": len(certified),
        "largest_gap": float(max((row["gap"] for row in certified), default=np.nan)),
        "regime_agreements": sum(row["agree"] for row in rows),
        "largest_relative_difference": float(max(abs(row["difference"]) for row in rows)),
    }
