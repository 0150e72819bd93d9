"""From training settings to the problem whose prediction applies, and that problem's regularisation as a term of a training loss.

A loop whose data term is f times the mean loss over samples is at rest where F is, once every penalty is divided by f. Optimiser weight
decay wd of SGD and Adam adds wd W to the gradient, as (wd/2) ||W||^2 in the loss does; AdamW's does not follow from any objective.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ufm.heads import Head, Learned
from ufm.losses import MSE, CrossEntropy, Focal, Loss
from ufm.objective import chain_of
from ufm.problem import PAPERS, Penalties, Problem

Floats = NDArray[np.float64]

READ = (nn.CrossEntropyLoss, nn.MSELoss)  # torch's losses that have one of ufm; what a class made of them computes is its own
SOFTMAX = (CrossEntropy.name, Focal.name)  # losses that a number added to all logits does not change
FEATURE_SUMS = {"sum": "sum", "mean": "mean", "batch_sum": "minibatch_sum"}  # what a feature penalty runs over -> its row of PAPERS
CHOICES = {
    "optimiser": ("SGD", "Adam", "AdamW"),
    "decayed": ("head", "all"),
    "feature_over": tuple(FEATURE_SUMS),
    "bias": ("none", "free", "decayed"),
    "sampling": ("plain", "balanced"),
}


class Assumption(NamedTuple):
    """What the prediction takes for granted of the training; holds is None where the settings cannot tell."""

    sentence: str
    holds: bool | None


@dataclass(frozen=True, eq=False)
class Reading:
    """The problem that training settings stand for, and what must be so for its prediction to apply; printed, one line an assumption."""

    problem: Problem
    assumptions: tuple[Assumption, ...]

    def __str__(self) -> str:
        mark = {True: "holds", False: "FAILS", None: "open "}
        return "\n".join(f"{mark[a.holds]}  {a.sentence}" for a in self.assumptions)


def penalty(
    problem: Problem, weights: Sequence[Tensor], features: Tensor, *, bias: Tensor | None = None, total: float | None = None
) -> Tensor:
    """sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2)(N/B) sum_i ||h_i||^2 + (lam_b/2)||b||^2, of a batch of B: in expectation that of F.

    weights: W_1 ... W_L in the order they act, (d, d) or (K, d); features (B, d), a sample a row, as they enter W_1; bias (K,). N is
    `total`, by default the problem's. The expectation is over batches in which every sample is as likely. Sums in float32 at least.
    ValueError where a tensor does not fit, where its term could not move it (detached, or features of one norm: normalised, with more
    than K different among them), or where the problem has more cells than one.
    """
    K, d, L = problem.classes, problem.width, problem.depth
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if problem.cells != 1:
        raise ValueError(f"penalty: the problem has {problem.cells} cells, but a network trains on one; give problem.cell(index)")
    got = [tuple(x.shape) for x in weights]
    if got != (needed := chain_of(problem).shapes(d, K, 0)[1 : L + 1]):
        raise ValueError(f"penalty: weights have shapes {got}, but the problem needs {needed}, W_1 first")
    if features.ndim != 2 or features.shape[1] != d or not len(features):
        raise ValueError(f"penalty: features have shape {tuple(features.shape)}, but must be (B, d = {d}), a sample a row, B >= 1")
    if (bias is not None) != (problem.lam_b is not None) and (bias is not None or problem.lam_b[0] > 0):
        rule = "no bias (lam_b=None)" if problem.lam_b is None else f"one penalised by lam_b = {problem.lam_b[0]:g}"
        raise ValueError(f"penalty: bias is {'given' if bias is not None else 'None'}, but the problem has {rule}; give both or neither")
    if bias is not None and bias.numel() != K:
        raise ValueError(f"penalty: bias has shape {tuple(bias.shape)}, but must hold K = {K} numbers")
    lam_h, N = float(problem.lam_h[0]), float(problem.samples[0] if total is None else total)
    terms = [(f"W_{layer}", float(lam), W) for layer, (lam, W) in enumerate(zip(problem.lam_w[0], weights, strict=True), 1)]
    terms += [("features", lam_h * N / len(features), features)]
    terms += [] if bias is None else [("bias", float(problem.lam_b[0]), bias)]
    acting = [(name, lam, x.to(torch.promote_types(x.dtype, torch.float32))) for name, lam, x in terms if lam > 0]
    _refuse_constants(acting, K)
    return sum((0.5 * lam * torch.sum(x * x) for _, lam, x in acting), start=torch.zeros((), dtype=torch.float32, device=features.device))


def _refuse_constants(acting: Sequence[tuple[str, float, Tensor]], classes: int) -> None:
    """ValueError where a penalty of a training loss has no gradient: of tensors outside its graph, or of normalised features."""
    learning = [x.requires_grad for _, _, x in acting]
    if torch.is_grad_enabled() and any(learning) and not all(learning):
        name = acting[learning.index(False)][0]
        raise ValueError(f"penalty: {name} needs no gradient while other tensors do, so its term is constant; give it undetached, or lam=0")
    for name, _, x in acting:
        if name != "features" or x.dtype not in (torch.float32, torch.float64) or len(x) <= classes or x.is_meta:
            continue
        rows = x.detach()
        sizes = torch.linalg.vector_norm(rows, dim=1)
        if not bool((sizes.amax() - sizes.amin() <= 8 * torch.finfo(x.dtype).eps * sizes.amax()) & (sizes.amin() > 0)):
            continue
        some = rows[: classes + 1] / sizes[: classes + 1, None]
        if bool(torch.all(torch.nn.functional.pdist(some) > 1e-3)):  # at collapse, too, norms are equal, but of K + 1 rows two are
            raise ValueError(
                f"penalty: all features have norm {float(sizes[0]):g}: normalised, so that their penalty moves nothing; "
                "give them as they are before that, or use a problem with radius= and lam_h=0"
            )


def ufm_problem(
    counts: ArrayLike,
    *,
    width: int,
    features: Literal["free", "relu"],
    depth: int = 1,
    activation: Literal["linear", "relu"] = "linear",
    loss: nn.Module | Loss | None = None,
    loss_factor: float = 1.0,
    batch: int | None = None,
    sampling: Literal["plain", "balanced"] = "plain",
    optimiser: Literal["SGD", "Adam", "AdamW"] = "SGD",
    weight_decay: float | Sequence[float] = 0.0,
    decayed: Literal["head", "all"] = "all",
    weight_penalty: float | Sequence[float] = 0.0,
    feature_penalty: float = 0.0,
    feature_over: Literal["sum", "mean", "batch_sum"] = "sum",
    feature_ratio: float | None = None,
    halves: bool = True,
    bias: Literal["none", "free", "decayed"] = "none",
    bias_penalty: float = 0.0,
    head: Head | None = None,
    radius: float | None = None,
    batch_norm: bool | None = None,
    augmentation: bool | None = None,
) -> Reading:
    """The problem of a network whose body gives features (counts (K,), width d, "relu" after a last ReLU) to `depth` weight matrices.

    loss: nn.CrossEntropyLoss(...), nn.MSELoss(...) on one-hot targets, or a loss of ufm, meant over samples; times loss_factor.
    weight_decay: the optimiser's, on the head or all parameters, its bias too if "decayed". In the loss: weight_penalty ||W_l||^2 (both
    a number or (L,), W_1 first), feature_penalty ||h_i||^2 over all N samples ("sum", as `penalty`), their "mean", or the "batch_sum",
    and bias_penalty ||b||^2, all times 1/2 unless halves=False. radius: the norm features are scaled to. batch None: full.
    feature_ratio: sum_i ||h_i||^2/||W_1||^2 of the trained network, which gives lam_h where the body's decay alone holds features back.
    UserWarning names the assumptions that fail. ValueError or TypeError where the settings have no problem, such as decay by AdamW.
    """
    chosen = {"optimiser": optimiser, "decayed": decayed, "feature_over": feature_over, "bias": bias, "sampling": sampling}
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"ufm_problem: {name} is {value!r}, but must be one of {', '.join(map(repr, CHOICES[name]))}")
    held, bare = Learned() if head is None else head, Problem(counts, width=width, features=features, lam_w=0, lam_h=0)
    n = bare.counts[0] if sampling == "plain" else np.full(bare.classes, bare.counts.max())
    N = int(n.sum())
    B = N if batch is None else int(_number("batch", batch, least=1))
    if bare.cells != 1 or B not in (batch, N) or B > N:
        raise ValueError(f"ufm_problem: counts hold {bare.cells} cells of N = {N}, batch is {batch}; give one cell, a whole batch <= N")
    decay, written = _per_layer("weight_decay", weight_decay, depth), _per_layer("weight_penalty", weight_penalty, depth)
    h, b = _number("feature_penalty", feature_penalty), _number("bias_penalty", bias_penalty)
    if optimiser == "AdamW" and np.any(decay > 0):
        raise ValueError(
            f"ufm_problem: optimiser='AdamW' with weight_decay={weight_decay} minimises no penalised loss (its decay is not divided as its "
            "gradient is), so no unconstrained features model stands for it; use 'Adam' or 'SGD', or write a weight_penalty into the loss"
        )
    if bias == "none" and b > 0:
        raise ValueError(f"ufm_problem: bias_penalty is {b:g}, but bias='none'; give bias='free' for a bias without weight decay")
    data, factor, exact = _data_term(CrossEntropy() if loss is None else loss, bare.counts, n, B)
    factor *= _number("loss_factor", loss_factor, above=0.0)
    times = 1.0 if halves else 2.0
    w, own_b = decay + times * written, (bias == "decayed") * decay[-1] + times * b
    lam = PAPERS[FEATURE_SUMS[feature_over]].to_ufm(w / factor, times * h / factor, own_b / factor, N=N, batch=B)
    through_body = decayed == "all" and bool(np.any(decay > 0))
    problem = Problem(
        n,
        width=width,
        depth=depth,
        features=features,
        activation=activation,
        loss=data,
        lam_w=np.zeros((1, depth)) if held.norms else lam.lam_w[None, :],
        lam_h=_feature_penalty(lam, feature_ratio, radius, through_body),
        lam_b=None if bias == "none" else lam.lam_b,
        head=held,
        radius=radius,
    )
    idle = [name for name, is_so in (("weights", held.norms and np.any(w > 0)), ("features", radius is not None and h > 0)) if is_so]
    facts = _Facts(idle, through_body, feature_ratio, optimiser if np.any(decay > 0) else "", B, exact, sampling, batch_norm, augmentation)
    assumptions = tuple(Assumption(sentence, holds) for matters, sentence, holds in _assumed(problem, facts) if matters)
    failing = [a.sentence for a in assumptions if a.holds is False]
    if failing:
        warnings.warn("ufm_problem: the prediction assumes what these settings break. " + " ".join(failing), UserWarning, stacklevel=2)
    return Reading(problem, assumptions)


def _data_term(loss: nn.Module | Loss, counts: NDArray[np.int64], drawn: NDArray[np.int64], batch: int) -> tuple[Loss, float, bool]:
    """The loss of a sample in ufm's convention, the factor of its mean over samples, and whether that is exact for every batch.

    PyTorch's weighted mean divides by the batch's own sum of weights, here by the mean such sum; nn.MSELoss is a mean over classes too.
    """
    if isinstance(loss, Loss):
        shift = loss.per_class(counts)["logit_adjustment"] if isinstance(loss, CrossEntropy) else None
        return (loss if shift is None else replace(loss, logit_adjustment=shift[0])), 1.0, True
    if not isinstance(loss, READ) or type(loss) not in READ or loss.reduction not in ("mean", "sum"):
        raise TypeError(
            f"ufm_problem: loss is {loss!r:.80}, but must be nn.CrossEntropyLoss or nn.MSELoss themselves, with reduction 'mean' or 'sum', "
            "called, or a loss of ufm meant over samples: ufm.CrossEntropy(), ufm.MSE(), ufm.Focal(gamma), ..."
        )
    mean, K, N = loss.reduction == "mean", len(drawn), int(drawn.sum())
    if isinstance(loss, nn.MSELoss):
        return MSE(), 2.0 / K if mean else 2.0 * batch, True
    if 0 <= loss.ignore_index < K:
        raise ValueError(
            f"ufm_problem: nn.CrossEntropyLoss has ignore_index={loss.ignore_index}, which leaves one of the K = {K} classes out; give one "
            "that is no class, as -100, its default"
        )
    factor = 1.0 if mean else float(batch)
    if loss.weight is None:
        return CrossEntropy(label_smoothing=loss.label_smoothing), factor, True
    if loss.label_smoothing:
        raise ValueError(
            "ufm_problem: nn.CrossEntropyLoss has weight and label_smoothing, and weights the smoothed labels one by one, which "
            "ufm.CrossEntropy does not; use one of them"
        )
    omega = loss.weight.detach().cpu().double().numpy()
    if omega.shape != (K,):
        raise ValueError(f"ufm_problem: nn.CrossEntropyLoss has weight of shape {omega.shape}, but there are K = {K} classes")
    return CrossEntropy(class_weights=omega * N / (drawn @ omega) if mean else omega), factor, not mean or batch == N


def _feature_penalty(lam: Penalties, ratio: float | None, radius: float | None, through_body: bool) -> float:
    """lam_h: 0 under a radius; the loss's own; or, by the balance lam_w ||W_1||^2 = lam_h sum ||h||^2, from a measured ratio."""
    if ratio is not None:
        if radius is not None or lam.lam_h > 0 or not through_body or not lam.lam_w[0] > 0:
            raise ValueError(
                f"ufm_problem: feature_ratio is {ratio}, but it stands for the body's weight decay where nothing else holds the features; "
                "use it with decayed='all', weight_decay > 0, feature_penalty=0 and radius=None"
            )
        return float(lam.lam_w[0]) / _number("feature_ratio", ratio, above=0.0)
    if through_body and radius is None and lam.lam_h == 0:
        raise ValueError(
            "ufm_problem: weight_decay acts on all layers and feature_penalty is 0, so the body's decay alone holds the features, and "
            "does not determine lam_h; write a feature_penalty into the loss, or give feature_ratio= as measured on the trained network"
        )
    return 0.0 if radius is not None else float(lam.lam_h)


