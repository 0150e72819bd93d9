"""Coordinates that local solvers and rules move in: the factors rescaled and flattened per run, and F as a function of them.

Balanced: every penalty is g/2 times a squared norm, g = (lam_h prod_l lam_w[l])^{1/(L+1)}, and F is measured in units of g; solvers work
there, and the scale-free gradient norm is measured there. Weighted: H' = H diag(m)^{1/2}, all else as it is; rules step there, so that
descent on class means equals descent on samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, flatten, namespace, norm, place
from ufm.chain import Factors, rectify
from ufm.objective import Objective, objective
from ufm.problem import Problem

SMALLEST_UNIT = 1e-140  # of F: smaller penalties would overflow the squares of slopes
NEGLIGIBLE = 1e-28  # squared gradient over value: nothing left to gain in float64


Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Coordinates x of a batch, flattened per run to (B, n): factor = scale * x, and F/unit as a function of x.

    scales: one per factor, broadcasting; unit (B,); penalty (B, n): that of each coordinate in this unit, (B, 1) where a run has one for
    all, None where all are 1; lower (n,): bounds of the coordinates, 0 or -inf; bounded: whether any is 0.
    """

    objective: Objective
    unit: Array
    penalty: Array | None
    scales: tuple[Array, ...]
    shapes: tuple[tuple[int, int], ...]
    lower: Array
    bounded: bool = True

    def unpack(self, x: Array) -> Factors:
        """(B, n) -> one array per factor, in these coordinates."""
        parts, start = [], 0
        for shape in self.shapes:
            size = shape[0] * shape[1]
            parts.append(namespace(x).reshape(x[:, start : start + size], (x.shape[0], *shape)))
            start += size
        return tuple(parts)

    def pack(self, parts: Sequence[Array]) -> Array:
        """The inverse of `unpack`."""
        return namespace(*parts).concat([flatten(p) for p in parts], axis=1)

    def to_factors(self, x: Array) -> Factors:
        """(B, n) -> the problem's own factors."""
        return tuple(s * p for s, p in zip(self.scales, self.unpack(x), strict=True))

    def from_factors(self, factors: Sequence[Array]) -> Array:
        """The problem's own factors -> (B, n)."""
        return self.pack([f / s for s, f in zip(self.scales, factors, strict=True)])

    def logits(self, factors: Sequence[Array]) -> Array:
        """Z (B, K, cols) of the problem's own factors, bias included."""
        return self.objective.logits(self.unpack(self.from_factors(factors)))

    def renewed(self, x: Array) -> Coordinates:
        """The coordinates of the next step from x: themselves, where the classifier is a factor (see `ufm.headed`)."""
        return self

    def aligned(self, U: Array, s: Array, Vt: Array, bias: Sequence[Array]) -> Array:
        """x (B, n) with factors S^{1/(L+1)} along the first coordinates, whose product is U S V^T: the cheapest factors of that product.

        U (B, K, r), s (B, r), Vt (B, r, cols), numpy; of more than d directions the first d are kept.
        """
        L = self.objective.chain.depth
        r = min(s.shape[1], self.shapes[0][0])
        root = s[:, :r] ** (1.0 / (L + 1))
        parts = [np.zeros((len(s), *shape)) for shape in self.shapes[: L + 1]]
        parts[0][:, :r] = root[:, :, None] * Vt[:, :r]
        for layer in range(1, L):
            parts[layer][:, range(r), range(r)] = root
        parts[L][:, :, :r] = U[:, :, :r] * root[:, None, :]
        return self.pack([*parts, *bias])

    def value(self, x: Array) -> Array:
        """F/unit, (B,)."""
        return self.objective.value(self.unpack(x))

    def value_and_gradient(self, x: Array) -> tuple[Array, Array]:
        """F/unit (B,) and its gradient (B, n)."""
        value, slope, penalty = self.parts(x)
        slope += penalty
        return value, slope

    def gradient(self, x: Array) -> Array:
        """The gradient of F/unit, (B, n), in an array of its own."""
        slope = self.pack(self.objective.loss_part(self.unpack(x))[1])
        slope += self._penalty_slope(x)
        return slope

    def descend(self, x: Array, step: Array) -> None:
        """x <- x - step grad F(x)/unit in place, step (B, 1): x is passed over half as often as with a gradient in an array of its own."""
        slopes = self.objective.loss_slopes(self.unpack(x), -step[:, :, None])
        if self.objective.chain.features_rectified:
            x -= step * self._penalty_slope(x)
        else:
            x *= 1.0 - step * (1.0 if self.penalty is None else self.penalty)
        start = 0
        for slope in map(flatten, slopes):
            part = x[:, start : start + slope.shape[1]]
            part += slope
            start += slope.shape[1]

    def parts(self, x: Array) -> tuple[Array, Array, Array]:
        """F/unit (B,), and the gradients (B, n) of its loss part and of its penalty part."""
        loss, slopes = self.objective.loss_part(self.unpack(x))
        penalty = self._penalty_slope(x)
        return loss + 0.5 * namespace(x).vecdot(penalty, x), self.pack(slopes), penalty

    def hessian_product(self, x: Array, v: Array) -> Array:
        """The Hessian of F/unit applied to v, (B, n)."""
        return self.pack(self.objective.hessian_product(self.unpack(x), self.unpack(v)))

    def scale_free_norm(self, x: Array) -> Array:
        """||P grad F|| / max(||grad loss part||, ||grad penalty part||), (B,): 0 where both vanish, ||P grad F|| without penalty.

        P drops the components that push a coordinate against its bound H >= 0.
        """
        return self.stationarity(x)[0]

    def stationarity(self, x: Array) -> tuple[Array, Array]:
        """The scale-free norm (B,), and where ||P grad F||^2 <= 1e-28 |F|, per unit: nothing is left to gain in float64, (B,) bool.

        Without any penalty F itself may fall to 0, at any scale of it, and only a gradient of 0 has nothing left to gain.
        """
        xp = namespace(x)
        value, slope, penalty = self.parts(x)
        gradient = norm(self.projected(x, slope + penalty))
        size = xp.maximum(norm(slope), norm(penalty))
        relative = gradient / xp.where(size > 0, size, 1.0)
        flat = gradient * gradient <= NEGLIGIBLE * xp.abs(value)
        if self.penalty is not None:
            penalised = xp.max(self.penalty, axis=-1) > 0
            relative, flat = xp.where(penalised, relative, gradient), flat & (penalised | (gradient == 0))
        return relative, flat

    def _penalty_slope(self, x: Array) -> Array:
        return self._rectified(x) if self.penalty is None else self.penalty * self._rectified(x)

    def _rectified(self, x: Array) -> Array:
        if not self.objective.chain.features_rectified:
            return x
        features = self.shapes[0][0] * self.shapes[0][1]
        return namespace(x).concat([rectify(x[:, :features]), x[:, features:]], axis=1)

    def project(self, x: Array) -> Array:
        """The nearest point within the bounds."""
        return namespace(x).maximum(x, self.lower) if self.bounded else x

    def projected(self, x: Array, gradient: Array) -> Array:
        """The gradient without the components that point out of the bounds."""
        return namespace(x).where((x <= self.lower) & (gradient > 0), 0.0, gradient) if self.bounded else gradient

    def pick(self, runs: Array) -> Coordinates:
        """The given runs alone."""

        def take(x: Array) -> Array:
            return namespace(x).take(x, runs, axis=0)

        return replace(
            self,
            objective=self.objective.pick(runs),
            unit=take(self.unit),
            penalty=None if self.penalty is None else take(self.penalty),
            scales=tuple(map(take, self.scales)),
        )


