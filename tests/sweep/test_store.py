"""The store under fire: killed at any moment, full disks, foreign and broken files, a second writer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toys import LIVES, POINTS, TASKS, Writer, evaluations, random_rows, stored
from ufm import sweep
from ufm.sweep.executors import Serial

TOYS = Path(__file__).with_name("toys.py")


def start(out, executor, task, deaths=0, **options):
    command = [sys.executable, str(TOYS), str(out), executor, task, str(deaths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of sweeps that nobody killed, by task; their folder is in the points, so only results are compared."""
    return {task: results(run(tmp_path_factory.mktemp(task), Serial())) for task, run in TASKS.items()}


def results(table):
    return [{name: np.asarray(value).tobytes() for name, value in row.items()} for row in table.results]


@pytest.mark.parametrize(("executor", "lines"), [("serial", 1), ("serial", 60), ("loky", 1), ("loky", 90)])
def test_kill_9_loses_nothing_acknowledged_and_repeats_nothing_stored(tmp_path, whole, executor, lines):
    process = start(tmp_path, executor, "campaign")
    acknowledged = [process.stdout.readline().strip() for _ in range(lines)]
    os.killpg(process.pid, signal.SIGKILL)
    acknowledged += process.communicate()[0].split("\n")[:-1]  # a torn last line is no acknowledgement
    kept = {row[0] for row in stored(tmp_path)}
    assert set(acknowledged) <= kept
    assert lines <= len(kept) < LIVES
    assert len(sweep.load(tmp_path)) == len(kept)
    places = sweep.load(tmp_path)["x"].tolist()
    assert results(TASKS["campaign"](tmp_path, Serial())) == whole["campaign"]
    counts = [evaluations(tmp_path).count(f"{x} None") for x in range(LIVES)]
    assert [counts[x] for x in places] == [1] * len(places)
    assert min(counts) == 1
    assert max(counts) <= 2


