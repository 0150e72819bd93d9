"""The simplex ETF nearest to given class means: closed form, its exact gradient, the distance.

    min over U of  ||(Ht - U F^T) D||_F^2 + (delta/2) ||U - prox||_F^2,     U^T U = I,

is solved by the orthogonal polar factor of A = 2 Ht D^2 F + delta prox. Here D^2 = diag(weights), the frame F (K, m) of unit Frobenius norm
holds a vector a class as its row, and Ht (d, K) are the class means about their weighted mean, with ||Ht D||_F = 1 (about the origin for a
frame whose rows do not sum to zero). Simplex ETF: F = (I - 11^T/K)/sqrt(K-1) in the full form, m = K, and `helmert(K).T`/sqrt(K-1) in the
reduced one, m = K - 1, which is the limit delta -> 0 of the full form and needs no proximal term. Means are (..., d, K), numpy, torch or
the like, float32 or float64. Source: Markou, Ajanthan, Gould, NeurIPS 2024 (arXiv 2411.01248), who solve it by Riemannian trust regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, sqrt
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from ufm.arrays import Array, detached, device_of, like, namespace, readable, to_numpy
from ufm.frames import ROUNDED, by_rank, helmert
from ufm.polar import ROUTES, Factor, Method, inner, polar

Form = Literal["reduced", "full"]


class Posed(NamedTuple):
    """The checked problem: the U with orthonormal columns that maximises <U, A> is the answer. Shapes hold `...` for a batch."""

    A: Array  # (..., d, m)
    means: Array  # Ht, (..., d, K)
    frame: Array  # F, (K, m)
    size: Array  # the norm divided out of the means, (..., 1, 1)
    weights: Array | None  # the diagonal of D^2, mean 1 over the classes that are in, (1, K) or (..., 1, K)
    centre: Array | None  # the weights of the mean that was subtracted, (K, 1) or (..., K, 1)
    unit: float  # 2/rank(F): the mean singular value of A at collapse, without prox and weights
    delta: float
    form: Form


@dataclass(frozen=True, eq=False)
class NearestETF:
    """The nearest frame, what it is worth, and what `pullback` needs.

    U (..., d, m) has orthonormal columns, m = K in the full form and the frame's rank, K - 1, in the reduced one; W (..., K, d) is
    sqrt(K) F U^T, unit rows for a simplex ETF. Each (...): distance ||(Ht - U F^T) D||_F^2; s_min and condition of A (directions with s
    near 0 are undetermined); orthogonality, between ||U^T U - I||_2 and m^{1/8} times that. method: the back end whose factor this is, for
    a batch one name a problem, row-major. A = U V diag(s) V^T with s (..., m) and V (..., m, m).
    """

    U: Array
    W: Array
    distance: Array
    s_min: Array
    condition: Array
    orthogonality: Array
    method: str | tuple[str, ...]
    s: Array
    V: Array
    posed: Posed


def nearest(
    means: Array,
    *,
    weights: Any = None,
    frame: Any = None,
    prox: Array | None = None,
    delta: float = 0.0,
    relative_delta: float | None = None,
    form: Form = "reduced",
    method: Method = "auto",
) -> NearestETF:
    """The simplex ETF, or the rotated `frame`, nearest to class means (..., d, K).

    weights (K,) or (..., K), >= 0: of the classes' squared errors; a class of weight 0 is left out and gets no gradient. frame (K, m): rows
    are classes. prox (..., d, m): a U to stay near, weighted by delta, or by relative_delta times 2/rank(F); the source has form="full" and
    delta=1e-3. method: see `ufm.polar.polar`; every factor is verified, and one that fails is replaced by the SVD's.
    ValueError for a width too small for the frame, means that are equal or not finite, and options that do not fit.
    """
    if method not in ROUTES:
        raise ValueError(f"etf.nearest: method is {method!r}, but must be one of {', '.join(map(repr, ROUTES))}")
    options: Any = dict(weights=weights, frame=frame, prox=prox, delta=delta, relative_delta=relative_delta, form=form)
    posed = pose("etf.nearest", means, **options)
    return finished(posed, *polar(posed.A, method))


def pullback(nearest: NearestETF, grad_W: Array, *, guard: float = 0.0) -> Array:
    """The gradient in the means (..., d, K) from one in W (..., K, d): exact, O(d K^2), finite at collapse; prox and weights are constants.

        G = sqrt(K) grad_W^T F,   T = V^T U^T G V,   grad_A = U V (X - T/s) V^T + G V diag(1/s) V^T,   X_ij = (T - T^T)_ij/(s_i + s_j)

    guard = gamma > 0 puts x/(x^2 + g^2), g = 2 gamma/rank(F), for 1/x: a bias where A is near singular, 0.25 % at collapse for 0.05.
    Directions of A whose s is rounding error are undetermined by the means and get no gradient.
    """
    posed, U, V, s = nearest.posed, nearest.U, nearest.V, nearest.s
    grad_W = detached(grad_W)
    _alike("etf.pullback", "grad_W", grad_W, U, tuple(nearest.W.shape))
    xp = namespace(U, grad_W)
    if not (isinstance(guard, Real) and isfinite(guard) and guard >= 0):
        raise ValueError(f"etf.pullback: guard is {guard!r}, but must be a number >= 0; 0 is none, 0.05 a good one")
    (d, m), K = U.shape[-2:], grad_W.shape[-2]
    g, least = guard * posed.unit, m * xp.finfo(s.dtype).eps * xp.max(s, axis=-1, keepdims=True)
    Q = posed.frame @ V  # (..., K, m)
    T = ((grad_W @ U) @ V).mT @ Q  # the factor 2 sqrt(K) comes last
    X = (T - T.mT) * _inverse(s[..., :, None] + s[..., None, :], g, least[..., None])
    if d > m:
        over = _inverse(s, g, least)[..., None, :]
        grad = U @ ((V @ (X - T * over)) @ Q.mT)
        grad += grad_W.mT @ ((Q * over) @ Q.mT)
    else:  # nothing is normal to the columns of a square U
        grad = U @ ((V @ X) @ Q.mT)
    w, centre = posed.weights, posed.centre
    if w is not None:
        grad *= w
    if posed.delta:  # otherwise the factor does not see the scale
        along = posed.means if w is None else posed.means * w
        grad -= inner(grad, posed.means)[..., None, None] * along
    grad *= 2 * sqrt(K) / posed.size
    if w is None or centre is None:  # the rows of Q^T sum to zero already
        return grad
    return grad - xp.sum(grad, axis=-1, keepdims=True) * centre.mT


def distance(Y: Array, frame: Any = None) -> Array:
    """min over U of ||Y - U F^T||_F^2 = 1 + ||Y||_F^2 - 2 ||Y F||_*, (...), of Y (..., d, K), as given: neither centred nor normalised.

    Evaluated at U = polar(Y F), so that it loses no digits near 0. frame (K, m), the simplex ETF by default, is normalised.
    """
    xp = _door("etf.distance", "Y", Y)
    Y = detached(Y)
    F, *_ = _frame("etf.distance", "Y", Y, frame, "reduced")
    P, _, Qt = xp.linalg.svd(Y @ F, full_matrices=False)
    return xp.sum((Y - P @ (Qt @ F.mT)) ** 2, axis=(-2, -1))


def pose(
    call: str,
    means: Array,
    *,
    weights: Any = None,
    frame: Any = None,
    prox: Array | None = None,
    delta: float = 0.0,
    relative_delta: float | None = None,
    form: Form = "reduced",
) -> Posed:
    """The problem of `nearest`, checked and normalised, for whichever solver; `call` names it in messages."""
    xp = _door(call, "means", means)
    means, prox = detached(means), None if prox is None else detached(prox)
    F, rank, centred = _frame(call, "means", means, frame, form)
    delta = _delta(call, delta, relative_delta, 2 / rank)
    shape = (*means.shape[:-1], F.shape[-1])
    if (prox is None) != (delta == 0):
        raise ValueError(
            f"{call}: delta is {delta!r} and prox is {'not ' if prox is None else ''}given, but the two go together; give both or neither"
        )
    if prox is not None:
        _alike(call, "prox", prox, means, shape)
        if readable(prox) and not bool(xp.all(xp.isfinite(prox))):
            raise ValueError(f"{call}: prox holds NaN or infinity, but must be finite; leave such runs out")
    w = _weights(call, weights, means)
    centre = None
    if centred:
        ones = xp.ones((means.shape[-1], 1), dtype=means.dtype, device=device_of(means))
        centre = ones / means.shape[-1] if w is None else w.mT / (w @ ones)
    Y, size = _normalised(call, means, w, centre)
    A = (Y if w is None else Y * w) @ (2.0 * F)
    if frame is not None and prox is None and readable(A) and not bool(xp.all(_largest(A) > 8 * xp.finfo(A.dtype).eps)):
        raise ValueError(
            f"{call}: means are orthogonal to this frame, so that every rotation of it is as near; give another frame, or prox"
        )
    return Posed(A if prox is None else A + delta * prox, Y, F, size, w, centre, 2 / rank, delta, form)


def finished(posed: Posed, factor: Factor, method: str | tuple[str, ...]) -> NearestETF:
    """The record of a problem and the factor that solves it, which other solvers make with `ufm.polar.factor_of`."""
    xp = namespace(factor.U)
    off = factor.U @ posed.frame.mT  # (..., d, K)
    W = sqrt(posed.frame.shape[0]) * off.mT
    off -= posed.means
    s_min = xp.min(factor.s, axis=-1)
    with np.errstate(divide="ignore"):
        condition = xp.max(factor.s, axis=-1) / s_min
    far = inner(off, off if posed.weights is None else off * posed.weights)
    return NearestETF(factor.U, W, far, s_min, condition, factor.orthogonality, method, factor.s, factor.V, posed)


def _inverse(x: Array, guard: float, least: Array) -> Array:
    """1/x, or x/(x^2 + guard^2) with a guard; 0 where x <= least, (...)."""
    xp = namespace(x)
    kept = xp.where(x > least, x, 1.0 + 0.0 * x)
    return xp.where(x > least, kept / (kept * kept + guard * guard) if guard else 1.0 / kept, 0.0 * x)


def _door(call: str, name: str, x: Array) -> Any:
    """The namespace of x (..., d, K), after its checks."""
    try:
        xp = namespace(x)
    except TypeError as error:
        raise TypeError(f"{call}: {name} is a {type(x).__name__}, but must be an array (..., d, K) of numpy, torch or the like") from error
    if x.ndim < 2 or x.shape[-1] < 2 or 0 in x.shape:
        raise ValueError(f"{call}: {name} has shape {tuple(x.shape)}, but must be (..., d, K) with K >= 2 classes; give one column a class")
    if x.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"{call}: {name} has dtype {x.dtype}, but polar factors need float32 or float64; convert it")
    if readable(x) and not bool(xp.all(xp.isfinite(x))):
        raise ValueError(f"{call}: {name} holds NaN or infinity, but must be finite; leave such runs out")
    return xp


def _frame(call: str, name: str, means: Array, frame: Any, form: str) -> tuple[Array, int, bool]:
    """F (K, m) of unit Frobenius norm, like `means`, its rank (m in the reduced form), and whether its rows sum to zero, up to rounding."""
    if form not in ("reduced", "full"):
        raise ValueError(f"{call}: form is {form!r}, but must be 'reduced' or 'full'")
    d, K = means.shape[-2:]
    if frame is None:
        what, rank, centred, remedy = "a simplex ETF", K - 1, True, "give frame="
        F = _simplex(K, form)
    else:
        what, remedy = "this frame", "another frame"
        F = np.array(to_numpy(frame), dtype=np.float64)
        if F.ndim != 2 or F.shape[0] != K or not np.all(np.isfinite(F)) or not np.any(F):
            raise ValueError(f"{call}: frame has shape {F.shape}, but must be ({K}, m), finite, not zero; give one row a class")
        F /= np.linalg.norm(F)
        middle = F.mean(axis=0)
        centred = bool(np.linalg.norm(middle) * sqrt(K) < ROUNDED)
        if centred:
            F -= middle
        own = by_rank(F)
        rank = own.shape[1]
        if form == "reduced" and rank < F.shape[1]:
            F = own
    if d < F.shape[1]:
        least, remedy = F.shape[1], remedy if form == "reduced" else "form='reduced'"
        raise ValueError(
            f"{call}: {name} has width {d}, but {what} of {K} classes needs at least {least}; use width >= {least} or {remedy}"
        )
    return like(F, means), rank, centred


@lru_cache(maxsize=8)
def _simplex(K: int, form: str) -> Any:
    """F of the simplex ETF, (K, m), of unit Frobenius norm."""
    return (helmert(K).T if form == "reduced" else np.eye(K) - 1 / K) / np.sqrt(K - 1)


def _delta(call: str, delta: float, relative: float | None, unit: float) -> float:
    if relative is not None and delta != 0:
        raise ValueError(f"{call}: delta is {delta!r} and relative_delta {relative!r}, but they are one number; give one of them")
    value = delta if relative is None else relative
    if not (isinstance(value, Real) and isfinite(value) and value >= 0):
        raise ValueError(f"{call}: delta is {value!r}, but must be a number >= 0; 1e-3 is the paper's")
    return float(value) * (1.0 if relative is None else unit)


def _alike(call: str, name: str, x: Any, like_it: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless x is an array of the library and dtype of another, of this shape."""
    if type(x) is not type(like_it) or x.dtype != like_it.dtype or tuple(x.shape) != shape:
        got = f"{type(x).__name__} of {getattr(x, 'dtype', 'no dtype')} and shape {tuple(getattr(x, 'shape', ()))}"
        rule = f"{type(like_it).__name__} of {like_it.dtype} and shape {shape}"
        raise ValueError(f"{call}: {name} is a {got}, but must be a {rule}; convert it")


