"""Coordinates of problems with a head or a radius of their own: x holds what is trained; features z, W and b are made from it.

    z = tau x/||x|| column by column (z = x without a radius),   logits = W z + b,   b = -W mu_G,   mu_G = (1/N) sum_c m_c z_c

The gradient passes through the normalisation, through mu_G where the bias is attached, and with a nearest-ETF head through W too: class
means of z about mu_G, their running average, the polar factor. W and the average belong to the coordinates, which stand still between two
steps; `renewed` makes the next ones. Factors are (z, W[, b]): features as used, W and b as they were with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ufm.arrays import Array, by_transpose, column_products, device_of, flatten, like, namespace, norm, place, row_blocks, to_numpy
from ufm.chain import Factors
from ufm.coordinates import Coordinates, weighted
from ufm.etf import NearestETF as Nearest
from ufm.etf import pullback
from ufm.etf_policies import Averaged, averaged
from ufm.heads import FixedETF, Head, NearestETF, UnitRows
from ufm.objective import objective
from ufm.problem import Problem


class Classes(NamedTuple):
    """Which columns belong to which class: onehot (B, K, cols), and columns of a class (B, 1, K).

    each: columns of a class where all have as many (they are sorted by class), else None.
    """

    columns: Array
    onehot: Array
    each: int | None

    def means(self, X: Array, scale: Array) -> Array:
        """The class means (B, d, K) of X scale, X (B, d, cols), scale (B, 1, cols)."""
        if self.each is None:
            return X @ (scale * self.onehot / self.columns.mT).mT
        if self.each == 1:
            return X * scale
        xp = namespace(X)
        return xp.vecdot(*(xp.reshape(x, (*x.shape[:2], -1, self.each)) for x in (X, scale / self.each)))

    def add(self, g: Array, back: Array) -> None:
        """Add to g (B, d, cols), in place, the gradient in z of a function of the class means with gradient `back` (B, d, K)."""
        own = back / self.columns
        if self.each is None:
            g += own @ self.onehot
        else:
            by_class = namespace(g).reshape(g, (*own.shape, self.each))  # a view
            by_class += own[..., None]


class Guide(NamedTuple):
    """The state of a nearest-ETF head: the averaged class means, and the ETF nearest to them."""

    average: Averaged
    nearest: Nearest


@dataclass(frozen=True, eq=False)
class Headed(Coordinates):
    """x = (x_1, ..., x_cols[, W[, b]]) flattened, columns weighted by m_c^{1/2}, as a function of which F and its gradient are given.

    radius tau or None; weights: W (1, K, d) of a fixed head; guide: None before the first `renewed`; penalised: whether any penalty is
    not 0. The gradient norm of a point is that of F in (z, W, b), tangent to the spheres of z and of unit rows: it does not depend on the
    norms of the x_c.
    """

    head: Head = field(kw_only=True)
    radius: float | None = field(kw_only=True)
    classes: Classes = field(kw_only=True)
    weights: Array | None = field(kw_only=True)
    penalised: bool = field(kw_only=True)
    guide: Guide | None = field(default=None, kw_only=True)

    def to_factors(self, x: Array) -> Factors:
        X = self.unpack(x)[0]
        scale = self._scale(X)
        return (X * scale, *self._classifier(x, scale))

    def from_factors(self, factors: Sequence[Array]) -> Array:
        """The trained part of (H, W[, b]): H of any norms, W with unit rows where the head asks for it; other W and b are not read."""
        if self.radius is not None:
            _nonzero("feature column", factors[0].mT, f"radius={self.radius:g}")
        if isinstance(self.head, UnitRows):
            _nonzero("row of W", factors[1], "head=UnitRows")
        trained = [f / s for s, f in zip(self.scales, factors[: len(self.shapes)], strict=True)]
        return self.project(self.pack(trained))

    def logits(self, factors: Sequence[Array]) -> Array:
        return self.objective.logits(factors)

    def value(self, x: Array) -> Array:
        return self.objective.value(self.to_factors(x))

    def gradient(self, x: Array) -> Array:
        slope = self._joined(self._loss(x)[1])
        if self.penalised:
            slope += self.penalty * x
        return slope

    def descend(self, x: Array, step: Array) -> None:
        slopes = self._loss(x)[1]
        if self.penalised:
            x *= 1.0 - step * self.penalty
        start = 0
        for slope in map(flatten, slopes):
            part = x[:, start : start + slope.shape[1]]
            slope *= step
            part -= slope
            start += slope.shape[1]

    def parts(self, x: Array) -> tuple[Array, Array, Array]:
        loss, slopes = self._loss(x)
        penalty = self.penalty * x
        return loss + 0.5 * namespace(x).vecdot(penalty, x), self._joined(slopes), penalty

    def hessian_product(self, x: Array, v: Array) -> Array:
        raise ValueError("Headed.hessian_product: second derivatives are given for head=Learned() and radius=None only; use `gradient`")

    def stationarity(self, x: Array) -> tuple[Array, Array]:
        """||P grad F|| in (z, W, b), (B,), and where it is 0: no penalty gives it a scale."""
        slopes = list(self.unpack(self.projected(x, self.gradient(x))))
        if self.radius is not None:
            slopes[0] = slopes[0] / self._scale(self.unpack(x)[0]) * self.scales[0]
        size = norm(self.pack(slopes))
        return size, size == 0

    def project(self, x: Array) -> Array:
        """x with unit rows of W where the head asks for them, changed in place."""
        if isinstance(self.head, UnitRows):
            rows, (K, d) = self.unpack(x)[1], self.shapes[1]
            part = x[:, x.shape[1] - self._after_features() :][:, : K * d]
            part /= namespace(x).repeat(norm(rows), d, axis=1)
        return x

    def projected(self, x: Array, gradient: Array) -> Array:
        """The gradient without its part along unit rows of W; that along x_c is 0 by itself."""
        if not isinstance(self.head, UnitRows):
            return gradient
        rows, (features, slope, *bias) = self.unpack(x)[1], self.unpack(gradient)
        return self.pack([features, slope - rows * namespace(x).vecdot(rows, slope)[..., None], *bias])

    def renewed(self, x: Array) -> Headed:
        """The coordinates of the step from x: class means of z averaged with the stored ones, the nearest ETF to the average as W.

        A run whose averaged means are not finite, or all equal where they have a weight, so that every frame is as near, gets the ETF of
        the unit vectors.
        """
        if not isinstance(self.head, NearestETF):
            return self
        xp = namespace(x)
        X = self.unpack(x)[0]
        scale = self._scale(X)
        means, centre = self.classes.means(X, scale), self._centre(X, scale)
        before, previous = self.guide or (None, None)
        average = averaged(before, means - centre, averaging=self.head.averaging, missing=self.head.missing, centre=centre)
        shown, sound = average.means, _apart(average.means, self.head.weights)
        if not bool(xp.all(sound)):
            shown = xp.where(sound, shown, like(np.eye(*means.shape[1:]), x))
        nearest = self.head.nearest(shown, None if previous is None else previous.U)
        return replace(self, guide=Guide(average, nearest))

    def pick(self, runs: Array) -> Headed:
        def take(x: Array) -> Array:
            return namespace(x).take(x, runs, axis=0)

        columns, onehot, each = self.classes
        return replace(
            self,
            objective=self.objective.pick(runs),
            unit=take(self.unit),
            penalty=take(self.penalty),
            scales=tuple(map(take, self.scales)),
            classes=Classes(take(columns), take(onehot), each),
            guide=None if self.guide is None else _picked(self.guide, runs),
        )

    def _joined(self, slopes: Sequence[Array]) -> Array:
        """`pack` of arrays of their own: no copy of a single one."""
        return flatten(slopes[0]) if len(slopes) == 1 else self.pack(slopes)

    def _after_features(self) -> int:
        return sum(r * c for r, c in self.shapes[1:])

    def _scale(self, X: Array) -> Array:
        """z over x, (B, 1, cols)."""
        return self.scales[0] if self.radius is None else self.radius / namespace(X).sqrt(column_products(X, X))

    def _centre(self, X: Array, scale: Array) -> Array:
        """mu_G of X scale, (B, d, 1)."""
        return X @ (scale * self.objective.column_weight).mT

    def _classifier(self, x: Array, scale: Array) -> Factors:
        """W[, b] as used, with the features that are scale times those in x."""
        X, *trained = self.unpack(x)
        if self.head.trained:
            return tuple(s * f for s, f in zip(self.scales[1:], trained, strict=True))
        W: Array = self.weights if self.guide is None else self.guide.nearest.W
        W = namespace(x).broadcast_to(W, (x.shape[0], *W.shape[1:]))
        return (W,) if self.head.bias is None else (W, -(W @ self._centre(X, scale)))

    def _loss(self, x: Array) -> tuple[Array, list[Array]]:
        """The loss part of F, (B,), and its gradient in each trained part, in arrays of their own.

        z = X scale is nowhere made: it is as large as x, and passing over it once more costs as much as a product with W.
        """
        F, head, xp = self.objective, self.head, namespace(x)
        X = self.unpack(x)[0]
        scale = self._scale(X)
        W, *bias = self._classifier(x, scale)
        Z = W @ X * scale
        losses, slope = F.loss.value_and_slope(Z + bias[0] if bias else Z, F.targets)
        slope = slope * F.column_weight
        if head.bias == "attached":  # logits W (z - mu_G)
            slope -= xp.sum(slope, axis=-1, keepdims=True) * F.column_weight
        g, own = W.mT @ slope, []
        if head.trained:
            own = [by_transpose(slope * scale, X), *(xp.sum(slope, axis=-1, keepdims=True) for _ in bias)]
        elif isinstance(head, NearestETF) and head.gradient and self.guide is not None:
            average, nearest = self.guide
            back = pullback(nearest, by_transpose(slope * scale, X), guard=head.guard)  # sums to zero over classes, so in mu_G
            self.classes.add(g, average.rate * back)
        if self.radius is None:
            g *= scale
        else:  # scale (g - z z^T g/tau^2), z = X scale
            along = column_products(X, g) * (scale / self.radius) ** 2
            for rows in row_blocks(g):
                part = g[:, rows, :]
                part -= X[:, rows, :] * along
                part *= scale
        return xp.vecdot(losses, F.column_weight[:, 0, :]), [g, *own]


def coordinates(problem: Problem, device: str = "numpy") -> Coordinates:
    """The coordinates that rules step in: `weighted` ones of the plain model, else those of its head and radius."""
    if problem.special is None:
        return weighted(problem, device=device)
    G, head, bare = problem.cells, problem.head, objective(problem)
    m, columns = problem.multiplicity[:, None, :], np.sum(bare.targets.onehot, axis=-1)[:, None, :]
    shapes = tuple(bare.chain.shapes(problem.width, problem.classes, problem.labels.shape[1]))
    shapes = shapes if head.trained else shapes[:1]
    lam = [problem.lam_h, problem.lam_w[:, 0], *([] if problem.lam_b is None else [problem.lam_b])][: len(shapes)]
    penalty = np.stack(lam, axis=1)
    even = np.all(columns == columns[0, 0, 0])

    def put(x: Any) -> Array:
        return place(x, device)

    placed = bare.map(put)
    return Headed(
        placed,
        put(np.ones(G)),
        put(np.repeat(penalty, [r * c for r, c in shapes], axis=1) if np.any(penalty != penalty[:, :1]) else penalty[:, :1]),
        tuple(put(s) for s in (1.0 / np.sqrt(m), np.ones((G, 1, 1)), np.ones((G, 1, 1))))[: len(shapes)],
        shapes,
        put(np.full(1, -np.inf)),
        False,
        head=head,
        radius=problem.radius,
        classes=Classes(put(columns), placed.targets.onehot, int(columns[0, 0, 0]) if even else None),
        weights=put(head.weights(problem.classes, problem.width)[None]) if isinstance(head, FixedETF) else None,
        penalised=bool(np.any(penalty > 0)),
    )


def _picked(guide: Guide, runs: Array) -> Guide:
    """The state of the given runs alone."""

    def take(x: Any) -> Any:
        return None if x is None else tuple(x[int(i)] for i in runs) if isinstance(x, tuple) else namespace(x).take(x, runs, axis=0)

    average, posed = guide.average, guide.nearest.posed
    posed = posed._replace(A=take(posed.A), means=take(posed.means), size=take(posed.size))
    arrays = {f.name: take(getattr(guide.nearest, f.name)) for f in fields(Nearest) if f.name != "posed"}
    return Guide(Averaged(average.t, *map(take, average[1:])), Nearest(**arrays, posed=posed))


def _apart(means: Array, weights: Any) -> Array:
    """Whether class means (B, d, K) are finite, and those of the classes that have a weight differ by more than rounding, (B, 1, 1)."""
    xp = namespace(means)
    finite = xp.isfinite(xp.sum(means, axis=(-2, -1), keepdims=True))
    if weights is not None:
        means = xp.take(means, xp.asarray(np.flatnonzero(to_numpy(weights)), device=device_of(means)), axis=-1)
    spread = means - xp.mean(means, axis=-1, keepdims=True)
    far, size = (xp.max(xp.abs(x), axis=(-2, -1), keepdims=True) for x in (spread, means))
    return finite & (far > 8 * xp.finfo(means.dtype).eps * size)


def _nonzero(what: str, rows: Array, why: str) -> None:
    if bool(namespace(rows).any(norm(rows) == 0)):
        raise ValueError(f"simulate: a {what} of the start is 0, but {why} sets its norm and needs a direction; start elsewhere")