def balanced(problem: Problem, runs: int = 1, device: str = "numpy") -> Coordinates:
    """The balanced coordinates of `problem` for B = G * runs runs.

    H_:c = sqrt(g/(lam_h m_c)) x_c,  W_l = sqrt(g/lam_l) x_l, so the logits of column c carry the scale m_c^{-1/2}. Where a penalty is 0
    the weights keep scale 1, H_:c = m_c^{-1/2} x_c, and the unit is 1. The bias is scaled to unit curvature at an optimum of
    cross-entropy, where the wrong classes of class k carry the probability g sqrt(n_k)/pi_k up to a factor near 1.
    """
    lam = np.concatenate([problem.lam_h[:, None], problem.lam_w], axis=1)
    with np.errstate(divide="ignore"):
        g = np.exp(np.mean(np.log(lam), axis=1))[:, None]
    penalised = g > 0
    scales = np.sqrt(np.where(penalised, g / np.where(penalised, lam, 1.0), 1.0))
    unit = np.where(penalised, np.maximum(g, SMALLEST_UNIT), 1.0)
    levels = np.where(penalised, g / unit, lam)
    bias_scale = None
    if problem.lam_b is not None:
        bias_scale = 1.0 / np.sqrt(problem.lam_b / unit[:, 0] + np.sqrt(problem.multiplicity).mean(axis=-1))
    return _scaled(problem, scales, unit[:, 0], levels, bias_scale, runs, device)


