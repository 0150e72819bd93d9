"""Balance of neighbouring factors, which every stationary point of a linear chain with penalties has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ufm.arrays import Array, namespace
from ufm.metrics.door import constant, matrices, positive, quotient


def balance(factors: Sequence[Array], penalties: Sequence[Any], multiplicity: Any = None) -> Array:
    """||A - B||_F/(||A||_F + ||B||_F) with A = lam_{l+1} W_{l+1}^T W_{l+1}, B = lam_l W_l W_l^T for l = 0 ... L - 1, (B, L); 0 at 0/0.

    factors (H, W_1, ..., W_L) without the bias, W_0 W_0^T = sum_c m_c h_c h_c^T with multiplicity m (cols,) or (B, cols), 1 by default;
    penalties (lam_h, lam_1, ..., lam_L), each a number or (B,). Zero at the stationary points of linear chains with free features, for
    every loss; for H >= 0, or with a ReLU between the two, only the diagonals of A and B agree. ValueError where sizes do not fit.
    Source: Arora, Cohen & Hazan 2018 (arXiv 1802.06509), with penalties.
    """
    chain = [matrices("balance", f"factors[{i}]", W, "(B, rows, cols)") for i, W in enumerate(factors)]
    if len(chain) < 2 or len(penalties) != len(chain):
        raise ValueError(f"metrics.balance: {len(chain)} factors and {len(penalties)} penalties; give (H, W_1, ..., W_L), one penalty each")
    for i, (before, after) in enumerate(pairwise(chain)):
        if after.shape[2] != before.shape[1]:
            raise ValueError(
                f"metrics.balance: factors[{i + 1}] has {after.shape[2]} columns, but factors[{i}] has {before.shape[1]} rows; "
                "give (H, W_1, ..., W_L) in the order they act, without the bias"
            )
    xp = namespace(*chain)
    if multiplicity is not None:
        chain[0] = chain[0] * xp.sqrt(positive("balance", "multiplicity", multiplicity, chain[0], chain[0].shape[2]))
    scaled = [W * _root(lam, W) for W, lam in zip(chain, penalties, strict=True)]
    return xp.stack([_pair(after.mT @ after, before @ before.mT) for before, after in pairwise(scaled)], axis=-1)


def _pair(A: Array, B: Array) -> Array:
    norm = namespace(A).linalg.matrix_norm
    return quotient(norm(A - B), norm(A) + norm(B))


def _root(penalty: Any, W: Array) -> Array:
    """sqrt(lam), (B or 1, 1, 1)."""
    lam = constant(penalty, W)
    if lam.ndim > 1 or (lam.ndim == 1 and lam.shape[0] not in (1, W.shape[0])):
        raise ValueError(f"metrics.balance: a penalty has shape {tuple(lam.shape)}, but must be a number or ({W.shape[0]},)")
    return namespace(W).sqrt(namespace(W).reshape(lam, (-1, 1, 1)))
