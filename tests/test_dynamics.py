"""Laws of the loop: what is recorded when, why runs end, and that no run knows of its company, block or library."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import plain
import ufm
from catalog import PROBLEMS, factors
from ufm import dynamics, starts
from ufm.arrays import to_numpy
from ufm.coordinates import balanced
from ufm.dynamics import PROBES, Snapshot, iterate, simulate
from ufm.losses import MSE, CrossEntropy
from ufm.problem import Problem
from ufm.records import Stop, Trajectory
from ufm.rules import Adam, GradientDescent, GradientFlow
from ufm.starts import first_factors
from ufm.theory.imbalance import collapsed, dead_subset_gain, dead_subset_value, optimal_value

GRID = Problem([[5, 3, 2], [4, 4, 2], [8, 1, 1]], width=4, features="relu", lam_w=[0.02, 0.01, 0.03], lam_h=0.005)
ONE = GRID.cell(0)
NATIVE = [p for _, p in PROBLEMS if p.loss.name != "autograd"]
RULES: list[Any] = [GradientDescent(0.2, 0.9), Adam(0.02), GradientFlow()]
EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=["descent", "adam", "flow"])
CONTENTS = ("step", "value", "gradient_norm", "time", "probes", "stop", "steps", "factors", "logits")


def identical(a: Any, b: Any) -> bool:
    """The same bits, NaN where NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[name], b[name]) for name in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b, equal_nan=True)) if isinstance(a, np.ndarray) else a == b


def of(found: Trajectory, runs: slice) -> Trajectory:
    """Some runs of a trajectory."""
    rows = {name: getattr(found, name)[runs] for name in ("value", "gradient_norm", "time", "stop", "steps", "logits")}
    probes = {name: numbers[runs] for name, numbers in found.probes.items()}
    return replace(found, **rows, probes=probes, factors=tuple(f[runs] for f in found.factors))


def unequal(a: Trajectory, b: Trajectory) -> list[str]:
    return [name for name in CONTENTS if not identical(getattr(a, name), getattr(b, name))]


# --- a run does not know of others ---------------------------------------------------------------------------------------------------


