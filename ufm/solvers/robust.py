"""The robust loop: solve, merge parallel coordinates, certify, seed a violating atom, repeat; it stops on the proven gap.

Plain descent often ends where a class is wrongly dead (the ReLU model of Dang et al. 2024). The dual bound names the missing atom u v^T,
merging frees a coordinate for it, and the objective falls at the rate (rho - 1) sqrt(lam_w lam_h). Merging and seeding need L = 1; deeper
chains whose bound is not met are solved once more from an aligned start.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import place, to_numpy
from ufm.certificate import Dual, dual_bound, relative_gap
from ufm.coordinates import Coordinates, balanced
from ufm.losses import ConvexLoss
from ufm.objective import objective
from ufm.problem import Problem
from ufm.records import Stop
from ufm.solvers.convex import has_convex_form, proximal
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.solvers.outcome import Outcome

Floats = NDArray[np.float64]

PARALLEL = 1e-6  # coordinates with both cosines above 1 minus this are one
FAINT = 1e-7  # coordinates shorter than this share of the longest are none
VIOLATION = 1e-9  # an atom must exceed the limit by this share to be worth seeding
PATIENCE = 1500  # gradient evaluations of one local solve, where proximal steps are the alternative
MAX_ROUNDS, FUTILE = 40, 6  # rounds in all, and in a row without a lower value
TRIALS = np.logspace(-5, 1.5, 27)  # atom strengths tried, in units of sqrt(sum_k n_k v_k^2)


def robust(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    """Solve every run of `rows` (one cell per run) from x (B, n) to the proven relative gap `tol`, on `device`.

    Columns that are samples are averaged over their class first where that is exact (convex losses, L = 1 and deep linear chains: within-
    class collapse holds at every stationary point), and relu(V) features are solved as H >= 0, which has the same infimum.
    """
    if rows.columns == "samples" and isinstance(rows.loss, ConvexLoss) and (rows.depth == 1 or rows.activation == "linear"):
        return _on_means(rows, x, tol, max_steps, device)
    return _shallow(rows, x, tol, max_steps, device) if rows.depth == 1 else _deep(rows, x, tol, max_steps, device)


def _on_means(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    means = replace(rows, columns="means", features="free" if rows.features == "free" else "relu")
    frame, reduced = balanced(rows), balanced(means)
    H, *rest = frame.to_factors(x)
    member = np.eye(rows.classes)[rows.labels]  # (B, cols, K)
    H = np.abs(H) if means.features == "relu" else H
    found = robust(means, reduced.from_factors([H @ (member / rows.counts[:, None, :]), *rest]), tol, max_steps, device)
    H, *rest = reduced.to_factors(found.x)
    return found._replace(x=frame.from_factors([H @ np.swapaxes(member, 1, 2), *rest]))


def _shallow(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    """The loop itself, for L = 1; the lowest end point is kept. A run leaves once proven, out of steps, or after FUTILE idle rounds."""
    frame, placed = balanced(rows), balanced(rows, device=device)
    helped = has_convex_form(rows) & (rows.features == "free" or rows.lam_b is None)  # (B,): proximal steps are worth trying
    B, here, x, todo = len(x), x, x.copy(), np.arange(len(x))
    stop, best, idle = np.full(B, Stop.ROUNDS, dtype=object), np.full(B, np.inf), np.zeros(B, dtype=np.int64)
    steps, rounds = np.zeros(B, dtype=np.int64), np.zeros(B, dtype=np.int64)
    for number in range(MAX_ROUNDS):
        problem, part = rows.pick(todo), frame.pick(todo)
        budget = max_steps - steps[todo]
        options = LBFGS(tol=_accuracy(tol, number), max_steps=np.where(helped[todo], np.minimum(budget, PATIENCE), budget))
        found = minimise(placed.pick(place(todo, device)), place(here, device), options)
        steps[todo] += found.steps
        point = simplified(problem, part, to_numpy(found.x))
        value, gap, dual = _proof(problem, part, point)
        slow = helped[todo] & ~(gap <= tol) & np.array([s in (Stop.STALLED, Stop.STEPS) for s in found.stop])
        if slow.any():
            point, extra = _proximal(problem, part, point, slow, tol, max_steps - steps[todo])
            steps[todo] += extra
            value, gap, dual = _proof(problem, part, point)
        proven, lower = gap <= tol, (gap <= tol) | (value <= best[todo])
        rounds[todo] = number + 1
        idle[todo] = np.where(value < best[todo] * (1 - 1e-12), 0, idle[todo] + 1)
        best[todo] = np.minimum(best[todo], value)
        x[todo] = np.where(lower[:, None], point, x[todo])
        kept = [new if low else old for new, old, low in zip(found.stop, stop[todo], lower, strict=True)]
        stop[todo] = [Stop.GAP if p else k for p, k in zip(proven, kept, strict=True)]
        going = ~(proven | np.isnan(dual.rho) | (steps[todo] >= max_steps) | (idle[todo] > FUTILE))
        if not going.any():
            break
        here = seed_atoms(problem, part, point, dual)[going]
        todo = todo[going]
    return Outcome(x, tuple(stop), steps, rounds)


def _accuracy(tol: float, number: int) -> float:
    """Scale-free gradient norm asked of L-BFGS in a round: the gap is of its order; later rounds ask for more."""
    return max(min(0.1 * tol, 1e-9) * 0.1 ** min(number // 2, 3), 1e-14)


def _proof(problem: Problem, frame: Coordinates, x: Floats) -> tuple[Floats, Floats, Dual]:
    """F/unit of each point, the relative gap it proves (NaN if none), and the dual side that comes from."""
    value, dual = frame.value(x), dual_bound(problem, frame.to_factors(x))
    return value, relative_gap(value * frame.unit, dual.lower), dual


def _proximal(
    problem: Problem, frame: Coordinates, x: Floats, slow: NDArray[np.bool_], tol: float, budget: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.int64]]:
    """Proximal steps on the logits for the runs that L-BFGS leaves crawling (singular values of the logits far apart); kept where lower.

    The group lasso is an upper bound of the ReLU problem, so a lower value there is one here; with a bias it rarely is the optimum.
    """
    x, extra = x.copy(), np.zeros(len(x), dtype=np.int64)
    for i in np.flatnonzero(slow & (budget > 0)):
        found = proximal(problem.cell(int(i)), x[i : i + 1], tol, int(min(PATIENCE, budget[i])))
        values = frame.pick(np.array([i, i])).value(np.concatenate([x[i : i + 1], found.x]))
        extra[i] = found.steps
        x[i] = found.x[0] if values[1] <= values[0] * (1 + 1e-15) else x[i]
    return x, extra


def _deep(rows: Problem, x: Floats, tol: float, max_steps: int, device: str) -> Outcome:
    """One local solve, and one more from aligned factors for the runs whose bound is known but not met; the lower end point is kept."""
    frame, placed = balanced(rows), balanced(rows, device=device)
    first = _polished(rows, frame, placed, x, tol, max_steps, device)
    x, steps, rounds, stop = first.x, first.steps.copy(), first.rounds, np.array(first.stop, dtype=object)
    _, gap, _ = _proof(rows, frame, x)
    again = np.flatnonzero((gap > tol) & (steps < max_steps))
    if len(again):
        problem, part = rows.pick(again), frame.pick(again)
        start, budget = aligned_with_slope(problem, part), max_steps - steps[again]
        second = _polished(problem, part, placed.pick(place(again, device)), start, tol, budget, device)
        better = part.value(second.x) < part.value(x[again])
        x[again] = np.where(better[:, None], second.x, x[again])
        stop[again] = [new if b else old for new, old, b in zip(second.stop, stop[again], better, strict=True)]
        steps[again], rounds[again] = steps[again] + second.steps, 2
        _, gap, _ = _proof(rows, frame, x)
    return Outcome(x, tuple(Stop.GAP if g <= tol else s for g, s in zip(gap, stop, strict=True)), steps, rounds)


def _polished(
    rows: Problem, frame: Coordinates, placed: Coordinates, x: Floats, tol: float, max_steps: int | NDArray[np.int64], device: str
) -> Outcome:
    """A local solve of a deep chain; where the chain is linear and pruning lowers the end point, a second one from there."""
    options = LBFGS(tol=_accuracy(tol, 2), max_steps=max_steps)
    found = minimise(placed, place(x, device), options)
    x, steps, stop = simplified(rows, frame, to_numpy(found.x)), found.steps, np.array(found.stop, dtype=object)
    pruned = prune(rows, frame, x)
    lower = np.flatnonzero((frame.value(pruned) < frame.value(x) * (1 - 1e-14)) & (steps < max_steps))
    if len(lower):
        left = (np.broadcast_to(max_steps, len(x)) - steps)[lower]
        second = minimise(placed.pick(place(lower, device)), place(pruned[lower], device), replace(options, max_steps=left))
        x, steps = x.copy(), steps.copy()
        x[lower] = simplified(rows.pick(lower), frame.pick(lower), to_numpy(second.x))
        steps[lower] += second.steps
        stop[lower] = second.stop
    return Outcome(x, tuple(stop), steps, np.ones(len(x), dtype=np.int64))


def prune(rows: Problem, frame: Coordinates, x: Floats) -> Floats:
    """Linear chains with free features: each singular direction of the product dropped where that lowers F, weakest first.

    Near a first-order transition descent keeps directions alive (L >= 2) that the optimum has dead; dropping one is no small step.
    """
    if rows.features != "free" or rows.activation != "linear":
        return x
    parts = frame.unpack(x)
    product = parts[0]
    for W in parts[1 : rows.depth + 1]:
        product = W @ product
    U, s, Vt = np.linalg.svd(product, full_matrices=False)
    bias = parts[rows.depth + 1 :]
    best: Floats = frame.aligned(U, s, Vt, bias)
    F = frame.value(best)
    for i in reversed(range(s.shape[1])):
        without = s.copy()
        without[:, i] = 0.0
        trial = frame.aligned(U, without, Vt, bias)
        F_trial = frame.value(trial)
        lower = F_trial < F
        best, s, F = np.where(lower[:, None], trial, best), np.where(lower[:, None], without, s), np.where(lower, F_trial, F)
    return best


def aligned_with_slope(problem: Problem, frame: Coordinates) -> Floats:
    """Balanced factors whose product is -slope(0) D^{1/2}: all its singular values alive."""
    zero = frame.unpack(np.zeros((problem.cells, len(frame.lower))))
    U, s, Vt = np.linalg.svd(-objective(problem).slope(zero) * np.sqrt(problem.multiplicity)[:, None, :], full_matrices=False)
    x: Floats = frame.aligned(U, s, Vt, zero[problem.depth + 1 :])
    return x


def simplified(problem: Problem, frame: Coordinates, x: Floats) -> Floats:
    """The same products in as few coordinates as can be: parallel ones merged, faint ones zeroed; F does not rise.

    Without ReLU the SVD of each run's W H does both. Points of deeper chains are returned as they are, or at zero where that is lower.
    """
    parts = frame.unpack(x)
    if problem.depth == 1:
        if problem.features == "free":
            U, s, Vt = np.linalg.svd(parts[1] @ parts[0], full_matrices=False)
            x_new = frame.aligned(U, np.where(s > FAINT**2 * s[:, :1], s, 0.0), Vt, parts[2:])
        else:
            x_new = frame.pack([*_by_direction(parts[0], parts[1]), *parts[2:]])
    else:
        x_new = x
    matrices, bias = parts[: problem.depth + 1], parts[problem.depth + 1 :]
    zero = frame.pack([*(np.zeros_like(p) for p in matrices), *bias])
    values = np.stack([frame.value(y) for y in (x_new, x, zero)])
    near_zero = sum(np.sum(p**2, axis=(1, 2)) for p in matrices) <= 1e-12 * values[1]
    lower = (values[2] <= values[1] * (1 + 1e-14)) & near_zero
    keep = values[0] <= values[1] * (1 + 1e-12)
    return np.where(lower[:, None], zero, np.where(keep[:, None], x_new, x))


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


def seed_atoms(problem: Problem, frame: Coordinates, x: Floats, dual: Dual) -> Floats:
    """Put violating atoms sqrt(t) (u, v), u = Qt v/||Qt v||, into free coordinates, at the best t of TRIALS.

    Where every coordinate is in use the faintest eighth of them make room, which may raise F: a restart with a purpose.
    """
    parts = frame.unpack(x)
    H, W = parts[0].copy(), parts[1].copy()
    dH, dW = np.zeros_like(H), np.zeros_like(W)
    seeded = np.zeros(len(x), dtype=bool)
    for i, atoms in enumerate(dual.atoms):
        images = atoms @ dual.Qt[i].T  # Qt v, (a, K)
        size = np.linalg.norm(images, axis=1)
        order = np.argsort(-size)[: int(np.sum(size > 1 + VIOLATION))]
        seeded[i] = len(order) > 0
        for atom, coordinate in zip(order, _room(H[i], W[i]), strict=False):
            reach = np.sqrt(np.sqrt(problem.counts[i] @ atoms[atom] ** 2))
            H[i, coordinate] = W[i, :, coordinate] = 0.0
            dH[i, coordinate] = reach * atoms[atom]
            dW[i, :, coordinate] = reach * images[atom] / size[atom]
    best, x_best = np.full(len(x), np.inf), x.copy()
    for t in TRIALS:
        trial = frame.pack([H + np.sqrt(t) * dH, W + np.sqrt(t) * dW, *parts[2:]])
        F = frame.value(trial)
        better = seeded & (best > F)
        best, x_best = np.where(better, F, best), np.where(better[:, None], trial, x_best)
    return x_best


def _room(H: Floats, W: Floats) -> NDArray[np.int64]:
    """The unused coordinates of one run, or the faintest eighth where all are used."""
    strength = np.linalg.norm(H, axis=1) * np.linalg.norm(W, axis=0)
    unused = np.flatnonzero(strength == 0)
    return unused if len(unused) else np.argsort(strength)[: max(1, len(strength) // 8)]
