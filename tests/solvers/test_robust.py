"""The robust loop finds and proves the optimum where plain descent does not."""

from __future__ import annotations

import numpy as np
import pytest

import ufm
from test_lbfgs import scipy_run
from ufm.certificate import dual_bound
from ufm.coordinates import balanced
from ufm.records import Regime, Stop
from ufm.solvers.robust import seed_atoms, simplified
from ufm.starts import first_factors

PATTERNS = {
    "balanced": ufm.counts.balanced(4, 100),
    "step 4, R = 10": ufm.counts.step(4, 20, 10),
    "step 4, R = 100": ufm.counts.step(4, 20, 100),
    "step 10, R = 10": ufm.counts.step(10, 20, 10),
    "step 10, R = 100": ufm.counts.step(10, 20, 100),
    "linear": ufm.counts.linear(10, 100, 500),
    "geometric": ufm.counts.exponential(10, 1000, 100),
}


def at_level(counts: np.ndarray, t: float, width: int) -> ufm.Problem:
    """kappa^2 K/((K-1) n_min) = t, with lam_w/lam_h = N/10."""
    K, N = len(counts), counts.sum()
    lam = np.sqrt(t * counts.min() * (K - 1) / K) / N
    return ufm.Problem(counts, width=width, features="relu", lam_w=lam * np.sqrt(N / 10), lam_h=lam / np.sqrt(N / 10))


def bad_starts(runs: int, plain: int) -> tuple[int, int, int, int]:
    """(robust runs, those proven and at the optimum, L-BFGS-B runs, those at the optimum) at scale 0.1 and d = K."""
    done = good = tried = reached = 0
    for counts in PATTERNS.values():
        for t in (0.01, 0.5, 0.95, 0.999, 1.001, 1.05):
            problem = at_level(counts, t, len(counts))
            optimum = ufm.predict(problem).value[0]
            start = ufm.starts.balanced(0.1)
            found = ufm.solve(problem, runs=runs, start=start)
            done += runs
            good += int(np.sum((found.gap <= 1e-8) & (np.abs(found.value / optimum - 1) <= 1e-10)))
            frame = balanced(problem, plain)
            x = frame.from_factors(first_factors(problem, start, plain, 0, frame.objective.chain))
            ends = np.array([scipy_run(frame, x, row).fun for row in range(plain)]) * frame.unit
            tried += plain
            reached += int(np.sum(ends / optimum - 1 <= 1e-7))
    return done, good, tried, reached


def test_every_bad_start_ends_at_a_proven_optimum() -> None:
    """Scale 0.1, d = K, on both sides of the threshold: all runs proven; L-BFGS-B from the same starts mostly fails."""
    done, good, tried, reached = bad_starts(runs=4, plain=2)
    assert good == done
    assert reached < 0.7 * tried


@pytest.mark.slow
def test_a_thousand_bad_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """1,050 runs of 42 problems, reported beside L-BFGS-B from the same starts."""
    done, good, tried, reached = bad_starts(runs=25, plain=25)
    with capsys.disabled():
        print(f"\nrobust: {good} of {done} proven optimal; L-BFGS-B: {reached} of {tried} within 1e-7")
    assert done >= 1000
    assert good == done
    assert reached < 0.7 * tried


def test_merging_keeps_the_product_and_frees_coordinates() -> None:
    """A class spread over parallel coordinates ends in one of them, the value unchanged."""
    problem = ufm.Problem([40, 20, 10], width=6, features="relu", lam_w=1e-3, lam_h=1e-4)
    frame = balanced(problem)
    found = ufm.solve(problem)
    H, W = frame.unpack(frame.from_factors(found.factors))
    first = int(np.argmax(np.abs(H[0]).sum(axis=1)))
    empty = int(np.argmin(np.abs(H[0]).sum(axis=1)))
    assert not H[0, empty].any()
    for share, coordinate in ((0.3, empty), (0.7, first)):
        if coordinate == empty:
            H[0, empty], W[0, :, empty] = np.sqrt(share) * H[0, first], np.sqrt(share) * W[0, :, first]
        else:
            H[0, first], W[0, :, first] = np.sqrt(share) * H[0, first], np.sqrt(share) * W[0, :, first]
    split = frame.pack((H, W))
    assert frame.value_and_gradient(split)[0] * frame.unit == pytest.approx(found.value, rel=1e-14)
    merged = simplified(problem, frame, split)
    assert frame.value_and_gradient(merged)[0] == pytest.approx(frame.value_and_gradient(split)[0], rel=1e-14)
    used = [np.count_nonzero(np.abs(frame.unpack(x)[0][0]).sum(axis=1)) for x in (split, merged)]
    assert used == [4, 3]


