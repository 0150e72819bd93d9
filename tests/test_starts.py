"""Laws of the first factors: shapes, distributions, alignment, seeds that know nothing of the batch, and the checks on given ones."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

import plain
from catalog import PROBLEMS, factors, to_library
from ufm import starts
from ufm.chain import forward
from ufm.losses import MSE, CrossEntropy
from ufm.objective import chain_of
from ufm.problem import Problem
from ufm.starts import TABLE, first_factors

DRAWN = {name: kind for name, kind in TABLE.items() if name != "given"}
EACH = pytest.mark.parametrize("problem", [p for _, p in PROBLEMS], ids=[n for n, _ in PROBLEMS])
START = pytest.mark.parametrize("start", [kind() for kind in DRAWN.values()], ids=list(DRAWN))
FREE = pytest.mark.parametrize(
    "problem", [p for _, p in PROBLEMS if p.features != "relu"], ids=[n for n, p in PROBLEMS if p.features != "relu"]
)
LARGE = Problem([40, 20, *[10] * 10], width=30, depth=3, features="free", lam_w=[[1e-3, 2e-2, 3e-4]], lam_h=5e-6, lam_b=0.0)


def first(problem: Problem, start: Any, runs: int = 2, seed: int = 0, device: str = "numpy") -> tuple[Any, ...]:
    return first_factors(problem, start, runs, seed, chain_of(problem), device)


def identical(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_table_names_every_start() -> None:
    """The public name of a start is its name in the table."""
    assert all(getattr(starts, name) is kind for name, kind in TABLE.items())


@EACH
def test_shapes(problem: Problem) -> None:
    """(B, rows, cols) each, finite float64; H >= 0 where the problem asks for it, of both signs elsewhere; a bias starts at 0."""
    for kind in DRAWN.values():
        got = first(problem, kind())
        assert [x.shape for x in got] == [x.shape for x in factors(problem, 2)]
        assert all(x.dtype == np.float64 and np.all(np.isfinite(x)) and x.flags.writeable for x in got)
        assert np.any(got[0] < 0) == (problem.features != "relu")
        assert problem.lam_b is None or np.all(got[-1] == 0)


@START
def test_nonnegative_features_are_absolute_values(start: Any) -> None:
    """H of a nonnegative problem is |H| of the free one, and the weights are the same."""
    for _, problem in PROBLEMS:
        if problem.features == "relu":
            H, *others = first(replace(problem, features="free"), start)
            assert identical(first(problem, start), [np.abs(H), *others])


@EACH
def test_a_run_is_its_seed(problem: Problem) -> None:
    """The draw of run r of a cell is the same in any number of runs, beside any other cells, in any order of cells."""
    order = list(range(problem.cells))[::-1]
    for kind in DRAWN.values():
        got, turned = first(problem, kind(), runs=3, seed=5), first(problem.pick(order), kind(), runs=3, seed=5)
        for g in range(problem.cells):
            at = order.index(g)
            assert identical([x[3 * g : 3 * g + 2] for x in got], first(problem.cell(g), kind(), runs=2, seed=5))
            assert identical([x[3 * g : 3 * g + 3] for x in got], [x[3 * at : 3 * at + 3] for x in turned])
        assert identical(first(problem, kind(), runs=3, seed=5), got)


@START
def test_runs_and_seeds_differ(start: Any) -> None:
    """No two runs or seeds share a factor; cells of equal penalties and counts share theirs."""
    twins = Problem([[3, 2, 1], [3, 2, 1]], width=4, depth=2, features="free", lam_w=0.1, lam_h=0.1)
    seen = [[x[b] for x in first(twins, start, runs=2, seed=seed)] for seed in (0, 1, 2) for b in (0, 1)]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert all(np.max(np.abs(x - y)) > 1e-3 for x, y in zip(a, b, strict=True))
    got = first(twins, start)
    assert identical([x[:2] for x in got], [x[2:] for x in got])


@START
def test_seeds_per_cell(start: Any) -> None:
    """A sequence (G,) gives every cell its own seed, of any size; one number, or a sequence of one, is the seed of all."""
    grid = Problem([[3, 2, 1], [3, 2, 1], [4, 1, 1]], width=4, depth=2, features="free", lam_w=0.1, lam_h=0.1)
    own = [2**256 - 1, 0, 2**64]
    got = first_factors(grid, start, 2, own, chain_of(grid))
    for g, seed in enumerate(own):
        assert identical([x[2 * g : 2 * g + 2] for x in got], first(grid.cell(g), start, runs=2, seed=seed))
    assert not np.any(np.isclose(got[0][0], got[0][2]))
    for same in ([5, 5, 5], [5], np.array([5, 5, 5]), (np.int64(5),)):
        assert identical(first_factors(grid, start, 2, same, chain_of(grid)), first(grid, start, runs=2, seed=5))
    near = first_factors(grid, start, 2, [2**256 - 2, 0, 2**64], chain_of(grid))
    assert identical([x[2:] for x in near], [x[2:] for x in got])
    assert not np.any(np.isclose(near[0][:2], got[0][:2]))


@pytest.mark.parametrize("bad", [-1, 1.5, "1", None, True, [1, 2], [1, 2, -3], [1, 2, 3.0], [1, 2, True], [], [[1, 2, 3]]])
def test_seeds_are_checked(bad: Any) -> None:
    """Whole numbers, one or one per cell: a sentence names the call, the seed and G."""
    with pytest.raises(ValueError, match=r"^solve: seed is .+, but must be a whole number, at least 0, or a sequence of G = 3 of them$"):
        starts.seeds("solve", bad, 3)


@START
def test_global_random_state_is_untouched(start: Any) -> None:
    """Draws come from the run's own generator."""
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first(LARGE, start, runs=1)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@START
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_devices_are_equal(start: Any, device: str) -> None:
    """The same bits on every device, in double precision."""
    torch = pytest.importorskip("torch")
    for _, problem in PROBLEMS:
        got = first(problem, start, device=device)
        assert {(x.device.type, x.dtype) for x in got} == {(device, torch.float64)}
        assert identical([x.cpu().numpy() for x in got], first(problem, start))


