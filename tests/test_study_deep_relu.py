"""The study of deep ReLU chains from the command line: a small run, its rows against theory and plain loops, resuming, its figures."""

from __future__ import annotations

import csv
import shutil
import sqlite3
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import deep_relu as figure
from studies import deep_relu, relu_points
from ufm import plots, sweep
from ufm.arrays import to_numpy
from ufm.objective import objective
from ufm.theory import deep, deep_relu_ce
from ufm.theory import deep_relu as theory


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("studies") / "deep_relu"
    return studied.smoke("deep_relu", out), out


@pytest.fixture(scope="module")
def rows(smoke: Any) -> list[dict[str, Any]]:
    table = sweep.load(smoke[1])
    columns = {name: table.values(name) for name in table.names}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(table))]


def cells(out: Path) -> list[Any]:
    """All that is stored, the seconds each row took included."""
    with sqlite3.connect(out / "cells.sqlite") as store:
        return store.execute("select * from cells order by key").fetchall()


def test_a_small_run_leaves_its_files_and_a_summary(smoke: Any, rows: list[dict[str, Any]]) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    assert len(rows) == len(deep_relu.points(deep_relu.Options(smoke=True)))
    assert {row["panel"] for row in rows} == {"search", "width", "lambda", "cross-entropy"}
    files = [Path(line.removeprefix("file: ")) for line in done.stdout.splitlines() if line.startswith("file: ")]
    assert all(path.is_file() for path in files)
    names = {"deep_relu", "deep_relu_solutions", "deep_relu_descent"}
    assert {path.stem for path in files if path.suffix == ".html"} == names
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("MSE, L = 4, 0.1 of DNC's largest lambda"))
    assert "6 (0.9" in told
    with (out / "rows_search.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(row["panel"] == "search" for row in rows)


def test_levels_are_those_of_theory(rows: list[dict[str, Any]]) -> None:
    """DNC at lambda_eff, the explicit solutions, zero; the graph beats DNC at L = 4 and not at L = 3."""
    for row in rows:
        K, L = row["K"], row["depth"]
        lam = np.atleast_1d(row["lam"]) * row["n"] ** (1 / (L + 1))
        assert np.atleast_1d(row["lam_eff"]) == pytest.approx(lam, rel=1e-14)
        value = theory.squared_error if row["loss"] == "MSE" else deep_relu_ce.cross_entropy
        assert np.atleast_1d(row["dnc"]) == pytest.approx(value([theory.orthogonal(K, L)], lam).value, rel=1e-13)
        assert np.all(np.atleast_1d(row["linear"]) <= np.atleast_1d(row["dnc"]))
        if row["origin"] == "graph":
            assert np.all((row["explicit"] < row["dnc"]) == (L == 4))
        if row["origin"] in ("random", "deepened"):
            assert np.isnan(row["explicit"]).all()


def test_searches_end_no_higher_than_they_begin_and_say_what_they_are_worth(rows: list[dict[str, Any]]) -> None:
    for row in (row for row in rows if row["panel"] == "search"):
        assert np.allclose(row["ratios"], row["values"] / row["dnc"], rtol=1e-14)
        assert row["shares"][row["down"]] == 0.1
        assert np.all((row["kinks"] >= 0) & (row["kinks"] <= 1))
        assert np.all(row["spread"] >= 0)
        assert np.all(row["subgradients"] <= row["gradients"] * (1 + 1e-6))
        assert row["ranks"].shape == (len(row["shares"]), relu_points.LAYERS)
        assert np.isfinite(row["ranks"][0]).sum() == 2 * row["depth"]
        assert np.nanmax(row["ranks"]) <= row["K"]
        if row["origin"] not in ("random", "deepened"):
            assert row["values"][row["down"]] <= row["explicit"][row["down"]] * (1 + 1e-12)
        if row["origin"] == "graph" and row["depth"] == 4:
            assert np.all(row["values"] < row["dnc"])


def test_a_row_is_a_function_of_its_point_and_seed(rows: list[dict[str, Any]]) -> None:
    """The value stored is that of factors which the library's objective knows; computed again, the same bits."""
    row = next(row for row in rows if row["origin"] == "graph" and row["depth"] == 3 and row["loss"] == "CE")
    point = next(
        p
        for p in deep_relu.points(deep_relu.Options(smoke=True))
        if all(p[name] == row[name] for name in ("origin", "depth", "loss", "K", "panel"))
    )
    again = deep_relu.deep_relu_study([point], [sweep.seed_of(point)])[0]
    for name in ("values", "kinks", "spectra", "below", "gradients"):
        assert np.array_equal(again[name], row[name], equal_nan=True)


def test_start_factors_scatter_about_the_construction() -> None:
    """The first run has the closed-form value; the noise of the others is a twentieth of the largest entry, new for every seed."""
    for origin, K, loss in (("graph", 6, "MSE"), ("graph", 6, "CE"), ("pairs", 5, "CE"), ("code", 6, "CE")):
        point = dict(origin=origin, K=K, n=1, depth=4, loss=loss, width=2 * K, starts=400)
        lam = 0.1 * deep_relu.largest(point)
        first, second = (deep_relu.start_of(point, lam, seed) for seed in (0, 1))
        P = deep_relu.problem_of(point, lam)
        level = deep_relu.levels(point, np.array([lam]))["explicit"][0]
        assert objective(P).value([np.asarray(f)[:1] for f in first.factors])[0] == pytest.approx(level, rel=1e-13)  # type: ignore[union-attr]
        for f, g in zip(first.factors, second.factors, strict=True):  # type: ignore[union-attr]
            assert np.std(f[1:] - f[0]) == pytest.approx(0.05 * np.abs(f[0]).max(), rel=0.05)
            assert not np.array_equal(f, g)


def test_layers_and_kinks_by_loops() -> None:
    rng = np.random.default_rng(0)
    point = dict(K=3, n=2, depth=3, width=5, loss="MSE")
    factors = [rng.standard_normal(shape) for shape in ((5, 6), (5, 5), (5, 5), (3, 5))]
    factors[1][2] = 0.0  # a unit whose pre-activations are all zero
    layers, expected = relu_points.hidden(point, factors), [factors[0]]
    for W in factors[1:3]:
        pre = np.array([[sum(W[u, v] * expected[-1][v, c] for v in range(5)) for c in range(6)] for u in range(5)])
        expected += [pre, np.where(pre > 0, pre, 0.0)]
    assert len(layers) == 2 * 3 - 1
    for got, wanted in zip(layers, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-14)
    assert relu_points.kinks(point, factors) == pytest.approx(6 / 60)
    s = relu_points.spectra(point, factors)
    Z = factors[-1] @ expected[-1]
    means = np.stack([Z[:, [2 * c, 2 * c + 1]].mean(axis=1) for c in range(3)], axis=1)
    assert s[5, :3] == pytest.approx(np.linalg.svd(means, compute_uv=False), rel=1e-12)
    assert np.isnan(s[6:]).all()
    assert np.isnan(s[:, 3:]).all()
    assert relu_points.ranks(np.array([[1.0, 2e-3, 5e-4], [np.nan] * 3])).tolist()[0] == 2
    A, labels = expected[-1], np.repeat(np.arange(3), 2)
    mu = np.stack([A[:, labels == c].mean(axis=1) for c in range(3)])
    inner = sum(((A[:, i] - mu[labels[i]]) ** 2).sum() for i in range(6)) / 6
    between = sum(((m - mu.mean(axis=0)) ** 2).sum() for m in mu) / 3
    assert relu_points.within(point, factors) == pytest.approx(inner / between, rel=1e-12)


def test_subgradient_is_the_gradient_where_smooth_and_small_at_a_minimum_on_a_kink() -> None:
    """Random factors: 200 nearby gradients hardly differ. The orthogonal frame is at kinks off the diagonal."""
    rng = np.random.default_rng(0)
    point = dict(K=3, n=1, depth=2, width=3, loss="MSE", origin="random")
    P = deep_relu.problem_of(point, 0.01)
    smooth = [rng.uniform(0.5, 1.5, shape) for shape in ((3, 3), (3, 3), (3, 3))]
    (_, a), (_, b) = (part([x[None] for x in smooth]) for part in (objective(P).loss_part, objective(P).penalty_part))
    size = max(np.sqrt(sum((x * x).sum() for x in part)) for part in (a, b))
    exact = np.sqrt(sum(((x + y) ** 2).sum() for x, y in zip(a, b, strict=True))) / size
    assert relu_points.subgradient(P, smooth, 0) == pytest.approx(exact, rel=1e-2)
    block = theory.orthogonal(3, 2)
    scales = theory.squared_error([block], 0.01).scales
    kink = list(theory.factors([block], scales, 1, 0.01, [0.01] * 2, 3))
    assert relu_points.kinks(point, kink) == pytest.approx(2 / 3)
    assert relu_points.subgradient(P, kink, 0) < 1e-3
    assert relu_points.subgradient(P, [1.1 * x for x in kink], 0) > 0.05


def test_descent_rows(rows: list[dict[str, Any]]) -> None:
    """Paths fall, L-BFGS ends below them, shares are shares of the ratios."""
    for row in (row for row in rows if row["panel"] != "search"):
        assert row["paths"].shape == (row["starts"], len(row["step_numbers"]))
        assert np.all(row["end_values"] <= row["paths"][:, -1] * (1 + 1e-12))
        assert row["end_ratios"] == pytest.approx(row["end_values"] / row["dnc"], rel=1e-14)
        assert row["below"] == np.mean(row["end_ratios"] < 1 - deep_relu.SAME_VALUE)
        assert row["below_low"] <= row["below"] <= row["below_high"]
        assert np.all(row["end_dnc1"] >= 0)


def test_descent_begins_where_it_says() -> None:
    """The first record of a path is the value of a normal start with the row's own seed."""
    point = next(p for p in deep_relu.points(deep_relu.Options(smoke=True)) if p["panel"] == "cross-entropy")
    row = deep_relu.descent(point | {"steps": 8}, 5)
    P = deep_relu.problem_of(point, point["lam"])
    path = ufm.simulate(P, ufm.rules.GradientDescent(0.5), runs=point["starts"], seed=5, steps=1, start=ufm.starts.normal(1.0))
    assert row["paths"][:, 0] == pytest.approx(path.value[:, 0], rel=1e-13)
    assert row["lam_eff"] == pytest.approx(float(deep.lambda_eff(5, point["lam"], [point["lam"]] * 3)), rel=1e-14)
    assert to_numpy(path.logits).shape == (point["starts"], 10, 50)


def test_another_run_computes_nothing_again(
    smoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command in this process, where computing or drawing anything would fail."""
    done, first = smoke
    out = Path(shutil.copytree(first, tmp_path / "again"))
    for name in ("search", "descent"):
        monkeypatch.setattr(deep_relu, name, None)
    monkeypatch.setattr(figure, "draw", lambda folder, to: [])
    before = cells(out)
    assert deep_relu.main(deep_relu.Options(smoke=True, executor="serial", out=out)) == 0
    said = capsys.readouterr().out
    summary = [line for line in done.stdout.splitlines() if not line.startswith("file: ")]
    assert [line for line in said.splitlines() if not line.startswith("file: ")] == summary
    assert cells(out) == before


def test_figures_show_the_rows(smoke: Any) -> None:
    table = sweep.load(smoke[1])
    (maps, curves) = figure.found(table).panels
    for panel, loss in zip(maps, ("MSE", "CE"), strict=True):
        assert isinstance(panel, plots.Matrix)
        assert panel.names[0] == (("3", "6") if loss == "MSE" else ("3", "4", "6"))
        own = figure.rows_of(table, panel="search", loss=loss, K=6, depth=4)
        assert panel.values[panel.names[1].index("4"), panel.names[0].index("6")] == pytest.approx(
            100 * (min(r["ratios"][r["down"]] for r in own) - 1)
        )
        assert "graph solution" in panel.hover[panel.names[1].index("4"), -1]
    for panel in curves:
        for curve in panel.curves:
            assert np.array_equal(curve.trusted, curve.y < 1 - 1e-9)  # none of these is at zero
    (explicit, code), spectra = figure.solutions(table).panels
    assert [c.label for c in explicit.curves] == ["$L=3$, explicit", "$L=3$, polished", "$L=4$, explicit", "$L=4$, polished"]
    assert [c.label for c in code.curves][::2] == ["$L=2$, explicit", "$L=3$, explicit", "$L=4$, explicit"]
    assert [m.values.shape for m in spectra] == [(8, 6), (6, 6)]
    (shares, paths, _), _ = figure.descents(table).panels
    assert len([c for c in paths.curves if c.colour == figure.OKABE["sky"]]) == 2
    assert {c.label for c in shares.curves} == {"ends below DNC", "ends at DNC"}


def test_a_deeper_chain_is_the_same_map_with_equal_norms() -> None:
    rng = np.random.default_rng(1)
    factors = [rng.standard_normal(shape) for shape in ((2, 8, 4), (2, 8, 8), (2, 8, 8), (2, 4, 8))]
    longer = deep_relu.deeper(factors)

    def logits(chain: list[Any]) -> Any:
        X = chain[0]
        for W in chain[1:-1]:
            X = np.maximum(W @ X, 0.0)
        return chain[-1] @ X

    assert len(longer) == 5
    assert logits(longer) == pytest.approx(logits(factors), rel=1e-9)
    norms = np.linalg.norm([np.linalg.norm(f, axis=(1, 2)) for f in longer], axis=0) / np.sqrt(5)
    assert [np.linalg.norm(f, axis=(1, 2)) for f in longer] == [pytest.approx(norms, rel=1e-12)] * 5


def test_a_grown_start_ends_below_collapse_where_random_starts_die() -> None:
    wanted = {"origin": "deepened", "K": 4, "depth": 6, "loss": "MSE"}
    point = next(p for p in deep_relu.points(deep_relu.Options()) if wanted.items() <= p.items())
    row = deep_relu.search(point | {"random_starts": 16, "down": 0, "up": 0, "steps": 600}, 0)
    assert row["ratios"][0] < 0.95
    assert row["below"] > 0
