"""Global search for deep linear chains: every rank, structured and random starts, the distinct local minima polished.

Critical points of rank r are found at inner width r (see `fixed_rank`), so each rank is searched by the chain of that width: starts at
their best scale, a rough descent of all cells and starts together, then Newton's method from one end point of each kind. For L >= 2 the
best found is not proven best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm import frames
from ufm.arrays import block_size
from ufm.chain import forward
from ufm.coordinates import balanced
from ufm.losses import ConvexLoss
from ufm.problem import Problem
from ufm.records import Saved, Stop
from ufm.solvers.fixed_rank import Found, Reduced, polish
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.solvers.outcome import Outcome
from ufm.starts import seeds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TILT, NOISE = 0.3, 1e-2  # how far the two sides of a random Gram are from each other, and a structured start from its code
SCALES = np.geomspace(0.3, 40.0, 16)  # mean margins that a start is tried at
# passes of rough descent: scale-free gradient norm, most evaluations, and how far above the cell's lowest value an end point may then be,
# relatively, if only the lowest are asked for
ROUGH = ((1e-1, 30, 0.3), (3e-2, 50, 0.1), (1e-3, 250, 0.03))
LOST, NOTHING = 1e-3, 1e-6  # singular values below this share of the largest are no rank of a rough end point; logits that are zero
KIND, SAME = (3e-5, 2e-2), (1e-10, 1e-5)  # relative differences of value and fingerprint: rough end points of one kind; one minimum
STATIONARY = 1e-6  # largest scale-free gradient norm of a minimum


@dataclass(frozen=True, eq=False)
class Minima(Saved):
    """The distinct local minima found, cell by cell, lowest first; m in all.

    cell, rank (m,); value (m,) of F; singular (m, K): singular values of the class logits times n_k^{1/2}, zeros behind; logits
    (m, K, K): of class c in column c; reached (m,): starts that ended there; gradient_norm (m,), scale-free; lowest (m,): smallest
    eigenvalue of F/g among matrices of its rank (NaN at zero); is_minimum (m,): 1, 0, or NaN where an eigenvalue is zero. starts, kinds,
    steps (G,): starts made, kinds of end points that the rough descent told apart (of those it followed to the end), gradient
    evaluations.
    """

    cell: Ints
    value: Floats
    rank: Ints
    singular: Floats
    logits: Floats
    reached: Ints
    gradient_norm: Floats
    lowest: Floats
    is_minimum: Floats
    starts: Ints
    kinds: Ints
    steps: Ints

    def of(self, cell: int) -> Ints:
        """The rows of one cell, lowest first."""
        return np.flatnonzero(self.cell == cell)


class Ends(NamedTuple):
    """Weighted class logits X = U diag(s) Vt of a batch of starts or end points, and F/g there."""

    U: Floats
    s: Floats
    Vt: Floats
    value: Floats

    @property
    def X(self) -> Floats:
        """(B, K, K)."""
        return np.asarray((self.U * self.s[:, None, :]) @ self.Vt)

    @property
    def ranks(self) -> Ints:
        """Numerical ranks, (B,)."""
        return np.asarray(np.where(self.s[:, 0] > NOTHING, np.sum(self.s > LOST * self.s[:, :1], axis=1), 0))


def local_minima(problem: Problem, *, starts: int = 20, seed: int | Sequence[int] = 0, keep: int | None = None) -> Minima:
    """Search every cell of a deep linear problem with free features at every rank, from codes and `starts` random starts a rank.

    Random start i of rank r of cell g draws from the seed (seed, r, i), or (seed[g], r, i). keep: how many of the lowest kinds of end
    points are polished and returned per cell, zero besides, and starts that stay well above the lowest are given up early; all and none
    by default. ValueError where the reduction to class logits does not hold: a bias, an activation, features that are not free, a loss
    not known to be convex, a penalty that is 0.
    """
    _check(problem, starts, keep)
    means = replace(problem, columns="means")
    F = Reduced.of(means)
    X, cell = _starts(means, seeds("local_minima", seed, problem.cells), starts)
    ends = _scaled(F.pick(cell), X)
    steps, live = np.zeros(problem.cells, dtype=np.int64), np.arange(len(cell))
    for tol, most, window in ROUGH:
        part, used = _descended(means, F, Ends(*(a[live] for a in ends)), cell[live], tol, most)
        np.add.at(steps, cell[live], used)
        for whole, new in zip(ends, part, strict=True):
            whole[live] = new
        lowest = np.full(problem.cells, np.inf)
        np.minimum.at(lowest, cell, ends.value)
        live = live if keep is None else live[part.value <= (1 + window) * lowest[cell[live]]]
    found = []
    many = np.zeros(problem.cells, dtype=np.int64)
    for g in range(problem.cells):
        kinds, many[g] = _kinds(ends, live[cell[live] == g], keep)
        found.append(_polished(F.pick(np.array([g])), ends, kinds))
    return _record(means, F, found, np.bincount(cell), many, steps)


def multistart(problem: Problem, runs: int, seed: Sequence[int], tol: float) -> Outcome:
    """The `runs` lowest distinct local minima of each cell, from as many random starts a rank, cell-major, as balanced factors.

    Where a cell has fewer, its best is repeated. steps are the gradient evaluations of the whole cell. Newton's method goes to the floor
    of float64 in any case: tol only tells Stop.GRADIENT from Stop.STALLED.
    """
    found = local_minima(problem, starts=runs, seed=seed)
    chosen = []
    for g in range(problem.cells):
        own = found.of(g)
        own = own[found.is_minimum[own] != 0][:runs] if np.any(found.is_minimum[own] != 0) else own[:1]
        chosen += [*own, *[own[0]] * (runs - len(own))]
    rows = problem.pick(found.cell[chosen])
    share = np.sqrt(rows.multiplicity / np.take_along_axis(rows.counts, rows.labels, axis=1))
    X = found.logits[chosen] * np.sqrt(rows.counts)[:, None, :]
    U, s, Vt = np.linalg.svd(X)
    s = np.where(np.arange(rows.classes) < found.rank[chosen, None], s, 0.0)
    frame = balanced(rows)
    x = frame.aligned(U, s, np.take_along_axis(Vt, rows.labels[:, None, :], axis=2) * share[:, None, :], [])
    stop = tuple(Stop.GRADIENT if size <= tol else Stop.STALLED for size in frame.scale_free_norm(x))
    return Outcome(x, stop, found.steps[found.cell[chosen]], np.ones(len(x), dtype=np.int64))


def _check(problem: Problem, starts: int, keep: int | None) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"local_minima: problem is {problem!r}, but must be a ufm.Problem")
    needs = {
        "features='free'": problem.features == "free",
        "activation='linear'": problem.activation == "linear" or problem.depth == 1,
        "lam_b=None": problem.lam_b is None,
        "a convex loss": isinstance(problem.loss, ConvexLoss),
        "every penalty positive": bool(np.all(problem.lam_w > 0) and np.all(problem.lam_h > 0)),
    }
    missing = [need for need, given in needs.items() if not given]
    if missing:
        raise ValueError(
            f"local_minima: the problem is not reduced to its class logits without {missing[0]}; use method='robust' or 'lbfgs'"
        )
    for name, value in (("starts", starts), ("keep", 1 if keep is None else keep)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"local_minima: {name} is {value!r}, but must be a whole number, at least 1")


def codes(K: int, rank: int) -> list[Floats]:
    """Grams (K, K) of the structured starts of this rank: block simplices, pairs, polygon, polytopes."""
    number = K - rank  # of blocks
    even = [K // number + (i < K % number) for i in range(number)]
    sizes = [even, [2] * (number - 1) + [K - 2 * (number - 1)], [K - number + 1] + [1] * (number - 1)]
    found = [_blocks(list(s)) for s in dict.fromkeys(tuple(s) for s in sizes if min(s) > 0)]
    table = {
        2: [frames.polygon(K)] if K > 2 else [],
        3: ([frames.icosahedron()] if K == 12 else []) + ([frames.square_antiprism(0.6)] if K == 8 else []),
    }
    if rank == (K + 1) // 2:
        table[rank] = [*table.get(rank, []), frames.pairs(K)]
    if rank * (rank + 1) == 2 * K and rank > 2:
        table[rank] = [*table.get(rank, []), frames.rectified_simplex(rank + 1)]
    return found + [V @ V.T for V in table.get(rank, [])]


def _blocks(sizes: list[int]) -> Floats:
    """Direct sum of centring matrices of the given sizes; a class alone is zero."""
    K, ends = sum(sizes), np.cumsum(sizes)
    block = np.repeat(np.arange(len(sizes)), sizes)
    same = block[:, None] == block[None, :]
    return np.asarray(np.eye(K) - same / np.diff(ends, prepend=0)[block])


def _starts(means: Problem, own: Sequence[int], starts: int) -> tuple[Floats, Ints]:
    """(X (m, K, K), cell (m,)): codes and random Grams of every rank, columns weighted."""
    K, made = means.classes, {}
    most = min(means.width, K - 1 if means.loss.name == "CE" else K)
    for seed in dict.fromkeys(own):
        grams = []
        for rank in range(1, most + 1) if means.depth > 1 else [most]:
            for i, gram in enumerate(codes(K, rank) if rank < K else [np.eye(K)]):
                rng = np.random.default_rng([seed, rank, i, 1])
                left, right = (np.eye(K) + NOISE * rng.standard_normal((K, K)) for _ in range(2))
                grams.append(left @ gram @ right)
            grams += [_centred(_gram(np.random.default_rng([seed, rank, i]), K, rank, TILT)) for i in range(starts)]
        made[seed] = np.stack(grams)
    X = np.concatenate([made[seed] * np.sqrt(n)[None, None, :] for seed, n in zip(own, means.counts, strict=True)])
    return X, np.repeat(np.arange(means.cells), [len(made[seed]) for seed in own])


def _gram(rng: np.random.Generator, K: int, rank: int, tilt: float) -> Floats:
    """V V'^T for random unit rows V (K, rank) and V' near V."""
    V = rng.standard_normal((K, rank))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    return np.asarray(V @ (V + tilt * rng.standard_normal((K, rank))).T)


def _centred(X: Floats) -> Floats:
    return np.asarray(X - X.mean(axis=-2, keepdims=True))


def _scaled(F: Reduced, X: Floats) -> Ends:
    """Every start at the margin of SCALES that is its last local minimum of F, or near 3 without one."""
    U, s, Vt = np.linalg.svd(X)
    size = np.abs(np.diagonal(X * F.scale, axis1=1, axis2=2)).mean(axis=1)
    factors = SCALES[:, None] / np.where(size > 0, size, 1.0)  # (scales, m)
    values = np.stack([F.fit(X * a[:, None, None]) + F.penalty(s * a[:, None]) for a in factors])
    dips = np.zeros(values.shape, dtype=bool)
    dips[1:-1] = (values[1:-1] <= values[:-2]) & (values[1:-1] < values[2:])
    dips[np.argmin(np.abs(np.log(SCALES / 3))), ~dips.any(axis=0)] = True
    at = len(SCALES) - 1 - np.argmax(dips[::-1], axis=0)
    everyone = np.arange(len(X))
    return Ends(U, s * factors[at, everyone, None], Vt, values[at, everyone])


def _descended(means: Problem, F: Reduced, ends: Ends, cell: Ints, tol: float, most: int) -> tuple[Ends, Ints]:
    """L-BFGS on the chains of the width of each start's rank, in blocks; the ends, and gradient evaluations of each."""
    X, steps, ranks = np.zeros(ends.U.shape), np.zeros(len(cell), dtype=np.int64), ends.ranks
    options = LBFGS(memory=4, tol=tol, max_steps=most)
    for r in np.unique(ranks[ranks > 0]):
        narrow = replace(means, width=int(r))
        frame = balanced(narrow)
        group = np.flatnonzero(ranks == r)
        block = block_size(8 * 18 * len(frame.lower), "numpy")
        for first in range(0, len(group), block):
            at = group[first : first + block]
            part = frame.pick(cell[at])
            found = minimise(part, part.aligned(ends.U[at], ends.s[at], ends.Vt[at], []), options)
            X[at], steps[at] = forward(part.objective.chain, part.unpack(found.x))[0], found.steps
    U, s, Vt = np.linalg.svd(X)
    s = np.where(s > NOTHING, s, 0.0)
    return Ends(U, s, Vt, F.pick(cell).fit((U * s[:, None, :]) @ Vt) + F.penalty(s)), steps


