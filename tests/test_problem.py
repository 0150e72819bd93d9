"""The door: what a problem holds, what it refuses, how grids are cut, and what the papers' penalties mean."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from catalog import PROBLEMS
from ufm.losses import MSE, CrossEntropy, Focal, from_autograd
from ufm.problem import PAPERS, Penalties, Problem

NAN = float("nan")
INF = float("inf")
GOOD: dict[str, Any] = {"counts": [3, 2, 1], "width": 4, "features": "free", "lam_w": 0.1, "lam_h": 0.2}


def problem(**changes: Any) -> Problem:
    options = GOOD | changes
    return Problem(options.pop("counts"), **options)


# changes to a good problem, and what the message must hold: the name and the value got
BAD: list[tuple[dict[str, Any], str]] = [
    ({"counts": [3, 0]}, "counts holds 0"),
    ({"counts": [3, -1]}, "counts holds -1"),
    ({"counts": [3.0, NAN]}, "counts holds nan"),
    ({"counts": [3.0, INF]}, "counts holds inf"),
    ({"counts": [3, 2.5]}, "counts holds 2.5"),
    ({"counts": [3]}, "counts has shape (1,)"),
    ({"counts": 3}, "counts has shape ()"),
    ({"counts": []}, "counts has shape (0,)"),
    ({"counts": np.ones((0, 3))}, "counts has shape (0, 3)"),
    ({"counts": np.ones((1, 1, 3))}, "counts has shape (1, 1, 3)"),
    ({"counts": "3, 2"}, "counts"),
    ({"counts": ["3", "2"]}, "counts"),
    ({"counts": None}, "counts"),
    ({"counts": [True, True]}, "counts"),
    ({"counts": [[3, 2], [1]]}, "counts is [[3, 2], [1]]"),
    ({"width": 0}, "width is 0"),
    ({"width": -2}, "width is -2"),
    ({"width": 2.0}, "width is 2.0"),
    ({"width": True}, "width is True"),
    ({"width": None}, "width is None"),
    ({"depth": 0}, "depth is 0"),
    ({"depth": 1.5}, "depth is 1.5"),
    ({"depth": "2"}, "depth is '2'"),
    ({"features": "ReLU"}, "features is 'ReLU'"),
    ({"features": None}, "features is None"),
    ({"features": ["free"]}, "features is ['free']"),
    ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"columns": "mean"}, "columns is 'mean'"),
    ({"features": "relu_of_free"}, "features='relu_of_free' with columns='means'"),
    ({"columns": "samples", "counts": [[3, 2], [3, 3]]}, "N = 5, 6"),
    ({"loss": "CE"}, "loss is 'CE'"),
    ({"loss": CrossEntropy}, "loss is <class"),
    ({"loss": None}, "loss is None"),
    ({"lam_w": -0.1}, "lam_w holds -0.1"),
    ({"lam_w": INF}, "lam_w holds inf"),
    ({"lam_w": NAN}, "lam_w holds nan"),
    ({"lam_w": None}, "lam_w is None"),
    ({"lam_w": "0.1x"}, "lam_w is '0.1x'"),
    ({"lam_w": []}, "lam_w has shape (0,)"),
    ({"lam_w": np.ones((1, 1, 1))}, "lam_w has shape (1, 1, 1)"),
    ({"lam_w": [[0.1, 0.2]]}, "lam_w has 2 columns"),
    ({"lam_w": [[0.1]], "depth": 2}, "lam_w has 1 columns"),
    ({"lam_w": np.ones((2, 0)), "depth": 2}, "lam_w has"),
    ({"lam_h": -1}, "lam_h holds -1"),
    ({"lam_h": -INF}, "lam_h holds -inf"),
    ({"lam_h": [0.1, NAN]}, "lam_h holds nan"),
    ({"lam_h": [[0.1]]}, "lam_h has shape (1, 1)"),
    ({"lam_h": 1j}, "lam_h is 1j"),
    ({"lam_b": -1e-9}, "lam_b holds -1e-09"),
    ({"lam_b": INF}, "lam_b holds inf"),
    ({"lam_b": [[0.1]]}, "lam_b has shape (1, 1)"),
    ({"lam_w": [0.1, 0.2], "lam_h": [0.1, 0.2, 0.3]}, "lam_w has 2 cells, but lam_h has 3"),
    ({"counts": [[3, 2], [2, 2]], "lam_h": [0.1, 0.2, 0.3]}, "counts has 2 cells, but lam_h has 3"),
    ({"lam_b": [0.1, 0.2], "lam_h": [0.1, 0.2, 0.3]}, "lam_b has 2 cells, but lam_h has 3"),
    ({"loss": CrossEntropy(class_weights=np.ones((2, 3))), "lam_h": [0.1] * 3}, "class_weights has 2 cells, but lam_h has 3"),
    ({"loss": CrossEntropy(class_weights=[1, 2])}, "class_weights has shape (2,)"),
    ({"loss": CrossEntropy(temperature=np.ones((1, 2)))}, "temperature has shape (1, 2)"),
    ({"loss": CrossEntropy(logit_adjustment=[0.0] * 4)}, "logit_adjustment has shape (4,)"),
]


@pytest.mark.parametrize(("changes", "part"), BAD, ids=[f"{i}-{part}" for i, (_, part) in enumerate(BAD)])
def test_bad_input(changes: dict[str, Any], part: str) -> None:
    """One sentence that names the call and the value got."""
    with pytest.raises((ValueError, TypeError)) as caught:
        problem(**changes)
    message = str(caught.value)
    assert message.startswith("Problem: ")
    assert part in message
    assert "\n" not in message


BAD_LOSSES: list[tuple[Any, dict[str, Any], str]] = [
    (CrossEntropy, {"label_smoothing": 1.0}, "CrossEntropy: label_smoothing is 1.0"),
    (CrossEntropy, {"label_smoothing": -0.1}, "CrossEntropy: label_smoothing is -0.1"),
    (CrossEntropy, {"label_smoothing": NAN}, "CrossEntropy: label_smoothing is nan"),
    (CrossEntropy, {"label_smoothing": "0.1"}, "CrossEntropy: label_smoothing is '0.1'"),
    (CrossEntropy, {"label_smoothing": [0.1, 0.2]}, "CrossEntropy: label_smoothing is [0.1, 0.2]"),
    (CrossEntropy, {"class_weights": [1.0, 0.0]}, "CrossEntropy: class_weights is [1.0, 0.0]"),
    (CrossEntropy, {"class_weights": [1.0, INF]}, "CrossEntropy: class_weights is [1.0, inf]"),
    (CrossEntropy, {"class_weights": "abc"}, "CrossEntropy: class_weights is 'abc'"),
    (CrossEntropy, {"class_weights": 2.0}, "CrossEntropy: class_weights is 2.0"),
    (CrossEntropy, {"class_weights": np.ones((1, 1, 3))}, "CrossEntropy: class_weights has shape (1, 1, 3)"),
    (CrossEntropy, {"logit_adjustment": NAN}, "CrossEntropy: logit_adjustment is nan"),
    (CrossEntropy, {"logit_adjustment": [0.0, -INF]}, "CrossEntropy: logit_adjustment is [0.0, -inf]"),
    (CrossEntropy, {"temperature": 0.0}, "CrossEntropy: temperature is 0.0"),
    (CrossEntropy, {"temperature": -1.0}, "CrossEntropy: temperature is -1.0"),
    (CrossEntropy, {"temperature": [1.0, NAN]}, "CrossEntropy: temperature is [1.0, nan]"),
    (CrossEntropy, {"temperature": None}, "CrossEntropy: temperature is None"),
    (Focal, {"gamma": -1.0}, "Focal: gamma is -1.0"),
    (Focal, {"gamma": INF}, "Focal: gamma is inf"),
    (Focal, {"gamma": NAN}, "Focal: gamma is nan"),
    (Focal, {"gamma": "2"}, "Focal: gamma is '2'"),
    (from_autograd, {"value": 3}, "from_autograd: value is 3"),
]


@pytest.mark.parametrize(("loss", "options", "part"), BAD_LOSSES, ids=[f"{i}-{part}" for i, (_, _, part) in enumerate(BAD_LOSSES)])
def test_bad_loss(loss: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        loss(**options)
    assert str(caught.value).startswith(part)
    assert "\n" not in str(caught.value)


def test_required_options() -> None:
    """Sizes, features and both penalties have no default."""
    for name in ("width", "features", "lam_w", "lam_h"):
        options = {k: v for k, v in GOOD.items() if k not in (name, "counts")}
        with pytest.raises(TypeError, match=name):
            Problem([3, 2], **options)


def test_zero_penalties_and_any_width_are_allowed() -> None:
    assert problem(lam_w=0, lam_h=0, lam_b=0, width=1).lam_b.tolist() == [0.0]


def test_normal_form() -> None:
    """Every per-cell quantity has one row per cell, whatever was given."""
    p = problem(counts=[3, 2, 1], lam_w=[0.1, 0.2], lam_h=0.3, lam_b=0.0, depth=3)
    assert (p.cells, p.classes) == (2, 3)
    assert p.counts.tolist() == [[3, 2, 1], [3, 2, 1]]
    assert p.lam_w.tolist() == [[0.1] * 3, [0.2] * 3]
    assert (p.lam_h.tolist(), p.lam_b.tolist(), p.samples.tolist()) == ([0.3, 0.3], [0.0, 0.0], [6, 6])
    assert problem(lam_w=[[0.1, 0.2]], lam_h=[1.0, 2.0], depth=2).lam_w.tolist() == [[0.1, 0.2]] * 2
    assert problem(counts=np.array([3.0, 2.0])).counts.dtype == np.int64
    assert problem().lam_b is None


def test_columns() -> None:
    """Class means stand for n_k samples each; samples for themselves, class by class; multiplicities add up to N."""
    means, samples = problem(counts=[2, 1, 3]), problem(counts=[2, 1, 3], columns="samples")
    assert means.labels.tolist() == [[0, 1, 2]]
    assert means.multiplicity.tolist() == [[2.0, 1.0, 3.0]]
    assert samples.labels.tolist() == [[0, 0, 1, 2, 2, 2]]
    assert samples.multiplicity.tolist() == [[1.0] * 6]


@pytest.mark.parametrize("p", [p for _, p in PROBLEMS], ids=[name for name, _ in PROBLEMS])
def test_every_problem(p: Problem) -> None:
    """Sizes agree, nothing can be changed, and cutting a grid into its cells and back loses nothing."""
    assert p.counts.shape == (p.cells, p.classes)
    assert np.array_equal(p.multiplicity.sum(axis=1), p.samples)
    for g in range(p.cells):
        assert [p.multiplicity[g][p.labels[g] == k].sum() for k in range(p.classes)] == p.counts[g].tolist()
    for name in ("counts", "lam_w", "lam_h", "samples", "labels", "multiplicity", *(() if p.lam_b is None else ("lam_b",))):
        assert not getattr(p, name).flags.writeable, name
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.width = 3  # type: ignore[misc]
    again = p.pick(range(p.cells))
    for g in range(p.cells):
        assert same_cell(p.cell(g), 0, p, g)
        assert same_cell(again, g, p, g)


def same_cell(a: Problem, i: int, b: Problem, j: int) -> bool:
    """Whether cell i of a is cell j of b, in every option, loss parameters included."""
    fixed = all(getattr(a, n) == getattr(b, n) for n in ("width", "depth", "features", "activation", "columns"))
    penalties = all(np.array_equal(getattr(a, n)[i], getattr(b, n)[j]) for n in ("counts", "lam_w", "lam_h"))
    bias = (a.lam_b is None) == (b.lam_b is None) and (a.lam_b is None or a.lam_b[i] == b.lam_b[j])
    return fixed and penalties and bias and all(np.array_equal(x, y) for x, y in zip(parameters(a, i), parameters(b, j), strict=True))


def parameters(p: Problem, g: int) -> list[Any]:
    """The loss's parameters in cell g as its targets hold them."""
    T = p.loss.targets(np.eye(p.classes)[None] + np.zeros((p.cells, 1, 1)), p.counts)
    return [
        type(p.loss).__name__,
        getattr(p.loss, "gamma", None),
        *(np.array(0) if t is None else t[g] for t in (T.soft, T.weight, T.shift, T.temperature)),
    ]


