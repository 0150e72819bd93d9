"""The study of saddle passages: dips are found, Newton's method finds the critical point next to one, and names are the catalogue's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import saddle_passages as figure
from figures import stored
from studies import saddle_passages as study
from ufm import sweep
from ufm.landscape import newton
from ufm.theory import deep, deep_points


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("passages")
    return studied.smoke("saddle_passages", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "saddle_passages", figure.COLUMNS)


def problem(K: int = 10, lam: float = 2.0**-10, depth: int = 2) -> ufm.Problem:
    return study.problem_of({"K": K, "n": 5, "width": 2 * K, "depth": depth, "lam": lam})


def level(K: int = 10, lam: float = 2.0**-10, depth: int = 2) -> float:
    return float(deep.lambda_eff(5, lam, [lam] * depth))


def test_a_small_run_says_what_was_passed_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    runs = table.where(panel="run")
    assert said["runs"] == str(len(runs))
    assert int(said["settled at a minimum"]) == np.sum(runs["settled"]) > 0
    assert int(said["passages"]) == runs["passages"].sum()
    assert all((out / f"saddle_passages{kind}").is_file() for kind in (".png", ".pdf", ".html"))


def test_descent_ends_where_the_flow_of_its_start_does(table: sweep.Table) -> None:
    for path in range(len(paths := table.where(panel="path"))):
        run = table.where(panel="run", run=int(paths["run"][path]), scale=float(paths["scale"][path]))
        assert run["name"][0] == paths["name"][path]
        assert paths["value"][path] == pytest.approx(run["value"][0], rel=1e-6)
        assert paths["passages"][path] == run["passages"][0]
        assert np.nanmax(np.abs(paths["passed_value"][path] / run["passed_value"][0] - 1), initial=0.0) < 5e-3


def test_what_was_passed_is_critical_and_below_the_start(table: sweep.Table) -> None:
    runs = table.where(panel="run")
    known = np.isfinite(runs["saddle_index"])
    assert np.all(runs["saddle_gradient"][known] <= 1e-9)
    assert np.all(runs["saddle_moved"][known] <= newton.NEAR)
    assert np.all(np.isfinite(runs["at"]).sum(axis=1) == runs["passages"])
    assert np.all(runs["lingers"][np.isfinite(runs["at"])] > 0)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ([8, 4, 2, 1], []),
        ([8, 4, 2, 3, 2, 1], []),  # rises by less than a factor 2
        ([8, 1, 8, 4, 2, 1], [(1, 1, 2)]),
        ([8, 2, 1, 1.5, 4, 9, 3, 2, 5, 1], [(2, 1, 4), (7, 6, 8)]),
        ([1, 8, 4, 1], []),  # a start at a small gradient is no passage
        ([8, 5, 9, 5, 9], []),  # falls by less than a factor 2
    ],
)
def test_dips(gradient: list[float], expected: list[tuple[int, int, int]]) -> None:
    assert [(at, span.start, span.stop) for at, span in study.dips(np.array(gradient, dtype=float))] == expected


@pytest.mark.parametrize(("sizes", "depth"), [((10,), 2), ((2, 2, 2, 2, 2), 2), ((4, 2, 2, 2), 2), ((6, 4), 3)])
def test_newton_finds_the_critical_point_next_to_a_disturbed_one(sizes: tuple[int, ...], depth: int) -> None:
    exact = deep_points.at(deep_points.blocks(sizes), level(depth=depth), depth)
    U, s, Vt = np.linalg.svd(exact.M)
    rng, r = np.random.default_rng(0), exact.rank
    near = (U[:, :r] * s[:r] * (1 + 0.02 * rng.standard_normal(r))) @ Vt[:r]
    at = problem(depth=depth)
    found = newton.critical_near(at, near)
    assert found.value == pytest.approx(float(exact.value), rel=1e-10)
    assert found.moved == pytest.approx(np.linalg.norm(exact.M - near) / np.linalg.norm(near), rel=0.3)
    assert study.named(at, found)[0] == study.block_name(sizes)
    factors = deep.balanced_factors(exact.M, 5, at.lam_h[0], at.lam_w[0], at.width)
    assert found.index == ufm.hessian(at, [f[None] for f in factors], method="dense").index[0]


def test_a_point_far_from_every_critical_one_has_none() -> None:
    exact = deep_points.at(deep_points.dnc(10), level(), 2)
    found = newton.critical_near(problem(), 0.3 * exact.M)
    assert np.isnan(found.index)
    assert study.named(problem(), found)[0] == "none"


def test_a_critical_point_off_every_level_is_only_near_one() -> None:
    value = next(value for name, rank, value in study.catalogue(10, level(), 2) if name == "8+2")
    point = newton.Critical(value * (1 + 3e-4), 8, 2.0, 1e-12, 0.1, np.eye(10))
    name, difference = study.named(problem(), point)
    assert name == "near 8+2"
    assert difference == pytest.approx(3e-4, rel=1e-6)
    assert study.named(problem(), replace(point, value=value))[0] == "8+2"
    assert study.named(problem(), replace(point, value=value, rank=5))[0] == "near pairs", "levels of its own rank only"


def test_the_catalogue_holds_every_partition_at_its_value() -> None:
    assert len(list(study.partitions(10))) == 42
    assert {sum(sizes) for sizes in study.partitions(7)} == {7}
    found = study.catalogue(6, 0.02, 2)
    assert {"DNC", "pairs", "4+2", "3+3", "6-gon", "T(4)"} <= {name for name, _, _ in found}
    M = deep_points.at(deep_points.blocks([4, 2]), 0.02, 2).M
    assert next((rank, value) for name, rank, value in found if name == "4+2") == (
        4,
        pytest.approx(float(deep.value(M, 0.02, 2)), rel=1e-12),
    )


def test_classes_are_sorted_into_their_blocks() -> None:
    order = np.random.default_rng(3).permutation(7)
    M = deep_points.at(deep_points.blocks([4, 2, 1]), 0.01, 2).M[np.ix_(order, order)]
    blocks = figure.components(M < -1e-6)
    assert [len(block) for block in blocks] == [4, 2, 1]
    panel = figure.heat(M, "t", 5.0, "")
    for block in np.split(np.arange(7), [4, 6]):
        assert np.all(np.abs(panel.values[np.ix_(block, np.setdiff1d(np.arange(7), block))]) < 1e-12)
    assert list(panel.blocks) == [4, 2, 1]


def test_bars_count_the_passages_and_hatch_those_without_a_critical_point(table: sweep.Table) -> None:
    runs = table.where(panel="run")
    panel = figure.passed(runs)
    assert panel.totals.sum() == max(1, runs["passages"].sum())
    assert panel.unsettled.sum() == sum(text.split("; ").count("none") for text in runs["names"]) or not runs["passages"].sum()


def test_another_run_computes_nothing_again(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.saddle_passages._row": None, "figures.saddle_passages.draw": studied.no_figure}
    assert studied.again("saddle_passages", out, monkeypatch, broken) == studied.told(done)
