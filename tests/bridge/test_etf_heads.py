"""Laws of the heads as modules: with free features they are the simulator's, gradients are those of differences, state is all there is."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ufm
from ufm import etf, starts
from ufm.arrays import to_numpy
from ufm.etf_policies import AsReleased, Constant, Cumulative, Fixed, Latest, Paper, Reference
from ufm.heads import FixedETF, NearestETF
from ufm.rules import GradientDescent

torch = pytest.importorskip("torch")
from torch.nn.functional import cross_entropy  # noqa: E402

from ufm.bridge.backward import nearest_etf as nearest_frame  # noqa: E402
from ufm.bridge.heads import FixedETFHead, NearestETFHead  # noqa: E402

DOUBLE = torch.float64
PAPER = NearestETF(form="full", delta=1e-3)


def module(options: Any, d: int, K: int, **others: Any) -> Any:
    """The module of the simulator's options, in double precision unless told."""
    others = {"dtype": DOUBLE} | others
    if isinstance(options, NearestETF):
        return NearestETFHead(d, K, options=options, **others)
    return FixedETFHead(d, K, rotation=options.rotation, seed=options.seed, bias=options.bias, **others)


def normal(*shape: int, seed: int = 0, **options: Any) -> Any:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), **({"dtype": DOUBLE} | options))


