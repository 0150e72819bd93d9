"""What an accelerator gives, against one core and against bare library calls of the same sizes, measured in one run.

    python tests/benchmarks/gpu.py --device cuda [--root DIR]      the full sizes; readable lines on stderr, one JSON document on stdout
    python tests/benchmarks/gpu.py --device cpu --small            the same program at toy sizes, in seconds

Times are the least of several repeats after a warm-up, with the device synchronised before every reading of the clock.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

import ufm
from ufm import etf
from ufm.arrays import NoDevice
from ufm.bridge import data, models
from ufm.bridge.monitor import Monitor
from ufm.bridge.place import device_record

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the default is what is reported."""

    models: int = 4096
    on_one_core: int = 64
    classes: int = 10
    width: int = 64
    depth: int = 3
    steps: int = 50  # between two readings of the clock
    etf: tuple[int, int] = (2048, 1000)
    images: int = 50_000
    batch: int = 128
    channels: int = 64
    repeats: int = 3


SMALL = Sizes(models=48, on_one_core=16, steps=5, etf=(48, 10), images=32, batch=16, channels=2, repeats=1)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The least wall time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


# --- descent -------------------------------------------------------------------------------------------------------------------------


def deep_model(sizes: Sizes) -> ufm.Problem:
    """Class means of a deep linear model."""
    counts = ufm.counts.balanced(sizes.classes, 100)
    return ufm.Problem(counts, width=sizes.width, depth=sizes.depth, features="free", lam_w=1e-3, lam_h=1e-5)


def step_seconds(sizes: Sizes, device: str, runs: int) -> tuple[float, int]:
    """The least time of a step of `ufm.simulate` for a block of runs, and how many runs that block has.

    The clock is read at the records, by which the device has finished: the steps between two of them are timed, record included.
    """
    readings: list[tuple[int, int, float]] = []

    def clock(at: Any) -> Any:
        readings.append((at.step, len(at.runs), time.perf_counter()))
        return np.zeros(len(at.runs))

    steps = sizes.steps * (sizes.repeats + 1)
    rule = ufm.rules.GradientDescent(0.05)
    start = ufm.starts.normal()
    end = ufm.simulate(deep_model(sizes), rule, runs=runs, steps=steps, every=sizes.steps, probes=[clock], start=start, device=device)
    if not np.all(np.isfinite(end.value)):
        raise SystemExit("descent diverged: its steps are not those that would be timed")
    spans = [(t1 - t0, n) for (s0, n, t0), (s1, _, t1) in pairwise(readings) if s1 > s0]
    best, block = min(spans, key=lambda span: span[0] / span[1])
    return best / sizes.steps, block


