"""One trained network beside theory and free descent: the three of them measured alike, for the study of networks under imbalance.

`point` is a point of the study: a data set, class counts (half the classes n_max, half n_min), a level t, and how to train.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.networks import device_of
from ufm import frames, metrics, sweep
from ufm.arrays import to_numpy
from ufm.objective import chain_of
from ufm.theory import imbalance
from ufm.theory.boundaries import boundaries

Floats = NDArray[np.float64]

DEAD = 0.01  # a class is dead if its mean feature is at most this share of the longest predicted one
SHARE = 0.1  # lam_w/lam_h over N
ADAM = 5e-3  # its rate, constant
SETTLED = 1e-7  # scale-free gradient norm at which free descent ends; on the map, where small classes weigh little too:
QUIET = 1e-6
BATCH = 512  # samples of one forward pass where batches are not full
CURVES = ("gap", "gradient", "margins", "norms", "nc1", "features", "classifier")


def counts_of(point: dict[str, Any]) -> NDArray[np.int64]:
    """Half of the classes with n_max samples, half with n_min."""
    return ufm.counts.step(point["K"], point["n_min"], point["n_max"] / point["n_min"])


def problem_of(point: dict[str, Any]) -> ufm.Problem:
    """kappa^2 = t n_min (K-1)/K, so that t = 1 is the threshold of the smallest classes.

    Networks: lam_w/lam_h = N/10, which gives features of norm about 1; the map, where it scales the start alone: lam_w = lam_h.
    """
    n = counts_of(point)
    N, K = n.sum(), point["K"]
    kappa = np.sqrt(point["t"] * point["n_min"] * (K - 1) / K)
    balance = np.sqrt(SHARE * N) if point["kind"] == "network" else 1.0
    return ufm.Problem(n, width=point["width"], features="relu", lam_w=kappa / N * balance, lam_h=kappa / N / balance)


def identity(point: dict[str, Any]) -> int:
    """The seed of data and first weights: of the run, whatever t, so that the levels are compared from the same starts."""
    return sweep.seed_of({name: point[name] for name in ("dataset", "n_max", "n_min", "run", "seed")}) % 2**31


def data_of(point: dict[str, Any]) -> Any:
    """The data: a split of the digits or clusters of the run's seed; of data read from files the first samples of each class."""
    from ufm.bridge import data

    root = None if point["root"] is None else Path(point["root"])
    return data.load(point["dataset"], root, counts=counts_of(point).tolist(), seed=identity(point))


def network_of(point: dict[str, Any], example: Any) -> Any:
    """An MLP, every hidden layer ReLU, no BatchNorm, or a ResNet; W without bias."""
    from torch import nn

    from ufm.bridge import models

    with models.seeded(identity(point)):
        if point["body"] == "mlp":
            wide = [point["hidden"]] * point["layers"]
            body: Any = models.mlp((example[0].numel(), *wide, point["width"]))
        else:
            body = {"resnet18": models.resnet18, "resnet20": models.resnet20}[point["body"]](channels=example.shape[1])
        return models.Network(body, nn.Linear(body.out_features, point["K"], bias=False))


def training_of(point: dict[str, Any]) -> Any:
    """Full-batch Adam, or mini-batches and SGD with momentum for pictures; the rate falls along a cosine to zero."""
    import torch

    from ufm.bridge import SGD, Adam, Training

    rate, batch = point["rate"], point["batch"]
    optimiser = Adam(rate) if batch is None else SGD(rate, momentum=0.9)
    dtype, seed = getattr(torch, point["dtype"]), identity(point)
    return Training(point["epochs"], optimiser, batch, "cosine", every=point["every"], seed=seed, dtype=dtype)


