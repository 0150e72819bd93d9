"""The curvature of F at a point: eigenvalues of its Hessian per run, their signs, and whether the point is a local minimum.

The geometry is that of samples: weighted coordinates H' = H diag(m)^{1/2}, all else as it is. With class means as columns the deviations
within a class are left out; for a convex loss they add positive eigenvalues only, for free or nonnegative features of a linear chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array
from ufm.certificate import per_run
from ufm.landscape.krylov import lanczos
from ufm.landscape.point import BAND, STATIONARY, Floats, Part, Point, applied, longest, point_of, whole
from ufm.landscape.symmetry import orbit_dimension, orbit_of
from ufm.problem import Problem
from ufm.records import Saved

__all__ = ["Spectrum", "hessian", "orbit_dimension"]

DENSE = 1500  # most coordinates for which "auto" takes the whole spectrum
ZERO = 1e-12  # eigenvalues below this share of the largest are zero in float64


@dataclass(frozen=True, eq=False)
class Spectrum(Saved):
    """The Hessian's eigenvalues at a point, per run; NaN where a number is not known.

    eigenvalues (B, m): ascending, all of them ("dense") or the lowest ("lanczos"), then NaN. negative, zero, positive (B,): how many;
    NaN where the signs are not told apart. at_least (B,): eigenvalues that are negative for certain. coordinates (B,): n. scale (B,):
    largest |eigenvalue| (Lanczos: of those seen). tolerance (B,): zero is |eigenvalue| <= tolerance. separation (B,): the
    smallest |eigenvalue| above the tolerance over the tolerance. asymmetry (B,): of the matrix, over scale. residual (B,): largest
    ||A v - theta v|| in Lanczos, over scale (NaN when dense). gradient_norm (B,), scale-free; 0 where nothing is left to gain in float64.
    orbit (B,): dimension of the known symmetries' orbit (NaN where unclear). weakly_held (B,): features at their bound without a
    force that holds them. is_minimum (B,): 1, 0 or NaN; reason (B,): why.
    """

    kind: ClassVar[str] = "Spectrum"
    method: str
    eigenvalues: Floats
    negative: Floats
    zero: Floats
    positive: Floats
    at_least: Floats
    coordinates: NDArray[np.int64]
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
    method: Literal["auto", "dense", "lanczos"] = "auto",
    lowest: int = 12,
    zero: float = ZERO,
    seed: int = 0,
) -> Spectrum:
    """The spectrum of F's Hessian at every run; factors (H, W_1, ..., W_L[, b]) with B = G * runs first axes, cell-major, on any device.

    features="relu": on the coordinates not held at their bound H = 0. "dense" takes all eigenvalues, "lanczos" at least the `lowest`,
    from starts of `seed`; "auto" is dense up to 1500 coordinates. Zero is |eigenvalue| <= tolerance = zero * scale
    + 100 ||P grad F||/||x|| (at stationary points: there symmetries' eigenvalues are zero up to the gradient) + Lanczos residual;
    where another lies below 100 tolerances the counts are NaN. Lanczos counts all signs only where the lowest eigenvalue not listed is
    clearly positive, the negative ones where it is not negative (as seen from random starts in the complement of what is listed).
    ValueError or TypeError on bad input.
    """
    _check_options(method, lowest, zero)
    try:
        rows, points = per_run(problem, factors)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("certify:", "hessian:", 1).replace("can be certified", "have a spectrum")) from error
    point = point_of(rows, points)
    dense = method == "dense" or (method == "auto" and point.x.shape[1] <= DENSE)
    listed, runs = [], []
    for b in range(len(point.x)):
        rng = np.random.default_rng([seed, b])
        orbit, flat = orbit_of(point, b)
        image = applied(point, b, flat)
        part = whole(point, b, point.free[b]) if dense else lanczos(point, b, lowest, zero, rng, flat, image)
        apart = part.residual * part.scale if np.isfinite(part.residual) and part.beyond > -np.inf else 0.0
        tolerance = float(zero * part.scale + point.drift[b] + apart)
        if point.gradient_norm[b] <= STATIONARY and longest(image) > tolerance:
            orbit = np.nan
        listed.append(part.found[part.found <= part.beyond + tolerance])
        runs.append(_judged(point, b, part, tolerance, orbit))
    columns = [np.array(column) for column in zip(*runs, strict=True)]
    return Spectrum("dense" if dense else "lanczos", _padded(listed), *columns)


def _check_options(method: str, lowest: int, zero: float) -> None:
    if method not in ("auto", "dense", "lanczos"):
        raise ValueError(f"hessian: method is {method!r}, but must be one of 'auto', 'dense', 'lanczos'")
    if isinstance(lowest, bool) or not isinstance(lowest, (int, np.integer)) or lowest < 1:
        raise ValueError(f"hessian: lowest is {lowest!r}, but must be a whole number, at least 1")
    if not isinstance(zero, (int, float)) or not 0 < zero < 1 / BAND:
        raise ValueError(f"hessian: zero is {zero!r}, but must be a share of the largest eigenvalue, above 0 and below {1 / BAND}")


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
    at_least = float(np.sum(part.found < -BAND * tolerance))
    if separation < BAND or np.isneginf(part.beyond):
        return separation, (np.nan, np.nan, np.nan, at_least)
    below, null = float(np.sum(values < -tolerance)), float(np.sum(np.abs(values) <= tolerance))
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
        return np.nan, "Lanczos did not converge"
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
