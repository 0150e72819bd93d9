"""The same core on other arrays: numpy and torch take the same runs to the same numbers, and give back what they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import catalog
import ufm
from ufm import heads, rules, starts
from ufm.arrays import device_of, to_numpy
from ufm.headed import coordinates
from ufm.objective import chain_of

torch = pytest.importorskip("torch")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

IMBALANCED = ufm.Problem([[40, 20, 5, 2], [30, 30, 4, 3]], width=6, features="relu", lam_w=[1e-2, 3e-2], lam_h=[1e-4, 2e-4])
MODELS: dict[str, ufm.Problem] = {
    "ReLU, imbalanced": IMBALANCED,
    "ReLU, imbalanced, bias, samples": replace(IMBALANCED, lam_b=0.01, columns="samples"),
    "weighted, adjusted, smoothed": ufm.Problem(
        [9, 3, 1],
        width=4,
        features="free",
        lam_w=0.02,
        lam_h=0.003,
        loss=ufm.CrossEntropy(0.05, class_weights=[0.5, 1.0, 2.0], logit_adjustment=0.5, temperature=[1.0, 2.0, 0.5]),
    ),
    "deep linear": ufm.Problem(ufm.counts.balanced(4, 5), width=6, depth=3, features="free", lam_w=[[5e-3, 4e-3, 3e-3]], lam_h=2e-3),
    "deep ReLU": ufm.Problem([6, 4, 2], width=6, depth=3, features="free", activation="relu", lam_w=2e-3, lam_h=2e-3, columns="samples"),
    "MSE, free bias": ufm.Problem([8, 4, 2], width=5, features="free", loss=ufm.MSE(), lam_w=0.02, lam_h=0.002, lam_b=0.0),
    "focal": ufm.Problem([8, 4, 2], width=5, features="relu", loss=ufm.Focal(2.0), lam_w=0.02, lam_h=0.002),
    "unit rows": ufm.Problem([6, 3, 2], width=4, features="free", lam_w=0.0, lam_h=0.01, lam_b=0.1, head=heads.UnitRows()),
    "fixed ETF on a sphere": ufm.Problem([6, 3, 2], width=4, features="free", lam_w=0.0, lam_h=0.0, head=heads.FixedETF(), radius=3.0),
    "nearest ETF on a sphere": ufm.Problem([6, 3, 2], width=4, features="free", lam_w=0.0, lam_h=0.0, head=heads.NearestETF(), radius=3.0),
}
RULES: dict[str, rules.Rule] = {
    "descent": rules.GradientDescent(0.05),
    "momentum": rules.GradientDescent(0.02, 0.9),
    "Adam": rules.Adam(2e-3, epsilon=1e-4),
    "AGD": rules.AGD(0.02),
    "flow": rules.GradientFlow(),
    "stabilised flow": rules.StabilisedFlow(),
}


def fits(problem: ufm.Problem, rule: str) -> bool:
    """Whether a rule takes a problem: flows need the plain model and slide along kinks, stabilised ones no bounds, AGD no trained bias."""
    if "flow" in rule:
        return problem.special is None and problem.activation == "linear" and (rule == "flow" or problem.features != "relu")
    return rule != "AGD" or problem.lam_b is None


PAIRS = [(m, r) for m in MODELS for r in RULES if fits(MODELS[m], r)]
OFTEN = {("ReLU, imbalanced", r) for r in RULES} | {("deep linear", r) for r in RULES}
OFTEN |= {("deep ReLU", "descent"), ("MSE, free bias", "Adam"), ("fixed ETF on a sphere", "momentum"), ("unit rows", "descent")}


def paired(pairs: list[tuple[str, str]]) -> Any:
    """Every pair of a model and a rule; those that take long and add little only where slow tests are asked for."""
    marked = [pytest.param(*p, id="-".join(p), marks=() if p in OFTEN else pytest.mark.slow) for p in pairs]
    return pytest.mark.parametrize(("model", "rule"), marked)


def near(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = to_numpy(got), to_numpy(expected)
    assert got.shape == expected.shape
    assert np.max(np.abs(got - expected), initial=0.0) <= tolerance * max(1.0, np.max(np.abs(expected), initial=0.0))


def on(device: str, arrays: Sequence[Any]) -> None:
    """Every array is a float64 tensor of the device."""
    assert {(type(x), x.dtype, x.device.type) for x in arrays} == {(torch.Tensor, torch.float64, device)}


@pytest.mark.parametrize("device", DEVICES)
@paired([p for p in PAIRS if "flow" not in p[1]])
def test_a_thousand_steps(model: str, rule: str, device: str) -> None:
    """Values, factors, logits and probes of 1,000 steps agree to 1e-10, stops and steps exactly; factors and logits are tensors."""
    options: dict[str, Any] = dict(runs=2, seed=3, steps=1000, every=250, probes=["class_norms", "margins"])
    ours, theirs = (ufm.simulate(MODELS[model], RULES[rule], device=where, **options) for where in ("numpy", device))
    assert (ours.stop, ours.steps.tolist()) == (theirs.stop, theirs.steps.tolist())
    assert np.all(np.isfinite(ours.value))
    assert not np.allclose(ours.value[:, 0], ours.value[:, -1])
    on(device, [*theirs.factors, theirs.logits])
    near(theirs.time, ours.time, 1e-15 if rule != "AGD" else 1e-10)
    mine, other = ([r.value, *r.factors, r.logits, *r.probes.values()] for r in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        near(b, a, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@paired([p for p in PAIRS if "flow" in p[1]])
def test_flows_come_to_the_same_point(model: str, rule: str, device: str) -> None:
    """Steps of a flow hang on rounding, where they end does not: at a given time the points agree far below the flow's own tolerance."""
    exact = rules.GradientFlow(until=0.5) if rule == "flow" else rules.StabilisedFlow(until=0.5, rtol=1e-5, atol=1e-8)
    ours, theirs = (ufm.simulate(MODELS[model], exact, runs=2, seed=3, steps=5000, device=where) for where in ("numpy", device))
    assert {*ours.stop, *theirs.stop} == {ufm.Stop.TIME}
    on(device, [*theirs.factors, theirs.logits])
    for a, b in zip([ours.last("value"), *ours.factors, ours.logits], [theirs.last("value"), *theirs.factors, theirs.logits], strict=True):
        near(b, a, 1e-8)


