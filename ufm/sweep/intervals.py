"""Intervals of shares over seeds."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def wilson(count: Any, runs: Any, level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's interval of the share count/runs, two arrays of their shape (Wilson 1927); it holds the share itself."""
    n, z = np.asarray(runs, dtype=np.float64), NormalDist().inv_cdf(0.5 + level / 2)
    share = np.asarray(count) / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.minimum(np.maximum(middle - half, 0.0), share), np.maximum(np.minimum(middle + half, 1.0), share)