def _weights(call: str, weights: Any, means: Array) -> Array | None:
    """Weights (..., 1, K) like `means`, mean 1 over the classes that are in, or None."""
    if weights is None:
        return None
    try:
        w = like(detached(weights) if type(weights) is type(means) else np.array(to_numpy(weights), dtype=np.float64), means)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{call}: weights are {weights!r:.60}, but must be numbers; give one a class") from error
    xp = namespace(w, means)
    K = means.shape[-1]
    if tuple(w.shape) not in ((K,), (*means.shape[:-2], K)):
        raise ValueError(f"{call}: weights has shape {tuple(w.shape)}, but must be ({K},) or {(*means.shape[:-2], K)}; give one a class")
    w = w[..., None, :]
    if readable(w) and not bool(xp.all((w >= 0) & xp.isfinite(w)) & xp.all(xp.any(w > 0, axis=-1))):
        raise ValueError(f"{call}: weights are {to_numpy(w).ravel()!s:.60}, but must be finite, >= 0, not all 0; 0 leaves a class out")
    if readable(w) and not bool(xp.all(xp.sum(xp.astype(w > 0, w.dtype), axis=-1) > 1)):
        raise ValueError(f"{call}: weights are {to_numpy(w).ravel()!s:.60}, but a frame needs two classes with weights above 0")
    return w * (xp.sum(xp.astype(w > 0, w.dtype), axis=-1, keepdims=True) / xp.sum(w, axis=-1, keepdims=True))


def _normalised(call: str, means: Array, w: Array | None, centre: Array | None) -> tuple[Array, Array]:
    """Ht (..., d, K) and the size divided out, (..., 1, 1); the mean is subtracted twice, so that equal columns leave nothing."""
    xp = namespace(means)
    middle = None if centre is None else means @ centre
    B = means + 0.0 if middle is None else means - middle
    if centre is not None:
        B -= B @ centre
    if w is not None:
        B = xp.where(w > 0, B, 0.0)
    top = _largest(B)
    least = 0.0 if middle is None else 2 * xp.finfo(B.dtype).eps * _largest(middle)
    if readable(B) and not bool(xp.all(top > least)):
        rule = "differ" if centre is not None else "are not all zero"
        raise ValueError(f"{call}: all means of a problem are equal, but a direction needs means that {rule}; leave such problems out")
    B /= top  # so that no square is lost
    norm = inner(B, B if w is None else B * w)[..., None, None] ** 0.5
    B /= norm
    return B, top * norm


def _largest(x: Array) -> Array:
    """max |x| of each matrix, (..., 1, 1)."""
    xp = namespace(x)
    return xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