class _Facts(NamedTuple):
    """What the assumptions depend on beside the problem; idle: of what a penalty is constant."""

    idle: list[str]
    through_body: bool
    feature_ratio: float | None
    optimiser: str
    batch: int
    exact: bool
    sampling: str
    batch_norm: bool | None
    augmentation: bool | None


def _assumed(problem: Problem, facts: _Facts) -> list[tuple[bool, str, bool | None]]:
    """Of every assumption: whether it matters here, the sentence, whether it holds."""
    N, K, d, B = int(problem.samples[0]), problem.classes, problem.width, facts.batch
    least = _least_width(problem)
    held = problem.radius is not None or problem.lam_h[0] > 0
    lam_h = f"lam_h = {problem.lam_h[0]:.3g}"
    ratio = facts.feature_ratio is not None
    return [
        (True, "The body can move the features of every sample freely, and training goes on until the gradient is small.", None),
        (not ratio, "The features are held by a penalty of their own in the loss, or by their radius.", held),
        (ratio, f"The body's weight decay acts on the features as {lam_h} would; of this, only the balance of scales is known.", None),
        (
            facts.through_body and not ratio and problem.radius is None,
            "The body's parameters have no weight decay, a second penalty of the features.",
            False,
        ),
        (bool(facts.idle), f"No penalty is of what is normalised; that of the {' and '.join(facts.idle)} is constant and left out.", False),
        (problem.special is None and held, "At the end lam_w ||W_1||^2 = lam_h sum_i ||h_i||^2, as at every stationary point.", None),
        (True, f"The width d = {d} is at least {least}, as the optimum needs.", d >= least),
        (problem.features == "free", "The features may have any sign: the body does not end in a ReLU.", None),
        (problem.features == "relu", "The features are at least 0, and each can be 0 or grow by itself: the body ends in a ReLU.", None),
        (problem.activation == "relu" and problem.depth > 1, "Samples of a class have equal features (not proven of ReLU chains).", None),
        (True, "The features do not come straight from a BatchNorm, which fixes their scale.", _denied(facts.batch_norm)),
        (True, "A sample has one feature: no augmentation, no dropout.", _denied(facts.augmentation)),
        (facts.optimiser == "Adam", "Adam's decay is in its gradient, so that it rests where the penalised loss is stationary.", True),
        (B < N, f"The noise of batches of {B} averages out: the problem holds in expectation.", None),
        (B < N and N % B > 0, f"All batches have the same size: N = {N} is no multiple of {B}, so the last one is left out.", None),
        (not facts.exact, "The sum of class weights is the same in every batch, by which nn.CrossEntropyLoss divides.", False),
        (facts.sampling == "balanced", f"Classes are drawn equally often: the counts are {N // K} each, copies included.", True),
    ]