@pytest.mark.parametrize("deaths", [1, 7, 15])
def test_a_killed_refinement_goes_on_where_it_was(tmp_path, whole, deaths):
    process = start(tmp_path, "serial", "refinement", deaths)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = sweep.load(tmp_path)
    assert 0 < len(kept) < 66
    assert results(TASKS["refinement"](tmp_path, Serial())) == whole["refinement"]
    assert len(evaluations(tmp_path)) == len(set(evaluations(tmp_path))) == len(sweep.load(tmp_path)) == 66


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toys
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
toys.life(Path(sys.argv[2]), "serial", "campaign", 0)
"""


@pytest.mark.parametrize("limit", [0, 40_000, 200_000])
def test_a_full_disk_is_one_error_and_what_was_stored_stays(tmp_path, whole, limit):
    command = [sys.executable, "-B", "-c", LIMITED.format(limit), str(TOYS.parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ufm.sweep.errors.CannotWrite: ")
    acknowledged = done.stdout.split()
    assert len(acknowledged) > 10 or limit < 200_000
    if acknowledged:
        assert set(acknowledged) <= {row[0] for row in stored(tmp_path)}
        assert len(sweep.load(tmp_path)) >= len(acknowledged)
    assert results(TASKS["campaign"](tmp_path, Serial())) == whole["campaign"]


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(sweep.CannotWrite, match=r"notes.txt.* is no folder and cannot be made one .*; give another"):
        sweep.run(random_rows, POINTS, out=file / below)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here")
@pytest.mark.parametrize("out", ["/proc/ufm", "/proc"])
def test_a_folder_that_takes_no_files_is_named(out):
    with pytest.raises(sweep.CannotWrite, match="proc"):
        sweep.run(random_rows, POINTS, out=out)


def damaged(tmp_path, how):
    """A store with 28 rows of about 2 kB each, damaged."""
    sweep.run(random_rows, POINTS, out=tmp_path)
    path = tmp_path / "cells.sqlite"
    data = path.read_bytes()
    path.write_bytes(how(data))
    return path


DAMAGES = {
    "random": lambda data: np.random.default_rng(0).bytes(5000),
    "truncated": lambda data: data[: len(data) // 2],
    "odd length": lambda data: data[:-1000],
    "zeros inside": lambda data: data[:8192] + bytes(20_000) + data[28_192:],
    "header only": lambda data: data[:100],
    "text": lambda data: b"lam,value\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_named_and_left_as_it_is(tmp_path, damage):
    path = damaged(tmp_path, DAMAGES[damage])
    before = path.read_bytes()
    for call in (lambda: sweep.run(random_rows, POINTS, out=tmp_path), lambda: sweep.load(tmp_path)):
        with pytest.raises(sweep.BadStore, match=r"cells\.sqlite"):
            call()
        assert path.read_bytes() == before


def test_a_damaged_row_is_no_result(tmp_path):
    sweep.run(random_rows, POINTS[:1], out=tmp_path)
    with sqlite3.connect(tmp_path / "cells.sqlite") as cells:
        cells.execute("UPDATE cells SET arrays = 'xyz'")
    cells.close()
    with pytest.raises(sweep.BadStore, match="damaged"):
        sweep.load(tmp_path)


def foreign(path, *statements):
    cells = sqlite3.connect(path)
    for statement in statements:
        cells.execute(statement)
    cells.commit()
    cells.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("statements", "sentence"),
    [
        (["CREATE TABLE cells (x)"], "database of another program"),
        (["PRAGMA application_id=7", "CREATE TABLE t (x)"], "database of another program"),
        ([f"PRAGMA application_id={0x75666D73}", "PRAGMA user_version=9", "CREATE TABLE cells (x)"], "layout 9"),
        ([f"PRAGMA application_id={0x75666D73}", "PRAGMA user_version=1", "CREATE TABLE cells (x)"], "cannot be read"),
    ],
)
def test_a_foreign_database_is_left_as_it_is(tmp_path, statements, sentence):
    before = foreign(tmp_path / "cells.sqlite", *statements)
    for call in (lambda: sweep.run(random_rows, POINTS, out=tmp_path), lambda: sweep.load(tmp_path)):
        with pytest.raises(sweep.BadStore, match=sentence):
            call()
    assert [len(before)] == [(tmp_path / "cells.sqlite").stat().st_size]
    assert statements[-1].encode() in (tmp_path / "cells.sqlite").read_bytes()


@pytest.mark.parametrize("text", ["{", "[]", '{"study": "minority_collapse"}'])
def test_a_foreign_record_is_left_as_it_is(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(sweep.BadStore, match=r"study.json is no record of ufm.sweep"):
        sweep.run(random_rows, POINTS, out=tmp_path)
    assert (tmp_path / "study.json").read_text() == text


def test_nothing_to_load_is_said(tmp_path):
    with pytest.raises(sweep.BadStore, match=r"holds no cells.sqlite"):
        sweep.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_second_writer_is_told_of_the_first_and_readers_are_welcome(tmp_path):
    process = start(tmp_path, "serial", "campaign")
    try:
        assert process.stdout.readline()
        with pytest.raises(sweep.SecondWriter, match=f"is being written by process {process.pid} on .*; wait for it to end"):
            sweep.run(random_rows, POINTS, out=tmp_path)
        assert len(sweep.load(tmp_path)) >= 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(sweep.run(random_rows, POINTS, out=tmp_path)) == len(POINTS)


def test_a_second_writer_of_the_same_process_is_told_too(tmp_path):
    with Writer(tmp_path, "1", "process"), pytest.raises(sweep.SecondWriter, match=f"process {os.getpid()} "):
        Writer(tmp_path, "1", "process")
    with Writer(tmp_path, "1", "process"):
        pass


def test_a_store_at_rest_is_one_file(tmp_path):
    sweep.run(random_rows, POINTS, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cells.sqlite", "cells.lock", "study.json"}
    assert (tmp_path / "cells.lock").stat().st_size == 0


def test_a_store_whose_maker_was_stopped_at_once_is_used(tmp_path):
    (tmp_path / "cells.sqlite").touch()
    with pytest.raises(sweep.BadStore, match="is empty"):
        sweep.load(tmp_path)
    assert len(sweep.run(random_rows, POINTS, out=tmp_path)) == len(POINTS)