STARTS = {"normal": starts.normal(), "balanced": starts.balanced(), "orthogonal": starts.orthogonal(), "spectral": starts.spectral()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("model", ["ReLU, imbalanced", "deep linear"])
def test_starts_are_drawn_once(model: str, start: str, device: str) -> None:
    """The first factors of every run are the same to the last bit on every device."""
    problem = MODELS[model]
    draws = [starts.first_factors(problem, STARTS[start], 3, 5, chain_of(problem), device=where) for where in ("numpy", device)]
    on(device, draws[1])
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(*draws, strict=True))


SOLVED = {
    "robust": ("ReLU, imbalanced", dict(method="robust")),
    "robust, free": ("MSE, free bias", dict(method="robust")),
    "lbfgs, deep linear": ("deep linear", dict(method="lbfgs", max_steps=2000)),
    "lbfgs, deep ReLU": ("deep ReLU", dict(method="lbfgs", max_steps=60)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SOLVED)
def test_solve(case: str, device: str) -> None:
    """The same runs end at the same values, with the same proofs; what comes back lies on the device."""
    model, options = SOLVED[case]
    ours, theirs = (ufm.solve(MODELS[model], runs=2, seed=1, device=where, **options) for where in ("numpy", device))
    on(device, [*theirs.factors, theirs.logits])
    assert ours.stop == theirs.stop
    near(theirs.value, ours.value, 1e-8)
    assert np.array_equal(np.isnan(ours.gap), np.isnan(theirs.gap))
    assert np.all(np.isnan(ours.gap) | (np.maximum(ours.gap, theirs.gap) <= 1e-9))


@cache
def points(model: str) -> tuple[ufm.Problem, tuple[Any, ...]]:
    """A point near rest of each run, as numpy."""
    problem = MODELS[model]
    return problem, ufm.solve(problem, runs=2, seed=1, method="lbfgs", max_steps=500).factors


def same_records(ours: Any, theirs: Any) -> None:
    for f in fields(ours):
        mine, other = getattr(ours, f.name), getattr(theirs, f.name)
        assert type(mine) is type(other), f.name
        assert np.array_equal(mine, other, equal_nan=isinstance(mine, np.ndarray) and mine.dtype.kind == "f"), f.name


JUDGES: dict[str, Callable[..., Any]] = {"certify": ufm.certify, "classify": ufm.classify, "hessian": ufm.hessian}


@pytest.mark.parametrize("library", ["torch", "torch with a graph", "strict", "strict_device1", "cuda"])
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("model", ["ReLU, imbalanced", "deep linear", "MSE, free bias"])
def test_judges_take_placed_factors(model: str, judge: str, library: str) -> None:
    """Certificate, end point and spectrum of factors on any library and device, graph or not, are bit for bit those of the numpy ones."""
    if library == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    problem, factors = points(model)
    placed: dict[str, Callable[[Any], Any]] = {
        "torch": torch.tensor,
        "torch with a graph": lambda f: torch.tensor(f).requires_grad_(),
        "cuda": lambda f: torch.tensor(f, device="cuda"),
    }
    there = [placed.get(library, lambda f: catalog.to_library(library, f))(f) for f in factors]
    same_records(JUDGES[judge](problem, factors), JUDGES[judge](problem, there))


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("device", DEVICES)
def test_judges_take_what_simulate_and_solve_give(judge: str, device: str) -> None:
    """From a placed run to its judgement without a conversion by hand: also as the start of another run."""
    problem = MODELS["deep linear"]
    run = ufm.simulate(problem, rules.GradientDescent(0.5), runs=2, steps=400, start=starts.normal(2.0), device=device)
    same_records(JUDGES[judge](problem, run.factors), JUDGES[judge](problem, [to_numpy(f) for f in run.factors]))
    onwards = ufm.solve(problem, runs=2, method="lbfgs", start=starts.given(run.factors), device=device)
    assert np.all(onwards.value <= run.last("value") * (1 + 1e-12))


# --- what a bridge hands to the formula rooms: placed, in either precision, without memory ---------------------------------------------


def placed(problem: ufm.Problem) -> tuple[Any, Any]:
    """The coordinates that rules step in, as tensors on the CPU, and a point of them."""
    frame = coordinates(problem, "cpu")
    draws = starts.first_factors(problem, starts.normal(), 1, 0, frame.objective.chain)
    return frame, frame.from_factors([torch.tensor(f) for f in draws])


@pytest.mark.parametrize("model", [m for m in MODELS if MODELS[m].special is None])
def test_objective_on_meta(model: str) -> None:
    """F, its gradient and its Hessian product read nothing back and make nothing on the default device."""
    frame, x = placed(MODELS[model])
    F = frame.objective.map(lambda a: a.to("meta"))
    factors = [p.to("meta") for p in frame.unpack(x)]
    value, gradient = F.value_and_gradient(factors)
    results = [value, *gradient, *F.hessian_product(factors, factors), F.value(factors), F.logits(factors)]
    assert {(r.device.type, r.dtype) for r in results} == {("meta", torch.float64)}


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The names of all reads of a tensor's values by the host, in the order they come."""
    names, usual = [], {}
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"):
        usual[name] = getattr(torch.Tensor, name)

        def told(self: Any, *args: Any, _name: str = name) -> Any:
            names.append(_name)
            return usual[_name](self, *args)

        setattr(torch.Tensor, name, told)
    try:
        yield names
    finally:
        for name, method in usual.items():
            setattr(torch.Tensor, name, method)


def test_reads_are_seen() -> None:
    with host_reads() as names:
        float(torch.ones(1)), bool(torch.ones(1)), torch.ones(1).item(), torch.ones(2).cpu().numpy()
    assert {"__float__", "__bool__", "item", "cpu", "numpy"} <= set(names)


WITHOUT_READS = [(m, r) for m, r in PAIRS if r != "stabilised flow" and m != "nearest ETF on a sphere"]


@pytest.mark.parametrize(("model", "rule"), WITHOUT_READS, ids=map("-".join, WITHOUT_READS))
def test_no_step_waits_for_the_device(model: str, rule: str) -> None:
    """Between two records no value is read by the host, so that an accelerator is never waited for."""
    problem = MODELS[model]
    frame, x = placed(problem)
    state = RULES[rule].start(frame, x, np.arange(problem.cells))
    with host_reads() as names:
        for _ in range(3):
            x, state = RULES[rule].advance(frame, x, state)
            frame = frame.renewed(x)
    assert names == []
    assert device_of(x).type == "cpu"


def test_blocks_do_not_change_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs cut into blocks of one, as on a device of little memory, are bit for bit those of one block."""
    whole = ufm.simulate(IMBALANCED, RULES["momentum"], runs=3, steps=20, device="cpu")
    monkeypatch.setattr("ufm.dynamics.block_size", lambda size, device: 1)
    cut = ufm.simulate(IMBALANCED, RULES["momentum"], runs=3, steps=20, device="cpu")
    assert np.array_equal(whole.value, cut.value)
    assert all(torch.equal(a, b) for a, b in zip(whole.factors, cut.factors, strict=True))
