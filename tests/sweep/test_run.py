"""Runs: rows that depend on nothing but their points, failures that hurt nobody else."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from toys import POINTS, deadly, evaluations, guilty, random_rows, stored
from ufm import sweep
from ufm.sweep.executors import Serial, in_flight, workers_of
from ufm.sweep.run import Progress, grouped

EXECUTORS = {
    "serial": Serial,
    "threads": lambda: ThreadPoolExecutor(3),
    "loky1": lambda: sweep.executors.loky(1),
    "loky2": lambda: sweep.executors.loky(2),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The rows as one process computes them point by point."""
    out = tmp_path_factory.mktemp("reference")
    return sweep.run(random_rows, POINTS, out=out, block=1), stored(out)


def same_rows(one, other):
    """Equal to the last bit, and in type."""
    assert one.names == other.names
    for name in one.names:
        for a, b in zip(one.values(name), other.values(name), strict=True):
            assert type(a) is type(b)
            assert repr(a) == repr(b) if not isinstance(a, np.ndarray) else (a.dtype == b.dtype and a.tobytes() == b.tobytes())
    return True


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("block", "same"), [(1, ()), (3, ("depth", "kind")), (64, ("depth",)), (None, ())])
def test_rows_do_not_depend_on_how_they_are_computed(reference, tmp_path, executor, block, same):
    shuffled = random.Random(block).sample(POINTS, len(POINTS))
    with EXECUTORS[executor]() as workers:
        table = sweep.run(random_rows, shuffled, out=tmp_path, executor=workers, block=block, same=same)
    assert stored(tmp_path) == reference[1]
    assert list(table.points) == shuffled
    assert same_rows(table.pick([shuffled.index(point) for point in POINTS]), reference[0])


def test_the_rows_are_those_of_the_function(reference):
    for point, result in zip(POINTS, reference[0].results, strict=True):
        for name, value in random_rows([point], [sweep.seed_of(point)])[0].items():
            np.testing.assert_array_equal(result[name], value)


def test_load_sorts_by_value_whatever_the_order_of_computing(reference, tmp_path):
    for part in (POINTS[20:], POINTS[:10], POINTS[5:]):
        sweep.run(random_rows, part[::-1], out=tmp_path)
    table = sweep.load(tmp_path)
    assert len(table) == len(POINTS)
    assert [(p["depth"], p["kind"], p["lam"]) for p in table.points] == sorted((p["depth"], p["kind"], p["lam"]) for p in POINTS)
    assert table["lam"][:7].tolist() == sorted(table["lam"][:7])


def test_points_are_computed_once(tmp_path):
    points = [{"x": x, "folder": str(tmp_path)} for x in (1, 2, 1, 4, 2)]
    table = sweep.run(guilty, points, out=tmp_path)
    assert table["y"].tolist() == [10, 20, 10, 40, 20]
    assert sweep.run(guilty, points[::-1], out=tmp_path)["y"].tolist() == [20, 40, 10, 20, 10]
    assert sorted(evaluations(tmp_path)) == ["1 None", "2 None", "4 None"]


@pytest.mark.parametrize("block", [1, 4, 64])
def test_only_the_guilty_points_fail_and_are_retried_on_request_only(tmp_path, block):
    points = [{"x": x, "folder": str(tmp_path)} for x in range(1, 11)]
    table = sweep.run(guilty, points, out=tmp_path, block=block)
    assert [p["x"] for p, _ in table.failures] == [3, 6, 9]
    assert all(text.startswith("Traceback") and "toys.py" in text and f"no inverse of x={p['x']}" in text for p, text in table.failures)
    assert "work.py" not in table.failures[0][1]
    assert np.isnan(table["y"]).tolist() == (table.status == "failed").tolist() == [p["x"] % 3 == 0 for p in points]
    before = len(evaluations(tmp_path))
    (tmp_path / "mended").touch()
    assert len(sweep.run(guilty, points, out=tmp_path).failures) == 3
    assert len(evaluations(tmp_path)) == before
    assert sweep.run(guilty, points, out=tmp_path, retry_failed=True)["y"].tolist() == [10 * p["x"] for p in points]
    assert evaluations(tmp_path)[before:] == ["3 None", "6 None", "9 None"]