def test_pick_reorders_and_repeats() -> None:
    """Cells come in the order asked for, each with its own penalties and its own loss parameters."""
    loss = CrossEntropy(class_weights=[[1, 2], [3, 4], [5, 6]], temperature=[2.0, 1.0], logit_adjustment=[[0, 1]])
    p = problem(counts=[[3, 2], [2, 2], [4, 1]], lam_w=[0.1, 0.2, 0.3], lam_h=0.5, loss=loss).pick([2, 0, 2])
    assert p.counts.tolist() == [[4, 1], [3, 2], [4, 1]]
    assert p.lam_w[:, 0].tolist() == [0.3, 0.1, 0.3]
    assert p.loss.class_weights.tolist() == [[5, 6], [1, 2], [5, 6]]  # type: ignore[union-attr]
    assert p.loss.temperature.tolist() == [2.0, 1.0]  # type: ignore[union-attr]
    assert p.cell(1).loss.class_weights.tolist() == [[1, 2]]  # type: ignore[union-attr]


def test_pick_of_one_cell_grid() -> None:
    """A single cell can be repeated into a grid, loss parameters and all."""
    p = problem(counts=[3, 2], loss=CrossEntropy(class_weights=[[1, 2]])).pick([0, 0])
    assert parameters(p, 1)[3].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("index", [5, -6, 0.5, [], "a"])
