"""Studies from the command line: a small run agrees with theory everywhere, resumes, and every misuse ends in one clear sentence."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies import STUDIES, __main__, minority_collapse
from ufm import sweep

ROOT = Path(__file__).parent.parent
PANELS = {"map", "bias", "few classes", "many classes", "many classes, descent", "scale", "width", "momentum"}
TIMES = {"seconds", "host"}


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "studies", *map(str, arguments)]


def studies(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One small run: the process and its folder."""
    out = tmp_path_factory.mktemp("studies") / "new" / "folder"
    return studies("minority_collapse", "--smoke", "--out", out), out


@pytest.fixture(scope="module")
def table(smoke: tuple[subprocess.CompletedProcess[str], Path]) -> sweep.Table:
    return sweep.load(smoke[1])


def rows_of(out: Path) -> dict[str, Any]:
    """What is stored, less times and host."""
    with sqlite3.connect(out / "cells.sqlite") as store:
        return {key: rest for key, *rest in store.execute("select key, version, point, status, result, arrays, error from cells")}


def stored_in(out: Path) -> int:
    """How many rows a folder holds so far."""
    try:
        return len(rows_of(out))
    except sqlite3.OperationalError:
        return 0


def test_a_small_run_leaves_its_files_and_a_summary(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("file: ")]
    assert all(Path(path).is_file() for path in said)
    kinds = {(Path(path).stem, Path(path).suffix) for path in said}
    assert kinds >= {(f"rows_K{K}", kind) for K in (4, 10, 100) for kind in (".csv", ".npz", ".nc")}
    assert kinds >= {("minority_collapse", kind) for kind in (".png", ".pdf", ".html")}
    assert not list(out.glob("*.part"))
    summary = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    asked = table.pick(table["panel"] != "boundary")
    assert summary["cells"] == summary["proven within the tolerance"] == str(len(asked))
    assert summary["regimes known"] == summary["regimes agree"]
    assert set(asked["panel"]) == PANELS


def test_every_cell_is_proven_and_agrees_with_theory(table: sweep.Table) -> None:
    assert np.all(table["gap"] <= 1e-9)
    known = table["predicted_regime"] != "UNKNOWN"
    assert known[table["bias"] == "none"].all()
    assert np.array_equal(table["regime"][known], table["predicted_regime"][known])
    closed = np.isfinite(table["predicted_value"])
    assert closed[(table["bias"] == "none") & (table["features"] == "relu")].all()
    assert np.abs(table["value"][closed] / table["predicted_value"][closed] - 1).max() <= 1e-9
    assert set(table["regime"]) == {"DISTINCT", "MERGED", "MINORITY_ZERO", "ALL_ZERO"}


def test_the_stored_boundaries_part_the_predicted_regimes(table: sweep.Table) -> None:
    none = table.where(bias="none")
    strength, merged, zero, everything = (none[f"strength{name}"] for name in ("", "_merged", "_zero", "_all"))
    expected = np.select([strength < merged, strength < zero, strength < everything], ["DISTINCT", "MERGED", "MINORITY_ZERO"], "ALL_ZERO")
    assert np.array_equal(expected, none["predicted_regime"])


def test_without_relu_descent_kills_nothing_and_finds_the_optimum(table: sweep.Table) -> None:
    free = table.where(panel="map", features="free")
    assert np.all(free["killed"] == 0)
    point = next(p for p in minority_collapse.points(minority_collapse.Options()) if p["panel"] == "map" and p["features"] == "free")
    for strength in (0.3, 3.0):
        row = minority_collapse.minority_collapse([point | {"ratio": 30.0, "strength": strength, "descents": 4}], [0])[0]
        assert (row["settled"], row["reached"], row["killed"]) == (1.0, 1.0, 0.0)


