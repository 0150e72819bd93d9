"""What the end of a network with a deep head, or of a run of its unconstrained model, is: value, level, name, ranks, spectra, logits.

`point` is a point of the study network_low_rank; arrays of rows have one shape for all depths, NaN around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from ufm import sweep
from ufm.arrays import to_numpy
from ufm.landscape.classify import class_logits
from ufm.landscape.structures import structures
from ufm.objective import objective as objective_of
from ufm.theory import deep, deep_points

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BATCHES = 5  # of an epoch: 10,000 of 50,000 samples in the papers
RANK, TINY = 1e-3, 1e-6  # singular values above these shares of the largest count
DEPTHS = 5  # room for weight matrices
LAYERS = 2 * DEPTHS  # and for layers: features, before and after each ReLU, logits
TIMES = 120  # of a simulated path


def levels(problem: ufm.Problem) -> dict[str, float]:
    """Values of the structures with a closed form at the problem's lambda_eff, DNC first; under ReLU that of linear DNC too; zero."""
    K, L, lam = problem.classes, problem.depth, lambda_eff(problem)
    found = {structure.name: float(structure.at(np.array([lam]))[0].value[0]) for structure in structures(problem)}
    if problem.activation == "relu" and L > 1:
        found["linear DNC"] = float(deep_points.levels(deep_points.dnc(K), lam, L).value)
    return found | {"zero": float(np.log(K))}


def loss_at_collapse(problem: ufm.Problem) -> float:
    """The data loss of DNC."""
    dnc = structures(problem)[0].at(np.array([lambda_eff(problem)]))[0]
    return float(deep.fit(dnc.M)[0])


def lambda_eff(problem: ufm.Problem) -> float:
    """(n lam_h lam_1 ... lam_L)^{1/(L+1)} of a problem of one cell."""
    return float(deep.lambda_eff(problem.counts[0, 0], problem.lam_h[0], problem.lam_w[0]))


