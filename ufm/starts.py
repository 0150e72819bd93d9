"""First factors, drawn per run from a numpy Generator of that run's own seed: equal on every device, block and order.

`normal` and `balanced` are the papers' starts; features of a nonnegative problem are drawn as |.|. A start is a frozen dataclass with one
method, draw(cell, shapes, generator) -> factors of one run; adding one is adding a class and a line in TABLE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, place, to_numpy
from ufm.chain import Chain
from ufm.problem import Problem

Floats = NDArray[np.float64]


class Start(Protocol):
    """Draws the factors (H, W_1, ..., W_L[, b]) of one run of a one-cell problem, without the batch axis."""

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]: ...


@dataclass(frozen=True)
class Normal:
    """Every entry of every factor, H included, ~ N(0, scale^2/d); a bias starts at 0.

    With class means as columns, H holds the means of m_c samples drawn so, N(0, scale^2/(d m_c)): the same start, reduced.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("normal", self.scale)

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]:
        H, *rest = (self.scale / np.sqrt(cell.width) * generator.standard_normal(shape) for shape in shapes)
        return [H / np.sqrt(cell.multiplicity[0]), *rest]


@dataclass(frozen=True)
class BalancedNormal:
    """Normal entries, every factor with the same expected penalty; for L = 1, W ~ scale q N(0, 1) and H ~ (scale/q) N(0, 1).

    q = (lam_h N/(K lam_w))^{1/4}; in general the standard deviations are s_l = scale sqrt(g/(lam_l size_l)), g the geometric mean of
    lam_l size_l, with N d for the size of H. A factor without penalty counts as lam = 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("balanced", self.scale)

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]:
        lam = np.array([cell.lam_h[0], *cell.lam_w[0]])
        size = np.array([cell.samples[0] * cell.width, *(r * c for r, c in shapes[1 : cell.depth + 1])], dtype=np.float64)
        log = np.log(np.where(lam > 0, lam, 1.0) * size)
        deviation = [*(self.scale * np.exp(0.5 * (log.mean() - log))), 0.0]
        return [s * generator.standard_normal(shape) for s, shape in zip(deviation, shapes, strict=False)]


@dataclass(frozen=True)
class Orthogonal:
    """Every factor has orthonormal rows or columns, whichever are fewer, times scale (Haar-distributed; a bias is 0)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("orthogonal", self.scale)

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]:
        return [self.scale * _semi_orthogonal(generator, *shape) for shape in shapes]


@dataclass(frozen=True)
class AGDOrthogonal:
    """The start of `rules.AGD`: scale sigma_p (semi-orthogonal), sigma_p = sqrt(rows/columns) as networks store the factor; a bias is 0.

    sqrt(N/d) for features, sqrt(K/d) for W; Haar-distributed. With class means as columns, H diag(m)^{1/2} is the semi-orthogonal one:
    the features of samples that are equal within each class then have all their singular values at sigma too.
    Source: Bernstein et al. 2023 (arXiv 2304.05187), Algorithm 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("agd", self.scale)

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]:
        H, *rest = (self.scale * _semi_orthogonal(generator, *shape) for shape in shapes)
        return [np.sqrt(cell.samples[0] / cell.width / cell.multiplicity[0]) * H, *(np.sqrt(W.shape[0] / W.shape[1]) * W for W in rest)]


@dataclass(frozen=True)
class Spectral:
    """Aligned factors F_l = Q_l S^{1/(L+1)} Q_{l-1}^T: their product U S V^T has the singular vectors of -(loss slope at 0) diag(m)^{1/2}.

    U S V^T is the product in sqrt(m)-weighted columns (for cross-entropy, those of (I - J/K) Y diag(m)^{1/2}); S = scale |N(0, 1)| on the
    nonzero directions, at most `width` of them; the inner frames Q_l are Haar-distributed (Garrod, Keating & Thrampoulidis 2026).
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("spectral", self.scale)

    def draw(self, cell: Problem, shapes: Sequence[tuple[int, int]], generator: np.random.Generator) -> list[Floats]:
        root_m = np.sqrt(cell.multiplicity[0])
        onehot = np.eye(cell.classes)[None, :, cell.labels[0]]
        slope = cell.loss.slope(np.zeros_like(onehot), cell.loss.targets(onehot, cell.counts))[0]
        U, s, Vt = np.linalg.svd(-slope * root_m, full_matrices=False)
        r = min(int(np.sum(s > 1e-12 * s[0])), cell.width)
        root = np.abs(self.scale * generator.standard_normal(r)) ** (1.0 / (cell.depth + 1))
        frames = [Vt[:r].T, *(_semi_orthogonal(generator, cell.width, r) for _ in range(cell.depth)), U[:, :r]]
        factors = [after * root @ before.T for before, after in pairwise(frames)]
        return [factors[0] / root_m, *factors[1:], np.zeros((cell.classes, 1))]