def trained(point: dict[str, Any]) -> dict[str, Any]:
    """The row of a network: the prediction, a proven optimum, free descent from the network's own start, the trained network."""
    import torch

    from ufm.bridge import Monitor, models, penalty, train

    problem = problem_of(point)
    theory, n = ufm.predict(problem), problem.counts[0]
    device, dtype = device_of(point), getattr(torch, point["dtype"])
    data = data_of(point).to(device, dtype)
    model = network_of(point, data.inputs).to(device, dtype)
    monitor = Monitor(model, head="head", classes=point["K"], measure="full", targets=frames.imbalanced_targets(n, theory.margins[0]))
    begun = monitor.measure(passes(data))["head"].arrays
    history = train(
        model,
        data,
        training_of(point),
        penalty=lambda net, features, _: penalty(problem, models.weights(net.head), features),
        monitor=monitor,
        device=device,
        progress=False,
    )
    alive = history.stop is not ufm.Stop.DIVERGED
    ended = monitor.measure(passes(data))["head"] if alive else None
    H, W = (np.full_like(begun[name], np.nan) if ended is None else ended.arrays[name] for name in ("means", "classifier"))
    values = {} if ended is None else ended.values
    return (
        {f"predicted_{name}": value for name, value in prediction(theory).items()}
        | proven(problem, theory, point)
        | {f"gd_{name}": value for name, value in free(problem, theory, begun, point, "gd").items()}
        | {f"adam_{name}": value for name, value in free(problem, theory, begun, point, "adam").items()}
        | {f"net_{name}": value for name, value in end_of(problem, theory, H, W, history.objective[-1]).items()}
        | {f"net_{name}": values.get(name, np.nan) for name in ("nc1", "nc1_quotient")}
        | {
            "net_loss": history.loss[-1],
            "net_gradient": history.gradient_norm[-1],
            "net_stop": history.stop.name,
            "accuracy": history.accuracy[-1],
            "test_accuracy": history.test_accuracy[-1],
            "start_norms": np.linalg.norm(begun["means"], axis=0),
        }
        | curves(history, theory, point)
    )


def passes(data: Any) -> Iterator[Any]:
    """(inputs, labels) of the training samples, some at a time."""
    return (data.batch(slice(at, at + BATCH)) for at in range(0, len(data.labels), BATCH))


def prediction(theory: ufm.Prediction) -> dict[str, Any]:
    """The closed form of one cell."""
    return {
        "margins": theory.margins[0],
        "norms": np.sqrt(np.diagonal(theory.feature_gram[0])),
        "value": theory.value[0],
        "dead": theory.collapsed[0],
    }


def proven(problem: ufm.Problem, theory: ufm.Prediction, point: dict[str, Any]) -> dict[str, float]:
    """The optimum of the same problem by the solver, with its proven relative gap."""
    found = ufm.solve(problem, seed=point["seed"])
    return {"solved_gap": float(found.gap[0]), "solved_difference": float(found.value[0] / theory.value[0] - 1)}


def end_of(problem: ufm.Problem, theory: ufm.Prediction, H: Floats, W: Floats, value: float) -> dict[str, Any]:
    """What class means H (d, K) and classifier W (K, d) of this value are beside theory: of the optimum, and of the dead classes' energy.

    early: classes at zero that the optimum keeps. Distances and level are those of the stationary point with the same dead classes;
    margin, norm: largest relative error among live classes; cosine: the largest between two live class means.
    """
    n, K = problem.counts[0], problem.classes
    lengths = np.sqrt(np.diagonal(theory.feature_gram[0]))
    norms = to_numpy(metrics.class_norms(H[None]))[0]
    margins = to_numpy(metrics.margins((W @ H)[None], np.arange(K), "mean"))[0]
    dead = norms <= DEAD * lengths.max()
    live = ~dead & ~theory.collapsed[0]
    level = float(imbalance.dead_subset_value(n, problem.lam_w[0, 0], problem.lam_h[0], dead))
    target = frames.imbalanced_targets(n, np.where(dead, 0.0, theory.margins[0]))
    distances = metrics.target_distances(W[None], H[None], target)
    return {
        "margins": margins,
        "norms": norms,
        "dead": dead,
        "early": dead & ~theory.collapsed[0],
        "value": value,
        "gap": value / theory.value[0] - 1,
        "level_gap": value / level - 1,
        "margin": largest_error(margins, theory.margins[0], live),
        "norm": largest_error(norms, lengths, live),
        "cosine": largest_cosine(H[:, ~dead]),
    } | {name: float(to_numpy(x)[0]) for name, x in distances._asdict().items()}


def largest_error(values: Floats, exact: Floats, where: NDArray[np.bool_]) -> float:
    """The largest relative error among some classes, NaN without any."""
    return float(np.abs(values[where] / exact[where] - 1).max()) if where.any() else np.nan


def largest_cosine(H: Floats) -> float:
    """The largest cosine between two columns; 0 of a single one."""
    U = H / np.linalg.norm(H, axis=0)
    return float((U.T @ U)[~np.eye(U.shape[1], dtype=bool)].max(initial=0.0)) if np.isfinite(U).all() else np.nan


