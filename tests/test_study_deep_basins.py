"""The study of basins: ends are certified minima on closed-form levels, shares add up, starts are shared, nothing is computed twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import deep_basins as figure
from figures import deep_basins_map, deep_basins_ranks
from studies import deep_basins
from ufm import sweep
from ufm.metrics import singular_values
from ufm.theory import deep, deep_points

SMOKE = deep_basins.Options(smoke=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("basins")
    return studied.smoke("deep_basins", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return sweep.load(smoke[1])


def small(**other: Any) -> dict[str, Any]:
    """A point of the flow at a small size."""
    point = next(p for p in deep_basins.points(SMOKE) if p["method"] == "flow" and p["columns"] == "means")
    return point | {"K": 6, "n": 3, "depth": 2, "width": 12, "lam": 2.0**-8, "scale": 1.0, "seeds": 6} | other


def test_a_small_run_says_what_it_found_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["points"] == str(len(table))
    assert int(said["runs"]) == table["seeds"].sum() == int(said["certified local minima"]) + int(said["unconverged"])
    names = ("deep_basins", "deep_basins_ranks", "deep_basins_map")
    assert all((out / f"{name}{kind}").is_file() for name in names for kind in (".png", ".pdf", ".html"))


def test_shares_ranks_and_intervals_belong_together(table: sweep.Table) -> None:
    certified = np.round(table["converged"] * table["seeds"])
    assert np.array_equal(table["ranks"].sum(axis=1), certified)
    assert np.all((table["dnc_low"] <= table["dnc"]) & (table["dnc"] <= table["dnc_high"]) & (table["dnc"] <= table["converged"]))
    assert np.all(table["evaluations"] > 0)
    some = certified > 0
    mean = (table["ranks"] @ np.arange(table["ranks"].shape[1]))[some] / certified[some]
    assert np.allclose(mean, table["mean_rank"][some], rtol=1e-14)


def test_ends_are_minima_on_the_levels_their_names_say() -> None:
    row = deep_basins.deep_basins([small()], [0])[0]
    assert row["converged"] == 1.0
    assert row["excess"] <= 1e-9
    lam = float(deep.lambda_eff(3, 2.0**-8, [2.0**-8] * 2))
    levels = [float(deep_points.levels(code, lam, 2).value) for code in deep_points.candidates(6)]
    for value, name in zip(row["value_of_seed"], row["name_of_seed"], strict=True):
        if name.startswith("blocks "):
            sizes = [int(size) for size in name.removeprefix("blocks ").split("+")]
            assert value == pytest.approx(float(deep_points.levels(deep_points.blocks(sizes), lam, 2).value), rel=1e-9)
        else:
            assert "other" in name or min(abs(value / level - 1) for level in levels if np.isfinite(level)) <= 1e-9
    assert row["lam_eff"] == pytest.approx(lam, rel=1e-14)


def test_a_run_that_has_not_ended_is_unconverged_and_no_end_point() -> None:
    row = deep_basins.deep_basins([small(steps=50)], [0])[0]
    assert (row["converged"], row["dnc"], row["mean_rank"]) == (0.0, 0.0, None)
    assert set(row["name_of_seed"]) == {"unconverged"}
    assert row["ranks"].sum() == 0


def test_all_methods_lambdas_and_columns_start_at_the_same_place() -> None:
    """Class means are the means of the samples' start, and neither method nor lambda enters the draw; width, scale and seed do."""
    samples = deep_basins.start_of(small(columns="samples")).factors
    means = deep_basins.start_of(small()).factors
    assert np.allclose(means[0], samples[0].reshape(6, 12, 6, 3).mean(axis=-1), rtol=0, atol=1e-15)
    for other in ({"method": "lbfgs"}, {"lam": 0.1}, {"panel": "map"}, {"steps": 7}):
        assert all(np.array_equal(a, b) for a, b in zip(means, deep_basins.start_of(small(**other)).factors, strict=True))
    assert not np.array_equal(means[0], deep_basins.start_of(small(seed=1)).factors[0])


