"""The monitor against `ufm.metrics` on the collected features: every number and array it yields, in one pass, over awkward data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from ufm import frames, metrics  # noqa: E402
from ufm.bridge import models  # noqa: E402
from ufm.bridge.heads import FixedETFHead, NearestETFHead  # noqa: E402
from ufm.bridge.lightning import lightning_callback  # noqa: E402
from ufm.bridge.moments import Asked, Batch, Moments  # noqa: E402
from ufm.bridge.monitor import Monitor  # noqa: E402
from ufm.bridge.readings import ARRAYS, NUMBERS, Report  # noqa: E402

ALL = {"measure": "full", "keep": "all"}


@dataclass(frozen=True)
class Case:
    """A three-layer MLP, labels in some order, and the sizes of the batches they come in."""

    widths: tuple[int, ...]
    counts: tuple[int, ...]
    batches: tuple[int, ...]
    dtype: Any = torch.float64
    sort: bool = False
    seed: int = 0

    @property
    def classes(self) -> int:
        return len(self.counts)

    def model(self) -> Any:
        with models.seeded(self.seed):
            return models.Network(models.mlp(self.widths), nn.Linear(self.widths[-1], self.classes)).to(self.dtype)

    def data(self) -> tuple[Any, Any]:
        rng = np.random.default_rng(self.seed)
        y = np.repeat(np.arange(self.classes), self.counts)
        y = y if self.sort else rng.permutation(y)
        x = rng.standard_normal((self.classes, self.widths[0]))[y] + 0.5 * rng.standard_normal((len(y), self.widths[0]))
        return torch.as_tensor(x).to(self.dtype), torch.as_tensor(y)


CASES = {
    "balanced": Case((7, 12, 9, 8), (10, 10, 10, 10), (13, 13, 13, 1)),
    "imbalanced": Case((5, 9, 8, 7), (40, 9, 3, 1, 1), (20, 20, 14), seed=1),
    "classes missing in batches": Case((5, 9, 8, 7), (12, 7, 5, 2), (5, 4, 3, 14), sort=True, seed=2),
    "one sample a batch": Case((4, 6, 6, 5), (4, 3, 5), (1,) * 12, seed=3),
    "two classes": Case((6, 8, 7, 5), (20, 11), (17, 14), seed=4),
    "fewer features than classes": Case((6, 8, 4, 3), (5, 6, 7, 4, 5, 3), (9, 9, 12), seed=5),
    "width one": Case((6, 5, 4, 1), (5, 6, 7), (10, 8), seed=6),
    "wider than the data": Case((6, 40, 40, 40), (5, 4, 3), (7, 5), seed=7),
    "many samples, narrow": Case((6, 5, 5, 4), (900, 700, 50), (450, 600, 600), seed=8),
    "single precision": Case((7, 12, 9, 8), (10, 6, 3, 10), (13, 16), torch.float32, seed=9),
    "bfloat16": Case((7, 12, 9, 8), (10, 6, 3, 10), (13, 16), torch.bfloat16, seed=10),
}


@dataclass(frozen=True)
class Collected:
    """Features (1, d, N) of one layer, as numpy sees them, and the classifier behind."""

    H: Any
    y: Any
    K: int
    W: Any = None
    b: Any = None
    logits: Any = None
    centre: str = "classes"
    weights: str = "classes"
    targets: Any = None
    chain: Any = None
    penalties: Any = None

    @property
    def stats(self) -> Any:
        return metrics.class_statistics(self.H, self.y, self.K)

    @property
    def M(self) -> Any:
        return self.stats.means

    @property
    def n(self) -> Any:
        return np.bincount(self.y)

    @property
    def C(self) -> Any:
        share = self.n / self.n.sum() if self.centre == "samples" else 1 / self.K
        return self.M - np.sum(self.M * share, axis=-1, keepdims=True)

    @property
    def about(self) -> Any:
        return {"centre": self.centre, "counts": self.n}

    @property
    def both(self) -> Any:
        return {"centre": self.centre, "weights": self.weights}

    @property
    def Z(self) -> Any:
        return self.W @ self.M + self.b


RANKS = ("numerical_rank", "stable_rank", "effective_rank", "participation_ratio", "nuclear_rank")
LAYER: dict[str, Callable[[Collected], Any]] = {
    "nc1": lambda c: metrics.nc1(c.stats, **c.both),
    "nc1_quotient": lambda c: metrics.nc1_quotient(c.stats, **c.both),
    "cdnv": lambda c: metrics.cdnv(c.M, c.stats.variances),
    "nc2": lambda c: metrics.nc2(c.M, **c.about),
    "equinorm": lambda c: metrics.equinorm(c.M, **c.about),
    "equiangularity": lambda c: metrics.equiangularity(c.M, **c.about),
    "maximal_angle": lambda c: metrics.maximal_angle(c.M, **c.about),
    "distance_mean": lambda c: metrics.distance_kernel(c.M, **c.about).mean,
    "distance_variance": lambda c: metrics.distance_kernel(c.M, **c.about).variance,
    "log_distance_mean": lambda c: metrics.log_distance_kernel(c.M, **c.about).mean,
    "log_distance_variance": lambda c: metrics.log_distance_kernel(c.M, **c.about).variance,
    "etf_distance": lambda c: metrics.etf_distance(c.M, **c.about),
    "vci": lambda c: metrics.vci(c.H, c.y, c.K, weights=c.weights),
    "class_rank": lambda c: metrics.class_rank(c.H, c.y, c.K),
    "dead_samples": lambda c: metrics.dead_samples(c.H),
    "dead_coordinates": lambda c: metrics.dead_coordinates(c.H),
    **{name: lambda c, name=name: getattr(metrics, name)(c.H) for name in RANKS},
    **{f"means_{name}": lambda c, name=name: getattr(metrics, name)(c.C) for name in RANKS},
    "counts": lambda c: c.n[None],
    "means": lambda c: c.M,
    "variances": lambda c: c.stats.variances,
    "class_norms": lambda c: metrics.class_norms(c.M),
    "means_spectrum": lambda c: metrics.singular_values(c.C),
    "spectrum": lambda c: metrics.singular_values(c.H),
}
LAST: dict[str, Callable[[Collected], Any]] = {
    "nc3": lambda c: metrics.nc3(c.W, c.M, **c.about),
    "nc3_normalised": lambda c: metrics.nc3_normalised(c.W, c.M, **c.about),
    "nc3_raw": lambda c: metrics.nc3_raw(c.W, c.M, **c.about),
    "bias_term": lambda c: metrics.bias_term(c.W, c.M, c.b, counts=c.n),
    "duality_variance": lambda c: metrics.duality_variance(c.W, c.M, **c.about),
    "duality_cosine": lambda c: metrics.duality_cosine(c.W, c.M, **c.about),
    "duality_distance": lambda c: metrics.duality_distance(c.W, c.M, **c.about),
    "equinorm_difference": lambda c: metrics.equinorm_difference(c.W, c.M, **c.about),
    "etf_separation": lambda c: metrics.etf_separation(c.M, np.swapaxes(c.W, 1, 2)),
    "nc2_w": lambda c: metrics.nc2_w(c.W, c.M, c.n),
    "classifier_nc2": lambda c: metrics.nc2(np.swapaxes(c.W, 1, 2), centre="origin"),
    "classifier_equinorm": lambda c: metrics.equinorm(np.swapaxes(c.W, 1, 2), centre="origin"),
    "classifier_equiangularity": lambda c: metrics.equiangularity(np.swapaxes(c.W, 1, 2), centre="origin"),
    "classifier_maximal_angle": lambda c: metrics.maximal_angle(np.swapaxes(c.W, 1, 2), centre="origin"),
    "classifier_etf_distance": lambda c: metrics.etf_distance(np.swapaxes(c.W, 1, 2)),
    "smallest_row_distance": lambda c: metrics.smallest_row_distance(c.W),
    "distinct_columns": lambda c: metrics.distinct_columns(c.Z),
    "margin_mean": lambda c: metrics.margins(c.logits, c.y).mean(axis=1),
    "margin_min": lambda c: metrics.margins(c.logits, c.y).min(axis=1),
    "nc4": lambda c: metrics.nc4(c.H, c.W, c.M, c.b),
    "ncc_mismatch": lambda c: metrics.ncc_mismatch(c.H, c.W, c.M, c.b),
    "cosine_margin": lambda c: metrics.cosine_margin(c.H, c.W, c.y),
    "own_cosine": lambda c: metrics.own_cosine(c.H, c.W, c.y),
    "nc2_h": lambda c: metrics.nc2_h(c.M, c.targets.features),
    "target_features": lambda c: metrics.target_distances(c.W, c.M, c.targets).features,
    "target_classifier": lambda c: metrics.target_distances(c.W, c.M, c.targets).classifier,
    "target_logits": lambda c: metrics.target_distances(c.W, c.M, c.targets).logits,
    "classifier": lambda c: c.W,
    "bias": lambda c: c.b[:, :, 0],
    "mean_logits": lambda c: c.Z,
    "class_margins": lambda c: metrics.margins(c.Z, np.arange(c.K), "mean"),
    "sorted_margins": lambda c: metrics.sorted_margins(c.logits, c.y),
    "sorted_cosine_margins": lambda c: metrics.sorted_cosine_margins(c.H, c.W, c.y),
    "balance": lambda c: metrics.balance((c.H, *c.chain), c.penalties).max(axis=1),
    "balances": lambda c: metrics.balance((c.H, *c.chain), c.penalties),
    "weight_spectrum": lambda c: metrics.singular_values(c.chain[0]),
    **{f"weight_{name}": lambda c, name=name: getattr(metrics, name)(c.chain[0]) for name in RANKS},
}


def float64(x: Any) -> Any:
    return x.detach().to("cpu", torch.float64).numpy()


@contextmanager
def collecting(model: Any, names: list[str], head: str) -> Iterator[dict[str, list[Any]]]:
    """The outputs of layers, inputs (under the head's name) and logits of each batch, by hooks of the test's own."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Any]] = {name: [] for name in (*names, head, "logits")}
    hooks = [modules[n].register_forward_hook(lambda m, a, out, n=n: seen[n].append(out.detach().clone())) for n in names]
    hooks.append(modules[head].register_forward_pre_hook(lambda m, a: seen[head].append(a[0].detach().clone())))
    hooks.append(modules[head].register_forward_hook(lambda m, a, out: seen["logits"].append(out.detach().clone())))
    yield seen
    for hook in hooks:
        hook.remove()


def both_ways(model: Any, x: Any, y: Any, batches: Any, names: list[str], head: str, classes: int, **options: Any) -> Any:
    """The monitor's report, and the collected features of each layer (1, d, N) with the logits."""
    monitor = Monitor(model, names, head=head, classes=classes, **options)
    with collecting(model, names, head) as seen:
        for X, Y in zip(x.split(batches), y.split(batches), strict=True):
            with monitor.watch(Y):
                model(X)
    return monitor.report(), {name: float64(torch.cat(parts).flatten(1)).T[None] for name, parts in seen.items()}


def expect(report: Report, name: str, table: Any, collected: Collected, rel: float = 1e-10, absolute: float = 1e-10) -> None:
    """Every number and array of the table, to the tolerance; where `ufm.metrics` refuses, NaN or nothing, with its sentence."""
    layer = report[name]
    for metric, formula in table.items():
        refusal = ""
        try:
            expected = np.asarray(formula(collected))[0]
        except ValueError as error:
            refusal = str(error).split(":")[0]
        if refusal:
            assert metric not in layer.arrays
            assert isnan(layer.values[metric])
            assert layer.reasons[metric].split(":")[0] == refusal
            continue
        got = layer.values[metric] if metric in layer.values else layer.arrays[metric]
        if metric == "spectrum":
            expected, got = (np.pad(s, (0, 60))[:60] for s in (expected, got))  # zeros beyond the rank are no difference
        np.testing.assert_allclose(got, expected, rtol=rel, atol=absolute * (1 + np.abs(expected[np.isfinite(expected)]).max(initial=0)))


def full_comparison(case: Case, **options: Any) -> None:
    model, (x, y) = case.model(), case.data()
    K = case.classes
    options = {"targets": frames.imbalanced_targets(np.arange(1.0, K + 1), np.linspace(1.0, 2.0, K)), "penalties": (0.3, 2.0)} | options
    names = ["body.1", "body.2", "body.4"]
    report, seen = both_ways(model, x, y, case.batches, names, "head", K, **ALL, **options)
    assert report.counts.tolist() == list(case.counts)
    assert report.last == "head"
    W, b = float64(model.head.weight)[None], float64(model.head.bias)[None, :, None]
    shared = {"y": y.numpy(), "K": K, "W": W, "b": b, "logits": seen["logits"], "chain": (W,)}
    for name in (*names, "head"):
        collected = Collected(seen[name], **(shared | options))
        assert report[name].width == seen[name].shape[1]
        expect(report, name, LAYER | LAST if name == "head" else LAYER, collected)


@pytest.mark.parametrize("name", CASES)
def test_equals_metrics(name: str) -> None:
    """All layers of a three-layer MLP, every number and array, in one pass."""
    full_comparison(CASES[name])


def test_equals_metrics_about_the_samples() -> None:
    full_comparison(CASES["imbalanced"], centre="samples", weights="samples")


def test_every_reading_has_an_oracle() -> None:
    """The tables above leave nothing out that the monitor yields, and the monitor yields all of them."""
    yielded = {metric for _, table in (*NUMBERS, *ARRAYS) for metric in table}
    assert yielded == set(LAYER) | set(LAST)


def test_row_is_flat_and_complete() -> None:
    """One float for each number of each layer, the same names whatever was kept."""
    case = CASES["balanced"]
    model, (x, y) = case.model(), case.data()
    rows = []
    for options in (ALL, {}, {"keep": "none"}):
        report, _ = both_ways(model, x, y, case.batches, ["body.1"], "head", 4, **options)
        rows.append(report.row())
        assert all(type(value) is float for value in rows[-1].values())
        for layer in report.layers.values():
            assert {metric for metric, value in layer.values.items() if isnan(value)} <= set(layer.reasons)
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    assert {"nc1@body.1", "nc1@head", "nc3@head"} <= rows[0].keys()
    assert "nc3@body.1" not in rows[0]
    unmeasured = [{metric for metric, value in row.items() if isnan(value)} for row in rows]
    given = {f"{metric}@head" for metric in ("nc2_h", "target_features", "target_classifier", "target_logits", "balance")}
    assert unmeasured[0] == given
    heavy = {f"{metric}@{layer}" for layer in ("body.1", "head") for metric in (*RANKS, "vci", "class_rank")}
    hidden = {f"{metric}@body.1" for metric in ("nc1", "dead_samples", "dead_coordinates")}
    assert unmeasured[1] == given | heavy | hidden
    assert unmeasured[2] == unmeasured[1] | {f"{metric}@head" for metric in ("nc1", "nc4", "ncc_mismatch", "cosine_margin", "own_cosine")}
    for metric in rows[1].keys() - unmeasured[1]:
        assert rows[1][metric] == pytest.approx(rows[0][metric], rel=1e-10, abs=1e-12), metric


def test_measure_by_layer() -> None:
    """Only the layers named are measured in full."""
    case = CASES["balanced"]
    model, (x, y) = case.model(), case.data()
    report, _ = both_ways(model, x, y, case.batches, ["body.1", "body.2"], "head", 4, measure={"body.2": "full"})
    assert [isnan(report[name].values["stable_rank"]) for name in ("body.1", "body.2", "head")] == [True, False, True]
    assert not isnan(report["head"].values["nc1"])  # its samples are kept


def features(y: Any, spread: float, offset: float, d: int = 6, seed: int = 0, dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(seed)
    return (offset + rng.standard_normal((y.max() + 1, d))[y] + spread * rng.standard_normal((len(y), d))).astype(dtype)


def streamed(H: Any, y: Any, batches: Any, **options: Any) -> Report:
    """The report of features as they are: the layer is the identity."""
    monitor = Monitor(nn.Sequential(nn.Identity()), ["0"], classes=int(y.max()) + 1, **options)
    for X, Y in zip(torch.as_tensor(H).split(batches), torch.as_tensor(y).split(batches), strict=True):
        with monitor.watch(Y):
            monitor.model(X)
    return monitor.report()


@pytest.mark.parametrize("measure", ["traces", "full"])
@pytest.mark.parametrize("order", ["shuffled", "sorted", "outlier first"])
@pytest.mark.parametrize(("spread", "offset"), [(1e-3, 1e4), (1e-6, 1e3), (1e-9, 1e3), (1e-7, 0.0)])
def test_no_cancellation_at_collapse(spread: float, offset: float, order: str, measure: str) -> None:
    """Features far from the origin, classes tight: variability to 1e-10 of itself, whatever comes first."""
    y = np.random.default_rng(3).permutation(np.repeat(np.arange(4), (60, 30, 8, 2)))
    H = features(y, spread, offset)
    if order == "sorted":
        at = np.lexsort((H[:, 0], y))
        H, y = H[at], y[at]
    if order == "outlier first":
        H[[int(np.flatnonzero(y == k)[0]) for k in range(4)]] += 1e5 * spread
    report = streamed(H, y, [7, 50, 1, 42], measure=measure)["0"]
    exact = metrics.class_statistics(H.T[None], y, 4)
    np.testing.assert_allclose(report.arrays["variances"], exact.variances[0], rtol=1e-10)
    np.testing.assert_allclose(report.arrays["means"], exact.means[0], rtol=1e-15)
    for name in ("nc1_quotient", "cdnv", *(("nc1",) if measure == "full" else ())):
        expected = LAYER[name](Collected(H.T[None], y, 4))[0]
        assert report.values[name] == pytest.approx(expected, rel=1e-10), name


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_equal_samples_have_no_variance(dtype: Any) -> None:
    """Exactly zero variability, far from the origin, in any precision, over batches."""
    y = np.arange(40) % 3
    report = streamed(features(y, 0.0, 100.0, dtype=dtype), y, [11, 20, 9], measure="full")["0"]
    assert not report.arrays["variances"].any()
    assert report.values["nc1"] == report.values["nc1_quotient"] == report.values["cdnv"] == 0.0


@pytest.mark.parametrize(("dtype", "offset"), [(np.float32, 50.0), (np.float16, 5.0)])
def test_half_and_single_are_summed_in_double(dtype: Any, offset: float) -> None:
    y = np.arange(3000) % 3
    H = features(y, 0.05, offset, dtype=dtype)
    exact = metrics.class_statistics(H.T[None].astype(np.float64), y, 3)
    report = streamed(H, y, 500)["0"]
    np.testing.assert_allclose(report.arrays["variances"], exact.variances[0], rtol=1e-12)
    np.testing.assert_allclose(report.arrays["means"], exact.means[0], rtol=1e-14)


def test_wide_layers_go_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns taken a few at a time give the same."""
    y = np.arange(50) % 4
    H = features(y, 0.3, 2.0, d=37)
    whole = streamed(H, y, [20, 30]).row()
    monkeypatch.setattr("ufm.bridge.moments.BLOCK", 100)
    assert streamed(H, y, [20, 30]).row() == pytest.approx(whole, rel=1e-12, nan_ok=True)


def test_triangular_factor_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches through the QR, small singular values kept."""
    monkeypatch.setattr("ufm.bridge.moments.ROWS", 1)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    H = features(y, 0.5, 1.0, d=5) * np.geomspace(1, 1e-12, 5)
    report = streamed(H, y, 25, measure="full")
    expect(report, "0", {"spectrum": LAYER["spectrum"], "nc1": LAYER["nc1"]}, Collected(H.T[None], y, 3), rel=1e-10)
    np.testing.assert_allclose(report["0"].arrays["spectrum"], np.linalg.svd(H, compute_uv=False), rtol=1e-3)
    assert report["0"].values["numerical_rank"] == 5.0


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_deep_head(activation: Any, bias: bool) -> None:
    """A linear chain is one classifier on the head's features; behind ReLUs the last layer has its own. Inner layers have spectra."""
    case = CASES["imbalanced"]
    x, y = case.data()
    with models.seeded(1):
        model = models.Network(models.mlp(case.widths), models.deep_head(7, 5, 3, activation, bias)).double()
    inner = ["head.1", "head.2"] if activation == "linear" else ["head.2", "head.4"]
    assert Monitor(model, head="head", classes=5).names == ("head", *inner)
    seen: dict[str, Any] = {}
    modules = dict(model.named_modules())
    for name in (*inner, "head"):
        modules[name].register_forward_pre_hook(lambda m, a, n=name: seen.__setitem__(n, float64(a[0]).T[None]))
    penalties = (0.1, 1.0, 2.0, 3.0)
    monitor = Monitor(model, head="head", classes=5, **ALL, penalties=penalties)
    with monitor.watch(y):
        logits = model(x)
    report = monitor.report()
    weights = [float64(w)[None] for w in models.weights(model.head)]
    last = "head" if activation == "linear" else "head.4"
    assert report.last == last
    W = weights[2] @ weights[1] @ weights[0] if activation == "linear" else weights[2]
    b = np.zeros((1, 5, 1)) if not bias else float64(model.head[-1].bias)[None, :, None]
    shared = Collected(None, y.numpy(), 5, W, b, float64(logits).T[None], chain=weights, penalties=penalties)
    for name, weight in zip(("head", *inner), weights, strict=True):
        collected = replace(shared, H=seen[name], chain=(weight,))
        table = LAYER | {metric: LAST[metric] for metric in LAST if metric.startswith("weight_")}
        if name == last:
            dull = ("nc2_h", "target_features", "target_classifier", "target_logits", "balance", "balances")
            table |= {metric: formula for metric, formula in LAST.items() if metric not in dull}
        expect(report, name, table, collected)
    expect(report, "head", {m: LAST[m] for m in ("balance", "balances")}, replace(shared, H=seen["head"]))
    assert report["head"].arrays["balances"].shape == (3,)
    np.testing.assert_allclose(W @ report[last].arrays["means"] + b, report[last].arrays["mean_logits"][None], rtol=1e-12)


def test_balance_from_the_factor() -> None:
    """Without kept samples the Gram of the features serves."""
    case = CASES["balanced"]
    model, (x, y) = case.model(), case.data()
    options = {"penalties": (0.3, 2.0), "measure": "full"}
    kept, _ = both_ways(model, x, y, case.batches, [], "head", 4, **options)
    lean, _ = both_ways(model, x, y, case.batches, [], "head", 4, keep="none", **options)
    assert lean["head"].values["balance"] == pytest.approx(kept["head"].values["balance"], rel=1e-10)


def test_chain_with_inner_biases() -> None:
    """Affine layers multiply to one affine map; dropout and identity do not break the chain."""
    head = nn.Sequential(nn.Dropout(), nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 3)).double()
    model = nn.Sequential(nn.Linear(4, 6), head).double().eval()
    x = torch.randn(30, 4, dtype=torch.float64)
    monitor = Monitor(model, head="1", classes=3)
    assert monitor.names == ("1", "1.3")
    with monitor.watch(torch.arange(30) % 3):
        logits = model(x)
    layer = monitor.report()["1"]
    means = [float64(logits[k::3].mean(0)) for k in range(3)]
    np.testing.assert_allclose(layer.arrays["mean_logits"], np.stack(means, axis=1), rtol=1e-12)


@pytest.mark.parametrize("radius", [5.0, None])
def test_head_with_a_radius(radius: float | None) -> None:
    """The last layer is what the head multiplies: features at its radius."""
    with models.seeded(0):
        model = models.Network(models.mlp((4, 9, 8)), FixedETFHead(8, 3, radius=radius)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    model(x)
    model.eval()
    report, seen = both_ways(model, x, y, 15, ["body.2"], "head", 3, **ALL)
    H = seen["head"] if radius is None else radius * seen["head"] / np.linalg.norm(seen["head"], axis=1, keepdims=True)
    W, bias = float64(model.head.weight)[None], model.head.bias
    b = np.zeros((1, 3, 1)) if bias is None else float64(bias)[None, :, None]
    np.testing.assert_allclose(W @ H + b, seen["logits"], rtol=1e-6, atol=1e-6)
    names = ("nc3", "nc4", "bias_term", "own_cosine", "nc2", "nc1")
    expect(report, "head", {m: (LAYER | LAST)[m] for m in names}, Collected(H, y.numpy(), 3, W, b, seen["logits"]))


class Cosine(nn.Linear):
    """Logits are cosines."""

    def forward(self, h: Any) -> Any:
        return nn.functional.linear(nn.functional.normalize(h), nn.functional.normalize(self.weight), self.bias)


class Transposed(nn.Module):
    """h W with a weight of d x K."""

    def __init__(self, d: int, K: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, K))

    def forward(self, h: Any) -> Any:
        return h @ self.weight


class Shifted(nn.Module):
    """W h + a vector of its own, called neither weight nor bias."""

    def __init__(self, d: int, K: int) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(K, d)), nn.Parameter(torch.randn(K))

    def forward(self, h: Any) -> Any:
        return h @ self.weight.mT + self.shift


