"""The accelerator benchmark runs at toy sizes on a CPU, counts the products that descent makes, and reports in one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ufm import rules, starts
from ufm.headed import coordinates
from ufm.problem import Problem

torch = pytest.importorskip("torch")
from torch.overrides import TorchFunctionMode  # noqa: E402

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gpu_script"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_it_runs_small_on_a_cpu() -> None:
    """One JSON document on stdout, lines on stderr; every rate is positive, every ratio that of its parts."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["command"].endswith("gpu.py --device cpu --small")
    assert report["device"]["versions"]["torch"] == torch.__version__
    a, b, c = report["descent"], report["nearest_etf"], report["resnet18"]
    assert a["ratio_to_one_core"] == pytest.approx(a["model_steps_per_s"] / a["numpy_one_core"]["model_steps_per_s"])
    assert a["share_of_bmm_rate"] == pytest.approx(a["gflops"] / a["bmm"]["gflops"])
    assert a["model_steps_per_s"] == pytest.approx(a["steps_per_s"] * a["block"])
    assert b["orthogonality"] < 1e-12
    assert b["backward_over_svd"] == pytest.approx(b["backward_s"] / b["svd_s"])
    for part in ("forward", "training"):
        assert c[f"{part}_on_over_off"] == pytest.approx(c[f"{part}_on_s"] / c[f"{part}_off_s"])
    numbers = [v for part in (a, b, c) for v in part.values() if isinstance(v, float)]
    assert len(numbers) >= 15
    assert min(numbers) > 0
    assert len(done.stderr.splitlines()) == 5
    assert "descent:" in done.stderr


def test_no_such_device_is_one_sentence(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cuda:99", "--small"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    assert "device 'cuda:99' is not to be had here" in capsys.readouterr().err


@pytest.mark.parametrize("depth", [1, 3])
def test_the_products_timed_are_those_of_a_step(script: Any, depth: int) -> None:
    """The shapes that the bare library call is timed on are the shapes multiplied in one step of descent, sums over rows apart."""
    sizes = script.Sizes(classes=4, width=6, depth=depth)
    problem: Problem = script.deep_model(sizes)
    frame, rule = coordinates(problem.pick([0, 0]), "cpu"), rules.GradientDescent(0.1)
    draws = starts.first_factors(problem, starts.normal(), 2, 0, frame.objective.chain)
    x = frame.from_factors([torch.tensor(f) for f in draws])
    state, seen = rule.start(frame, x, np.zeros(2, dtype=np.int64)), []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in ("__matmul__", "matmul", "bmm", "baddbmm") and args[0].shape[-2] > 1:
                seen.append((args[0].shape[-2], args[0].shape[-1], args[1].shape[-1]))
            return function(*args, **(kwargs or {}))

    with Products():
        rule.advance(frame, x, state)
    assert sorted(seen) == sorted(script.products(sizes))


def test_descent_is_under_way_while_it_is_timed(script: Any) -> None:
    """At the sizes reported F falls in every run over the steps timed, and none is near rest."""
    sizes = script.Sizes()
    rule = script.ufm.rules.GradientDescent(0.05)
    run = script.ufm.simulate(script.deep_model(sizes), rule, runs=4, steps=200, every=50, start=starts.normal())
    assert np.all(np.diff(run.value, axis=1) < 0)
    assert np.all(run.gradient_norm[:, -1] > 1e-3)