@pytest.mark.parametrize("kind", DRAWN.values(), ids=list(DRAWN))
def test_scale(kind: Any) -> None:
    """scale multiplies every factor; of a spectral start, the product of all."""
    one, eight = first(LARGE, kind(), runs=1), first(LARGE, kind(8.0), runs=1)
    power = 1 / (LARGE.depth + 1) if kind is starts.Spectral else 1.0
    for x, y in zip(one, eight, strict=True):
        assert y == pytest.approx(8.0**power * x, rel=1e-14)


# --- normal entries ------------------------------------------------------------------------------------------------------------------


def looks_normal(x: Any, deviation: float) -> bool:
    """Whether entries pass for N(0, deviation^2): mean and deviation within five standard errors, and the shape of their distribution."""
    n = x.size
    mean = abs(np.mean(x)) <= 5 * deviation / np.sqrt(n)
    spread = abs(np.std(x) / deviation - 1) <= 5 / np.sqrt(2 * n)
    return bool(mean and spread and kstest(x.ravel() / deviation, "norm").pvalue > 1e-4)


def test_normal() -> None:
    """Every entry of every factor ~ N(0, scale^2/d), of H per sample, so N(0, scale^2/(d n_k)) for means; all independent."""
    H, *weights = first(LARGE, starts.normal(0.7), runs=20)[:-1]
    assert looks_normal(first(replace(LARGE, columns="samples"), starts.normal(0.7))[0], 0.7 / np.sqrt(30))
    got = [np.sqrt(LARGE.counts[0]) * H, *weights]
    for x in got:
        assert looks_normal(x, 0.7 / np.sqrt(30))
        assert not looks_normal(x, 0.74 / np.sqrt(30))  # the check can fail
    draws = np.concatenate([x.reshape(20, -1) for x in got], axis=1)
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.max(np.abs(correlation)) < 5 / np.sqrt(draws.shape[1])


@pytest.mark.parametrize("columns", ["means", "samples"])
def test_balanced_deviations_at_depth_one(columns: Any) -> None:
    """W ~ scale q N(0, 1), H ~ (scale/q) N(0, 1), q = (lam_h N/(K lam_w))^{1/4}, whatever the columns are."""
    counts, lam_w, lam_h, scale = [40, 20, *[10] * 10], 3e-2, 5e-6, 0.3
    problem = Problem(counts, width=30, features="free", lam_w=lam_w, lam_h=lam_h, columns=columns)
    q = (lam_h * sum(counts) / (len(counts) * lam_w)) ** 0.25
    H, W = first(problem, starts.balanced(scale), runs=20)
    assert looks_normal(W, scale * q)
    assert looks_normal(H, scale / q)


