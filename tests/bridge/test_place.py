"""The determinism switch gives everything back, records describe the device, and blocks fit into an accelerator's free memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ufm.arrays import FREE_SHARE, NoDevice, block_size

torch = pytest.importorskip("torch")
from ufm.bridge.place import deterministic, device_record  # noqa: E402


def switches() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*modes, cudnn.deterministic, cudnn.benchmark)


@pytest.fixture(params=[(False, False, False, True), (True, True, False, False), (True, False, True, False)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, ...]]:
    """Torch with some settings of a user's own, and as it was afterwards."""
    usual, cudnn = switches(), torch.backends.cudnn
    for wanted in (request.param, usual):
        torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])
        cudnn.deterministic, cudnn.benchmark = wanted[2:]
        if wanted is not usual:
            yield wanted
    assert switches() == usual


def test_deterministic_and_back(before: tuple[bool, ...]) -> None:
    """All four switches are set inside and restored outside, also when nested, left by an error, or by one of PyTorch."""
    with deterministic():
        assert switches() == (True, False, True, False)
        with deterministic():
            pass
        assert switches() == (True, False, True, False)
    assert switches() == before
    with pytest.raises(KeyError), deterministic():
        raise KeyError
    assert switches() == before


def test_what_cannot_repeat_is_refused(before: tuple[bool, ...]) -> None:
    """PyTorch's own error for an operation without such an algorithm passes through unchanged."""
    x = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"), deterministic():
        x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert switches() == before


def test_cublas_gets_a_sentence(before: tuple[bool, ...]) -> None:
    """The paragraph that PyTorch raises for cuBLAS becomes one sentence with the remedy; the original stays behind it."""
    said = RuntimeError("Deterministic behavior was enabled ... set an environment variable ... CUBLAS_WORKSPACE_CONFIG=:4096:8 ...\n")
    expected = r"^deterministic: cuBLAS .* start it as CUBLAS_WORKSPACE_CONFIG=:4096:8 python"
    with pytest.raises(RuntimeError, match=expected) as caught, deterministic():
        raise said
    assert caught.value.__cause__ is said
    assert "\n" not in str(caught.value)
    assert switches() == before


@pytest.mark.gpu
def test_an_accelerator_repeats_itself() -> None:
    """A scatter of a million numbers, whose order is otherwise left to chance, is the same twice."""
    index, values = torch.randint(0, 5, (10**6,), device="cuda"), torch.randn(10**6, device="cuda")
    with deterministic():
        one, two = (torch.zeros(5, device="cuda").index_add_(0, index, values) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("device", ["numpy", "cpu", torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_device_record(device: Any) -> None:
    """A JSON object with the same keys on every device, naming it and the versions."""
    record = device_record(device)
    assert json.loads(json.dumps(record)) == record
    assert list(record) == ["device", "name", "memory", "capability", "threads", "versions"]
    assert record["device"].startswith(str(device))
    assert record["name"]
    assert record["versions"]["torch"] == torch.__version__
    assert (record["memory"] is None) == (str(device) != "cuda")


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99"])
def test_no_such_device(device: str) -> None:
    with pytest.raises(NoDevice) as caught:
        device_record(device)
    assert repr(device) in str(caught.value)
    assert "\n" not in str(caught.value)


def fake(free: int, reserved: int = 0, allocated: int = 0, available: bool = True) -> ModuleType:
    """A torch that knows nothing but an accelerator's memory."""
    module = ModuleType("torch")
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: available,
        mem_get_info=lambda device: (free, 80 * 2**30),
        memory_reserved=lambda device: reserved,
        memory_allocated=lambda device: allocated,
    )
    return module


def test_blocks_fit_into_an_accelerators_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of what is free, torch's own reserve counted as free, at least one run; a CPU's blocks do not change."""
    monkeypatch.setitem(sys.modules, "torch", fake(free=3 * 10**9))
    assert FREE_SHARE == pytest.approx(1 / 3)
    for device in ("cuda", "cuda:1"):
        assert block_size(1e4, device) == 100_000
    assert block_size(1e12, "cuda") == 1
    assert block_size(1e4, "cpu") == block_size(1e4, "numpy") == 1500
    monkeypatch.setitem(sys.modules, "torch", fake(free=10**9, reserved=3 * 10**9, allocated=10**9))
    assert block_size(1e4, "cuda") == 100_000


def test_where_memory_is_unknown_all_runs_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other accelerators, and a CUDA that is not there, of which `place` speaks later."""
    monkeypatch.setitem(sys.modules, "torch", fake(free=1, available=False))
    assert block_size(1e4, "cuda") == sys.maxsize
    assert block_size(1e4, "mps") == sys.maxsize
    monkeypatch.setitem(sys.modules, "torch", None)
    assert block_size(1e4, "cuda") == sys.maxsize


@pytest.mark.gpu
def test_blocks_of_an_accelerator() -> None:
    free = torch.cuda.mem_get_info("cuda")[0]
    assert 0.1 * free < 1e6 * block_size(1e6, "cuda") < free
