"""The nearest simplex ETF and its gradient against one bare SVD, and a batch against a loop: ratios of CPU time in one process, one thread.

`pytest tests/benchmarks/test_etf_speed.py -s`. Nothing here asserts a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from test_speed import in_turns, one_thread, report  # noqa: F401  (a fixture)
from ufm.etf import nearest, pullback


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["random", "near collapse", "ill-conditioned"])
@pytest.mark.parametrize(("d", "K", "turns"), [(512, 10, 60), (512, 100, 60), (2048, 1000, 3)])
def test_forward_and_backward(benchmark: Any, d: int, K: int, turns: int, kind: str, dtype: str) -> None:
    """Both against numpy's thin SVD of the same matrix, which any closed form would need at least once."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(d, K))
    if kind != "random":
        P, s, Qt = np.linalg.svd(X - X.mean(axis=1, keepdims=True), full_matrices=False)
        X = (P * (1 + 1e-3 * s if kind == "near collapse" else np.geomspace(1, 1e-6, K)) * (s > 1e-9)) @ Qt
    X, g = X.astype(dtype), rng.normal(size=(K, d)).astype(dtype)

    def ours() -> Any:
        return pullback(nearest(X), g)

    def theirs() -> Any:
        return np.linalg.svd(X, full_matrices=False)

    assert np.all(np.isfinite(ours()))
    a, b = in_turns(ours, theirs, turns)
    report(benchmark, f"({d}, {K}) {kind}, {dtype}, {nearest(X).method}: forward and backward cost {a / b:.2f} SVDs", a, b)
    benchmark.pedantic(ours, rounds=3)


def test_batch(benchmark: Any) -> None:
    """64 problems (64, 10) at once against one after the other."""
    rng = np.random.default_rng(0)
    X, g = rng.normal(size=(64, 64, 10)), rng.normal(size=(64, 10, 64))

    def ours() -> Any:
        return pullback(nearest(X), g)

    def theirs() -> Any:
        return np.stack([pullback(nearest(x), y) for x, y in zip(X, g, strict=True)])

    expected = theirs()
    assert np.abs(ours() - expected).max() <= 1e-12 * np.abs(expected).max()
    a, b = in_turns(ours, theirs, 60)
    report(benchmark, "64 problems (64, 10)", a, b)
    benchmark.pedantic(ours, rounds=3)