def test_intervals_hold_the_shares(table: sweep.Table) -> None:
    cells = table.pick(table["descents"] > 0)
    low, share, high = (cells[name] for name in ("killed_low", "killed", "killed_high"))
    assert np.all((0 <= low) & (low <= share + 1e-15) & (share <= high + 1e-15) & (high <= 1))
    assert np.all(high - low > 0)
    n, z = cells["descents"], 1.959963984540054  # Wilson 1927
    middle, half = (share + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert np.allclose([low, high], [middle - half, middle + half], rtol=0, atol=1e-12)
    assert cells["killed"].max() > 0


def test_the_bisection_finds_theory_s_boundary_to_a_thousandth() -> None:
    """Twelve halvings from a factor 25 around it, in both patterns and both models."""
    options = minority_collapse.Options(smoke=True)
    base = next(point for point in minority_collapse.points(options) if point["panel"] == "bias")
    for features, pattern, ratio, exact in (("relu", "step", 1000.0, 0.9), ("relu", "exponential", 20.0, 0.9), ("free", "step", 20.0, 1.0)):
        low, high = 0.2, 5.0
        for _ in range(12):
            middle = np.sqrt(low * high)
            point = base | dict(features=features, pattern=pattern, ratio=ratio, strength=middle, bias="none", tol=1e-12)
            distinct = minority_collapse.minority_collapse([point], [0])[0]["distinct"]
            low, high = (middle, high) if distinct else (low, middle)
        assert abs(np.sqrt(low * high) / exact - 1) <= 1e-3


def test_counts_and_strength_are_those_of_the_problem(table: sweep.Table) -> None:
    cells = table.where(panel="map", pattern="step")
    assert set(cells["n_min"]) == {5000, 158, 5}
    kappa = cells["N"] * cells["lam"]
    assert np.allclose(kappa**2 / cells["n_min"], cells["strength"], rtol=1e-12, atol=0)


def test_the_record_says_how_the_rows_were_made(smoke: Any) -> None:
    record = json.loads((smoke[1] / "study.json").read_text())
    run = record["runs"][0]
    assert run["options"]["smoke"] is True
    assert run["options"]["device"] == "numpy"
    assert "minority_collapse" in json.dumps(record)
    assert "numpy" in json.dumps(record)


def test_exports_read_back_exactly(smoke: Any, table: sweep.Table) -> None:
    with (smoke[1] / "rows_K10.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    stored = np.load(smoke[1] / "rows_K10.npz")
    values = np.array([float(row["value"]) for row in rows])
    assert np.array_equal(values, stored["value"])
    assert set(values) == set(table.where(K=10).pick(table.where(K=10)["panel"] != "boundary")["value"])
    assert stored["margins"].shape == (len(rows), 10)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies that compute and store, but draw nothing."""
    from figures import minority_collapse as figure

    monkeypatch.setattr(figure, "draw_all", lambda stored, out: [])


@pytest.mark.usefixtures("undrawn")
def test_rows_do_not_depend_on_workers_blocks_or_kills(smoke: Any, tmp_path: Path) -> None:
    """Killed hard twice on the way, then finished in one process: the store of a run in parallel, bit for bit."""
    arguments = ["minority_collapse", "--smoke", "--executor", "serial", "--out", str(tmp_path)]
    everything = len(rows_of(smoke[1]))
    for share in (0.1, 0.5):
        going = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while going.poll() is None and stored_in(tmp_path) < share * everything:
            time.sleep(0.02)
        os.killpg(going.pid, signal.SIGKILL)
        assert going.wait() == -signal.SIGKILL
        assert share * everything <= stored_in(tmp_path) < everything
    assert __main__.main(arguments) == 0
    assert rows_of(tmp_path) == rows_of(smoke[1])


@pytest.mark.usefixtures("undrawn")
def test_a_second_call_computes_nothing(smoke: Any) -> None:
    before = rows_of(smoke[1])
    assert __main__.main(["minority_collapse", "--smoke", "--executor", "serial", "--out", str(smoke[1])]) == 0
    runs = json.loads((smoke[1] / "study.json").read_text())["runs"]
    assert [run["computed"] for run in runs[-3:]] == [0, 0, 0]
    assert rows_of(smoke[1]) == before


def test_the_figure_is_drawn_again_from_the_rows_alone(smoke: Any, tmp_path: Path) -> None:
    again = [sys.executable, "-m", "figures", "minority_collapse", "--rows", str(smoke[1]), "--out", str(tmp_path)]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    for kind in ("png", "pdf", "html"):
        assert (tmp_path / f"minority_collapse.{kind}").read_bytes() == (smoke[1] / f"minority_collapse.{kind}").read_bytes()


def test_a_point_that_raises_ends_in_a_sentence(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The others are stored, the traceback too; nothing is drawn; asked to, it is computed again."""
    real = minority_collapse.problem_of

    def broken(points: Any) -> Any:
        if any(point["panel"] == "width" and point["width"] == 11 for point in points):
            raise ArithmeticError("the eleventh coordinate is cursed")
        return real(points)

    monkeypatch.setattr(
        minority_collapse, "points", lambda options: POINTS(options)[:18] + [p for p in POINTS(options) if p["panel"] == "width"][:8]
    )
    monkeypatch.setattr(minority_collapse, "problem_of", broken)
    arguments = ["minority_collapse", "--smoke", "--executor", "serial", "--out", str(tmp_path)]
    assert __main__.main(arguments) == 1
    said = capsys.readouterr().err
    assert "failed: 4 points" in said
    assert "the eleventh coordinate is cursed" in said
    assert "--retry-failed" in said
    assert not list(tmp_path.glob("*.png"))
    failures = sweep.load(tmp_path).failures
    assert len(failures) == 4
    assert "Traceback" in failures[0][1]
    monkeypatch.setattr(minority_collapse, "problem_of", real)
    assert __main__.main(arguments) == 1
    monkeypatch.setattr(minority_collapse, "finish", lambda out, tables, *_: sum(len(t.failures) for t in tables.values()))
    assert __main__.main([*arguments, "--retry-failed"]) == 0


POINTS = minority_collapse.points


def test_if_every_point_raises_that_is_what_is_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def broken(points: Any) -> Any:
        raise ArithmeticError("nothing works today")

    monkeypatch.setattr(minority_collapse, "points", lambda options: POINTS(options)[-9:])
    monkeypatch.setattr(minority_collapse, "problem_of", broken)
    assert __main__.main(["minority_collapse", "--smoke", "--executor", "serial", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "failed: 9 points" in said
    assert "nothing works today" in said


@pytest.mark.parametrize("other", [["--smoke", "--seed", "1"], ["--quick"]])
def test_sizes_and_seeds_do_not_mix_in_a_folder(smoke: Any, other: list[str]) -> None:
    before = rows_of(smoke[1])
    done = studies("minority_collapse", *other, "--out", smoke[1])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "holds a run with" in done.stderr
    assert rows_of(smoke[1]) == before


def test_default_folders_differ() -> None:
    names = {str(minority_collapse.Options(**options).folder) for options in ({}, {"quick": True}, {"seed": 3}, {"device": "cpu"})}
    assert names == {f"out/minority_collapse{end}" for end in ("", "-quick", "-seed3", "-cpu")}


def test_torch_finds_the_same_rows() -> None:
    """The same starts, the same optimum and the same seeds killed, to rounding."""
    pytest.importorskip("torch")
    point = next(p for p in minority_collapse.points(minority_collapse.Options()) if p["panel"] == "few classes")
    cells = [point | {"ratio": 30.0, "strength": strength, "descents": 8} for strength in (0.3, 0.6)]
    ours, theirs = (minority_collapse.minority_collapse([c | {"device": d} for c in cells], [0, 0]) for d in ("numpy", "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["killed"] == b["killed"] > 0
        assert abs(a["value"] / b["value"] - 1) < 1e-10
        assert np.abs(a["margins"] - b["margins"]).max() < 1e-6


def test_the_list_asks_every_question() -> None:
    for arguments in ((), ("--help",)):
        done = studies(*arguments)
        assert done.returncode == 0
        assert all(name in done.stdout and question in done.stdout for name, question in STUDIES.items())


def test_help_loads_neither_scipy_nor_matplotlib() -> None:
    check = (
        "import sys; from studies.__main__ import main\n"
        "try: main(['minority_collapse', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = ('scipy', 'matplotlib', 'plotly', 'torch', 'pymanopt', 'autograd', 'loky', 'tqdm')\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(option in done.stdout for option in ("--smoke", "--quick", "--out", "--workers", "--executor", "--retry-failed"))
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("name", ["minority_colapse", "minority-collapse"])
def test_an_unknown_study_is_told_the_nearest(name: str) -> None:
    done = studies(name)
    assert done.returncode != 0
    assert done.stderr == f"studies: there is no study named {name!r}; did you mean minority_collapse?\n"


def test_an_unknown_option_is_told_the_nearest() -> None:
    done = studies("minority_collapse", "--worker", "2")
    assert done.returncode != 0
    assert "--workers" in done.stderr


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path, below: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    done = studies("minority_collapse", "--smoke", "--out", file / below)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(file) in done.stderr
    assert "folder" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_a_foreign_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cells.sqlite").write_bytes(b"something else entirely" * 100)
    done = studies("minority_collapse", "--smoke", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cells.sqlite" in done.stderr
    assert (tmp_path / "cells.sqlite").read_bytes() == b"something else entirely" * 100


def test_a_full_disk_gets_one_sentence(tmp_path: Path) -> None:
    """No file may grow beyond 60 kB here; what is stored is whole, and a run with room goes on from it."""
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limited += "from studies.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["minority_collapse", "--smoke", "--executor", "serial", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("studies minority_collapse: ")
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".part", ".png", ".csv"))]
    assert not sweep.load(tmp_path).failures


def test_a_folder_that_takes_no_files_gets_one_sentence() -> None:
    done = studies("minority_collapse", "--smoke", "--out", "/proc/ufm")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/proc/ufm" in done.stderr


def test_a_killed_worker_gets_one_sentence(tmp_path: Path) -> None:
    """The worker is killed from outside while it computes; what was finished is stored, and a second call goes on."""
    going = subprocess.Popen(
        command("minority_collapse", "--smoke", "--workers", "1", "--out", tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (pids := workers_of(going.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _, said = going.communicate(timeout=60)
    assert going.returncode == 2
    own = [line for line in said.splitlines() if "resource_tracker" not in line]  # a process of loky's, which may speak last
    assert own[-1].startswith("studies minority_collapse: run: a worker process died")
    assert "run again to go on" in said
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in /proc (Linux)")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_study_that_is_killed(how: signal.Signals, tmp_path: Path) -> None:
    """The study alone is killed, in the middle of blocks that would take minutes."""
    going = subprocess.Popen(command("deep_basins", "--quick", "--workers", "2", "--out", tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(pids := workers_of(going.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    going.send_signal(how)
    going.wait(timeout=60)
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (len(pids), left) == (2, [])


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait to be collected (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(pid: int) -> list[int]:
    """The loky workers below a process (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [child for child in pids if "popen_loky" in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = subprocess.Popen(
        command("minority_collapse", "--smoke", "--out", tmp_path, "--executor", "serial"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "cells.sqlite").exists():
            assert first.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        done = studies("minority_collapse", "--smoke", "--out", tmp_path)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("options", [{"smoke": True, "quick": True}, {"seed": -1}, {"workers": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--"):
        minority_collapse.Options(**options)


def test_an_interrupted_run_says_so(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    assert __main__.main(["minority_collapse", "--executor", "serial", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "studies minority_collapse: interrupted; what was finished is stored, run again to go on\n"


def test_a_device_that_is_not_there_gets_one_sentence(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = studies("minority_collapse", "--smoke", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("studies minority_collapse: device 'cuda' is not to be had here")
    assert list(tmp_path.iterdir()) == []
