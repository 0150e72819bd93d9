"""The whole spectrum of a deep linear chain's Hessian at a point of rank r, any width, from a dense matrix at inner width r.

Stationary factors are balanced, so all have the rank r of the logits and F_l = P_l A_l P_{l-1}^T with d x r frames P_0 ... P_{L-1}.
For a move X_l, with G the loss's slope in the logits,

    d^2 F = g''[dZ] + 2 sum_{k > l} <G, F_L...F_{k+1} X_k F_{k-1}...F_{l+1} X_l F_{l-1}...F_0> + sum_l lam_l ||X_l||^2

sees moves outside the frames in two places only: in the product X_{l+1} X_l, as E D with E = (P_{l+1}^T) X_{l+1} P_l' and D = P_l'^T X_l
(P_{l-1}), P' the complement, and in the penalty. So the Hessian is block diagonal: the one at inner width r; for each of the d - r
complement dimensions of each inner space l a block [[lam_l, N^T], [N, lam_{l+1}]], N = (A_L...A_{l+2})^T G (A_{l-1}...A_0)^T; and lam_l,
(d - r)^2 times for each inner W_l. At L >= 2 stationarity makes the r nonzero singular values of N equal to sqrt(lam_l lam_{l+1}), so these
blocks have eigenvalues 0, lam_l + lam_{l+1}, lam_l or lam_{l+1}: negative ones are those of width r. At L = 1, N = G, and they need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.coordinates import Coordinates, weighted
from ufm.landscape.krylov import lanczos
from ufm.landscape.point import STATIONARY, Floats, Part, Point, applied, longest, point_of, whole
from ufm.landscape.symmetry import orbit_of
from ufm.problem import Problem

CORE = 4000  # coordinates at width r up to which all its eigenvalues are taken, not the lowest alone
LIVE = 1e-4  # singular values of a factor above this share of its largest count
MOVED = 1e-5  # largest share of a point outside the frames: its spectrum is that of the point of rank r next to it


class Reduced(NamedTuple):
    """A run's spectrum; how far its zero eigenvalues may be off; the dimension of the orbit, its longest product with a unit tangent."""

    part: Part
    drift: float
    orbit: float
    image: float


def reducible(rows: Problem) -> bool:
    """Whether every stationary point lies in such frames: a linear chain of free features, all penalties positive."""
    linear = rows.depth == 1 or rows.activation == "linear"
    return rows.features == "free" and linear and bool(np.all(rows.lam_h > 0) and np.all(rows.lam_w > 0))


def reduced(point: Point, b: int, lowest: int, zero: float, rng: np.random.Generator) -> Reduced | None:
    """The spectrum of run b; None where it is not stationary, its rank not clear, or too much of it outside the frames.

    At width r by Lanczos, with these options, where that is more than CORE coordinates.
    """
    if not point.gradient_norm[b] <= STATIONARY:
        return None
    rows = point.rows.pick([b])
    lam = np.append(rows.lam_h, rows.lam_w)
    factors = [f[0] for f in point.frame.pick(np.array([b])).unpack(point.x[b : b + 1])]
    rank, frames = _frames(factors[: rows.depth])
    core = _core(factors, frames)
    moved = _moved(factors, core, frames, lam)
    if _rank(core[rows.depth]) != rank or moved > MOVED:
        return None
    small = replace(rows, width=frames[0].shape[1])
    frame = weighted(small)
    at = point_of(small, frame.to_factors(frame.pack([A[None] for A in core])))
    orbit, flat = orbit_of(at, 0)
    image, size = applied(at, 0, flat), at.x.shape[1]
    own = whole(at, 0, at.free[0]) if size <= CORE else lanczos(at, 0, lowest, zero, rng, flat, image)
    values, copies = _complement(core, _slope(frame, core), lam, rows.width - small.width)
    found, copies = np.append(own.found, values), np.append(np.ones(len(own.found), dtype=np.int64), copies)
    order = np.argsort(found)
    scale = float(np.abs(found).max(initial=own.scale))
    part = Part(found[order], scale, own.asymmetry * own.scale / scale, moved, own.beyond, copies[order])
    apart = 0.0 if np.isnan(own.residual) else own.residual * own.scale
    return Reduced(part, float(at.drift[0]) + apart, orbit + rows.depth * rank * (rows.width - rank), longest(image))


def _rank(F: Floats) -> int:
    s = np.linalg.svd(F, compute_uv=False)
    return int(np.sum(s > LIVE * s[0]))


def _frames(factors: Sequence[Floats]) -> tuple[int, list[Floats]]:
    """The rank r of H, and orthonormal bases (d, max(r, 1)) of the range of H and of what each W_1 ... W_{L-1} makes of the one before."""
    rank = _rank(factors[0])
    frames = [np.eye(factors[0].shape[0], max(rank, 1))]
    for i, F in enumerate(factors):
        U = np.linalg.svd(F @ frames[-1] if i else F, full_matrices=False)[0]
        frames.append(U[:, : max(rank, 1)])
    return rank, frames[1:]


def _core(factors: Sequence[Floats], frames: Sequence[Floats]) -> list[Floats]:
    """P_0^T H, P_l^T W_l P_{l-1}, W_L P_{L-1}, and the bias as it is."""
    L = len(frames)
    inner = [frames[i].mT @ factors[i] @ frames[i - 1] for i in range(1, L)]
    return [frames[0].mT @ factors[0], *inner, factors[L] @ frames[-1], *factors[L + 1 :]]


def _moved(factors: Sequence[Floats], core: Sequence[Floats], frames: Sequence[Floats], lam: Floats) -> float:
    """The part of the point outside the frames, as a share of its norm, both weighted by the penalties."""
    left, right = [*frames, np.eye(len(core[len(frames)]))], [np.eye(core[0].shape[1]), *frames]
    out = [F - P @ A @ Q.mT for F, A, P, Q in zip(factors, core, left, right, strict=False)]
    size, rest = (sum(w * float(np.sum(F * F)) for w, F in zip(lam, some, strict=False)) for some in (factors, out))
    return float(np.sqrt(rest / size)) if size > 0 else 0.0


def _slope(frame: Coordinates, core: Sequence[Floats]) -> Floats:
    """G, the gradient of the loss part in the logits of weighted coordinates, (K, columns)."""
    F = frame.objective
    return np.asarray((F.slope([A[None] for A in core]) * F.column_weight * F.column_scale)[0])


def _complement(core: Sequence[Floats], G: Floats, lam: Floats, extra: int) -> tuple[Floats, NDArray[np.int64]]:
    """The eigenvalues outside the frames and how often each comes, for `extra` complement dimensions."""
    L = len(lam) - 1
    values, copies = [lam[1:L]], [np.full(L - 1, extra * extra)]
    for i in range(L):
        before = reduce(lambda Z, A: A @ Z, core[:i], np.eye(G.shape[1]))
        after = reduce(lambda Z, A: Z @ A, core[L : i + 1 : -1], np.eye(G.shape[0]))
        N = after.mT @ G @ before.mT
        middle, half = (lam[i] + lam[i + 1]) / 2, np.hypot((lam[i] - lam[i + 1]) / 2, np.linalg.svd(N, compute_uv=False))
        more = N.shape[0] - N.shape[1]
        values += [middle - half, middle + half, np.full(abs(more), lam[i + 1] if more > 0 else lam[i])]
        copies += [np.full(len(v), extra) for v in values[-3:]]
    there = np.concatenate(copies) > 0
    return np.concatenate(values)[there], np.concatenate(copies)[there]
