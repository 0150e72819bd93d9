"""Does a trained ReLU network reach the margins, norms, orthogonality and collapse thresholds of nonnegative free features?

Dang et al. 2024: half the classes with n_max samples, half with n_min; cross-entropy, no bias; level t = kappa^2 K/((K-1) n_min), kappa^2 =
N^2 lam_w lam_h, so that the smallest classes are at zero from t = 1 on. Networks: every hidden layer ReLU, that of the features too, no
BatchNorm; only the features and the last layer are penalised (`bridge.penalty`); full-batch Adam, its rate falling along a cosine. Each
is held against the closed form, against a proven optimum of the same problem, and against descent of free features that starts at the
network's own class means and W (gradient descent with momentum, which is the same on samples, and Adam). Over the map of
`minority_collapse` networks stand as points: the share of minority classes at zero. Single samples end at zero too: a class of three that
lost one is live, and its margin, that of its mean, falls short. Networks always take torch: --device numpy is cpu.

Digits and Gaussian clusters by default; --dataset cifar10 --root DIR --device cuda trains a ResNet-18 by SGD on mini-batches (its
features leave a mean over pixels; its body has BatchNorm), mnist and its kind a ResNet-20.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studies.command import computed, finish
from studies.imbalance_points import cell, trained
from studies.imbalance_table import compared, groups, networks
from studies.networks import Dataset
from studies.networks import Options as Networks
from ufm import sweep

LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.05)
WEAK, CLOSE = 0.3, 0.02  # margins of live classes are held against theory to 2 % up to this level
N_MAX = 5000  # samples of the largest class on the map, as in `minority_collapse`
RATIOS, STRENGTHS = (3.0, 150.0), (0.04, 1.2)  # of the map


@dataclass(frozen=True)
class Options(Networks):
    """Does a trained ReLU network reach the margins, norms, orthogonality and thresholds of free features? Networks against theory."""

    dataset: Dataset | None = None
    """on which data; clusters and digits by default, clusters with --smoke"""
    runs: int | None = None
    """networks of each data set and level, fewer or more than the study's own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs is not None and self.runs < 1:
            raise ValueError(f"--runs is {self.runs}, but at least one network is needed")


@dataclass(frozen=True)
class Case:
    """How a data set is cut and trained on: sizes (n_max, n_min) of the classes; layers of `hidden` units, features of `width`."""

    K: int
    sizes: tuple[tuple[int, int], ...]
    seeds: int
    body: str
    hidden: int
    width: int
    epochs: int
    rate: float
    layers: int = 2
    batch: int | None = None
    dtype: str = "float64"


PICTURES = Case(10, ((5000, 500), (5000, 50)), 5, "resnet18", 0, 512, 300, 0.05, batch=128, dtype="float32")
SMALL = replace(PICTURES, body="resnet20", width=64)
CASES = {
    "clusters": Case(4, ((100, 10), (200, 4)), 12, "mlp", 48, 32, 3000, 5e-3),
    "digits": Case(10, ((100, 10), (150, 3)), 8, "mlp", 128, 64, 4000, 3e-3),
    "mnist": SMALL,
    "fashionmnist": SMALL,
    "kmnist": SMALL,
    "cifar10": PICTURES,
    "cifar100": replace(PICTURES, K=100, sizes=((500, 50),)),
}


@dataclass(frozen=True)
class Size:
    """Share of the epochs, networks a level, levels, pairs of class sizes; cells of the map, its descents, and steps of every descent."""

    epochs: float = 1.0
    seeds: int = 100
    levels: tuple[float, ...] = LEVELS
    sizes: int = 2
    cells: int = 12
    descents: int = 16
    steps: int = 20000
    records: int = 40


