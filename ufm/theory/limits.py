"""How far a loss can fall, and margins rise, on features of fixed norm: floors and bounds for balanced classes and no penalties.

Features ||h_i|| = tau, a classifier with sum_k ||w_k||^2 <= K (unit rows, for one), K classes of equal size: all bounds here are averages
over samples, and fail for unequal classes. bias: "none"; "free", any b; "centred", b = -W mu_G, or rows of W that sum to zero.
Write a_i = w_{y_i}.h_i and m = K/(K-1) mean_i (w_{y_i} - wbar).h_i, the mean over samples of a_i less the other logits' mean: by
Cauchy-Schwarz mean_i a_i <= tau sqrt(mean_k ||w_k||^2) <= tau, and m <= tau K/(K-1); equal at h_i = tau w_{y_i}, a simplex ETF, for m.

Features after a ReLU have entries >= 0 ("relu"). Their class means mu_k have inner products >= 0, so sum_k ||mu_k - mean_j mu_j||^2 <=
(1 - 1/K) sum_k ||mu_k||^2 <= (K-1) tau^2, and by Cauchy-Schwarz m <= tau sqrt(K/(K-1)): equal at orthogonal h_i, one direction a class,
with W the simplex ETF of their centred directions. The ETF floor is out of their reach.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.problem import Problem
from ufm.records import NoTheory

Floats = NDArray[np.float64]
Bias = Literal["none", "free", "centred"]
Features = Literal["free", "relu"]

BIASES = ("none", "free", "centred")


def logit_margin(classes: ArrayLike, radius: ArrayLike, features: Features = "free") -> Floats:
    """tau K/(K-1): no mean over samples of z_y - max_{j != y} z_j, nor of z_y - mean_{j != y} z_j, is larger, whatever the bias.

    The first is at most the second, which is m plus a bias that cancels for balanced classes. The first is equal exactly at collapse to an
    ETF, the second at other arrangements too. Of features="relu", entries >= 0: tau sqrt(K/(K-1)).
    """
    K, tau = _sizes("logit_margin", classes, radius)
    _choice("logit_margin", "features", features, ("free", "relu"))
    return np.asarray(tau * (K / (K - 1)) ** (1.0 if features == "free" else 0.5))


def cosine_margin(classes: ArrayLike) -> Floats:
    """K/(K-1): no mean over samples of cos(h - mu_G, w_y - wbar) - max_{j != y} cos(h - mu_G, w_j - wbar) is larger.

    It is a mean logit margin of unit vectors h - mu_G and w_k - wbar, with tau = 1. Equality exactly at collapse to an ETF.
    """
    return logit_margin(classes, 1.0)


def cross_entropy_floor(classes: ArrayLike, radius: ArrayLike, temperature: ArrayLike = 1.0, features: Features = "free") -> Floats:
    """log(1 + (K-1) exp(-M/T)), M the largest `logit_margin`: the least mean cross-entropy of logits over T, whatever the bias.

    Jensen over wrong classes, sum_{j != y} e^{z_j - z_y} >= (K-1) e^{mean_j (z_j - z_y)}, then over samples (log(1 + e^x) is convex), with
    the mean margin m <= M. Equality where m = M, at an ETF only; of features="relu" at orthogonal ones.
    """
    K, tau = _sizes("cross_entropy_floor", classes, radius)
    T = np.asarray(temperature, dtype=np.float64)
    if not np.all(T > 0):
        raise ValueError(f"theory.limits.cross_entropy_floor: temperature is {temperature!r:.60}, but must be positive")
    x = np.log(K - 1) - logit_margin(K, tau, features) / T
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))


def squared_error_floor(classes: ArrayLike, radius: ArrayLike, bias: Bias = "none") -> Floats:
    """Least mean of (1/2)||z - e_y||^2: (1 - tau)_+^2/2, or (K-1)/(2K) (1 - tau K/(K-1))_+^2 with a free bias, plus 1/(2K) if centred.

    Jensen leaves (1/2K)||A - I||_F^2 of class means, A = W [mu_k] and ||A||_* <= ||W||_F ||[mu_k]||_F <= K tau. By von Neumann only the
    singular values matter: K equal ones, or K - 1 in the space of zero sums, whose complement a free bias fits and a centred one leaves.
    """
    K, tau = _sizes("squared_error_floor", classes, radius)
    if _choice("squared_error_floor", "bias", bias, BIASES) == "none":
        return np.asarray(0.5 * np.maximum(1.0 - tau, 0.0) ** 2 + 0.0 * K)
    floor = (K - 1) / (2 * K) * np.maximum(1.0 - tau * (K / (K - 1)), 0.0) ** 2
    return np.asarray(floor + (0.5 / K if bias == "centred" else 0.0))


def dot_regression_floor(radius: ArrayLike, bias: Bias = "none") -> Floats:
    """Least mean of (1/2)(z_y - 1)^2: (1 - tau)_+^2/2, and 0 with a free bias.

    Jensen leaves (mean_i a_i - 1)^2/2, mean_i a_i <= tau; if centred, mean_i a_i = mean_k w_k.(mu_k - mu_G) <= tau too. For tau < 1
    equality asks h_i = tau w_{y_i} of unit rows, in any arrangement: this loss alone does not separate classes.
    """
    _, tau = _sizes("dot_regression_floor", 2, radius)
    return np.asarray(
        0.0 * tau if _choice("dot_regression_floor", "bias", bias, BIASES) == "free" else 0.5 * np.maximum(1.0 - tau, 0.0) ** 2
    )


class Limits(NamedTuple):
    """Per cell, (G,): the least value of the loss, the largest mean logit and cosine margins, and why they hold or not."""

    value: Floats
    logit_margin: Floats
    cosine_margin: Floats
    source: NDArray[np.str_]


def at_radius(problem: Problem) -> Limits:
    """The limits of a problem with a radius and a head of unit rows: attained, so that a run can be said to be within 1e-6 of its floor.

    A cell whose floor is not proven, or not attained, has NaN and says why in `source`; the margins are bounds in every balanced cell.
    Raises NoTheory, naming the hypotheses that fail, where the problem as a whole has no floor.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"limits.at_radius: problem is {problem!r}, but must be a ufm.Problem")
    failed = [name for name, holds in HYPOTHESES.items() if not holds(problem)]
    if failed or problem.radius is None:
        raise NoTheory(f"limits.at_radius: no floor is proven for this problem; what fails: {'; '.join(failed)}; use ufm.simulate alone")
    tau = float(problem.radius)
    table = np.full((3, problem.cells), np.nan)
    source = [_obstacle(problem, g, tau) for g in range(problem.cells)]
    for g, why in enumerate(source):
        if why != UNEQUAL:
            table[1:, g] = logit_margin(problem.classes, tau), cosine_margin(problem.classes)
        if not why:
            table[0, g] = _floor(problem, g, tau)
    return Limits(table[0], table[1], table[2], np.array([why or PROVEN for why in source]))


