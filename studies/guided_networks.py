"""What the study of guided networks computes: a network trained with one head, and the unconstrained model of the same class sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import evenly
from studies.networks import device_of
from ufm import metrics, sweep
from ufm.arrays import to_numpy
from ufm.records import Stop
from ufm.theory import limits

Floats = NDArray[np.float64]

FLOOR, MARGIN = 1e-3, 1e-2  # a network is at collapse within this of the loss's floor, and of the margin's limit
LEVELS = (0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005, 0.003, 0.002, 0.001)  # how soon a measure falls to each
FALLING = ("excess", "margin_gap", "nc1", "nc3")
SHOWN = 201  # margins kept of a run, evenly over the sorted ones


def network_guided(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: the curves of a network's training and its end, or the end of a run of the model."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        return [{"network": trained, "model": simulated}[point["kind"]](point) for point in points]


def trained(point: dict[str, Any]) -> dict[str, Any]:
    """A network, trained."""
    import torch

    from ufm import bridge

    data = data_of(point)
    network = network_of(point, data)
    picture = data.inputs.ndim == 4 and data.inputs.shape[1] == 3
    training = bridge.Training(
        epochs=point["epochs"],
        optimiser=bridge.SGD(point["lr"], point["momentum"]),
        batch=min(point["batch"], len(data.labels)),
        schedule="cosine",
        weight_decay=point["weight_decay"],
        augment=picture,
        every=point["every"],
        seed=sweep.seed_of({"draws of": point["run"], "seed": point["seed"]}) % 2**63,
        dtype=getattr(torch, point["precision"]),
    )
    watched: Any = Watched(monitor_of(network, point), network, data, training.batch or len(data.labels))
    history = bridge.train(network, data, training, monitor=watched, device=device_of(point), progress=False)
    finite = history.stop is not Stop.DIVERGED
    margins = watched.margins() if finite else np.full(len(data.labels), np.nan)
    ranks = np.array(evenly(range(len(data.labels)), SHOWN))
    curves = curves_of(history, point)
    counts = np.array(data.counts)
    row = curves | {f"end_{name}": float(values[-1]) for name, values in curves.items() if name != "epoch" and values.ndim == 1}
    row |= {f"reached_{name}": reached(curves["epoch"], curves[name]) for name in FALLING}
    row |= {
        "levels": np.array(LEVELS),
        "counts": counts,
        "N": int(counts.sum()),
        "ranks": ranks,
        "margins": margins[ranks],
        "finite": finite,
    }
    return row | {
        "floor": floor_of(point),
        "limit": float(limits.cosine_margin(point["K"])),
        "stop": history.stop.name,
        "taken": int(history.epoch[-1]),
        "loss_gradient": watched.slope() if finite else np.nan,
        "at_collapse": bool(row["end_excess"] <= FLOOR and row["end_margin_gap"] <= MARGIN),
    }


def simulated(point: dict[str, Any]) -> dict[str, Any]:
    """The unconstrained model of the same class sizes under the same head, with its features free on the sphere: where AGD ends."""
    problem = problem_of(point)
    rule = ufm.rules.AGD(point["gain"])
    run = ufm.simulate(problem, rule, seed=point["seed"], steps=point["steps"], start=ufm.starts.agd(), device=point["device"])
    H, W = (to_numpy(x) for x in run.factors[:2])
    of = metrics.class_statistics(H, problem.labels, point["K"])
    about: dict[str, Any] = {"centre": "samples", "counts": of.counts}
    found = {
        "cross_entropy": run.value[:, -1],
        "margin_gap": limits.cosine_margin(point["K"]) - metrics.cosine_margin(H, W, problem.labels),
        "nc1": metrics.nc1(of, centre="samples", weights="samples"),
        "nc3": metrics.nc3(W, of.means, **about),
        "equinorm": metrics.equinorm_difference(W, of.means, **about),
        "gradient_norm": run.gradient_norm[:, -1],
    }
    floor = floor_of(point)
    ends = {f"end_{name}": float(to_numpy(value).flat[0]) for name, value in found.items()}
    return ends | {"end_excess": ends["end_cross_entropy"] - floor, "floor": floor, "stop": run.stop[0].name}


@dataclass(frozen=True, eq=False)
class Watched:
    """A `Monitor` whose reports also hold the cross-entropy and the accuracy of every class, on training and test data."""

    monitor: Any
    network: Any
    data: Any
    size: int

    def watch(self, labels: Any) -> Any:
        """As the monitor's."""
        return self.monitor.watch(labels)

    def report(self) -> Any:
        """The monitor's report with what is added, in the mode that the network is in."""
        report = self.monitor.report()
        loss, right = self._judged(self.batches())
        _, test_right = self._judged(self.batches("test"))
        layer = report["head"]
        more = {"class_accuracy": right, "test_class_accuracy": test_right}
        layer = replace(layer, values=layer.values | {"cross_entropy": loss}, arrays=layer.arrays | more)
        return replace(report, layers=report.layers | {"head": layer})

    def batches(self, part: Literal["batch", "test"] = "batch") -> Iterable[tuple[Any, Any]]:
        """(inputs, labels) of all training or test samples, in turn."""
        total = len(self.data.labels if part == "batch" else self.data.test_labels)
        for at in range(0, total, self.size):
            yield getattr(self.data, part)(slice(at, at + self.size))

    def margins(self) -> Floats:
        """Sorted cosine margins of the training samples, (N,)."""
        return np.asarray(self.monitor.measure(self.batches())["head"].arrays["sorted_cosine_margins"])

    def slope(self) -> float:
        """|gradient| of the mean cross-entropy of the training set, the network in evaluation mode, a trained classifier included."""
        from torch import nn

        self.network.eval()
        self.network.zero_grad()
        for inputs, labels in self.batches():
            (nn.functional.cross_entropy(self.network(inputs), labels, reduction="sum") / len(self.data.labels)).backward()
        squares = [float(p.grad.double().square().sum()) for p in self.network.parameters() if p.grad is not None]
        self.network.zero_grad()
        return float(np.sqrt(sum(squares)))

    def _judged(self, batches: Iterable[tuple[Any, Any]]) -> tuple[float, Floats]:
        """Mean cross-entropy, and the share of each class that is found, (K,); NaN of a class without samples."""
        import torch

        K = self.data.classes
        loss, seen = 0.0, torch.zeros(2, K, dtype=torch.float64, device=self.data.labels.device)
        for inputs, labels in batches:
            logits = self.network(inputs).double()
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right = labels[logits.argmax(dim=1) == labels]
            seen += torch.stack([torch.bincount(x, minlength=K) for x in (right, labels)])
        return loss / max(float(seen[1].sum()), 1.0), to_numpy(seen[0] / seen[1])