@EACH_RULE
@pytest.mark.parametrize("problem", [GRID, *NATIVE[::16]])
def test_runs_do_not_depend_on_their_company(rule: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a grid, among other runs, in other blocks: the same bits in every record, and the same reason to end."""
    options: dict[str, Any] = dict(steps=30, every=7, tol=3e-2, probes=["class_norms"], seed=3)
    together = simulate(problem, rule, runs=3, **options)
    for per_block in (1, 4):
        monkeypatch.setattr(dynamics, "BYTES_PER_COORDINATE", 15e6 / per_block / sum(f[0].size for f in together.factors) * 0.999)
        assert unequal(simulate(problem, rule, runs=3, **options), together) == []
    monkeypatch.undo()
    for g in range(problem.cells):
        assert unequal(simulate(problem.cell(g), rule, runs=2, **options), of(together, slice(3 * g, 3 * g + 2))) == []
    order = list(range(problem.cells))[::-1]
    turned = simulate(problem.pick(order), rule, runs=3, **options)
    for at, g in enumerate(order):
        assert unequal(of(turned, slice(3 * at, 3 * at + 3)), of(together, slice(3 * g, 3 * g + 3))) == []


def test_runs_of_unequal_length_leave_the_others_alone() -> None:
    """A run that starts at its optimum, one that diverges and one that goes on: the last is what it is alone, momentum included."""
    problem = replace(ONE, features="free").pick([0, 0, 0])
    H, W = first_factors(ONE, starts.normal(), 1, 0, balanced(ONE).objective.chain)
    at = [np.concatenate([f, 1e200 * np.ones_like(f), 0 * f]) for f in (H, W)]
    for rule in RULES:
        found = simulate(problem, rule, steps=100, every=10, tol=1e-9, start=starts.given(at))
        alone = simulate(problem.cell(0), rule, steps=100, every=10, tol=1e-9, start=starts.given([H, W]))
        assert found.stop == (Stop.STEPS, Stop.DIVERGED, Stop.GRADIENT)
        assert found.steps.tolist() == [100, 0, 0]
        assert unequal(of(found, slice(0, 1)), alone) == []


# --- records -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "every", "at"), [(10, 4, [0, 4, 8, 10]), (12, 4, [0, 4, 8, 12]), (3, 10, [0, 3]), (1, 1, [0, 1])])
@EACH_RULE
def test_records_are_what_each_step_held(rule: Any, steps: int, every: int, at: list[int]) -> None:
    """Records at 0, every, 2 every, ..., steps hold value, norm, time and probes of that very step, by the loop of `plain`."""
    found = simulate(GRID, rule, runs=2, steps=steps, every=every, probes=["class_norms"])
    assert found.step.tolist() == at
    assert found.value.shape == found.gradient_norm.shape == found.time.shape == (6, len(at))
    assert found.probes["class_norms"].shape == (6, len(at), 3)
    for record, taken in enumerate(at):
        begin = first_factors(GRID, starts.balanced(), 2, 0, balanced(GRID).objective.chain)
        ended = simulate(GRID, rule, runs=2, steps=taken, every=taken).factors if taken else begin
        for b in range(6):
            run = [f[b] for f in ended]
            assert found.value[b, record] == pytest.approx(plain.value(GRID, b // 2, run), rel=1e-13)
            assert found.probes["class_norms"][b, record] == pytest.approx(np.linalg.norm(run[0], axis=0), rel=1e-13)
        gauge = balanced(GRID, 2)
        assert found.gradient_norm[:, record] == pytest.approx(gauge.scale_free_norm(gauge.from_factors(ended)), rel=1e-10)
        if not isinstance(rule, GradientFlow):
            assert found.time[:, record] == pytest.approx(rule.step * taken, rel=1e-15)
    assert found.logits == pytest.approx(found.factors[1] @ found.factors[0], rel=1e-13)
    assert found.last("value").tolist() == found.value[:, -1].tolist()
    assert set(found.stop) == {Stop.STEPS}


def test_about_a_hundred_records_by_default() -> None:
    assert len(simulate(ONE, RULES[0], steps=1000).step) == 101
    assert simulate(ONE, RULES[0], steps=7).step.tolist() == list(range(8))


def test_after_its_end_a_run_has_nan() -> None:
    """Up to and with the last record numbers, then NaN, in every record; `last` reads the last number of each run."""
    found = simulate(GRID, RULES[0], runs=3, steps=2000, every=10, tol=1e-3, probes=["class_norms"])
    assert set(found.stop) == {Stop.GRADIENT}
    assert len(set(found.steps.tolist())) > 3
    for b, steps in enumerate(found.steps):
        for numbers in (found.value, found.gradient_norm, found.time, found.probes["class_norms"]):
            known = np.isfinite(numbers[b]).reshape(len(found.step), -1)
            assert known[found.step <= steps].all()
            assert not known[found.step > steps].any()
        at = int(np.flatnonzero(found.step == steps)[0])
        assert found.last("value")[b] == found.value[b, at]
        assert found.last("time")[b] == pytest.approx(0.2 * steps)
        assert found.last("class_norms")[b].tolist() == found.probes["class_norms"][b, at].tolist()
        assert found.gradient_norm[b, at] <= 1e-3 < found.gradient_norm[b, at - 1]
        assert found.value[b, at] == pytest.approx(plain.value(GRID, b // 3, [f[b] for f in found.factors]), rel=1e-13)


def test_probes_by_name_and_as_functions() -> None:
    """Functions of a Snapshot, (B,) or (B, m), in any library, recorded under their names in the order given."""

    def rows(at: Snapshot) -> Any:
        assert at.problem.cells == len(at.runs)
        assert at.logits.shape == (len(at.runs), 3, 3)
        return at.problem.lam_w[:, 0]

    class Largest:
        def __call__(self, at: Snapshot) -> Any:
            return at.logits[:, :, 0]

    for device in ("numpy", "cpu"):
        found = simulate(GRID, RULES[0], runs=2, steps=4, probes=[rows, "margins", Largest()], device=device)
        assert list(found.probes) == ["rows", "margins", "Largest"]
        assert found.probes["rows"].tolist() == np.repeat([[0.02] * 5, [0.01] * 5, [0.03] * 5], 2, axis=0).tolist()
        assert found.probes["Largest"][:, -1] == pytest.approx(to_numpy(found.logits)[:, :, 0], rel=1e-13)


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_takes_every_problem(name: str) -> None:
    """(B, T) or (B, T, m) on every eighth problem, also of runs that diverge, at zero, and on torch; runs beside them are unmoved."""
    for problem in NATIVE[::8]:
        found = simulate(problem, GradientDescent(0.01), runs=2, steps=2, probes=[name])
        assert found.probes[name].shape[:2] == (2 * problem.cells, 3)
        on_torch = simulate(problem, GradientDescent(0.01), runs=2, steps=2, probes=[name], device="cpu")
        assert on_torch.probes[name] == pytest.approx(found.probes[name], rel=1e-6, abs=1e-9, nan_ok=True)
    H, W = factors(ONE)
    three = ONE.pick([0, 0, 0])
    for device in ("numpy", "cpu"):
        at = starts.given([np.concatenate([f, 1e200 * np.abs(f), 0 * f]) for f in (H, W)])
        found = simulate(three, GradientDescent(0.1), steps=3, probes=[name], start=at, device=device)
        assert found.stop == (Stop.STEPS, Stop.DIVERGED, Stop.STEPS)
        alone = simulate(ONE, GradientDescent(0.1), steps=3, probes=[name], start=starts.given([H, W]), device=device)
        assert np.array_equal(found.probes[name][:1], alone.probes[name], equal_nan=True)


# --- why runs end --------------------------------------------------------------------------------------------------------------------


def test_why_a_run_ended() -> None:
    """A met tolerance, the last step, and the end of time each leave their name; without a tolerance every step is taken."""
    assert set(simulate(GRID, RULES[0], steps=5, tol=1e-9).stop) == {Stop.STEPS}
    met = simulate(GRID, RULES[0], steps=5000, tol=1e-9)
    assert set(met.stop) == {Stop.GRADIENT}
    assert np.all(met.last("gradient_norm") <= 1e-9)
    assert simulate(GRID, RULES[0], steps=5000).steps.tolist() == [5000] * 3
    timed = simulate(GRID, GradientFlow(until=12.5), runs=2, steps=5000, every=10)
    assert set(timed.stop) == {Stop.TIME}
    assert timed.last("time") == pytest.approx(12.5, rel=1e-15)
    assert np.all(timed.steps < 5000)


@pytest.mark.parametrize("rule", [GradientDescent(0.2, 0.9), GradientFlow(atol=1e-16)], ids=["descent", "flow"])
def test_stalled_at_a_zero_optimum(rule: Any) -> None:
    """Where zero is optimal the scale-free norm has no scale left, and a run ends once nothing is left to gain."""
    problem = Problem([3, 2], width=2, features="free", lam_w=1.0, lam_h=1.0)
    found = simulate(problem, rule, runs=3, steps=5000, tol=1e-12)
    assert set(found.stop) == {Stop.STALLED}
    assert found.last("value") == pytest.approx(np.log(2), rel=1e-14)
    assert max(np.abs(f).max() for f in found.factors) < 1e-6


def test_divergence_is_a_result() -> None:
    """A step far too long gives neither error nor warning: DIVERGED, finite records until then, and the other cells as they are alone."""
    rule = GradientDescent([0.2, 1e7, 0.2])
    for device in ("numpy", "cpu"):
        for loss in (CrossEntropy(), MSE()):
            grid = replace(GRID, loss=loss)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = simulate(grid, rule, runs=2, steps=150, every=1, device=device)
            assert found.stop == (*[Stop.STEPS] * 2, *[Stop.DIVERGED] * 2, *[Stop.STEPS] * 2)
            assert np.all((0 < found.steps[2:4]) & (found.steps[2:4] < 150))
            for b in (2, 3):
                assert np.isfinite(found.value[b, : found.steps[b]]).all()
                assert not np.isfinite(found.value + found.gradient_norm)[b, found.steps[b] :].any()
                assert np.isnan(found.value[b, found.steps[b] + 1 :]).all()
                assert found.value[b, found.steps[b] - 1] > 1e10
            if device == "numpy":
                for g in (0, 2):
                    alone = simulate(grid.cell(g), GradientDescent(0.2), runs=2, steps=150, every=1)
                    assert unequal(of(found, slice(2 * g, 2 * g + 2)), alone) == []


def test_problems_without_penalties() -> None:
    """With lam = 0 F falls towards 0 and the norm is the gradient's own."""
    problem = Problem([4, 3, 2], width=5, features="free", lam_w=0.0, lam_h=0.0)
    found = simulate(problem, GradientDescent(1.0), runs=2, steps=2000)
    assert np.all(np.diff(found.value, axis=1) < 0)
    assert np.all(found.last("value") < 0.01)
    assert np.all(np.isfinite(found.gradient_norm))


@pytest.mark.parametrize(
    "problem",
    [
        Problem([3, 3], width=4, features="relu_of_free", lam_w=0.02, lam_h=0.02, columns="samples"),
        Problem([4, 2, 1], width=4, depth=3, features="free", activation="relu", loss=MSE(), lam_w=0.005, lam_h=0.005),
        Problem([4, 2, 1], width=4, depth=2, features="relu", loss=MSE(), lam_w=0.005, lam_h=0.005, lam_b=0.0),
    ],
    ids=["relu_of_free", "deep_relu_mse", "deep_mse"],
)
def test_other_problems_descend(problem: Problem) -> None:
    """Small steps of every rule lower F on rectified, deep and squared-error problems."""
    for rule in (GradientDescent(0.02), GradientDescent(0.02, 0.5), Adam(1e-3), GradientFlow(until=5.0)):
        found = simulate(problem, rule, runs=4, steps=500)
        assert np.all(found.last("value") < found.value[:, 0])


# --- options -------------------------------------------------------------------------------------------------------------------------


def test_a_step_for_each_cell() -> None:
    """Cell g takes step[g], in all its runs, also where blocks cut a cell and where runs leave."""
    steps = [0.05, 0.2, 0.4]
    for make in (lambda eta: GradientDescent(eta, 0.5), lambda eta: Adam(eta / 10)):
        rule = make(np.array(steps))
        found = simulate(GRID, rule, runs=3, steps=3000, tol=1e-2)
        assert len(set(found.steps.tolist())) > 1
        for g, eta in enumerate(steps):
            alone = simulate(GRID.cell(g), make(eta), runs=3, steps=3000, tol=1e-2)
            assert unequal(of(found, slice(3 * g, 3 * g + 3)), alone) == []


def test_seeds() -> None:
    """One seed for all cells or one for each; seeds of any size count to the last bit."""
    rule, options = RULES[0], dict(runs=2, steps=3)
    one, each = simulate(GRID, rule, seed=5, **options), simulate(GRID, rule, seed=[5, 5, 5], **options)
    assert unequal(one, each) == []
    huge = [2**256 - 1, 2**256 - 2, 2**255]
    found = simulate(GRID, rule, seed=huge, **options)
    for g, seed in enumerate(huge):
        assert unequal(of(found, slice(2 * g, 2 * g + 2)), simulate(GRID.cell(g), rule, seed=seed, **options)) == []
    values = {float(simulate(ONE, rule, seed=seed, **options).value[0, 0]) for seed in (0, 1, *huge)}
    assert len(values) == 5
    assert unequal(simulate(GRID, rule, seed=np.array([7, 8, 9]), **options), simulate(GRID, rule, seed=(7, 8, 9), **options)) == []


def test_progress_counts_every_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "BYTES_PER_COORDINATE", 15e6 / (24 + 9) / 4)  # coordinates and logits of a run, four runs a block
    done: list[int] = []
    simulate(GRID, RULES[0], runs=3, steps=2, progress=done.append)
    assert done == [4, 4, 1]


