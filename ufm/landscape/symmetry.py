"""The orbit of a point under the known symmetries of F, and its tangents, in which every Hessian is zero at a critical point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.landscape.point import BAND, Floats, Point, longest

LARGEST = 1e7  # entries of the tangents of rotations between two factors
TANGENT = 1e-6  # singular values of the orbit's tangent map below this share of the largest are zero


def orbit_of(point: Point, b: int) -> tuple[float, Floats]:
    """(dimension, orthonormal tangents (n, dimension)) of run b's orbit under the known symmetries of F, on the free coordinates.

    They are: rotations of the units between two factors with no activation in between (with H >= 0 or H = relu(V), of units with the
    same support), a shift of all logits by a free bias, and the negative entries of V, which F does not see. NaN, and no tangents,
    where their rank is not clear or they are too many.
    """
    T = _tangents(point, b)
    nothing = np.nan, np.zeros((int(point.free[b].sum()), 0))
    if T is None:
        return nothing
    squares, V = np.linalg.eigh(T @ T.swapaxes(0, 1))
    s = np.sqrt(np.maximum(squares, 0.0))
    s = s / max(s.max(initial=0.0), 1e-300)
    if np.any((s > TANGENT) & (s < BAND * TANGENT)):
        return nothing
    basis = np.linalg.qr(T.swapaxes(0, 1) @ V[:, s > TANGENT])[0]
    return float(basis.shape[1]), np.asarray(basis, dtype=np.float64)


def _tangents(point: Point, b: int) -> Floats | None:
    """Tangents of the symmetries at run b, which span those of the orbit, (p, n) on the free coordinates; None if too many."""
    chain, n = point.frame.objective.chain, point.x.shape[1]
    factors = [f[0] for f in point.frame.pick(np.array([b])).unpack(point.x[b : b + 1])]
    unseen = factors[0] <= 0 if chain.features_rectified else np.zeros(factors[0].shape, dtype=bool)
    supports = factors[0] > 0 if point.rows.features != "free" else np.ones(factors[0].shape, dtype=bool)
    units = [(1, np.flatnonzero(np.all(supports == one, axis=1))) for one in np.unique(supports, axis=0)]
    units += [(layer, np.arange(point.rows.width)) for layer in range(2, chain.depth + 1) if not chain.hidden_rectified]
    rotations = []
    for layer, group in units:
        pairs, R = _planes(factors, layer, group)
        if len(pairs[0]) * n > LARGEST:
            return None
        rotations.append(_rotations(factors, layer, R, pairs))
    T = np.concatenate(rotations)
    others = np.eye(n)[np.flatnonzero(unseen)] if unseen.any() else np.zeros((0, n))
    if point.rows.lam_b is not None and point.rows.lam_b[b] == 0 and point.rows.loss.name in ("CE", "focal"):
        temperature = point.frame.objective.targets.temperature
        shift = np.ones(point.rows.classes) if temperature is None else temperature[b, :, 0]
        others = np.concatenate([others, np.append(np.zeros(n - len(shift)), shift / np.linalg.norm(shift))[None]])
    largest = longest(T.swapaxes(0, 1)) or 1.0
    return np.concatenate([T, largest * others])[:, point.free[b]]


def _planes(factors: Sequence[Floats], layer: int, group: NDArray[np.int64]) -> tuple[tuple[Any, Any], Floats]:
    """(index pairs i < j, axes R (d, units)): the planes of the units of `group` whose rotation moves F_{l-1} or F_l."""
    around = np.concatenate([factors[layer - 1][group], factors[layer].swapaxes(0, 1)[group]], axis=1)
    U, s, _ = np.linalg.svd(around)
    R = np.zeros((len(factors[layer - 1]), len(group)))
    R[group] = U
    live = np.zeros(len(group), dtype=bool)
    live[: len(s)] = s > 1e-3 * TANGENT * s.max(initial=0.0)
    i, j = np.triu_indices(len(group), 1)
    return (i[live[i]], j[live[i]]), R  # s falls, so i is live wherever j is


def _rotations(factors: Sequence[Floats], layer: int, R: Floats, pairs: tuple[Any, Any]) -> Floats:
    """Tangents (A F_{l-1}, -F_l A), A = R_i R_j' - R_j R_i' for each pair, flattened over all factors, (pairs, n)."""
    i, j = pairs
    axes, before, after = R.swapaxes(0, 1), R.swapaxes(0, 1) @ factors[layer - 1], (factors[layer] @ R).swapaxes(0, 1)
    moves = [np.zeros((len(i), *f.shape)) for f in factors]
    moves[layer - 1] = axes[i, :, None] * before[j, None, :] - axes[j, :, None] * before[i, None, :]
    moves[layer] = after[j, :, None] * axes[i, None, :] - after[i, :, None] * axes[j, None, :]
    return np.concatenate([m.reshape(len(i), f.size) for m, f in zip(moves, factors, strict=True)], axis=1)
