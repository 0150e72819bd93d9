"""The regularisation of a training loss is that of F, and the problem read off training settings has the gradient of the loop itself."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import catalog
import ufm
from ufm.objective import objective
from ufm.problem import PAPERS

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from ufm.bridge.problem import Reading, penalty, ufm_problem  # noqa: E402

Tensor = torch.Tensor


def leaf(x: Any) -> Tensor:
    return torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True)


def close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected), initial=1e-300)


# --- penalty -------------------------------------------------------------------------------------------------------------------------

CELLS = [(f"{name}-cell{g}", p.cell(g)) for name, p in catalog.PROBLEMS for g in range(p.cells)]


def sample_rows(problem: ufm.Problem, H: Tensor) -> Tensor:
    """(B, d) features of all samples from the columns (d, cols) of the problem: class means stand for n_k equal samples."""
    rows = torch.relu(H).mT if problem.features == "relu_of_free" else H.mT
    return rows.repeat_interleave(torch.tensor(problem.multiplicity[0].astype(int)), dim=0)


@pytest.mark.parametrize("problem", [p for _, p in CELLS], ids=[n for n, _ in CELLS])
def test_penalty_is_that_of_the_objective(problem: ufm.Problem) -> None:
    """Value and the gradient in every factor are those of F's penalty part, at the same factors, to 1e-12."""
    at = catalog.factors(problem)
    H, *weights = leaves = [leaf(f[0]) for f in at]
    bias = None if problem.lam_b is None else weights.pop()[:, 0]
    got = penalty(problem, weights, sample_rows(problem, H), bias=bias)
    value, slopes = objective(problem).penalty_part(at)
    assert got.dtype == torch.float64
    assert got.ndim == 0
    close(got.item(), value[0])
    own = torch.autograd.grad(got, leaves, allow_unused=True)
    for mine, theirs in zip(own, slopes, strict=True):
        close(np.zeros_like(theirs[0]) if mine is None else mine.numpy(), theirs[0])


DEEP = ufm.Problem([3, 2, 1], width=4, depth=3, features="free", lam_w=[[0.3, 0.2, 0.1]], lam_h=0.05, lam_b=0.4)