CURVED: dict[str, Callable[[], Any]] = {
    "cosine": lambda: Cosine(40, 5),
    "transposed": lambda: Transposed(40, 5),
    "transposed, square": lambda: nn.Sequential(nn.Linear(40, 5), Transposed(5, 5)),
    "shifted": lambda: Shifted(40, 5),
    "cosine, then linear": lambda: nn.Sequential(Cosine(40, 6), nn.Linear(6, 5)),
}


PRECISIONS = {  # of the model, and autocast's
    "double": (torch.float64, None),
    "single": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "half": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to half": (torch.float32, torch.float16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CURVED)
def test_a_head_that_is_not_linear_is_refused(name: str, precision: str) -> None:
    """What has a weight but gives no W h + b: one sentence at the first batch, in any precision, and nothing is counted."""
    dtype, cast = PRECISIONS[precision]
    with models.seeded(0):
        model, x = models.Network(models.mlp((4, 30, 40)), CURVED[name]()).to(dtype), torch.randn(12, 4).to(dtype)
    monitor = Monitor(model, head="head", classes=5)
    refused = pytest.raises(ValueError, match=r"with a weight .*, does not give W h \+ b")
    with torch.autocast("cpu", cast, enabled=cast is not None), refused as caught, monitor.watch(torch.arange(12) % 5):
        model(x)
    assert "\n" not in str(caught.value)
    assert hooks(model) == 0
    assert not monitor._seen.labels


STRAIGHT: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(300, 20),
    "normalised weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(300, 20)),
    "nearest ETF": lambda: NearestETFHead(300, 20),
    "fixed ETF": lambda: FixedETFHead(300, 20),
    "fixed ETF, any norm": lambda: FixedETFHead(300, 20, radius=None),
    "dropout in the chain": lambda: nn.Sequential(nn.Linear(300, 50), nn.Dropout(), nn.Linear(50, 20)),
    "ReLU": lambda: nn.Sequential(nn.Linear(300, 50, bias=False), nn.ReLU(inplace=True), nn.Linear(50, 20)),
}
TAKEN = [(n, p) for n in STRAIGHT for p in PRECISIONS if "ETF" not in n or p not in ("bfloat16", "half")]  # which those heads refuse