def test_samples_collapse_within_classes() -> None:
    """At the end every sample lies on its class mean, and the level is that of class means."""
    row = deep_basins.deep_basins([small(columns="samples")], [0])[0]
    assert row["converged"] == 1.0
    assert row["within_class"] <= 1e-7
    assert row["excess"] <= 1e-9


@pytest.mark.parametrize("method", list(deep_basins.METHODS))
def test_every_method_ends_at_certified_minima(method: str) -> None:
    """Ranks are those of the logits of an own run of that method from the same start."""
    point = small(K=4, width=8, lam=2.0**-6, method=method, steps=40_000)
    row = deep_basins.deep_basins([point], [0])[0]
    assert row["converged"] == 1.0
    problem = deep_basins.problem_of(point, "means")
    reached = deep_basins.METHODS[method](problem, deep_basins.start_of(point), point)
    s = singular_values(ufm.certify(problem, reached.factors) and ufm.objective.objective(problem, 6).logits(reached.factors))
    assert np.array_equal((s > 1e-3 * s[:, :1]).sum(axis=1), row["rank_of_seed"])
    assert np.array_equal(row["evaluations_of_seed"], reached.evaluations)


def test_the_full_study_asks_what_it_should() -> None:
    """A hundred seeds a point of a cut, three scales, d = 10..200, lambda = 2^-6..2^-12, 200 seeds for the optimisers."""
    points = deep_basins.points(deep_basins.Options())
    width, lam = ([p for p in points if p["panel"] == name] for name in ("width", "lambda"))
    assert {p["seeds"] for p in width + lam} == {100}
    assert {p["scale"] for p in width} == {p["scale"] for p in lam} == set(deep_basins.SCALES)
    assert (min(p["width"] for p in width), max(p["width"] for p in width)) == (10, 200)
    assert (min(p["lam"] for p in lam), max(p["lam"] for p in lam)) == (2.0**-12, 2.0**-6)
    assert {p["method"] for p in width + lam} == {"flow"}
    assert {p["seeds"] for p in points if p["panel"] == "method"} == {200}


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    monkeypatch.setattr(deep_basins, "_row", None)
    monkeypatch.setattr(figure, "draw_all", lambda folder, to: [])
    assert deep_basins.main(dataclasses.replace(SMOKE, out=out, executor="serial")) == done.returncode == 0
    assert len(sweep.load(out)) == len(deep_basins.points(SMOKE))


def test_figures_show_the_rows(table: sweep.Table) -> None:
    """Shares and intervals as stored; every bar holds all runs; legends name the ranks in order; maps hatch what is not certified."""
    (shares, _), _ = figure.make(table).panels
    rows = table.where(panel="width")
    for curve, scale in zip(shares.curves, deep_basins.SCALES, strict=True):
        own = rows.where(scale=scale)
        own = own.pick(np.argsort(own["width"]))
        assert np.array_equal([curve.y, curve.low, curve.high], [own[name] for name in ("dnc", "dnc_low", "dnc_high")])
        assert np.array_equal(curve.trusted, own["converged"] >= 0.95)
    drawing = deep_basins_ranks.make(table)
    for bars in (panel for row in drawing.panels for panel in row if panel is not None):
        assert np.array_equal(bars.totals, np.full(len(bars.x), 2))
        assert list(bars.names) == sorted(bars.names, key=lambda name: int(name.split()[-1]) if name != "zero" else 0)
    *maps, ends = deep_basins_map.make(table).panels[0]
    assert [panel.title for panel in maps] == ["$L=2$"]
    assert ends.x == ("flow", "flow, samples", "descent", "handed over", "momentum", "L-BFGS")
    assert "momentum on means" in "".join(deep_basins.agreements(table))


def test_runs_that_did_not_end_are_hollow_and_hatched(table: sweep.Table) -> None:
    lost = sweep.Table(table.points, [row | {"converged": 0.5, "ranks": row["ranks"] // 2} for row in table.results], table.errors, "x")
    (shares, _), _ = figure.make(lost).panels
    assert not any(curve.trusted.any() for curve in shares.curves)
    *maps, ends = deep_basins_map.make(lost).panels[0]
    assert all(panel.hatched.all() for panel in maps)
    assert np.all(ends.unsettled > 0)
