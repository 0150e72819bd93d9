"""The published numbers of rhubarbwu/neural-collapse, its own code in float64, on its three cases: random, exactly collapsed, K > d.

Twelve digits are published. Its float32 buffer leaves CDNV, log kernels and kernel variances good to 1e-8, distance-kernel means to 3e-7.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from ufm import metrics

TINY = 1e-14  # B's numbers are rounding: an absolute bound


class Row(NamedTuple):
    """A metric, its numbers in A, B and F (None where B's is rounding), and how far they hold; None: to all twelve digits."""

    name: str
    A: float
    B: float | None
    F: float
    close: float | None = None


TABLE = (
    Row("nc1", 0.0901366855862, None, 0.171704932318),
    Row("nc1_quotient", 0.250791171230, None, 0.241959041705),
    Row("cdnv", 0.118745357, None, 0.20617411, 1e-8),
    Row("nc2", 0.479818714438, None, 0.825215601363),
    Row("nc3", 1.53713208196, None, 1.28163416017),
    Row("distance_kernel.mean", 1.4852729, 1.4907122, 1.4529206, 3e-7),
    Row("distance_kernel.variance", 0.013342017, None, 0.095062561, 1e-8),
    Row("log_distance_kernel.mean", -0.39256123, -0.39925385, -0.34045643, 1e-8),
    Row("log_distance_kernel.variance", 0.0060963049, None, 0.085965209, 1e-8),
    Row("duality_variance", 22.7550675225, None, 3.80617254203),
    Row("duality_cosine", -0.113915446021, 1.0, 0.201743720731),
    Row("duality_distance", 1.48921231596, None, 1.21723851167),
    Row("nc4", 0.036, 1.0, 0.218),
    Row("nc5", 0.144981671618, 0.104116861337, 0.354716946385),
    Row("equinorm", 0.111022289080, None, 0.230321059665),
)


def case(name: str) -> tuple[Any, Any, Any]:
    """H (1, d, 500), labels (500,), W (1, 10, d)."""
    y = np.repeat(np.arange(10), 50)
    if name == "B":
        Q, R = np.linalg.qr(np.random.default_rng(1).standard_normal((32, 10)))
        E = np.sqrt(10 / 9) * (Q * np.sign(np.diagonal(R))) @ (np.eye(10) - 0.1)
        return 2 * E[None][:, :, y], y, E.T[None]
    seed, d = {"A": (0, 32), "F": (4, 5)}[name]
    rng = np.random.default_rng(seed)
    mu = rng.standard_normal((10, d))
    H = mu[y] + 0.5 * rng.standard_normal((500, d))
    return H.T[None], y, rng.standard_normal((10, d))[None]


def measured(name: str) -> dict[str, float]:
    H, y, W = case(name)
    s = metrics.class_statistics(H, y, 10)
    M, g = s.means, np.random.default_rng(9).standard_normal(H.shape[1])
    kernel, logs = metrics.distance_kernel(M), metrics.log_distance_kernel(M)
    values = {
        "nc1": metrics.nc1(s),
        "nc1_quotient": metrics.nc1_quotient(s),
        "cdnv": metrics.cdnv(M, s.variances),
        "nc2": metrics.nc2(M),
        "nc3": metrics.nc3(W, M),
        "distance_kernel.mean": kernel.mean,
        "distance_kernel.variance": kernel.variance,
        "log_distance_kernel.mean": logs.mean,
        "log_distance_kernel.variance": logs.variance,
        "duality_variance": metrics.duality_variance(W, M),
        "duality_cosine": metrics.duality_cosine(W, M),
        "duality_distance": metrics.duality_distance(W, M),
        "nc4": metrics.nc4(H, W, M),
        "nc5": metrics.nc5(M, g),
        "equinorm": metrics.equinorm(M),
    }
    return {key: float(value[0]) for key, value in values.items()}


MEASURED = {name: measured(name) for name in "ABF"}


@pytest.mark.parametrize("name", "ABF")
@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_published_number(row: Row, name: str) -> None:
    published, got = getattr(row, name), MEASURED[name][row.name]
    if published is None:
        assert 0 <= got < TINY
    elif row.close is None:
        assert f"{got:.11e}" == f"{published:.11e}"
    else:
        assert got == pytest.approx(published, rel=0, abs=row.close)


def test_exact_collapse() -> None:
    """An exact ETF has distance-kernel mean sqrt(2K/(K-1)) = 1.490711985 and NC1 = 0, which float32 misses by 2e-7."""
    exact = (20 / 9) ** 0.5
    assert MEASURED["B"]["distance_kernel.mean"] == pytest.approx(exact, rel=1e-12)
    assert MEASURED["B"]["log_distance_kernel.mean"] == pytest.approx(-np.log(exact), rel=1e-12)
    assert MEASURED["B"]["nc1"] < 1e-30