def test_pick_refuses(index: Any) -> None:
    """A cell that is not there gives one sentence naming the call."""
    with pytest.raises((IndexError, ValueError, TypeError)) as caught:
        problem(lam_h=[0.1, 0.2]).pick(index)
    assert str(caught.value).startswith("Problem.pick: ")


def test_the_callers_arrays_stay_the_callers() -> None:
    """A problem copies what it is given: later changes to the caller's arrays do not reach it."""
    counts, lam_w, weights = np.array([3, 2]), np.array([0.1]), np.array([1.0, 2.0])
    p = problem(counts=counts, lam_w=lam_w, loss=CrossEntropy(class_weights=weights))
    counts[0], lam_w[0], weights[0] = 9, 9.0, 9.0
    assert (p.counts.tolist(), p.lam_w.tolist(), p.loss.class_weights.tolist()) == ([[3, 2]], [[0.1]], [1.0, 2.0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(class_weights=[1, 2]), CrossEntropy(0.1, temperature=2.0), MSE(), Focal(1.0)]
)
def test_losses_compare_and_print(loss: Any) -> None:
    """Two losses can be compared for equality and printed without an error; a loss equals itself."""
    assert loss == loss
    assert loss != Focal(3.0)
    assert type(loss).__name__ in repr(loss)
    assert isinstance(hash(loss), int)


