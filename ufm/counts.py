"""Class-count patterns: (K,) integers, largest first, at least 1 each; ratio is largest over smallest."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def balanced(K: int, n: int) -> Counts:
    """n_k = n for every class."""
    _check("balanced", K, n=n)
    return np.full(K, n, dtype=np.int64)


def step(K: int, n_min: int, ratio: float, minority: int | None = None) -> Counts:
    """`minority` classes (K//2 by default) of n_min samples, the others of n_min * ratio, rounded to the nearest integer."""
    minority = K // 2 if minority is None else minority
    _check("step", K, n_min=n_min, ratio=ratio)
    if not (isinstance(minority, Integral) and 0 <= minority <= K):
        raise ValueError(f"counts.step: minority is {minority!r}, but must be a whole number between 0 and K = {K}")
    return np.repeat([_whole(n_min * ratio), n_min], [K - minority, minority]).astype(np.int64)


def exponential(K: int, n_max: int, ratio: float) -> Counts:
    """n_k = floor(n_max ratio^{-(k-1)/(K-1)}), k = 1..K, at least 1: the long-tailed pattern of CIFAR-LT (Cao et al. 2019).

    Floor, as in the data sets' own code: exponential(10, 5000, 100) is CIFAR-10-LT, 5000, 2997, ..., 83, 50.
    """
    _check("exponential", K, n_max=n_max, ratio=ratio)
    exact = n_max * float(ratio) ** (-np.arange(K) / max(K - 1, 1))
    return np.maximum(np.floor(exact * (1 + 1e-12)), 1).astype(np.int64)


def linear(K: int, n_min: int, n_max: int) -> Counts:
    """n_k falls in K equal steps from n_max to n_min, rounded to the nearest integer."""
    _check("linear", K, n_min=n_min, n_max=n_max)
    if n_max < n_min:
        raise ValueError(f"counts.linear: n_max is {n_max}, below n_min = {n_min}; largest first needs n_max >= n_min")
    return np.rint(np.linspace(n_max, n_min, K)).astype(np.int64)


def _whole(x: float) -> int:
    return max(int(np.rint(x)), 1)


def _check(call: str, K: int, **sizes: float) -> None:
    for name, size in {"K": K, **sizes}.items():
        if not isinstance(size, Real) or not (math.isfinite(size) and size >= 1):
            raise ValueError(f"counts.{call}: {name} is {size!r}, but must be a finite number, at least 1")
        if name != "ratio" and size != int(size):
            raise ValueError(f"counts.{call}: {name} is {size}, but counts are whole numbers")
    if not isinstance(K, Integral) or K < 2:
        raise ValueError(f"counts.{call}: K is {K}, but must be a whole number of classes, at least 2")
