"""Does a network trained with a deep linear or deep ReLU head end at deep neural collapse (DNC), or below it at low rank?

K balanced classes of n samples; a body whose last layer is linear, so that its features are free (an MLP, or ResNet-20 and a linear
layer for pictures); a head of L weight matrices of width d, entries N(0, 1/d) at first (doubled variance under ReLU); cross-entropy.
Penalties: "features", that of the unconstrained model (lambda on every W_l, lambda/n on the features, none on the body: Garrod & Keating
2025, Figs 3 and 7), or "decay", plain weight decay of all parameters (Figs 4 and 8). Plain SGD at the papers' rate 0.05 in five batches
an epoch, as in the papers, to lambda t = 15, t = rate x steps: singular values that are not held up fall by e^{-15}. There is no
momentum: that is another experiment, with other ends.
Beside every network stand what is predicted (levels in closed form; in linear chains the lowest minima of a search) and what the model
itself does under gradient flow (plain descent under ReLU, on 5 samples a class), from random starts and from the networks' own first
class means. A network's features are a point of the unconstrained model, so under "features" its objective is one of that model's values:
below DNC's level it has left DNC for good. Under "decay" lambda_h is read off the end, where lambda ||W_1||^2 = lambda_h sum_i ||h_i||^2
for whatever penalty holds the features: that value is the model's, not what was minimised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from studies import low_rank_ends as ends
from studies.command import computed, finish, span
from studies.networks import MADE, device_of
from studies.networks import Options as Networks
from ufm import sweep
from ufm.arrays import to_numpy
from ufm.starts import Given

Floats = NDArray[np.float64]

RATE = 0.05  # of the papers
LAM, DECAY = 5e-3, 1e-2
SETTLED = 5e-3  # relative fall of the objective over the last tenth of a training that is taken to have ended
SLOW_FLOW = 5  # samples of a class in simulated ReLU chains, where class means are not exact
LEVELS = 8  # room for the closed forms of a setting
STEP = 0.1  # of descent in simulated ReLU chains


@dataclass(frozen=True)
class Options(Networks):
    """Does a trained network with a deep linear or ReLU head end at deep neural collapse, or below it at low rank?"""

    epochs: int | None = None
    """passes over the data, fewer or more than the study's own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.epochs < 10:
            raise ValueError(f"--epochs is {self.epochs}, but at least {10} are needed")


@dataclass(frozen=True)
class Size:
    """Depths of linear and of ReLU heads (the first of each is the main one, also under weight decay), seeds, epochs, samples, widths."""

    linear: tuple[int, ...] = (3, 1, 2, 4)
    relu: tuple[int, ...] = (4,)
    seeds: int = 5
    epochs: int = 12_000
    samples: int = 150
    width: int = 64
    hidden: int = 256
    searches: int = 6
    polish: int = 3000
    records: int = 60


SIZES = {
    "full": Size(),
    "quick": Size(linear=(3, 1), seeds=2, epochs=1200),
    "smoke": Size(linear=(3,), seeds=2, epochs=12, samples=10, width=16, hidden=16, searches=1, polish=30, records=4),
}
PICTURES = Size(linear=(3,), epochs=2000, samples=5000)  # the papers' head, and their number of samples


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import network_low_rank as figure

    table = computed(network_low_rank, points(options), options, "networks")
    tables = {f"rows_{panel}": table.where(panel=panel) for panel in ("trained", "simulated", "predicted")}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw_all)


def points(options: Options) -> list[dict[str, Any]]:
    """Every setting trained from every seed, simulated from both starts, and predicted; the longest first."""
    size = SIZES[options.size] if options.dataset in MADE or options.smoke else PICTURES
    K = 100 if options.dataset == "cifar100" else 10
    same = {
        "dataset": options.dataset,
        "root": None if options.root is None else str(options.root),
        "K": K,
        "n": min(size.samples, 500) if K == 100 else size.samples,
        "width": max(size.width, K),
        "hidden": size.hidden,
        "epochs": options.epochs or size.epochs,
        "polish": size.polish,
        "records": size.records,
        "rate": RATE,
        "settled_below": SETTLED,
        "seed": options.seed,
        "device": options.device,
    }
    settings = [
        *({"activation": "relu", "depth": L, "penalty": "features", "lam": LAM} for L in size.relu),
        {"activation": "linear", "depth": size.linear[0], "penalty": "decay", "lam": DECAY},
        *({"activation": "linear", "depth": L, "penalty": "features", "lam": LAM} for L in size.linear),
    ]
    held = [setting for setting in settings if setting["penalty"] == "features"]
    return [
        *({"panel": "trained", "run": run} | setting | same for setting in settings for run in range(size.seeds)),
        *({"panel": "simulated", "runs": size.seeds, "start": s} | setting | same for setting in held for s in ("random", "network")),
        *({"panel": "predicted", "searches": size.searches} | setting | same for setting in held),
    ]


