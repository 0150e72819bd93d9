"""The stabilised flow against its polynomials, SciPy's integrator, plain descent and exact equations of singular values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.polynomial import Chebyshev
from scipy.integrate import solve_ivp

import plain
from catalog import PROBLEMS, factors
from test_rules import by_sample, ends, torch_flow
from ufm import Problem, Stop, counts, simulate, starts
from ufm import stabilised as inside
from ufm.coordinates import Coordinates, weighted
from ufm.dynamics import iterate
from ufm.rules import GradientDescent, GradientFlow, StabilisedFlow

DEEP = Problem(counts.balanced(4, 3), width=6, depth=2, features="free", lam_w=2.0**-7, lam_h=2.0**-7)
PLAIN = Problem([5, 3, 2], width=4, features="free", lam_w=0.02, lam_h=0.01, lam_b=0.05)
CHAIN = Problem([4, 4, 4], width=5, depth=3, features="free", activation="relu", lam_w=0.01, lam_h=0.01)


def path_of(problem: Problem, rule: Any, at: Any, steps: int = 20_000, every: int = 20) -> list[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        return list(iterate(problem, rule, at, steps=steps, every=every))


def last(problem: Problem, rule: Any, at: Any, steps: int = 20_000, every: int = 20) -> Any:
    """The last snapshot of a batch of one run."""
    return path_of(problem, rule, at, steps, every)[-1]


def difference(problem: Problem, got: Any, exact: Any) -> float:
    """The largest difference of one run's factors, sample by sample."""
    return max(float(np.max(np.abs(a - b))) for a, b in zip(by_sample(problem, 0, [f[0] for f in got])[1], exact, strict=True))


# --- one step ------------------------------------------------------------------------------------------------------------------------


def growth(stages: int, z: Any) -> Any:
    """What one step of x' = z x multiplies x by, from the rule's own weights."""
    s = np.full((1, 1), float(stages))
    move, before = inside._first_weight(s)[0, 0] * z, 0 * z
    for j in range(1, stages):
        mu, nu, own, first = (float(w[0, 0]) for w in inside._weights(np.full((1, 1), float(j)), s))
        move, before = mu * move + nu * before + own * z * (1 + move) + first * z, move
    return 1 + move


@pytest.mark.parametrize("stages", [2, 3, 4, 7, 30, 200])
def test_a_step_is_a_chebyshev_polynomial(stages: int) -> None:
    """1 - b T(w) + b T(w + v z), damped on the whole stability interval, and e^z to second order (numpy's Chebyshev series)."""
    T = Chebyshev.basis(stages)
    w = 1 + 2 / 13 / stages**2
    v, b = T.deriv()(w) / T.deriv(2)(w), T.deriv(2)(w) / T.deriv()(w) ** 2
    z = -np.linspace(0, 1, 4001) * inside.BETA * (stages**2 - 1)
    assert growth(stages, z) == pytest.approx(1 - b * T(w) + b * T(w + v * z), abs=1e-8)
    assert np.max(np.abs(growth(stages, z[1:]))) <= 1.0
    assert np.max(np.abs(growth(stages, z[2000:]))) < 0.995
    assert abs(growth(stages, z[-1:] * 1.25)[0]) > 1.1
    small = np.array([-0.02, -0.01])
    assert np.log2(np.divide(*(growth(stages, small) - np.exp(small)))) == pytest.approx(3.0, abs=0.05)


def test_every_gradient_is_counted() -> None:
    """An advance takes one gradient of every run, whatever its stage."""
    calls = []

    class Counted(Coordinates):
        def gradient(self, x: Any) -> Any:
            calls.append(len(x))
            return super().gradient(x)

    frame = weighted(DEEP, 3)
    frame = Counted(**{name: getattr(frame, name) for name in frame.__dataclass_fields__})
    x = frame.from_factors(factors(DEEP, 3))
    rule = StabilisedFlow()
    state = rule.start(frame, x, np.arange(3))
    for _ in range(100):
        x, state = rule.advance(frame, x, state)
    assert calls == [3] * 101


# --- the flow ------------------------------------------------------------------------------------------------------------------------

SMOOTH = [(n, p) for n, p in PROBLEMS if p.activation == "linear" and p.features == "free" and "autograd" not in n][::6]


