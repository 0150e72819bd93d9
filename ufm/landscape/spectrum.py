"""The curvature of F at a point: eigenvalues of its Hessian per run, their signs, and whether the point is a local minimum.

The geometry is that of samples: weighted coordinates H' = H diag(m)^{1/2}, all else as it is. With class means as columns the deviations
within a class are left out; for a convex loss they add positive eigenvalues only, for free or nonnegative features of a linear chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array
from ufm.certificate import per_run
from ufm.landscape.krylov import lanczos
from ufm.landscape.point import BAND, STATIONARY, Floats, Part, Point, applied, longest, point_of, whole
from ufm.landscape.reduction import MOVED, reduced, reducible
from ufm.landscape.symmetry import orbit_of
from ufm.problem import Problem
from ufm.records import Saved

METHODS = ("auto", "reduced", "dense", "lanczos")
DENSE = 1500  # most coordinates for which "auto" takes the whole spectrum, and most eigenvalues listed of a reduced one
ZERO = 1e-12  # eigenvalues below this share of the largest are zero in float64


@dataclass(frozen=True, eq=False)
class Spectrum(Saved):
    """The Hessian's eigenvalues at a point, per run; NaN where a number is not known.

    method (B,): "reduced", "dense" or "lanczos". eigenvalues (B, m): ascending, all of them (reduced: at most the 1500 lowest; Lanczos: the
    lowest), then NaN. negative, zero, positive (B,): how many; NaN where the signs are not told apart. at_least (B,): eigenvalues that are
    negative for certain. coordinates (B,): n. trace, frobenius (B,): sum and root of the sum of squares of all (NaN in Lanczos). scale
    (B,): largest |eigenvalue| (Lanczos: of those seen). tolerance (B,): zero is |eigenvalue| <= tolerance. separation (B,): the smallest
    |eigenvalue| above the tolerance over the tolerance. asymmetry (B,): of the matrix, over scale. residual (B,): in Lanczos the largest
    ||A v - theta v|| over scale; reduced: how far the point of clear rank is whose spectrum this is, over its norm; NaN when dense.
    gradient_norm (B,), scale-free; 0 where nothing is left to gain in float64. orbit (B,): dimension of the known symmetries' orbit (NaN
    where unclear). weakly_held (B,): features at their bound without a force that holds them. is_minimum (B,): 1, 0 or NaN; reason (B,).
    """

    method: NDArray[np.str_]
    eigenvalues: Floats
    negative: Floats
    zero: Floats
    positive: Floats
    at_least: Floats
    coordinates: NDArray[np.int64]
    trace: Floats
    frobenius: Floats
    scale: Floats
    tolerance: Floats
    separation: Floats
    asymmetry: Floats
    residual: Floats
    gradient_norm: Floats
    orbit: Floats
    weakly_held: NDArray[np.int64]
    is_minimum: Floats
    reason: NDArray[np.str_]

    @property
    def index(self) -> Floats:
        """The index of each critical point, (B,): its negative eigenvalues; NaN where unknown or not stationary."""
        return np.where(self.gradient_norm <= STATIONARY, self.negative, np.nan)

    @property
    def null_is_orbit(self) -> Floats:
        """Whether the zero eigenvalues are those of the symmetries alone (Morse-Bott), (B,): 1, 0, NaN where either is unknown."""
        return np.where(np.isnan(self.zero + self.orbit), np.nan, self.zero == self.orbit)


class _Run(NamedTuple):
    """The fields of `Spectrum` for one run, in its order from `negative` on."""

    negative: float
    zero: float
    positive: float
    at_least: float
    coordinates: int
    trace: float
    frobenius: float
    scale: float
    tolerance: float
    separation: float
    asymmetry: float
    residual: float
    gradient_norm: float
    orbit: float
    weakly_held: int
    is_minimum: float
    reason: str


def hessian(
    problem: Problem,
    factors: Sequence[Array],
    *,
    method: Literal["auto", "reduced", "dense", "lanczos"] = "auto",
    lowest: int = 12,
    zero: float = ZERO,
    seed: int = 0,
) -> Spectrum:
    """The spectrum of F's Hessian at every run; factors (H, W_1, ..., W_L[, b]) with B = G * runs first axes, cell-major, on any device.

    features="relu": on the coordinates not held at their bound H = 0. "reduced": exact at any width, at stationary points of linear chains
    of free features (see `ufm.landscape.reduction`; above rank 36 or so Lanczos at the width of the rank); "dense": all eigenvalues;
    "lanczos": at least the `lowest`, from starts of `seed`; "auto": run by run the first that applies, dense up to 1500 coordinates. Zero
    is |eigenvalue| <= tolerance = zero * scale + 100 ||P grad F||/||x|| (at stationary points: there symmetries' eigenvalues are zero up
    to the gradient) + Lanczos residual; where another lies below 100 tolerances the counts are NaN. Lanczos counts all signs only where
    the lowest eigenvalue not listed is clearly positive, the negative ones where it is not negative (as seen from random starts in the
    complement of what is listed). ValueError or TypeError on bad input.
    """
    _check_options(method, lowest, zero)
    rows, points = per_run("hessian", problem, factors)
    if method == "reduced" and not reducible(rows):
        raise ValueError("hessian: method='reduced' needs a linear chain, free features and positive penalties; use 'auto'")
    point = point_of(rows, points)
    methods, listed, runs = [], [], []
    for b in range(len(point.x)):
        found = _found(point, b, method, lowest, zero, np.random.default_rng([seed, b]))
        methods.append(found.method)
        listed.append(_listed(found.part, found.tolerance))
        runs.append(_judged(point, b, found.part, found.tolerance, found.orbit))
    columns = [np.array(column) for column in zip(*runs, strict=True)]
    return Spectrum(np.array(methods), _padded(listed), *columns)


def _check_options(method: str, lowest: int, zero: float) -> None:
    if method not in METHODS:
        raise ValueError(f"hessian: method is {method!r}, but must be one of {', '.join(map(repr, METHODS))}")
    if isinstance(lowest, bool) or not isinstance(lowest, (int, np.integer)) or lowest < 1:
        raise ValueError(f"hessian: lowest is {lowest!r}, but must be a whole number, at least 1")
    if not isinstance(zero, (int, float)) or not 0 < zero < 1 / BAND:
        raise ValueError(f"hessian: zero is {zero!r}, but must be a share of the largest eigenvalue, above 0 and below {1 / BAND}")


class _Found(NamedTuple):
    method: str
    part: Part
    tolerance: float
    orbit: float


def _found(point: Point, b: int, method: str, lowest: int, zero: float, rng: np.random.Generator) -> _Found:
    """Run b's eigenvalues by the method asked for, what counts as zero, and the dimension of its orbit (NaN where unclear)."""
    exact = reduced(point, b, lowest, zero, rng) if method in ("auto", "reduced") and reducible(point.rows) else None
    if exact is not None:
        method, (part, drift, orbit, steepest) = "reduced", exact
    elif method == "reduced":
        return _Found(method, Part(np.zeros(0), np.nan, np.nan, beyond=-np.inf), np.nan, np.nan)
    else:
        method = "dense" if method == "dense" or (method == "auto" and point.x.shape[1] <= DENSE) else "lanczos"
        orbit, flat = orbit_of(point, b)
        image, drift = applied(point, b, flat), float(point.drift[b])
        part = whole(point, b, point.free[b]) if method == "dense" else lanczos(point, b, lowest, zero, rng, flat, image)
        steepest = longest(image)
    apart = part.residual * part.scale if method == "lanczos" and part.beyond > -np.inf else 0.0
    tolerance = float(zero * part.scale + drift + apart)
    flat_there = not point.gradient_norm[b] <= STATIONARY or steepest <= tolerance
    return _Found(method, part, tolerance, orbit if flat_there else np.nan)