def products(sizes: Sizes) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of one step, m x k times k x n: the chain forward, then a weight's and a layer's gradient each."""
    K, d, L = sizes.classes, sizes.width, sizes.depth
    forward = [(d, d, K)] * (L - 1) + [(K, d, K)]
    back = [(K, K, d), (d, K, K)] + [(d, K, d), (d, d, K)] * (L - 1)
    return forward + back


def descent(sizes: Sizes, device: str) -> Result:
    """Gradient descent on many models at once, against numpy on one core and against batched products of the same shapes alone."""
    step, block = step_seconds(sizes, device, sizes.models)
    core_step, core_block = step_seconds(sizes, "numpy", sizes.on_one_core)
    bare = 0.0
    for m, k, n in products(sizes):
        A, B = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((block, m, k), (block, k, n)))
        bare += seconds(lambda A=A, B=B: torch.bmm(A, B), device, sizes.repeats)
    flops = 2 * sum(m * k * n for m, k, n in products(sizes))
    rate, core_rate = block / step, core_block / core_step
    return {
        "models": sizes.models,
        "block": block,
        "steps_per_s": 1 / step,
        "model_steps_per_s": rate,
        "gflops": flops * rate / 1e9,
        "numpy_one_core": {"block": core_block, "model_steps_per_s": core_rate, "gflops": flops * core_rate / 1e9},
        "ratio_to_one_core": rate / core_rate,
        "bmm": {"seconds_per_step": bare, "gflops": flops * block / bare / 1e9},
        "share_of_bmm_rate": bare / step,
    }


# --- nearest ETF ---------------------------------------------------------------------------------------------------------------------


def nearest(sizes: Sizes, device: str) -> Result:
    """The nearest simplex ETF and its gradient, against the bare SVD of the same matrix."""
    d, K = sizes.etf
    generator = torch.Generator().manual_seed(0)
    X, G = (torch.randn(shape, dtype=torch.float64, generator=generator).to(device) for shape in ((d, K), (K, d)))
    near = etf.nearest(X)
    svd = seconds(lambda: torch.linalg.svd(X, full_matrices=False), device, sizes.repeats)
    forward = seconds(lambda: etf.nearest(X), device, sizes.repeats)
    backward = seconds(lambda: etf.pullback(near, G), device, sizes.repeats)
    return {
        "shape": [d, K],
        "method": near.method,
        "orthogonality": float(near.orthogonality),
        "svd_s": svd,
        "forward_s": forward,
        "backward_s": backward,
        "forward_over_svd": forward / svd,
        "backward_over_svd": backward / svd,
    }


# --- ResNet-18 with a monitor --------------------------------------------------------------------------------------------------------


def images(sizes: Sizes, device: str, root: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 32, 32) and labels on the device: CIFAR-10 where a root is given, else noise of its shape."""
    if root is not None:
        found = data.cifar(root)
        return found.inputs[: sizes.images].to(device), found.labels[: sizes.images].to(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (sizes.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return pixels.to(device), (torch.arange(sizes.images) % 10).to(device)


def resnet(sizes: Sizes, device: str, root: str | None) -> Result:
    """An epoch of ResNet-18, forward alone and in training, with a Monitor of the last layer's features and classifier on and off."""
    pixels, labels = images(sizes, device, root)
    torch.manual_seed(0)
    body = models.resnet18(width=sizes.channels)
    model = models.Network(body, nn.Linear(body.out_features, 10)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = [slice(i, i + sizes.batch) for i in range(0, len(labels), sizes.batch)]

    def epoch(training: bool, monitored: bool) -> None:
        monitor = Monitor(model, head="head", classes=10) if monitored else None
        model.train(training)
        with nullcontext() if training else torch.no_grad():
            for rows in batches:
                x, y = (pixels[rows].float() - 128) / 64, labels[rows]
                with nullcontext() if monitor is None else monitor.watch(y):
                    z = model(x)
                if training:
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(z, y).backward()
                    optimiser.step()
        if monitor is not None:
            monitor.report()

    times = {
        f"{part}_{'on' if on else 'off'}_s": seconds(lambda t=part == "training", on=on: epoch(t, on), device, sizes.repeats)
        for part in ("forward", "training")
        for on in (False, True)
    }
    return {
        "images": len(labels),
        "data": "noise of CIFAR's shape" if root is None else "CIFAR-10",
        "parameters": sum(p.numel() for p in model.parameters()),
        **times,
        "forward_on_over_off": times["forward_on_s"] / times["forward_off_s"],
        "training_on_over_off": times["training_on_s"] / times["training_off_s"],
    }


def told(report: Result) -> list[str]:
    """The report in lines."""
    a, b, c, device = report["descent"], report["nearest_etf"], report["resnet18"], report["device"]
    core, bmm = a["numpy_one_core"], a["bmm"]
    return [
        f"{device['name']} ({device['device']}), torch {device['versions']['torch']}: {report['command']}",
        f"descent: {a['steps_per_s']:.4g} steps/s of {a['block']} models at once, {a['model_steps_per_s']:.4g} model-steps/s, "
        f"{a['gflops']:.4g} GFLOP/s; one core, numpy: {core['model_steps_per_s']:.4g} model-steps/s; ratio {a['ratio_to_one_core']:.3g}",
        f"         its products alone (torch.bmm): {bmm['gflops']:.4g} GFLOP/s; descent reaches {100 * a['share_of_bmm_rate']:.3g} % of it",
        f"nearest ETF {tuple(b['shape'])}: forward {b['forward_s']:.3g} s, backward {b['backward_s']:.3g} s, bare SVD {b['svd_s']:.3g} s; "
        f"ratios {b['forward_over_svd']:.3g} and {b['backward_over_svd']:.3g}",
        f"ResNet-18, {c['images']} images ({c['data']}): forward {c['forward_off_s']:.3g} s, with Monitor {c['forward_on_s']:.3g} s "
        f"({c['forward_on_over_off']:.3g}); training {c['training_off_s']:.3g} s, with Monitor {c['training_on_s']:.3g} s "
        f"({c['training_on_over_off']:.3g})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--root", default=None, help="folder that holds cifar-10-batches-bin; noise of its shape without")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)  # more of them slow small products down by two orders of magnitude
    try:
        device = device_record(options.device)
    except NoDevice as error:
        parser.error(str(error))
    sizes = SMALL if options.small else Sizes()
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device,
        "descent": descent(sizes, options.device),
        "nearest_etf": nearest(sizes, options.device),
        "resnet18": resnet(sizes, options.device, options.root),
    }
    print("\n".join(told(report)), file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