BAD_ROWS = {
    "returned 1 rows for 3 points": lambda points, seeds: [{}] if len(points) == 3 else [{"y": 1}] * len(points),
    "returned NoneType": lambda points, seeds: None,
    "returned int as a row": lambda points, seeds: [3] * len(points),
    "returned a column 'x'": lambda points, seeds: [{"x": 1}] * len(points),
    "returned a column 'status'": lambda points, seeds: [{"status": 1}] * len(points),
    "y is [1, 2] (list)": lambda points, seeds: [{"y": [1, 2]}] * len(points),
    "y is array([None], dtype=object) (ndarray)": lambda points, seeds: [{"y": np.array([None])}] * len(points),
    "y is np.complex128(1j) (complex128)": lambda points, seeds: [{"y": np.complex128(1j)}] * len(points),
    "(MaskedArray)": lambda points, seeds: [{"y": np.ma.masked_array([1, 2], [0, 1])}] * len(points),
}


@pytest.mark.parametrize("sentence", BAD_ROWS)
def test_rows_that_cannot_be_stored_are_failures_with_a_sentence(tmp_path, sentence):
    table = sweep.run(BAD_ROWS[sentence], sweep.grid(x=[1, 2, 3]), out=tmp_path, version="1")
    if "1 rows for 3" in sentence:  # alone, each point has its row
        assert table["y"].tolist() == [1, 1, 1]
    else:
        assert [text.startswith("the function returned") and sentence in text and "\n" not in text for _, text in table.failures] == [
            True
        ] * 3


def test_divergence_is_a_result(tmp_path):
    odd = [np.nan, np.inf, -np.inf, 5e-324, -0.0, 0.1 + 0.2]
    table = sweep.run(
        lambda points, seeds: [{"y": odd[p["x"]], "z": np.array(odd)} for p in points], sweep.grid(x=range(6)), out=tmp_path, version="1"
    )
    again = sweep.load(tmp_path)
    assert table.status.tolist() == ["ok"] * 6
    assert again["y"].tobytes() == table["y"].tobytes() == np.array(odd).tobytes()
    assert again["z"].tobytes() == np.array([odd] * 6).tobytes()


def test_a_killed_worker_loses_no_finished_block_and_a_rerun_goes_on(tmp_path):
    points = [{"x": x, "folder": str(tmp_path)} for x in range(8)]
    with sweep.executors.loky(2) as workers, pytest.raises(sweep.WorkerLost, match=r"\d of 8 points are stored now, \d remain: run again"):
        sweep.run(deadly, points, out=tmp_path, executor=workers, block=1)
    kept = sweep.load(tmp_path)["x"].tolist()
    assert set(kept) >= {0, 1}
    assert 5 not in kept
    (tmp_path / "mended").touch()
    with sweep.executors.loky(2) as workers:
        assert sweep.run(deadly, points, out=tmp_path, executor=workers, block=1)["y"].tolist() == [10 * x for x in range(8)]
    assert [evaluations(tmp_path).count(f"{x} None") for x in kept] == [1] * len(kept)
    assert [entry["end"].split(":")[0] for entry in json.loads((tmp_path / "study.json").read_text())["runs"]] == ["WorkerLost", "complete"]


class Interrupted(ThreadPoolExecutor):
    """Finishes three blocks, and meets Ctrl-C before any of them is asked for."""

    blocks = 0

    def submit(self, function, /, *args):
        self.blocks += 1
        if self.blocks == 4:
            raise KeyboardInterrupt
        future = super().submit(function, *args)
        wait([future])
        return future


def test_an_interrupt_keeps_finished_blocks_and_is_raised(tmp_path):
    with pytest.raises(KeyboardInterrupt), Interrupted(1) as workers:
        sweep.run(random_rows, POINTS, out=tmp_path, executor=workers, block=2)
    assert len(sweep.load(tmp_path)) == 6


def test_blocks_are_of_a_sensible_size(tmp_path):
    sizes = [sweep.run(block_size, sweep.grid(x=range(n)), out=tmp_path / str(n))["size"][0] for n in (1, 28, 1000)]
    assert sizes == [1, 7, 64]


def block_size(points, seeds):
    return [{"size": len(points)}] * len(points)