def network_low_rank(points: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: a trained network, the runs of a simulation, or what is predicted."""
    from threadpoolctl import threadpool_limits

    table = {"trained": trained, "simulated": simulated, "predicted": predicted}
    with threadpool_limits(1):
        return [table[point["panel"]](point, seed) for point, seed in zip(points, seeds, strict=True)]


def trained(point: dict[str, Any], _: int) -> dict[str, Any]:
    """The curves of a network's training, and what its end is."""
    from ufm.bridge import models
    from ufm.bridge.monitor import Monitor
    from ufm.bridge.problem import penalty
    from ufm.bridge.train import SGD, Training, train

    data, lam = dataset_of(point), point["lam"]
    network, problem = network_of(point, data), problem_of(point)
    held = point["penalty"] == "features"
    history = train(
        network,
        data,
        Training(
            epochs=point["epochs"],
            optimiser=SGD(point["rate"]),
            batch=-(-len(data.labels) // ends.BATCHES),
            weight_decay=0.0 if held else lam,
            every=max(1, point["epochs"] // point["records"]),
            seed=point["run"],
        ),
        penalty=(lambda _, features, __: penalty(problem, models.weights(network.head), features)) if held else None,
        monitor=Monitor(network, [""], head="head", classes=point["K"], keep="none"),
        device=device_of(point),
        progress=False,
    )
    return ends.of_history(point, history) | ends.of_network(point, network, data)


def simulated(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Where the unconstrained model goes from `runs` starts, on class means, or on a few samples a class under ReLU."""
    linear = point["activation"] == "linear"
    problem = problem_of(point) if linear else problem_of(point, SLOW_FLOW, "samples")
    steps = 40_000 if linear else round(ends.duration(point) / STEP)
    path = ufm.simulate(
        problem,
        ufm.rules.StabilisedFlow() if linear else ufm.rules.GradientDescent(STEP),
        runs=point["runs"],
        seed=seed,
        steps=steps,
        tol=1e-7 if linear else None,
        every=20 if linear else max(1, steps // 200),
        start=ufm.starts.normal(1.0) if point["start"] == "random" else start_of_networks(point, problem),
        device=point["device"],
    )
    return ends.of_paths(point, problem, path)


def predicted(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Levels in closed form, and the lowest minima that a search finds in a linear chain."""
    problem = problem_of(point)
    known = ends.levels(problem)
    spare = LEVELS - len(known)
    row: dict[str, Any] = {
        "names": np.array([*known, *[""] * spare]),
        "levels": np.array([*known.values(), *[np.nan] * spare]),
        "dnc": known["DNC"],
    }
    if point["activation"] == "linear":
        found = ufm.solve(problem, method="multistart", runs=point["searches"], seed=seed)
        kinds = ufm.classify(problem, found.factors, inertia=False)
        row |= {"minima": kinds.name, "minima_values": kinds.value, "minima_ranks": kinds.rank, "minima_gradients": kinds.gradient_norm}
    return row


def problem_of(point: dict[str, Any], n: int | None = None, columns: Any = "means") -> ufm.Problem:
    """The unconstrained model of a point: lambda on every W_l, lambda/n on each of n samples' features; lambda_eff does not see n."""
    n = point["n"] if n is None else n
    return ufm.Problem(
        ufm.counts.balanced(point["K"], n),
        width=point["width"],
        depth=point["depth"],
        features="free",
        activation=point["activation"],
        lam_w=point["lam"],
        lam_h=point["lam"] / n,
        columns=columns,
    )


def dataset_of(point: dict[str, Any]) -> Any:
    """n training samples of each class, and the test set."""
    from ufm.bridge import data

    counts = [point["n"]] * point["K"]
    return data.load(point["dataset"], point["root"], counts=counts, seed=point["seed"])


def network_of(point: dict[str, Any], data: Any) -> Any:
    """The network of a run as it is at first; equal for every penalty."""
    from torch import nn

    from ufm.bridge import models

    inputs = data.inputs.shape[1:]
    with models.seeded(sweep.seed_of({name: point[name] for name in ("seed", "run", "width", "depth", "activation")}) % 2**63):
        if len(inputs) == 3:
            picture = models.resnet20(inputs[0])
            body: nn.Module = nn.Sequential(picture, nn.Linear(picture.out_features, point["width"]))
        else:
            body = models.mlp((inputs[0], point["hidden"], point["hidden"], point["width"]), relu_features=False)
        head = models.deep_head(point["width"], point["K"], point["depth"], point["activation"])
        for W in models.weights(head):
            nn.init.normal_(W, std=((2.0 if point["activation"] == "relu" else 1.0) / point["width"]) ** 0.5)
    return models.Network(body, head)


def start_of_networks(point: dict[str, Any], problem: ufm.Problem) -> Given:
    """The first features and weights of the networks of all runs: class means, or the first samples of each class."""
    from ufm.bridge import models

    data = dataset_of(point)
    starts = []
    for run in range(point["runs"]):
        network = network_of(point | {"run": run}, data)
        features, labels = ends.features_of(network, data)
        columns = ends.class_means(features, labels) if problem.columns == "means" else features[first_samples(labels)].T
        starts.append([columns, *(W.detach().cpu().double().numpy() for W in models.weights(network.head))])
    return ufm.starts.given([np.stack(parts) for parts in zip(*starts, strict=True)])


def first_samples(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of the first few samples of each class, class by class."""
    return np.concatenate([np.flatnonzero(labels == k)[:SLOW_FLOW] for k in range(int(labels.max()) + 1)])


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first, setting by setting: predicted, simulated, trained."""
    said: dict[str, Any] = {}
    for setting in ends.settings(table.where(panel="trained")):
        name, own = ends.title(setting), table.where(panel="trained", **setting)
        said[name] = networks_told(own)
        for start, text in (("random", "random starts"), ("network", "the networks' own starts")):
            rows = table.where(panel="simulated", start=start, **setting)
            if len(rows):
                said[f"{name}, simulated from {text}"] = simulations_told(rows)
        rows = table.where(panel="predicted", **setting)
        if len(rows):
            said[f"{name}, predicted"] = predictions_told(rows, own)
    return said


def networks_told(own: sweep.Table) -> str:
    """Networks of one setting in words."""
    below, runs = int(own["below"].sum()), len(own)
    low, high = sweep.wilson(below, runs)
    return (
        f"{below} of {runs} networks below DNC ({float(low):.2f} to {float(high):.2f}), value over DNC's {span(own['ratio'])}; rank of the "
        f"logits {counted(own['rank'])}, least of all layers {counted(own['narrowest'])}; ends: {counted(own['name'])}; L-BFGS from there: "
        f"{counted(own['basin'])}; fall of the objective over the last tenth {span(own['drift'])}, scale-free gradient "
        f"{span(own['gradient'])}, NC1 {span(own['nc1'])}; test accuracy {span(own['test_accuracy'])}"
    )


def simulations_told(rows: sweep.Table) -> str:
    """Runs of the model in words."""
    ratios, gradients = rows.values("end_ratios")[0], rows.values("end_gradients")[0]
    return (
        f"{rows['below_count'][0]} of {len(ratios)} below DNC ({rows['below_low'][0]:.2f} to {rows['below_high'][0]:.2f}), value over "
        f"DNC's {span(ratios)}; rank of the logits {counted(rows.values('end_ranks')[0])}; ends: {counted(rows.values('end_names')[0])}; "
        f"scale-free gradient {span(gradients)}"
    )


def predictions_told(rows: sweep.Table, own: sweep.Table) -> str:
    """The lowest structures over DNC's level, and how far the networks stay above them."""
    known = dict(zip(rows.values("names")[0].tolist(), rows.values("levels")[0].tolist(), strict=True))
    if rows.values("activation")[0] == "linear":
        known |= dict(zip(rows.values("minima")[0].tolist(), rows.values("minima_values")[0].tolist(), strict=True))
    found = sorted((value, name) for name, value in known.items() if name not in ("", "linear DNC") and np.isfinite(value))
    told = ", ".join(f"{name} ({value / known['DNC']:.4f})" for value, name in found[:4])
    return f"lowest, over DNC: {told}; the networks' values are {span(own['value'] / found[0][0] - 1)} of the lowest above it"


def counted(values: Any) -> str:
    """How often each value occurs, the most frequent first."""
    return ", ".join(f"{value} ({many})" for value, many in Counter(to_numpy(np.asarray(values)).tolist()).most_common())
