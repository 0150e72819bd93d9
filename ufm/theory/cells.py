"""From theorems to predictions: for each kind of problem, every cell's fields, or why it has none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ufm.problem import Problem
from ufm.records import Prediction, Regime
from ufm.theory import blocks, cross_entropy, imbalance, mse

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RELU_CE = "closed form of ReLU cross-entropy under imbalance (Dang et al. 2024, arXiv 2401.02058)"
RELU_CE_BALANCED = "balanced ReLU cross-entropy: orthogonal frame, constant bias (Dang et al. 2024, arXiv 2401.02058)"
ETF_CE = "balanced cross-entropy: simplex ETF (Zhu et al. 2021, arXiv 2105.02375)"
ZERO = "all features at zero: dual certificate at the best bias alone"
BLOCKS = "one simplex block per group of equal classes: nuclear-norm dual certificate (after Hong & Ling 2023, arXiv 2309.09725)"
MSE_DIAGONAL = "mean squared error without bias: diagonal logits (Dang et al. 2023, arXiv 2301.00437)"
MSE_CENTRED = "mean squared error, free bias: singular values of the centred targets (Liu 2024, arXiv 2411.17278)"
MSE_RELU = "balanced ReLU mean squared error, free bias: orthogonal frame, separable group lasso"

NO_RELU_BIAS = "no closed form: cross-entropy, nonnegative features, a bias and unequal classes"
NO_UNEQUAL = "no closed form: cross-entropy, free features, unequal classes below complete collapse; the regime is exact (Hong & Ling 2023)"
NO_MSE_RELU = "no closed form: mean squared error, nonnegative features, free bias and unequal classes"
NO_MSE_BIAS = "no closed form: mean squared error with a penalised bias"
NOT_UNIQUE = "value only: with two classes, nonnegative features and a free bias the bias can carry any share of either class"
NO_PENALTY = "no closed form: a penalty is zero, so no minimum is attained or its Grams are not unique"


@dataclass
class Draft:
    """A prediction in the making: every field NaN and every regime unknown until a theorem fills the cell."""

    value: Floats
    regime: list[Regime]
    distance: Floats
    collapsed: Bools
    margins: Floats
    logits: Floats
    feature_gram: Floats
    classifier_gram: Floats
    bias: Floats
    source: list[str]

    @classmethod
    def blank(cls, G: int, K: int) -> Draft:
        """Nothing known yet of G cells of K classes."""
        vectors, squares = np.full((2, G, K), np.nan), np.full((3, G, K, K), np.nan)
        unknown, dead = [Regime.UNKNOWN] * G, np.zeros((G, K), dtype=bool)
        value, distance = np.full((2, G), np.nan)
        return cls(value, unknown, distance, dead, vectors[0], squares[0], squares[1], squares[2], vectors[1], [""] * G)

    def no_geometry(self, g: int, reason: str) -> None:
        """Withdraw everything of cell g but what is known of its regime."""
        for field in (self.value, self.margins, self.logits, self.feature_gram, self.classifier_gram, self.bias):
            field[g] = np.nan
        self.source[g] = reason

    def not_unique(self, g: int, value: float) -> None:
        """Withdraw everything of cell g but the value: a continuum of optima shares it, down to width 1."""
        self.withdraw(g, NOT_UNIQUE)
        self.value[g] = value

    def withdraw(self, g: int, reason: str) -> None:
        """Withdraw everything of cell g."""
        self.no_geometry(g, reason)
        self.regime[g], self.distance[g], self.collapsed[g] = Regime.UNKNOWN, np.nan, False

    def narrow(self, g: int, width: int, rank: int) -> None:
        """Withdraw cell g if the optimum needs more dimensions than there are."""
        if width < rank:
            self.withdraw(g, f"no closed form: width is {width}, but the optimum needs {rank}; use width >= {rank}")

    def zero(self, g: int, bias: Floats, value: float) -> None:
        """Cell g with every feature at zero."""
        self.value[g], self.bias[g], self.logits[g] = value, bias, bias[:, None]
        self.feature_gram[g] = self.classifier_gram[g] = 0.0
        self.margins[g], self.collapsed[g] = margins_of(self.logits[g]), True
        self.regime[g], self.source[g] = Regime.ALL_ZERO, ZERO

    def prediction(self) -> Prediction:
        """The finished record."""
        fields = {**vars(self), "regime": tuple(self.regime), "source": np.array(self.source)}
        return Prediction(**fields)


def margins_of(logits: Floats) -> Floats:
    """z_kk - mean_{j != k} z_jk, (..., K), for logits (..., K, K)."""
    K = logits.shape[-1]
    own = np.diagonal(logits, axis1=-2, axis2=-1)
    return np.asarray((own[..., None, :] - logits).sum(axis=-2) / (K - 1))


def regime_of(dead: Bools) -> Regime:
    """The regime of a cell whose classes are either at zero or distinct."""
    return Regime.ALL_ZERO if dead.all() else Regime.MINORITY_ZERO if dead.any() else Regime.DISTINCT


def nearest(log_level: float, boundaries: list[float]) -> float:
    """ln(lambda/lambda*) to the nearest of the boundaries lambda*."""
    gaps = [log_level - float(np.log(boundary)) for boundary in boundaries if np.isfinite(boundary)]
    return min(gaps, key=abs)


def relu_cross_entropy(problem: Problem) -> Draft:
    """Cross-entropy, nonnegative features, no bias: every cell."""
    n, lam_w, lam_h, omega = _given(problem)
    u = imbalance.survival(n, lam_w, lam_h, omega)
    M = imbalance.margins(n, lam_w, lam_h, omega)
    draft = Draft.blank(*n.shape)
    draft.value = imbalance.optimal_value(n, lam_w, lam_h, omega)
    draft.margins, draft.logits, draft.bias, draft.collapsed = M, imbalance.logits(M), np.zeros(n.shape), u <= 1
    draft.feature_gram = imbalance.feature_gram(n, M, lam_w, lam_h)
    draft.classifier_gram = imbalance.classifier_gram(n, M, lam_w, lam_h)
    for g in range(len(n)):
        draft.regime[g], draft.source[g] = regime_of(draft.collapsed[g]), RELU_CE
        draft.distance[g] = nearest(0.0, [u[g].min(), u[g].max()])
        draft.narrow(g, problem.width, int((u[g] > 1).sum()))
    return draft


def relu_cross_entropy_bias(problem: Problem) -> Draft:
    """Cross-entropy, nonnegative features, a bias: balanced cells, and cells where everything is at zero."""
    n, lam_w, lam_h, omega = _given(problem)
    draft, u = relu_cross_entropy(problem), imbalance.survival(n, lam_w, lam_h, omega)
    value = imbalance.optimal_value(n, lam_w, lam_h, omega)
    for g in range(len(n)):
        cell = cross_entropy.groups(n[g], omega[g])
        if len(cell.members) == 1:
            draft.source[g] = RELU_CE_BALANCED if np.isfinite(draft.value[g]) else draft.source[g]
            if len(n[g]) == 2 and _lam_b(problem, g) == 0 and u[g, 0] > 1:
                draft.not_unique(g, float(value[g]))
            continue
        draft.withdraw(g, NO_RELU_BIAS)
        lam_b, shares = _lam_b(problem, g), _shares(n[g], omega[g])
        b = cross_entropy.bias_alone(shares, lam_b)
        level, bound = float(imbalance.level(lam_w[g], lam_h[g])), cross_entropy.relu_zero_level(cell, cross_entropy.softmax(b))
        if level >= bound.upper:
            draft.zero(g, b, float(cross_entropy.bias_alone_value(shares, b, lam_b)))
        if level >= bound.upper == bound.lower:
            draft.distance[g] = nearest(np.log(level), [bound.upper])
    return draft


def free_cross_entropy(problem: Problem) -> Draft:
    """Cross-entropy, free features, any bias: balanced cells, all-zero and block cells; the regime of every other."""
    n, lam_w, lam_h, omega = _given(problem)
    draft = Draft.blank(*n.shape)
    for g in range(len(n)):
        cell, shares, lam_b = cross_entropy.groups(n[g], omega[g]), _shares(n[g], omega[g]), _lam_b(problem, g)
        level = float(imbalance.level(lam_w[g], lam_h[g]))
        if len(cell.members) == 1:
            _balanced(draft, g, cell, float(omega[g, 0]), float(lam_w[g]), float(lam_h[g]))
            draft.narrow(g, problem.width, 0 if draft.collapsed[g].all() else problem.classes - 1)
            continue
        b = cross_entropy.bias_alone(shares, lam_b)
        zero = cross_entropy.zero_level(cell, cross_entropy.softmax(b))
        if level >= zero:
            draft.zero(g, b, float(cross_entropy.bias_alone_value(shares, b, lam_b)))
            draft.distance[g] = nearest(np.log(level), [zero])
        else:
            _unequal(draft, g, cell, float(lam_w[g]), float(lam_h[g]), lam_b, b, zero, problem.width)
    return draft


def _balanced(draft: Draft, g: int, cell: cross_entropy.Groups, weight: float, lam_w: float, lam_h: float) -> None:
    K, n = int(cell.members[0]), float(cell.counts[0])
    M = float(cross_entropy.balanced_margin(K, n, lam_w, lam_h, weight=weight))
    simplex, ratio = M * (np.eye(K) - 1 / K), np.sqrt(lam_w) / np.sqrt(lam_h) / np.sqrt(n)
    level, threshold = float(imbalance.level(lam_w, lam_h)), float(cross_entropy.balanced_level(K, n, weight=weight))
    draft.value[g] = cross_entropy.balanced_value(K, n, lam_w, lam_h, weight=weight)
    draft.margins[g], draft.logits[g], draft.bias[g] = M, simplex, 0.0
    draft.feature_gram[g], draft.classifier_gram[g] = ratio * simplex, simplex / ratio
    draft.collapsed[g] = level >= threshold
    draft.regime[g], draft.source[g] = regime_of(draft.collapsed[g]), ETF_CE
    draft.distance[g] = nearest(np.log(level), [threshold])


def _unequal(
    draft: Draft, g: int, cell: cross_entropy.Groups, lam_w: float, lam_h: float, lam_b: float | None, b: Floats, zero: float, width: int
) -> None:
    """Below complete collapse with unequal classes: block point, minority at zero, merged or distinct."""
    level, merging = float(imbalance.level(lam_w, lam_h)), cross_entropy.merging_level(cell)
    several, start = cell.members > 1, np.zeros(len(cell.members))
    start[cell.label] = b
    first = float(cell.attraction.min())
    skip = not several.any() or level < first == merging  # then the nearest boundary is the first merging
    between = zero if skip else blocks.between_zero_level(cell, zero, lam_b, start)
    dying = np.where(several, np.maximum(cell.attraction, between), between)  # level from which each group is at zero
    point = blocks.block_point(cell, level, lam_b, start) if level >= first and several.any() else None
    certified = point is not None and point.between <= level
    dead = np.where(several, cell.attraction <= level, True) if certified else np.zeros(len(several), bool)
    merged = bool(np.any(several & (cell.attraction <= level)))
    draft.collapsed[g] = dead[cell.label]
    draft.regime[g] = Regime.MINORITY_ZERO if dead.any() else Regime.MERGED if merged else Regime.DISTINCT
    draft.distance[g] = nearest(np.log(level), [merging, float(dying.min()), zero])
    alive = int((cell.members - 1)[cell.attraction > level].sum())
    if certified and point is not None:
        draft.value[g], draft.bias[g], draft.logits[g] = point.value, point.bias[cell.label], blocks.expand(cell, point)
        draft.feature_gram[g], draft.classifier_gram[g] = blocks.block_grams(cell, point, lam_w, lam_h)
        draft.margins[g], draft.source[g] = margins_of(draft.logits[g]), BLOCKS
    else:
        draft.no_geometry(g, NO_UNEQUAL)
    draft.narrow(g, width, alive + (0 if certified else len(cell.members) - 1))


def mse_without_bias(problem: Problem) -> Draft:
    """Mean squared error, linear chain of any depth, no bias, free or nonnegative features: every cell."""
    n, (lam_w, lam_h), N = problem.counts.astype(np.float64), _positive(problem), problem.samples
    eps, critical = mse.strength(n, N, lam_w, lam_h), mse.critical_strength(problem.depth)
    point = mse.without_bias(n, lam_w, lam_h)
    draft, eye = Draft.blank(*n.shape), np.eye(problem.classes)
    draft.value = mse.optimal_value(n, N, lam_w, lam_h)
    draft.margins, draft.bias, draft.collapsed = point.logits, np.zeros(n.shape), point.logits == 0
    draft.logits, draft.feature_gram, draft.classifier_gram = (x[:, :, None] * eye for x in point)
    for g in range(len(n)):
        draft.regime[g], draft.source[g] = regime_of(draft.collapsed[g]), MSE_DIAGONAL
        draft.distance[g] = nearest(0.0, [critical / eps[g].max(), critical / eps[g].min()])
        draft.narrow(g, problem.width, int((~draft.collapsed[g]).sum()))
    return draft


def mse_free_bias(problem: Problem) -> Draft:
    """Mean squared error, linear chain of any depth, free features, free bias: every cell whose bias is free."""
    n, (lam_w, lam_h), N = problem.counts.astype(np.float64), _positive(problem), problem.samples.astype(np.float64)
    draft = Draft.blank(*n.shape)
    for g in range(len(n)):
        if _lam_b(problem, g) != 0:
            draft.withdraw(g, NO_MSE_BIAS)
            continue
        spectrum = mse.centred_spectrum(n[g])
        point = mse.with_free_bias(n[g], spectrum, lam_w[g], float(lam_h[g]))
        draft.value[g] = mse.optimal_value(spectrum.squared, N[g], lam_w[g], lam_h[g])
        draft.logits[g], draft.feature_gram[g], draft.classifier_gram[g], draft.bias[g], _ = point
        draft.margins[g], draft.source[g] = margins_of(point.logits), MSE_CENTRED
        _centred_regime(draft, g, n[g], spectrum, point.kept, float(mse.level(lam_w[g], lam_h[g])), problem.depth)
        draft.narrow(g, problem.width, int(point.kept.sum()))
    return draft


def _centred_regime(draft: Draft, g: int, n: Floats, spectrum: mse.Spectrum, kept: Bools, level: float, depth: int) -> None:
    """A class is at zero iff its group's differences and every direction between groups are lost: all of the latter touch all classes."""
    thresholds, own = mse.collapse_level(spectrum.squared, n.sum(), depth), spectrum.own
    between = bool(kept[own < 0].any())
    group = np.unique(-n, return_inverse=True)[1]
    lives = np.array([bool(kept[own == i].any()) for i in group])
    merged = bool((~kept[own >= 0]).any())
    draft.collapsed[g] = ~lives & (not between)
    draft.regime[g] = regime_of(draft.collapsed[g])
    if between and merged:
        draft.regime[g] = Regime.MERGED
    boundaries = [float(thresholds.max())]
    boundaries += [float(part.min()) for part in (thresholds[own >= 0],) if len(part)]
    boundaries += [float(part.max()) for part in (thresholds[own < 0],) if len(part)]
    draft.distance[g] = nearest(np.log(level), boundaries)