@pytest.mark.parametrize("problem", [p for _, p in SMOOTH], ids=[n for n, _ in SMOOTH])
def test_flow_is_scipys(problem: Problem) -> None:
    """The point at a given time is that of SciPy's integrator of order 8 on torch's gradients of the samples."""
    at = factors(problem)
    path = path_of(problem, StabilisedFlow(until=2.0, rtol=1e-7, atol=1e-9), at)
    end = ends(path)
    for cell in range(problem.cells):
        samples, run = by_sample(problem, cell, [x[cell] for x in at])
        got = by_sample(problem, cell, [f[cell] for f in end])[1]
        for mine, theirs in zip(got, torch_flow(samples, cell, run, 2.0), strict=True):
            assert np.max(np.abs(mine - theirs)) < 1e-5
    assert path[-1].time == pytest.approx(2.0, rel=3e-16)


def test_the_error_follows_the_tolerance() -> None:
    """The error is in proportion to rtol^{2/3} or better, and steps grow like rtol^{-1/3}."""
    at = factors(PLAIN)
    samples, run = by_sample(PLAIN, 0, [x[0] for x in at])
    exact = torch_flow(samples, 0, run, 10.0)
    tolerances, error, steps = 10.0 ** -np.arange(2.0, 7.5), [], []
    for rtol in tolerances:
        end = last(PLAIN, StabilisedFlow(until=10.0, rtol=rtol, atol=rtol / 100), at, every=5)
        error.append(difference(PLAIN, end.factors, exact))
        steps.append(end.step)
    assert 0.6 < np.polyfit(np.log(tolerances), np.log(error), 1)[0] < 1.1
    assert np.all(np.array(error) < 30 * tolerances ** (2 / 3))
    assert -0.37 < np.polyfit(np.log(tolerances[2:]), np.log(steps[2:]), 1)[0] < -0.25


def test_flow_of_a_relu_chain() -> None:
    """Between kinks, which `factors` keep away from, the flow of a ReLU chain is that of torch's derivatives."""
    at = factors(CHAIN)
    samples, run = by_sample(CHAIN, 0, [f[0] for f in at])
    end = last(CHAIN, StabilisedFlow(until=0.05, rtol=1e-7, atol=1e-9), at)
    assert end.time == pytest.approx(0.05, rel=3e-16)
    assert difference(CHAIN, end.factors, torch_flow(samples, 0, run, 0.05)) < 1e-6


@pytest.mark.parametrize("power", [7, 12, 17])
def test_small_penalties_cost_little(power: int) -> None:
    """lambda = 2^-7 to 2^-17: stationary points to 1e-10 in under 3,000 gradients, below plain descent's by the stiffness."""
    problem = replace(DEEP, lam_w=2.0**-power, lam_h=2.0**-power)
    found = simulate(problem, StabilisedFlow(), runs=4, steps=3000, tol=1e-10, every=20, start=starts.normal(1.0))
    assert set(found.stop) == {Stop.GRADIENT}
    assert np.all(found.last("gradient_norm") <= 1e-10)


def test_end_points_are_those_of_plain_descent() -> None:
    """Seed by seed, the values where plain descent ends, from starts that lead to several ranks, for a tenth of its cost."""
    start: dict[str, Any] = dict(runs=24, seed=3, tol=1e-8, start=starts.normal(1.3))
    slow = simulate(DEEP, GradientDescent(0.2), steps=200_000, every=100, **start)
    fast = simulate(DEEP, StabilisedFlow(), steps=10_000, every=10, **start)
    assert set(slow.stop) == set(fast.stop) == {Stop.GRADIENT}
    assert fast.last("value") == pytest.approx(slow.last("value"), rel=1e-9)
    assert len(set(np.round(slow.last("value"), 6))) >= 2
    assert 10 * fast.steps.mean() <= slow.steps.mean()


