"""Unequal classes, cross-entropy, free features: the solution made of one simplex block per group of equal classes.

    Z = sum_g alpha_g (I_g - J_g/k_g) + b 1^T,   alpha_g > 0 iff a_g > lambda,   b constant inside each group

It is the global optimum iff Qt has norm at most lambda on vectors constant inside each group (`cross_entropy.between_level`), because on
differences inside group g the dual operator is lambda if alpha_g > 0 and a_g otherwise. Balanced classes are the case of one group. With
unequal groups it holds near complete collapse: there the classes of merged groups and single classes have features exactly zero.
Follows from the nuclear-norm form of Hong & Ling 2023 (arXiv 2309.09725) and its dual certificate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.theory.cross_entropy import Groups, between_level, damping

Floats = NDArray[np.float64]


class Block(NamedTuple):
    """alpha, bias (G,), mass (G, G): the softmax mass a sample of group g (row) gives to group h; value: F; between: norm of Qt there."""

    alpha: Floats
    bias: Floats
    mass: Floats
    value: float
    between: float


def block_point(cell: Groups, level: float, lam_b: float | None, bias: Floats | None = None) -> Block:
    """Stationary block point at lambda = level, by damped Newton on the smooth convex problem in (alpha_g with a_g > lambda, b).

    a_g (P_out + k P_in/(k-1)) = lambda for the masses P_in, P_out a sample of g puts on wrong classes of its group and on other groups;
    sum_g W_g (mass_gh - delta_gh) + lam_b k_h b_h = 0, W_g = sqrt(n_g) a_g k_g. bias (G,): where to start.
    """
    k, a, root = cell.members.astype(np.float64), cell.attraction, np.sqrt(cell.counts)
    W, free = root * a * k, np.flatnonzero((a > level) & (cell.members > 1))
    alpha, b = np.zeros(len(k)), np.zeros(len(k)) if bias is None else bias
    for _ in range(STEPS):
        own, inside, mass = _masses(alpha, b, k)
        outside = mass.sum(axis=1) - np.diag(mass)
        mean = own * (1 - 1 / k) - inside / k  # of d logit / d alpha_g
        spread = own * (1 - 1 / k) ** 2 + inside / k**2 - mean**2
        pull = W * (inside + (1 - 1 / k) * outside) - level * root * (k - 1)
        gradient, hessian = -pull[free], np.diag((W * spread)[free])
        if lam_b is not None:
            wrong = mass - np.diag(np.diag(mass))
            slope = W @ wrong - W * outside + lam_b * k * b
            across = (W * mean)[:, None] * (np.eye(len(k)) - mass)
            own_bias = np.diag(W @ mass + lam_b * k) - (mass.T * W) @ mass + W.sum() * np.outer(k, k) / k.sum() ** 2  # fixes the constant
            hessian = np.block([[hessian, across[free]], [across[free].T, own_bias]])
            gradient = np.concatenate([gradient, slope])
        if not len(gradient):
            break
        step = -np.linalg.solve(hessian, gradient)
        reach = 2 * float(np.max(np.abs(step)))
        step = step * damping(2 * reach)
        alpha[free] += step[: len(free)]
        b = b + step[len(free) :] if lam_b is not None else b
        if reach < 1e-9:
            break
    _, _, mass = _masses(alpha, b, k)
    loss = _loss(alpha, b, k)
    value = float((W * loss).sum() + level * (root * (k - 1) * alpha).sum() + (lam_b or 0.0) / 2 * (k * b * b).sum())
    return Block(alpha, b, mass, value, between_level(k, a, mass))


STEPS = 500


def _exponents(alpha: Floats, b: Floats, k: Floats) -> Floats:
    """Logits of a sample of each group (row) relative to its own class: other groups off the diagonal, its own group on it, (G, G)."""
    E = b[None, :] - b[:, None] - (alpha * (1 - 1 / k))[:, None]
    np.fill_diagonal(E, -alpha)
    return E


def _masses(alpha: Floats, b: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    E = _exponents(alpha, b, k)
    top = np.maximum(E.max(axis=1, keepdims=True), 0.0)
    many = np.where(np.eye(len(k), dtype=bool), k - 1, k)
    wrong, own = many * np.exp(E - top), np.exp(-top[:, 0])
    total = own + wrong.sum(axis=1)
    own, inside, mass = own / total, np.diag(wrong) / total, wrong / total[:, None]
    np.fill_diagonal(mass, own + inside)
    return own, inside, mass


def _loss(alpha: Floats, b: Floats, k: Floats) -> Floats:
    E = _exponents(alpha, b, k)
    top = np.maximum(E.max(axis=1, keepdims=True), 0.0)
    many = np.where(np.eye(len(k), dtype=bool), k - 1, k)
    wrong = (many * np.exp(E - top)).sum(axis=1)
    return np.asarray(np.where(top[:, 0] > 0, top[:, 0] + np.log(np.exp(-top[:, 0]) + wrong), np.log1p(wrong)))


def between_zero_level(cell: Groups, zero: float, lam_b: float | None, bias: Floats) -> float:
    """Smallest lambda at which the block point is optimal (Z vanishes between groups); `zero` is the level of complete collapse.

    Root of log(between(lambda)/lambda) between min_g a_g and `zero`, by false position (Illinois), bias (G,) = b* to start from.
    Never below min_g a_g: Qt/lambda is there diag(c), all c_g > 1, times a projection up to the scaling sqrt(k_g), so its norm exceeds 1.
    With a bias, that the root is the only one is observed, not proven.
    """
    start = [bias]

    def excess(log_level: float) -> float:
        point = block_point(cell, float(np.exp(log_level)), lam_b, start[0])
        start[0] = point.bias
        return float(np.log(point.between) - log_level)

    low, high = float(np.log(cell.attraction.min())), float(np.log(zero))
    f_low, f_high = excess(low), excess(high)
    if f_high > -1e-14 or f_low <= 0:
        return zero if f_high > -1e-14 else float(np.exp(low))
    side = 0
    for _ in range(100):
        x = (low * f_high - high * f_low) / (f_high - f_low)
        f = excess(x)
        if abs(f) < 2e-15 or high - low < 1e-15:
            break
        if f > 0:
            low, f_low, f_high = x, f, f_high / 2 if side == 1 else f_high
            side = 1
        else:
            high, f_high, f_low = x, f, f_low / 2 if side == -1 else f_low
            side = -1
    return float(np.exp(x))


def expand(cell: Groups, point: Block) -> Floats:
    """Logits of the block point, (K, K), column k = class k, bias included."""
    return _blocks(cell, point.alpha) + point.bias[cell.label][:, None]


def block_grams(cell: Groups, point: Block, lam_w: float, lam_h: float) -> tuple[Floats, Floats]:
    """Grams (K, K): sum_g r_g alpha_g (I_g - J_g/k_g), r_g = sqrt(lam_w/(lam_h n_g)) for the class means, sqrt(lam_h n_g/lam_w) for W."""
    ratio, root = np.sqrt(lam_w) / np.sqrt(lam_h), np.sqrt(cell.counts)
    return _blocks(cell, point.alpha * ratio / root), _blocks(cell, point.alpha * root / ratio)


def _blocks(cell: Groups, scale: Floats) -> Floats:
    same = cell.label[:, None] == cell.label[None, :]
    per_class, members = scale[cell.label], cell.members[cell.label]
    return np.asarray(same * (np.diag(per_class) - (per_class / members)[:, None]))
