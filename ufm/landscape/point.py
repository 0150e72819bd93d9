"""A batch of points, the Hessian of F there as products, and its eigenvalues where the whole matrix is small enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import block_size, norm
from ufm.chain import forward
from ufm.coordinates import Coordinates, balanced, weighted
from ufm.problem import Problem

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

BAND = 100.0  # no eigenvalue may lie between the tolerance and this many times the tolerance
STATIONARY = 1e-6  # largest scale-free gradient norm at which a point is judged
KINK = 1e-7  # pre-activations below this share of their layer's largest are at the kink of the ReLU


class Point(NamedTuple):
    """A batch of points x (B, n) and what the judgement of their curvature needs."""

    rows: Problem
    frame: Coordinates
    x: Floats
    free: Mask  # coordinates not held at their bound, (B, n)
    weak: Mask  # held without a force, (B, n)
    gradient_norm: Floats
    drift: Floats  # how far from zero the gradient that is left may take the eigenvalues of symmetries
    kink: Mask  # (B,)


class Part(NamedTuple):
    """The eigenvalues found of one run, before they are counted; those up to `beyond`, the lowest not found, are the lowest of all.

    copies: how often each of them comes, once by default.
    """

    found: Floats
    scale: float
    asymmetry: float
    residual: float = np.nan
    beyond: float = np.inf
    copies: NDArray[np.int64] | None = None

    def number(self, which: Mask) -> float:
        """How many eigenvalues there are among those of `which`, copies and all."""
        return float(np.sum(which if self.copies is None else which * self.copies))

    def sums(self) -> tuple[float, float]:
        """(sum, root of the sum of squares) of all eigenvalues; NaN where not all are found."""
        if not np.isposinf(self.beyond):
            return np.nan, np.nan
        copies = 1 if self.copies is None else self.copies
        return float(np.sum(copies * self.found)), float(np.sqrt(np.sum(copies * self.found**2)))


def point_of(rows: Problem, points: Sequence[Floats]) -> Point:
    frame, scaled = weighted(rows), balanced(rows)
    x = frame.from_factors(points)
    _, slope, penalty = frame.parts(x)
    gradient = slope + penalty
    force, size = norm(frame.projected(x, gradient)), norm(x)
    relative, negligible = scaled.stationarity(scaled.from_factors(points))
    judged = (relative <= STATIONARY) & (size > 0)
    relative = np.where(negligible, 0.0, relative)
    free = ~((x <= frame.lower) & np.isfinite(frame.lower))
    least = np.maximum(1e-8 * np.maximum(norm(slope), norm(penalty)), BAND * force)
    weak = ~free & (gradient <= least[:, None])
    drift = np.where(judged, 100.0 * force / np.where(size > 0, size, 1.0), 0.0)
    return Point(rows, frame, x, free, weak, relative, drift, _nearest_kink(frame, x) <= KINK)


def _nearest_kink(frame: Coordinates, x: Floats) -> Floats:
    """The smallest |pre-activation| over the largest of its layer, (B,): infinite without a ReLU, 0 where a layer is zero."""
    chain, factors = frame.objective.chain, frame.unpack(x)
    _, layers = forward(chain, factors)
    through = [factors[0]] if chain.features_rectified else []
    if chain.hidden_rectified:
        through += [factors[layer] @ layers[layer - 1] for layer in range(1, chain.depth)]
    nearest = np.full(len(x), np.inf)
    for pre in through:
        size = np.abs(pre)
        largest = size.max(axis=(1, 2))
        nearest = np.minimum(nearest, size.min(axis=(1, 2)) / np.where(largest > 0, largest, 1.0))
    return nearest


def matrix(point: Point, b: int, mask: Mask) -> Floats:
    """The Hessian of run b on the coordinates of `mask`, built from products with unit vectors."""
    at, n = np.flatnonzero(mask), point.x.shape[1]
    moves = np.zeros((len(at), n))
    moves[np.arange(len(at)), at] = 1.0
    return products(point, b, moves)[:, at]


def products(point: Point, b: int, moves: Floats) -> Floats:
    """The Hessian of run b applied to each of `moves` (p, n), a block at a time."""
    out = np.empty_like(moves)
    wide = block_size(100.0 * moves.shape[1], "numpy")
    for first in range(0, len(moves), wide):
        some = moves[first : first + wide]
        frame = point.frame.pick(np.full(len(some), b))
        out[first : first + wide] = frame.hessian_product(np.repeat(point.x[b : b + 1], len(some), axis=0), some)
    return out


def whole(point: Point, b: int, mask: Mask) -> Part:
    """All eigenvalues of run b on the coordinates of `mask`."""
    A = matrix(point, b, mask)
    values: Floats = np.asarray(np.linalg.eigvalsh(0.5 * (A + A.T)), dtype=np.float64)
    scale = float(np.abs(values).max())
    return Part(values, scale, float(np.abs(A - A.T).max()) / scale if scale > 0 else 0.0)


def longest(V: Floats) -> float:
    """The largest norm of a column, 0 without any."""
    return float(norm(V.swapaxes(0, 1)).max(initial=0.0))


def applied(point: Point, b: int, V: Floats) -> Floats:
    """The Hessian of run b on the free coordinates, applied to the columns of V."""
    free = point.free[b]
    moves = np.zeros((V.shape[1], len(free)))
    moves[:, free] = V.swapaxes(0, 1)
    return products(point, b, moves)[:, free].swapaxes(0, 1)
