"""Where a run takes place: a switch for runs that repeat bit for bit, and a description of the device for records."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ufm.arrays import NoDevice


@contextmanager
def deterministic() -> Iterator[None]:
    """A context in which torch takes the algorithms that repeat bit for bit, or refuses; its own settings come back at the end.

    RuntimeError from an operation that has no such algorithm, and, with a sentence on what to do, from cuBLAS without a fixed workspace.
    """
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise RuntimeError(
            "deterministic: cuBLAS repeats its sums only with a workspace of fixed size, which must be set before the program starts; "
            "start it as CUBLAS_WORKSPACE_CONFIG=:4096:8 python ..., or run without deterministic()"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags


def device_record(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a record of a run says of its device: device, name, memory in bytes (None on a CPU), capability, threads, versions.

    NoDevice where this machine has no such device; "numpy" is the CPU without torch.
    """
    versions = {"numpy": np.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    if str(device) in ("numpy", "cpu"):
        name = platform.processor() or platform.machine()
        facts = {"name": name, "memory": None, "capability": None, "threads": torch.get_num_threads()}
        return {"device": str(device), **facts, "versions": versions}
    try:
        where = torch.empty(0, device=device).device
        if where.type != "cuda":
            raise NoDevice(f"device_record: device is {str(device)!r}, but only numpy, cpu and cuda are described; give one of them")
        found = torch.cuda.get_device_properties(where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise NoDevice(f"device {str(device)!r} is not to be had here ({reason}); use 'numpy' or 'cpu'") from error
    facts = {"name": found.name, "memory": found.total_memory, "capability": f"{found.major}.{found.minor}", "threads": None}
    return {"device": str(where), **facts, "versions": versions}
