"""The study of costs: all routes solve one problem, every result is judged, peaks and turns are what they say, figures show the rows."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
from figures import etf_cost as figure
from figures import stored
from studies import etf_cost as study
from studies import etf_node
from ufm import sweep
from ufm.etf import nearest, pullback

POINTS = study.points(study.Options(smoke=True))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("cost")
    return studied.smoke("etf_cost", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "etf_cost", figure.COLUMNS)


def point(**other: Any) -> dict[str, Any]:
    return {"K": 7, "d": 30, "dtype": "float64", "input": "random", "method": "closed form", "seed": 0, "budget": 0.0} | other


def test_a_small_run_says_what_it_found_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["points"] == str(len(table)) == str(len(POINTS))
    assert said["not converged"] == "none"
    ours, theirs = (table.where(d=512, K=10, input="random", dtype="float64", method=m) for m in ("closed form", "trust regions"))
    assert said["forward and backward (512, 10), random, float64"].startswith(f"{ours['ratio'][0]:.2f} SVDs")
    assert said["trust regions, forward (512, 10), random, float64"].startswith(f"{theirs['forward'][0] / ours['forward'][0]:.0f} closed")
    assert all((out / f"etf_cost{kind}").is_file() for kind in (".png", ".pdf", ".html"))


def test_all_routes_agree_where_double_precision_can_tell(table: sweep.Table) -> None:
    """Well-conditioned, in double: to 1e-9 with trust regions, whose gradient norm is 1e-10, else to 1e-12; in single to its digits."""
    assert np.all(table["converged"])
    well = table.pick(table["input"] != "ill-conditioned")
    for dtype, method, limit in (("float32", None, 1e-5), ("float64", "trust regions", 1e-9), ("float64", None, 1e-12)):
        rows = well.where(dtype=dtype)
        rows = rows.pick((rows["method"] == method) | (method is None) & (rows["method"] != "trust regions"))
        assert len(rows)
        assert max(rows["W_difference"].max(), rows["gradient_difference"].max()) <= limit
    ill = table.where(input="ill-conditioned", dtype="float64")
    assert ill["W_difference"].max() <= 2e-10 * study.CONDITION
    assert np.all(ill["condition"] == pytest.approx(study.CONDITION, rel=1e-6))


def test_numbers_of_a_row_belong_together(table: sweep.Table) -> None:
    for of in ("", "_median"):
        assert table[f"ratio{of}"] == pytest.approx((table[f"forward{of}"] + table[f"backward{of}"]) / table[f"svd_seconds{of}"])
    for name in ("svd_seconds", "forward", "backward"):
        assert np.all((table[name] > 0) & (table[name] <= table[f"{name}_median"]))
    entry = np.where(table["dtype"] == "float64", 8, 4)
    assert np.array_equal(table["matrix_bytes"], entry * table["d"] * table["K"])
    assert np.all(table["forward_peak"] > table["matrix_bytes"]), "U and W are returned"
    assert np.all(table["backward_peak"] >= table["matrix_bytes"]), "the gradient is returned"
    node = table.where(method="declarative node")
    m = node["K"] - 1
    assert np.all(node["backward_peak"] >= 8 * node["d"] * m * m * (m + 1) / 2), "the Jacobian of the constraints is held"


def test_all_routes_and_types_get_the_same_means() -> None:
    means, grad_W = study.problem_of(point())
    for other in ({"method": "gram"}, {"budget": 3.0}, {"dtype": "float32"}):
        again = study.problem_of(point(**other))
        assert all(np.array_equal(a.astype(b.dtype), b) for a, b in zip((means, grad_W), again, strict=True))
    assert not np.array_equal(means, study.problem_of(point(seed=1))[0])
    assert not np.allclose(means, study.problem_of(point(input="near collapse"))[0])


@pytest.mark.parametrize(("d", "K"), [(30, 7), (40, 40), (6, 7)])
def test_inputs_are_what_their_names_say(d: int, K: int) -> None:
    rng = np.random.default_rng(0)
    near, ill = study.near_collapse(rng, d, K), study.ill_conditioned(rng, d, K)
    s, t = (np.linalg.svd(x - x.mean(axis=1, keepdims=True), compute_uv=False)[: K - 1] for x in (near, ill))
    assert s == pytest.approx(np.ones(K - 1), abs=6 * study.NEAR)
    assert np.ptp(s) > 1e-2 * study.NEAR, "not exactly collapsed"
    assert t == pytest.approx(np.geomspace(1, 1 / study.CONDITION, K - 1), rel=1e-8)


@pytest.mark.parametrize("method", study.ROUTES)
def test_routes_are_those_they_are_called(method: str) -> None:
    """The back end named, pymanopt's run, and the dense system's gradient; each equal to the closed form."""
    means, grad_W = study.problem_of(point())
    route = study.ROUTES[method]
    solved, exact = route.forward(means), nearest(means)
    assert solved.method == {"closed form": "gram", "declarative node": "gram", "trust regions": "trust-regions"}.get(method, method)
    assert solved.W == pytest.approx(exact.W, abs=1e-9)
    gradient = route.backward(solved, means, grad_W)
    assert gradient == pytest.approx(pullback(exact, grad_W), abs=1e-8)
    assert np.array_equal(gradient, pullback(solved, grad_W)) == (method != "declarative node")


def test_a_wrong_result_is_told() -> None:
    """A frame beside the optimum, a saddle (one direction turned round), one that is not orthonormal: none is called converged."""
    means, grad_W = study.problem_of(point())
    exact = nearest(means, method="svd")
    gradient = pullback(exact, grad_W)
    assert study.worth(exact, gradient, exact, gradient, "float64")["converged"]
    turned = exact.U - 2 * (exact.U @ exact.V[:, :1]) @ exact.V[:, :1].T
    beside = np.linalg.qr(exact.U + 1e-4 * np.random.default_rng(0).normal(size=exact.U.shape))[0]
    for U, where in ((turned, "least_curvature"), (beside * np.sign(np.sum(beside * exact.U, axis=0)), "gradient_norm")):
        found = study.worth(dataclasses.replace(exact, U=U), gradient, exact, gradient, "float64")
        assert not found["converged"]
        assert abs(found[where]) > 1e-6
    loose = dataclasses.replace(exact, orthogonality=np.float64(1e-10))
    assert not study.worth(loose, gradient, exact, gradient, "float64")["converged"]
    assert study.worth(exact, 1.5 * gradient, exact, gradient, "float64")["gradient_difference"] == pytest.approx(0.5)


def test_single_precision_loses_the_gradient_of_ill_conditioned_means_and_says_so() -> None:
    """Beyond a condition of 1/(m eps) the pullback drops directions; the frame is stationary all the same."""
    (single,), (double,) = (study.etf_cost([point(K=12, input="ill-conditioned", dtype=t)], [0]) for t in ("float32", "float64"))
    assert single["converged"]
    assert double["converged"]
    assert single["gradient_difference"] > figure.OFF > 1e6 * double["gradient_difference"]


def test_a_peak_is_of_the_call_alone() -> None:
    held = np.ones(10**6)
    assert study.peak(lambda: np.ones(10**6))[0] == pytest.approx(8e6, rel=0.01)
    assert study.peak(lambda: float((held + 1).sum()))[0] == pytest.approx(8e6, rel=0.01), "what is freed again counts"
    assert study.peak(lambda: held.sum())[0] < 1e5


def test_calls_take_turns_until_their_budget_is_spent() -> None:
    heard: list[str] = []
    calls = {name: lambda name=name: heard.append(name) or np.ones(10**5).sum() for name in "abc"}
    assert {name: len(seconds) for name, seconds in study.in_turns(calls, 0.0).items()} == {"a": 1, "b": 1, "c": 1}
    assert "".join(name for name, _ in groupby(heard)) == "abc"
    heard.clear()
    assert {len(seconds) for seconds in study.in_turns(calls, 1e6).values()} == {study.MOST_TURNS}
    assert "".join(name for name, _ in groupby(heard)) == "abc" * study.MOST_TURNS
    assert len(heard) > 3 * study.MOST_TURNS, "a turn of a short call is many calls"


def test_what_the_layer_would_need() -> None:
    """The figures of the specification: 4.3 GB and 8 TFLOP at (512, 100), 69 GB and 5e14 flops at (1024, 200), in single."""
    assert etf_node.layer_bytes(512, 100, 4) == pytest.approx(4.3e9, rel=0.01)
    assert etf_node.layer_bytes(1024, 200, 4) == pytest.approx(69e9, rel=0.01)
    assert etf_node.layer_flops(512, 100) == pytest.approx(8e12, rel=0.05)
    assert etf_node.layer_flops(1024, 200) == pytest.approx(5e14, rel=0.05)


def test_the_full_study_asks_what_it_should() -> None:
    """K = 10 to 1000, three widths, every input and dtype; the speed targets' sizes; the node to K = 50; one block a problem."""
    points = study.points(study.Options())
    keys = [tuple(p[name] for name in ("d", "K", "input", "dtype", "method")) for p in points]
    assert len(set(keys)) == len(keys)
    closed = [p for p in points if p["method"] == "closed form"]
    assert {(p["dtype"], p["input"]) for p in closed} == {(t, i) for t in ("float64", "float32") for i in study.INPUTS}
    assert {p["d"] for p in closed} == {512, 1024, 2048}
    assert (min(p["K"] for p in closed), max(p["K"] for p in closed)) == (10, 1000)
    assert all(p["d"] >= p["K"] - 1 for p in points)
    for d, K in ((512, 10), (512, 100)):
        asked = {(p["input"], p["method"]) for p in points if (p["d"], p["K"], p["dtype"]) == (d, K, "float64")}
        assert {(name, method) for name in study.INPUTS for method in ("closed form", *study.NAMED, "trust regions")} <= asked
    assert {p["dtype"] for p in points if p["method"] in ("trust regions", "declarative node")} == {"float64"}
    assert max(p["K"] for p in points if p["method"] == "declarative node") == 50
    assert len({tuple(p[name] for name in study.SAME) for p in points}) == len(closed)


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.etf_cost.problem_of": None, "figures.etf_cost.draw": studied.no_figure}
    assert studied.again("etf_cost", out, monkeypatch, broken) == studied.told(done)


