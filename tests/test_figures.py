"""Figures are drawn from stored rows alone, and say in one sentence when the rows are not theirs."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from figures import FIGURES, minority_collapse, rows
from ufm.records import Regime

ROOT = Path(__file__).parent.parent
RATIOS, LAMS = [1.0, 10.0, 100.0], [1e-4, 1e-3, 1e-2]


def figures(*arguments):
    return subprocess.run([sys.executable, "-m", "figures", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def row(pattern, ratio, lam, i, j):
    regime, dead = [(Regime.DISTINCT, 0), (Regime.MINORITY_ZERO, 3), (Regime.ALL_ZERO, 10)][j]
    lam_k = np.geomspace(3e-3, 3e-3 / ratio, 10)
    return (
        {"pattern": pattern, "ratio": ratio, "lam": lam, "dead": dead, "tol": 1e-9, "regime": regime.name, "certified": (i, j) != (1, 2)}
        | {"lam_minority": lam_k[-1].item(), "lam_all": lam_k[0].item()}
        | {f"lam_{k + 1}": lam_k[k].item() for k in range(10)}
    )


@pytest.fixture
def stored(tmp_path):
    """Rows as a study leaves them, two by three cells, one of them not certified."""
    table = [row(p, r, lam, i, j) for p in ("exponential", "step") for i, r in enumerate(RATIOS) for j, lam in enumerate(LAMS)]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return path


def read(path):
    return rows.read(path, "minority_collapse", minority_collapse.NUMBERS, minority_collapse.WORDS)


def test_the_map_holds_the_rows(stored):
    table = read(stored)
    data = minority_collapse.phase_map(rows.on_grid(rows.pick(table, table["pattern"] == "step"), "ratio", "lam"))
    np.testing.assert_array_equal(data.x, RATIOS)
    np.testing.assert_array_equal(data.y, LAMS)
    np.testing.assert_array_equal(data.codes, [[0] * 3, [3] * 3, [10] * 3])
    np.testing.assert_array_equal(~data.known, [[False] * 3, [False] * 3, [False, True, False]])
    np.testing.assert_array_equal(data.boundaries[0].y, table["lam_minority"][::3][:3])
    np.testing.assert_array_equal(data.boundaries[1].y, table["lam_all"][::3][:3])
    assert [data.names[code] for code in (0, 3, 10)] == [r.value for r in (Regime.DISTINCT, Regime.MINORITY_ZERO, Regime.ALL_ZERO)]


def test_unknown_cells_have_no_colour_and_merged_ones_their_own(stored):
    stored.write_text(stored.read_text().replace("ALL_ZERO", "UNKNOWN").replace("DISTINCT", "MERGED"))
    table = read(stored)
    data = minority_collapse.phase_map(rows.on_grid(rows.pick(table, table["pattern"] == "step"), "ratio", "lam"))
    assert not data.known[2].any()
    assert {data.names[code] for code in data.codes[0]} == {Regime.MERGED.value}


def test_axes_labels_and_caption_say_what_is_drawn(stored):
    figure = minority_collapse.make(read(stored))
    left, right = figure.axes[:2]
    assert left.get_xlabel() == right.get_xlabel() == r"imbalance ratio $R$"
    assert left.get_ylabel() == r"$\lambda=\sqrt{\lambda_W\lambda_H}$"
    assert r"\leq 10^{-9}$ in 16 of 18 cells" in minority_collapse.caption(read(stored))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:4] == [Regime.DISTINCT.value, Regime.MINORITY_ZERO.value, Regime.ALL_ZERO.value, "not certified"]


def test_the_command_draws_equal_files_without_scipy_or_global_state(stored, tmp_path):
    done = figures("minority_collapse", "--rows", stored, "--out", tmp_path / "again")
    assert (done.returncode, done.stderr) == (0, "")
    check = (
        "import sys, pathlib; from figures import minority_collapse as f; "
        f"f.draw(pathlib.Path({str(stored)!r}), pathlib.Path({str(tmp_path)!r})); "
        "print([m for m in sys.modules if m.startswith(('matplotlib.pyplot', 'scipy'))])"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    for kind in ("png", "pdf"):
        name = f"minority_collapse.{kind}"
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def spoil(path, kind):
    lines = path.read_text().splitlines()
    if kind == "missing":
        path.unlink()
    elif kind == "foreign":
        path.write_text("a,b\n1,2\n")
    elif kind == "empty":
        path.write_text("")
    elif kind == "binary":
        path.write_bytes(b"\x89PNG\xff\xfe")
    elif kind == "torn":
        path.write_text("\n".join(lines[:5]) + "\nstep,1")
    elif kind == "words":
        path.write_text(path.read_text().replace("1e-09", "small"))
    elif kind == "short":
        path.write_text("\n".join(lines[:-1]))
    elif kind == "half":
        path.write_text("\n".join(line for line in lines if not line.startswith("step")))
    elif kind == "regime":
        path.write_text(path.read_text().replace("ALL_ZERO", "GONE"))


@pytest.mark.parametrize("kind", ["missing", "foreign", "empty", "binary", "torn", "words", "short", "half", "regime"])
def test_rows_that_are_not_a_whole_study_are_refused_in_one_sentence(stored, tmp_path, kind):
    spoil(stored, kind)
    with pytest.raises(rows.BadRows) as error:
        minority_collapse.draw(stored, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_the_command_fails_with_one_sentence(stored, tmp_path):
    for arguments, message in [
        (("minority_colapse",), "did you mean minority_collapse?"),
        (("minority_collapse", "--rows", tmp_path / "none.csv"), "none.csv cannot be read (No such file or directory)"),
        (("minority_collapse", "--rows", stored, "--out", stored / "x"), "cannot write to"),
    ]:
        done = figures(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_list_names_every_figure():
    assert all(name in figures().stdout for name in FIGURES)