def _kinds(ends: Ends, rows: Ints, keep: int | None) -> tuple[list[tuple[int, int]], int]:
    """([(one end point, how many are like it)], lowest kinds first, at most `keep`; how many kinds there are) among the rows of a cell."""
    order = rows[np.argsort(ends.value[rows], kind="stable")]
    prints = np.concatenate([ends.s[order], ends.ranks[order, None]], axis=1)
    first, members = grouped(ends.value[order], prints, *KIND)
    return [(int(order[i]), len(group)) for i, group in zip(first[:keep], members[:keep], strict=True)], len(first)


def grouped(value: Floats, prints: Floats, by_value: float, by_print: float) -> tuple[list[int], list[list[int]]]:
    """The first of each group and its members, of points sorted by value; alike in value and in fingerprint (m, n)."""
    first: list[int] = []
    members: list[list[int]] = []
    for i in range(len(value)):
        scale = by_print * max(np.abs(prints[i]).max(), 1e-300)
        near = takewhile(lambda k, i=i: value[i] - value[first[k]] <= by_value * abs(value[i]), reversed(range(len(first))))  # type: ignore[misc]
        group = next((k for k in near if np.abs(prints[i] - prints[first[k]]).max() <= scale), None)
        if group is None:
            first.append(i)
            members.append([i])
        else:
            members[group].append(i)
    return first, members