@pytest.mark.parametrize("scale", [1e-6, 1e2])
@pytest.mark.parametrize(("name", "precision"), TAKEN)
def test_a_linear_head_is_taken(name: str, precision: str, scale: float) -> None:
    """Rounding is no curvature: in training mode, where ETF heads move, and in evaluation, at any scale of the features."""
    dtype, cast = PRECISIONS[precision]
    with models.seeded(0):
        model, x = nn.Sequential(nn.Linear(20, 300, False), STRAIGHT[name]()).to(dtype), (scale * torch.randn(40, 20)).to(dtype)
    y, monitor = torch.arange(40) % 20, Monitor(model, head="1", classes=20, keep="none")
    for mode in (True, False):
        model.train(mode)
        for _ in range(2):
            labelled = model[1].labelled(y) if "ETF" in name else nullcontext()
            with torch.autocast("cpu", cast, enabled=cast is not None), labelled, monitor.watch(y):
                model(x)
        assert monitor.report().counts.sum() == 80


def test_autocast_that_no_tensor_shows() -> None:
    """Features, weight and logits are in single precision, but the product was not."""

    class Single(nn.Linear):
        def forward(self, h: Any) -> Any:
            return super().forward(h).float()

    with models.seeded(0):
        model, x = nn.Sequential(Single(2, 200)), torch.randn(200, 2)
    with torch.autocast("cpu", torch.bfloat16), (monitor := Monitor(model, head="0", classes=200)).watch(torch.arange(200)):
        assert model(x).dtype == torch.float32
    assert monitor.report()["0"].width == 2