def test_balanced_penalties_are_equal() -> None:
    """The expected penalty of every factor is scale^2 g/2, g the geometric mean of lam_l times the entries of the factor, N d for H."""
    scale, runs, depth = 0.3, 40, LARGE.depth
    got = first(LARGE, starts.balanced(scale), runs=runs)
    lam, m = [LARGE.lam_h[0], *LARGE.lam_w[0]], LARGE.counts[0]
    entries = [m.sum() * LARGE.width, *(x[0].size for x in got[1 : depth + 1])]
    g = float(np.prod([a * n for a, n in zip(lam, entries, strict=True)])) ** (1 / (depth + 1))
    for layer in range(depth + 1):
        weight = m if layer == 0 else np.ones(got[layer].shape[2])
        penalty = lam[layer] / 2 * np.sum(weight * got[layer] ** 2, axis=(1, 2))
        freedom = got[layer].shape[1] * np.sum(weight) ** 2 / np.sum(weight**2)  # of the weighted sum of squares
        assert abs(np.mean(penalty) / (scale**2 * g / 2) - 1) <= 5 * np.sqrt(2 / (runs * freedom))
        assert looks_normal(got[layer], scale * np.sqrt(g / (lam[layer] * entries[layer])))


def test_balanced_takes_a_missing_penalty_for_one() -> None:
    """A factor without penalty is drawn as with lam = 1; a bias's penalty does not matter."""
    some = replace(LARGE, lam_w=[[1e-3, 0.0, 3e-4]])
    assert identical(first(some, starts.balanced()), first(replace(some, lam_w=[[1e-3, 1.0, 3e-4]]), starts.balanced()))
    assert identical(first(some, starts.balanced()), first(replace(some, lam_b=0.5), starts.balanced()))
    none = replace(LARGE, lam_w=0.0, lam_h=0.0)
    assert identical(first(none, starts.balanced()), first(replace(none, lam_w=1.0, lam_h=1.0), starts.balanced()))


# --- orthogonal ----------------------------------------------------------------------------------------------------------------------


@FREE
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_orthogonal(problem: Problem, scale: float) -> None:
    """F F^T or F^T F, whichever is smaller, is scale^2 I."""
    for x in first(problem, starts.orthogonal(scale))[: problem.depth + 1]:
        small = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
        assert small == pytest.approx(np.broadcast_to(scale**2 * np.eye(small.shape[1]), small.shape), abs=1e-14)


def test_orthogonal_is_haar() -> None:
    """No direction is preferred: entries have mean 0 and mean square 1/d, and -Q is as likely as Q.

    Without the signs of R's diagonal the factor of a QR decomposition fails this.
    """
    problem = Problem([1, 1, 1], width=4, depth=2, features="free", lam_w=0.1, lam_h=0.1)
    runs = 1000
    Q = first(problem, starts.orthogonal(), runs=runs)[1]
    assert np.max(np.abs(Q.mean(axis=0))) < 5 * np.sqrt(1 / 4 / runs)
    fourth = 3 / (4 * 6)  # E q^4 of a unit vector in four dimensions
    assert np.max(np.abs((Q**2).mean(axis=0) - 1 / 4)) < 5 * np.sqrt((fourth - 1 / 16) / runs)
    assert abs(np.mean(np.linalg.det(Q) > 0) - 0.5) < 5 * 0.5 / np.sqrt(runs)
    assert kstest((Q @ np.ones(4) / 2)[:, 0], lambda q: 0.5 + (np.arcsin(q) + q * np.sqrt(1 - q**2)) / np.pi).pvalue > 1e-4


# --- spectral ------------------------------------------------------------------------------------------------------------------------


def product_and_target(problem: Problem, b: int, got: Any) -> tuple[Any, Any]:
    """W_L ... W_1 H diag(m)^{1/2} of a run of one-run cells, and -(slope of the losses at zero logits) diag(m)^{1/2}, by differences."""
    root, h = np.sqrt(problem.multiplicity[b]), 1e-5
    Z = np.linalg.multi_dot([x[b] for x in got[: problem.depth + 1]][::-1])
    counts, slope = problem.counts[b].tolist(), np.zeros(Z.shape)
    for c, (y, _) in enumerate(plain.columns(problem, b)):
        for k, move in enumerate(h * np.eye(problem.classes)):
            ahead, behind = (plain.column_loss(problem.loss, b, counts, (s * move).tolist(), y) for s in (1, -1))
            slope[k, c] = (ahead - behind) / (2 * h)
    return Z * root, -slope * root