def _listed(part: Part, tolerance: float) -> Floats:
    """The lowest eigenvalues, copies and all: those that are known to be the lowest, of a reduced spectrum at most DENSE."""
    known = part.found <= part.beyond + tolerance
    return part.found[known] if part.copies is None else np.repeat(part.found[known], part.copies[known])[:DENSE]


def _judged(point: Point, b: int, part: Part, tolerance: float, orbit: float) -> _Run:
    """Run b: its eigenvalues counted and the point judged."""
    separation, (negative, zero, positive, at_least) = _counts(part, int(point.free[b].sum()), tolerance)
    is_minimum, reason = _verdict(point, b, part, (negative, zero, at_least), tolerance, orbit)
    return _Run(
        negative,
        zero,
        positive,
        at_least,
        int(point.free[b].sum()),
        *part.sums(),
        part.scale,
        tolerance,
        separation,
        part.asymmetry,
        part.residual,
        float(point.gradient_norm[b]),
        orbit,
        int(point.weak[b].sum()),
        is_minimum,
        reason,
    )


def _counts(part: Part, n: int, tolerance: float) -> tuple[float, tuple[float, float, float, float]]:
    """(separation, (negative, zero, positive, at_least)) of one run with n coordinates."""
    values = part.found
    size = np.append(np.abs(values), abs(part.beyond))
    apart = float(size[size > tolerance].min(initial=np.inf))
    separation = apart / tolerance if tolerance > 0 else np.inf
    at_least = part.number(values < -BAND * tolerance)
    if separation < BAND or np.isneginf(part.beyond):
        return separation, (np.nan, np.nan, np.nan, at_least)
    below, null = part.number(values < -tolerance), part.number(np.abs(values) <= tolerance)
    if part.beyond > tolerance:
        return separation, (below, null, n - below - null, at_least)
    return separation, (below if part.beyond >= -tolerance else np.nan, np.nan, np.nan, at_least)


