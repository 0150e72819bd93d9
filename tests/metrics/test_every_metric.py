"""The laws of every metric: its formula by loops, batches, libraries and devices, precision of the input, broken runs, symmetries."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog import LIBRARIES, to_library
from metric_catalog import METRICS, POINTS, Point, one
from ufm import metrics
from ufm.arrays import device_of, to_numpy

ROOT = Path(__file__).parents[2]
EVERY = pytest.mark.parametrize("name", METRICS)
# on a line some unit vectors coincide exactly: the logarithm of their distance is infinite; an ETF has no room there and in "narrow"
EMPTY = {"line": ("log_distance", "etf"), "narrow": ("etf",)}
FINITE = [(where, name) for where in POINTS for name in METRICS if not name.startswith(EMPTY.get(where, ("\0",)))]


def each(*places: str) -> list[tuple[str, str]]:
    return [(where, name) for where, name in FINITE if where in places]


TURNED = [name for name in METRICS if not name.startswith(("means", "dead", "nc2_h", "gram_distance"))]  # the others name coordinates
OF_FEATURES = [name for name in METRICS if name != "counts"]
NEW = ("ncc", "cosine", "sorted_cosine", "own_cosine", "etf_separation", "equinorm_difference")
OF_BOTH = [name for name in METRICS if name.startswith(("nc3", "nc4", "bias", "duality", "nc2_w", "target_distances", "balance", *NEW))]


def values(name: str, p: Point) -> Any:
    return to_numpy(METRICS[name][0](p))


@pytest.mark.parametrize(("where", "name"), FINITE)
def test_formula(where: str, name: str) -> None:
    """Each run's number is that of the loops; near collapse residuals of 1e-7 leave the loops' covariances seven digits."""
    p = POINTS[where]
    got = values(name, p)
    assert got.dtype == np.float64
    for b in range(len(p.H)):
        expected = METRICS[name][1](one(p, b))
        assert got[b] == pytest.approx(expected, rel=1e-7 if where == "nearly collapsed" else 1e-11, abs=1e-12)


@pytest.mark.parametrize(("where", "name"), each("imbalanced", "narrow", "relu"))
def test_batch_is_its_runs(name: str, where: str) -> None:
    """A run's number does not depend on the runs beside it, and the runs axis stays."""
    p = POINTS[where]
    together = values(name, p)
    apart = np.concatenate([values(name, p.run(b)) for b in range(len(p.H))])
    assert together.shape == apart.shape
    assert together == pytest.approx(apart, rel=1e-12, abs=1e-13)


@EVERY
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_agrees(name: str, library: str) -> None:
    """numpy, torch, the strict reference and its second device give the same numbers, in their own arrays."""
    p = POINTS["imbalanced"]
    on = p.map(lambda x: to_library(library, x))
    got = METRICS[name][0](on)
    assert (type(got), got.dtype, device_of(got)) == (type(on.H), on.H.dtype, device_of(on.H))
    assert to_numpy(got) == pytest.approx(values(name, p), rel=1e-12, abs=1e-13)


@EVERY
def test_meta_device(name: str) -> None:
    """Nothing is made on the default device: tensors without memory go through, in the right shapes."""
    torch = pytest.importorskip("torch")
    p = POINTS["imbalanced"]
    got = METRICS[name][0](p.map(lambda x: torch.asarray(x).to("meta")))
    assert got.device.type == "meta"
    assert tuple(got.shape) == values(name, p).shape


@EVERY
def test_single_precision_is_widened(name: str) -> None:
    """float32 and integer input is computed in float64: the number is that of the widened input, to its last digits."""
    p = POINTS["imbalanced"].map(lambda x: x if x.dtype.kind == "i" else np.float32(np.round(4 * x)))
    assert values(name, p) == pytest.approx(values(name, p.map(lambda x: x if x.dtype.kind == "i" else np.float64(x))), rel=1e-15)
    whole = p.map(lambda x: x.astype(np.int32))
    assert values(name, whole) == pytest.approx(values(name, p), rel=1e-13, abs=1e-14, nan_ok=True)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_broken_runs_are_nan_and_alone(name: str) -> None:
    """A run that has diverged gives NaN, whatever it holds, and touches no other run."""
    p = POINTS["imbalanced"]
    for bad in (np.nan, np.inf, -np.inf):
        arrays = p.map(np.array)
        for x in (arrays.H, arrays.means, arrays.variances, arrays.W, arrays.inner):
            x[(1,) + (-1,) * (x.ndim - 1)] = bad
        broken = replace(arrays, bias=p.bias)
        got, whole = values(name, broken), values(name, p)
        assert np.isnan(got[1]).any()
        assert got[[0, 2]] == pytest.approx(whole[[0, 2]], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize(("where", "name"), [x for x in each("imbalanced", "narrow", "wide", "two classes") if x[1] in TURNED])
def test_rotations_change_nothing(name: str, where: str) -> None:
    """H -> Q H, W -> W Q^T with Q orthogonal leaves every metric but those that name coordinates."""
    p = POINTS[where]
    d = p.H.shape[1]
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    turned = replace(p, H=Q @ p.H, means=Q @ p.means, W=p.W @ Q.T, inner=Q @ p.inner @ Q.T, direction=p.direction @ Q.T)
    assert values(name, turned) == pytest.approx(values(name, p), rel=1e-10, abs=1e-12)


def test_every_public_metric_is_in_the_catalogue() -> None:
    """A metric that is not a row of the catalogue is tried against no law."""
    rows = {name.split()[0] for name in METRICS}
    functions = {name for name in metrics.__all__ if name[0].islower()} - {"class_statistics", "from_scatter"}
    assert functions == rows - {"means", "variances", "counts"}


@pytest.mark.parametrize("name", OF_BOTH)
def test_misplaced_array_is_noticed(name: str) -> None:
    """With W left on another device than features and means, a metric of both refuses: the check on the second device can fail."""
    p = POINTS["imbalanced"]
    on = p.map(lambda x: to_library("strict_device1", x))
    with pytest.raises(ValueError, match="device"):
        METRICS[name][0](replace(on, W=to_library("strict", p.W)))


def test_libraries_do_not_mix() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="namespace"):
        metrics.nc4(POINTS["imbalanced"].H, torch.asarray(POINTS["imbalanced"].W), POINTS["imbalanced"].means)


def test_read_only_constants() -> None:
    """Frozen counts, labels and targets, such as a problem's, go with any library, without a warning."""
    torch = pytest.importorskip("torch")
    p = POINTS["imbalanced"]
    means, counts, labels = torch.asarray(p.means), np.array(p.counts), np.arange(4)
    target, direction = np.eye(4), np.ones(6)
    for x in (counts, labels, target, direction):
        x.setflags(write=False)
    expected = metrics.nc2(p.means, centre="samples", counts=p.counts)
    assert to_numpy(metrics.nc2(means, centre="samples", counts=counts)) == pytest.approx(expected)
    assert to_numpy(metrics.nc2_w(means.mT, means, counts)) == pytest.approx(metrics.nc2_w(p.means.swapaxes(1, 2), p.means, p.counts))
    assert metrics.gram_distance(means.mT @ means, target).shape == metrics.nc5(means, direction).shape == (3,)
    assert metrics.class_statistics(means, labels, 4, counts).counts.tolist() == p.counts.tolist()


def test_import_is_light() -> None:
    """`import ufm.metrics` adds the room itself, frames and nothing heavy."""
    code = "import sys, ufm.metrics; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"scipy", "torch", "matplotlib", "pymanopt", "autograd", "plotly"})