def test_figures_show_the_rows(table: sweep.Table) -> None:
    """Least ratios with a band to the medians, the larger peak, the unit at 1; the formula goes on from the last point as K^5."""
    (routes, *_), (by_width, *_), memory = figure.make(table).panels
    assert routes is not None
    rows = table.where(d=512, input="random", dtype="float64", method="trust regions")
    drawn = next(c for c in routes.curves if c.label.startswith("trust"))
    assert np.array_equal(drawn.y, rows["ratio"])
    band = np.sort([rows["ratio"], rows["ratio_median"]], axis=0)
    assert np.array_equal([drawn.low, drawn.high], band)
    assert next(c for c in routes.curves if c.label == "one SVD").y.tolist() == [1.0]
    assert by_width is not None
    assert {c.label for c in by_width.curves} == {"one SVD"} | {f"$d={d}$, {t}" for d in (64, 512) for t in ("float32", "float64")}
    assert memory[0] is not None
    assert memory[2] is None
    peaks = {c.label: c.y for c in memory[0].curves}
    for method in ("closed form", "trust regions", "declarative node"):
        own = table.where(d=64, input="random", dtype="float64", method=method)
        assert np.array_equal(peaks[figure.LOOKS[method][0]], np.maximum(own["forward_peak"], own["backward_peak"]))


def test_the_node_goes_on_by_its_flops(table: sweep.Table) -> None:
    """With K = 10 left out of the node's rows its line starts at K = 5 and has the rate measured there."""
    rows = table.where(d=64, input="random", dtype="float64")
    rows = rows.pick((rows["method"] != "declarative node") | (rows["K"] == 5))
    (line,) = figure._onwards(rows)
    ours, node = figure._sorted(rows.where(method="closed form")), rows.where(method="declarative node")
    assert line.x.tolist() == [5, 10]
    expected = (ours["forward"] + node["backward"][0] * (ours["K"] / 5) ** 5) / ours["svd_seconds"]
    assert line.y == pytest.approx(expected)


def test_what_is_not_trusted_is_hollow(table: sweep.Table) -> None:
    for change in ({"converged": False}, {"gradient_difference": 0.5}):
        lost = sweep.Table(table.points, [row | change for row in table.results], table.errors, "x")
        assert not any(c.trusted.any() for row in figure.make(lost).panels for panel in row if panel for c in panel.curves if c.marker)
