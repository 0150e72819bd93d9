"""Solvers of a whole problem grid: `solve`, and the table of its methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import block_size, place, threads_for, to_numpy
from ufm.certificate import certify
from ufm.coordinates import Coordinates, balanced
from ufm.objective import chain_of, objective
from ufm.problem import Problem
from ufm.records import Solution
from ufm.solvers import stiefel as stiefel  # its own room: pymanopt, loaded on use
from ufm.solvers.convex import convex
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.solvers.outcome import Outcome
from ufm.solvers.robust import robust
from ufm.solvers.search import multistart
from ufm.starts import BalancedNormal, Given, Start, first_factors, seeds

Floats = NDArray[np.float64]


def solve(
    problem: Problem,
    *,
    runs: int = 1,
    seed: int | Sequence[int] = 0,
    method: Literal["robust", "lbfgs", "convex", "multistart"] = "robust",
    start: Start | Given | None = None,
    tol: float = 1e-9,
    max_steps: int | None = None,
    device: str = "numpy",
    progress: Callable[[int], Any] | None = None,
) -> Solution:
    """Minimise F for every cell of `problem` from `runs` starts each, and certify every end point.

    method: "robust" (solve, merge, certify, seed, repeat until the proven relative gap is at most tol), "lbfgs" (one local solve to the
    scale-free gradient norm tol), "convex" (proximal gradient on the logits, L = 1: nuclear norm, or with ReLU the group lasso of the
    separable case), "multistart" (deep linear chains: the `runs` lowest distinct local minima of a cell, from as many random starts at
    every rank; see `search.local_minima`). start: starts.balanced(1.0) by default; run r of cell g draws from the seed (seed, r), or
    (seed[g], r) where seed is a sequence. max_steps bounds the gradient evaluations of a run ("multistart" has its own). progress(done)
    is called after each block with the number of runs that ended. One BLAS thread is used below width 512. Returns a Solution of
    B = G * runs runs, cell-major. Raises ValueError on bad options.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"solve: problem is {problem!r}, but must be a ufm.Problem")
    if not isinstance(method, str) or method not in (*METHODS, *SEARCHES):
        raise ValueError(f"solve: method is {method!r}, but must be one of {', '.join(map(repr, (*METHODS, *SEARCHES)))}")
    if method in SEARCHES and (start is not None or device != "numpy"):
        raise ValueError(f"solve: method={method!r} makes its own starts and runs on device 'numpy'; leave out start and device")
    for name, value, least in (("runs", runs, 1), ("max_steps", 20_000 if max_steps is None else max_steps, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"solve: {name} is {value!r}, but must be a whole number, at least {least}")
    if not isinstance(tol, Real) or not 0 < tol < 1:
        raise ValueError(f"solve: tol is {tol!r}, but must lie between 0 and 1")
    if method in SEARCHES:
        with threads_for(1):
            found = SEARCHES[method](problem, runs, seeds("solve", seed, problem.cells), tol)
            if progress is not None:
                progress(len(found.x))
            return _solution(problem.pick(np.repeat(np.arange(problem.cells), runs)), [found], device)
    chain = chain_of(problem)
    start = BalancedNormal() if start is None else start
    factors = first_factors(problem, start, runs, seeds("solve", seed, problem.cells), chain)
    rows = problem.pick(np.repeat(np.arange(problem.cells), runs))
    x = balanced(rows).from_factors(factors)
    block = block_size(BYTES_PER_COORDINATE * (x.shape[1] + problem.classes * problem.labels.shape[1]), device)
    outcomes = []
    with threads_for(problem.width):
        for first in range(0, len(x), block):
            part = np.arange(first, min(first + block, len(x)))
            outcomes.append(METHODS[method](rows.pick(part), x[part], tol, max_steps or 20_000, device))
            if progress is not None:
                progress(len(part))
        return _solution(rows, outcomes, device)


BYTES_PER_COORDINATE = 8 * 18  # and logit: a run's pairs, point, gradient and temporaries


def _solution(rows: Problem, outcomes: list[Outcome], device: str) -> Solution:
    x = np.concatenate([o.x for o in outcomes])
    factors = tuple(to_numpy(f) for f in balanced(rows).to_factors(x))
    worth = certify(rows, factors)
    return Solution(
        value=worth.value,
        gap=worth.gap,
        gradient_norm=worth.gradient_norm,
        rho=worth.rho,
        regime=worth.regime,
        collapsed=worth.collapsed,
        stop=tuple(s for o in outcomes for s in o.stop),
        steps=np.concatenate([o.steps for o in outcomes]),
        rounds=np.concatenate([o.rounds for o in outcomes]),
        factors=tuple(place(f, device) for f in factors),
        logits=place(objective(rows).logits(factors), device),
    )


def _lbfgs(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    frame: Coordinates = balanced(rows, device=device)
    found = minimise(frame, place(x, device), LBFGS(tol=tol, max_steps=max_steps))
    return Outcome(to_numpy(found.x), found.stop, found.steps, np.ones(len(x), dtype=np.int64))


METHODS = {
    "robust": robust,
    "lbfgs": _lbfgs,
    "convex": convex,
}
SEARCHES = {"multistart": multistart}  # methods that search a whole cell, not run by run
__all__ = ["METHODS", "SEARCHES", "solve"]
