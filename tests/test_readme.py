"""What the README shows is what a reader gets."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    """The fenced block that follows <!-- marker -->."""
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, marker
    return found.group(1)


def test_the_example_prints_its_output() -> None:
    """Run as written, the ten lines print what stands below them."""
    code = block("example")
    assert len(code.strip().splitlines()) <= 11
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block("example output")


def test_the_other_snippet_runs(tmp_path: Path) -> None:
    """After the example, as written; its sweep stores a finite row for every point."""
    check = "\nimport numpy as np\nassert len(table) == 4 and np.all(table['excess'] > -1e-12), table.failures\n"
    code = block("example") + block("descent") + check
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "excess" / "cells.sqlite").is_file()


def test_the_deep_snippet_prints_its_output() -> None:
    """After the imports of the example, as written."""
    code = block("deep")
    assert len(code.strip().splitlines()) <= 12
    done = subprocess.run([sys.executable, "-c", "import ufm\n" + code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block("deep output")


def test_the_etf_snippet_prints_its_output() -> None:
    """As written."""
    done = subprocess.run([sys.executable, "-c", block("etf")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block("etf output")


def test_the_network_snippets_print_their_output() -> None:
    """The training, the monitor's three statements and the end, as written."""
    pytest.importorskip("torch")
    monitor = block("monitor")
    assert len(ast.parse(monitor).body) == 3
    code = block("network") + monitor + block("network end")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block("network output")


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
