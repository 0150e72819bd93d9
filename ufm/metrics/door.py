"""The door of the metrics, and what several of them share: double precision, one-hot classes, residuals, pairs, quotients at 0/0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, column_sums, device_of, like, namespace, readable, to_numpy

NEAR = 1e-2  # squared distances below this share of the squared norms are computed again by differences


def matrices(call: str, name: str, x: Array, axes: str) -> Array:
    """x as a float64 array with the three named axes, runs first; entries that are not finite become NaN, and so do the run's results."""
    try:
        xp = namespace(x)
    except TypeError as error:
        raise TypeError(
            f"metrics.{call}: {name} is a {type(x).__name__}, but must be an array {axes} of numpy, torch or the like"
        ) from error
    if x.ndim != 3:
        raise ValueError(f"metrics.{call}: {name} has shape {tuple(x.shape)}, but must be {axes}, runs first; use {name}[None] for one run")
    if not xp.isdtype(x.dtype, ("integral", "real floating")):
        raise TypeError(f"metrics.{call}: {name} has dtype {x.dtype}, but must hold real numbers")
    x = xp.astype(x, xp.float64, copy=False)
    return xp.where(xp.isfinite(x), x, xp.nan)


def fits(call: str, name: str, x: Array, shape: tuple[int, int, int], other: str) -> None:
    """Refuse x unless it has the shape (B, rows, cols) that `other` asks for; one run goes with any number."""
    if tuple(x.shape[1:]) != shape[1:] or (x.shape[0] != shape[0] and 1 not in (x.shape[0], shape[0])):
        raise ValueError(f"metrics.{call}: {name} has shape {tuple(x.shape)}, but {other} asks for {shape}")