def test_a_wrong_curvature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fifth of the curvature at the start and no probe after it, unstable steps fail their test, which asks for a probe."""
    monkeypatch.setattr(inside, "RENEWED", 10**9)
    frame, rule = weighted(DEEP, 4), StabilisedFlow()
    x = frame.from_factors(factors(DEEP, 4))
    state: Any = rule.start(frame, x, np.arange(4))
    state = state._replace(stage=0 * state.stage, sigma=0 * state.sigma)
    x, state = rule.advance(frame, x, state)
    state = state._replace(sigma=state.sigma / 5)
    for _ in range(1500):
        x, state = rule.advance(frame, x, state)
    assert np.all(frame.scale_free_norm(x) <= 1e-8)


def test_the_curvature_is_found() -> None:
    """Before its first step every run knows the largest eigenvalue of its own Hessian, from below and to within the safety factor."""
    frame = weighted(DEEP, 5)
    x = frame.from_factors(factors(DEEP, 5))
    basis = np.eye(x.shape[1])
    exact = [
        np.abs(np.linalg.eigvalsh(np.stack([frame.pick(np.array([run])).hessian_product(x[[run]], e[None])[0] for e in basis]))).max()
        for run in range(5)
    ]
    state: Any = StabilisedFlow().start(frame, x, np.arange(5))
    sigma = np.zeros((5, 1))
    for _ in range(inside.PROBES + 1):
        _, state = StabilisedFlow().advance(frame, x, state)
        run = inside._Run(*state)
        sigma = np.where((run.stage == 1) & (sigma == 0), run.sigma, sigma)
    assert np.all(sigma > 0)
    assert np.all(sigma[:, 0] <= 1.01 * np.array(exact))
    assert np.all(inside.SAFETY * sigma[:, 0] >= np.array(exact))


def test_runs_do_not_see_each_other() -> None:
    """Bit for bit, whatever else is in the block, finished and diverging runs included."""
    at = [np.concatenate([f, 1e3 * f[:1], 0 * f[:1]]) for f in factors(DEEP, 5)]
    rule, path = StabilisedFlow(), dict(steps=400, every=10, tol=1e-6)
    together = simulate(DEEP, rule, runs=7, start=starts.given(at), **path)
    for i in (0, 3, 4, 5, 6):
        alone = simulate(DEEP, rule, start=starts.given([f[i] for f in at]), **path)
        assert together.steps[i] == alone.steps[0]
        assert together.stop[i] == alone.stop[0]
        assert np.array_equal(together.time[i][: alone.time.shape[1]], alone.time[0], equal_nan=True)
        assert all(np.array_equal(a[i], b[0]) for a, b in zip(together.factors, alone.factors, strict=True))


@pytest.mark.parametrize("until", [1e-9, 0.1, 1 / 3, 7.77])
def test_until_is_met_exactly(until: float) -> None:
    """To the last bit or one beside it, zero included; later steps change nothing."""
    at = [np.stack([0 * x[0], x[0], 1e-6 * x[0], 3 * x[0]]) for x in factors(PLAIN)]
    frame, rule = weighted(PLAIN, 4), StabilisedFlow(until=until)
    x = frame.from_factors(at)
    state = rule.start(frame, x, np.arange(4))
    for _ in range(1500):
        x, state = rule.advance(frame, x, state)
    clock = rule.clock(state, 1500)
    assert clock.time == pytest.approx(until, rel=3e-16, abs=0)
    again, state = rule.advance(frame, x, state)
    assert np.array_equal(again, x)


def test_stationary_points_stay() -> None:
    """At the origin of a deep model nothing moves, without a NaN or a warning."""
    zero = [0 * f for f in factors(DEEP)]
    for problem in (DEEP, replace(DEEP, lam_w=0.0, lam_h=0.0)):
        end = last(problem, StabilisedFlow(), zero, 200)
        assert all(np.all(f == 0) for f in end.factors)
        assert end.value == pytest.approx(np.log(4))


def test_bounds_are_refused() -> None:
    bounded = Problem([3, 2], width=3, features="relu", lam_w=0.01, lam_h=0.01)
    with pytest.raises(ValueError, match=r"^rules.StabilisedFlow: features='relu' bounds H >= 0, .*; use rules.GradientFlow$"):
        simulate(bounded, StabilisedFlow(), steps=10)


# --- loss-normalised time ------------------------------------------------------------------------------------------------------------

FREE = Problem(counts.balanced(4, 1), width=6, depth=2, features="free", lam_w=0.0, lam_h=0.0)
BOTH = [GradientFlow(rtol=1e-8, atol=1e-10), StabilisedFlow(rtol=1e-7, atol=1e-9)]
EACH_FLOW = pytest.mark.parametrize("rule", BOTH, ids=["pair", "stabilised"])


def by_name(rule: Any, **options: Any) -> Any:
    return replace(rule, normalised=True, **options)


@EACH_FLOW
def test_normalised_flow_is_scipys_flow_of_log_f(rule: Any) -> None:
    """dx/dtau = -grad log F by SciPy, with F of `plain` and central differences of it: the same point at tau = 3."""
    small = Problem([1, 1, 1], width=2, depth=2, features="free", lam_w=0.01, lam_h=0.02)
    at = factors(small)
    shapes = [f[0].shape for f in at]
    cuts = np.cumsum([f[0].size for f in at])[:-1]

    def log_f(y: Any) -> float:
        return float(np.log(plain.value(small, 0, [p.reshape(s) for p, s in zip(np.split(y, cuts), shapes, strict=True)])))

    def slope(_: float, y: Any) -> Any:
        steps = 1e-5 * np.eye(len(y))
        return [-(log_f(y + e) - log_f(y - e)) / 2e-5 for e in steps]

    exact = solve_ivp(slope, (0, 3.0), np.concatenate([f.ravel() for f in at]), rtol=1e-8, atol=1e-9, method="DOP853").y[:, -1]
    got = last(small, by_name(rule, until=3.0), at).factors
    assert np.concatenate([f.ravel() for f in got]) == pytest.approx(exact, abs=2e-5)


HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0


def exact_scales(depth: int, begin: Any, until: float) -> tuple[Any, float]:
    """(f (3,), log F) at tau: s_j = f_j^{L+1} on the three characters of Z_2 x Z_2, df_j/dtau = f_j^L (1 - sum_g p_g chi_j(g))/(4 F)."""
    chi = 2 * HADAMARD[:, 1:]

    def loss(f: Any) -> tuple[Any, Any]:
        m = chi @ f ** (depth + 1) / 4
        e = np.exp(m[1:] - m[0])
        return np.log1p(e.sum()), e / (1 + e.sum())

    def slope(_: float, f: Any) -> Any:
        F, p = loss(f)
        return f**depth * (p @ (1 - chi[1:])) / (4 * F)

    f = solve_ivp(slope, (0, until), begin, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return f, float(np.log(loss(f)[0]))


@EACH_FLOW
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_singular_values_follow_their_exact_equations(rule: Any, depth: int) -> None:
    """From aligned factors along the Hadamard basis of four classes they decouple up to the loss and keep their directions."""
    begin, until = np.array([0.3, 0.5, 0.8]), {1: 10.0, 2: 6.0, 3: 5.8}[depth]
    problem = Problem(counts.balanced(4, 1), width=6, depth=depth, features="free", lam_w=0.0, lam_h=0.0)
    eye = np.eye(6, 3)
    middle = [eye * begin @ eye.T for _ in range(depth - 1)]
    at = [eye * begin @ HADAMARD[:, 1:].T, *middle, HADAMARD[:, 1:] * begin @ eye.T]
    end = last(problem, by_name(rule, until=until), [f[None] for f in at])
    Z = end.logits[0]
    f, log_f = exact_scales(depth, begin, until)
    got = np.diag(HADAMARD.T @ Z @ HADAMARD)
    digits = 1e-5 if isinstance(rule, GradientFlow) else 5e-4  # orders 5 and 2, times the growth of errors on the way
    assert got[1:] == pytest.approx(f ** (depth + 1), rel=digits)
    assert np.log(end.value[0]) == pytest.approx(log_f, rel=digits)
    off = HADAMARD.T @ Z @ HADAMARD - np.diag(got)
    assert np.max(np.abs(off)) < 1e-9 * np.max(got)


@EACH_FLOW
@pytest.mark.parametrize("start", [starts.normal(1.0), starts.balanced(1.0), starts.spectral(0.5)], ids=["normal", "balanced", "spectral"])
def test_a_loss_of_1e_minus_100(rule: Any, start: Any) -> None:
    """Without penalties the loss falls through a hundred decades, resolved to the last, and no stop rule mistakes it for an end."""
    found = simulate(FREE, by_name(rule, rtol=1e-5, atol=1e-7), runs=3, steps=6000, tol=1e-100, every=10, start=start)
    assert set(found.stop) == {Stop.GRADIENT}
    assert np.all(found.last("gradient_norm") <= 1e-100)
    assert np.all(found.last("value") < 1e-98)
    assert np.all(np.diff(np.log(found.value[0][np.isfinite(found.value[0])])) <= 0)
    late = np.flatnonzero(np.isfinite(found.value[0]))[-1]
    assert found.time[0, late] < 1000


def test_plain_time_stands_still_where_normalised_time_runs() -> None:
    """The same curve: at equal loss both flows are at the same point."""
    start = starts.normal(1.0)
    slow = simulate(FREE, GradientFlow(until=200.0, rtol=1e-9, atol=1e-11), steps=1000, start=start)
    target = slow.last("value")[0]
    fast = path_of(FREE, GradientFlow(rtol=1e-9, atol=1e-11, normalised=True), first(FREE, start), steps=400, every=1)
    values = np.array([s.value[0] for s in fast])
    after = int(np.argmax(values < target))
    share = np.log(values[after - 1] / target) / np.log(values[after - 1] / values[after])
    for i, end in enumerate(slow.factors):
        low, high = fast[after - 1].factors[i], fast[after].factors[i]
        assert low + share * (high - low) == pytest.approx(end, abs=1e-2)


def first(problem: Problem, start: Any) -> Any:
    from ufm.starts import first_factors

    return first_factors(problem, start, 1, [0], weighted(problem).objective.chain)
