"""Studies from the command line: a small run agrees with theory everywhere, and every misuse ends in one clear sentence."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studies import STUDIES, __main__, minority_collapse, results

ROOT = Path(__file__).parent.parent
FILES = {"rows.csv", "study.json", "minority_collapse.png", "minority_collapse.pdf"}


def studies(*arguments):
    return subprocess.run([sys.executable, "-m", "studies", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One small run: the process and its folder."""
    out = tmp_path_factory.mktemp("studies") / "new" / "folder"
    return studies("minority_collapse", "--smoke", "--out", out), out


@pytest.fixture(scope="module")
def table(smoke):
    with (smoke[1] / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_small_run_leaves_all_files_and_a_summary(smoke, table):
    done, out = smoke
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in out.iterdir()} == FILES
    summary = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert summary["cells"] == summary["certified"] == summary["regime_agreements"] == str(len(table)) == "72"
    assert float(summary["largest_gap"]) <= 1e-9
    assert {line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("file: ")} == {str(out / name) for name in FILES}


def test_every_cell_is_proven_and_agrees_with_theory(table):
    for row in table:
        assert row["certified"] == row["agree"] == "True"
        assert row["regime"] == row["predicted_regime"]
        assert row["dead"] == row["predicted_dead"]
        assert abs(float(row["difference"])) <= 1e-9
    assert {row["regime"] for row in table} == {"DISTINCT", "MINORITY_ZERO", "ALL_ZERO"}
    assert {row["pattern"] for row in table} == set(minority_collapse.PATTERNS)


def test_the_stored_thresholds_part_the_predicted_regimes(table):
    for row in table:
        lam, first, last = (float(row[name]) for name in ("lam", "lam_minority", "lam_all"))
        assert row["predicted_regime"] == ("DISTINCT" if lam < first else "MINORITY_ZERO" if lam < last else "ALL_ZERO")
        assert int(row["predicted_dead"]) == sum(lam >= float(row[f"lam_{k}"]) for k in range(1, 11))


def test_counts_are_those_of_the_patterns(table):
    assert all(int(row["n_max"]) == 5000 for row in table)
    assert {int(row["n_min"]) for row in table} == {5000, 1255, 1256, 315, 79, 19, 20, 5}


def test_the_record_says_how_the_rows_were_made(smoke):
    record = json.loads((smoke[1] / "study.json").read_text())
    assert record["question"] == STUDIES["minority_collapse"]
    assert record["command"].startswith("python -m studies minority_collapse --smoke")
    assert record["options"]["smoke"] is True
    assert record["device"] == "numpy"
    assert record["versions"]["numpy"]


def test_the_figure_is_drawn_again_from_the_rows_alone(smoke, tmp_path):
    _, out = smoke
    command = [sys.executable, "-m", "figures", "minority_collapse", "--rows", str(out / "rows.csv"), "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("minority_collapse.png", "minority_collapse.pdf"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_the_same_seed_gives_the_same_rows(table):
    options = minority_collapse.Options(smoke=True)
    again = minority_collapse.minority_collapse(options)
    assert [repr(float(row["value"])) for row in again] == [row["value"] for row in table]


def test_the_list_asks_every_question():
    for arguments in ((), ("--help",)):
        done = studies(*arguments)
        assert done.returncode == 0
        assert all(name in done.stdout and question in done.stdout for name, question in STUDIES.items())


def test_help_loads_neither_scipy_nor_matplotlib():
    check = (
        "import sys; from studies.__main__ import main\n"
        "try: main(['minority_collapse', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = ('scipy', 'matplotlib', 'plotly', 'torch', 'pymanopt', 'autograd', 'loky', 'tqdm')\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--smoke" in done.stdout
    assert "--out" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("name", ["minority_colapse", "minority-collapse"])
def test_an_unknown_study_is_told_the_nearest(name):
    done = studies(name)
    assert done.returncode != 0
    assert done.stderr == f"studies: there is no study named {name!r}; did you mean minority_collapse?\n"


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    done = studies("minority_collapse", "--smoke", "--out", file / below)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(file) in done.stderr
    assert "folder" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("options", [{"smoke": True, "quick": True}, {"tol": 0.0}, {"tol": float("nan")}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        minority_collapse.Options(**options)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(results.CannotWrite, match="No space left"):
        results.write(tmp_path / "rows.csv", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("rows.csv", "old")]


def test_floats_are_stored_exactly(tmp_path):
    values = [0.1 + 0.2, 1e-300, float("inf"), -1 / 3]
    path = results.write_rows(tmp_path / "rows.csv", [{"x": value} for value in values])
    assert [float(line) for line in path.read_text().splitlines()[1:]] == values


def test_an_interrupted_run_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(minority_collapse, "minority_collapse", interrupted)
    assert __main__.main(["minority_collapse", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "studies minority_collapse: interrupted; no file is half written\n"
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_gets_one_sentence(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = studies("minority_collapse", "--smoke", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("studies minority_collapse: device 'cuda' is not to be had here")
    assert list(tmp_path.iterdir()) == []