def free(problem: ufm.Problem, theory: ufm.Prediction, begun: dict[str, Floats], point: dict[str, Any], rule: str) -> dict[str, Any]:
    """Where descent of free features ends that starts at the class means and W of the untrained network: momentum, or Adam."""
    H, W = np.maximum(begun["means"], 0.0), begun["classifier"]
    made = descent(problem, theory, H[None], W[None]) if rule == "gd" else ufm.rules.Adam(ADAM)
    start = ufm.starts.given([H[None], W[None]])
    path = ufm.simulate(problem, made, steps=point["steps"], every=max(1, point["steps"] // 40), tol=SETTLED, start=start)
    found = end_of(problem, theory, path.factors[0][0], path.factors[1][0], float(path.last("value")[0]))
    return found | {"gradient": path.last("gradient_norm")[0], "stop": path.stop[0].name, "steps": int(path.steps[0])}


def descent(problem: ufm.Problem, theory: ufm.Prediction, H: Floats, W: Floats) -> ufm.rules.GradientDescent:
    """Gradient descent with momentum 0.9, its step two over the curvature at the start or the optimum, whichever has larger factors.

    In H diag(n)^{1/2} the curvature of the loss is at most about (|W|^2 + |H diag(n)^{1/2}|^2)/(2N), in spectral norms; heavy ball is
    stable up to 2 (1 + 0.9) over it.
    """
    n = problem.counts[0]
    first = [np.linalg.norm(X, 2, axis=(1, 2)).max() ** 2 for X in (W, H * np.sqrt(n))]
    last = np.linalg.eigvalsh(theory.classifier_gram[0])[-1], (n * np.diagonal(theory.feature_gram[0])).max()
    curvature = sum(map(max, zip(first, last, strict=True))) / (2 * n.sum())
    return ufm.rules.GradientDescent(2 / (curvature + max(problem.lam_w[0, 0], problem.lam_h[0])), momentum=0.9)


def curves(history: Any, theory: ufm.Prediction, point: dict[str, Any]) -> dict[str, Floats]:
    """What the network's records hold, (T,) and (T, K), NaN after one that diverged."""
    seen = history.metrics
    columns = {
        "gap": history.objective / theory.value[0] - 1,
        "gradient": history.gradient_norm,
        "margins": seen["class_margins@head"],
        "norms": seen["class_norms@head"],
        "nc1": seen["nc1_quotient@head"],
        "features": seen["target_features@head"],
        "classifier": seen["target_classifier@head"],
    }
    epochs = np.unique([*range(0, point["epochs"], point["every"]), point["epochs"]])
    missing = len(epochs) - len(history.epoch)
    padded = {name: np.concatenate([x, np.full((missing, *x.shape[1:]), np.nan)]) for name, x in columns.items()}
    return {"epoch": epochs} | {f"curve_{name}": padded[name] for name in CURVES}


def cell(point: dict[str, Any]) -> dict[str, Any]:
    """A cell of the map: the share of minority classes that free descent from balanced random starts leaves at zero, theory's threshold."""
    problem = problem_of(point)
    theory, n = ufm.predict(problem), problem.counts[0]
    seed, runs = sweep.seed_of({name: point[name] for name in ("K", "n_max", "n_min", "t", "seed")}), point["descents"]
    first = ufm.starts.first_factors(problem, ufm.starts.balanced(1.0), runs, seed, chain_of(problem))
    rule, start = descent(problem, theory, *first), ufm.starts.given(first)
    path = ufm.simulate(problem, rule, runs=runs, steps=point["steps"], every=100, tol=QUIET, probes=("class_norms",), start=start)
    lengths = np.sqrt(np.diagonal(theory.feature_gram[0]))
    dead = path.last("class_norms") <= DEAD * lengths.max()
    edges = {name: float((n.sum() * level[0]) ** 2 / n.min()) for name, level in boundaries(problem)._asdict().items() if name != "merged"}
    return {f"strength_{name}": edge for name, edge in edges.items()} | {
        "share": float(dead[:, n == n.min()].mean()),
        "settled": float(np.mean([stop.stationary for stop in path.stop])),
        "descent_gradient": float(path.last("gradient_norm").max()),
    }