def curves_of(history: Any, point: dict[str, Any]) -> dict[str, Floats]:
    """What is kept of a history at epochs 0, every, ..., (T,) each: NaN after a run that diverged."""
    steps = np.array(sorted({*range(0, point["epochs"], point["every"]), point["epochs"]}), dtype=np.float64)

    def whole(values: Any) -> Floats:
        found = np.full((len(steps), *np.shape(values)[1:]), np.nan)
        found[: len(values)] = values
        return found

    blank = np.full(len(history.epoch), np.nan)
    seen = {name: whole(history.metrics.get(f"{name}@head", blank)) for name in ("cross_entropy", "cosine_margin", "nc1", "nc3")}
    classes = {
        name: whole(history.metrics.get(f"{name}@head", np.full((len(blank), point["K"]), np.nan)))
        for name in ("class_accuracy", "test_class_accuracy")
    }
    tail = np.arange(point["K"] - point["K"] // 2, point["K"])  # classes are the largest first
    return {
        "epoch": steps,
        "cross_entropy": seen["cross_entropy"],
        "excess": seen["cross_entropy"] - floor_of(point),
        "margin_gap": limits.cosine_margin(point["K"]) - seen["cosine_margin"],
        "nc1": seen["nc1"],
        "nc3": seen["nc3"],
        "equinorm": whole(history.metrics.get("equinorm_difference@head", blank)),
        "gradient_norm": whole(history.gradient_norm),
        "accuracy": whole(history.accuracy),
        "test_accuracy": whole(history.test_accuracy),
        "tail_test_accuracy": classes["test_class_accuracy"][:, tail].mean(axis=1),
        "head_test_accuracy": np.delete(classes["test_class_accuracy"], tail, axis=1).mean(axis=1),
        **classes,
    }


def reached(epoch: Floats, values: Floats) -> Floats:
    """The first recorded epoch past the start at which a curve is within each of the levels; NaN where it never is."""
    within = (values[:, None] <= np.array(LEVELS)) & (epoch[:, None] > 0)
    return np.where(within.any(axis=0), epoch[within.argmax(axis=0)], np.nan)


def floor_of(point: dict[str, Any]) -> float:
    """The least cross-entropy of balanced classes under a head of unit rows; NaN where none is proven."""
    if point["ratio"] > 1 or point["head"] == "linear":
        return float("nan")
    return float(limits.cross_entropy_floor(point["K"], point["radius"]))


def counts_of(point: dict[str, Any]) -> Any:
    """Samples of each class, the largest first."""
    K, n, ratio = point["K"], point["n"], point["ratio"]
    return ufm.counts.balanced(K, n) if ratio == 1 else ufm.counts.exponential(K, n, ratio)


def problem_of(point: dict[str, Any]) -> ufm.Problem:
    """The unconstrained model of a point: features free on the sphere, no penalties."""
    plain = {"features": "free", "lam_w": 0.0, "lam_h": 0.0, "columns": "samples"}
    return ufm.Problem(counts_of(point), width=point["width"], head=options_of(point), radius=point["radius"], **plain)


def options_of(point: dict[str, Any]) -> ufm.heads.Head:
    """The head of a point as the model has it; ETFs in their default form: reduced, without proximal term, the paper's averaging."""
    if point["head"] == "standard":
        return ufm.heads.UnitRows()
    return ufm.heads.FixedETF() if point["head"] == "fixed" else ufm.heads.NearestETF(gradient=point["gradient"])


def data_of(point: dict[str, Any]) -> Any:
    """Training samples of the point's class sizes, and the test set, where and as precise as they are computed with."""
    import torch

    from ufm.bridge import data

    found = data.load(point["dataset"], point["root"], counts=[int(n) for n in counts_of(point)], seed=point["seed"])
    return found.to(device_of(point), getattr(torch, point["precision"]))


def network_of(point: dict[str, Any], data: Any) -> Any:
    """The network of a run as it is at first: the body equal for all heads, gradients and class sizes."""
    from torch import nn

    from ufm.bridge import models

    inputs, width = data.inputs.shape[1:], point["width"]
    with models.seeded(sweep.seed_of({name: point[name] for name in ("seed", "run", "width", "dataset")}) % 2**63):
        if len(inputs) == 3:
            picture = models.resnet18(inputs[0])
            body: nn.Module = nn.Sequential(picture, nn.Linear(picture.out_features, width, bias=False), nn.BatchNorm1d(width))
        else:
            body = models.mlp((inputs[0], point["hidden"], point["hidden"], width), batch_norm=True, relu_features=False)
        return models.Network(body, head_of(point))


def head_of(point: dict[str, Any]) -> Any:
    """The head of a point as a module."""
    from torch import nn

    from ufm import bridge

    d, K, radius = point["width"], point["K"], point["radius"]
    if point["head"] == "linear":
        return nn.Linear(d, K)
    if point["head"] == "standard":
        return unit_rows(d, K, radius)
    options = options_of(point)
    if isinstance(options, ufm.heads.NearestETF):
        return bridge.NearestETFHead(d, K, options=options, radius=radius)
    return bridge.FixedETFHead(d, K, radius=radius)


def unit_rows(d: int, K: int, radius: float) -> Any:
    """The paper's standard head: logits W radius h/|h|, W (K, d) trained, its rows at norm 1 again after every step, no bias."""
    import torch
    from torch import nn
    from torch.nn.functional import linear, normalize

    class UnitRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.radius, self.weight = radius, nn.Parameter(torch.randn(K, d))

        def forward(self, features: Any) -> Any:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
            return linear(radius * normalize(features), normalize(self.weight))  # its slope is along the sphere

    return UnitRows()


def monitor_of(network: Any, point: dict[str, Any]) -> Any:
    """What is measured of a network: metrics about the mean of all samples, classes weighted by their sizes."""
    from ufm import bridge

    return bridge.Monitor(network, head="head", classes=point["K"], centre="samples", weights="samples")