def test_a_violating_atom_lowers_the_objective_at_the_promised_rate() -> None:
    """At zero below the threshold: rho > 1 and F falls; F(t) = F(0) - t sqrt(lam_w lam_h)(rho - 1) + O(t^2)."""
    problem = ufm.Problem([40, 20, 10], width=3, features="relu", lam_w=1e-2, lam_h=1e-2)
    frame = balanced(problem)
    zero = np.zeros((1, 18))
    value = frame.value_and_gradient(zero)[0]
    dual = dual_bound(problem, frame.to_factors(zero))
    point = seed_atoms(problem, frame, zero, dual)
    assert frame.value_and_gradient(point)[0] < value
    atom = dual.atoms[0][np.argmax([np.linalg.norm(dual.Qt[0] @ v) for v in dual.atoms[0]])]
    image = dual.Qt[0] @ atom
    for t in (1e-4, 1e-5):
        H, W = np.zeros((1, 3, 3)), np.zeros((1, 3, 3))
        H[0, 0], W[0, :, 0] = np.sqrt(t) * atom, np.sqrt(t) * image / np.linalg.norm(image)
        drop = value - frame.value_and_gradient(frame.pack((H, W)))[0]
        assert drop == pytest.approx(t * (np.linalg.norm(image) - 1), rel=1e-2)


@pytest.mark.parametrize("features", ["free", "relu"])
def test_zero_and_saddles_are_left_or_proven(features: str) -> None:
    """Started exactly at zero, a stationary point, the loop leaves it below the threshold and proves it above."""
    for lam, expected in ((1e-3, Regime.DISTINCT), (0.2, Regime.ALL_ZERO)):
        problem = ufm.Problem([30, 20, 10], width=4, features=features, lam_w=lam, lam_h=lam)
        zero = ufm.starts.given((np.zeros((4, 3)), np.zeros((3, 4))))
        found = ufm.solve(problem, start=zero)
        assert found.stop == (Stop.GAP,)
        assert found.regime == (expected,)


def test_too_narrow_a_model_is_not_called_proven() -> None:
    """With d below the number of live classes the bound over all widths is out of reach: the gap stays open and says so."""
    problem = ufm.Problem([40, 30, 20, 10], width=2, features="relu", lam_w=2e-2, lam_h=2e-2)
    found = ufm.solve(problem, runs=4)
    assert np.all(found.gap > 1e-3)
    assert Stop.GAP not in found.stop
    assert np.all(found.gradient_norm < 1e-6)


def test_width_equal_to_the_live_classes_suffices() -> None:
    """d = number of live classes, dead minority included in K: still proven optimal."""
    counts = ufm.counts.step(6, 10, 50)
    problem = at_level(counts, 1.5, 3)
    found = ufm.solve(problem, runs=6)
    assert np.all(found.gap <= 1e-9)
    assert np.all(found.collapsed == [False] * 3 + [True] * 3)
    assert set(found.regime) == {Regime.MINORITY_ZERO}


def test_free_bias_relu_is_certified_and_merges_at_the_known_level() -> None:
    """Minority features merge, not vanish, once kappa^2 >= n_B (Hong-Ling number), with a free bias; proven on both sides."""
    counts = ufm.counts.step(4, 20, 10)
    N = counts.sum()
    for level, expected in ((0.97, Regime.DISTINCT), (1.03, Regime.MERGED)):
        lam = np.sqrt(level * 20) / N
        problem = ufm.Problem(counts, width=8, features="relu", lam_w=lam, lam_h=lam, lam_b=0.0)
        found = ufm.solve(problem, runs=3)
        assert np.all(found.gap <= 1e-9)
        assert set(found.regime) == {expected}
