"""The one file that knows numpy from torch: namespace, placement, and the few formulas the array standard lacks."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of
from numpy.typing import NDArray

Array = Any  # an array of numpy, torch or any library of the array standard

__all__ = [
    "Array",
    "NoDevice",
    "block_size",
    "column_sums",
    "detached",
    "device_of",
    "flatten",
    "keep_freed_memory",
    "like",
    "namespace",
    "norm",
    "place",
    "readable",
    "safe_exp_sum",
    "safe_shares",
    "threads_for",
    "to_numpy",
]

MANY_THREADS = 512  # width from which one product is worth more than one BLAS thread
BLOCK_BYTES = 15e6  # of a block on a CPU: past a core's own cache, but enough to hide the cost of a call
SMALL = 5000  # entries of a matrix up to which a copy of its transpose pays: OpenBLAS 0.3.31, 10 x 10 to 512 x 1000
CACHED_BYTES = 1 << 20  # of an array passed over block by block: two or three such fit a core's own cache
FREE_SHARE = 1 / 3  # of an accelerator's free memory, for blocks whose estimate may be half of what they take at the peak of a step


class NoDevice(ValueError):
    """The device asked for is not to be had on this machine."""


def namespace(*arrays: Array) -> Any:
    """The array-standard namespace of the arrays' library; TypeError where they mix."""
    for x in arrays:
        if type(x) is not np.ndarray:
            return array_namespace(*arrays)
    return _of_numpy()  # ten times faster


@cache
def _of_numpy() -> Any:
    return array_namespace(np.zeros(1))


def like(values: Any, x: Array) -> Array:
    """`values` as an array of x's library, dtype and device."""
    return namespace(x).asarray(values, dtype=x.dtype, device=device_of(x))


def place(values: NDArray[Any], device: str) -> Array:
    """A numpy array on `device`: "numpy", or a torch device ("cpu", "cuda", ...) in the same precision.

    NoDevice where this machine has no such device, ImportError where torch is missing.
    """
    if device == "numpy":
        return values
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"device {device!r} needs torch; install the extra: pip install ufm[torch]") from error
    try:
        return torch.tensor(values, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise NoDevice(f"device {device!r} is not to be had here ({reason}); use 'numpy' or 'cpu'") from error


def to_numpy(x: Array) -> NDArray[Any]:
    """x as a numpy array, from any library and device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return np.asarray(x.detach().cpu().numpy())
    if hasattr(x, "to_device") and not isinstance(x, (np.ndarray, np.generic)):
        x = x.to_device(type(device_of(x))("CPU_DEVICE"))
    return np.asarray(x)


def column_sums(x: Array) -> Array:
    """(..., rows, cols) -> (..., 1, cols); a product with ones, several times faster than `sum` on many small matrices."""
    ones = _ones(x.shape[-2], x.dtype) if type(x) is np.ndarray else namespace(x).ones((1, x.shape[-2]), dtype=x.dtype, device=device_of(x))
    return ones @ x


def column_products(x: Array, y: Array) -> Array:
    """The inner products of columns, (..., rows, cols) twice -> (..., 1, cols); of numpy's without an array of products in memory."""
    return sum(column_sums(x[..., rows, :] * y[..., rows, :]) for rows in row_blocks(x))


def by_transpose(x: Array, y: Array) -> Array:
    """x y^T, (..., r, c) by (..., d, c): with a copy of y^T in rows where y is small and r >= c, which BLAS takes up to twice as fast."""
    small = type(y) is np.ndarray and y.shape[-2] * y.shape[-1] <= SMALL and x.shape[-2] >= y.shape[-1]
    return x @ (np.ascontiguousarray(y.mT) if small else y.mT)


def row_blocks(x: Array) -> list[slice]:
    """Slices of the rows of x (..., rows, cols) for which what is made in passing stays in a processor's cache; one slice elsewhere."""
    rows = x.shape[-2]
    step = max(1, CACHED_BYTES * rows // max(1, x.nbytes)) if type(x) is np.ndarray else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


@cache
def _ones(n: int, dtype: Any) -> Any:
    return np.ones((1, n), dtype=dtype)


def detached(x: Array) -> Array:
    """x outside any graph of torch's autograd."""
    torch = sys.modules.get("torch")
    return x.detach() if torch is not None and isinstance(x, torch.Tensor) else x


def readable(x: Array) -> bool:
    """Whether x has values to look at; torch's meta tensors have shapes only."""
    return str(device_of(x)) != "meta"


def flatten(x: Array) -> Array:
    """(B, ...) -> (B, n)."""
    return namespace(x).reshape(x, (x.shape[0], -1))


def norm(x: Array) -> Array:
    """The Euclidean norm over the last axis."""
    xp = namespace(x)
    return xp.sqrt(xp.vecdot(x, x))


def safe_exp_sum(R: Array, keep: Array) -> tuple[Array, Array, Array]:
    """(log(1 + S), keep exp(R)/(1 + S), S/(1 + S)) with S = sum_j keep_j exp(R_j) over axis -2, to full relative accuracy.

    R (..., K, cols) with R = 0 where keep = 0; no overflow for large R, no cancellation for S near 0.
    """
    xp = namespace(R)
    top, S, shares, rest = _shares(R, keep)
    return top + xp.log1p(xp.expm1(-top) + S), shares, rest


def safe_shares(R: Array, keep: Array) -> tuple[Array, Array]:
    """The last two of `safe_exp_sum`."""
    return _shares(R, keep)[2:]


def _shares(R: Array, keep: Array) -> tuple[Array, Array, Array, Array]:
    xp = namespace(R)
    top = xp.max(R, axis=-2, keepdims=True)  # >= 0: R is 0 at the entry left out
    E = xp.exp(R - top) * keep
    S = column_sums(E)
    share = 1.0 / (xp.exp(-top) + S)
    return top, S, E * share, S * share


def threads_for(width: int) -> Any:
    """A context of the BLAS threads that products of this width are worth: one below MANY_THREADS, else as many as there are."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1 if width < MANY_THREADS else None)


def keep_freed_memory() -> None:
    """Make the C library keep what a step frees, where it adapts to the largest block freed so far (glibc): no page faults each step."""
    np.empty(31 << 20, dtype=np.uint8)


def block_size(bytes_per_run: float, device: str) -> int:
    """Runs per block: about 15 MB of working set on a CPU, FREE_SHARE of the free memory on CUDA, all of them elsewhere."""
    room = BLOCK_BYTES if device in ("numpy", "cpu") else _free_bytes(device)
    return sys.maxsize if room is None else max(1, math.floor(room / bytes_per_run))


def _free_bytes(device: str) -> float | None:
    """FREE_SHARE of what torch can still get on `device`, with what it holds in reserve; None where there is no telling."""
    try:
        import torch

        if not device.startswith("cuda") or not torch.cuda.is_available():
            return None
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FREE_SHARE * float(torch.cuda.mem_get_info(device)[0] + reserve)
    except (ImportError, RuntimeError, AssertionError):
        return None  # `place` says what is wrong
