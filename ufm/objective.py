"""The one convention, and all that local solvers and rules see of a problem: value, gradient and Hessian product, per run.

    F = sum_c (m_c/N) loss(Z_:c, y_c) + sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2) sum_c m_c ||H_:c||^2 + (lam_b/2)||b||^2

With relu_of_free features the penalty is that of H = relu(V). Balanced coordinates are the factors rescaled so that every penalty is
g/2 times a squared norm, g = (lam_h prod_l lam_w[l])^{1/(L+1)}, and F is measured in units of g: solvers work there, and the scale-free
gradient norm is measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ufm.arrays import Array, flatten, namespace, norm, place
from ufm.chain import Chain, Factors, forward, pullback, push, push_pullback, rectify
from ufm.losses import Loss, Targets
from ufm.problem import Problem

SMALLEST_UNIT = 1e-140  # of F: smaller penalties would overflow the squares of slopes


@dataclass(frozen=True, eq=False)
class Objective:
    """F of a batch of B runs, as a function of their factors (H, W_1, ..., W_L[, b]).

    column_weight m_c/N (B, 1, cols); penalties: one array per factor that broadcasts against it. In rescaled coordinates column_scale
    (B, 1, cols) multiplies the chain's logits and bias_scale (B, 1, 1) the bias; None stands for 1.
    """

    chain: Chain
    loss: Loss
    targets: Targets
    column_weight: Array
    column_scale: Array | None
    penalties: tuple[Array, ...]
    bias_scale: Array | None = None

    def logits(self, factors: Sequence[Array]) -> Array:
        """Z (B, K, cols), bias included."""
        return self._logits(factors)[0]

    def value(self, factors: Sequence[Array]) -> Array:
        """F, (B,)."""
        losses = self.loss.value(self.logits(factors), self.targets)
        return namespace(losses).vecdot(losses, self.column_weight[:, 0, :]) + self.penalty_part(factors)[0]

    def value_and_gradient(self, factors: Sequence[Array]) -> tuple[Array, list[Array]]:
        """F (B,) and its gradient, one array per factor."""
        (loss, loss_slopes), (penalty, penalty_slopes) = self.loss_part(factors), self.penalty_part(factors)
        return loss + penalty, [a + b for a, b in zip(loss_slopes, penalty_slopes, strict=True)]

    def loss_part(self, factors: Sequence[Array]) -> tuple[Array, list[Array]]:
        """sum_c (m_c/N) loss_c, (B,), and its gradient."""
        Z, layers = self._logits(factors)
        losses, slope = self.loss.value_and_slope(Z, self.targets)
        slope = slope * self.column_weight
        inner = slope if self.column_scale is None else slope * self.column_scale
        gradient = pullback(self.chain, factors, layers, inner)
        if self.chain.bias:
            gradient.append(self._bias(namespace(slope).sum(slope, axis=-1, keepdims=True)))
        return namespace(losses).vecdot(losses, self.column_weight[:, 0, :]), gradient

    def penalty_part(self, factors: Sequence[Array]) -> tuple[Array, list[Array]]:
        """The penalties' sum, (B,), and its gradient."""
        first = rectify(factors[0]) if self.chain.features_rectified else factors[0]
        slopes = [p * x for p, x in zip(self.penalties, [first, *factors[1:]], strict=True)]
        flat = [(flatten(slope), flatten(x)) for slope, x in zip(slopes, factors, strict=True)]
        return sum(0.5 * namespace(a).vecdot(a, b) for a, b in flat), slopes

    def slope(self, factors: Sequence[Array]) -> Array:
        """The loss's gradient in the logits of each column, before the weights m_c/N, (B, K, cols)."""
        return self.loss.slope(self.logits(factors), self.targets)

    def hessian_product(self, factors: Sequence[Array], moves: Sequence[Array]) -> list[Array]:
        """The Hessian of F applied to `moves` (arrays as the factors), per run."""
        chain, s = self.chain, self.column_scale
        Z, layers = self._logits(factors)
        slope = self.loss.slope(Z, self.targets) * self.column_weight
        Z_change, changes = push(chain, factors, layers, moves)
        Z_change = Z_change if s is None else Z_change * s
        Z_change = Z_change + self._bias(moves[-1]) if chain.bias else Z_change
        slope_change = self.loss.curve(Z, self.targets, Z_change) * self.column_weight
        scaled, scaled_change = (slope, slope_change) if s is None else (slope * s, slope_change * s)
        product = push_pullback(chain, factors, layers, scaled, moves, changes, scaled_change)
        if chain.bias:
            product.append(self._bias(namespace(slope).sum(slope_change, axis=-1, keepdims=True)))
        penalised = [changes[0], *moves[1:]]
        return [a + p * x for a, p, x in zip(product, self.penalties, penalised, strict=True)]

    def map(self, function: Callable[[Array], Array]) -> Objective:
        """The same objective with `function` applied to every array in it (placing, picking runs, repeating)."""
        return replace(
            self,
            targets=self.targets.map(function),
            column_weight=function(self.column_weight),
            column_scale=None if self.column_scale is None else function(self.column_scale),
            penalties=tuple(function(p) for p in self.penalties),
            bias_scale=None if self.bias_scale is None else function(self.bias_scale),
        )

    def pick(self, runs: Array) -> Objective:
        """The objective of the given runs (integer indices) alone."""
        return self.map(lambda x: namespace(x).take(x, runs, axis=0))

    def _logits(self, factors: Sequence[Array]) -> tuple[Array, list[Array]]:
        Z, layers = forward(self.chain, factors)
        Z = Z if self.column_scale is None else Z * self.column_scale
        return (Z + self._bias(factors[-1]) if self.chain.bias else Z), layers

    def _bias(self, b: Array) -> Array:
        return b if self.bias_scale is None else self.bias_scale * b


