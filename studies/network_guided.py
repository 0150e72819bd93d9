"""Does a trained network collapse faster with the nearest simplex ETF as classifier than with a fixed ETF or a trained classifier?

The protocol of Markou, Ajanthan & Gould (2024) as far as it is known: features normalised to radius 5, cross-entropy, batches of 256, 200
epochs, a table at epochs 50 and 200, 5 seeds. Ours: SGD with momentum 0.9, weight decay 5e-4, a rate of 0.05 that falls along a cosine.
Digits by default: an MLP whose last layer is linear with BatchNorm, so that features have all signs, as in the model (behind a ResNet-18,
for pictures, such a layer is added). Heads: trained with unit rows ("standard"), a fixed ETF, the nearest ETF with the gradient through
it on and off, and a plain linear layer without any normalisation. All heads of a seed share the body's first weights and the batches.
Balanced, and long-tailed (exponential sizes); metrics are about the mean of all samples, as those heads are. The reference of balanced data
is the proven floor of the loss (`theory.limits`); of long-tailed data, for which none is proven, where the simulated unconstrained model
of the same class sizes ends under the same head. A plain linear layer has neither: without penalties its loss falls to 0 with its norm.
With weight decay and BatchNorm the gradient of the whole objective does not vanish (the layers before BatchNorm are scale-invariant: slope
and decay are orthogonal); the gradient of the loss of the network as evaluated is stored beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.command import computed, finish, span
from studies.guided_networks import FALLING, FLOOR, LEVELS, network_guided
from studies.networks import MADE
from studies.networks import Options as Networks
from ufm import sweep

Floats = NDArray[np.float64]

RADIUS, BATCH, MOMENTUM = 5.0, 256, 0.9
GAIN = 10.0  # of AGD, for the model
LARGEST = 500  # samples of the largest class of the model: its optimum sees the shares of the classes alone
HEADS = (("standard", None), ("fixed", None), ("nearest", True), ("nearest", False), ("linear", None))  # each with its gradient through W
PAIRS = ((("nearest", True), ("fixed", None)), (("nearest", True), ("standard", None)), (("nearest", True), ("nearest", False)))


@dataclass(frozen=True)
class Options(Networks):
    """Does a network collapse faster with the nearest ETF as classifier than with a fixed ETF or a trained classifier?"""

    ratio: float = 10.0
    """largest over smallest class of the long-tailed data"""
    weight_decay: float = 5e-4
    """of all parameters"""
    epochs: int | None = None
    """passes over the data, fewer or more than the study's own"""
    runs: int | None = None
    """seeds of each head, fewer or more than the study's own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.ratio <= 150:
            raise ValueError(f"--ratio is {self.ratio}, but must be above 1 and at most 150")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"--weight-decay is {self.weight_decay}, but must be at least 0 and below 1")
        for name, value, least in (("epochs", self.epochs, 4), ("runs", self.runs, 1)):
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}, but must be at least {least}")


@dataclass(frozen=True)
class Size:
    """Epochs, epochs between records, seeds; samples of the largest class, batch, widths of layers and of features; steps of the model."""

    epochs: int = 200
    every: int = 1
    seeds: int = 5
    n: int = 150
    batch: int = BATCH
    hidden: int = 256
    width: int = 64
    steps: int = 2000


SIZES = {"full": Size(), "quick": Size(epochs=40, seeds=2, steps=400), "smoke": Size(4, 2, 2, 12, 64, 16, 16, 40)}
PICTURES = {"n": 5000, "width": 512, "every": 5}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import network_guided as figure

    table = computed(network_guided, points(options), options, "networks")
    sizes = {"balanced": 1.0, "tail": options.ratio}
    tables = {f"networks_{name}": table.where(kind="network", ratio=ratio) for name, ratio in sizes.items()}
    tables |= {f"model_{name}": table.where(kind="model", ratio=ratio) for name, ratio in sizes.items()}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every head and seed on balanced and on long-tailed data, and the model under every head that has a reference; networks first."""
    size, pictures = SIZES[options.size], options.dataset not in MADE
    if pictures and not options.smoke:
        size = replace(size, **PICTURES)
    K = 100 if options.dataset == "cifar100" else 10
    same = {"K": K, "width": max(size.width, K), "radius": RADIUS, "seed": options.seed, "device": options.device}
    trained = {
        "dataset": options.dataset,
        "root": None if options.root is None else str(options.root),
        "n": min(size.n, 500) if K == 100 else size.n,
        "epochs": options.epochs or size.epochs,
        "every": size.every,
        "hidden": size.hidden,
        "batch": size.batch,
        "lr": 0.05,
        "momentum": MOMENTUM,
        "weight_decay": options.weight_decay,
        "precision": "float32" if pictures else "float64",
    }
    simulated = {"dataset": options.dataset, "n": min(trained["n"], LARGEST), "steps": size.steps, "gain": GAIN}
    found = []
    for ratio in (1.0, options.ratio):
        for head, gradient in HEADS:
            own = {"ratio": ratio, "head": head, "gradient": gradient} | same
            found += [{"kind": "network", "run": run} | own | trained for run in range(options.runs or size.seeds)]
            found += [{"kind": "model", "run": 0} | own | simulated] if head != "linear" else []
    return sorted(found, key=lambda p: p["kind"] != "network")