@FREE
def test_spectral_is_aligned(problem: Problem) -> None:
    """The product and minus the losses' slope at 0, both in sqrt(m)-weighted columns, have common singular vectors and no signs."""
    got = first(problem, starts.spectral(), runs=1)
    for b in range(problem.cells):
        M, A = product_and_target(problem, b, got)
        U, s, Vt = np.linalg.svd(A)
        r = int(np.sum(s > 1e-6 * s[0]))
        assert M @ A.T == pytest.approx(A @ M.T, abs=1e-8)
        assert M.T @ A == pytest.approx(A.T @ M, abs=1e-8)
        assert np.linalg.eigvalsh(M @ A.T + A @ M.T).min() > -1e-8
        assert U[:, r:].T @ M == pytest.approx(0.0, abs=1e-8)  # nothing outside the slope's own space
        assert M @ Vt[r:].T == pytest.approx(0.0, abs=1e-8)
        assert np.linalg.matrix_rank(M, tol=1e-6) == min(r, problem.width)


@FREE
def test_spectral_is_balanced(problem: Problem) -> None:
    """W_{l+1}^T W_{l+1} = W_l W_l^T, and W_1^T W_1 = H diag(m) H^T."""
    got = first(problem, starts.spectral(), runs=1)
    weighted = got[0] * np.sqrt(problem.multiplicity)[:, None, :]
    chain = [weighted, *got[1 : problem.depth + 1]]
    for before, after in pairwise(chain):
        assert after.mT @ after == pytest.approx(before @ before.mT, abs=1e-13)


@pytest.mark.parametrize("depth", [1, 3])
def test_spectral_singular_values(depth: int) -> None:
    """The product's singular values are scale |N(0, 1)|, K - 1 of them for cross-entropy, in an order of their own."""
    problem = Problem([7, 4, 2], width=4, depth=depth, features="free", lam_w=0.1, lam_h=0.1)
    got, root = first(problem, starts.spectral(0.6), runs=1000), np.sqrt(problem.multiplicity)
    Z = forward(chain_of(problem), got)[0] * root[:, None, :]
    U, _, Vt = np.linalg.svd((np.eye(3) - 1 / 3) * root)
    along = np.diagonal(U.T @ Z @ Vt.T, axis1=1, axis2=2)
    assert along[:, 2] == pytest.approx(0.0, abs=1e-14)
    assert np.all(along[:, :2] > 0)
    assert looks_normal(along[:, :2] * np.random.default_rng(0).choice([-1.0, 1.0], (1000, 2)), 0.6)
    assert abs(np.mean(along[:, 0] > along[:, 1]) - 0.5) < 5 * 0.5 / np.sqrt(1000)


def test_spectral_of_cross_entropy_is_the_seli_matrix() -> None:
    """With equal adjustments the aligned matrix is (I - J/K) Y diag(m)^{1/2}, for means and samples; for MSE it is Y diag(m)^{1/2}."""
    for loss, matrix in ((CrossEntropy(), np.eye(3) - 1 / 3), (MSE(), np.eye(3))):
        for columns in ("means", "samples"):
            problem = Problem([3, 2, 1], width=5, features="free", loss=loss, lam_w=0.1, lam_h=0.1, columns=columns)
            H, W = first(problem, starts.spectral(), runs=1)
            root = np.sqrt(problem.multiplicity[0])
            A, M = matrix[:, problem.labels[0]] * root, (W @ H)[0] * root
            assert M @ A.T == pytest.approx(A @ M.T, abs=1e-13)
            assert M.T @ A == pytest.approx(A.T @ M, abs=1e-13)
            assert np.linalg.matrix_rank(M) == np.linalg.matrix_rank(matrix)


def test_spectral_keeps_the_strongest_directions_a_narrow_width_holds() -> None:
    """Of the K directions of MSE with width 2, those of the two largest classes."""
    problem = Problem([5, 3, 1], width=2, features="free", loss=MSE(), lam_w=0.1, lam_h=0.1)
    H, W = first(problem, starts.spectral())
    Z = W @ H
    assert Z == pytest.approx(Z * np.diag([1.0, 1.0, 0.0]), abs=1e-14)
    assert np.all(np.abs(np.diagonal(Z, axis1=1, axis2=2)[:, :2]) > 0)


# --- own and given starts ------------------------------------------------------------------------------------------------------------


def test_a_start_is_one_method() -> None:
    """Any object with draw(cell, shapes, generator) will do: it sees the cell alone, the shapes and the run's own generator."""
    problem = Problem([[3, 2], [4, 1]], width=2, features="relu", lam_w=0.1, lam_h=[0.1, 0.2], lam_b=0.0)

    class Marked:
        def draw(self, cell: Problem, shapes: Any, generator: np.random.Generator) -> list[Any]:
            assert cell.cells == 1
            return [np.full(shape, -cell.lam_h[0] - generator.random()) for shape in shapes]

    H, W, b = first(problem, Marked(), runs=2, seed=9)
    draws = [lam + np.random.default_rng([9, r]).random() for lam in (0.1, 0.2) for r in (0, 1)]
    assert H[:, 0, 0] == pytest.approx(draws, rel=1e-15)
    assert W[:, 0, 0] != pytest.approx(draws)
    assert np.all(b == 0)