SIZES = {
    "full": Size(),
    "quick": Size(0.4, 2, (0.05, 0.4, 0.8, 1.05), 1, 5, 8, 8000),
    "smoke": Size(0.03, 2, (0.05, 1.05), 1, 2, 2, 200, 4),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import network_imbalance as figure

    table = computed(network_imbalance, points(options), options, "networks and map")
    if table.failures:
        return finish(options.folder, {}, {}, figure.draw)
    tables = {f"networks_{name}": rows for name, rows in networks(table)} | {"map": table.where(kind="map"), "table": compared(table)}
    return finish(options.folder, tables, summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every network, the longest first, and every cell of the map."""
    size = SIZES[options.size]
    names = (options.dataset,) if options.dataset else ("clusters",) if options.smoke else ("clusters", "digits")
    shared = {"seed": options.seed, "steps": size.steps}
    found = []
    for name in names:
        case = CASES[name]
        epochs = max(1, round(size.epochs * case.epochs))
        own = {"K": case.K, "body": case.body, "hidden": case.hidden, "layers": case.layers, "width": case.width}
        how = {"rate": case.rate, "batch": case.batch, "dtype": case.dtype, "epochs": epochs, "every": -(-epochs // size.records)}
        where = {"device": options.device, "root": None if options.root is None else str(options.root)}
        found += [
            {"kind": "network", "dataset": name, "n_max": most, "n_min": least, "t": t, "run": run} | own | how | where | shared
            for most, least in case.sizes[: size.sizes]
            for t in size.levels
            for run in range(options.runs or min(case.seeds, size.seeds))
        ]
    found.sort(key=lambda p: -p["epochs"] * p["n_max"] * p["K"] * (1000 if p["batch"] else 1))
    wide = {CASES[name].K: CASES[name].width for name in names}
    return found + [
        {"kind": "map", "K": K, "width": width, "ratio": ratio, "strength": strength, "n_max": N_MAX, "n_min": round(N_MAX / ratio)}
        | {"t": strength * K / (K - 1), "descents": size.descents}
        | shared
        for K, width in wide.items()
        for ratio in np.geomspace(*RATIOS, size.cells)
        for strength in np.linspace(*STRENGTHS, size.cells)
    ]


def network_imbalance(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a network or cell of the map."""
    from threadpoolctl import threadpool_limits

    made = {"network": trained, "map": cell}
    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        return [made[point["kind"]](point) for point in points]


def summary(table: sweep.Table) -> dict[str, Any]:
    """Data by data: margins against theory, the objective against the optimum's and that of the dead classes, deaths against t."""
    rows = table.where(kind="network")
    said: dict[str, Any] = {
        "networks": len(rows),
        "diverged": int(np.sum(rows["net_stop"] == "DIVERGED")),
        "largest proven gap of the optima": f"{rows['solved_gap'].max():.1e}",
        "largest difference of the closed form from them": f"{np.abs(rows['solved_difference']).max():.1e}",
    }
    for name, ratio, own in groups(table):
        title = f"{name}, R = {ratio:g}"
        weak = own["t"] <= WEAK
        said |= {f"{title}, margins of live classes, t {sign} {WEAK:g}": within(own.pick(at)) for sign, at in (("<=", weak), (">", ~weak))}
        early = np.asarray(own["net_early"], dtype=bool).any(axis=1)
        said[f"{title}, objective, nothing dead early"] = energies(own.pick(~early), "gap", "the optimum's")
        said[f"{title}, objective, classes dead early"] = (
            f"{energies(own.pick(early), 'level_gap', 'that of their dead classes')}; {energies(own.pick(early), 'gap', 'the optimum')}"
        )
        said[f"{title}, cosines of live class means"] = f"at most {np.nanmax(own['net_cosine']):.2g}"
        said[f"{title}, within- over between-class variance"] = f"at most {np.nanmax(own['net_nc1_quotient']):.1e}"
        said[f"{title}, scale-free gradient at the end"] = (
            f"{np.nanmedian(own['net_gradient']):.1e}, at most {np.nanmax(own['net_gradient']):.1e}"
        )
        for t in np.unique(own["t"]):
            said[f"{title}, t = {t:g}, minority classes at zero"] = deaths(own.pick(own["t"] == t))
    return said


def within(rows: sweep.Table) -> str:
    """How near the margins of live classes are to theory's."""
    errors = rows["net_margin"]
    known = errors[np.isfinite(errors)]
    near = int(np.sum(known <= CLOSE))
    largest = f"; largest {100 * known.max():.2g} %" if known.size else ""
    return f"within {100 * CLOSE:g} % in {near} of {known.size} runs with one{largest}" + ("" if near == known.size else ", so NOT in all")


def energies(rows: sweep.Table, name: str, of: str) -> str:
    """The relative excess of the objective over a level."""
    gaps = rows[f"net_{name}"] if len(rows) else np.array([])
    return f"{np.median(gaps):.1e} above {of} (at most {gaps.max():.1e}, {len(gaps)} runs)" if gaps.size else "no such run"


def deaths(rows: sweep.Table) -> str:
    """How many of the minority classes are at zero, predicted, of the networks, and of free descent from their starts."""
    half = rows["K"][0] // 2
    dead = {prefix: np.asarray(rows[f"{prefix}dead"], dtype=bool)[:, -half:] for prefix in ("predicted_", "gd_", "adam_", "net_")}
    low, high = sweep.wilson(dead["net_"].sum(), dead["net_"].size)
    same = int(np.all(dead["net_"] == dead["gd_"], axis=1).sum())
    return (
        f"predicted {dead['predicted_'].sum()} of {dead['net_'].size}, networks {dead['net_'].sum()} (share {low:.2f} to {high:.2f}), free "
        f"descent from their starts {dead['gd_'].sum()} with momentum, {dead['adam_'].sum()} with Adam; the same classes as with momentum "
        f"in {same} of {len(rows)} runs"
    )