def of_history(point: dict[str, Any], history: Any) -> dict[str, Any]:
    """The curves of a training over lambda t, NaN behind a divergence, and what its last record says."""
    every = max(1, point["epochs"] // point["records"])
    epochs = np.unique([*range(0, point["epochs"], every), point["epochs"]])

    def padded(values: Any) -> Floats:
        found = np.asarray(values, dtype=np.float64)
        return np.concatenate([found, np.full(len(epochs) - len(found), np.nan)])

    spectrum, objective = history.metrics["means_spectrum@"], padded(history.objective)
    return {
        "lam_t": point["lam"] * duration(point) * epochs / point["epochs"],
        "objective": objective,
        "drift": float(objective[int(0.9 * (len(objective) - 1))] / objective[-1] - 1),
        "loss": padded(history.loss),
        "gradient_norm": padded(history.gradient_norm),
        "ranks": padded(np.sum(spectrum > RANK * spectrum[:, :1], axis=1)),
        "gradient": float(history.gradient_norm[-1]),
        "accuracy": float(history.accuracy[-1]),
        "test_accuracy": float(history.test_accuracy[-1]),
        "stop": history.stop.name,
    }


def of_network(point: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
    """What the end of a training is as a point of its unconstrained model."""
    from ufm.bridge import models

    features, labels = features_of(network, data)
    W = [w.detach().cpu().double().numpy() for w in models.weights(network.head)]
    problem = model_of(point, float((W[0] ** 2).sum() / (features**2).sum()))
    layers = hidden(point, features.T, W)
    known, H = levels(problem), class_means(features, labels)
    value, loss = value_of(problem, features.T, W, labels)
    M = class_means(layers[-1].T, labels)
    M -= M.mean(axis=0)
    within, between = features - H.T[labels], H - H.mean(axis=1, keepdims=True)
    return {
        "value": value,
        "end_loss": loss,
        "dnc": known["DNC"],
        "dnc_loss": loss_at_collapse(problem),
        "ratio": value / known["DNC"],
        "below": value < known["DNC"],
        "lam_eff": lambda_eff(problem),
        "nc1": float((within**2).sum() / len(labels) / ((between**2).sum() / point["K"])),
        **shape_of(M, [class_means(X.T, labels) for X in layers[:-1]], W),
        **ending(point, problem, [H, *W]),
    }


def model_of(point: dict[str, Any], ratio: float) -> ufm.Problem:
    """The unconstrained model that the training settings stand for; ratio: ||W_1||^2/sum_i ||h_i||^2, which weight decay alone needs."""
    from ufm.bridge.problem import ufm_problem

    counts, held = [point["n"]] * point["K"], point["penalty"] == "features"
    penalties: dict[str, Any] = (
        {"weight_penalty": point["lam"], "feature_penalty": point["lam"] / point["n"], "decayed": "head"}
        if held
        else {"weight_decay": point["lam"], "decayed": "all", "feature_ratio": 1 / ratio}
    )
    shape: dict[str, Any] = {"width": point["width"], "depth": point["depth"], "activation": point["activation"]}
    return ufm_problem(counts, features="free", batch=-(-sum(counts) // BATCHES), **shape, **penalties).problem


def features_of(network: Any, data: Any) -> tuple[Floats, Ints]:
    """Features (N, d) of the training set, in evaluation mode, a fifth of them at a time; labels (N,)."""
    import torch

    device = next(network.parameters()).device
    data = data.to(device)
    network.eval()
    with torch.no_grad():
        parts = [network.body(data.batch(at)[0]) for at in torch.arange(len(data.labels), device=device).tensor_split(BATCHES)]
    return torch.cat(parts).cpu().double().numpy(), data.labels.cpu().numpy()


def class_means(features: Floats, labels: Ints) -> Floats:
    """Columns: means of the rows of each class, (d, K)."""
    return np.stack([features[labels == k].mean(axis=0) for k in range(int(labels.max()) + 1)], axis=1)


def hidden(point: dict[str, Any], H: Floats, W: Sequence[Floats]) -> list[Floats]:
    """[H, W_1 H, (s(W_1 H),) ..., Z]: before and after each ReLU, or once a layer of a linear head."""
    layers = [H]
    for w in W:
        layers.append(w @ layers[-1])
        if point["activation"] == "relu" and w is not W[-1]:
            layers.append(np.maximum(layers[-1], 0.0))
    return layers


def value_of(problem: ufm.Problem, H: Floats, W: Sequence[Floats], labels: Ints) -> tuple[float, float]:
    """F at all samples' features H (d, N), and its data loss, in float64."""
    F = objective_of(replace(problem, columns="samples"))  # whose columns go class by class
    factors = [x[None] for x in (H[:, np.argsort(labels, kind="stable")], *W)]
    return float(F.value(factors)[0]), float(F.loss.value(F.logits(factors), F.targets)[0] @ F.column_weight[0, 0])


def shape_of(M: Floats, means: Sequence[Floats], W: Sequence[Floats]) -> dict[str, Any]:
    """Centred mean logits with classes in the order of their partners, spectra and ranks of all layers' class means and of every W_l."""
    K = len(M)
    spectra, weights = np.full((LAYERS, K), np.nan), np.full((DEPTHS, max(W[0].shape)), np.nan)
    for row, X in zip(spectra, [*means, M], strict=False):
        s = np.linalg.svd(X, compute_uv=False)
        row[: len(s)] = s
    for row, w in zip(weights, W, strict=False):
        s = np.linalg.svd(w, compute_uv=False)
        row[: len(s)] = s
    of_layers, s = above(spectra, RANK), spectra[len(means)]
    rank = int(of_layers[len(means)])
    return {
        "order": order_of(M),
        "logits": M,
        "spectra": spectra,
        "weight_spectra": weights,
        "layer_ranks": of_layers,
        "weight_ranks": above(weights, RANK),
        "weights_above_tiny": above(weights, TINY),
        "rank": rank,
        "rank_gap": float(s[rank - 1] / s[rank]) if rank < K and s[rank] > 0 else np.inf,
        "feature_rank": int(of_layers[0]),
        "narrowest": int(np.nanmin(of_layers)),
    }


def above(spectra: Floats, share: float) -> Floats:
    """How many singular values of each row are above this share of the row's largest, NaN of a row without any."""
    return np.where(np.isnan(spectra[:, 0]), np.nan, (spectra > share * spectra[:, :1]).sum(axis=1))


def order_of(M: Floats) -> Ints:
    """The classes, each followed by the one whose logits it holds down most, if that is free: pairs stand side by side."""
    coupling = M + M.T + np.diag(np.full(len(M), np.inf))
    order: list[int] = []
    for k in range(len(M)):
        for j in (k, int(coupling[k].argmin())):
            if j not in order:
                order.append(j)
    return np.array(order)


def ending(point: dict[str, Any], problem: ufm.Problem, factors: Sequence[Floats]) -> dict[str, Any]:
    """The name of the class means and weights as a point of the model, and of the point that L-BFGS reaches from them.

    Minima of ReLU chains lie at kinks, where no gradient vanishes: only what matches a closed form has a name there.
    """
    linear = point["activation"] == "linear"
    here = ufm.classify(problem, [f[None] for f in factors], polish=linear, inertia=False)
    found = ufm.solve(problem, method="lbfgs", start=ufm.starts.given(factors), tol=1e-9, max_steps=point["polish"])
    there = ufm.classify(problem, found.factors, polish=linear, inertia=False)
    return {
        "name": str(here.name[0]),
        "kind": str(here.kind[0]),
        "reason": str(here.reason[0]),
        "means_value": float(objective_of(problem).value([f[None] for f in factors])[0]),
        "basin": str(there.name[0]),
        "basin_rank": int(there.rank[0]),
        "basin_value": float(there.value[0]),
        "basin_gradient": float(found.gradient_norm[0]),
    }


def of_paths(point: dict[str, Any], problem: ufm.Problem, path: ufm.records.Trajectory) -> dict[str, Any]:
    """The values of simulated runs over lambda t, and what their ends are; spectra and logits of the first.

    Under ReLU after L-BFGS, and settled where its second half hardly changes the value.
    """
    linear, runs, dnc = point["activation"] == "linear", point["runs"], levels(problem)["DNC"]
    factors: Sequence[Any] = [to_numpy(f) for f in path.factors]
    settled = np.array([stop.stationary for stop in path.stop])
    for last in () if linear else (False, True):
        start, steps = ufm.starts.given(factors), point["polish"] // 2
        found = ufm.solve(problem, runs=runs, method="lbfgs", start=start, tol=1e-9, max_steps=steps, device=point["device"])
        settled = last & (objective_of(problem).value(factors) / found.value - 1 <= point["settled_below"])
        factors = [to_numpy(f) for f in found.factors]
    kinds = ufm.classify(problem, factors, polish=linear, inertia=linear)
    times = np.geomspace(point["rate"], duration(point), TIMES)
    below = int(np.sum(kinds.value < dnc))
    low, high = sweep.wilson(below, runs)
    M, labels = class_logits(problem, factors), problem.labels[0]
    ends = [
        shape_of(M[b], [class_means(X.T, labels) for X in hidden(point, f[0], f[1:])[:-1]], f[1:])
        for b, f in enumerate(zip(*factors, strict=True))
    ]
    return {
        "dnc": dnc,
        "lam_eff": lambda_eff(problem),
        "path_lam_t": point["lam"] * times,
        "paths": np.stack([np.interp(times, t[ok], v[ok]) for t, v in zip(path.time, path.value, strict=True) for ok in [np.isfinite(t)]]),
        "end_names": kinds.name,
        "end_ranks": np.array([end["rank"] for end in ends]),
        "end_narrowest": np.array([end["narrowest"] for end in ends]),
        "end_values": kinds.value,
        "end_ratios": kinds.value / dnc,
        "end_gradients": kinds.gradient_norm,
        "end_minima": kinds.is_minimum,
        "settled": settled,
        "below_count": below,
        "below_low": float(low),
        "below_high": float(high),
        **{name: ends[0][name] for name in ("order", "logits", "spectra", "weight_spectra", "layer_ranks")},
    }


def duration(point: dict[str, Any]) -> float:
    """The flow time of a training: rate times steps."""
    return float(point["rate"] * BATCHES * point["epochs"])


def settings(rows: sweep.Table) -> list[dict[str, Any]]:
    """The settings that occur, in the order of the table."""
    columns = [rows.values(name) for name in SETTING]
    return [dict(zip(SETTING, found, strict=True)) for found in dict.fromkeys(zip(*columns, strict=True))]


SETTING = ("activation", "penalty", "depth", "lam")


def title(setting: dict[str, Any]) -> str:
    """A setting in words."""
    held = "weight decay" if setting["penalty"] == "decay" else "model's penalty"
    return f"{'ReLU' if setting['activation'] == 'relu' else 'linear'} head, L = {setting['depth']}, {held} {setting['lam']:g}"
