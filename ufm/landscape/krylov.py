"""The lowest eigenvalues of a large Hessian: block Lanczos, repeated in the complement of what was found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from ufm.landscape.point import Floats, Part, Point, applied, longest

LONGEST = 1500  # Lanczos vectors of one run
ROUNDS = 12  # Lanczos runs for directions that the runs before have missed


def lanczos(point: Point, b: int, lowest: int, zero: float, rng: np.random.Generator, flat: Floats, image: Floats) -> Part:
    """The lowest eigenvalues of run b: block Lanczos, then again in the complement of what was found, while that finds negative ones.

    A block of `lowest` starts sees as many copies of an eigenvalue; new starts in the complement see the copies it missed. The columns
    of `flat`, tangents of symmetries, are taken out beforehand where they are in the null space; `image` is the Hessian of them.
    """
    n = int(point.free[b].sum())
    runs: list[_Krylov] = []
    known = flat
    for _ in range(ROUNDS):
        start = _fresh(rng.standard_normal((n, min(lowest, n))), known)
        if not start.shape[1]:
            beyond = np.inf
            break
        runs.append(_krylov(partial(applied, point, b), start, known, zero / 10))
        known = np.concatenate([known, runs[-1].vectors], axis=1)
        beyond = runs[-1].values[0] if runs[-1].converged else -np.inf
        if not runs[-1].converged or (len(runs) > 1 and beyond >= -zero * runs[0].scale - point.drift[b]):
            break
    scale = max((run.scale for run in runs), default=0.0)
    if longest(image) > zero * scale + point.drift[b]:
        return lanczos(point, b, lowest, zero, rng, flat[:, :0], image[:, :0])
    found = np.sort(np.concatenate([np.sum(flat * image, axis=0), *(run.values for run in runs)]))
    coupled = float(np.linalg.norm(image)) / scale if scale > 0 else 0.0
    residual = max([coupled, *(run.residual for run in runs)])
    return Part(found, scale, max((run.asymmetry for run in runs), default=0.0), residual, float(beyond))


class _Krylov(NamedTuple):
    """Ritz values and vectors of one run: the lowest as many as there were starts; scale is the largest of all, residual relative to it."""

    values: Floats
    vectors: Floats
    scale: float
    asymmetry: float
    residual: float
    converged: bool


def _krylov(product: Callable[[Floats], Floats], start: Floats, known: Floats, accuracy: float) -> _Krylov:
    """Block Lanczos with full reorthogonalisation in the complement of `known`, until the lowest Ritz pairs are accurate."""
    Q, AQ, T, new = np.zeros((len(start), 0)), np.zeros((len(start), 0)), np.zeros((0, 0)), start
    looked = start.shape[1]
    while True:
        image = product(new)
        image -= known @ (known.swapaxes(0, 1) @ image)
        across, within = Q.swapaxes(0, 1) @ image, new.swapaxes(0, 1) @ image
        T = np.block([[T, across], [new.swapaxes(0, 1) @ AQ, within]])
        Q, AQ = np.concatenate([Q, new], axis=1), np.concatenate([AQ, image], axis=1)
        new = _fresh(image, np.concatenate([known, Q], axis=1))
        ends = new.shape[1] == 0 or Q.shape[1] >= LONGEST
        if not ends and Q.shape[1] < 1.2 * looked:
            continue
        looked = Q.shape[1]
        values, turn = np.linalg.eigh(0.5 * (T + T.swapaxes(0, 1)))
        scale = float(np.abs(values).max())
        lowest, turn = values[: start.shape[1]], turn[:, : start.shape[1]]
        U = Q @ turn
        error = longest(AQ @ turn - U * lowest)
        if ends or error <= accuracy * scale:
            relative = 1.0 / scale if scale > 0 else 0.0
            asymmetry = float(np.abs(T - T.swapaxes(0, 1)).max())
            return _Krylov(lowest, U, scale, asymmetry * relative, error * relative, error <= 10 * accuracy * scale)


def _fresh(V: Floats, known: Floats) -> Floats:
    """An orthonormal basis of what the columns of V add to those of `known` (orthonormal), to rounding; it may be empty."""
    size = np.linalg.norm(V)
    for _ in range(2):
        V = V - known @ (known.swapaxes(0, 1) @ V)
    U, s, _ = np.linalg.svd(V, full_matrices=False)
    U = U[:, s > 1e-13 * size]
    U = U - known @ (known.swapaxes(0, 1) @ U)
    return np.asarray(np.linalg.qr(U)[0])