def _plain(problem: Problem) -> bool:
    """Whether cross-entropy has neither smoothing nor weights; shifts and temperatures are a matter of the cells."""
    loss: Any = problem.loss
    return loss.name != "CE" or (loss.label_smoothing == 0 and loss.per_class(problem.counts)["class_weights"] is None)


# name -> whether a problem satisfies it
HYPOTHESES: dict[str, Any] = {
    "features have a radius": lambda p: p.radius is not None,
    "the head keeps the norms of W (unit rows, fixed or nearest ETF)": lambda p: p.head.norms is not None,
    "loss is cross-entropy, squared error or dot regression": lambda p: p.loss.name in ("CE", "MSE", "DR"),
    "cross-entropy has no smoothing and no class weights": _plain,
}

UNEQUAL = "no floor: the classes are not of equal size"
SHIFTED = "no floor: logit adjustment or temperature differ between classes"
PENALISED = "floor not attained: the bias has a penalty; use lam_b=0 or None"
PROVEN = "Jensen and Cauchy-Schwarz: attained floor and margins of balanced classes"


def _bias_of(problem: Problem) -> Bias:
    """Rows of a simplex ETF sum to zero, so that without b = -W mu_G, too, logits do."""
    if not problem.head.trained:
        return "centred"
    return "none" if problem.lam_b is None else "free"


def _obstacle(problem: Problem, g: int, tau: float) -> str:
    """Why cell g has no floor that is attained; empty where it has."""
    n, K, name = problem.counts[g], problem.classes, problem.loss.name
    if np.any(n != n[0]):
        return UNEQUAL
    if name == "CE" and any(part is not None and np.any(part[g] != part[g, 0]) for part in _per_class(problem).values()):
        return SHIFTED
    if name != "CE" and problem.lam_b is not None and problem.lam_b[g] > 0:
        return PENALISED
    bias = _bias_of(problem)
    # past the targets, unit rows need features that lean out of their span
    squared = K if bias == "none" or tau > (K - 1) / K else K - 1
    leaning = K if problem.head.name == "NearestETF" else 2
    need = {"CE": K - 1, "MSE": squared, "DR": leaning if tau > 1 and bias != "free" else 1}[name]
    return "" if problem.width >= need else f"floor not known to be attained: width is {problem.width}; use width >= {need}"


def _floor(problem: Problem, g: int, tau: float) -> float:
    K, bias = problem.classes, _bias_of(problem)
    if problem.loss.name == "CE":
        temperature = _per_class(problem)["temperature"]
        return float(cross_entropy_floor(K, tau, 1.0 if temperature is None else temperature[g, 0]))
    return float(squared_error_floor(K, tau, bias) if problem.loss.name == "MSE" else dot_regression_floor(tau, bias))


def _per_class(problem: Problem) -> dict[str, Floats | None]:
    loss: Any = problem.loss
    return dict(loss.per_class(problem.counts))


def _sizes(call: str, classes: ArrayLike, radius: ArrayLike) -> tuple[Floats, Floats]:
    K, tau = np.asarray(classes, dtype=np.float64), np.asarray(radius, dtype=np.float64)
    if not np.all((K >= 2) & (np.floor(K) == K)):
        raise ValueError(f"theory.limits.{call}: classes is {classes!r:.60}, but must be whole numbers, at least 2")
    if not np.all((tau >= 0) & np.isfinite(tau)):
        raise ValueError(f"theory.limits.{call}: radius is {radius!r:.60}, but must be finite and at least 0")
    return K, tau


def _choice(call: str, name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"theory.limits.{call}: {name} is {value!r}, but must be {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")
    return value
