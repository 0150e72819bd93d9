"""Manifolds as small options: Stiefel, sphere, oblique and flat space, with what a gradient norm of our own needs (numpy only).

Each is a submanifold of its matrices with the usual inner product. With G the Euclidean gradient, S = multiplier(X, G) and
times(V, S) the normal part: the Riemannian gradient is G - times(X, S), the Riemannian Hessian the projection of HV - times(V, S).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stiefel:
    """Matrices (rows, columns) with X^T X = I, rows >= columns; rows = columns is O(n), two components."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _whole("Stiefel", rows=self.rows, columns=self.columns)
        if self.rows < self.columns:
            raise ValueError(
                f"Stiefel: rows is {self.rows}, but {self.columns} orthonormal columns need at least as many rows; swap them or use fewer"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def dimension(self) -> int:
        return self.rows * self.columns - self.columns * (self.columns + 1) // 2

    def multiplier(self, X: Floats, G: Floats) -> Any:
        C = X.T @ G
        return np.asarray(0.5 * (C + C.T))

    def times(self, V: Floats, S: Any) -> Floats:
        return np.asarray(V @ S)

    def nearest(self, X: Floats) -> Floats:
        square, V = np.linalg.eigh(X.T @ X)
        if square[0] > 0.1 and square[-1] < 10.0:  # as for a short step from the manifold: a third of the SVD's cost, as exact
            return np.asarray(X @ ((V / np.sqrt(square)) @ V.T))
        P, _, Qt = np.linalg.svd(X, full_matrices=False)
        return np.asarray(P @ Qt)


@dataclass(frozen=True)
class Oblique:
    """Matrices (rows, columns) with unit columns; rows >= 2."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _whole("Oblique", rows=self.rows, columns=self.columns)
        if self.rows < 2:
            raise ValueError(f"Oblique: rows is {self.rows}, but a unit column of one row is only a sign; use rows >= 2")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def dimension(self) -> int:
        return (self.rows - 1) * self.columns

    def multiplier(self, X: Floats, G: Floats) -> Any:
        return np.asarray(np.sum(X * G, axis=0))

    def times(self, V: Floats, S: Any) -> Floats:
        return np.asarray(V * S)

    def nearest(self, X: Floats) -> Floats:
        return np.asarray(X / np.linalg.norm(X, axis=0))


@dataclass(frozen=True)
class Sphere:
    """Arrays of a shape whose entries have root sum of squares 1; at least two entries."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _shape("Sphere", self.shape, 2, "a unit number is only a sign")

    @property
    def dimension(self) -> int:
        return prod(self.shape) - 1

    def multiplier(self, X: Floats, G: Floats) -> Any:
        return float(np.vdot(X, G))

    def times(self, V: Floats, S: Any) -> Floats:
        return np.asarray(V * S)

    def nearest(self, X: Floats) -> Floats:
        return np.asarray(X / np.sqrt(np.vdot(X, X)))


@dataclass(frozen=True)
class Flat:
    """All arrays of a shape: a free factor, a scale, a bias."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _shape("Flat", self.shape, 1, "a factor has an entry")

    @property
    def dimension(self) -> int:
        return prod(self.shape)

    def multiplier(self, X: Floats, G: Floats) -> Any:
        return 0.0

    def times(self, V: Floats, S: Any) -> Floats:
        return np.zeros_like(V)

    def nearest(self, X: Floats) -> Floats:
        return X


Manifold = Stiefel | Oblique | Sphere | Flat


def project(manifold: Manifold, X: Floats, V: Floats) -> Floats:
    """V without its part normal to the manifold at X."""
    return np.asarray(V - manifold.times(X, manifold.multiplier(X, V)))


def draw(manifold: Manifold, generator: np.random.Generator) -> Floats:
    """A uniform point (standard normal in flat space)."""
    return manifold.nearest(generator.standard_normal(manifold.shape))


def component(manifold: Manifold, X: Floats) -> int:
    """The sign of det X on O(n), which has two components; 0 on the others, which have one."""
    return int(np.linalg.slogdet(X)[0]) if _orthogonal_group(manifold) else 0


def components(manifold: Manifold, X: Floats) -> list[Floats]:
    """X, and on O(n) a point of the other component too: the first column negated."""
    return [X, X * np.where(np.arange(len(X)) == 0, -1.0, 1.0)] if _orthogonal_group(manifold) else [X]


def _orthogonal_group(manifold: Manifold) -> bool:
    return isinstance(manifold, Stiefel) and manifold.rows == manifold.columns


def _whole(name: str, **sizes: int) -> None:
    for field, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: {field} is {value!r}, but must be a whole number, at least 1")


def _shape(name: str, shape: Any, least: int, why: str) -> None:
    if not isinstance(shape, tuple) or not shape:
        raise ValueError(f"{name}: shape is {shape!r}, but must be a tuple of whole numbers such as (5, 3)")
    _whole(name, **{f"shape[{i}]": n for i, n in enumerate(shape)})
    if prod(shape) < least:
        raise ValueError(f"{name}: shape is {shape!r}, but must hold at least {least} entries ({why})")