def _least_width(problem: Problem) -> int:
    """K, or K - 1 where an optimal W h has rank K - 1: by softmax or a free bias, with no ReLU to keep what W_L multiplies at least 0."""
    signed = problem.features == "free" and (problem.depth == 1 or problem.activation == "linear")
    free_bias = problem.loss.name == MSE.name and problem.lam_b is not None and problem.lam_b[0] == 0
    return problem.classes - (signed and (problem.loss.name in SOFTMAX or bool(free_bias)))


def _denied(fact: bool | None) -> bool | None:
    return None if fact is None else not fact


def _number(name: str, value: Any, *, least: float = 0.0, above: float = -np.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value < least or value <= above:
        raise ValueError(
            f"ufm_problem: {name} is {value!r}, but must be a finite number{f' above {above:g}' if above >= 0 else f', at least {least:g}'}"
        )
    return float(value)


def _per_layer(name: str, value: Any, depth: int) -> Floats:
    """A number, or one for each of W_1 ... W_L, as (L,)."""
    numbers = [_number(name, x) for x in (list(value) if np.ndim(value) else [value])]
    if len(numbers) not in (1, depth):
        raise ValueError(
            f"ufm_problem: {name} holds {len(numbers)} numbers, but depth is {depth}; give one, or one for each of W_1 ... W_L"
        )
    return np.broadcast_to(np.array(numbers), depth)