def relu_mse_free_bias(problem: Problem) -> Draft:
    """Mean squared error, nonnegative features, free bias, depth 1: balanced cells, and cells where everything is at zero."""
    n, lam_w, lam_h, _ = _given(problem)
    draft, u = Draft.blank(*n.shape), imbalance.survival(n, lam_w, lam_h)
    M = mse.relu_free_bias_margin(n, lam_w, lam_h)
    draft.value, draft.margins, draft.bias = mse.relu_free_bias_value(n, lam_w, lam_h), M, n / n.sum(axis=1, keepdims=True)
    draft.logits, draft.collapsed = imbalance.logits(M) + draft.bias[:, :, None], u <= 1
    draft.feature_gram = imbalance.feature_gram(n, M, lam_w, lam_h)
    draft.classifier_gram = imbalance.classifier_gram(n, M, lam_w, lam_h)
    for g in range(len(n)):
        pi = draft.bias[g].copy()
        if _lam_b(problem, g) != 0:
            draft.withdraw(g, NO_MSE_BIAS)
        elif np.all(n[g] == n[g, 0]):
            draft.regime[g], draft.source[g], draft.distance[g] = regime_of(draft.collapsed[g]), MSE_RELU, nearest(0.0, [u[g, 0]])
            if len(n[g]) == 2 and u[g, 0] > 1:
                draft.not_unique(g, float(draft.value[g]))
            draft.narrow(g, problem.width, 1 if len(n[g]) == 2 else int((u[g] > 1).sum()))
        else:
            draft.withdraw(g, NO_MSE_RELU)
            level, bound = float(imbalance.level(lam_w[g], lam_h[g])), cross_entropy.relu_zero_level(cross_entropy.groups(n[g]), pi)
            if level >= bound.upper:
                draft.zero(g, pi, float((pi * (1 - pi)).sum() / 2))
            if level >= bound.upper == bound.lower:
                draft.distance[g] = nearest(np.log(level), [bound.upper])
    return draft


def zero_penalty(problem: Problem) -> Bools:
    """Cells where a factor is not penalised, (G,)."""
    return np.asarray((problem.lam_h == 0) | np.any(problem.lam_w == 0, axis=1))


def _positive(problem: Problem) -> tuple[Floats, Floats]:
    """lam_w (G, L) and lam_h (G,), with 1 for all penalties of cells to be withdrawn."""
    off = zero_penalty(problem)
    return np.where(off[:, None], 1.0, problem.lam_w), np.where(off, 1.0, problem.lam_h)


def _given(problem: Problem) -> tuple[Floats, Floats, Floats, Floats]:
    """counts (G, K), lam_w (G,), lam_h (G,) and class weights (G, K) of a depth-1 problem."""
    lam_w, lam_h = _positive(problem)
    n = problem.counts.astype(np.float64)
    weights = getattr(problem.loss, "class_weights", None)
    return n, lam_w[:, 0], lam_h, np.broadcast_to(1.0 if weights is None else weights, n.shape)


def _lam_b(problem: Problem, g: int) -> float | None:
    return None if problem.lam_b is None else float(problem.lam_b[g])


def _shares(n: Floats, omega: Floats) -> Floats:
    return np.asarray(omega * n / n.sum())
