"""Polar factors: the U with orthonormal columns that maximises <U, A>, by three back ends, each factor verified before it is returned.

A = U S with S = V diag(s) V^T >= 0; A is (..., d, m), d >= m, numpy, torch or the like. Section by section: the SVD is the most accurate;
the Gram matrix costs a third of it or less and squares the condition number; Newton-Schulz is products only. Factors get a polishing step
U <- U (3I - U^T U)/2, LAPACK's SVD in double precision none; all are measured in double precision, and where one fails the SVD takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from ufm.arrays import Array, device_of, like, namespace, readable, to_numpy

Method = Literal["auto", "svd", "gram", "newton-schulz"]


class Factor(NamedTuple):
    """A = U V diag(s) V^T: U (..., d, m), V (..., m, m), s (..., m) unsorted; orthogonality (...), a bound on ||U^T U - I||_2."""

    U: Array
    V: Array
    s: Array
    orthogonality: Array


def polar(A: Array, method: Method = "auto") -> tuple[Factor, str | tuple[str, ...]]:
    """The polar factor of each matrix of A, and the back end that made it, a name a matrix (row-major) for a batch.

    "auto" takes the Gram matrix where the condition number is at most 30, at every size, else the SVD. A factor with ||U^T U - I||_2 above
    1e-14 m (1e-6 in single precision) or <U, A> below the sum of the s is made again by the SVD, for the matrices concerned only;
    ArithmeticError if that fails too.
    """
    xp, batch = namespace(A), tuple(A.shape[:-2])
    if batch:
        A = xp.reshape(A, (-1, *A.shape[-2:]))
    first, *others = ROUTES[method]
    factor, sound = _verified(A, first, method)
    names = np.full(A.shape[:-2], first, dtype=object)
    for name in others if readable(A) else ():
        bad = np.flatnonzero(~to_numpy(sound))
        if bad.size == names.size:
            factor, sound = _verified(A, name, name)
        elif bad.size:
            again, good = _verified(xp.take(A, xp.asarray(bad, device=device_of(A)), axis=0), name, name)
            order = np.arange(names.size)
            order[bad] = names.size + np.arange(bad.size)
            at = xp.asarray(order, device=device_of(A))
            factor = Factor(*(xp.take(xp.concat(pair, axis=0), at, axis=0) for pair in zip(factor, again, strict=True)))
            sound = xp.take(xp.concat([sound, good], axis=0), at, axis=0)
        names.flat[bad] = name
    if readable(A) and not bool(xp.all(sound)):
        raise ArithmeticError(f"polar: no back end's factor is orthogonal to {_limit(A):.0e}; scale the matrices to about 1, in float64")
    if not batch:
        return factor, str(names[()])
    return Factor(*(xp.reshape(x, (*batch, *x.shape[1:])) for x in factor)), tuple(names.tolist())


def factor_of(A: Array, U: Array) -> Factor:
    """The factorisation of A (..., d, m) that belongs to its polar factor U, from U^T A = V diag(s) V^T, with U's orthogonality."""
    xp = namespace(A, U)
    S = U.mT @ A
    s, V = xp.linalg.eigh(0.5 * (S + S.mT))
    return Factor(U, V, xp.where(s > 0, s, 0.0 * s), _spectral_bound(_defect(U)))


def inner(x: Array, y: Array) -> Array:
    """<x, y> over the last two axes, (...)."""
    xp = namespace(x, y)
    return xp.vecdot(xp.reshape(x, (*x.shape[:-2], -1)), xp.reshape(y, (*y.shape[:-2], -1)))


Parts = tuple[Array, Array, Callable[[], Array]]  # V, s, and U when it is asked for


def _svd(A: Array) -> Parts:
    P, s, Vt = namespace(A).linalg.svd(A, full_matrices=False)
    return Vt.mT, s, lambda: P @ Vt


def _gram(A: Array) -> Parts:
    """U = A (A^T A)^{-1/2}."""
    xp = namespace(A)
    square, V = xp.linalg.eigh(A.mT @ A)
    s = xp.sqrt(xp.where(square > 0, square, 0.0 * square))
    return V, s, lambda: A @ ((V / s[..., None, :]) @ V.mT)