def test_logits_that_overflow_are_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).half()
    nn.init.constant_(model[0].weight, 10.0)
    monitor = Monitor(model, head="0", classes=3)
    with monitor.watch([0, 1, 2]):
        assert torch.isinf(model(torch.full((3, 4), 6e4, dtype=torch.float16))).all()
    assert monitor.report()["0"].width == 4


def test_linearity_is_checked_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first batch: later ones do not wait for the device."""
    monitor, x, y = watched()
    seen: list[int] = []
    monkeypatch.setattr("ufm.bridge.monitor.check", lambda name, layer, features, logits: seen.append(len(features)))
    for _ in range(2):
        for X, Y in zip(x.split((25, 10, 5)), y.split((25, 10, 5)), strict=True):
            with monitor.watch(Y):
                monitor.model(X)
        monitor.report()
    assert seen == [25, 25]


def test_an_activation_used_twice_breaks_the_chain_twice() -> None:
    """The classifier is what lies behind its last use."""
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3))).double()
    monitor = Monitor(model, head="1", classes=3)
    assert monitor.last == "1.4"
    with monitor.watch(torch.arange(9) % 3):
        logits = model(torch.randn(9, 4, dtype=torch.float64))
    means = torch.stack([logits[k::3].mean(0) for k in range(3)], dim=1)
    np.testing.assert_allclose(monitor.report()["1.4"].arrays["mean_logits"], float64(means), rtol=1e-12)


class Doubled(nn.Sequential):
    """A chain with a forward of its own."""

    def forward(self, h: Any) -> Any:
        return 2 * super().forward(h)


@pytest.mark.parametrize("conv", ["flatten", "pool"])
def test_pictures(conv: Any) -> None:
    """(n, C, H, W) as they are, or their means over pixels; in-place activations behind the layer do not touch what was seen."""
    with models.seeded(0):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)).double()
    x, y = torch.randn(30, 2, 6, 6, dtype=torch.float64), torch.arange(30) % 3
    report, seen = both_ways(model, x, y, [11, 19], ["0"], "3", 3, conv=conv, **ALL)
    H = seen["0"] if conv == "flatten" else seen["0"].reshape(1, 3, 16, 30).mean(axis=2)
    assert (H < 0).any()
    expect(report, "0", LAYER, Collected(H, y.numpy(), 3))


def test_sequences_are_flattened() -> None:
    y = np.arange(20) % 2
    H = np.random.default_rng(0).standard_normal((20, 3, 4))
    report = streamed(H, y, [8, 12], **ALL)
    expect(report, "0", LAYER, Collected(H.reshape(20, 12).T[None], y, 2))


def test_under_autocast() -> None:
    """bfloat16 features are taken as they are, and sums are made in double."""
    case = CASES["balanced"]
    model, (x, y) = case.model().float(), case.data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report, seen = both_ways(model, x.float(), y, case.batches, ["body.2"], "head", 4, **ALL)
    assert report["head"].width == 8
    W, b = float64(model.head.weight)[None], float64(model.head.bias)[None, :, None]
    collected = Collected(seen["head"], y.numpy(), 4, W, b, seen["logits"], chain=(W,))
    skip = ("nc2_h", "target_features", "target_classifier", "target_logits", "balance", "balances")
    expect(report, "head", LAYER | {m: f for m, f in LAST.items() if m not in skip}, collected)
    expect(report, "body.2", LAYER, Collected(seen["body.2"], y.numpy(), 4))


def test_inference_mode_and_training_mix() -> None:
    """Batches under inference_mode and with a graph go into one report; no graph is kept."""
    case = CASES["balanced"]
    model, (x, y) = case.model(), case.data()
    monitor = Monitor(model, ["body.2"], head="head", classes=4, **ALL)
    with torch.inference_mode(), monitor.watch(y[:20]):
        model(x[:20])
    with monitor.watch(y[20:]):
        loss = model(x[20:]).sum()
    loss.backward()
    assert not any(m.samples[-1].requires_grad for m in monitor._seen.moments.values())
    whole, _ = both_ways(model, x, y, (20, 20), ["body.2"], "head", 4, **ALL)
    assert monitor.report().row() == pytest.approx(whole.row(), rel=1e-12, abs=1e-13, nan_ok=True)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def watched(case: Case = CASES["balanced"], **options: Any) -> tuple[Monitor, Any, Any]:
    model, (x, y) = case.model(), case.data()
    return Monitor(model, ["body.2"], head="head", classes=case.classes, **options), x, y


def test_hooks_come_and_go() -> None:
    monitor, x, y = watched()
    with monitor.watch(y):
        assert hooks(monitor.model) == 3
        monitor.model(x)
    assert hooks(monitor.model) == 0

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), monitor.watch(y):
        fails()
    assert hooks(monitor.model) == 0
    with pytest.raises(ValueError, match="labels, but"), monitor.watch(y[:-1]):
        monitor.model(x)
    assert hooks(monitor.model) == 0
    assert monitor.report().counts.sum() == len(y)  # neither failure counted


def test_a_batch_that_stops_half_way() -> None:
    """It is never counted in one layer and not in another: only reset() helps."""
    monitor, x, y = watched()
    stop = monitor.model.body[4].register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError), monitor.watch(y):
        monitor.model(x)
    stop.remove()
    assert hooks(monitor.model) == 0
    for call in (monitor.report, monitor.watch(y).__enter__):
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            call()
    monitor.reset()
    with monitor.watch(y):
        monitor.model(x)
    assert monitor.report().counts.sum() == len(y)


def test_measure() -> None:
    """One pass in evaluation mode without a graph; modes come back as they were, also after an exception; the past is forgotten."""
    with models.seeded(0):
        model = models.Network(models.mlp((5, 8, 6), batch_norm=True), nn.Linear(6, 3)).double()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    model(x)
    model.body[1].eval()
    monitor = Monitor(model, head="head", classes=3)
    with monitor.watch(y):
        model(x)
    before = [m.training for m in model.modules()]
    averages = model.body[5].running_mean if hasattr(model.body[5], "running_mean") else model.body[2].running_mean
    first = averages.clone()
    report = monitor.measure(zip(x.split(10), y.split(10), strict=True))
    assert report.counts.sum() == 24
    assert [m.training for m in model.modules()] == before
    assert torch.equal(first, averages)
    model.eval()
    other, _ = both_ways(model, x, y, 10, [], "head", 3)
    assert report.row() == pytest.approx(other.row(), rel=1e-12, nan_ok=True)
    model.train()
    with pytest.raises(ValueError, match="labels run"):
        monitor.measure([(x, y + 1)])
    assert model.training
    assert hooks(model) == 0


def test_report_clears() -> None:
    monitor, x, y = watched()
    rows = []
    for _ in range(2):
        with monitor.watch(y):
            monitor.model(x)
        rows.append(monitor.report().row())
    assert rows[0] == pytest.approx(rows[1], rel=0, abs=0, nan_ok=True)


def test_a_report_stands_when_the_network_moves_on() -> None:
    """In double precision too, where its arrays could be the parameters themselves."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    monitor = Monitor(model, ["0"], head="1", classes=2, measure="full", keep="all")
    report = monitor.measure([(torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)])
    before = {(layer.name, name): a.copy() for layer in report.layers.values() for name, a in layer.arrays.items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    assert ("1", "classifier") in before
    assert all(np.array_equal(report[layer].arrays[name], a, equal_nan=True) for (layer, name), a in before.items())


def test_labels_of_any_kind() -> None:
    """Lists, numpy arrays and small integers."""
    monitor, x, y = watched()
    rows = []
    for labels in (y, y.tolist(), y.numpy(), y.to(torch.uint8), y.to(torch.int32)):
        with monitor.watch(labels):
            monitor.model(x)
        rows.append(monitor.report().row())
    assert all(row == pytest.approx(rows[0], rel=0, abs=0, nan_ok=True) for row in rows)


TINY = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))