def _polished(F: Reduced, ends: Ends, kinds: list[tuple[int, int]]) -> list[tuple[Found, int]]:
    """Newton's method from one end point of each kind, and zero; equal minima together, with the starts that reached them."""
    K = ends.s.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        found = [(polish(F, (ends.U[i] * ends.s[i]) @ ends.Vt[i], int(ends.ranks[i])), n) for i, n in kinds]
    found = sorted([*found, (polish(F, np.zeros((K, K)), 0), 0)], key=lambda end: end[0].value)
    prints = np.stack([_fingerprint(F, end) for end, _ in found])
    first, members = grouped(np.array([end.value for end, _ in found]), prints, *SAME)
    return [(found[i][0], sum(found[j][1] for j in group)) for i, group in zip(first, members, strict=True)]


def _fingerprint(F: Reduced, end: Found) -> Floats:
    """Singular values and sorted margins, which no relabelling of equal classes changes."""
    X = (end.U * end.s) @ end.Vt
    own = np.diagonal(X)
    margins = own - np.where(np.eye(len(X)) > 0, -np.inf, X).max(axis=0)
    return np.concatenate([end.s, np.zeros(len(X) - len(end.s)), np.sort(margins * F.scale[0, 0])])


def _record(means: Problem, F: Reduced, found: list[list[tuple[Found, int]]], starts: Ints, kinds: Ints, steps: Ints) -> Minima:
    cell = np.repeat(np.arange(len(found)), [len(ends) for ends in found])
    ends, reached = zip(*(pair for ends in found for pair in ends), strict=True)
    K = means.classes
    s = np.stack([np.concatenate([end.s, np.zeros(K - len(end.s))]) for end in ends])
    U = np.stack([np.concatenate([end.U, np.zeros((K, K - len(end.s)))], axis=1) for end in ends])
    Vt = np.stack([np.concatenate([end.Vt, np.zeros((K - len(end.s), K))]) for end in ends])
    rank = np.array([len(end.s) for end in ends])
    X, own = (U * s[:, None, :]) @ Vt, F.pick(cell)
    frame = balanced(replace(means, width=max(1, int(rank.max()))).pick(cell))
    size = np.asarray(frame.scale_free_norm(frame.aligned(U, s, Vt, [])))
    flat, negative = (np.array([getattr(end, name) for end in ends]) > 0 for name in ("flat", "negative"))
    is_minimum = np.where((size > STATIONARY) | negative, 0.0, np.where(flat, np.nan, 1.0))
    if means.depth == 1:
        more = np.linalg.norm(own.slope(X), ord=2, axis=(1, 2)) > 1 + STATIONARY
        is_minimum = np.where(more & (rank < means.width), 0.0, is_minimum)
    return Minima(
        cell=cell,
        value=np.array([end.value for end in ends]) * F.unit[cell],
        rank=rank,
        singular=s,
        logits=X * own.scale,
        reached=np.array(reached),
        gradient_norm=size,
        lowest=np.array([end.lowest for end in ends]),
        is_minimum=is_minimum,
        starts=starts,
        kinds=kinds,
        steps=steps,
    )