def test_iterate_is_a_generator() -> None:
    """Snapshots come one at a time; those of a loop cut short are those of the whole one; finished runs are gone from the next."""
    at = factors(GRID, 2)
    rows = GRID.pick(np.repeat(np.arange(3), 2))
    whole = list(iterate(rows, RULES[0], at, steps=400, every=20, tol=1e-2))
    loop = iterate(rows, RULES[0], at, steps=400, every=20, tol=1e-2)
    assert identical(next(loop).factors, whole[0].factors)
    assert identical(next(loop).value, whole[1].value)
    loop.close()
    assert whole[0].factors[0] == pytest.approx(at[0], rel=1e-15)
    for now, after in pairwise(whole):
        assert after.step - now.step == 20
        assert after.runs.tolist() == [run for run, stop in zip(now.runs, now.stop, strict=True) if stop is None]
        assert len(now.runs) == len(now.stop) == len(now.value) == len(now.time) == len(now.gradient_norm) == len(now.factors[0])
    assert all(stop is not None for stop in whole[-1].stop)
    assert len({len(s.runs) for s in whole}) > 2
    found = simulate(GRID, RULES[0], runs=2, steps=400, every=20, tol=1e-2, start=starts.given(at))
    for s in whole:
        assert np.array_equal(s.value, found.value[s.runs, int(np.flatnonzero(found.step == s.step)[0])])