@dataclass(frozen=True, eq=False)
class Given:
    """The factors themselves: arrays (B, rows, cols), or (rows, cols) for the same start in every run."""

    factors: Sequence[Any]


def _check_scale(name: str, scale: float) -> None:
    if not (isinstance(scale, Real) and np.isfinite(scale) and scale > 0):
        raise ValueError(f"starts.{name}: scale is {scale!r}, but must be a positive, finite number")


def _semi_orthogonal(generator: np.random.Generator, rows: int, cols: int) -> Floats:
    Q, R = np.linalg.qr(generator.standard_normal((max(rows, cols), min(rows, cols))))
    Q = Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)
    return np.ascontiguousarray(Q if rows >= cols else Q.T)


def seeds(call: str, seed: Any, cells: int) -> list[int]:
    """The seed of every cell: one whole number for all of them, or a sequence (G,); ValueError naming `call` otherwise."""
    given: list[Any] = [seed] if isinstance(seed, (int, np.integer)) else list(seed) if isinstance(seed, (Sequence, np.ndarray)) else [None]
    if len(given) not in (1, cells) or not all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) and s >= 0 for s in given):
        raise ValueError(f"{call}: seed is {seed!r:.60}, but must be a whole number, at least 0, or a sequence of G = {cells} of them")
    return [int(s) for s in given] * (cells // len(given))


def first_factors(
    problem: Problem, start: Start | Given, runs: int, seed: int | Sequence[int], chain: Chain, device: str = "numpy"
) -> tuple[Array, ...]:
    """The start of every run, (B, rows, cols) each, B = G * runs; run r of cell g draws from the seed (seed, r), or (seed[g], r).

    Raises ValueError where given factors do not fit the problem.
    """
    if isinstance(start, type) or not (isinstance(start, Given) or hasattr(start, "draw")):
        raise TypeError(f"starts: start is {start!r}, but must be one of ufm.starts ({', '.join(TABLE)}), called: ufm.starts.balanced(1.0)")
    shapes = chain.shapes(problem.width, problem.classes, problem.labels.shape[1])
    nonnegative = problem.features == "relu"
    if isinstance(start, Given):
        factors = _checked(start.factors, shapes, problem.cells * runs)
        if nonnegative and np.any(factors[0] < 0):
            raise ValueError(f"starts.given: factor 0 holds {factors[0].min()}, but features='relu' needs H >= 0; give np.abs(H)")
    else:
        draws = []
        for g, own in enumerate(seeds("starts", seed, problem.cells)):
            cell = problem.cell(g)
            draws += [start.draw(cell, shapes, np.random.default_rng([own, r])) for r in range(runs)]
        factors = [np.stack(parts) for parts in zip(*draws, strict=True)][: len(shapes)]
        if chain.bias:
            factors[-1] = np.zeros_like(factors[-1])
        if nonnegative:
            factors[0] = np.abs(factors[0])
    return tuple(place(f, device) for f in factors)


def _checked(given: Sequence[Any], shapes: Sequence[tuple[int, int]], batch: int) -> list[Floats]:
    try:
        arrays = [np.asarray(to_numpy(f), dtype=np.float64) for f in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"starts.given: factors is {given!r:.60}, but must be the arrays (H, W_1, ..., W_L[, b])") from error
    if len(arrays) != len(shapes):
        raise ValueError(f"starts.given: got {len(arrays)} factors, but the problem has {len(shapes)}; give (H, W_1, ..., W_L[, b])")
    for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array.shape[-2:] != shape or (array.ndim != 2 and array.shape != (batch, *shape)):
            raise ValueError(f"starts.given: factor {i} has shape {array.shape}, but the problem needs {shape} or {(batch, *shape)}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"starts.given: factor {i} holds NaN or infinity; every entry must be finite")
    return [np.array(np.broadcast_to(array, (batch, *shape))) for array, shape in zip(arrays, shapes, strict=True)]


normal, balanced, orthogonal, agd, spectral, given = Normal, BalancedNormal, Orthogonal, AGDOrthogonal, Spectral, Given

TABLE = {"normal": Normal, "balanced": BalancedNormal, "orthogonal": Orthogonal, "agd": AGDOrthogonal, "spectral": Spectral, "given": Given}