def objective(problem: Problem, runs: int = 1, device: str = "numpy") -> Objective:
    """F of `problem` for a batch of B = G * runs runs, cell-major: runs of one cell follow each other."""
    onehot = np.moveaxis(np.eye(problem.classes)[problem.labels], -1, -2)  # (G, K, cols)
    m = problem.multiplicity[:, None, :]
    penalties = [problem.lam_h[:, None, None] * m, *(w[:, None, None] for w in problem.lam_w.T)]
    if problem.lam_b is not None:
        penalties.append(problem.lam_b[:, None, None])
    per_cell = Objective(
        chain_of(problem),
        problem.loss,
        problem.loss.targets(onehot, problem.counts),
        m / problem.samples[:, None, None],
        None,
        tuple(penalties),
    )
    return per_cell.map(lambda x: place(np.repeat(x, runs, axis=0), device))


def chain_of(problem: Problem) -> Chain:
    """The factor chain of a problem."""
    return Chain(problem.depth, problem.features == "relu_of_free", problem.activation == "relu", problem.lam_b is not None)


@dataclass(frozen=True, eq=False)
class Balanced:
    """Balanced coordinates x of a batch, flattened per run to (B, n): factor = scale * x, and F/unit as a function of x.

    scales: one per factor, broadcasting; unit (B,): g, or 1 where a penalty is 0; penalty (B, n): that of each coordinate in this unit,
    None where all are 1; lower (n,): bounds of the coordinates, 0 or -inf.
    """

    objective: Objective
    unit: Array
    penalty: Array | None
    scales: tuple[Array, ...]
    shapes: tuple[tuple[int, int], ...]
    lower: Array

    def unpack(self, x: Array) -> Factors:
        """(B, n) -> one array per factor, in balanced coordinates."""
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

    def parts(self, x: Array) -> tuple[Array, Array, Array]:
        """F/unit (B,), and the gradients (B, n) of its loss part and of its penalty part."""
        loss, slopes = self.objective.loss_part(self.unpack(x))
        penalty = self._rectified(x) if self.penalty is None else self.penalty * self._rectified(x)
        return loss + 0.5 * namespace(x).vecdot(penalty, x), self.pack(slopes), penalty

    def hessian_product(self, x: Array, v: Array) -> Array:
        """The Hessian of F/unit applied to v, (B, n)."""
        return self.pack(self.objective.hessian_product(self.unpack(x), self.unpack(v)))

    def scale_free_norm(self, x: Array) -> Array:
        """||P grad F|| / max(||grad loss part||, ||grad penalty part||), (B,): 0 where both vanish, ||P grad F|| without penalty.

        P drops the components that push a coordinate against its bound H >= 0.
        """
        xp = namespace(x)
        _, slope, penalty = self.parts(x)
        gradient = norm(self.projected(x, slope + penalty))
        size = xp.maximum(norm(slope), norm(penalty))
        if self.penalty is None:
            return gradient / xp.where(size > 0, size, 1.0)
        return xp.where(xp.max(self.penalty, axis=-1) > 0, gradient / xp.where(size > 0, size, 1.0), gradient)

    def _rectified(self, x: Array) -> Array:
        if not self.objective.chain.features_rectified:
            return x
        features = self.shapes[0][0] * self.shapes[0][1]
        return namespace(x).concat([rectify(x[:, :features]), x[:, features:]], axis=1)

    def projected(self, x: Array, gradient: Array) -> Array:
        """The gradient without the components that point out of the bounds."""
        return namespace(x).where((x <= self.lower) & (gradient > 0), 0.0, gradient)

    def pick(self, runs: Array) -> Balanced:
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


