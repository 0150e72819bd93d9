"""The study of guided runs: rows are those of a plain simulation, limits are kept, starts are shared, pymanopt agrees, marks are drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import guided_etf as figure
from studies import guided_etf
from ufm import sweep

SMOKE = guided_etf.Options(smoke=True)
FULL = guided_etf.Options(whole=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("guided")
    return studied.smoke("guided_etf", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return sweep.load(smoke[1])


def point(head: str = "nearest", gradient: bool | None = True, **other: Any) -> dict[str, Any]:
    """A smoke point of this head."""
    found = next(p for p in guided_etf.points(SMOKE) if (p["head"], p["gradient"], p["run"]) == (head, gradient, 0))
    return found | other


def row(**other: Any) -> dict[str, Any]:
    return guided_etf.guided_etf([point(**other)], [0])[0]


def slow_margins(z: Any, W: Any, labels: Any) -> list[float]:
    """Cosine margins by loops over samples and classes."""
    z, W = z - z.mean(axis=1, keepdims=True), W - W.mean(axis=0)
    margins = []
    for h, y in zip(z.T, labels, strict=True):
        cosines = [float(h @ w) / float(np.linalg.norm(h) * np.linalg.norm(w)) for w in W]
        margins.append(cosines[y] - max(c for j, c in enumerate(cosines) if j != y))
    return margins


def test_a_small_run_says_what_it_found_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (said["runs"], said["diverged"]) == (str(len(table)), "0")
    assert said["UFM-4, standard"].startswith("0 of 2 runs within 1e-06 of the floor and 1e-04 of the margin limit after 40 iterations")
    assert all((out / f"guided_etf_4{kind}").is_file() for kind in (".png", ".pdf", ".html"))
    assert (out / "rows_UFM-4.csv").is_file()


@pytest.mark.parametrize(("head", "gradient"), guided_etf.HEADS)
def test_a_row_is_a_plain_simulation(head: str, gradient: bool | None) -> None:
    """Values at every record, and margins at the end by loops, of one run of `simulate` from the same start."""
    asked = point(head, gradient, steps=64)
    problem = guided_etf.problem_of(asked)
    run = ufm.simulate(problem, ufm.rules.AGD(10.0), steps=64, every=1, start=ufm.starts.given(guided_etf.start_of(asked)))
    got = guided_etf.guided_etf([asked], [0])[0]
    assert got["iteration"].tolist() == sorted({*range(8), *range(0, 64, 6), 8, 64})
    floor = np.log1p(3 * np.exp(-5 * 4 / 3))
    assert np.allclose(got["excess"] + floor, run.value[0][got["iteration"].astype(int)], rtol=1e-13, atol=0)
    assert np.allclose(got["gradient_norm"], run.gradient_norm[0][got["iteration"].astype(int)], rtol=1e-9, atol=0)
    margins = slow_margins(run.factors[0][0], run.factors[1][0], problem.labels[0])
    assert np.allclose(got["margins"], np.sort(margins), rtol=1e-12, atol=0)
    assert 4 / 3 - got["end_margin_gap"] == pytest.approx(np.mean(margins), rel=1e-12)
    assert got["limit"] == 4 / 3
    assert got["end_excess"] == got["excess"][-1] > 0
    assert (got["taken"], got["stop"], got["finite"]) == (64, "STEPS", True)


def test_no_run_passes_the_limits(table: sweep.Table) -> None:
    assert np.all(table["excess"] >= -1e-15)
    assert np.all(table["limit"][:, None] - table["margins"] <= 2)
    assert np.all(table["margin_gap"] >= -1e-15)
    assert np.all((table["nc1"] >= 0) & (table["equinorm"] >= 0) & (table["nc3"] >= 0))


def test_guided_runs_reach_collapse_by_either_solver_and_start_ahead_of_a_fixed_etf() -> None:
    """Radius 2, 80 iterations: within 1e-6 of the floor and 1e-4 of the margin, first at the same iterations."""
    small = {"radius": 2.0, "steps": 80}
    for gradient in (True, False):
        closed, theirs = (row(gradient=gradient, solver=solver, **small) for solver in ("closed", "pymanopt"))
        assert closed["at_collapse"]
        assert theirs["at_collapse"]
        assert (closed["floor_at"], closed["margin_at"]) == (theirs["floor_at"], theirs["margin_at"])
        assert np.allclose(closed["excess"], theirs["excess"], rtol=0, atol=1e-9)
        assert np.allclose(closed["nc3"], theirs["nc3"], rtol=0, atol=1e-9)
        gaps = dict(zip(closed["iteration"].tolist(), closed["margin_gap"].tolist(), strict=True))
        assert all((gap <= 1e-4) == (at >= closed["margin_at"]) for at, gap in gaps.items())
    off = guided_etf.head_of(point(gradient=False, solver="pymanopt"))
    assert (off.gradient, off.solver) == (False, "stiefel")  # type: ignore[union-attr]
    first = [row(head=head, gradient=gradient, **small | {"steps": 8})["end_excess"] for head, gradient in guided_etf.HEADS[1:3]]
    assert first[1] < first[0]


def test_all_heads_start_at_the_same_features() -> None:
    """Neither head, gradient, solver nor number of steps enters the draw; size, run and seed do."""
    first = guided_etf.start_of(point())[0]
    for other in ({"head": "standard"}, {"head": "fixed"}, {"gradient": False}, {"solver": "pymanopt"}, {"steps": 7}):
        assert np.array_equal(first, guided_etf.start_of(point() | other)[0])
    for other in ({"run": 1}, {"seed": 1}):
        assert not np.array_equal(first, guided_etf.start_of(point(**other))[0])
    gram = first[0] @ first[0].T
    assert np.allclose(gram, 12 / 8 * np.eye(8), atol=1e-13)


def test_a_run_that_diverges_is_marked_and_drawn_so(table: sweep.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    real = guided_etf.iterate

    def breaking(*given: Any, **options: Any) -> Any:
        for snapshot in real(*given, **options):
            lost = snapshot.step >= 20
            yield dataclasses.replace(snapshot, value=np.array([np.nan]), stop=(ufm.Stop.DIVERGED,)) if lost else snapshot
            if lost:
                return

    monkeypatch.setattr(guided_etf, "iterate", breaking)
    got = row()
    assert (got["stop"], got["taken"], got["finite"], got["at_collapse"]) == ("DIVERGED", 20, False, False)
    assert np.array_equal(np.isfinite(got["excess"]), got["iteration"] < 20)
    rows = [got if p == point() else old for p, old in zip(table.points, table.results, strict=True)]
    broken = sweep.Table(table.points, rows, table.errors, "x")
    drawing = figure.make(broken)
    (excess, _, margins), _ = drawing.panels
    (guided,) = (c for c in excess.curves if c.label.startswith("nearest ETF ("))
    assert guided.label == "nearest ETF (1 of 2 diverged)"
    assert guided.x.max() < 20
    (end,) = (c for c in margins.curves if c.label == guided.label)
    assert np.array_equal(end.low, end.high)
    assert "Diverged: 1 of all runs" in drawing.caption
    assert guided_etf.summary(broken)["diverged"] == 1


def test_the_full_study_asks_what_it_should() -> None:
    points = guided_etf.points(FULL)
    sizes = {p["model"]: (p["K"], p["width"], p["n"]) for p in points}
    assert sizes == {"UFM-10": (10, 512, 100), "UFM-100": (100, 1024, 50), "UFM-200": (200, 1024, 25), "UFM-1000": (1000, 1024, 5)}
    assert {(p["steps"], p["gain"], p["radius"]) for p in points} == {(2000, 10.0, 5.0)}
    assert len(points) == 4 * 4 * 5
    short = [p for p in guided_etf.points(guided_etf.Options()) if p["model"] == "UFM-1000"]
    assert {(p["steps"], p["run"]) for p in short} == {(200, 0)}
    assert len(short) == 4
    few = guided_etf.points(guided_etf.Options(models=("UFM-10",), solver="pymanopt", runs=1))
    assert [(p["head"], p["solver"]) for p in few] == [
        ("standard", None),
        ("fixed", None),
        ("nearest", "pymanopt"),
        ("nearest", "pymanopt"),
    ]


@pytest.mark.parametrize("wrong", [{"smoke": True, "models": ("UFM-10",)}, {"runs": 0}])
def test_options_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--models|--runs"):
        guided_etf.Options(**wrong)


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.guided_etf._row": None, "figures.guided_etf.draw": studied.no_figure}
    assert studied.again("guided_etf", out, monkeypatch, broken) == studied.told(done)


def test_figures_show_the_rows(table: sweep.Table) -> None:
    """Medians and ranges over the seeds, the start left out; every measure; sorted margins as distances to the limit."""
    drawing = figure.make(table)
    panels = [panel for line in drawing.panels for panel in line if panel is not None]
    assert [len(line) for line in drawing.panels] == [3, 3]
    own = table.where(head="nearest", gradient=True)
    for name, panel in zip(("excess", "margin_gap", None, "nc1", "nc3", "equinorm"), panels, strict=True):
        curve = panel.curves[2]  # type: ignore[union-attr]
        values = own[name][:, own["iteration"][0] > 0] if name else 4 / 3 - own["margins"]
        assert np.array_equal([curve.low, curve.y, curve.high], [values.min(axis=0), np.median(values, axis=0), values.max(axis=0)])
        assert curve.label == "nearest ETF"
    assert [panel.labels[0] for panel in panels] == [
        *["iteration (run to 40 of 2000)"] * 2,
        "share of samples, sorted",
        *[panels[0].labels[0]] * 3,
    ]
    assert "Shorter than the whole comparison" in drawing.caption
    assert "No run diverged" in drawing.caption
    assert [figure.file_of(K) for K in (10, 1000)] == ["guided_etf", "guided_etf_1000"]
    whole = sweep.Table(
        [p | {"K": 10, "steps": 2000, "run": i} for i in range(5) for p in table.points[:1]], table.results[:1] * 5, [None] * 5, "x"
    )
    drawn = figure.make(whole)
    assert drawn.panels[0][0].curves[0].label in {look[0] for look in figure.LOOKS.values()}  # type: ignore[union-attr]
    assert "could not be read" not in drawn.caption
    assert "whole comparison" not in drawn.caption
    assert drawn.panels[0][0].labels[0] == "iteration"  # type: ignore[union-attr]
    hundred = sweep.Table([p | {"K": 100} for p in table.points[:-1]], table.results[:-1], table.errors[:-1], "x")
    other = figure.make(hundred)
    assert "could not be read" in other.caption
    labels = [curve.label for curve in other.panels[0][0].curves]  # type: ignore[union-attr]
    assert sum("(1 of 2 seeds)" in label for label in labels) == 1
