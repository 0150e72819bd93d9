"""The one convention, and all that local solvers and rules see of a problem: value, gradient and Hessian product, per run.

    F = sum_c (m_c/N) loss(Z_:c, y_c) + sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2) sum_c m_c ||H_:c||^2 + (lam_b/2)||b||^2

With relu_of_free features the penalty is that of H = relu(V).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ufm.arrays import Array, flatten, namespace, place
from ufm.chain import Chain, forward, pullback, push, push_pullback, rectify
from ufm.losses import Loss, Targets
from ufm.problem import Problem


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
        value = namespace(losses).vecdot(losses, self.column_weight[:, 0, :])
        return value, self._pulled_back(factors, layers, slope * self.column_weight)

    def loss_slopes(self, factors: Sequence[Array], times: Array) -> list[Array]:
        """`times` (B, 1, 1) the gradient of the loss part."""
        Z, layers = self._logits(factors)
        return self._pulled_back(factors, layers, self.loss.slope(Z, self.targets) * (self.column_weight * times))

    def _pulled_back(self, factors: Sequence[Array], layers: Sequence[Array], slope: Array) -> list[Array]:
        """Gradients in the factors of a function with gradient `slope` in the logits."""
        gradient = pullback(self.chain, factors, layers, slope if self.column_scale is None else slope * self.column_scale)
        if self.chain.bias:
            gradient.append(self._bias(namespace(slope).sum(slope, axis=-1, keepdims=True)))
        return gradient

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
    if problem.biased:
        penalties.append((np.zeros(problem.cells) if problem.lam_b is None else problem.lam_b)[:, None, None])
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
    return Chain(problem.depth, problem.features == "relu_of_free", problem.activation == "relu", problem.biased)