def choice(call: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is not in the list."""
    if value not in allowed:
        raise ValueError(f"metrics.{call}: {name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def constant(values: Any, x: Array) -> Array:
    """Numbers, or an array that is already where x is, as an array like x."""
    if hasattr(values, "ndim") and not isinstance(values, (np.ndarray, np.generic)):
        return namespace(values).astype(values, x.dtype)
    return like(np.array(values, dtype=np.float64), x)  # a copy: torch warns of read-only memory


def positive(call: str, name: str, values: Any, x: Array, cols: int) -> Array:
    """Positive numbers (cols,) or (B, cols), one for each of `cols` columns or classes, as an array (B or 1, 1, cols) like x."""
    w = constant(values, x)
    if w.ndim not in (1, 2) or w.shape[-1] != cols or (w.ndim == 2 and w.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"metrics.{call}: {name} has shape {tuple(w.shape)}, but must be ({cols},) or ({x.shape[0]}, {cols})")
    if readable(w) and not bool(namespace(w).all(w > 0)):
        raise ValueError(f"metrics.{call}: {name} holds a number that is not positive; leave such columns or classes out")
    return namespace(w).reshape(w, (-1, 1, cols))


def membership(call: str, labels: Any, classes: int, x: Array, name: str = "labels") -> Array:
    """Integer labels (cols,) or (B, cols) of x (B, rows, cols) as ones and zeros (B or 1, cols, classes) like x."""
    xp = namespace(x)
    if not hasattr(labels, "ndim") or isinstance(labels, np.ndarray):
        labels = np.array(labels)
    if not namespace(labels).isdtype(labels.dtype, "integral"):
        raise TypeError(f"metrics.{call}: {name} has dtype {labels.dtype}, but must hold integers, 0 to {classes - 1}")
    labels = xp.asarray(labels, dtype=xp.int64, device=device_of(x))
    cols = x.shape[-1]
    if labels.ndim not in (1, 2) or labels.shape[-1] != cols or (labels.ndim == 2 and labels.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"metrics.{call}: {name} has shape {tuple(labels.shape)}, but must be ({cols},) or ({x.shape[0]}, {cols})")
    if readable(labels) and not bool(xp.all((labels >= 0) & (labels < classes))):
        raise ValueError(f"metrics.{call}: {name} runs from {xp.min(labels)} to {xp.max(labels)}, but must lie between 0 and {classes - 1}")
    each = xp.arange(classes, dtype=xp.int64, device=device_of(x))
    return xp.astype(xp.reshape(labels, (-1, cols, 1)) == each, x.dtype)


def residuals(X: Array, member: Array, weight: Array | None = None) -> tuple[Array, Array]:
    """(means, X - mean of the column's class): means (B, rows, classes), residuals (B, rows, cols), both to the precision of X's entries.

    The means are corrected once by the mean of the residuals, so that equal columns leave no residual even far from the origin.
    """
    weighted = member if weight is None else member * weight.mT
    counts = column_sums(weighted)
    means = X @ weighted / counts
    rest = X - means @ member.mT
    shift = rest @ weighted / counts
    return means + shift, rest - shift @ member.mT


def squared_distances(X: Array) -> Array:
    """||x_k - x_l||^2 of the columns of X (B, d, K), with infinity on the diagonal, (B, K, K).

    Through the Gram matrix; rows with a distance that this would leave with few digits are computed again by differences.
    """
    xp = namespace(X)
    K = X.shape[-1]
    C = X - xp.mean(X, axis=-1, keepdims=True)
    apart = C.mT @ C
    own = xp.linalg.diagonal(apart) + 0.0  # (B, K), a copy: the steps below are in place, since fresh memory costs more than they do
    apart *= -2.0
    apart += own[:, :, None]
    apart += own[:, None, :]
    xp.reshape(apart, (-1, K * K))[:, :: K + 1] = xp.inf
    if not readable(X):
        return apart
    near = xp.min(apart, axis=-1) < NEAR * (own + xp.max(own, axis=-1, keepdims=True))
    again = np.flatnonzero(to_numpy(xp.any(near, axis=0)))
    if not again.size:
        return apart
    rows = [apart[:, k : k + 1, :] for k in range(K)]
    for k in again.tolist():
        change = X - X[:, :, k : k + 1]
        rows[k] = column_sums(change * change)
        rows[k][:, :, k] = xp.inf
    return xp.concat(rows, axis=1)


def pairs(x: Array) -> Array:
    """The entries k > l of (B, K, K), (B, K(K-1)/2)."""
    xp = namespace(x)
    K = x.shape[-1]
    below = xp.asarray(np.flatnonzero(np.tri(K, k=-1)), device=device_of(x))
    return xp.take(xp.reshape(x, (x.shape[0], K * K)), below, axis=-1)


def units(X: Array) -> Array:
    """The columns of X (B, d, K) over their norms; a zero column becomes NaN."""
    xp = namespace(X)
    with np.errstate(invalid="ignore"):
        X = X / xp.max(xp.abs(X), axis=-2, keepdims=True)
    return X / xp.sqrt(column_sums(X * X))


def quotient(a: Array, b: Array) -> Array:
    """a/b, with 0 wherever a = 0 (also over b = 0), infinity where b alone is 0."""
    xp = namespace(a, b)
    with np.errstate(divide="ignore", invalid="ignore"):
        return xp.where(a == 0, 0.0, a / b)


def where_finite(value: Array, x: Array) -> Array:
    """`value` (B,) as float64, NaN in the runs where x (B, rows, cols) holds a NaN."""
    xp = namespace(x)
    return xp.where(xp.any(xp.isnan(x), axis=(1, 2)), xp.nan, xp.astype(value, xp.float64))


def index(call: str, name: str, values: Any, K: int) -> NDArray[np.int64]:
    """Whole numbers between 0 and K - 1 as an array (m,)."""
    at = np.asarray(values)
    if at.ndim != 1 or not at.size or at.dtype.kind not in "iu" or at.min() < 0 or at.max() >= K:
        raise ValueError(f"metrics.{call}: {name} is {values!r}, but must be a list of whole numbers between 0 and {K - 1}")
    return at.astype(np.int64)
