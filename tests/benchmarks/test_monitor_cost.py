"""What a Monitor adds to the forward passes of ResNet-18: ratios of CPU time in one process, one thread, in turns.

`pytest tests/benchmarks/test_monitor_cost.py -s`. Nothing here asserts a time. The report comes once a pass over the data and is told
apart: it costs as much as a few batches, whatever their number, but for the last layer's samples, which the last test measures.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from test_speed import one_thread  # noqa: F401  (a fixture)
from ufm.bridge import models
from ufm.bridge.monitor import Monitor

BATCH = 128
BLOCKS = [f"body.blocks.{i}" for i in range(8)]

CHOICES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "last layer, samples kept": ([], {}),
    "last layer, no samples": ([], {"keep": "none"}),
    "means and traces of 8 blocks, last layer": (BLOCKS, {}),
    "means and traces of 8 blocks by pixels' mean, last layer": (BLOCKS, {"conv": "pool"}),
    "all in full, by pixels' mean": (BLOCKS, {"conv": "pool", "measure": "full"}),
    "last layer in full": ([], {"measure": "full"}),
}


def network() -> Any:
    with models.seeded(0):
        body = models.resnet18()
        return models.Network(body, nn.Linear(body.out_features, 10)).eval()


class Replay(nn.Module):
    """Layers that give what the network's gave, for nothing, under the same names; the head is the network's."""

    def __init__(self, model: Any, x: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Module(), model.head
        self.body.blocks = nn.Sequential(*(nn.Identity() for _ in BLOCKS))
        self.outputs: list[Any] = []
        stages = [block.register_forward_hook(lambda m, a, out: self.outputs.append(out.clone())) for block in model.body.blocks]
        self.features = model.body(x)
        for stage in stages:
            stage.remove()

    def forward(self) -> Any:
        for layer, output in zip(self.body.blocks, self.outputs, strict=True):
            layer(output)
        return self.head(self.features)


@pytest.mark.parametrize("choice", CHOICES)
def test_beyond_the_forward_pass(benchmark: Any, choice: str) -> None:
    """A forward pass of 128 pictures, plain and watched, and the watching alone on its outputs, in turns; and the report of a few batches.

    The watching alone is what tells: the difference of two long passes is below the noise of a shared machine.
    """
    layers, options = CHOICES[choice]
    model = network()
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.standard_normal((BATCH, 3, 32, 32)), dtype=torch.float32)
    y = torch.as_tensor(np.arange(BATCH) % 10)
    with torch.no_grad():
        replay = Replay(model, x)
    inside, apart = (Monitor(m, layers, head="head", classes=10, **options) for m in (model, replay))

    def watched() -> Any:
        with inside.watch(y):
            return model(x)

    def alone() -> Any:
        with apart.watch(y):
            return replay()

    least = {}
    with torch.no_grad():
        assert torch.equal(model(x), watched())
        for _ in range(5):
            for name, call, repeats in (("plain", lambda: model(x), 1), ("watched", watched, 1), ("alone", alone, 5)):
                for _ in range(repeats):
                    start = time.process_time()
                    call()
                    least[name] = min(least.get(name, np.inf), time.process_time() - start)
    start = time.process_time()
    report = inside.report()
    batches = (time.process_time() - start) / least["plain"]
    assert np.isfinite(report["head"].values["nc3"])
    share, difference = least["alone"] / least["plain"], least["watched"] / least["plain"] - 1
    benchmark.extra_info |= least | {"share": share, "difference": difference, "report_in_batches": batches}
    print(
        f"\n{choice}: watching costs {100 * share:.1f} % of the forward pass of {1e3 * least['plain']:.0f} ms (difference of passes "
        f"{100 * difference:.1f} %); the report costs {batches:.2f} passes"
    )
    benchmark.pedantic(alone, rounds=1)


def test_report_of_an_epoch(benchmark: Any) -> None:
    """The report of 50,000 samples of 512 features, kept, against one batch of 128 through ResNet-18; an epoch is 391 of these."""
    rng = np.random.default_rng(0)
    y = torch.as_tensor(rng.integers(0, 10, 50000))
    H = torch.as_tensor(rng.standard_normal((10, 512)), dtype=torch.float32)[y]
    H = torch.relu(H + 0.3 * torch.as_tensor(rng.standard_normal((50000, 512)), dtype=torch.float32))
    head = nn.Sequential(nn.Linear(512, 10))
    model, x = network(), torch.zeros(BATCH, 3, 32, 32)
    least = {"report": np.inf, "batch": np.inf}
    for _ in range(3):
        monitor = Monitor(head, head="", classes=10)
        with torch.no_grad():
            for X, Y in zip(H.split(BATCH), y.split(BATCH), strict=True):
                with monitor.watch(Y):
                    head(X)
            start = time.process_time()
            monitor.report()
            least["report"] = min(least["report"], time.process_time() - start)
            start = time.process_time()
            model(x)
            least["batch"] = min(least["batch"], time.process_time() - start)
    batches = least["report"] / least["batch"]
    benchmark.extra_info |= {"report_s": least["report"], "batches": batches}
    print(f"\nreport of 50,000 samples: {least['report']:.2f} s, {batches:.2f} batches, {100 * batches / 391:.2f} % of an epoch forward")
    benchmark.pedantic(lambda: model(x), rounds=1)
