"""Which known structure the end point of a run is: zero, deep neural collapse, block simplices, a code, a graph solution, or another.

In this order: stationary, or polished until it is; zero; rank; the catalogue of `structures`, by the class logits up to the order of the
classes and by the closed-form value; the inertia of the Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, block_size, norm
from ufm.certificate import per_run
from ufm.coordinates import Coordinates, balanced
from ufm.landscape.point import STATIONARY, Floats, Mask
from ufm.landscape.spectrum import hessian
from ufm.landscape.structures import Structure, blocks, invariants, is_plain, partitions, structures
from ufm.metrics import singular_values
from ufm.objective import objective
from ufm.problem import Problem
from ufm.records import EndPoint
from ufm.solvers.lbfgs import LBFGS, minimise
from ufm.theory import deep

Texts = NDArray[Any]  # of objects, so that texts of any length can be written

LOST = 1e8  # a run whose value is above this, or none, has diverged
NOTHING = 1e-2  # logits without a singular value above this are zero, where nothing is left to gain
RANK = 1e-3  # singular values above this share of the largest count
POLISH = LBFGS(tol=1e-10, max_steps=2000)
MOVED = 1e-3  # a polish that changes the value by more than this share, or the rank, is refused
CLOSE = 1e-3  # invariants of a structure agree to this, of logits whose largest is 1
LEVEL = 1e-6  # relative agreement of value and level
COSINE = 1e-4  # largest 1 - cos to the shape of collapse, where it has no closed form


def classify(problem: Problem, factors: Sequence[Array], *, polish: bool = True, inertia: bool = True) -> EndPoint:
    """What each run's point is; factors (H, W_1, ..., W_L[, b]) with B = G * runs first axes, cell-major, on any device.

    polish: points with a scale-free gradient norm above 1e-6 go through L-BFGS first; one whose value changes by more than 1e-3 of it, or
    whose rank changes, was on its way elsewhere and stays "unconverged". Class logits are without the bias; cross-entropy's have centred
    columns. inertia: count the Hessian's eigenvalues (see `hessian`; for linear chains exact at any width up to rank 36 or so, at saddles
    of a higher one NaN; slow for wide ReLU chains).
    ValueError or TypeError on bad input.
    """
    rows, points = per_run("classify", problem, factors)
    with np.errstate(over="ignore", invalid="ignore"):
        given = objective(rows).value(points)
    lost, frame = ~(given <= LOST), balanced(rows)
    x = np.where(lost[:, None], 0.0, frame.from_factors(points))
    x, effort = _polished(rows, frame, x) if polish else (x, np.full(len(x), "not polished", object))
    points = frame.to_factors(x)
    relative, negligible = frame.stationarity(x)
    gradient_norm = np.where(lost, np.nan, np.where(negligible, 0.0, relative))
    value = np.asarray(np.where(lost, given, objective(rows).value(points)), dtype=np.float64)
    M = class_logits(rows, points)
    s = np.where(lost[:, None], np.nan, singular_values(M))
    settled = gradient_norm <= STATIONARY
    nothing = settled & (s[:, 0] < NOTHING) & ((relative > STATIONARY) | (norm(x) == 0))
    rank = np.where(nothing, 0, np.sum(s > RANK * s[:, :1], axis=1))
    kind, name, reason = (np.full(len(x), text, object) for text in ("other", "", ""))
    for b in range(len(x)):
        name[b] = f"other, rank {rank[b]}" if settled[b] else "diverged" if lost[b] else "unconverged"
        reason[b] = f"no structure of the catalogue; scale-free gradient norm {gradient_norm[b]:.1e}, {effort[b]}"
    draft = _Draft(M, value, _lambda_eff(rows), kind, name, reason, np.full(len(x), np.nan))
    _name(draft, rows, points, nothing, settled, lost)
    for b in np.flatnonzero(~settled & (draft.kind != "other")).tolist():
        draft.reason[b] += f"; not stationary: scale-free gradient norm {gradient_norm[b]:.1e}"
    judged = [np.full(len(x), np.nan) for _ in range(3)]
    at = np.flatnonzero(settled)
    if inertia and len(at):
        spectrum = hessian(rows.pick(at), [np.where(nothing[at, None, None], 0.0, f[at]) for f in points])
        for column, counts in zip(judged, (spectrum.negative, spectrum.zero, spectrum.is_minimum), strict=True):
            column[at] = counts
        draft.reason[at] = [f"{mine}; {theirs}" for mine, theirs in zip(draft.reason[at], spectrum.reason, strict=True)]
    return EndPoint(
        kind=draft.kind.astype(np.str_),
        name=draft.name.astype(np.str_),
        rank=rank,
        rank_gap=_gap(s, rank),
        singular_values=s,
        value=value,
        level=draft.level,
        excess=(value - draft.level) / draft.level,
        gradient_norm=gradient_norm,
        polished=effort == "polished",
        negative=judged[0],
        zero=judged[1],
        is_minimum=judged[2],
        reason=draft.reason.astype(np.str_),
    )


def _polished(rows: Problem, frame: Coordinates, x: Floats) -> tuple[Floats, Texts]:
    """The points, those that are not stationary where L-BFGS takes them if that is near, and what was done with each."""
    relative, negligible = frame.stationarity(x)
    far = np.flatnonzero((relative > STATIONARY) & ~negligible)
    x, effort = x.copy(), np.full(len(x), "not polished", object)
    wide = block_size(8.0 * 18 * x.shape[1], "numpy")
    for first in range(0, len(far), wide):
        some = far[first : first + wide]
        part, problem = frame.pick(some), rows.pick(some)
        found = minimise(part, x[some], POLISH).x
        change = part.value(found) / part.value(x[some]) - 1
        ranks = [_rank(singular_values(class_logits(problem, part.to_factors(y)))) for y in (x[some], found)]
        near = (np.abs(change) <= MOVED) & (ranks[0] == ranks[1])
        x[some[near]] = found[near]
        effort[some] = [
            "polished" if stays else f"not polished: that changes the value by {100 * by:.2g} %, the rank from {old} to {new}"
            for stays, by, old, new in zip(near, change, *ranks, strict=True)
        ]
    return x, effort


def class_logits(rows: Problem, points: Sequence[Floats]) -> Floats:
    """W_L ... W_1 H averaged over each class, (B, K, K), no bias; columns centred for losses that do not see their mean."""
    Z = objective(replace(rows, lam_b=None)).logits(points[: rows.depth + 1])
    member = np.eye(rows.classes)[rows.labels]  # (B, columns, K)
    M = Z @ (member / member.sum(axis=1, keepdims=True))
    return np.asarray(M - M.mean(axis=1, keepdims=True) if rows.loss.name in ("CE", "focal") else M)


def _rank(s: Floats) -> NDArray[np.int64]:
    """Singular values above RANK times the largest, (B,); 0 where that is below NOTHING."""
    return np.where(s[:, 0] < NOTHING, 0, np.sum(s > RANK * s[:, :1], axis=1))


def _gap(s: Floats, rank: NDArray[np.int64]) -> Floats:
    """The last singular value counted over the first that is not, (B,); infinite where there are not both."""
    ends = np.concatenate([np.full((len(s), 1), np.inf), s, np.zeros((len(s), 1))], axis=1)
    last, after = (np.take_along_axis(ends, at[:, None], axis=1)[:, 0] for at in (rank, rank + 1))
    return np.where((rank == 0) | (after == 0), np.inf, last / np.where(after == 0, 1.0, after))


@dataclass(frozen=True, eq=False)
class _Draft:
    """Class logits, value and lambda_eff of each run, and what it is called, written as it is found; (B, ...) each."""

    M: Floats
    value: Floats
    lam: Floats
    kind: Texts
    name: Texts
    reason: Texts
    level: Floats

    def write(self, at: NDArray[np.int64], kind: str, name: str, level: Floats | float, reason: str) -> None:
        self.kind[at], self.name[at], self.level[at], self.reason[at] = kind, name, level, reason

    def try_out(self, structure: Structure, which: Mask) -> None:
        """Name the runs of `which` that have no name yet and are this structure, at lambda_eff of each."""
        at = np.flatnonzero(which & (self.kind == "other"))
        levels, each = np.unique(self.lam[at], return_inverse=True)
        for found in structure.at(levels) if len(at) else []:
            fits = _matches(self.M[at], found.M[each], self.value[at], found.value[each])
            name, level = structure.name + found.remark, found.value[each[fits]]
            self.write(at[fits], structure.kind, name, level, "logits and value of the closed form")


def _name(draft: _Draft, rows: Problem, points: Sequence[Floats], nothing: Mask, settled: Mask, lost: Mask) -> None:
    """Zero, then the catalogue, then block simplices as the logits show them; collapse by its shape alone where it has no closed form.

    Minima of ReLU chains lie at kinks, where no gradient vanishes: there the logits and the value of a structure are enough. The graph
    solution and odd shifted pairs are no minima as constructed: descent leaves them.
    """
    features, weights, bias = points[:1], points[1 : rows.depth + 1], points[rows.depth + 1 :]
    at = np.flatnonzero(nothing)
    zero = objective(rows).value([*(0 * f for f in (*features, *weights)), *bias])
    draft.write(at, "zero", "zero", zero[at], "no logits")
    catalogue, linear = structures(rows), rows.depth == 1 or rows.activation == "linear"
    known = np.isfinite(draft.lam) & (len(catalogue) > 0)
    ready = known & (settled if linear else ~lost)
    for structure in catalogue:
        draft.try_out(structure, ready)
    if linear and is_plain(rows):
        sizes = np.array(["+".join(map(str, some)) for some in partitions(draft.M)])
        for one in np.unique(sizes[ready & (draft.kind == "other")]):
            draft.try_out(blocks([int(k) for k in one.split("+")], rows.depth), ready & (sizes == one))
    shape = np.eye(rows.classes) - (0.0 if rows.loss.name == "MSE" and rows.lam_b is None else 1 / rows.classes)
    size = np.linalg.norm(draft.M, axis=(1, 2)) * np.linalg.norm(shape)
    cosine = np.sum(draft.M * shape, axis=(1, 2)) / np.where(size > 0, size, 1.0)
    at = np.flatnonzero(~known & settled & (draft.kind == "other") & (cosine > 1 - COSINE))
    draft.write(at, "dnc", "DNC", np.nan, "logits of collapse, which has no closed form for this problem")


def _lambda_eff(rows: Problem) -> Floats:
    """lambda_eff of each run, (B,); NaN where classes are not balanced or a penalty is 0."""
    fine = (rows.counts == rows.counts[:, :1]).all(axis=1) & (rows.lam_h > 0) & (rows.lam_w > 0).all(axis=1)
    lam = np.full(len(fine), np.nan)
    if fine.any():
        lam[fine] = deep.lambda_eff(rows.counts[fine, 0], rows.lam_h[fine], rows.lam_w[fine])
    return lam


def _matches(M: Floats, ideal: Floats, value: Floats, level: Floats) -> Mask:
    """Whether M (B, K, K) and value (B,) are those of the ideal, up to the order of the classes; never where the level is NaN."""
    fits = np.abs(value - level) <= LEVEL * np.abs(level)
    at = np.flatnonzero(fits)
    size = np.abs(ideal[at]).max(axis=(1, 2), keepdims=True)
    fits[at] = np.abs(invariants(M[at] / size) - invariants(ideal[at] / size)).max(axis=1) <= CLOSE
    return fits