def weighted(problem: Problem, runs: int = 1, device: str = "numpy") -> Coordinates:
    """The weighted coordinates of `problem` for B = G * runs runs: H' = H diag(m)^{1/2}, all other factors as they are, unit 1."""
    lam = np.concatenate([problem.lam_h[:, None], problem.lam_w], axis=1)
    ones = np.ones_like(lam)
    return _scaled(problem, ones, ones[:, 0], lam, None if problem.lam_b is None else ones[:, 0], runs, device)


def _scaled(
    problem: Problem, scales: Floats, unit: Floats, levels: Floats, bias_scale: Floats | None, runs: int, device: str
) -> Coordinates:
    """H_:c = scales_0 m_c^{-1/2} x_c, W_l = scales_l x_l, b = bias_scale x_b; penalties `levels` (G, L + 1) of their squares, per unit."""
    if problem.special is not None:
        raise ValueError(
            f"solve, certify, hessian, classify: the problem has {problem.special}, but they apply to head=Learned() and radius=None; "
            "use ufm.simulate"
        )
    natural = objective(problem)
    root_m = np.sqrt(problem.multiplicity)[:, None, :]
    units: list[Any] = [s[:, None, None] for s in scales.T]
    units[0] = units[0] / root_m
    penalties = [level[:, None, None] for level in levels.T]
    if bias_scale is not None:
        units.append(bias_scale[:, None, None])
        penalties.append(natural.penalties[-1] / unit[:, None, None] * units[-1] ** 2)
    shapes = tuple(natural.chain.shapes(problem.width, problem.classes, problem.labels.shape[1]))
    lower = np.full(sum(r * c for r, c in shapes), -np.inf)
    if problem.features == "relu":
        lower[: shapes[0][0] * shapes[0][1]] = 0.0
    flat = np.concatenate([p[:, :, 0] for p in penalties], axis=1)
    flat = np.repeat(flat, [r * c for r, c in shapes], axis=1) if np.any(flat != flat[:, :1]) else flat[:, :1]

    def spread(x: Any) -> Array:
        return place(np.repeat(x, runs, axis=0), device)

    rescaled = replace(
        natural,
        column_weight=natural.column_weight / unit[:, None, None],
        column_scale=1.0 / root_m,
        penalties=tuple(penalties),
        bias_scale=None if bias_scale is None else units[-1],
    )
    return Coordinates(
        rescaled.map(spread),
        spread(unit),
        None if np.all(flat == 1) else spread(flat),
        tuple(spread(u) for u in units),
        shapes,
        place(lower, device),
        problem.features == "relu",
    )
