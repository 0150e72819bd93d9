"""`solve` from a user's side: options, batches, devices, storing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ufm
from ufm.records import Solution, Stop

GRID = dict(counts=[[40, 20, 10], [30, 30, 10]], width=4, features="relu", lam_w=[1e-2, 3e-2], lam_h=[1e-3, 2e-3])


def test_runs_are_cell_major_and_shapes_are_stated() -> None:
    found = ufm.solve(ufm.Problem(**GRID), runs=3)
    assert found.value.shape == found.gap.shape == found.steps.shape == (6,)
    assert [f.shape for f in found.factors] == [(6, 4, 3), (6, 3, 4)]
    assert found.logits.shape == (6, 3, 3)
    assert len(found.stop) == len(found.regime) == 6
    cells = [ufm.solve(ufm.Problem(**GRID).cell(g)).value[0] for g in range(2)]
    assert found.value == pytest.approx(np.repeat(cells, 3), rel=1e-12)


def test_a_run_does_not_depend_on_its_grid_or_on_other_runs() -> None:
    """Run r of a cell starts from the seed (seed, r): alone, in a grid and among more runs it is the same run."""
    problem = ufm.Problem(**GRID)
    many = ufm.solve(problem, runs=4, seed=3)
    few = ufm.solve(problem.cell(1), runs=2, seed=3)
    for a, b in zip(many.factors, few.factors, strict=True):
        assert b == pytest.approx(a[4:6], abs=1e-6 * np.abs(a).max())
    other = ufm.solve(problem.cell(1), runs=2, seed=4)
    assert np.abs(other.factors[0] - few.factors[0]).max() > 1e-3 * np.abs(few.factors[0]).max()


def test_torch_on_the_cpu_solves_the_same_runs() -> None:
    """Same starts, same optimum; factors and logits come back as tensors, the record's numbers as numpy."""
    torch = pytest.importorskip("torch")
    problem = ufm.Problem(**GRID)
    ours, theirs = ufm.solve(problem, runs=2), ufm.solve(problem, runs=2, device="cpu")
    assert theirs.value == pytest.approx(ours.value, rel=1e-13)
    assert np.all(theirs.gap <= 1e-9)
    assert all(isinstance(f, torch.Tensor) and f.dtype == torch.float64 for f in (*theirs.factors, theirs.logits))
    again = ufm.certify(problem, theirs.factors)
    assert again.value == pytest.approx(theirs.value, rel=1e-15)


def test_solutions_come_back_from_disk(tmp_path: Path) -> None:
    problem = ufm.Problem(**GRID, lam_b=0.1)
    found = ufm.solve(problem, runs=2)
    found.save(tmp_path / "solution.npz")
    loaded = Solution.load(tmp_path / "solution.npz")
    assert loaded.stop == found.stop
    assert loaded.regime == found.regime
    for name in ("value", "gap", "gradient_norm", "rho", "steps", "rounds", "collapsed", "logits"):
        assert np.array_equal(getattr(loaded, name), getattr(found, name))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.factors, found.factors, strict=True))
    restarted = ufm.solve(problem, runs=2, start=ufm.starts.given(loaded.factors))
    assert restarted.value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("features", ["free", "relu", "relu_of_free"])
def test_samples_are_solved_through_their_means(features: Any) -> None:
    """Robust solving of a sample problem ends at the optimum of its class means, every sample of a class at one point."""
    problem = ufm.Problem([5, 3, 2], width=4, features=features, lam_w=0.02, lam_h=0.01, columns="samples")
    found = ufm.solve(problem, runs=2)
    means = ufm.solve(ufm.Problem([5, 3, 2], width=4, features="free" if features == "free" else "relu", lam_w=0.02, lam_h=0.01))
    assert np.all(found.gap <= 1e-9)
    assert found.value == pytest.approx(means.value[0], rel=1e-12)
    H = found.factors[0]
    assert H.shape == (2, 4, 10)
    assert np.array_equal(H[:, :, 0], H[:, :, 4])


def test_relu_of_free_descent_is_the_dead_unit_demonstration() -> None:
    """Local descent on relu(V) from sign-symmetric starts stops above the optimum, and the open gap says so."""
    problem = ufm.Problem([12, 12, 12, 12], width=8, features="relu_of_free", lam_w=0.01, lam_h=0.01, columns="samples")
    found = ufm.solve(problem, runs=3, method="lbfgs", start=ufm.starts.normal(), tol=1e-8)
    optimum = ufm.predict(problem).value[0]
    assert np.all(found.value > optimum * (1 + 1e-3))
    assert np.all(found.gap > 1e-3)


def test_a_device_that_is_not_there_gets_one_sentence() -> None:
    """With torch: no such device; without: the extra to install."""
    with pytest.raises(
        (ValueError, ImportError), match=r"device 'abacus' (is not to be had here|needs torch; install the extra)"
    ) as caught:
        ufm.solve(ufm.Problem(**GRID), device="abacus")
    assert "\n" not in str(caught.value)


