"""The atlas of optima: crossovers and ends against closed forms, neighbours' winners carried over, maps that mark what is not confirmed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

import studied
from figures import deep_optimum_crossovers, deep_optimum_limit, stored
from figures import optima as figure
from studies import deep_optimum as study
from ufm import sweep
from ufm.theory import deep, deep_points


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("optimum")
    return studied.smoke("deep_optimum", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "deep_optimum", figure.COLUMNS)


def test_a_small_run_is_sound_and_draws(smoke: Any) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["genuine minima"] == "20 of 20"
    assert float(said["largest scale-free gradient of a best"]) < 1e-12
    assert int(said["crossovers with a closed form"]) >= 2
    assert float(said["their largest relative distance to it"]) < 1e-11
    for name in ("deep_optimum", "deep_optimum_crossovers", "deep_optimum_excess", "deep_optimum_limit"):
        assert all((out / f"{name}{kind}").is_file() for kind in (".png", ".pdf", ".html"))
    assert all((out / f"{name}.csv").is_file() for name in ("cells", "crossovers", "margins"))


def test_cells_meet_where_zero_takes_over() -> None:
    for cells in (5, 20):
        levels = study.levels(cells)
        assert levels[0] == 3e-6
        assert np.diff(np.log(levels)) == pytest.approx(np.full(cells - 1, np.log(levels[1] / levels[0])))
        assert levels[-1] * levels[-2] == pytest.approx(1)


def test_cells_against_the_closed_forms(table: sweep.Table) -> None:
    """Never above a catalogued level or zero; named cells have the level of that name; collapse at L = 1 up to 1/K."""
    cells = figure.flat(table)
    assert len(cells) == 20
    for K, L, lam, value, name, excess in zip(*(cells[n] for n in ("K", "depth", "lam", "value", "name", "dnc_excess")), strict=True):
        levels = [deep_points.levels(code, lam, int(L)).value for code in (*deep_points.candidates(int(K)), deep_points.zero(int(K)))]
        assert value <= np.nanmin(levels) * (1 + 1e-12)
        code = study.code_of(str(name), int(K))
        assert code is None or deep_points.levels(code, lam, int(L)).value == pytest.approx(value, rel=1e-9)
        dnc = levels[0] / value - 1
        assert excess == pytest.approx(dnc, abs=1e-12, nan_ok=True)
        if L == 1:
            assert name == ("DNC" if lam < 1 / K else "zero")


def test_the_known_crossover_is_in_the_rows(table: sweep.Table) -> None:
    """K = 4, L = 2: collapse gives way to pairs at 0.0117605."""
    own = figure.crossovers(table).where(K=4, depth=2)
    assert own["from_name"][0] == "DNC"
    assert own["to_name"][0] == "2 pairs"
    exact = deep.crossover(deep_points.dnc(4), deep_points.pairs(4), 2, 1e-3, 0.1)
    assert own["lam"][0] == pytest.approx(exact, rel=1e-12)
    assert exact == pytest.approx(0.011760, abs=1e-6)
    assert own["mismatch"].max() < 1e-12


def test_zero_takes_over_where_pair_and_zero_class_meets_it() -> None:
    """K = 3, L = 5: the last structure is one pair and a class at zero, whose value is log 3 at a root of its closed form."""
    code = deep_points.blocks([2, 1])
    top = deep_points.largest(code, 5) * (1 - 1e-9)
    exact = brentq(lambda lam: float(deep_points.levels(code, lam, 5).value) - np.log(3), 0.05, top, xtol=1e-15, rtol=1e-14)
    assert study.zero_level(study.Model(3, 5, 0)).lam == pytest.approx(exact, rel=1e-10)
    assert study.zero_level(study.Model(7, 1, 0)).lam == 1 / 7


def test_crossovers_form_a_chain_through_structures_between() -> None:
    """K = 5, L = 2, two distant cells: relaxed pairs to zero by way of what is lower in between, each handing over to the next."""
    model = study.Model(5, 2, 0)
    low, high = 0.03, 0.145
    ends = [model.best(model.search(lam, 4), 0, lam) for lam in (low, high)]
    changes = study.changed(model, ends)
    names = [study.named(model, pair) for pair in changes]
    assert names[0][0] == "relaxed pairs"
    assert names[-1][1] == "zero"
    assert len(changes) >= 3
    assert all(before[1] == after[0] for before, after in pairwise(names))
    lams = [b.lam for _, b in changes]
    assert low < lams[0]
    assert lams[-1] < high
    assert all(x < y for x, y in pairwise(lams))
    assert all(a.value == pytest.approx(b.value, rel=1e-12) for a, b in changes)


def test_one_branch_has_no_crossover() -> None:
    model = study.Model(6, 2, 0)
    ends = [model.end(lam, deep_points.at(deep_points.pairs(6), lam, 2).M, 3) for lam in (1e-3, 1e-2)]
    assert study.changed(model, ends) == []


@pytest.mark.parametrize("found", ["pcc", "ccp", "cpc"])
def test_a_neighbour_s_lower_winner_is_carried_over(found: str) -> None:
    """Cells that found collapse only (c) take the pairs (p) of a neighbour, near or far; no start of their own has reached these."""
    model, lams = study.Model(6, 2, 0), (1e-3, 3e-3, 1e-2)
    codes = [deep_points.pairs(6) if letter == "p" else deep_points.dnc(6) for letter in found]
    ends = [model.end(lam, deep_points.at(code, lam, 2).M, int(code.parts[0].rank[0]), 5) for lam, code in zip(lams, codes, strict=True)]
    assert [len(end.point.s) for end in ends] == [3 if letter == "p" else 5 for letter in found]
    after = study.carried(model, list(ends))
    assert [len(end.point.s) for end in after] == [3, 3, 3]
    assert [end.reached for end in after] == [5 if letter == "p" else 0 for letter in found]
    exact = deep_points.levels(deep_points.pairs(6), np.array(lams), 2).value
    assert [end.value for end in after] == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize(
    ("K", "depth", "lam", "name"),
    [
        (7, 2, 1e-3, "relaxed pairs"),
        (6, 3, 1e-3, "3 pairs"),
        (5, 2, 0.1, "5-gon"),
        (5, 2, 0.07, "blocks 2+3"),
        (7, 3, 1e-3, "other, rank 3"),
    ],
)
def test_winners_have_their_names(K: int, depth: int, lam: float, name: str) -> None:
    model = study.Model(K, depth, 0)
    end = model.best(model.search(lam, 4), 0, lam)
    assert study.named(model, [end]) == [name]
    assert (study.code_of(name, K) is None) == name.startswith("other")


def test_maps_hatch_what_is_not_confirmed(table: sweep.Table) -> None:
    grid = figure.grid_at(table, 2)
    assert figure.confirmed(grid).mean() >= 0.8
    grid["rank"][:], grid["reached"][:], grid["is_minimum"][:], grid["gradient_norm"][:] = 2, 3, 1, 1e-14
    grid["reached"][0, 0], grid["is_minimum"][0, 1], grid["is_minimum"][0, 2], grid["gradient_norm"][0, 3] = 1, 0, np.nan, 1e-6
    assert np.argwhere(~figure.confirmed(grid)).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    panel = figure.phases(table, 2)
    assert panel.dots is not None
    assert len(np.asarray(panel.dots.x)) == len(figure.crossovers(table).where(depth=2))
    shares = figure.excess(table, 2)
    at_best = figure.grid_at(table, 2)["name"] == "DNC"
    assert np.all(shares.values[at_best] < 1e-9)
    assert np.all(shares.values[~at_best & ~shares.idle] > 1e-4)


@pytest.mark.parametrize(
    ("name", "rank", "kind"),
    [
        ("zero", 0, "zero"),
        ("5 pairs", 5, "pairs"),
        ("relaxed pairs", 4, "pairs"),
        ("12-gon", 2, "polygon"),
        ("T(5)", 4, "T(r)"),
        ("blocks 1+2", 1, "other blocks"),
        ("other, rank 3", 3, "other, rank 3"),
        ("other, rank 9", 9, "other, rank 6 or more"),
    ],
)
def test_every_structure_has_a_colour(name: str, rank: int, kind: str) -> None:
    assert figure.KINDS[figure.code(name, rank)] == kind


def test_crossover_curves_are_the_rows(table: sweep.Table) -> None:
    changes = figure.crossovers(table).where(depth=2)
    panel = deep_optimum_crossovers.overtaken(changes, 2)
    drawn = {(curve.label.removeprefix("to "), x, y) for curve in panel.curves for x, y in zip(curve.x, curve.y, strict=True)}
    rows = zip(changes["to_name"], changes["to_rank"], changes["K"], changes["lam"], strict=True)
    assert drawn == {(figure.KINDS[figure.code(name, int(rank))], K, lam) for name, rank, K, lam in rows}


def test_the_limit_s_panels_are_the_rows(table: sweep.Table) -> None:
    margins = table.where(panel="margin")
    panel = deep_optimum_limit.constants(margins)
    for curve, L in zip(panel.curves, (1, 2), strict=True):
        own = margins.where(depth=L)
        order = np.argsort(own["K"])
        np.testing.assert_array_equal(curve.y, (own["R"] / (own["K"] - 1))[order])
        assert curve.y == pytest.approx(np.ones(2), rel=1e-12)
    map_ = deep_optimum_limit.structures(margins)
    assert {map_.names[code] for code in map_.codes.ravel()} == {"DNC"}
    assert map_.known.all()


def test_another_run_computes_nothing_again(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.deep_optimum.PANELS": {}, "figures.deep_optimum.draw_all": studied.no_figure}
    assert studied.again("deep_optimum", out, monkeypatch, broken) == studied.told(done)
