"""What an end point of a deep ReLU chain is worth: its layers, their spectra and ranks, kinks, and stationarity where there are kinks.

`point` is a point of the study: K classes of n samples in class order, depth L. Factors (H, W_1, ..., W_L) of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from ufm import metrics
from ufm.objective import objective

Floats = NDArray[np.float64]

AT_KINK = 1e-6  # of the largest pre-activation of its layer
SAMPLES, NEARBY = 200, 1e-4  # gradients sampled about an end point, and how far from it
LAYERS, MOST = 14, 28  # room for 2L layers and K singular values


def hidden(point: dict[str, Any], factors: Sequence[Floats]) -> list[Floats]:
    """[H, W_1 H, s(W_1 H), W_2 s(W_1 H), ...] up to the input of W_L, one run: 2L - 1 matrices."""
    layers = [factors[0]]
    for W in factors[1 : point["depth"]]:
        pre = W @ layers[-1]
        layers += [pre, np.maximum(pre, 0.0)]
    return layers


def spectra(point: dict[str, Any], factors: Sequence[Floats]) -> Floats:
    """Singular values of the class means of all layers, before and after the ReLU, and logits, 2L by K in (LAYERS, MOST), NaN around."""
    layers = hidden(point, factors)
    padded = np.full((LAYERS, MOST), np.nan)
    for row, X in zip(padded, (*layers, factors[-1] @ layers[-1]), strict=False):
        s = np.linalg.svd(class_means(point, X), compute_uv=False)
        row[: point["K"]] = np.pad(s, (0, point["K"] - len(s)))
    return padded


def ranks(layers: Floats) -> Floats:
    """Singular values above 1e-3 of the largest of each layer, NaN below the last, (LAYERS,)."""
    return np.where(np.isnan(layers[:, 0]), np.nan, (layers > 1e-3 * layers[:, :1]).sum(axis=1))


def kinks(point: dict[str, Any], factors: Sequence[Floats]) -> float:
    """The share of pre-activations within 1e-6 of zero, relative to the largest of their layer."""
    pre = [X / max(np.abs(X).max(), 1e-300) for X in hidden(point, factors)[1::2]]
    return float(np.mean([np.abs(X) <= AT_KINK for X in pre]))


def subgradient(problem: ufm.Problem, factors: Sequence[Floats], seed: int) -> float:
    """The shortest convex combination of the gradients at 200 points nearby, in the units of the scale-free gradient norm; 0 at zero.

    Points uniform in radius up to 1e-4 |x|, the factors themselves among them. It is small near stationary points, at kinks too; NaN
    where it was not found.
    Source: Burke, Lewis & Overton 2005 (gradient sampling).
    """
    from scipy.optimize import nnls

    if not any(x.any() for x in factors):
        return 0.0
    F, rng = objective(problem, runs=SAMPLES), np.random.default_rng(seed)
    moves = [rng.standard_normal((SAMPLES, *x.shape)) for x in factors]
    length = np.sqrt(sum((m * m).sum(axis=(1, 2)) for m in moves) / sum((x * x).sum() for x in factors))
    reach = NEARBY * rng.uniform(size=SAMPLES) / length
    reach[0] = 0.0
    near = [x + reach[:, None, None] * m for x, m in zip(factors, moves, strict=True)]
    fit, penalty = (np.concatenate([g.reshape(SAMPLES, -1) for g in part(near)[1]], axis=1) for part in (F.loss_part, F.penalty_part))
    G = (fit + penalty) / max(np.linalg.norm(fit[0]), np.linalg.norm(penalty[0]))
    heavy = 1e4 * np.linalg.norm(G[0])  # holds the weights' sum at 1
    R = np.vstack([np.linalg.qr(G.T, mode="r"), np.full((1, SAMPLES), heavy)])
    try:
        w, _ = nnls(R, np.append(np.zeros(len(R) - 1), heavy), maxiter=50 * SAMPLES)
    except RuntimeError:  # not solved: nothing is known
        return np.nan
    return float(np.linalg.norm(G.T @ (w / w.sum())))


def within(point: dict[str, Any], factors: Sequence[Floats]) -> float:
    """tr S_W/tr S_B of the last hidden layer (DNC1)."""
    labels = np.repeat(np.arange(point["K"]), point["n"])
    return float(metrics.nc1_quotient(metrics.class_statistics(hidden(point, factors)[-1][None], labels, point["K"]))[0])


def class_means(point: dict[str, Any], X: Floats) -> Floats:
    """Columns averaged over each class's samples."""
    return np.asarray(X.reshape(X.shape[0], point["K"], point["n"]).mean(axis=2))