@EACH
def test_given_factors_are_taken_as_they_are(problem: Problem) -> None:
    """A batch of factors goes through bit for bit, bias included, into arrays of its own; the seed does not matter."""
    mine = factors(problem, 2)
    got = first(problem, starts.given(mine))
    assert identical(got, mine)
    assert identical(first(problem, starts.given(mine), seed=1), got)
    got[0][:] = 7.0
    assert not np.any(mine[0] == 7.0)


@EACH
def test_one_given_run_starts_all(problem: Problem) -> None:
    """Factors without a batch axis are the start of every run of every cell, each with a copy of its own; both kinds may be mixed."""
    mine = factors(problem, 2)
    got = first(problem, starts.given([x[0] for x in mine]))
    assert identical(got, [np.stack([x[0]] * (2 * problem.cells)) for x in mine])
    got[1][0] = 7.0
    assert not np.any(got[1][1] == 7.0)
    assert identical(first(problem, starts.given([mine[0], *(x[0] for x in mine[1:])]))[0:1], mine[:1])


@pytest.mark.parametrize("library", ["torch", "strict", "strict_device1"])
def test_given_factors_of_any_library(library: str) -> None:
    """Tensors and arrays of other libraries and devices are read."""
    _, problem = PROBLEMS[0]
    mine = factors(problem, 2)
    assert identical(first(problem, starts.given([to_library(library, x) for x in mine])), mine)


def test_given_lists() -> None:
    """Nested lists of whole numbers are read as float64."""
    problem = Problem([2, 1], width=1, features="free", lam_w=0.1, lam_h=0.1)
    H, W = first(problem, starts.given([[[1, 2]], [[3], [4]]]), runs=1)
    assert (H.tolist(), W.tolist(), H.dtype) == ([[[1.0, 2.0]]], [[[3.0], [4.0]]], np.float64)


GIVEN = Problem([3, 2, 1], width=4, features="free", lam_w=0.1, lam_h=0.1, lam_b=0.0)  # H (4, 3), W (3, 4), b (3, 1)
GOOD = [np.ones((4, 3)), np.ones((3, 4)), np.ones((3, 1))]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (GOOD[:2], "starts.given: got 2 factors, but the problem has 3; give (H, W_1, ..., W_L[, b])"),
        ([*GOOD, np.ones(1)], "starts.given: got 4 factors, but the problem has 3; give (H, W_1, ..., W_L[, b])"),
        ([GOOD[0].T, *GOOD[1:]], "starts.given: factor 0 has shape (3, 4), but the problem needs (4, 3) or (2, 4, 3)"),
        ([np.ones((3, 4, 3)), *GOOD[1:]], "starts.given: factor 0 has shape (3, 4, 3), but the problem needs (4, 3) or (2, 4, 3)"),
        ([np.ones((1, 4, 3)), *GOOD[1:]], "starts.given: factor 0 has shape (1, 4, 3), but the problem needs (4, 3) or (2, 4, 3)"),
        ([np.ones((1, 2, 4, 3)), *GOOD[1:]], "starts.given: factor 0 has shape (1, 2, 4, 3), but the problem needs (4, 3) or (2, 4, 3)"),
        ([*GOOD[:2], np.ones(3)], "starts.given: factor 2 has shape (3,), but the problem needs (3, 1) or (2, 3, 1)"),
        ([GOOD[0], 1.0, GOOD[2]], "starts.given: factor 1 has shape (), but the problem needs (3, 4) or (2, 3, 4)"),
        ([GOOD[0], np.full((3, 4), np.nan), GOOD[2]], "starts.given: factor 1 holds NaN or infinity; every entry must be finite"),
        ([GOOD[0], GOOD[1], np.full((3, 1), np.inf)], "starts.given: factor 2 holds NaN or infinity; every entry must be finite"),
    ],
)
def test_given_factors_are_checked(bad: Any, sentence: str) -> None:
    """The error names the call, what it got, and the rule."""
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        first(GIVEN, starts.given(bad))
    first(GIVEN, starts.given(GOOD))


@pytest.mark.parametrize("start", [starts.normal, starts.balanced, starts.orthogonal, starts.agd, starts.spectral])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_scales_are_positive_numbers(start: Any, scale: Any) -> None:
    with pytest.raises(ValueError, match=r"starts\.\w+: scale is"):
        start(scale)