def parts(problem: ufm.Problem, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Weights, features of all N samples, bias."""
    rng = np.random.default_rng(seed)
    d, K, L = problem.width, problem.classes, problem.depth
    weights = [leaf(rng.normal(size=(d, d))) for _ in range(L - 1)] + [leaf(rng.normal(size=(K, d)))]
    return weights, leaf(rng.normal(size=(problem.samples[0], d))), None if problem.lam_b is None else leaf(rng.normal(size=K))


@pytest.mark.parametrize("B", [1, 2, 5, 6])
def test_expectation_over_batches_is_the_full_penalty(B: int) -> None:
    """The mean over all batches of a size is the full penalty, in value and gradient; so is that of an epoch's disjoint batches."""
    weights, H, b = parts(DEEP)
    full = penalty(DEEP, weights, H, bias=b)
    batches = [list(rows) for rows in itertools.combinations(range(6), B)]
    mean = sum(penalty(DEEP, weights, H[rows], bias=b) for rows in batches) / len(batches)
    close(mean.item(), full.item(), 1e-13)
    for mine, theirs in zip(*(torch.autograd.grad(x, [*weights, H, b]) for x in (mean, full)), strict=True):
        close(mine, theirs)
    if 6 % B == 0:
        epoch = sum(penalty(DEEP, weights, H[i : i + B], bias=b) for i in range(0, 6, B)) / (6 // B)
        close(epoch.item(), full.item(), 1e-13)


def test_total_takes_the_place_of_n() -> None:
    weights, H, b = parts(DEEP)
    other = replace(DEEP, counts=[[30, 20, 10]])
    close(penalty(DEEP, weights, H, bias=b, total=60).item(), penalty(other, weights, H, bias=b).item(), 1e-15)


class Body(nn.Module):
    """A small network: features, a chain of three weight matrices, a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))


TERMS = {
    "W_1": dict(lam_w=[[0.3, 0, 0]]),
    "W_2": dict(lam_w=[[0, 0.3, 0]]),
    "W_3": dict(lam_w=[[0, 0, 0.3]]),
    "features": dict(lam_h=0.3),
    "bias": dict(lam_b=0.3),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_term_moves_what_it_claims_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """A term alone has a gradient on its own parameters, for the features on every layer of the body; a step along it lowers the term."""
    problem = replace(DEEP, **({"lam_w": 0.0, "lam_h": 0.0, "lam_b": 0.0} | TERMS[name]))
    net, X = Body().to(dtype), torch.randn(6, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def term() -> Tensor:
        return penalty(problem, [layer.weight for layer in net.head], net.body(X), bias=net.head[2].bias)

    own = {"W_1": [net.head[0].weight], "W_2": [net.head[1].weight], "W_3": [net.head[2].weight], "bias": [net.head[2].bias]}
    own["features"] = list(net.body.parameters())
    before = term()
    before.backward()
    for parameter in net.parameters():
        moved = parameter.grad is not None and float(torch.linalg.vector_norm(parameter.grad)) > 1e-3
        assert moved == any(parameter is p for p in own[name])
    with torch.no_grad():
        for parameter in own[name]:
            parameter -= 0.01 * parameter.grad
    slope = sum(float(torch.sum(p.grad**2)) for p in own[name])
    assert float(before.detach() - term().detach()) == pytest.approx(0.01 * slope, rel=0.05)


NORMALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "unit": lambda h: normalize(h, dim=1),
    "radius": lambda h: 5.0 * normalize(h, dim=1),
    "layer norm": nn.LayerNorm(4, eps=0.0, elementwise_affine=False),
}


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_features_are_refused(name: str, dtype: torch.dtype) -> None:
    """The squared norm of normalised features has no gradient, as in a released code; the penalty says so in place of doing nothing."""
    weights, H, b = parts(DEEP)
    H = H.detach().to(dtype).requires_grad_()
    h = NORMALISED[name](H)
    idle, acting = (torch.autograd.grad((x**2).sum(), H)[0] for x in (h, 1.01 * H))
    assert float(idle.norm()) < 1e-5 * float(acting.norm())
    with pytest.raises(ValueError, match=r"^penalty: all features have norm [\d.]+: normalised, so that their penalty moves nothing"):
        penalty(DEEP, [W.to(dtype) for W in weights], NORMALISED[name](H), bias=b)


def test_collapsed_features_of_one_norm_are_not_refused() -> None:
    """At the optimum of a balanced problem all norms are equal, and the penalty acts all the same."""
    problem = ufm.Problem([4] * 3, width=4, features="free", lam_w=0.01, lam_h=0.01)
    H, W = (torch.tensor(f[0]) for f in ufm.solve(problem).factors)
    rows = H.mT.repeat_interleave(4, dim=0).requires_grad_()
    assert float((rows.detach().norm(dim=1) / rows[0].detach().norm() - 1).abs().max()) < 1e-8
    (slope,) = torch.autograd.grad(penalty(problem, [W.requires_grad_()], rows), rows)
    close(slope, 0.01 * rows.detach())
    exact = torch.eye(4, dtype=torch.float64)[:3].repeat_interleave(4, dim=0).requires_grad_()
    assert penalty(problem, [W], exact).item() == pytest.approx(0.005 * float((W.detach() ** 2).sum()) + 0.06, rel=1e-14)


def test_without_gradients_it_is_a_value() -> None:
    weights, H, b = parts(DEEP)
    with torch.no_grad():
        value = penalty(DEEP, weights, H.detach(), bias=b)
    assert value.item() == penalty(DEEP, weights, H, bias=b).item()
    assert penalty(DEEP, [W.detach() for W in weights], H.detach(), bias=b.detach()).item() == value.item()


def test_low_precision_is_summed_in_float32_and_problems_without_penalty_are_zero() -> None:
    weights, H, b = parts(DEEP)
    low = [x.bfloat16() for x in (*weights, H, b)]
    high = [x.double() for x in low]
    got, exact = (penalty(DEEP, x[:3], x[3], bias=x[4]) for x in (low, high))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)
    assert penalty(replace(DEEP, lam_w=0.0, lam_h=0.0, lam_b=0.0), weights, H, bias=b).item() == 0.0


def test_meta_tensors_go_through() -> None:
    """Nothing is made on the default device, or read."""
    weights, H, b = (x if isinstance(x, list) else [x] for x in parts(DEEP))
    got = penalty(DEEP, [W.to("meta") for W in weights], H[0].to("meta"), bias=b[0].to("meta"))
    assert got.device.type == "meta"


W3, FEATURES, B3 = parts(DEEP)
BAD_PENALTY = [
    (lambda: penalty(DEEP, W3[::-1], FEATURES, bias=B3), "penalty: weights have shapes"),
    (
        lambda: penalty(DEEP, W3[2], FEATURES, bias=B3),
        "penalty: weights have shapes [(3, 4)], but the problem needs [(4, 4), (4, 4), (3, 4)]",
    ),
    (lambda: penalty(DEEP, W3, FEATURES.mT, bias=B3), "penalty: features have shape (4, 6), but must be (B, d = 4)"),
    (lambda: penalty(DEEP, W3, FEATURES[:0], bias=B3), "penalty: features have shape (0, 4)"),
    (lambda: penalty(DEEP, W3, FEATURES), "penalty: bias is None, but the problem has one penalised by lam_b = 0.4"),
    (lambda: penalty(replace(DEEP, lam_b=None), W3, FEATURES, bias=B3), "penalty: bias is given, but the problem has no bias"),
    (lambda: penalty(DEEP, W3, FEATURES, bias=B3[:2]), "penalty: bias has shape (2,), but must hold K = 3 numbers"),
    (lambda: penalty(DEEP, W3, FEATURES.detach(), bias=B3), "penalty: features needs no gradient while other tensors do"),
    (lambda: penalty(DEEP, [W3[0], W3[1].detach(), W3[2]], FEATURES, bias=B3), "penalty: W_2 needs no gradient while other tensors do"),
    (lambda: penalty(replace(DEEP, lam_h=[0.1, 0.2]), W3, FEATURES, bias=B3), "penalty: the problem has 2 cells"),
]


@pytest.mark.parametrize(("call", "says"), BAD_PENALTY, ids=[s[:50] for _, s in BAD_PENALTY])
def test_bad_input_of_penalty(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


# --- ufm_problem: the user's loop, written out, on free features -----------------------------------------------------------------------

COUNTS, LABELS = [3, 2, 1], torch.tensor([0, 0, 0, 1, 1, 2])
ONEHOT = torch.eye(3, dtype=torch.float64)[LABELS]
SHARE = torch.tensor([3, 2, 1], dtype=torch.float64) / 6
OMEGA = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
WD, WP, FP, BP = 0.07, 0.11, 0.013, 0.19


def ce(z: Tensor, rows: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(z, LABELS[rows])


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


@dataclass(frozen=True)
class Loop:
    """A training loop as its user writes it, and how its user tells ufm_problem.

    data: (logits of the batch, indices of its samples) -> loss. extra: (features, weights, bias) -> what is added. decay: of the
    optimiser, for each weight matrix, then the bias. factor: the loop's gradient over that of F.
    """

    settings: dict[str, Any]
    data: Callable[[Tensor, Tensor], Tensor] = ce
    extra: Callable[[Tensor, list[Tensor], Any], Any] = lambda h, W, b: 0.0
    decay: tuple[float, ...] = (0.0, 0.0, 0.0)
    factor: float = 1.0
    depth: int = 1
    bias: bool = False
    shown: Callable[[Tensor], Tensor] = lambda h: h
    rows: Callable[[Tensor], Tensor] = lambda W: W
    fixed: Any = None
    warns: str | None = None
    relu: bool = field(default=False, kw_only=True)


FEATURE_SUM = dict(feature_penalty=FP, batch=2, weight_penalty=WP)


def in_sum(h: Tensor, W: list[Tensor], b: Any) -> Any:
    """The feature penalty over all N = 6 samples, estimated by a batch."""
    return WP / 2 * square(W[0]) + FP / 2 * 6 / len(h) * square(h)


LOOPS: dict[str, Loop] = {
    "penalties in the loss": Loop(FEATURE_SUM, extra=in_sum),
    "mean feature decay": Loop(
        dict(FEATURE_SUM, feature_over="mean"), extra=lambda h, W, b: WP / 2 * square(W[0]) + FP / 2 * (h * h).sum(1).mean()
    ),
    "batch sum": Loop(dict(FEATURE_SUM, feature_over="batch_sum"), extra=lambda h, W, b: WP / 2 * square(W[0]) + FP / 2 * square(h)),
    "no halves (Hong & Ling 2023)": Loop(
        dict(FEATURE_SUM, halves=False, bias="free", bias_penalty=BP),
        extra=lambda h, W, b: WP * square(W[0]) + FP * 6 * (h * h).sum(1).mean() + BP * square(b),
        bias=True,
    ),
    "CE/2, optimiser's decay, batch sum (release of Dang et al. 2024)": Loop(
        dict(loss_factor=0.5, weight_decay=WD, decayed="head", feature_penalty=FP, feature_over="batch_sum", batch=2),
        data=lambda z, rows: ce(z, rows) / 2,
        extra=lambda h, W, b: FP / 2 * square(h),
        decay=(WD, 0.0),
        factor=0.5,
    ),
    "summed CE, full batch": Loop(
        dict(loss=nn.CrossEntropyLoss(reduction="sum"), weight_penalty=WP, feature_penalty=FP),
        data=lambda z, rows: nn.CrossEntropyLoss(reduction="sum")(z, LABELS[rows]),
        extra=lambda h, W, b: WP / 2 * square(W[0]) + FP / 2 * square(h),
        factor=6.0,
    ),
    "summed CE, batches": Loop(
        dict(
            loss=nn.CrossEntropyLoss(reduction="sum"),
            weight_decay=WD,
            decayed="head",
            feature_penalty=FP,
            feature_over="batch_sum",
            batch=2,
        ),
        data=lambda z, rows: nn.CrossEntropyLoss(reduction="sum")(z, LABELS[rows]),
        extra=lambda h, W, b: FP / 2 * square(h),
        decay=(WD, 0.0),
        factor=2.0,
    ),
    "nn.MSELoss, a mean over classes too": Loop(
        dict(FEATURE_SUM, loss=nn.MSELoss()), data=lambda z, rows: nn.MSELoss()(z, ONEHOT[rows]), extra=in_sum, factor=2 / 3
    ),
    "nn.MSELoss, summed": Loop(
        dict(FEATURE_SUM, loss=nn.MSELoss(reduction="sum")),
        data=lambda z, rows: nn.MSELoss(reduction="sum")(z, ONEHOT[rows]),
        extra=in_sum,
        factor=4.0,
    ),
    "half squares a sample": Loop(
        dict(FEATURE_SUM, loss=ufm.MSE()), data=lambda z, rows: 0.5 * ((z - ONEHOT[rows]) ** 2).sum(1).mean(), extra=in_sum
    ),
    "squares a sample": Loop(
        dict(FEATURE_SUM, loss=ufm.MSE(), loss_factor=2.0),
        data=lambda z, rows: ((z - ONEHOT[rows]) ** 2).sum(1).mean(),
        extra=in_sum,
        factor=2.0,
    ),
    "label smoothing": Loop(
        dict(FEATURE_SUM, loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        data=lambda z, rows: nn.CrossEntropyLoss(label_smoothing=0.1)(z, LABELS[rows]),
        extra=in_sum,
    ),
    "class weights, PyTorch's weighted mean": Loop(
        dict(loss=nn.CrossEntropyLoss(weight=OMEGA), weight_penalty=WP, feature_penalty=FP),
        data=lambda z, rows: nn.CrossEntropyLoss(weight=OMEGA)(z, LABELS[rows]),
        extra=in_sum,
    ),
    "class weights, summed": Loop(
        dict(FEATURE_SUM, loss=nn.CrossEntropyLoss(weight=OMEGA, reduction="sum")),
        data=lambda z, rows: nn.CrossEntropyLoss(weight=OMEGA, reduction="sum")(z, LABELS[rows]),
        extra=in_sum,
        factor=2.0,
    ),
    "temperature": Loop(dict(FEATURE_SUM, loss=ufm.CrossEntropy(temperature=0.25)), data=lambda z, rows: ce(z / 0.25, rows), extra=in_sum),
    "logit adjustment": Loop(
        dict(FEATURE_SUM, loss=ufm.CrossEntropy(logit_adjustment=0.7)), data=lambda z, rows: ce(z + 0.7 * SHARE.log(), rows), extra=in_sum
    ),
    "focal": Loop(
        dict(FEATURE_SUM, loss=ufm.Focal(2.0)),
        data=lambda z, rows: (lambda p: -((1 - p) ** 2 * p.log()).mean())((z.softmax(1) * ONEHOT[rows]).sum(1)),
        extra=in_sum,
    ),
    "free bias": Loop(
        dict(feature_penalty=FP, batch=3, weight_decay=WD, decayed="head", bias="free"),
        extra=lambda h, W, b: FP / 2 * 6 / len(h) * square(h),
        decay=(WD, 0.0),
        bias=True,
    ),
    "bias decayed with the rest": Loop(
        dict(feature_penalty=FP, batch=3, weight_decay=WD, decayed="head", bias="decayed", weight_penalty=WP, bias_penalty=BP),
        extra=lambda h, W, b: WP / 2 * square(W[0]) + FP / 2 * 6 / len(h) * square(h) + BP / 2 * square(b),
        decay=(WD, WD),
        bias=True,
    ),
    "decay on all layers beside a feature penalty": Loop(
        dict(feature_penalty=FP, weight_decay=WD),
        extra=lambda h, W, b: FP / 2 * square(h),
        decay=(WD, 0.0),
        warns="The body's parameters have no weight decay",
    ),
    "deep linear head, decay a layer": Loop(
        dict(depth=3, weight_decay=[WD, 2 * WD, 3 * WD], decayed="head", feature_penalty=FP, batch=2),
        extra=lambda h, W, b: FP / 2 * 6 / len(h) * square(h),
        decay=(WD, 2 * WD, 3 * WD, 0.0),
        depth=3,
    ),
    "deep ReLU head on ReLU features, penalties a layer": Loop(
        dict(depth=2, activation="relu", features="relu", weight_penalty=[WP, 2 * WP], feature_penalty=FP, batch=2, loss=nn.MSELoss()),
        data=lambda z, rows: nn.MSELoss()(z, ONEHOT[rows]),
        extra=lambda h, W, b: WP / 2 * square(W[0]) + WP * square(W[1]) + FP / 2 * 6 / len(h) * square(h),
        factor=2 / 3,
        depth=2,
        relu=True,
    ),
    "features of norm 5": Loop(
        dict(weight_decay=WD, decayed="head", radius=5.0, batch=2), decay=(WD, 0.0), shown=lambda h: 5.0 * normalize(h, dim=1)
    ),
    "a penalty of normalised features, which does nothing": Loop(
        dict(weight_decay=WD, decayed="head", radius=5.0, batch=2, feature_penalty=FP),
        extra=lambda h, W, b: FP / 2 * 6 / len(h) * square(h),
        decay=(WD, 0.0),
        shown=lambda h: 5.0 * normalize(h, dim=1),
        warns="that of the features is constant and left out",
    ),
    "cosines": Loop(
        dict(radius=4.0, head=ufm.heads.UnitRows(), batch=2),
        shown=lambda h: 4.0 * normalize(h, dim=1),
        rows=lambda W: normalize(W, dim=1),
    ),
    "cosines, decayed in vain": Loop(
        dict(radius=4.0, head=ufm.heads.UnitRows(), batch=2, weight_penalty=WP, feature_penalty=FP),
        extra=lambda h, W, b: WP / 2 * square(W[0]) + FP / 2 * square(h),
        shown=lambda h: 4.0 * normalize(h, dim=1),
        rows=lambda W: normalize(W, dim=1),
        warns="that of the weights and features is constant and left out",
    ),
    "fixed ETF": Loop(
        dict(FEATURE_SUM, weight_penalty=0.0, head=ufm.heads.FixedETF(bias=None)),
        extra=lambda h, W, b: FP / 2 * 6 / len(h) * square(h),
        fixed=ufm.heads.FixedETF().weights(3, 4),
    ),
}


def read(loop: Loop) -> Reading:
    """The reading of the loop's settings, with a warning where the loop is said to have one and nowhere else."""
    settings = {"width": 4, "features": "free"} | loop.settings
    if loop.warns is None:
        return ufm_problem(COUNTS, **settings)
    with pytest.warns(UserWarning, match=loop.warns) as caught:
        reading = ufm_problem(COUNTS, **settings)
    assert len(caught) == 1
    return reading


def start(loop: Loop, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Free features (N, d) and the head's parameters W_1, ..., W_L[, b]."""
    rng = np.random.default_rng(seed)
    H = rng.normal(size=(6, 4))
    weights = [rng.normal(size=(4, 4)) for _ in range(loop.depth - 1)] + [rng.normal(size=(3, 4)) if loop.fixed is None else loop.fixed]
    return leaf(np.abs(H) if loop.relu else H), [leaf(x) for x in (*weights, *([rng.normal(size=3)] if loop.bias else []))]


def logits(loop: Loop, h: Tensor, weights: list[Tensor], bias: Any) -> Tensor:
    for W in weights[:-1]:
        h = torch.relu(h @ W.mT) if loop.relu else h @ W.mT
    z = h @ weights[-1].mT
    return z if bias is None else z + bias


def step_of_the_loop(loop: Loop, seed: int) -> list[Tensor]:
    """Minus the mean displacement of torch's SGD with step 1 over all batches of the loop's size, from the same point: H, then the head."""
    H, head = start(loop, seed)
    batches = list(itertools.combinations(range(6), loop.settings.get("batch", 6)))
    total = [torch.zeros_like(x) for x in (H, *head)]
    for batch in batches:
        rows = torch.tensor(batch)
        leaves = [x.detach().clone().requires_grad_() for x in (H, *head)]
        groups = [{"params": [leaves[0]]}, *({"params": [x], "weight_decay": w} for x, w in zip(leaves[1:], loop.decay, strict=False))]
        optimiser = torch.optim.SGD(groups, lr=1.0)
        h, weights = loop.shown(leaves[0][rows]), [loop.rows(W) for W in leaves[1 : 1 + loop.depth]]
        bias = leaves[-1] if loop.bias else None
        (loop.data(logits(loop, h, weights, bias), rows) + loop.extra(h, weights, bias)).backward()
        optimiser.step()
        total = [t + (x - y).detach() / len(batches) for t, x, y in zip(total, (H, *head), leaves, strict=True)]
    return total[:1] if loop.fixed is not None else total


def gradient_of_the_problem(loop: Loop, problem: ufm.Problem, seed: int) -> list[Tensor]:
    """The gradient of F at the same point, through the normalisation of features and rows where the loop has one."""
    H, head = start(loop, seed)
    h, weights = loop.shown(H), [loop.rows(W) for W in head[: loop.depth]]
    made = [h.mT, *weights, *(x[:, None] for x in head[loop.depth :])]
    slopes = objective(replace(problem, columns="samples")).value_and_gradient([x.detach().numpy()[None] for x in made])[1]
    leaves = [H] if loop.fixed is not None else [H, *head]
    return list(torch.autograd.grad(made, leaves, [torch.tensor(s[0]) for s in slopes]))


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loop_follows_the_gradient_of_the_problem(name: str, seed: int) -> None:
    """SGD's mean step over all batches is a constant times the gradient of F, the same constant in every parameter and entry."""
    loop = LOOPS[name]
    mine, theirs = step_of_the_loop(loop, seed), gradient_of_the_problem(loop, read(loop).problem, seed)
    for step, slope in zip(mine, theirs, strict=True):
        assert float(slope.norm()) > 1e-3
        close(step, loop.factor * slope)


def weighted_draws(B: int) -> list[tuple[float, Tensor]]:
    """Every batch of B class-balanced draws with replacement, and its probability."""
    chance = [1 / (3 * COUNTS[y]) for y in LABELS.tolist()]
    return [(float(np.prod([chance[i] for i in batch])), torch.tensor(batch)) for batch in itertools.product(range(6), repeat=B)]


@pytest.mark.parametrize("over", ["mean", "batch_sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=OMEGA, reduction="sum")], ids=["plain", "weighted"])
def test_class_balanced_sampling(over: Any, loss: nn.CrossEntropyLoss) -> None:
    """Drawing classes equally often follows the problem of equal counts: on class means, in expectation over all draws."""
    reading = ufm_problem(
        COUNTS, width=4, features="free", loss=loss, batch=2, sampling="balanced", weight_penalty=WP, feature_penalty=FP, feature_over=over
    )
    assert reading.problem.counts.tolist() == [[3, 3, 3]]
    rng = np.random.default_rng(0)
    M, W = leaf(rng.normal(size=(3, 4))), leaf(rng.normal(size=(3, 4)))
    total: Any = 0.0
    for chance, rows in weighted_draws(2):
        h = M[LABELS[rows]]
        held = square(h) if over == "batch_sum" else (h * h).sum(1).mean()
        total = total + chance * (loss(h @ W.mT, LABELS[rows]) + FP / 2 * held)
    mine = torch.autograd.grad(total + WP / 2 * square(W), [M, W])
    slopes = objective(reading.problem).value_and_gradient([M.detach().numpy().T[None], W.detach().numpy()[None]])[1]
    factor = 1.0 if loss.weight is None else 2.0
    close(mine[0], factor * slopes[0][0].T)
    close(mine[1], factor * slopes[1][0])


def adams(optimiser: Any, decay: float, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    H, (W,) = start(Loop({}), 0)
    run = optimiser([{"params": [H], "weight_decay": 0.0}, {"params": [W], "weight_decay": decay}], lr=0.05, eps=1e-30)
    for _ in range(20):
        run.zero_grad()
        loss(H, W).backward()
        run.step()
    return [H.detach(), W.detach()]


def test_adams_decay_is_in_the_loss_and_adamws_is_not() -> None:
    """20 steps of Adam with weight decay are 20 of Adam on F itself; AdamW goes elsewhere, and has no problem."""
    settings = dict(width=4, features="free", loss_factor=0.5, weight_decay=0.3, decayed="head", feature_penalty=FP)
    problem = ufm_problem(COUNTS, optimiser="Adam", **settings).problem
    rows = torch.arange(6)

    def user(H: Tensor, W: Tensor) -> Tensor:
        return ce(H @ W.mT, rows) / 2 + FP / 2 * square(H)

    exact = adams(torch.optim.Adam, 0.0, lambda H, W: ce(H @ W.mT, rows) + penalty(problem, [W], H))
    adam, adamw = adams(torch.optim.Adam, 0.3, user), adams(torch.optim.AdamW, 0.3, user)
    for mine, other, theirs in zip(adam, adamw, exact, strict=True):
        close(mine, theirs, 1e-9)
        assert float((other - theirs).norm()) > 1e-2 * float(theirs.norm())
    with pytest.raises(ValueError, match=r"^ufm_problem: optimiser='AdamW' with weight_decay=0.3 minimises no penalised loss"):
        ufm_problem(COUNTS, optimiser="AdamW", **settings)
    assert ufm_problem(COUNTS, optimiser="AdamW", **{**settings, "weight_decay": 0.0, "weight_penalty": 0.3}).problem.lam_w[0, 0] == 0.6


def test_conventions_of_releases() -> None:
    """The settings of four papers give the penalties that the table of conventions gives, or the level the paper states."""
    dang = PAPERS["half_loss_minibatch"].to_ufm(1e-4, 1e-5, N=30000, batch=256)
    with pytest.warns(UserWarning, match="second penalty of the features"):
        problem = ufm_problem(
            [n for n in range(1000, 6000, 1000) for _ in range(2)],
            width=512,
            features="relu",
            loss_factor=0.5,
            optimiser="Adam",
            weight_decay=1e-4,
            feature_penalty=1e-5,
            feature_over="batch_sum",
            batch=256,
        ).problem
    assert (problem.lam_w[0, 0], problem.lam_h[0]) == pytest.approx((dang.lam_w, dang.lam_h), rel=1e-15)
    hong = PAPERS["no_halves"].to_ufm(5e-3, 5e-5, 1e-2)
    settings = dict(halves=False, weight_penalty=5e-3, feature_penalty=5e-5, bias="free", bias_penalty=1e-2)
    problem = ufm_problem([5000] * 4 + [4000] * 3 + [3000] * 3, width=512, features="free", batch=128, **settings).problem
    assert (problem.lam_w[0, 0], problem.lam_h[0], problem.lam_b[0]) == pytest.approx(tuple(hong), rel=1e-15)
    linear = ufm_problem([200, 100, 50, 50], width=64, depth=3, features="free", loss=ufm.MSE(), weight_penalty=5e-4, feature_penalty=5e-4)
    assert linear.problem.lam_w.tolist() == [[5e-4] * 3]
    assert linear.problem.lam_h.tolist() == [5e-4]
    garrod = ufm_problem([5000] * 10, width=64, depth=3, features="free", batch=10000, weight_penalty=5e-3, feature_penalty=1e-6).problem
    assert garrod.lam_h[0] * 5000 == pytest.approx(garrod.lam_w[0, 0], rel=1e-15)
    assert (5000 * garrod.lam_h[0] * np.prod(garrod.lam_w[0])) ** 0.25 == pytest.approx(5e-3, rel=1e-14)


def test_a_measured_ratio_gives_the_balance_of_a_decayed_body() -> None:
    """A chain at rest, its first two factors taken for the body: the problem read from the ratio has no force along the scales there."""
    deep = ufm.Problem([4, 3, 2], width=3, depth=2, features="free", lam_w=[[2e-2, 1e-2]], lam_h=3e-3)
    end = ufm.simulate(deep, ufm.rules.StabilisedFlow(), steps=20_000, tol=1e-10, start=ufm.starts.normal(2.0), seed=3)
    assert end.gradient_norm[0, -1] < 1e-9 or np.nanmin(end.gradient_norm) < 1e-9
    H, W1, W2 = end.factors
    h = W1 @ H
    ratio = float((deep.multiplicity[0] * (h[0] ** 2).sum(0)).sum() / (W2**2).sum())
    assert ratio > 1e-2
    reading = ufm_problem([4, 3, 2], width=3, features="free", weight_decay=1e-2, feature_ratio=ratio)
    slopes = objective(reading.problem).value_and_gradient([h, W2])[1]
    for x, slope in zip((h, W2), slopes, strict=True):
        assert abs(float((x * slope).sum())) < 1e-9 * float(np.linalg.norm(x))
    assert any(a.holds is None and "only the balance of scales is known" in a.sentence for a in reading.assumptions)


GIVEN: dict[str, Any] = dict(width=4, features="free", weight_penalty=0.1, feature_penalty=0.1)
ASSUMED: list[tuple[dict[str, Any], str, bool | None]] = [
    ({}, "can move the features of every sample freely", None),
    ({}, "held by a penalty of their own", True),
    ({"feature_penalty": 0.0}, "held by a penalty of their own", False),
    ({"feature_penalty": 0.0, "radius": 2.0}, "held by a penalty of their own", True),
    ({}, "lam_w ||W_1||^2 = lam_h sum_i ||h_i||^2", None),
    ({"weight_decay": 0.1}, "no weight decay, a second penalty", False),
    ({"width": 2}, "The width d = 2 is at least 2", True),
    ({"width": 2, "features": "relu"}, "The width d = 2 is at least 3", False),
    ({"width": 1}, "The width d = 1 is at least 2", False),
    ({"width": 2, "depth": 2, "activation": "relu"}, "The width d = 2 is at least 3", False),
    ({"features": "relu"}, "ends in a ReLU", None),
    ({}, "may have any sign", None),
    ({}, "BatchNorm", None),
    ({"batch_norm": True}, "BatchNorm", False),
    ({"batch_norm": False}, "BatchNorm", True),
    ({"augmentation": True}, "no augmentation", False),
    ({"depth": 2, "activation": "relu"}, "not proven of ReLU chains", None),
    ({"optimiser": "Adam", "weight_decay": 0.1, "decayed": "head"}, "Adam's decay is in its gradient", True),
    ({"batch": 2}, "batches of 2 averages out", None),
    ({"batch": 4}, "no multiple of 4", None),
    ({"batch": 2, "loss": nn.CrossEntropyLoss(weight=OMEGA)}, "by which nn.CrossEntropyLoss divides", False),
    ({"sampling": "balanced"}, "the counts are 3 each", True),
]


@pytest.mark.parametrize(("settings", "says", "holds"), ASSUMED, ids=[f"{i}-{s[:30]}" for i, (_, s, _) in enumerate(ASSUMED)])
def test_assumptions(settings: dict[str, Any], says: str, holds: bool | None) -> None:
    """Each is one sentence that holds, fails or is open; one warning names those that fail, and none comes where none does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reading = ufm_problem(COUNTS, **(GIVEN | settings))
    found = [a for a in reading.assumptions if says in a.sentence]
    assert [a.holds for a in found] == [holds]
    failing = [a.sentence for a in reading.assumptions if a.holds is False]
    assert len(caught) == bool(failing)
    assert all(sentence in str(caught[0].message) for sentence in failing)
    assert len(str(reading).splitlines()) == len(reading.assumptions)
    assert all(a.sentence.endswith(".") for a in reading.assumptions)


SETTINGS: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "smoothed, a bias": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "bias": "free", "bias_penalty": 0.1},
    "focal": {"loss": ufm.Focal(2.0)},
    "MSE": {"loss": nn.MSELoss(reduction="sum"), "batch": 1},
    "MSE, free bias": {"loss": nn.MSELoss(), "bias": "free"},
    "MSE, free bias, deep": {"loss": nn.MSELoss(), "bias": "free", "depth": 2},
    "MSE, penalised bias": {"loss": nn.MSELoss(), "bias": "free", "bias_penalty": 0.5},
}


@pytest.mark.parametrize("counts", [[4, 4, 4], [9, 3, 2]], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_width_asked_for_is_the_least_without_loss(name: str, counts: list[int]) -> None:
    """At the width that the sentence names the least F is that of width K + 2, and one less costs more."""
    settings = {"features": "free", "weight_penalty": 5e-3, "feature_penalty": 1e-3} | SETTINGS[name]

    def least(width: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = ufm_problem(counts, width=width, **settings).problem
        return float(ufm.solve(problem, runs=2, seed=1).value.min())

    text = str(ufm_problem(counts, width=5, **settings))
    enough = next(d for d in (1, 2, 3) if f"The width d = 5 is at least {d}, as the optimum needs." in text)
    best = least(5)
    assert least(enough) == pytest.approx(best, rel=1e-6)
    assert least(enough - 1) > 1.001 * best


def test_what_does_not_apply_is_not_said() -> None:
    """Full batches, no decay, free features: nothing about batches, optimisers, class weights or ReLUs."""
    text = str(ufm_problem(COUNTS, **GIVEN))
    for word in ("batches", "Adam", "CrossEntropyLoss", "ends in a ReLU", "body's", "left out", "each, copies"):
        assert word not in text, word


class Tempered(nn.CrossEntropyLoss):
    """Not what its class says."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input / 2, target)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"optimiser": "adam"}, "ufm_problem: optimiser is 'adam', but must be one of 'SGD', 'Adam', 'AdamW'"),
    ({"feature_over": "batch"}, "ufm_problem: feature_over is 'batch'"),
    ({"bias": True}, "ufm_problem: bias is True"),
    ({"weight_decay": -0.1}, "ufm_problem: weight_decay is -0.1"),
    ({"weight_decay": [0.1, 0.2]}, "ufm_problem: weight_decay holds 2 numbers, but depth is 1"),
    ({"weight_penalty": "0.1"}, "ufm_problem: weight_penalty is '0.1'"),
    ({"feature_penalty": float("nan")}, "ufm_problem: feature_penalty is nan"),
    ({"loss_factor": 0.0}, "ufm_problem: loss_factor is 0.0, but must be a finite number above 0"),
    ({"batch": 0}, "ufm_problem: batch is 0"),
    ({"batch": 7}, "ufm_problem: counts hold 1 cells of N = 6, batch is 7"),
    ({"batch": 2.5}, "ufm_problem: counts hold 1 cells of N = 6, batch is 2.5"),
    ({"counts": [[3, 2, 1], [2, 2, 2]]}, "ufm_problem: counts hold 2 cells"),
    ({"counts": [3, 0, 1]}, "Problem: counts holds 0"),
    ({"bias_penalty": 0.1}, "ufm_problem: bias_penalty is 0.1, but bias='none'"),
    ({"loss": "CE"}, "ufm_problem: loss is 'CE'"),
    ({"loss": nn.NLLLoss()}, "ufm_problem: loss is NLLLoss()"),
    ({"loss": Tempered()}, "ufm_problem: loss is Tempered(), but must be nn.CrossEntropyLoss or nn.MSELoss themselves"),
    ({"loss": nn.CrossEntropyLoss(ignore_index=0)}, "ufm_problem: nn.CrossEntropyLoss has ignore_index=0"),
    ({"loss": nn.CrossEntropyLoss(ignore_index=2)}, "ufm_problem: nn.CrossEntropyLoss has ignore_index=2"),
    ({"loss": nn.CrossEntropyLoss(reduction="none")}, "ufm_problem: loss is CrossEntropyLoss()"),
    ({"loss": nn.CrossEntropyLoss(weight=OMEGA, label_smoothing=0.1)}, "ufm_problem: nn.CrossEntropyLoss has weight and label_smoothing"),
    ({"loss": nn.CrossEntropyLoss(weight=OMEGA[:2])}, "ufm_problem: nn.CrossEntropyLoss has weight of shape (2,)"),
    ({"weight_decay": 0.1, "feature_penalty": 0.0}, "ufm_problem: weight_decay acts on all layers and feature_penalty is 0"),
    ({"weight_decay": 0.1, "feature_ratio": 2.0}, "ufm_problem: feature_ratio is 2.0"),
    ({"feature_penalty": 0.0, "feature_ratio": 2.0}, "ufm_problem: feature_ratio is 2.0"),
    ({"feature_penalty": 0.0, "weight_decay": 0.1, "feature_ratio": 0.0}, "ufm_problem: feature_ratio is 0.0"),
    ({"radius": -1.0, "feature_penalty": 0.0}, "Problem: radius is -1.0"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=[f"{i}-{s[13:50]}" for i, (_, s) in enumerate(BAD)])
def test_bad_input_of_ufm_problem(settings: dict[str, Any], says: str) -> None:
    given = GIVEN | {"counts": COUNTS} | settings
    with pytest.raises((ValueError, TypeError)) as caught:
        ufm_problem(given.pop("counts"), **given)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_no_class_is_no_matter() -> None:
    for index in (3, -100):
        assert ufm_problem(COUNTS, **GIVEN, loss=nn.CrossEntropyLoss(ignore_index=index)).problem.loss.name == "CE"


def test_predictions_come_from_it() -> None:
    """From the settings of a run to the theory of its end: margins by the closed form of the converted penalties."""
    problem = ufm_problem([200, 200, 20, 20], width=64, features="relu", weight_penalty=1e-2, feature_penalty=1e-4, batch=40).problem
    kappa2 = 440**2 * 1e-2 * 1e-4
    M = [np.log(3 * (np.sqrt(n * 4 / 3 / kappa2) - 1)) for n in (200, 200, 20, 20)]
    assert ufm.predict(problem).margins[0] == pytest.approx(M, rel=1e-12)
