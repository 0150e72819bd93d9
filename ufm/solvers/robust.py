"""The robust loop: solve, merge parallel coordinates, certify, seed a violating atom, repeat; it stops on the proven gap.

Plain descent often ends where a class is wrongly dead (the ReLU model of Dang et al. 2024). The dual bound names the missing atom u v^T,
merging frees a coordinate for it, and the objective falls at the rate (rho - 1) sqrt(lam_w lam_h). Merging and seeding need L = 1; deeper
chains whose bound is not met are solved once more from an aligned start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, place, to_numpy
from ufm.certificate import Dual, dual_bound, rounded
from ufm.objective import Balanced, balanced, objective
from ufm.problem import Problem
from ufm.records import Stop
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.solvers.outcome import Outcome

Floats = NDArray[np.float64]

PARALLEL = 1e-6  # coordinates with both cosines above 1 minus this are one
FAINT = 1e-7  # coordinates shorter than this share of the longest are none
VIOLATION = 1e-9  # an atom must exceed the limit by this share to be worth seeding
TRIALS = np.logspace(-5, 1.5, 27)  # atom strengths tried, in units of sqrt(sum_k n_k v_k^2)


def robust(rows: Problem, x: Floats, tol: float, max_steps: int, max_rounds: int = 40, device: str = "numpy") -> Outcome:
    """Solve every run of `rows` (one cell per run) from x (B, n) to the proven relative gap `tol`, on `device`."""
    B = len(x)
    x = x.copy()
    stop = np.full(B, Stop.ROUNDS, dtype=object)
    steps, rounds = np.zeros(B, dtype=np.int64), np.zeros(B, dtype=np.int64)
    todo = np.arange(B)
    frame, placed = balanced(rows), balanced(rows, device=device)
    best = np.full(B, np.inf)
    for number in range(max_rounds):
        problem, part = rows.pick(todo), frame.pick(todo)
        accuracy = max(min(0.1 * tol, 1e-9) * 0.1 ** min(number // 2, 3), 1e-14)
        options = LBFGS(tol=accuracy, max_steps=max_steps)
        found = minimise(placed.pick(_on(device, todo)), place(x[todo], device), options)
        point = simplified(problem, part, to_numpy(found.x))
        steps[todo] += found.steps
        rounds[todo] = number + 1
        dual = dual_bound(problem, [to_numpy(f) for f in part.to_factors(point)])
        value = part.value_and_gradient(point)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = rounded(1.0 - dual.lower / (value * part.unit))
        x[todo] = point
        stop[todo] = [Stop.GAP if small else reason for small, reason in zip(gap <= tol, found.stop, strict=True)]
        done = (gap <= tol) | np.isnan(dual.rho) | (steps[todo] >= max_steps)
        if rows.depth > 1:
            again = todo[gap > tol]
            if len(again):
                second = _second_start(rows, frame, x, again, options)
                F = frame.pick(again).value_and_gradient(second.x)[0]
                better, proven = F < value[again], F * frame.unit[again] * (1 - tol) <= dual.lower[again]
                x[again] = np.where(better[:, None], second.x, x[again])
                kept = [new if b else old for new, old, b in zip(second.stop, stop[again], better, strict=True)]
                stop[again] = [Stop.GAP if p else k for p, k in zip(proven, kept, strict=True)]
                steps[again], rounds[again] = steps[again] + second.steps, second.rounds
            break
        point, seeded = seed_atoms(problem, part, point, value, dual)
        stuck = ~seeded & (value >= best[todo] * (1 - 1e-15)) & (number > 2)
        best[todo] = np.minimum(best[todo], value)
        x[todo] = np.where(done[:, None], x[todo], point)
        stop[todo[~done & ~stuck]] = Stop.ROUNDS
        todo = todo[~done & ~stuck]
        if not len(todo):
            break
    return Outcome(x, tuple(stop), steps, rounds)


def _on(device: str, rows: NDArray[np.int64]) -> Array:
    return rows if device == "numpy" else place(rows, device)  # type: ignore[arg-type]


def simplified(problem: Problem, frame: Balanced, x: Floats) -> Floats:
    """The same products in as few coordinates as can be: parallel ones merged, faint ones zeroed; F does not rise.

    Without ReLU the SVD of each run's W H does both. Points of deeper chains are returned as they are, or at zero where that is lower.
    """
    parts = frame.unpack(x)
    if problem.depth == 1 and problem.columns == "means":
        H, W = parts[0], parts[1]
        H, W = _by_svd(H, W) if problem.features == "free" else _by_direction(H, W)
        x_new = frame.pack([H, W, *parts[2:]])
    else:
        x_new = x
    zero = frame.pack([np.zeros_like(parts[0]), *(np.zeros_like(p) for p in parts[1 : problem.depth + 1]), *parts[problem.depth + 1 :]])
    values = np.stack([frame.value_and_gradient(np.ascontiguousarray(y))[0] for y in (x_new, x, zero)])
    near_zero = np.sum(x**2, axis=1) <= 1e-12 * values[1]
    lower = (values[2] <= values[1] * (1 + 1e-15)) & near_zero
    keep = values[0] <= values[1] * (1 + 1e-12)
    return np.where(lower[:, None], zero, np.where(keep[:, None], x_new, x))


def _by_svd(H: Floats, W: Floats) -> tuple[Floats, Floats]:
    """Balanced factors of W H (B, K, cols) along its singular vectors, the rest of the d coordinates at 0."""
    U, s, Vt = np.linalg.svd(W @ H, full_matrices=False)
    r = min(s.shape[1], W.shape[2])
    root = np.sqrt(np.where(s > FAINT**2 * s[:, :1], s, 0.0))[:, :r]
    H_new, W_new = np.zeros_like(H), np.zeros_like(W)
    H_new[:, :r], W_new[:, :, :r] = root[:, :, None] * Vt[:, :r], U[:, :, :r] * root[:, None, :]
    return H_new, W_new


def _by_direction(H: Floats, W: Floats) -> tuple[Floats, Floats]:
    """Coordinates i with parallel columns W_:i and parallel rows H_i: summed into the first of them, balanced."""
    a, b = np.linalg.norm(W, axis=1), np.linalg.norm(H, axis=2)  # (B, d)
    strength = a * b
    faint = strength <= FAINT**2 * strength.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        U = np.where(faint[:, None, :], 0.0, W / a[:, None, :])
        V = np.where(faint[:, :, None], 0.0, H / b[:, :, None])
    alike = (np.swapaxes(U, 1, 2) @ U > 1 - PARALLEL) & (V @ np.swapaxes(V, 1, 2) > 1 - PARALLEL)
    leader = alike.argmax(axis=2)
    group = (leader[:, :, None] == np.arange(H.shape[1])) & ~faint[:, :, None]  # (B, member, leader)
    share = group * strength[:, :, None]
    total = share.sum(axis=1)  # (B, leader)
    U_new, V_new = U @ share, np.swapaxes(share, 1, 2) @ V
    scale_u, scale_v = np.linalg.norm(U_new, axis=1), np.linalg.norm(V_new, axis=2)
    root = np.sqrt(total)
    W_new = U_new * (root / np.where(scale_u > 0, scale_u, 1.0))[:, None, :]
    H_new = V_new * (root / np.where(scale_v > 0, scale_v, 1.0))[:, :, None]
    return H_new, W_new


def seed_atoms(problem: Problem, frame: Balanced, x: Floats, value: Floats, dual: Dual) -> tuple[Floats, NDArray[np.bool_]]:
    """Put violating atoms sqrt(t) (u, v), u = Qt v/||Qt v||, into free coordinates at the best t of TRIALS; which runs fell."""
    parts = frame.unpack(x)
    H, W = parts[0].copy(), parts[1].copy()
    spread = frame.unpack(np.zeros_like(x))
    dH, dW = spread[0].copy(), spread[1].copy()
    for i, atoms in enumerate(dual.atoms):
        images = atoms @ dual.Qt[i].T  # Qt v, (a, K)
        size = np.linalg.norm(images, axis=1)
        order = np.argsort(-size)[: int(np.sum(size > 1 + VIOLATION))]
        free = np.flatnonzero(~H[i].any(axis=1) | ~W[i].any(axis=0))
        for atom, coordinate in zip(order, free, strict=False):
            reach = np.sqrt(np.sqrt(problem.counts[i] @ atoms[atom] ** 2))
            H[i, coordinate] = W[i, :, coordinate] = 0.0
            dH[i, coordinate] = reach * _to_columns(problem, i, atoms[atom])
            dW[i, :, coordinate] = reach * images[atom] / size[atom]
    best, x_best = value.copy(), x.copy()
    for t in TRIALS:
        trial = frame.pack([H + np.sqrt(t) * dH, W + np.sqrt(t) * dW, *parts[2:]])
        F = frame.value_and_gradient(trial)[0]
        better = best > F
        best, x_best = np.where(better, F, best), np.where(better[:, None], trial, x_best)
    return x_best, best < value


def _to_columns(problem: Problem, run: int, v: Floats) -> Floats:
    """An atom over classes as one over columns, in balanced coordinates."""
    labels = problem.labels[run]
    return np.asarray((v / np.sqrt(problem.counts[run]))[labels] * np.sqrt(problem.multiplicity[run]))


def _second_start(rows: Problem, frame: Balanced, x: Floats, todo: NDArray[np.int64], options: LBFGS) -> Outcome:
    """The given runs of a deep chain solved again from aligned factors of -slope(0) D^{1/2}, all its singular values alive."""
    problem, part = rows.pick(todo), frame.pick(todo)
    zero = part.unpack(np.zeros_like(x[todo]))
    slope = objective(problem).slope(zero)
    U, s, Vt = np.linalg.svd(-slope * np.sqrt(problem.multiplicity)[:, None, :], full_matrices=False)
    r = min(s.shape[1], problem.width)
    root = s[:, :r] ** (1.0 / (problem.depth + 1))
    first = [np.zeros(p.shape) for p in zero]
    first[0][:, :r] = root[:, :, None] * Vt[:, :r]
    for layer in range(1, problem.depth):
        first[layer][:, range(r), range(r)] = root
    first[problem.depth][:, :, :r] = U[:, :, :r] * root[:, None, :]
    found = minimise(part, part.pack(first), options)
    return Outcome(simplified(problem, part, to_numpy(found.x)), found.stop, found.steps, np.full(len(todo), 2))