# --- the papers' conventions: each objective written out as its paper writes it, for one bias-carrying linear classifier ---

W, H, b = (np.random.default_rng(0).normal(size=shape) for shape in ((3, 4), (4, 6), (3,)))
LABELS = [0, 0, 0, 1, 1, 2]
N, BATCH = 6, 2


def ce(i: int) -> float:
    z = [sum(W[k, r] * H[r, i] for r in range(4)) + b[k] for k in range(3)]
    return math.log(sum(math.exp(x) for x in z)) - z[LABELS[i]]


def square(x: Any) -> float:
    return sum(float(v) ** 2 for v in np.ravel(x))


def minibatches(per_batch: Any) -> float:
    """The mean of per_batch over all batches of size BATCH, each equally likely."""
    batches = list(itertools.combinations(range(N), BATCH))
    return sum(per_batch(batch) for batch in batches) / len(batches)


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


ALL = range(N)
FEATURES = square(H)
OBJECTIVES = {
    "sum": lambda w, h, c: mean(map(ce, ALL)) + w / 2 * square(W) + h / 2 * FEATURES + c / 2 * square(b),
    "mean": lambda w, h, c: mean(map(ce, ALL)) + w / 2 * square(W) + h / (2 * N) * FEATURES + c / 2 * square(b),
    "summed_loss": lambda w, h, c: sum(map(ce, ALL)) + w / 2 * square(W) + h / 2 * FEATURES + c / 2 * square(b),
    "no_halves": lambda w, h, c: mean(map(ce, ALL)) + w * square(W) + h * FEATURES + c * square(b),
    "half_loss_minibatch": lambda w, h, c: minibatches(
        lambda S: mean(ce(i) / 2 for i in S) + w / 2 * square(W) + h / 2 * sum(square(H[:, i]) for i in S) + c / 2 * square(b)
    ),
    "minibatch_sum": lambda w, h, c: minibatches(
        lambda S: mean(ce(i) for i in S) + w / 2 * square(W) + h / 2 * sum(square(H[:, i]) for i in S) + c / 2 * square(b)
    ),
    "weight_decay": lambda w, h, c: mean(map(ce, ALL)) + (w * square(W) + h * FEATURES + c * square(b)) / 2,
}
FACTOR = {"summed_loss": N, "half_loss_minibatch": 0.5}  # paper's objective over ours


def test_every_paper_is_written_out_here() -> None:
    assert set(OBJECTIVES) == set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("coefficients", [(0.3, 0.07, 0.011), (1e-4, 2e-5, 0.0)])
def test_paper_minimises_the_same_function(name: str, coefficients: tuple[float, float, float]) -> None:
    """Paper's objective = constant * F under the converted penalties, at any (W, H, b)."""
    lam = PAPERS[name].to_ufm(*coefficients, N=N, batch=BATCH)
    ours = OBJECTIVES["sum"](*lam)
    assert OBJECTIVES[name](*coefficients) == pytest.approx(FACTOR.get(name, 1.0) * ours, rel=1e-13)


@pytest.mark.parametrize("name", PAPERS)
def test_conversions_invert(name: str) -> None:
    """from_ufm undoes to_ufm, with and without a bias, for arrays of cells too."""
    N_cells = np.array([6.0, 600.0])
    for given in ((0.3, 0.07, 0.011), (0.3, 0.07, None)):
        lam = PAPERS[name].to_ufm(*given, N=N_cells, batch=2)
        w, h, c = PAPERS[name].from_ufm(lam, N=N_cells, batch=2)
        assert np.broadcast_to(w, 2) == pytest.approx(0.3, rel=1e-15)
        assert np.broadcast_to(h, 2) == pytest.approx(0.07, rel=1e-15)
        assert c is None if given[2] is None else np.broadcast_to(c, 2) == pytest.approx(0.011, rel=1e-15)
    assert PAPERS["sum"].to_ufm(1.0, 2.0) == Penalties(1.0, 2.0, None)
