"""One thread per process, and the marker `gpu`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

sys.path.insert(0, str(Path(__file__).parent))  # tests import catalog, and plain, from here


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """More threads slow products of these sizes down, torch's by two orders of magnitude."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where torch finds no accelerator; torch is not even imported where none are collected."""
    marked = [item for item in items if "gpu" in item.keywords]
    if marked and not _accelerator():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


def _accelerator() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