class Eighth(nn.Module):
    """A weight of 8-bit integers, which wants a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3, 4, dtype=torch.int8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "3"}, "no layer '3'; near names of its named_modules are '0', '1', '2'"),
        ({"layers": ["body.2"]}, "no layer 'body.2'"),
        ({}, "give a list of layer names, or head="),
        ({"layers": "0"}, "give a list of layer names, or head="),
        ({"layers": ["0", "0"]}, "'0' is named twice"),
        ({"layers": ["2"], "head": "2"}, "'2' is named twice"),
        ({"head": "1"}, "head '1' is a ReLU that does not end in a linear layer"),
        ({"head": ""}, None),
        ({"head": "", "classes": np.int64(3)}, None),
        ({"head": "", "model": Doubled(*TINY)}, "head '' is a Doubled that does not end in a linear layer"),
        ({"head": "0", "model": nn.Sequential(Eighth())}, "head '0' is a Eighth that does not end in a linear layer"),
        ({"head": "2", "classes": 1}, "classes is 1"),
        ({"head": "2", "classes": 2.0}, "classes is 2.0"),
        ({"head": "2", "keep": "some"}, "keep is 'some'"),
        ({"head": "2", "conv": "max"}, "conv is 'max'"),
        ({"head": "2", "centre": "origin"}, "centre is 'origin'"),
        ({"head": "2", "weights": "origin"}, "weights is 'origin'"),
        ({"head": "2", "measure": "means"}, "measure of '2' is 'means'"),
        ({"head": "2", "measure": {"0": "full"}}, "measure names '0', but the watched layers are '2'"),
        ({"head": "2", "penalties": (1.0,)}, "1 penalties for 1 linear layers"),
    ],
)
def test_refused_at_the_door(options: Any, message: str | None) -> None:
    options = {"classes": 3, "model": TINY} | options
    if message is None:
        assert Monitor(**options).names == ("", "2")
    else:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            Monitor(**options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "labels run from 0 to 3, but must lie between 0 and 2"),
        ([0, -1, 1], "labels run from -1 to 1"),
        ([0.0, 1.0, 2.0], "must be integers"),
        ([[0], [1], [2]], "must be integers"),
        ([], "must be integers"),
        (None, "labels is None, but must be integers"),
        (["a", "b", "c"], "labels is .*, but must be integers"),
        ([[0, 1], [2]], "labels is .*, but must be integers"),
        ([True, False, True], "must be integers"),
        ([0, 1], "2 labels, but layer '0' has a batch of 3"),
    ],
)
def test_refused_labels(labels: Any, message: str) -> None:
    monitor = Monitor(TINY, ["0"], head="2", classes=3)
    with pytest.raises(ValueError, match=message), monitor.watch(labels):
        TINY(torch.zeros(3, 4))
    assert hooks(TINY) == 0


class Odd(nn.Module):
    """Gives what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Identity(), nn.Linear(3, 3)

    def forward(self, x: Any, kind: str = "") -> Any:
        if kind == "twice":
            self.inner(self.inner(x))
        elif kind == "tuple":
            self.inner((x, x))
        elif kind == "integers":
            self.inner(x.long())
        elif kind != "none":
            self.inner(x)
        return self.fc(x[:, None] if kind == "sequence" else x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "layer 'inner' ran twice within one watch"),
        ("tuple", "layer 'inner' gives a tuple"),
        ("integers", "layer 'inner' gives a tensor of torch.int64"),
        ("none", "no forward pass came through layer 'inner'"),
        ("sequence", "enter the head at 'fc', but must be"),
    ],
)
def test_refused_features(kind: str, message: str) -> None:
    model = Odd()
    monitor = Monitor(model, ["inner"], head="fc", classes=3)
    with pytest.raises((ValueError, RuntimeError), match=message), monitor.watch([0, 1, 2]):
        model(torch.ones(3, 3), kind)
    assert hooks(model) == 0