def summary(table: sweep.Table) -> dict[str, Any]:
    """Data by data and head by head: how near to the reference, how accurate and when; then heads against each other, seed by seed."""
    from figures.network_guided import early, paired, reference

    networks = table.where(kind="network")
    said: dict[str, Any] = {"networks": len(networks), "diverged": int(np.sum(~networks["finite"]))}
    for ratio in sorted(set(networks.values("ratio"))):
        rows = networks.where(ratio=ratio)
        name = "balanced" if ratio == 1 else f"long-tailed 1:{ratio:g}"
        quarter = early(rows)
        for head, gradient in HEADS:
            own, level = rows.where(head=head, gradient=gradient), reference(table, ratio, head, gradient)
            said[f"{name}, {title(head, gradient)}"] = f"{nearness(own, level, ratio)}; {ends(own, quarter)}"
        for first, second in PAIRS:
            sides = [rows.where(head=h, gradient=g) for h, g in (first, second)]
            said[f"{name}, {title(*first)} against {title(*second)}"] = claims(*sides, quarter)
            for measure in FALLING:
                told = [
                    f"to {level:g} {p.ratio:.3g} ({p.low:.3g} to {p.high:.3g}; {p.seeds} of {len(sides[0])} pairs)"
                    for level, p in zip(LEVELS, paired(*sides, f"reached_{measure}"), strict=True)
                    if p.seeds > 1
                ]
                if told:
                    said[f"{name}, epochs that {measure} takes, {title(*first)} over {title(*second)}"] = "; ".join(told)
    return said


def nearness(own: sweep.Table, level: float, ratio: float) -> str:
    """How far the loss of some networks has ended from its reference."""
    excess = own["end_cross_entropy"] - level
    if not np.isfinite(level):
        return f"cross-entropy {span(own['end_cross_entropy'])}, no reference"
    many, what = int(np.sum(np.abs(excess) <= FLOOR)), "the floor" if ratio == 1 else "the model"
    return f"cross-entropy {span(excess)} above {what} {level:.5g}, {many} of {len(own)} within {FLOOR:g}"


def ends(own: sweep.Table, quarter: int) -> str:
    """Where some networks have ended, with accuracies at the record of a quarter of the epochs too."""
    then = [span(own[name][:, quarter]) for name in ("accuracy", "test_accuracy")]
    return (
        f"margin {span(own['end_margin_gap'])} below {own['limit'][0]:.4g}; NC1 {span(own['end_nc1'])}, NC3 {span(own['end_nc3'])}; "
        f"accuracy at epoch {own['epoch'][0][quarter]:g}: {then[0]}, test {then[1]}, at {own['epochs'][0]}: {span(own['end_accuracy'])}, "
        f"test {span(own['end_test_accuracy'])}, smaller half of the classes {span(own['end_tail_test_accuracy'])}; "
        f"gradient of the loss {span(own['loss_gradient'])}"
    )


def claims(own: sweep.Table, other: sweep.Table, quarter: int) -> str:
    """What the source claims of the nearest ETF, seed by seed: nearer to collapse early, no less accurate at the end, a smaller range."""

    def wins(name: str, at: int, sign: int) -> str:
        return f"{int(np.sum(sign * (own[name][:, at] - other[name][:, at]) >= 0))} of {len(own)}"

    early, end = (f"epoch {own['epoch'][0][at]:g}" for at in (quarter, -1))
    ranges = [f"{np.ptp(rows['test_accuracy'][:, at]):.3g}" for at in (quarter, -1) for rows in (own, other)]
    return (
        f"loss no higher in {wins('cross_entropy', quarter, -1)} seeds at {early}, {wins('cross_entropy', -1, -1)} at {end}; NC1 in "
        f"{wins('nc1', quarter, -1)}, {wins('nc1', -1, -1)}; test accuracy no lower in {wins('test_accuracy', quarter, 1)}, "
        f"{wins('test_accuracy', -1, 1)}, its range over the seeds {ranges[0]} against {ranges[1]}, {ranges[2]} against {ranges[3]}"
    )


def title(head: str, gradient: bool | None) -> str:
    """The head in words."""
    if head == "nearest":
        return f"nearest ETF, gradient {'on' if gradient else 'off'}"
    return {"standard": "standard", "fixed": "fixed ETF", "linear": "plain linear layer"}[head]
