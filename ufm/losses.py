"""Losses of logits Z (B, K, cols): value, slope, curve, and where known the convex conjugate a dual bound needs.

value (B, cols) is the loss of each column; slope (B, K, cols) its gradient in Z; curve(Z, T, V) its Hessian applied to V.
conjugate(G, T) = sup_z g.z - loss(z), per column, for slopes G; recentre(G, T, w) moves slopes to a nearby G' in the conjugate's
domain with sum_c w_c g'_c = 0 (what a free bias asks of a dual point). A loss that is not known to be convex has neither.
A new loss is one class with these methods and one line in the tables at the foot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ufm.arrays import Array, column_sums, like, namespace, safe_exp_sum, safe_shares, to_numpy

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Targets:
    """What a loss knows of each column: onehot and soft labels (B, K, cols), sample weight (B, 1, cols), shift a and temperature (B, K, 1).

    soft, weight, shift and temperature are None where they are trivial (onehot, 1, 0, 1); wrong is 1 - onehot.
    """

    onehot: Array
    wrong: Array
    soft: Array | None = None
    weight: Array | None = None
    shift: Array | None = None
    temperature: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> Targets:
        """The same targets with `function` applied to every array in them."""
        parts = (self.onehot, self.wrong, self.soft, self.weight, self.shift, self.temperature)
        return Targets(*(None if part is None else function(part) for part in parts))


def _margins(Z: Array, T: Targets) -> Array:
    """u_j - u_y with u = z/temperature + a, 0 at j = y."""
    U = Z if T.temperature is None else Z / T.temperature
    U = U if T.shift is None else U + T.shift
    return U - column_sums(U * T.onehot)


def _close(wrong: Array, T: Targets) -> Array:
    """Fill in the true class as minus the sum of the others: columns sum to zero without cancellation."""
    return wrong - T.onehot * column_sums(wrong)


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """omega_y [logsumexp(u) - sum_j t_j u_j],  u = z/temperature + a,  t = (1 - eps) e_y + eps/K, in nats.

    label_smoothing eps in [0, 1); class_weights omega (K,) or (G, K); logit_adjustment a: (K,), (G, K), or a scalar tau meaning
    a = tau log(n_k/N) (Menon et al. 2021); temperature: scalar, (K,) or (G, K) (CDT, VS losses).
    """

    label_smoothing: float = 0.0
    class_weights: Any = None
    logit_adjustment: Any = None
    temperature: Any = 1.0
    name: ClassVar[str] = "CE"

    def __post_init__(self) -> None:
        if not isinstance(self.label_smoothing, Real) or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"CrossEntropy: label_smoothing is {self.label_smoothing!r}, but must be a number, at least 0 and below 1")
        for name, rule in (("class_weights", "positive"), ("temperature", "positive"), ("logit_adjustment", "finite")):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            try:
                array = np.array(value, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise TypeError(f"CrossEntropy: {name} is {value!r}, but must be a number or an array of numbers") from error
            if not np.all(np.isfinite(array)) or (rule == "positive" and not np.all(array > 0)):
                raise ValueError(f"CrossEntropy: {name} is {value}, but must be {rule}{' and finite' if rule == 'positive' else ''}")
            if name == "class_weights" and array.ndim == 0:
                raise ValueError(f"CrossEntropy: class_weights is {value}, a single number; give one weight per class, (K,) or (G, K)")
            if array.ndim > 2:
                raise ValueError(f"CrossEntropy: {name} has shape {array.shape}, but must be (K,) or (G, K)")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def plain(self) -> bool:
        """Whether only class weights, if anything, set this loss apart from the textbook cross-entropy."""
        adjust = np.asarray(0.0 if self.logit_adjustment is None else self.logit_adjustment)
        same_shift = np.all(adjust == 0) if adjust.ndim == 0 else np.all(adjust == adjust[..., :1])
        return self.label_smoothing == 0 and bool(same_shift) and bool(np.all(np.asarray(self.temperature) == 1))

    def per_class(self, counts: NDArray[np.int64]) -> dict[str, Floats | None]:
        """weights omega, shift a, temperature, each (G, K) or None where trivial, for counts (G, K)."""
        adjust = self.logit_adjustment
        if adjust is not None and adjust.ndim == 0:
            adjust = adjust * np.log(counts / counts.sum(axis=1, keepdims=True))
        given = {"class_weights": self.class_weights, "logit_adjustment": adjust, "temperature": self.temperature}
        trivial = {"class_weights": 1.0, "logit_adjustment": 0.0, "temperature": 1.0}
        table: dict[str, Floats | None] = {}
        for name, value in given.items():
            G, K = counts.shape
            if value is not None and value.ndim and value.shape not in ((K,), (1, K), (G, K)):
                raise ValueError(
                    f"Problem: the loss's {name} has shape {value.shape}, but there are G = {G} cells of K = {K}; give (K,) or (G, K)"
                )
            same = value is None or bool(np.all(value == trivial[name]))
            table[name] = None if same else np.array(np.broadcast_to(value, counts.shape), dtype=np.float64)
        return table

    def targets(self, onehot: Floats, counts: NDArray[np.int64]) -> Targets:
        """The targets of columns with one-hot labels `onehot` (G, K, cols), in cells of class counts (G, K)."""
        table = self.per_class(counts)
        omega, shift, temperature = table["class_weights"], table["logit_adjustment"], table["temperature"]
        eps, K = self.label_smoothing, onehot.shape[1]
        return Targets(
            onehot,
            1.0 - onehot,
            soft=(1 - eps) * onehot + eps / K if eps else None,
            weight=None if omega is None else omega[:, None, :] @ onehot,
            shift=None if shift is None else shift[:, :, None],
            temperature=None if temperature is None else temperature[:, :, None],
        )

    def value(self, Z: Array, T: Targets) -> Array:
        R = _margins(Z, T)
        loss = safe_exp_sum(R, T.wrong)[0]
        if T.soft is not None:
            loss = loss - column_sums(T.soft * R)
        return (loss if T.weight is None else T.weight * loss)[..., 0, :]

    def slope(self, Z: Array, T: Targets) -> Array:
        return self._slope(*safe_shares(_margins(Z, T), T.wrong), T)

    def value_and_slope(self, Z: Array, T: Targets) -> tuple[Array, Array]:
        R = _margins(Z, T)
        loss, P, rest = safe_exp_sum(R, T.wrong)
        loss = loss if T.soft is None else loss - column_sums(T.soft * R)
        return (loss if T.weight is None else T.weight * loss)[..., 0, :], self._slope(P, rest, T)

    def _slope(self, P: Array, rest: Array, T: Targets) -> Array:
        """From the shares P (B, K, cols) of the wrong classes, 0 at the true one, and their sum."""
        slope = P - T.onehot * rest if T.soft is None else _close(P - T.soft * T.wrong, T)
        slope = slope if T.weight is None else T.weight * slope
        return slope if T.temperature is None else slope / T.temperature

    def curve(self, Z: Array, T: Targets, V: Array) -> Array:
        R = _margins(Z, T)
        P = safe_exp_sum(R, T.wrong)[1]
        V = V if T.temperature is None else V / T.temperature
        X = V - column_sums(V * T.onehot)
        out = _close(P * (X - column_sums(P * X)), T)
        out = out if T.weight is None else T.weight * out
        return out if T.temperature is None else out / T.temperature

    def conjugate(self, G: Array, T: Targets) -> Array:
        """-omega Ent(v) - g.(temperature a) with v = temperature g/omega + t in the simplex, infinite elsewhere."""
        xp = namespace(G)
        tiny = xp.finfo(G.dtype).smallest_normal
        W = (self._shift(G, T) + (T.onehot if T.soft is None else T.soft)) * T.wrong
        rest = column_sums(W)  # 1 - v_y
        inside = xp.all(W >= -1e-15, axis=-2) & (rest[..., 0, :] <= 1 + 1e-15)
        W, rest = xp.clip(W, 0.0, None), xp.clip(rest, 0.0, 1.0)
        minus_entropy = column_sums(W * xp.log(xp.clip(W, tiny, None)))
        minus_entropy = minus_entropy + (1.0 - rest) * xp.log1p(-xp.where(rest < 1.0, rest, 0.0))
        out = minus_entropy if T.weight is None else T.weight * minus_entropy
        if T.shift is not None:
            A = T.shift if T.temperature is None else T.shift * T.temperature
            out = out - column_sums(G * A)
        return xp.where(inside, out[..., 0, :], xp.inf)

    def _shift(self, G: Array, T: Targets) -> Array:
        """v - t, with v the point of the simplex that the slopes G stand for."""
        D = G if T.temperature is None else T.temperature * G
        return D if T.weight is None else D / T.weight

    def recentre(self, G: Array, T: Targets, w: Array) -> Array:
        """The simplex columns v_c form a transport plan w_c omega_c v_cj with known margins; round it to them exactly.

        Rounding as in Altschuler, Weed & Rigollet 2017: shrink the rows that carry too much, then fill the deficits of rows and columns
        by their outer product. Slopes of a column still sum to zero.
        """
        xp = namespace(G)
        soft = T.onehot if T.soft is None else T.soft
        mass = w[..., None, :] if T.weight is None else w[..., None, :] * T.weight  # (B, 1, cols)
        D = self._shift(G, T)  # v - t, which does not cancel
        plan, goal = mass * xp.clip(D + soft, 0.0, None), xp.sum(mass * soft, axis=-1, keepdims=True)
        excess = xp.sum(mass * D, axis=-1, keepdims=True)  # (B, K, 1): the row's total less its goal
        surplus, missing_row = xp.clip(excess, 0.0, None), xp.clip(-excess, 0.0, None)
        taken = plan * (surplus / (goal + surplus))  # (B, K, cols)
        total = column_sums(missing_row)
        fill = missing_row / xp.where(total > 0, total, 1.0) * column_sums(taken)
        V = _close((D + (fill - taken) / mass) * T.wrong, T)
        V = V if T.weight is None else V * T.weight
        return V if T.temperature is None else V / T.temperature


@dataclass(frozen=True)
class MSE:
    """(1/2) ||z - e_y||^2 per sample."""

    name: ClassVar[str] = "MSE"

    def targets(self, onehot: Floats, counts: NDArray[np.int64]) -> Targets:
        return Targets(onehot, 1.0 - onehot)

    def value(self, Z: Array, T: Targets) -> Array:
        return self.value_and_slope(Z, T)[0]

    def slope(self, Z: Array, T: Targets) -> Array:
        return Z - T.onehot

    def value_and_slope(self, Z: Array, T: Targets) -> tuple[Array, Array]:
        E = Z - T.onehot
        return 0.5 * namespace(Z).sum(E * E, axis=-2), E

    def curve(self, Z: Array, T: Targets, V: Array) -> Array:
        return V

    def conjugate(self, G: Array, T: Targets) -> Array:
        return namespace(G).sum(G * (0.5 * G + T.onehot), axis=-2)

    def recentre(self, G: Array, T: Targets, w: Array) -> Array:
        xp = namespace(G)
        w = w[..., None, :]
        return G - xp.sum(w * G, axis=-1, keepdims=True) / xp.sum(w, axis=-1, keepdims=True)


@dataclass(frozen=True)
class DotRegression:
    """(1/2) (z_y - 1)^2 per sample: the logit of the own class alone counts, w_y^T h + b_y -> 1 (Yang et al. 2022). Convex in z.

    Slopes are zero at wrong classes, and the conjugate is infinite elsewhere: where wrong logits are free, so is much of the geometry.
    """

    name: ClassVar[str] = "DR"

    def targets(self, onehot: Floats, counts: NDArray[np.int64]) -> Targets:
        return Targets(onehot, 1.0 - onehot)

    def value(self, Z: Array, T: Targets) -> Array:
        return self.value_and_slope(Z, T)[0]

    def slope(self, Z: Array, T: Targets) -> Array:
        return (Z - 1.0) * T.onehot

    def value_and_slope(self, Z: Array, T: Targets) -> tuple[Array, Array]:
        E = self.slope(Z, T)
        return 0.5 * namespace(Z).sum(E * E, axis=-2), E

    def curve(self, Z: Array, T: Targets, V: Array) -> Array:
        return V * T.onehot

    def conjugate(self, G: Array, T: Targets) -> Array:
        """g_y + g_y^2/2 where g is zero at the wrong classes, infinite elsewhere."""
        xp = namespace(G)
        return xp.where(xp.all(G * T.wrong == 0, axis=-2), xp.sum(G * (0.5 * G + 1.0), axis=-2), xp.inf)

    def recentre(self, G: Array, T: Targets, w: Array) -> Array:
        """Slopes less the weighted mean of their class: nothing is left of class means."""
        xp = namespace(G)
        w = w[..., None, :] * T.onehot
        total = xp.sum(w, axis=-1, keepdims=True)
        share = w / xp.where(total > 0, total, 1.0)  # exactly 1 for a column alone, of which exactly nothing is left
        return (G - xp.sum(share * G, axis=-1, keepdims=True)) * T.onehot


@dataclass(frozen=True)
class Focal:
    """(1 - p_y)^gamma (-log p_y), p = softmax(z) (Lin et al. 2017); gamma = 0 is cross-entropy. Not convex in z."""

    gamma: float
    name: ClassVar[str] = "focal"

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, Real) or not 0 <= self.gamma < np.inf:
            raise ValueError(f"Focal: gamma is {self.gamma!r}, but must be a finite number, at least 0")

    def targets(self, onehot: Floats, counts: NDArray[np.int64]) -> Targets:
        return Targets(onehot, 1.0 - onehot)

    def _of_cross_entropy(self, C: Array) -> tuple[Array, Array, Array]:
        """f(C) = x^gamma C with x = 1 - e^-C, and its first two derivatives."""
        xp, gamma = namespace(C), self.gamma
        p, x = xp.exp(-C), xp.clip(-xp.expm1(-C), xp.finfo(C.dtype).smallest_normal, None)
        ratio = C / x  # 1 at C = 0
        first = x**gamma * (gamma * p * ratio + 1.0)
        second = gamma * x ** (gamma - 1) * p * ((gamma - 1) * p * ratio + 2.0 - C)
        return x**gamma * C, first, second

    def value(self, Z: Array, T: Targets) -> Array:
        return self._of_cross_entropy(CrossEntropy().value(Z, T))[0]

    def slope(self, Z: Array, T: Targets) -> Array:
        return self.value_and_slope(Z, T)[1]

    def value_and_slope(self, Z: Array, T: Targets) -> tuple[Array, Array]:
        C, S = CrossEntropy().value_and_slope(Z, T)
        value, first, _ = self._of_cross_entropy(C)
        return value, first[..., None, :] * S

    def curve(self, Z: Array, T: Targets, V: Array) -> Array:
        C, S = CrossEntropy().value_and_slope(Z, T)
        _, first, second = self._of_cross_entropy(C)
        along = column_sums(S * V)
        return second[..., None, :] * along * S + first[..., None, :] * CrossEntropy().curve(Z, T, V)


@dataclass(frozen=True)
class FromAutograd:
    """Any loss of one logit column: function(z, e_y) -> scalar, both (K,), written with autograd.numpy. See from_autograd."""

    function: Callable[[Any, Any], Any]
    name: ClassVar[str] = "autograd"

    def targets(self, onehot: Floats, counts: NDArray[np.int64]) -> Targets:
        return Targets(onehot, 1.0 - onehot)

    def _columns(self, each: Callable[..., Any], Z: Array, *others: Array) -> Array:
        """`each` applied to every column, in numpy; the result has Z's library and device."""
        parts = [np.moveaxis(to_numpy(x), -2, -1).reshape(-1, x.shape[-2]) for x in (Z, *others)]
        flat = np.stack([np.asarray(each(*columns), dtype=np.float64) for columns in zip(*parts, strict=True)])
        outer = (*Z.shape[:-2], Z.shape[-1])
        return like(flat.reshape(outer) if flat.ndim == 1 else np.moveaxis(flat.reshape(*outer, -1), -1, -2), Z)

    def value(self, Z: Array, T: Targets) -> Array:
        return self._columns(self.function, Z, T.onehot)

    def slope(self, Z: Array, T: Targets) -> Array:
        from autograd import grad

        return self._columns(grad(self.function), Z, T.onehot)

    def value_and_slope(self, Z: Array, T: Targets) -> tuple[Array, Array]:
        return self.value(Z, T), self.slope(Z, T)

    def curve(self, Z: Array, T: Targets, V: Array) -> Array:
        from autograd import hessian_vector_product

        product = hessian_vector_product(self.function)
        return self._columns(lambda z, e, v: product(z, e, v), Z, T.onehot, V)


def from_autograd(value: Callable[[Any, Any], Any]) -> FromAutograd:
    """A loss from `value(z, e_y)`, z and e_y (K,), written with autograd.numpy: its derivatives come from the autograd package.

    Evaluated column by column, so slow beside the losses of TABLE; it has no conjugate, so its points carry no proven gap.
    """
    if not callable(value):
        raise TypeError(f"from_autograd: value is {value!r}, but must be a function of (z, e_y) written with autograd.numpy")
    return FromAutograd(value)


Loss = CrossEntropy | MSE | DotRegression | Focal | FromAutograd
ConvexLoss = CrossEntropy | MSE | DotRegression  # those with a conjugate

TABLE: dict[str, type[Loss]] = {
    "CE": CrossEntropy,
    "MSE": MSE,
    "DR": DotRegression,
    "focal": Focal,
    "autograd": FromAutograd,
}