def test_a_head_that_gives_no_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, h: Any) -> Any:
            return super().forward(h), h

    model = nn.Sequential(Pair(4, 3))
    with pytest.raises(ValueError, match="layer '0' gives a tuple"), Monitor(model, head="0", classes=3).watch([0, 1, 2]):
        model(torch.ones(3, 4))


def test_a_module_of_two_names() -> None:
    """Is found by either."""
    model = nn.Module()
    model.first = model.second = nn.Linear(4, 3)
    for name in ("first", "second"):
        monitor = Monitor(model, [name], classes=3)
        with monitor.watch([0, 1, 2]):
            model.first(torch.randn(3, 4))
        assert monitor.report()[name].width == 3


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_compiled_model_that_skips_hooks(prefix: str) -> None:
    """Compiled before the watch, run by either of its names: the sentence names the cause; the uncompiled one can be watched."""
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(6, 4), torch.arange(6) % 3
    compiled: Any = torch.compile(model, backend="eager")
    compiled(x)
    monitor = Monitor(compiled if prefix else model, [f"{prefix}0"], head=f"{prefix}2", classes=3)
    with pytest.raises(RuntimeError, match=rf"layer '{prefix}0'.* watch and run the uncompiled one"), monitor.watch(y):
        compiled(x)
    with monitor.watch(y):
        model(x)
    assert monitor.report().counts.sum() == 6


