"""Laws of the class-count patterns, tried on each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ufm import counts

PATTERNS = [
    ("balanced", lambda K, n, ratio: counts.balanced(K, n)),
    ("step", lambda K, n, ratio: counts.step(K, n, ratio)),
    ("exponential", lambda K, n, ratio: counts.exponential(K, n, ratio)),
    ("linear", lambda K, n, ratio: counts.linear(K, n, round(n * ratio))),
]


@pytest.mark.parametrize(("name", "pattern"), PATTERNS, ids=[name for name, _ in PATTERNS])
@given(K=st.integers(2, 200), n=st.integers(1, 10_000), ratio=st.floats(1, 1e4))
def test_every_pattern(name: str, pattern: Any, K: int, n: int, ratio: float) -> None:
    """K whole numbers, largest first, at least 1 each."""
    n_k = pattern(K, n, ratio)
    assert n_k.shape == (K,)
    assert n_k.dtype == np.int64
    assert np.all(n_k >= 1)
    assert np.all(np.diff(n_k) <= 0)


def test_balanced() -> None:
    assert counts.balanced(3, 7).tolist() == [7, 7, 7]


def test_step() -> None:
    """The minority comes last, K//2 classes unless said; the majority is n_min * ratio, rounded."""
    assert counts.step(5, 10, 2.5).tolist() == [25, 25, 25, 10, 10]
    assert counts.step(4, 3, 1.4, minority=1).tolist() == [4, 4, 4, 3]
    assert counts.step(3, 2, 10, minority=0).tolist() == [20, 20, 20]
    assert counts.step(3, 2, 10, minority=3).tolist() == [2, 2, 2]


def test_exponential_is_the_long_tailed_data_set() -> None:
    """CIFAR-10-LT at ratio 100, and CIFAR-100-LT's ends, as the data sets' own code draws them."""
    assert counts.exponential(10, 5000, 100).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts.exponential(100, 500, 100)[[0, 1, -2, -1]].tolist() == [500, 477, 5, 5]


@given(K=st.integers(2, 50), n_min=st.integers(1, 1000), ratio=st.integers(1, 1000))
def test_exponential_ends(K: int, n_min: int, ratio: int) -> None:
    """A whole ratio that divides the largest class is met exactly: floor loses no sample to rounding."""
    n_k = counts.exponential(K, n_min * ratio, ratio)
    assert (n_k[0], n_k[-1]) == (n_min * ratio, n_min)


@given(K=st.integers(2, 50), n_min=st.integers(1, 1000), more=st.integers(0, 1000))
def test_linear(K: int, n_min: int, more: int) -> None:
    """Both ends are met, and every class is within half a sample of the straight line."""
    n_k = counts.linear(K, n_min, n_min + more)
    line = [n_min + more * (K - 1 - k) / (K - 1) for k in range(K)]
    assert (n_k[0], n_k[-1]) == (n_min + more, n_min)
    assert np.max(np.abs(n_k - line)) <= 0.5 + 1e-9


NAN = float("nan")
INF = float("inf")
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("balanced", (1, 5), "K is 1"),
    ("balanced", (2.5, 5), "K is 2.5"),
    ("balanced", (NAN, 5), "K is nan"),
    ("balanced", (4.0, 5), "K is 4.0"),
    ("balanced", (INF, 5), "K is inf"),
    ("balanced", ("3", 5), "K is '3'"),
    ("balanced", (3, 0), "n is 0"),
    ("balanced", (3, NAN), "n is nan"),
    ("balanced", (3, "5"), "n is '5'"),
    ("balanced", (3, None), "n is None"),
    ("step", (4, 0, 10), "n_min is 0"),
    ("step", (4, -1, 10), "n_min is -1"),
    ("step", (4, 1.5, 10), "n_min is 1.5"),
    ("step", (4, 5, 0.5), "ratio is 0.5"),
    ("step", (4, 5, NAN), "ratio is nan"),
    ("step", (4, 5, INF), "ratio is inf"),
    ("step", (4, 5, 10, 5), "minority is 5"),
    ("step", (4, 5, 10, -1), "minority is -1"),
    ("step", (4, 5, 10, 1.5), "minority is 1.5"),
    ("step", (4, 5, 10, 2.0), "minority is 2.0"),
    ("exponential", (4, 0, 10), "n_max is 0"),
    ("exponential", (4, 10, 0), "ratio is 0"),
    ("linear", (4, 10, 5), "n_max is 5"),
    ("linear", (4, 0, 5), "n_min is 0"),
    ("linear", (4, 1, INF), "n_max is inf"),
]


@pytest.mark.parametrize(("name", "arguments", "part"), BAD, ids=[f"{name}{arguments}" for name, arguments, _ in BAD])
def test_bad_input(name: str, arguments: tuple[Any, ...], part: str) -> None:
    """One sentence that names the call and the value."""
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(counts, name)(*arguments)
    message = str(caught.value)
    assert message.startswith(f"counts.{name}: {part}")
    assert "\n" not in message
