"""Wilson's interval against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ufm import sweep


@pytest.mark.parametrize("level", [0.95, 0.5, 0.999])
@pytest.mark.parametrize("runs", [1, 2, 10, 400])
def test_wilson_is_scipys_and_holds_the_share(runs: int, level: float) -> None:
    counts = np.unique(np.linspace(0, runs, 7).round().astype(int))
    low, high = sweep.wilson(counts, runs, level)
    for count, a, b in zip(counts, low, high, strict=True):
        exact = binomtest(int(count), runs).proportion_ci(level, method="wilson")
        assert (a, b) == pytest.approx((exact.low, exact.high), rel=1e-12, abs=1e-15)
        assert 0 <= a <= count / runs <= b <= 1
    scalar = sweep.wilson(int(counts[1]), runs, level)
    assert np.shape(scalar[0]) == ()
    assert float(scalar[0]) == low[1]