def test_progress_counts_every_run() -> None:
    seen: list[int] = []
    ufm.solve(ufm.Problem(**GRID), runs=5, progress=seen.append)
    assert sum(seen) == 10


def test_steps_are_bounded_on_request() -> None:
    """All methods, shallow and deep: at most max_steps gradient evaluations a run, and one line search more."""
    for method in ("lbfgs", "robust"):
        found = ufm.solve(ufm.Problem(**GRID), method=method, max_steps=5)
        assert found.stop == (Stop.STEPS, Stop.STEPS)
        assert np.all(found.steps <= 5 + 31)
    deep = ufm.Problem([40, 20, 10], width=5, depth=3, features="free", loss=ufm.MSE(), lam_w=1e-3, lam_h=1e-3)
    assert ufm.solve(deep, max_steps=5).steps[0] <= 5 + 31
    slow = ufm.Problem(ufm.counts.exponential(20, 50_000, 10_000), width=25, features="relu", loss=ufm.MSE(), lam_w=1e-7, lam_h=1e-7)
    assert ufm.solve(slow, max_steps=1700).steps[0] <= 1700 + 62


def test_penalties_of_zero_leave_the_gap_open() -> None:
    """Without a penalty cross-entropy has no minimiser: the value falls, nothing is proven beyond F* >= 0."""
    problem = ufm.Problem([3, 2], width=2, features="free", lam_w=0.0, lam_h=0.0)
    found = ufm.solve(problem, max_steps=200)
    assert found.value[0] < np.log(2)
    assert not found.gap[0] < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(method="newton"), "method is 'newton'"),
        (dict(runs=0), "runs is 0"),
        (dict(runs=2.5), "runs is 2.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(max_steps=0), "max_steps is 0"),
        (dict(tol=0.0), "tol is 0.0"),
        (dict(tol=float("nan")), "tol is nan"),
        (dict(tol="a"), "tol is 'a'"),
        (dict(method=["robust"]), "method is"),
        (dict(start=ufm.starts.given(5)), "factors is 5"),
        (dict(start=ufm.starts.given((np.zeros((4, 3)),))), "1 factors"),
        (dict(start="normal"), "start is 'normal'"),
        (dict(start=ufm.starts.normal), "called"),
        (dict(start=ufm.starts.given((-np.ones((4, 3)), np.ones((3, 4))))), "H >= 0"),
        (dict(method="convex", device="cpu"), "device"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_options_get_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        ufm.solve(ufm.Problem(**GRID), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("features", ["free", "relu"])
def test_any_width_can_be_solved(features: Any) -> None:
    """Below the rank of the optimum nothing raises: the run ends stationary with its gap open; its neighbours are proven as ever."""
    counts = ufm.counts.exponential(8, 5000, 100)
    problem = ufm.Problem(counts, width=2, features=features, lam_w=[1e-6, 1.0], lam_h=[1e-6, 1.0], loss=ufm.CrossEntropy(0.1))
    found = ufm.solve(problem, runs=2)
    assert np.all(found.gap[:2] > 1e-3)
    assert np.all(found.gap[2:] <= 1e-9)
    with pytest.raises(ValueError, match="width of at least"):
        ufm.solve(problem, method="convex", max_steps=300)


def test_the_callers_thread_limits_come_back() -> None:
    """Solving uses one BLAS thread and leaves the process as it was."""
    from threadpoolctl import threadpool_info

    before = [(pool["prefix"], pool["num_threads"]) for pool in threadpool_info()]
    ufm.solve(ufm.Problem(**GRID))
    assert [(pool["prefix"], pool["num_threads"]) for pool in threadpool_info()] == before


@pytest.mark.parametrize("call", [ufm.solve, ufm.predict, lambda p: ufm.certify(p, ())], ids=["solve", "predict", "certify"])
def test_only_problems_are_solved_predicted_and_certified(call: Any) -> None:
    with pytest.raises(TypeError, match=r"but must be a ufm\.Problem"):
        call([1, 2])


@pytest.mark.parametrize("features", ["free", "relu", "relu_of_free"])
def test_samples_of_a_loss_that_is_not_convex_are_not_averaged(features: Any) -> None:
    """Focal loss: within-class collapse is no theorem there, so samples stay samples; the end point is stationary, nothing is claimed."""
    problem = ufm.Problem([3, 2], width=3, features=features, loss=ufm.Focal(2.0), lam_w=0.01, lam_h=0.01, columns="samples")
    found = ufm.solve(problem, start=ufm.starts.normal())
    assert np.all(np.isnan(found.gap))
    assert found.gradient_norm[0] < 1e-6
    assert found.factors[0].shape == (1, 3, 5)