def buffers(head: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in head.named_buffers()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the simulator's heads ---------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "nearest": (NearestETF(), {}),
    "uneven": (NearestETF(), {"counts": (4, 3, 2, 1)}),
    "narrowest": (NearestETF(), {"width": 3}),
    "square": (PAPER, {"width": 4}),
    "paper": (PAPER, {"counts": (4, 3, 2, 1)}),
    "no radius": (NearestETF(), {"radius": None, "lam_h": 0.02, "counts": (4, 3, 2, 1)}),
    "no gradient": (NearestETF(gradient=False), {"counts": (4, 3, 2, 1)}),
    "detached": (NearestETF(bias="detached", averaging=Latest()), {"counts": (4, 3, 2, 1)}),
    "no bias, guard": (NearestETF(bias=None, averaging=Constant(0.3), guard=0.05), {"counts": (4, 3, 2, 1)}),
    "class weights, relative delta": (NearestETF(weights=[1.0, 2.0, 0.5, 3.0], relative_delta=0.05, averaging=Cumulative()), {}),
    "reference, as released": (NearestETF(delta=0.1, prox=Reference(np.eye(6, 3)), missing=AsReleased()), {}),
    "fixed": (FixedETF(), {"counts": (4, 3, 2, 1)}),
    "fixed, random, attached": (FixedETF("random", seed=3, bias="attached"), {"counts": (4, 3, 2, 1)}),
    "fixed, no bias, narrowest": (FixedETF(bias=None), {"width": 3}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_free_features_move_as_in_the_simulator(name: str, device: str) -> None:
    """Full-batch gradient descent on a parameter: F at every step, and z, W and b at the end."""
    options, setting = CASES[name]
    problem = ufm.Problem(
        **({"counts": (3, 3, 3, 3), "width": 6, "radius": 5.0, "lam_h": 0.0} | setting),
        features="free", lam_w=0.0, head=options, columns="samples",
    )  # fmt: skip
    d, N, steps = problem.width, problem.labels.shape[1], 25
    start = [2.0 * to_numpy(normal(1, d, N)), np.zeros((1, 4, d)), *([np.zeros((1, 4, 1))] * problem.biased)]
    found = ufm.simulate(problem, GradientDescent(0.5), steps=steps, every=1, start=starts.given(start))

    features = torch.nn.Parameter(torch.tensor(start[0][0]).mT.contiguous().to(device))
    labels = torch.tensor(problem.labels[0]).to(device)
    head = module(options, d, 4, radius=problem.radius).to(device)
    values = []
    for _ in range(steps + 1):
        F = cross_entropy(head(features, labels), labels) + 0.5 * float(problem.lam_h[0]) * (features**2).sum()
        values.append(F.item())
        z = features.detach().cpu().clone()
        (slope,) = torch.autograd.grad(F, features)
        with torch.no_grad():
            features -= 0.5 * slope
    assert values == pytest.approx(found.value[0], rel=1e-10)
    assert values[-1] < 0.8 * values[0]
    z = z if problem.radius is None else problem.radius * z / z.norm(dim=1, keepdim=True)
    for mine, theirs in zip([z.mT, head.weight, head.bias], [f[0] for f in found.factors] + [None] * (options.bias is None), strict=True):
        assert (mine is None and theirs is None) or to_numpy(mine) == pytest.approx(theirs.reshape(mine.shape), abs=1e-10)


# --- gradients ---------------------------------------------------------------------------------------------------------------------------


def held(head: Any, features: Any, labels: Any, h: Any) -> Any:
    """Logits at h of a copy of the head, what its options keep from the gradient staying as it is at `features`."""
    here, there, options = deepcopy(head), deepcopy(head), head.options
    here(features, labels)
    if getattr(options, "delta", 0.0):  # the first proximal point follows the means
        near = options.prox.point(here.average, head.frame if int(head.step) else None, options.form)
        there.options = replace(options, prox=Reference(near))
    there(h, labels)
    z = h if head.radius is None else head.radius * h / h.norm(dim=1, keepdim=True)
    W = there.weight if isinstance(options, NearestETF) and options.gradient else here.weight
    b = {None: 0.0, "detached": here.bias, "attached": -(W @ z.mean(dim=0))}[options.bias]
    return z @ W.mT + b


def agrees_with_differences(head: Any, features: Any, labels: Any, outputs: list[int], rel: float) -> None:
    """<u, J v> of the logits by autograd and by central differences of fourth order; u sums to zero over the classes in `outputs`."""
    for seed in range(3):
        u, v, h = torch.zeros(len(labels), 4, dtype=DOUBLE), normal(*features.shape, seed=70 + seed), features.clone().requires_grad_()
        u[:, outputs] = normal(len(labels), len(outputs), seed=80 + seed)
        if len(outputs) < 4:
            u[:, outputs] -= u[:, outputs].mean(dim=1, keepdim=True)
        (slope,) = torch.autograd.grad(deepcopy(head)(h, labels), h, u)
        near, far = (sum(s * (u * held(head, features, labels, features + s * k * 1e-4 * v)).sum() for s in (1, -1)) for k in (1, 2))
        expected = (8 * near - far) / 12e-4
        assert float((slope * v).sum()) == pytest.approx(float(expected), rel=rel, abs=1e-9)


VARIANTS = {
    **{f"{g}, {b}": NearestETF(gradient=g == "on", bias=b) for g in ("on", "off") for b in ("attached", "detached", None)},
    "paper": PAPER,
    "weights": NearestETF(weights=[1.0, 2.0, 0.5, 3.0]),
    "fixed, attached": FixedETF(bias="attached"),
    "fixed, detached": FixedETF(),
}


@pytest.mark.parametrize("batch", ["first", "later", "missing", "unseen"])
@pytest.mark.parametrize("width", [6, 4, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_is_that_of_differences(name: str, width: int, batch: str) -> None:
    """d > K, d = K and d = K - 1; a first batch, a later one, a later one without a class, a first one without a class.

    The direction of a class not seen yet is nobody's: differences of the logits of the others do not depend on it.
    """
    options = VARIANTS[name]
    if options is PAPER and width < 4:
        pytest.skip("the full form has no U there")
    if options is PAPER and batch == "unseen":
        pytest.skip("a matrix of too low a rank: s = delta there, and differences are rounding")
    head, labels = module(options, width, 4, radius=2.0), torch.tensor([0, 3, 1, 1, 2, 0])
    if batch in ("later", "missing"):
        head(normal(6, width, seed=1), labels)
    if batch in ("missing", "unseen"):
        labels = torch.tensor([0, 3, 1, 1, 1, 0])
    features = normal(6, width, seed=2)
    agrees_with_differences(head, features, labels, [0, 1, 3] if batch == "unseen" else [0, 1, 2, 3], 1e-8)
    if batch != "unseen" and isinstance(options, NearestETF) and options.gradient and options.bias != "detached" and options is not PAPER:
        assert torch.autograd.gradcheck(lambda h: deepcopy(head)(h, labels), features.requires_grad_(), fast_mode=True)  # nothing is held


@pytest.mark.parametrize("name", [name for name in VARIANTS if "fixed" not in name])
@pytest.mark.parametrize("width", [6, 3])
def test_at_exact_collapse_all_is_finite(name: str, width: int) -> None:
    """Features on an ETF: W is theirs, the loss at its floor, its gradient zero; the logits' Jacobian is finite and as by differences."""
    options = VARIANTS[name]
    if options is PAPER and width < 4:
        pytest.skip("the full form has no U there")
    vertices = torch.tensor(ufm.frames.simplex_etf(4, width))
    labels = torch.arange(12) % 4
    features = (3.0 * vertices[labels]).requires_grad_()
    head = module(options, width, 4)
    for _ in range(3):
        loss = cross_entropy(head(features, labels), labels)
        (slope,) = torch.autograd.grad(loss, features)
        assert loss.item() == pytest.approx(np.log1p(3 * np.exp(-5 * 4 / 3)), rel=1e-12)
        assert slope.abs().max() < 1e-15
        assert (head.weight - vertices).abs().max() < 1e-14
    agrees_with_differences(head, features.detach(), labels, [0, 1, 2, 3], 1e-8)


def test_the_guard_and_the_solver_are_those_of_the_options() -> None:
    """guard bounds the gradient where two classes nearly coincide; a solver of one's own is called, with the U before it as its start."""
    labels, size, handed = torch.arange(12) % 4, [], []
    features = normal(12, 6)
    features[labels == 1] = features[labels == 0] + 1e-9
    for guard in (0.0, 0.05):
        head, h = module(NearestETF(form="full", delta=1e-6, guard=guard), 6, 4), features.clone().requires_grad_()
        cross_entropy(head(h, labels), labels).backward()
        size.append(float(h.grad.norm()))
    assert size[0] > 1e3 * size[1]

    def solve(means: Any, *, start: Any, **options: Any) -> Any:
        handed.append(start)
        return etf.nearest(means, **options)

    one, other = module(NearestETF(solver=solve), 6, 4), module(NearestETF(), 6, 4)
    for seed in range(2):
        assert torch.equal(one(normal(12, 6, seed=seed), labels), other(normal(12, 6, seed=seed), labels))
        assert torch.equal(one.frame, other.frame)
    assert handed[0] is None
    assert tuple(handed[1].shape) == (6, 3)


def test_two_forwards_before_one_backward() -> None:
    """The graph holds values of its own, not the buffers, which the next step, or a reset, overwrites."""
    for options in (NearestETF(), PAPER, FixedETF(bias="attached"), FixedETF()):
        for later in (torch.arange(8) % 4, torch.zeros(8, dtype=torch.int64)):  # the second says nothing of W
            first, h = torch.arange(8) % 4, normal(3, 8, 6).requires_grad_()
            head, slopes = module(options, 6, 4), []
            for i, labels in enumerate((first, later, later)):
                slopes.append(torch.autograd.grad(cross_entropy(head(h[i], labels), labels), h)[0])
            head.reset_parameters()
            losses = [cross_entropy(head(h[i], labels), labels) for i, labels in enumerate((first, later, later))]
            head.reset_parameters()
            sum(losses).backward()
            assert torch.equal(h.grad, sum(slopes))


def test_nothing_is_left_of_a_graph() -> None:
    """No circle keeps a step's graph alive until the garbage collector comes round."""
    gc.collect()
    gc.disable()
    try:
        head, labels = module(NearestETF(), 6, 4), torch.arange(8) % 4
        logits = head(normal(8, 6).requires_grad_(), labels)
        nodes, found = [logits.grad_fn], []
        while nodes:
            node = nodes.pop()
            found += [weakref.ref(node)] if "Nearest" in type(node).__name__ else []
            nodes += [after for after, _ in node.next_functions if after is not None]
        assert len(found) >= 1
        del node, nodes, logits
        assert [ref() for ref in found] == [None] * len(found)
    finally:
        gc.enable()


# --- state -------------------------------------------------------------------------------------------------------------------------------


def batches(classes: int, width: int) -> Iterator[tuple[Any, Any]]:
    """Ten batches of 5, each missing classes; class 3 is first seen in the fourth."""
    rng = np.random.default_rng(5)
    for t in range(10):
        labels = rng.choice(classes if t > 2 else classes - 1, size=5)
        labels[:2] = (0, classes - 1) if t == 3 else (0, 1)
        yield torch.tensor(rng.standard_normal((5, width)), dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("form", ["reduced", "full"])
def test_a_class_not_seen_yet_does_not_distort_the_frame(form: Any) -> None:
    """Nor through the first proximal point: the rows of the others are those without one, also where samples of classes are unequal."""
    features, labels = normal(12, 8, seed=3) + 2, torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    plain, near = (module(options, 8, 4, radius=None) for options in (NearestETF(), NearestETF(form=form, relative_delta=0.5)))
    plain(features, labels), near(features, labels)
    assert to_numpy(near.weight[:3]) == pytest.approx(to_numpy(plain.weight[:3]), abs=1e-13)


@pytest.mark.parametrize("law", [Paper(), Constant(0.3), Cumulative(), Latest()], ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("missing", [Fixed(), AsReleased()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]], ids=["alike", "weighted"])
def test_the_average_over_batches_that_miss_classes(law: Any, missing: Any, weights: Any) -> None:
    """Against loops over samples and classes; W is the nearest ETF to the average of the classes that count, by their weights."""
    head = module(NearestETF(averaging=law, missing=missing, weights=weights), 6, 4, radius=None)
    seen, average = [False] * 4, np.zeros((6, 4))
    for t, (features, labels) in enumerate(batches(4, 6), 1):
        head(features, labels)
        h, rows, a = features.double().numpy(), labels.tolist(), law.rate(t)
        centre = sum(h) / len(h)
        for k in range(4):
            own = [x for x, y in zip(h, rows, strict=True) if y == k]
            if own and isinstance(missing, Fixed):
                rate = a if seen[k] else 1.0
                average[:, k] = rate * (sum(own) / len(own) - centre) + (1 - rate) * average[:, k]
            elif own:
                average[:, k] = a * (sum(own) / len(own) - centre) + (1 - a) * average[:, k]
            elif isinstance(missing, AsReleased) and not seen[k]:
                average[:, k] = centre
        seen = [s or k in rows for k, s in enumerate(seen)] if isinstance(missing, Fixed) or len(set(rows)) < 4 else seen
        assert head.average.numpy() == pytest.approx(average, abs=1e-13)
        assert head.seen.tolist() == seen
        assert int(head.step) == t
        counted = np.ones(4) if weights is None else np.array(weights)
        counted = counted * seen if isinstance(missing, Fixed) else counted
        W, expected = head.weight.numpy(), etf.nearest(average, weights=counted).W
        if isinstance(missing, Fixed) and not all(seen):  # the direction of a class not seen yet is nobody's
            W, expected = (x[seen] - x[seen].mean(axis=0) for x in (W, expected))
        assert W == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["nearest", "paper", "class weights, relative delta", "reference, as released", "detached", "fixed"])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """Ten steps in one go, and five, a file, five more in modules made anew: bit for bit the same parameters and buffers."""

    def network() -> tuple[Any, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), module(CASES[name][0], 6, 4, dtype=None))
        return model, torch.optim.SGD(model.parameters(), 0.1)

    def train(model: Any, optimiser: Any, first: int, last: int) -> None:
        for inputs, labels in list(batches(4, 6))[first:last]:
            optimiser.zero_grad()
            with model[1].labelled(labels):
                cross_entropy(model(inputs), labels).backward()
            optimiser.step()

    torch.manual_seed(0)
    one, optimiser = network()
    train(one, optimiser, 0, 5)
    torch.save(one.state_dict(), tmp_path / "five.pt")
    train(one, optimiser, 5, 10)
    other, optimiser = network()
    other.load_state_dict(torch.load(tmp_path / "five.pt", weights_only=True))
    train(other, optimiser, 5, 10)
    assert same(one.state_dict(), other.state_dict())
    assert int(other[1].step) == 10
    torch.save(one.state_dict(), tmp_path / "ten.pt")
    fresh, _ = network()
    fresh.load_state_dict(torch.load(tmp_path / "ten.pt", weights_only=True))
    assert torch.equal(fresh.eval()(normal(3, 6, dtype=torch.float32)), one.eval()(normal(3, 6, dtype=torch.float32)))


@pytest.mark.parametrize("options", [NearestETF(), NearestETF(bias=None), FixedETF(), FixedETF(bias="attached")], ids=repr)
def test_evaluation_stands_still(options: Any) -> None:
    """W and b of the last training step, for any features (..., d) and labels; nothing changes."""
    labels, features = torch.arange(12) % 4, normal(12, 6)
    head = module(options, 6, 4)
    last = head(features, labels)
    before = buffers(head)
    head.eval()
    assert torch.equal(head(features), last)
    assert torch.equal(head(features[:5], labels[:2]), last[:5])
    assert torch.equal(head(features.reshape(3, 4, 6)), last.reshape(3, 4, 4))
    assert head(features[0]).numpy() == pytest.approx(last[0].numpy(), abs=1e-13)
    assert same(before, buffers(head))
    head.train()(normal(12, 6, seed=1), labels)
    assert not same(before, buffers(head))


def test_a_layer_inside_a_model_that_knows_no_labels() -> None:
    """`with head.labelled(y): model(x)` equals head(features, y), restores what was before, also after an error; names as of nn.Linear."""

    class Model(torch.nn.Module):
        def __init__(self, fc: Any) -> None:
            super().__init__()
            self.body, self.fc = torch.nn.Linear(5, 6), fc

        def forward(self, x: Any) -> Any:
            return self.fc(torch.relu(self.body(x)))

    linear, inputs, labels = torch.nn.Linear(6, 4), normal(12, 5, dtype=torch.float32), torch.arange(12) % 4
    for head in (NearestETFHead(6, 4), FixedETFHead(6, 4)):
        model = Model(head)
        alone = deepcopy(model)
        with head.labelled(labels):
            logits = model(inputs)
            with head.labelled(labels[:8]):
                model(inputs[:8])
            model(inputs)
        with pytest.raises(KeyError), head.labelled(labels):
            raise KeyError
        assert torch.equal(logits, alone.fc(torch.relu(alone.body(inputs)), labels))
        assert (head.in_features, head.out_features) == (linear.in_features, linear.out_features)
        for name in ("weight", "bias"):
            mine, theirs = getattr(head, name), getattr(linear, name)
            assert (mine.shape, mine.dtype, mine.requires_grad) == (theirs.shape, theirs.dtype, False)
        assert list(head.parameters()) == []
        assert logits.dtype == linear(torch.relu(model.body(inputs))).dtype
    assert NearestETFHead.needs_labels
    assert not FixedETFHead.needs_labels
    with pytest.raises(ValueError, match="no labels are given"):
        Model(NearestETFHead(6, 4))(inputs)


SAYING: dict[str, NearestETF] = {
    "reduced": NearestETF(),
    "paper": PAPER,
    "weights": NearestETF(weights=[1.0, 2.0, 3.0, 4.0]),
    "as released": NearestETF(missing=AsReleased()),
    "latest": NearestETF(averaging=Latest()),
}


@pytest.mark.parametrize("kind", ["one class", "equal", "zero"])
@pytest.mark.parametrize("name", SAYING)
def test_batches_that_say_nothing(name: str, kind: str) -> None:
    """One class only, equal features, zero features: a first W is the unit vectors', and no gradient passes through it; all is finite."""
    if (name, kind) == ("as released", "one class"):
        pytest.skip("its fill by the mean of all samples makes the classes differ")
    labels = torch.arange(23) % 4 * (kind != "one class")
    features = {"one class": normal(23, 6), "equal": normal(6, seed=3).expand(23, 6), "zero": torch.zeros(23, 6, dtype=DOUBLE)}[kind]
    options, slopes = SAYING[name], []
    for gradient in (True, False):
        head, h = module(replace(options, gradient=gradient), 6, 4), features.clone().requires_grad_()
        cross_entropy(head(h, labels), labels).backward()
        slopes.append(h.grad)
        expected = etf.nearest(torch.eye(6, 4, dtype=DOUBLE), weights=options.weights).W
        assert head.weight.numpy() == pytest.approx(expected.numpy(), abs=1e-13)
        assert all(bool(torch.isfinite(b).all()) for b in head.buffers())
    assert torch.equal(*slopes)
    assert bool(torch.isfinite(slopes[0]).all())
    assert bool(slopes[0].any()) == (kind != "zero")


def test_a_later_batch_that_says_nothing_keeps_w() -> None:
    """Where nothing else is in the average: W, U and the gradient are those of the W before, which the graph holds by itself."""
    labels, equal = torch.arange(23) % 4, normal(6, seed=3).expand(23, 6).clone().requires_grad_()
    head, still = module(NearestETF(averaging=Latest()), 6, 4), module(NearestETF(averaging=Latest(), gradient=False), 6, 4)
    for one in (head, still):
        one(normal(23, 6), labels)
    W, U = head.weight.clone(), head.frame.clone()
    loss = cross_entropy(head(equal, labels), labels)
    assert torch.equal(head.weight, W)
    assert torch.equal(head.frame, U)
    assert int(head.step) == 2
    head(normal(23, 6, seed=1), labels)
    assert not torch.equal(head.weight, W)
    (slope,) = torch.autograd.grad(loss, equal)
    assert torch.equal(slope, torch.autograd.grad(cross_entropy(still(equal, labels), labels), equal)[0])


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_features_of_any_size_are_normalised(size: float) -> None:
    """In single precision, where their squares are 0 or infinite."""
    labels, features = torch.arange(8) % 4, normal(8, 6, dtype=torch.float32)
    for head, other in ((NearestETFHead(6, 4), NearestETFHead(6, 4)), (FixedETFHead(6, 4), FixedETFHead(6, 4))):
        assert head(size * features, labels).numpy() == pytest.approx(other(features, labels).numpy(), rel=1e-5, abs=1e-5)


def test_a_dead_feature_stays_zero() -> None:
    """Exactly 0 has no direction: z = 0, logits are the bias, no gradient; the others are as they are without it in the sums."""
    labels, h = torch.arange(8) % 4, normal(8, 6)
    h[3] = 0.0
    h.requires_grad_()
    head = module(NearestETF(), 6, 4)
    logits = head(h, labels)
    cross_entropy(logits, labels).backward()
    assert torch.equal(logits[3].detach(), head.bias)
    assert not bool(h.grad[3].any())
    assert bool(torch.isfinite(h.grad).all())
    assert bool(h.grad[[0, 1, 2, 4, 5, 6, 7]].any(dim=1).all())


# --- precision and places ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [NearestETF(), FixedETF(bias="attached")], ids=["nearest", "fixed"])
def test_autocast(options: Any, half: Any) -> None:
    """Logits in the dtype that nn.Linear gives; W as it is without autocast, also where backward runs inside."""
    labels, linear = torch.arange(12) % 4, torch.nn.Linear(6, 4)
    for dtype in (half, torch.float32):
        features = normal(12, 6, dtype=dtype)
        plain, inside, outside = (module(options, 6, 4, dtype=None, precision=torch.float32) for _ in range(3))
        h = [features.float().clone().requires_grad_(), *(features.clone().requires_grad_() for _ in range(2))]
        cross_entropy(plain(h[0], labels), labels).backward()
        with torch.autocast("cpu", dtype=half):
            logits = inside(h[1], labels)
            assert logits.dtype == linear(features).dtype == half
            cross_entropy(logits, labels).backward()
            logits = outside(h[2], labels)
        cross_entropy(logits, labels).backward()
        assert torch.equal(inside.weight, plain.weight)
        assert torch.equal(outside.weight, plain.weight)
        assert torch.equal(inside.bias, plain.bias)
        for x in h[1:]:
            assert x.grad.dtype == dtype
            assert (x.grad.float() - h[0].grad).abs().max() < 0.05 * h[0].grad.abs().max()
        with torch.autocast("cpu", dtype=half):
            assert inside.eval()(features).dtype == half


def test_the_gradient_through_w_is_in_full_precision_under_autocast() -> None:
    """A backward pass inside autocast, at precision float32: the very gradient of `etf.pullback`."""
    means, G = normal(6, 4, dtype=torch.float32).requires_grad_(), normal(4, 6, seed=1, dtype=torch.float32)
    W, _ = nearest_frame(means, means.detach(), torch.full((1, 4), 0.5), NearestETF(guard=0.05), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (slope,) = torch.autograd.grad(W, means, G)
    assert torch.equal(slope, 0.5 * etf.pullback(etf.nearest(means), G, guard=0.05))


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_outside_autocast_is_refused(training: bool) -> None:
    for head in (NearestETFHead(6, 4), FixedETFHead(6, 4)):
        with pytest.raises(TypeError, match=r"features have dtype torch.float16 outside autocast, .*; keep the model in float32"):
            head.train(training)(torch.ones(8, 6, dtype=torch.float16), torch.arange(8) % 4)


@pytest.mark.parametrize("classes", [4, 100])
def test_single_precision_is_close(classes: int) -> None:
    """precision=float32 against float64 on the same float32 features: W, logits, gradient; W has unit rows to single precision."""
    labels, features = torch.arange(2 * classes) % classes, normal(2 * classes, classes + 3, dtype=torch.float32)
    W, grads = [], []
    for precision in (torch.float32, torch.float64):
        head, h = NearestETFHead(classes + 3, classes, precision=precision), features.clone().requires_grad_()
        logits = head(h, labels)
        assert logits.dtype == head.weight.dtype == torch.float32
        assert head.average.dtype == head.frame.dtype == precision
        cross_entropy(logits, labels).backward()
        W.append(head.weight)
        grads.append(h.grad)
    assert (W[0] - W[1]).abs().max() < 1e-5
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()
    assert W[0].norm(dim=1).numpy() == pytest.approx(1.0, abs=1e-6)


def test_conversions() -> None:
    """Average, U and the fixed frame keep their precision whatever the module is converted to; weight and bias follow; copies are apart."""
    labels = torch.arange(8) % 4
    for make in (lambda **o: NearestETFHead(6, 4, **o), lambda **o: FixedETFHead(6, 4, rotation="random", bias="attached", **o)):
        head, exact = make(), make(dtype=DOUBLE)
        for one in (head, exact):
            one(normal(8, 6), labels)
        kept = {name: getattr(head, name).clone() for name in head.kept}
        for convert in ("half", "bfloat16", "float", "double"):
            getattr(head, convert)()
            assert head.weight.dtype == head.bias.dtype == {"half": torch.float16, "double": DOUBLE}.get(convert, head.weight.dtype)
            assert all(torch.equal(getattr(head, name), x) and x.dtype == DOUBLE for name, x in kept.items())
        head(normal(8, 6, seed=1), labels)
        exact(normal(8, 6, seed=1), labels)
        assert same(buffers(head), buffers(exact))
        other = deepcopy(head)
        other(normal(8, 6, seed=2), labels)
        assert same(buffers(head), buffers(exact))
        assert int(other.step) == 3
        assert set(head.to(torch.float32).state_dict()) == set(other.state_dict())
    narrow = FixedETFHead(6, 4).double().eval()
    assert torch.equal(narrow.weight, torch.tensor(FixedETF().weights(4, 6)))


@pytest.mark.parametrize(
    "options", [NearestETF(), PAPER, NearestETF(missing=AsReleased(), weights=[1.0, 2.0, 3.0, 4.0]), FixedETF()], ids=repr
)
def test_all_tensors_stay_where_the_features_are(options: Any) -> None:
    """On the meta device a tensor of another device is an error; a head made there works once it is moved and reset."""
    with torch.device("meta"):
        head = module(options, 6, 4)
    assert {b.device.type for b in head.buffers()} == {"meta"}
    h, labels = torch.randn(8, 6, device="meta", requires_grad=True), torch.arange(8, device="meta") % 4
    for training in (True, False):
        logits = head.train(training)(h, labels)
        assert (logits.device.type, tuple(logits.shape)) == ("meta", (8, 4))
        logits.sum().backward()
        assert h.grad.device.type == "meta"
    head.to_empty(device="cpu").reset_parameters()
    expected, labels = module(options, 6, 4), torch.arange(8) % 4
    assert same(buffers(head), buffers(expected))
    assert torch.equal(head.train()(normal(8, 6), labels), expected(normal(8, 6), labels))


def test_compiled() -> None:
    """Through torch.compile, with a break in the graph: the same logits, gradient and buffers, in training and evaluation."""
    labels = torch.arange(8) % 4
    for make in (lambda: NearestETFHead(6, 4), lambda: FixedETFHead(6, 4, bias="attached")):
        plain = make()
        head = make()
        compiled = torch.compile(head, backend="eager")
        for _ in range(2):
            grads = []
            for run in (plain, compiled):
                h = normal(8, 6, dtype=torch.float32).requires_grad_()
                cross_entropy(run(h, labels), labels).backward()
                grads.append(h.grad)
            assert torch.equal(*grads)
        assert same(buffers(plain), buffers(head))
        h = normal(8, 6, dtype=torch.float32)
        assert torch.equal(compiled.eval()(h), plain.eval()(h))


# --- several processes -------------------------------------------------------------------------------------------------------------------


def body_and_data(options: Any) -> tuple[Any, Any, Any]:
    """The network, and three batches of 12 whose halves have not the same classes."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6, dtype=DOUBLE), torch.nn.Tanh(), module(options, 6, 4))
    labels = torch.tensor(
        [[0, 0, 1, 1, 1, 0, 2, 3, 3, 0, 2, 2], [0, 1, 2, 1, 1, 0, 2, 2, 1, 0, 2, 2], [3, 0, 1, 2, 3, 3, 3, 3, 3, 1, 1, 1]]
    )
    return model, normal(3, 12, 5, seed=4), labels


def descend(model: Any, head: Any, inputs: Any, labels: Any) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.2)
    for x, y in zip(inputs, labels, strict=True):
        optimiser.zero_grad()
        with head.labelled(y):
            cross_entropy(model(x), y).backward()
        optimiser.step()


SPREAD = [NearestETF(), NearestETF(bias="detached", averaging=Latest()), PAPER, NearestETF(gradient=False), FixedETF(bias="attached")]


def work(rank: int, folder: str) -> None:
    """One of two processes: its half of every batch, under DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for i, options in enumerate(SPREAD):
        model, inputs, labels = body_and_data(options)
        half = slice(6 * rank, 6 * rank + 6)
        descend(torch.nn.parallel.DistributedDataParallel(model), model[2], inputs[:, half], labels[:, half])
        torch.save(model.state_dict(), f"{folder}/{i}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """DDP on halves of the batches gives the parameters and buffers of one process with the whole; buffers are equal bit for bit."""
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    for i, options in enumerate(SPREAD):
        model, inputs, labels = body_and_data(options)
        descend(model, model[2], inputs, labels)
        ranks = [torch.load(tmp_path / f"{i}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert same(*ranks)
        for name, value in model.state_dict().items():
            assert ranks[0][name].double().numpy() == pytest.approx(value.double().numpy(), abs=1e-12), (options, name)
        alone, *_ = body_and_data(options)
        descend(alone, alone[2], inputs[:, :6], labels[:, :6])
        assert (alone[0].weight - model[0].weight).abs().max() > 1e-4


def test_one_process_of_a_group(tmp_path: Path) -> None:
    """The sums pass through torch.distributed and change nothing; synchronise=False leaves it alone."""
    expected, labels = module(NearestETF(), 6, 4), torch.arange(8) % 4
    h = normal(8, 6).requires_grad_()
    expected(h, labels).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for synchronise in (True, False):
            head, x = module(NearestETF(), 6, 4, synchronise=synchronise), normal(8, 6).requires_grad_()
            logits = head(x, labels)
            logits.square().sum().backward()
            assert torch.equal(x.grad, h.grad)
            names, nodes = set(), [logits.grad_fn]
            while nodes:
                node = nodes.pop()
                names.add(type(node).__name__)
                nodes += [after for after, _ in node.next_functions if after is not None]
            assert ("OverProcessesBackward" in names) == synchronise
    finally:
        torch.distributed.destroy_process_group()


# --- the door ----------------------------------------------------------------------------------------------------------------------------

GOOD, LABELS = torch.ones(8, 6), torch.arange(8) % 4

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one class": (lambda: NearestETFHead(6, 1), ValueError, "NearestETFHead: out_features is 1, but must be a whole number, at least 2"),
    "half a class": (lambda: FixedETFHead(6, 2.5), ValueError, "FixedETFHead: out_features is 2.5, but must be a whole number, at least 2"),
    "no width": (lambda: NearestETFHead(0, 4), ValueError, "NearestETFHead: in_features is 0, but must be a whole number, at least 1"),
    "too narrow": (
        lambda: NearestETFHead(8, 10),
        ValueError,
        "NearestETFHead: width is 8, but head=NearestETF needs at least 9 for an ETF of 10 classes; use width >= 9",
    ),
    "too narrow for the full form": (lambda: NearestETFHead(9, 10, options=PAPER), ValueError, "needs at least 10 for an ETF of 10"),
    "too narrow, fixed": (lambda: FixedETFHead(8, 10), ValueError, "FixedETFHead: width is 8, but head=FixedETF needs at least 9"),
    "other weights": (
        lambda: NearestETFHead(6, 4, options=NearestETF(weights=[1, 2])),
        ValueError,
        "NearestETFHead: head=NearestETF has weights [1, 2], but needs one >= 0 for each of 4 classes",
    ),
    "radius 0": (lambda: NearestETFHead(6, 4, radius=0.0), ValueError, "radius is 0.0, but must be a positive, finite number, or None"),
    "radius -1": (lambda: FixedETFHead(6, 4, radius=-1), ValueError, "radius is -1, but must be a positive, finite number, or None"),
    "options not called": (lambda: NearestETFHead(6, 4, options=NearestETF), TypeError, "but must be a ufm.heads.NearestETF, called"),
    "other options": (lambda: NearestETFHead(6, 4, options=FixedETF()), TypeError, "but must be a ufm.heads.NearestETF, called"),
    "other rotation": (lambda: FixedETFHead(6, 4, rotation="haar"), ValueError, "rotation is 'haar', but must be one of"),
    "half precision": (
        lambda: NearestETFHead(6, 4, precision=torch.float16),
        ValueError,
        "precision is torch.float16, but must be torch.float32 or torch.float64",
    ),
    "no labels": (lambda: NearestETFHead(6, 4)(GOOD), ValueError, "no labels are given, but in training W is made from the class means"),
    "labels too large": (
        lambda: NearestETFHead(6, 4)(GOOD, LABELS + 1),
        ValueError,
        "labels run from 1 to 4, but must lie in 0 ... 3; set out_features to the number of classes",
    ),
    "labels negative": (lambda: NearestETFHead(6, 4)(GOOD, LABELS - 1), ValueError, "labels run from -1 to 2, but must lie in 0 ... 3"),
    "too few labels": (lambda: NearestETFHead(6, 4)(GOOD, LABELS[:5]), ValueError, "labels have shape (5,) for 8 features, but must"),
    "one-hot labels": (
        lambda: NearestETFHead(6, 4)(GOOD, torch.eye(4, dtype=torch.int64)[LABELS]),
        ValueError,
        "labels have shape (8, 4) for 8 features, but must be (8,)",
    ),
    "real labels": (lambda: NearestETFHead(6, 4)(GOOD, LABELS.float()), TypeError, "labels are of torch.float32, but must be a"),
    "true labels": (lambda: NearestETFHead(6, 4)(GOOD, LABELS > 1), TypeError, "labels are of torch.bool, but must be a"),
    "listed labels": (lambda: NearestETFHead(6, 4)(GOOD, LABELS.tolist()), TypeError, "labels are of list, but must be a"),
    "other width": (lambda: FixedETFHead(6, 4)(GOOD[:, :5]), ValueError, "features have shape (8, 5), but must be (B, 6) with B >= 1"),
    "one feature": (lambda: NearestETFHead(6, 4)(GOOD[0], LABELS[0]), ValueError, "features have shape (6,), but must be (B, 6)"),
    "images": (lambda: FixedETFHead(6, 4)(GOOD.reshape(2, 4, 6)), ValueError, "features have shape (2, 4, 6), but must be (B, 6)"),
    "no samples": (lambda: NearestETFHead(6, 4)(GOOD[:0], LABELS[:0]), ValueError, "features have shape (0, 6), but must be (B, 6)"),
    "other width, evaluated": (lambda: FixedETFHead(6, 4, bias=None).eval()(GOOD[:, :5]), ValueError, "must be (..., 6)"),
    "whole features": (lambda: FixedETFHead(6, 4)(GOOD.long()), TypeError, "features have dtype torch.int64, but must be"),
    "evaluated first": (
        lambda: NearestETFHead(6, 4).eval()(GOOD),
        RuntimeError,
        "NearestETFHead: it is in evaluation mode but has seen no batch in training, so it has no classifier yet; train it, or load its",
    ),
    "evaluated first, fixed": (lambda: FixedETFHead(6, 4).eval()(GOOD), RuntimeError, "FixedETFHead: it is in evaluation mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_clear_sentence(name: str) -> None:
    call, kind, sentence = REFUSED[name]
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("radius", [5.0, None])
def test_features_that_are_not_finite(bad: float, radius: float | None) -> None:
    """One sentence in training, and the state is as it was; in evaluation that sample's logits are NaN, as nn.Linear's."""
    for head in (NearestETFHead(6, 4, radius=radius), FixedETFHead(6, 4, radius=radius)):
        head(normal(8, 6, dtype=torch.float32), LABELS)
        before, features = buffers(head), normal(8, 6, dtype=torch.float32)
        features[2, 1] = bad
        with pytest.raises(ValueError, match="features hold NaN or infinity, but must be finite"):
            head(features, LABELS)
        assert same(before, buffers(head))
        found = torch.isfinite(head.eval()(features)).all(dim=1)
        assert found.tolist() == [i != 2 for i in range(8)]


def test_labels_of_any_whole_type_and_a_fixed_head_without_a_bias() -> None:
    head, other = module(NearestETF(), 6, 4), module(NearestETF(), 6, 4)
    assert torch.equal(head(normal(8, 6), LABELS.to(torch.uint8)), other(normal(8, 6), LABELS))
    plain = module(FixedETF(bias=None), 6, 4, radius=None).eval()
    assert plain.bias is None
    assert torch.equal(plain(normal(8, 6)), torch.nn.functional.linear(normal(8, 6), plain.weight))
