"""The code version sees code and nothing else, and the record says how the rows were made."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from toys import POINTS, deadly, guilty, random_rows
from ufm import sweep
from ufm.sweep.version import code_version, meaning, package_source


def test_the_version_sees_code_but_not_comments(tmp_path):
    plain = "def f(points, seeds):\n    return [{'y': 1}]\n"
    assert meaning(plain) == meaning("'''About.'''\n# why\ndef f(points,\n  seeds):\n    'What.'\n    return [{'y':  1}]  # what\n")
    assert meaning(plain) != meaning(plain.replace("1", "2"))
    for name, text in {"a.py": plain, "sub/b.py": plain, "plots/c.py": plain}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first = package_source(tmp_path)
    for name, counts in (("plots/c.py", False), ("sub/b.py", True)):
        package_source.cache_clear()
        (tmp_path / name).write_text(plain + "x = 1\n")
        assert (package_source(tmp_path) != first) is counts
    package_source.cache_clear()


def run_script(path, source):
    path.write_text(source)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SCRIPT = """
from pathlib import Path
from ufm import sweep
def f(points, seeds):
    return [{"y": FACTOR * p["x"], "seed": s} for p, s in zip(points, seeds)]
if __name__ == "__main__":
    table = sweep.run(f, sweep.grid(x=[1, 2]), out=Path(__file__).parent)
    print(table.version, table.other_versions, *table["y"], *table["seed"])
"""


def test_changed_code_computes_anew_and_loses_nothing_and_keeps_the_seeds(tmp_path):
    first = run_script(tmp_path / "study.py", "FACTOR = 2\n" + SCRIPT)
    commented = run_script(tmp_path / "study.py", "FACTOR = 2  # two\n" + SCRIPT)
    second = run_script(tmp_path / "study.py", "FACTOR = 3\n" + SCRIPT)
    assert first == commented
    assert (first[1:4], second[1:4]) == (["0", "2", "4"], ["2", "3", "6"])
    assert first[0] != second[0]
    assert first[4:] == second[4:] == [str(sweep.seed_of({"x": x})) for x in (1, 2)]
    latest, earlier = sweep.load(tmp_path), sweep.load(tmp_path, first[0])
    assert (latest["y"].tolist(), latest.other_versions) == ([3, 6], 2)
    assert (earlier["y"].tolist(), earlier.version) == ([2, 4], first[0])
    with pytest.raises(sweep.SweepError, match=r"the versions stored are: .*2 rows"):
        sweep.load(tmp_path, "1999")
    run_script(tmp_path / "study.py", "FACTOR = 2\n" + SCRIPT)
    assert sweep.load(tmp_path)["y"].tolist() == [2, 4]


def test_a_function_typed_at_a_prompt_has_a_version():
    code = "def f(p, s): return [{'y': 1 in {1, 2}}]\nfrom ufm.sweep.version import code_version as v\nprint(v(f))"
    ask = [sys.executable, "-c"]
    first, again, other = (subprocess.check_output([*ask, text]) for text in (code, "# hm\n" + code, code.replace("'y': 1", "'y': 3")))
    assert first == again != other


def test_two_functions_of_a_module_have_two_versions():
    assert code_version(guilty) != code_version(deadly)


@pytest.mark.parametrize("function", [functools.partial(random_rows), (lambda x: lambda points, seeds: x)(1), print])
def test_what_has_no_code_version_is_refused(function, tmp_path):
    with pytest.raises(sweep.SweepError, match="give version="):
        sweep.run(function, POINTS, out=tmp_path)


def test_the_record_lists_the_runs(tmp_path, monkeypatch):
    for part in (POINTS[:3], POINTS[:5]):
        sweep.run(random_rows, part, out=tmp_path, label="mine", options={"path": tmp_path, "lam": 0.1})
    record = json.loads((tmp_path / "study.json").read_text())
    first, second = record["runs"]
    assert (first["points"], first["computed"], second["points"], second["computed"]) == (3, 3, 5, 2)
    assert (first["label"], first["options"], first["function"], first["end"]) == (
        "mine",
        {"path": str(tmp_path), "lam": 0.1},
        "toys.random_rows",
        "complete",
    )
    assert first["version"] == sweep.load(tmp_path).version
    assert set(first["versions"]) == {"python", "ufm", "numpy", "scipy", "torch"}
    assert "command" in first
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert first["commit"] == (told.stdout.strip() if told.returncode == 0 else None)
    monkeypatch.setattr("ufm.sweep.record.KEPT", 2)
    sweep.run(random_rows, POINTS[:1], out=tmp_path)
    record = json.loads((tmp_path / "study.json").read_text())
    assert (len(record["runs"]), record["dropped"], record["runs"][0]) == (2, 1, second)