def test_refused_in_use() -> None:
    monitor, x, y = watched()
    with pytest.raises(ValueError, match="no batch was seen"):
        monitor.report()
    with pytest.raises(RuntimeError, match=r"no forward pass came through layer 'body\.2'"), monitor.watch(y):
        pass
    with monitor.watch(y):
        monitor.model(x)
        for call in (monitor.watch(y).__enter__, lambda: monitor.measure([(x, y)])):
            with pytest.raises(RuntimeError, match="a watch is open already"):
                call()
        with pytest.raises(RuntimeError, match="still open"):
            monitor.report()
        assert hooks(monitor.model) == 3
    assert monitor.report().counts.sum() == len(y)
    some = y != 2
    with monitor.watch(y[some]):
        monitor.model(x[some])
    with pytest.raises(ValueError, match="class 2 of 4 has no samples among the 30 seen"):
        monitor.report()
    with monitor.watch(y[~some]):  # still there: more batches help
        monitor.model(x[~some])
    assert monitor.report().counts.tolist() == [10] * 4
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not running"):
        watched(distributed=True)[0].report()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(value: float) -> None:
    """The layer is named, the first in order."""
    monitor, x, y = watched()
    x[3, 1] = value
    with monitor.watch(y):
        monitor.model(x)
    with pytest.raises(ValueError, match=r"features of layer 'body\.2' hold NaN or infinity"):
        monitor.report()