def balanced(problem: Problem, runs: int = 1, device: str = "numpy") -> Balanced:
    """The balanced coordinates of `problem` for B = G * runs runs.

    H_:c = sqrt(g/(lam_h m_c)) x_c,  W_l = sqrt(g/lam_l) x_l, so the logits of column c carry the scale m_c^{-1/2}. Where a penalty is 0
    the weights keep scale 1 and H_:c = m_c^{-1/2} x_c. The bias is scaled to unit curvature at an optimum of cross-entropy, where the wrong
    classes of class k carry the probability g sqrt(n_k)/pi_k up to a factor near 1.
    """
    lam = np.concatenate([problem.lam_h[:, None], problem.lam_w], axis=1)
    with np.errstate(divide="ignore"):
        g = np.exp(np.mean(np.log(lam), axis=1))[:, None]
    penalised = g > 0
    scales = np.sqrt(np.where(penalised, g / np.where(penalised, lam, 1.0), 1.0))[:, :, None, None]  # (G, L + 1, 1, 1)
    unit = np.where(penalised, np.maximum(g, SMALLEST_UNIT), 1.0)[:, :, None]  # (G, 1, 1)
    levels = np.where(penalised, g / unit[:, 0], lam)[:, :, None, None]
    root_m = np.sqrt(problem.multiplicity)[:, None, :]
    natural = objective(problem)
    units: list[Any] = [scales[:, 0] / root_m, *np.moveaxis(scales[:, 1:], 1, 0)]
    penalties = list(np.moveaxis(levels, 1, 0))
    if natural.chain.bias:
        curvature = natural.penalties[-1] / unit + root_m.mean(axis=-1, keepdims=True)
        units.append(1.0 / np.sqrt(curvature))
        penalties.append(natural.penalties[-1] / unit / curvature)
    shapes = tuple(natural.chain.shapes(problem.width, problem.classes, problem.labels.shape[1]))
    lower = np.full(sum(r * c for r, c in shapes), -np.inf)
    if problem.features == "relu":
        lower[: shapes[0][0] * shapes[0][1]] = 0.0
    flat = np.concatenate([np.repeat(p[:, :, 0], r * c, axis=1) for p, (r, c) in zip(penalties, shapes, strict=True)], axis=1)

    def spread(x: Any) -> Array:
        return place(np.repeat(x, runs, axis=0), device)

    rescaled = replace(
        natural,
        column_weight=natural.column_weight / unit,
        column_scale=1.0 / root_m,
        penalties=tuple(penalties),
        bias_scale=units[-1] if natural.chain.bias else None,
    )
    return Balanced(
        rescaled.map(spread),
        spread(unit[:, 0, 0]),
        None if np.all(flat == 1) else spread(flat),
        tuple(spread(u) for u in units),
        shapes,
        place(lower, device),
    )