def test_a_function_that_cannot_travel_gets_a_sentence(tmp_path):
    class Shut(Serial):
        def submit(self, function, /, *args, **named):
            raise TypeError("cannot serialise")

    with pytest.raises(sweep.SweepError, match=r"Shut failed on a block \(TypeError: cannot serialise\); 0 of 28 points are stored now"):
        sweep.run(random_rows, POINTS, out=tmp_path, executor=Shut())


def test_blocks_agree_in_the_named_keys_and_keep_the_order():
    blocks = grouped(POINTS, ["depth"], 5)
    assert [len(block) for block in blocks] == [5, 5, 4, 5, 5, 4]
    assert [point for block in blocks for point in block] == POINTS
    assert all(len({point["depth"] for point in block}) == 1 for block in blocks)
    mixed = grouped([{"x": 1, "n": 0}, {"x": 2, "n": 1}, {"x": 3, "n": 0}], ["n"], 9)
    assert [[point["x"] for point in block] for block in mixed] == [[1, 3], [2]]
    with pytest.raises(sweep.BadPoint, match="same names 'width'"):
        grouped(POINTS, ["width"], 5)


class Watched(ThreadPoolExecutor):
    """Counts the blocks it holds."""

    most = 0
    held = ()

    def submit(self, function, /, *args):
        self.held = [future for future in self.held if not future.done()] + [super().submit(function, *args)]
        self.most = max(self.most, len(self.held))
        return self.held[-1]


def test_few_blocks_are_in_flight(tmp_path):
    with Watched(1) as workers:
        assert (workers_of(workers), in_flight(workers), in_flight(Serial())) == (1, 4, 1)
        sweep.run(random_rows, POINTS, out=tmp_path, executor=workers, block=1)
    assert 2 <= workers.most <= 4


def test_progress_is_a_line_in_the_log_where_there_is_no_terminal(tmp_path, monkeypatch, caplog, capsys):
    import importlib

    monkeypatch.setattr(importlib.import_module("ufm.sweep.run"), "EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="ufm.sweep.run"):
        sweep.run(random_rows, POINTS, out=tmp_path, block=14, label="toy")
    assert [record.message.split(" points")[0] for record in caplog.records] == ["toy: 14 of 28", "toy: 28 of 28"]
    assert capsys.readouterr() == ("", "")
    progress = Progress(3, "toy")
    progress.add(1, 1)
    assert (progress.done, progress.failed, progress.bar.disable) == (1, 1, True)


def test_ten_thousand_points(tmp_path):
    points = sweep.grid(x=range(100), y=np.linspace(0, 1, 100))
    sum_of = lambda points, seeds: [{"z": p["x"] + p["y"]} for p in points]  # noqa: E731
    assert len(sweep.run(sum_of, points, out=tmp_path, version="1")) == 10_000
    table = sweep.load(tmp_path)
    cells = table.on_grid("x", "y")
    np.testing.assert_array_equal(cells["z"], cells["x"] + cells["y"][:, None])


def test_executors_by_name(monkeypatch):
    with pytest.raises(sweep.SweepError, match="no executor 'locky'; use one of serial, loky, dask"):
        sweep.executors.named("locky")
    with pytest.raises(sweep.SweepError, match="at least one"):
        sweep.executors.named("loky", 0)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with sweep.executors.named("loky", 1) as workers:
        assert workers.submit(thread_settings).result() == ["1", "1", "1"]
    with sweep.executors.named("serial") as workers:
        assert workers.submit(max, 1, 2).result() == 2


def thread_settings():
    import os

    return [os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")]


def test_dask_is_named_with_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"ufm\[cluster\]"), sweep.executors.named("dask"):
        pass


@pytest.mark.parametrize("options", [{"block": 0}, {"durability": "hope"}])
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(sweep.SweepError, match=next(iter(options))):
        sweep.run(random_rows, POINTS, out=tmp_path, **options)


def test_durability_is_an_option(tmp_path):
    assert len(sweep.run(random_rows, POINTS[:2], out=tmp_path, durability="power")) == 2


def test_importing_the_room_loads_no_heavy_package():
    heavy = ("scipy", "loky", "tqdm", "xarray", "distributed", "matplotlib", "cloudpickle")
    check = f"import sys, ufm.sweep; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "[]"