def test_widths_that_change() -> None:
    monitor = Monitor(nn.Sequential(nn.Identity()), ["0"], classes=2)
    with monitor.watch([0, 1]):
        monitor.model(torch.ones(2, 3))
    with pytest.raises(ValueError, match="layer '0' has 4 features, but 3 in the batches before"), monitor.watch([0, 1]):
        monitor.model(torch.ones(2, 4))


def test_too_wide_for_a_scatter() -> None:
    monitor = Monitor(nn.Sequential(nn.Identity()), ["0"], classes=2, measure="full")
    with pytest.raises(ValueError, match="too many for measure='full'"), monitor.watch([0, 1]):
        monitor.model(torch.ones(2, 20000))
    with monitor.watch([0, 1]):
        monitor.model(torch.ones(2, 20))


def test_wrong_number_of_logits() -> None:
    monitor = Monitor(TINY, head="2", classes=4)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 3\), but classes is 4"), monitor.watch([0, 1, 2, 3]):
        TINY(torch.ones(4, 4))


def moments(H: Any, y: Any, classes: int, batches: Any) -> Moments:
    found = None
    for X, Y in zip(torch.as_tensor(H).split(batches), torch.as_tensor(y).split(batches), strict=True):
        found = found or Moments(Asked(True, True, True), classes, X)
        found.add(X, Batch.of(Y, classes))
    assert found is not None
    return found


@pytest.mark.parametrize("shares", ["mixed", "classes apart"])
@pytest.mark.parametrize("spread", [0.5, 1e-7])
def test_merging_equals_one_pass(shares: str, spread: float) -> None:
    """Two processes' moments make those of all samples, also where a class is in one of them only, and at collapse."""
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(4), (20, 9, 5, 3)))
    y = np.sort(y) if shares == "classes apart" else y
    H = features(y, spread, 1e2)
    one = moments(H, y, 4, [20, 17])
    two = moments(H[:23], y[:23], 4, [20, 3])
    two.merge(moments(H[23:], y[23:], 4, [14]))
    assert two.counts.tolist() == one.counts.tolist() == [20, 9, 5, 3]
    np.testing.assert_allclose(two.variances(), one.variances(), rtol=1e-10)
    np.testing.assert_allclose(two.means(), one.means(), rtol=1e-15)
    grams = [float64(torch.cat(m.rows).mT @ torch.cat(m.rows)) for m in (one, two)]
    np.testing.assert_allclose(grams[1], grams[0], rtol=1e-8, atol=1e-10 * np.abs(grams[0]).max())
    exact = metrics.class_statistics(H.T[None], y, 4)
    np.testing.assert_allclose(two.variances(), exact.variances[0], rtol=1e-10)
    assert torch.equal(torch.cat(two.samples), torch.cat(one.samples))
    assert torch.equal(two.largest, one.largest)
    assert torch.equal(torch.cat(two.tops), torch.cat(one.tops))


def process(rank: int, folder: str, out: str) -> None:
    """One of two: the even samples here, the odd there; the second sees one batch less, and none of class 0 in it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    case = CASES["imbalanced"]
    model, (x, y) = case.model(), case.data()
    monitor = Monitor(model, ["body.2"], head="head", classes=5, **ALL, distributed=True)
    with pytest.raises(ValueError, match="no batch was seen"):
        monitor.report()
    at = torch.arange(len(y))
    mine = at[at % 3 == 0] if rank else at[at % 3 > 0]
    for part in mine.split(20):
        with monitor.watch(y[part]):
            model(x[part])
    report = monitor.report()
    np.savez(f"{out}/{rank}.npz", **report.row(), **report["head"].arrays)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Both end with the same bits, and with what one process finds."""
    torch.multiprocessing.spawn(process, (str(tmp_path), str(tmp_path)), nprocs=2)
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)
    case = CASES["imbalanced"]
    model, (x, y) = case.model(), case.data()
    report, _ = both_ways(model, x, y, case.batches, ["body.2"], "head", 5, **ALL)
    for name, value in (report.row() | report["head"].arrays).items():
        np.testing.assert_allclose(first[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


def test_one_process_group(tmp_path: Path) -> None:
    """A world of one gives what it saw."""
    case = CASES["imbalanced"]
    model, (x, y) = case.model(), case.data()
    alone, _ = both_ways(model, x, y, case.batches, ["body.2"], "head", 5, **ALL)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        together, _ = both_ways(model, x, y, case.batches, ["body.2"], "head", 5, **ALL, distributed=True)
    finally:
        torch.distributed.destroy_process_group()
    assert together.row() == pytest.approx(alone.row(), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """At the end of every second epoch the row is logged; the callback is Lightning's own kind."""

    class Callback:
        pass

    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    fake = ModuleType(package)
    fake.Callback = Callback  # type: ignore[attr-defined]
    if "." in package:
        monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, package, fake)
    monitor, x, y = watched()
    callback = lightning_callback(monitor, [(x, y)], every=2)
    assert isinstance(callback, Callback)
    logged: list[Any] = []
    module = SimpleNamespace(log_dict=logged.append)
    for epoch in range(4):
        callback.on_train_epoch_end(SimpleNamespace(current_epoch=epoch), module)
    assert len(logged) == 2
    with monitor.watch(y):
        monitor.model(x)
    assert logged[1] == pytest.approx(monitor.report().row(), rel=0, abs=0, nan_ok=True)


def test_lightning_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs lightning or pytorch_lightning"):
        lightning_callback(watched()[0], [])


@pytest.mark.gpu
def test_on_an_accelerator() -> None:
    """The same report from features there as from the same features here."""
    y = np.random.default_rng(3).permutation(np.repeat(np.arange(4), (60, 30, 8, 2)))
    H = features(y, 1e-4, 10.0)
    monitor = Monitor(nn.Sequential(nn.Identity()), ["0"], classes=4, **ALL)
    for at in np.split(np.arange(100), [30, 41]):
        with monitor.watch(torch.as_tensor(y[at], device="cuda")):
            monitor.model(torch.as_tensor(H[at], device="cuda"))
    assert monitor.report().row() == pytest.approx(streamed(H, y, [30, 11, 59], **ALL).row(), rel=1e-9, abs=1e-10)
