"""Deep linear chains by hand: 50-digit objective of a logit matrix from its entries, and a dense Hessian of the factor objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle import mp
from ufm.counts import balanced
from ufm.objective import objective
from ufm.problem import Problem

Floats = NDArray[np.float64]


def cross_entropy(M: Any) -> Any:
    """Mean CE of an mpmath matrix, entry by entry."""
    K = M.rows
    return sum(mp.log1p(sum(mp.exp(M[j, c] - M[c, c]) for j in range(K) if j != c)) for c in range(K)) / K


def value(M: Any, lam: float, L: int, singular: Sequence[Any]) -> Any:
    """mean CE + (lam/2)(L+1) sum s^p."""
    p = mp.mpf(2) / (L + 1)
    return cross_entropy(M) + mp.mpf(lam) / 2 * (L + 1) * sum(s**p for s in singular)


def slope(P: Any, a: Any, lam: float, L: int, singular: Sequence[Any]) -> Any:
    """d/da of `value` at M = a P, singular values of P given; times a^{1-p}, which has the same sign."""
    K, p, total = P.rows, mp.mpf(2) / (L + 1), mp.mpf(0)
    for c in range(K):
        e = [(P[c, c] - P[j, c], mp.exp(-a * (P[c, c] - P[j, c]))) for j in range(K) if j != c]
        total += sum(g * x for g, x in e) / (1 + sum(x for _, x in e))
    return mp.mpf(lam) * sum(s**p for s in singular) - mp.mpf(a) ** (1 - p) * total / K


def problem(K: int, n: int, width: int, lam_w: Sequence[float], lam_h: float) -> Problem:
    return Problem(balanced(K, n), width=width, depth=len(lam_w), features="free", lam_w=np.array([lam_w]), lam_h=lam_h)


def value_and_gradient_norm(P: Problem, factors: Sequence[Floats]) -> tuple[float, float]:
    """F of the factors, and |gradient| over the larger of the norms of its loss part and its penalty part."""
    F, batch = objective(P), [x[None] for x in factors]
    (loss, a), (penalty, b) = F.loss_part(batch), F.penalty_part(batch)

    def norm(parts: Sequence[Floats]) -> float:
        return float(np.sqrt(sum((x * x).sum() for x in parts)))

    return float(loss[0] + penalty[0]), norm([x + y for x, y in zip(a, b, strict=True)]) / (max(norm(a), norm(b)) or 1.0)


def hessian(P: Problem, factors: Sequence[Floats]) -> Floats:
    """The dense Hessian, a column per unit move."""
    sizes = [x.size for x in factors]
    total = sum(sizes)
    moves = [part.reshape(total, *x.shape) for part, x in zip(np.split(np.eye(total), np.cumsum(sizes)[:-1], axis=1), factors, strict=True)]
    repeated = [np.repeat(x[None], total, axis=0) for x in factors]
    return np.concatenate([x.reshape(total, -1) for x in objective(P, runs=total).hessian_product(repeated, moves)], axis=1)