def _verdict(point: Point, b: int, part: Part, counts: tuple[float, float, float], tolerance: float, orbit: float) -> tuple[float, str]:
    """(1, 0 or NaN, the reason): is run b a local minimum?"""
    negative, zero, at_least = counts
    if not point.gradient_norm[b] <= STATIONARY:
        return 0.0, f"not stationary: the scale-free gradient norm is above {STATIONARY:g}"
    if point.kink[b]:
        return np.nan, "a pre-activation is at the kink of the ReLU: F has no second derivative there"
    if at_least > 0:
        return 0.0, f"saddle: {'' if at_least == negative else 'at least '}{at_least:.0f} negative eigenvalues"
    if np.isneginf(part.beyond):
        apart = f"the factors do not share one clear rank to within {MOVED:g} of their norm"
        return np.nan, apart if np.isnan(part.scale) else "Lanczos did not converge"
    if np.isnan(negative):
        return np.nan, "zero and nonzero eigenvalues are not separated"
    if np.isnan(zero):
        return np.nan, "Lanczos sees no negative eigenvalue, but does not count the zero ones"
    if zero > 0 and zero != orbit:
        known = "unclear symmetries" if np.isnan(orbit) else f"symmetries for {orbit:.0f}"
        return np.nan, f"{zero:.0f} zero eigenvalues, but {known}: flat to second order"
    if point.weak[b].any() and not _held_by_curvature(point, b, tolerance):
        return np.nan, "features at their bound without a force: curvature towards them is not told by eigenvalues"
    return 1.0, "positive definite" if zero == 0 else "positive definite across the orbit of its symmetries"


def _held_by_curvature(point: Point, b: int, tolerance: float) -> bool:
    """Whether the Hessian stays positive definite when the features at their bound without a force are let free: enough for a minimum."""
    mask = point.free[b] | point.weak[b]
    return bool(mask.sum() <= DENSE and whole(point, b, mask).found[0] > BAND * tolerance)


def _padded(rows: Sequence[Floats]) -> Floats:
    """Rows of unequal lengths as one array, NaN at their ends."""
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