def _newton_schulz(A: Array) -> Parts:
    """U <- U (3I - U^T U)/2 from A over a bound on its spectral norm, until U^T U = I to half the digits: the polish does the rest."""
    xp = namespace(A)
    U = A / xp.astype(_spectral_bound(A.mT @ A), A.dtype, copy=False)[..., None, None] ** 0.5
    for _ in range(MOST_STEPS):
        E = xp.astype(_defect(U), A.dtype, copy=False)
        U = U + U @ (0.5 * E)
        if not readable(A) or float(xp.max(xp.abs(E))) <= xp.finfo(A.dtype).eps ** 0.5:
            break
    found = factor_of(A, U)
    return found.V, found.s, lambda: U


BACKENDS = {"svd": _svd, "gram": _gram, "newton-schulz": _newton_schulz}
ROUTES = {"auto": ("gram", "svd"), "svd": ("svd",), "gram": ("gram", "svd"), "newton-schulz": ("newton-schulz", "svd")}
MOST_STEPS = 60  # of Newton-Schulz: each multiplies the small singular values by 1.5
FEW = 40  # columns up to which eigenvalues cost less than finding out that they need not be computed
CONDITION = 30.0  # of A up to which "auto" trusts the Gram matrix: there its error is 1e-14, or 3e-6 in single precision


def _verified(A: Array, name: str, method: str) -> tuple[Factor, Array]:
    """A back end's factor, polished, and whether it is orthogonal and attains <U, A> = sum of the s, (...)."""
    xp = namespace(A)
    if method == "auto" and name == "gram" and readable(A) and A.shape[-1] > FEW and bool(xp.all(_past(A))):
        nothing = xp.zeros(A.shape[:-2], dtype=A.dtype, device=device_of(A))
        return Factor(A, A, A[..., 0, :], nothing), nothing > 0  # of no use, and none is used: the SVD's turn, for all
    V, s, factor = BACKENDS[name](A)
    top = xp.max(s, axis=-1)
    trusted = top <= CONDITION * xp.min(s, axis=-1) if method == "auto" else xp.isfinite(top)
    if readable(A) and not bool(xp.any(trusted)):
        return Factor(A, V, s, 0.0 * s[..., 0]), trusted  # no U is worth its while
    with np.errstate(divide="ignore", invalid="ignore"):
        U = factor()
    if name != "svd" or A.dtype != xp.float64 or type(A) is not np.ndarray:
        U += U @ (0.5 * xp.astype(_defect(U), A.dtype, copy=False))
    orthogonality = _spectral_bound(_defect(U))
    attained = inner(U, A) >= (1.0 - _limit(A) ** 0.5) * xp.sum(s, axis=-1)
    return Factor(U, V, s, orthogonality), trusted & attained & (orthogonality <= _limit(A))


def _past(A: Array) -> Array:
    """Whether one linear solve, a fraction of the cost of the eigenvalues, shows the condition number to be past CONDITION, (...).

    The least eigenvalue of A^T A is below that of S = A^T A + c I, c > 0, so below ||v||/||S^{-1} v||; the largest is not below the mean.
    """
    xp, m = namespace(A), A.shape[-1]
    size = inner(A, A)[..., None, None] ** 0.5 / m**0.5
    A = A / xp.where(size > 0, size, 1.0)  # the eigenvalues have mean 1
    v = like(np.cos(np.arange(m, dtype=np.float64))[:, None], A)
    x = xp.linalg.solve(A.mT @ A + m * xp.finfo(A.dtype).eps * like(np.eye(m), A), xp.broadcast_to(v, (*A.shape[:-2], m, 1)))
    return (size[..., 0, 0] > 0) & (inner(x, x) > CONDITION**4 * inner(v, v))


def _limit(A: Array) -> float:
    """What ||U^T U - I||_2 may be."""
    return 1e-14 * A.shape[-1] if A.dtype == namespace(A).float64 else 1e-6


def _defect(U: Array) -> Array:
    """I - U^T U, (..., m, m), in double precision: the rounding of products in single would hide it."""
    xp = namespace(U)
    U = xp.astype(U, xp.float64, copy=False)
    return xp.eye(U.shape[-1], dtype=xp.float64, device=device_of(U)) - U.mT @ U


def _spectral_bound(E: Array) -> Array:
    """||E^4||_F^{1/4}, the 8-norm of the eigenvalues, of symmetric E (..., m, m): between ||E||_2 and m^{1/8} ||E||_2."""
    E = E @ E
    E = E @ E
    return inner(E, E) ** 0.125