def test_a_rule_is_three_methods() -> None:
    """Any object with start, advance and clock will do: the sign of the gradient as a direction."""

    class Sign:
        def start(self, function: Any, x: Any, cells: Any) -> Any:
            assert cells.tolist() == [0, 0, 1, 1, 2, 2]
            return (x[:, :1] * 0,)

        def advance(self, function: Any, x: Any, state: Any) -> Any:
            return function.project(x - 0.001 * np.sign(function.gradient(x))), (state[0] + 1,)

        def clock(self, state: Any, taken: int) -> Any:
            assert np.all(state[0] == taken)
            return ufm.rules.Clock(state[0][:, 0], state[0][:, 0] >= 30)

    found = simulate(GRID, Sign(), runs=2, steps=100, every=10)
    assert set(found.stop) == {Stop.TIME}
    assert found.steps.tolist() == [30] * 6
    assert np.all(found.last("value") < found.value[:, 0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_takes_the_same_steps(device: str) -> None:
    """100 steps on every eighth problem are numpy's to 1e-12; factors and logits come back on the device."""
    torch = pytest.importorskip("torch")
    for problem in NATIVE[::8]:
        for rule in (GradientDescent(2e-3, 0.9), Adam(1e-3, epsilon=1e-3)):
            ours = simulate(problem, rule, steps=100, every=50)
            theirs = simulate(problem, rule, steps=100, every=50, device=device)
            assert {(x.device.type, x.dtype) for x in (*theirs.factors, theirs.logits)} == {(device, torch.float64)}
            assert np.all(np.isfinite(ours.value))
            assert theirs.value == pytest.approx(ours.value, rel=1e-12)
            for mine, other in zip(ours.factors, theirs.factors, strict=True):
                assert to_numpy(other) == pytest.approx(mine, rel=1e-12, abs=1e-12)


def twice(at: Snapshot) -> Any:
    return at.value


def value(at: Snapshot) -> Any:
    return at.value


def bare(at: Snapshot) -> Any:
    return 1.0


GOOD: dict[str, Any] = dict(problem=ONE, rule=GradientDescent(0.1), steps=4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(problem=3), TypeError, "simulate: problem is 3, but must be a ufm.Problem"),
    (dict(rule=Adam), TypeError, "simulate: rule is <class 'ufm.rules.Adam'>, but must be one of ufm.rules, called"),
    (dict(rule="Adam"), TypeError, "simulate: rule is 'Adam', but must be one of ufm.rules"),
    (dict(rule=GradientDescent([0.1, 0.2])), ValueError, "simulate: the rule's step has 2 entries, but the problem has G = 1 cells"),
    (
        dict(problem=GRID, rule=GradientDescent([0.1, 0.2])),
        ValueError,
        "simulate: the rule's step has 2 entries, but the problem has G = 3",
    ),
    (dict(runs=0), ValueError, "simulate: runs is 0, but must be a whole number, at least 1"),
    (dict(runs=1.5), ValueError, "simulate: runs is 1.5, but must be a whole number, at least 1"),
    (dict(steps=0), ValueError, "simulate: steps is 0, but must be a whole number, at least 1"),
    (dict(steps=True), ValueError, "simulate: steps is True, but must be a whole number, at least 1"),
    (dict(every=0), ValueError, "simulate: every is 0, but must be a whole number, at least 1"),
    (dict(every="1"), ValueError, "simulate: every is '1', but must be a whole number, at least 1"),
    (dict(tol=0.0), ValueError, "simulate: tol is 0.0, but must lie between 0 and 1, or be None to take every step"),
    (dict(tol=1.0), ValueError, "simulate: tol is 1.0, but must lie between 0 and 1"),
    (dict(tol="1e-9"), ValueError, "simulate: tol is '1e-9', but must lie between 0 and 1"),
    (dict(seed=-1), ValueError, "simulate: seed is -1, but must be a whole number, at least 0, or a sequence of G = 1 of them"),
    (dict(seed=0.5), ValueError, "simulate: seed is 0.5, but must be a whole number"),
    (dict(seed=True), ValueError, "simulate: seed is True, but must be a whole number"),
    (dict(seed=[1, 2]), ValueError, "simulate: seed is [1, 2], but must be a whole number, at least 0, or a sequence of G = 1"),
    (dict(start="normal"), TypeError, "starts: start is 'normal', but must be one of ufm.starts"),
    (dict(start=starts.given([np.ones((4, 3))])), ValueError, "starts.given: got 1 factors, but the problem has 2"),
    (dict(probes=["nc9"]), ValueError, "simulate: there is no probe named 'nc9'; the probes are class_norms"),
    (dict(probes=[["nc1"]]), ValueError, "simulate: there is no probe named ['nc1']; the probes are class_norms"),
    (dict(probes=[twice, twice]), ValueError, "simulate: two records would be named twice; give each probe a __name__ of its own"),
    (dict(probes=["nc1", "nc1"]), ValueError, "simulate: two records would be named nc1; give each probe"),
    (dict(probes=[value]), ValueError, "simulate: two records would be named value; give each probe a __name__ of its own"),
    (dict(probes=[bare]), ValueError, "simulate: probe bare gave shape () for 1 runs; give (B,) or (B, m), runs first"),
    (dict(device="nowhere"), ValueError, "device 'nowhere' is not to be had here"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD)
def test_options_are_checked(change: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    """One sentence that names the call, what it got and the rule."""
    with pytest.raises(kind, match=f"^{re.escape(sentence)}") as caught:
        simulate(**(GOOD | change))
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy_are_options() -> None:
    assert simulate(ONE, RULES[0], runs=np.int64(2), steps=np.int32(4), every=np.int64(2), seed=np.int64(3)).step.tolist() == [0, 2, 4]


# --- science -------------------------------------------------------------------------------------------------------------------------


def step_problem(t: float, features: Any, n_min: int = 10) -> Problem:
    """STEP, K = d = 4, R = 100; the minority is at zero at the optimum iff t = kappa^2 K/((K-1) n_min) >= 1; lam_w/lam_h = N/10."""
    counts = ufm.counts.step(4, n_min, 100)
    N = int(counts.sum())
    level = np.sqrt(t * n_min * 3 / 4) / N
    return Problem(counts, width=4, features=features, lam_w=level * np.sqrt(N / 10), lam_h=level / np.sqrt(N / 10))


def descended(problem: Problem, scale: float, runs: int, steps: int, step: float) -> Trajectory:
    return simulate(problem, GradientDescent(step, 0.9), runs=runs, steps=steps, tol=1e-9, start=starts.balanced(scale))


def test_small_starts_lose_the_minority() -> None:
    """At t = 0.5 the optimum keeps every class, but projected descent from a small start puts minority classes at zero for good.

    The ends are dead-subset points: their values are F* plus the gains of the classes lost.
    """
    problem = step_problem(0.5, "relu")
    n, lam_w, lam_h = problem.counts[0], problem.lam_w[0, 0], problem.lam_h[0]
    assert not np.any(collapsed(n, lam_w, lam_h))
    assert np.all(dead_subset_gain(n, lam_w, lam_h) > 0)
    found = descended(problem, 0.1, 40, 10_000, 4.0)
    norms = np.linalg.norm(found.factors[0], axis=1)
    dead = norms < 1e-6 * norms.max(axis=1, keepdims=True)
    at_dead = np.abs(found.last("value") / dead_subset_value(n, lam_w, lam_h, dead) - 1) < 1e-7
    assert np.mean(at_dead) >= 0.95
    assert np.mean(dead[:, 2:].any(axis=1)) >= 0.95
    assert not np.any(dead[:, :2])
    assert np.all(found.last("value") >= optimal_value(n, lam_w, lam_h) * (1 - 1e-12))


def test_without_relu_every_run_reaches_the_optimum() -> None:
    """Free features are benign: every start, large or small, ends at the value that `solve` certifies."""
    problem = step_problem(0.5, "free")
    best = ufm.solve(problem, tol=1e-10)
    assert best.gap[0] <= 1e-10
    for scale in (0.1, 1.0):
        found = descended(problem, scale, 10, 10_000, 4.0)
        assert found.last("value") == pytest.approx(best.value[0], rel=1e-7)
