"""What a solver of one block hands back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ufm.records import Stop


class Outcome(NamedTuple):
    """End points x (B, n) in balanced coordinates, why each run ended, gradient evaluations and repair rounds."""

    x: NDArray[np.float64]
    stop: tuple[Stop, ...]
    steps: NDArray[np.int64]
    rounds: NDArray[np.int64]
