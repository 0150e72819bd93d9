"""Which (K, L) beat deep neural collapse (DNC) in deep ReLU chains, under squared error and cross-entropy, and by how much?

K balanced classes, free features, ReLU after W_1 ... W_{L-1}, one penalty lambda on every factor. DNC of these chains is the orthogonal
frame, with a closed-form value (Súkeník et al. 2024; Garrod & Keating 2025). Search, n = 1, width 2K: L-BFGS from the explicit graph
solution, with cross-entropy also from the nonnegative code T(r) and shifted pairs, as they are and perturbed, from random starts, and
beyond L = 4, where most of those die, from the best at L = 4 with a layer more at a time, at a tenth of the largest lambda at which DNC
exists; the best runs are polished and followed to smaller and larger lambda. What ends below
DNC's exact value proves that DNC is not optimal there, whatever its gradient: the optima lie at kinks of the ReLU, where no gradient
vanishes. Beside each value: how many pre-activations are at a kink, and the shortest convex combination of nearby gradients, which is
small near a stationary point, kinks or not.
Descent, n = 5: plain gradient descent at the papers' settings, then L-BFGS; the share of seeds at and below DNC over width and lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import computed, evenly, finish
from studies.relu_points import kinks, ranks, spectra, subgradient, within
from ufm import sweep
from ufm.arrays import to_numpy
from ufm.theory import deep, deep_points, deep_relu, deep_relu_ce
from ufm.theory.deep_relu import Block

Floats = NDArray[np.float64]

SHARES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.6, 0.95)  # of the largest lambda at which DNC exists
MIDDLE = SHARES.index(0.1)  # where the search begins
LOSSES = {"MSE": ufm.MSE(), "CE": ufm.CrossEntropy()}
SAME_VALUE = 1e-3  # relative distance to DNC's value within which a run of descent counts as DNC
RECORDS = 40  # of a descent
POLISHED, KEPT = 8, 2  # runs of a search that are polished, and that are then followed over lambda
SHALLOW = 4  # depth from which the best ends of random starts get more layers


@dataclass(frozen=True)
class Options(Common):
    """Which (K, L) beat deep neural collapse in deep ReLU chains, and by how much? Explicit, polished and random solutions, descent."""


@dataclass(frozen=True)
class Size:
    """Numbers of classes by origin, depths, shares of lambda below and above the middle, starts, steps; seeds and steps of descent."""

    graphs: tuple[int, ...] = (28, 21, 15, 10, 6, 3)
    pairs: tuple[int, ...] = (14, 10, 6, 4)
    random: tuple[int, ...] = (6, 5, 4, 3)
    depths: tuple[int, ...] = (7, 6, 5, 4, 3)
    down: int = 3
    up: int = 3
    random_starts: int = 200
    starts: int = 4
    steps: int = 1500
    seeds: int = 10
    descent_steps: int = 16_000
    points: int = 8


SIZES = {
    "full": Size(),
    "quick": Size((10, 6), (10, 4), (4, 3), (4, 3), 1, 1, 24, 2, 400, 3, 1500, 3),
    "smoke": Size((6,), (4,), (3,), (4, 3), 1, 0, 4, 1, 40, 2, 40, 2),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import deep_relu as figure

    table = computed(deep_relu_study, points(options), options, "deep ReLU")
    tables = {"rows_search": table.where(panel="search"), "rows_descent": table.pick(table["panel"] != "search")}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every point of every panel, the longest first."""
    size = SIZES[options.size]
    rest = {"seed": options.seed, "device": options.device}
    search = {"panel": "search", "n": 1, "down": size.down, "up": size.up, "steps": size.steps}

    def searches(origin: str, classes: Sequence[int], losses: Sequence[str], starts: int, *depths: int) -> list[dict[str, Any]]:
        found = sweep.grid(K=classes, depth=[*size.depths, *depths], loss=losses)
        return [search | rest | {"origin": origin, "starts": starts} | point | {"width": 2 * point["K"]} for point in found]

    def descents(panel: str, **axes: Any) -> list[dict[str, Any]]:
        usual = dict(K=[10], n=[5], depth=[4], width=[30], lam=[0.004], loss=["MSE"], step=[0.5], scale=[1.0], starts=[size.seeds])
        one = {"panel": panel, "origin": "descent", "steps": size.descent_steps}
        return [one | rest | point for point in sweep.grid(**usual | axes)]

    found = [
        *searches("graph", size.graphs, list(LOSSES), size.starts),
        *searches("random", size.random, list(LOSSES), size.random_starts),
        *(
            point | {"random_starts": size.random_starts}
            for point in searches("deepened", size.random, list(LOSSES), POLISHED)
            if point["depth"] > SHALLOW
        ),
        *searches("pairs", size.pairs, ["CE"], size.starts),
        *searches("code", [K for K in size.graphs if K > 3], ["CE"], size.starts, 2),
        *descents("cross-entropy", loss=["CE"], depth=[3], width=[70], lam=[2.0**-9]),
        *descents("width", width=evenly([80, 50, 30, 20, 15, 10], size.points)),
        *descents("lambda", lam=evenly([2.0**-e for e in (12, 11, 10, 9, 8, 7, 6)], size.points)),
    ]
    return sorted(found, key=lambda p: -p["depth"] * p["width"] * p["K"] * p["n"] * p["starts"] * p["steps"])


def deep_relu_study(points: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: a search over lambda, or the ends of gradient descent."""
    return [(search if p["panel"] == "search" else descent)(p, s) for p, s in zip(points, seeds, strict=True)]


def search(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """The best value found at each lambda beside the closed forms, what it is worth, and its ranks layer by layer."""
    shares = np.array(SHARES[MIDDLE - point["down"] : MIDDLE + 1 + point["up"]])
    lam = shares * largest(point)
    known = levels(point, lam)
    first = ufm.solve(
        problem_of(point, lam[point["down"]]),
        runs=point["starts"],
        seed=seed,
        method="lbfgs",
        start=start_of(point, lam[point["down"]], seed),
        tol=1e-8,
        max_steps=point["steps"] // 3 if point["origin"] == "random" else point["steps"],
        device=point["device"],
    )
    ends = followed(point, lam, [to_numpy(f)[lowest(first.value, POLISHED)] for f in first.factors])
    best = [_best(found) for found in ends]
    layers = [spectra(point, factors) for factors, _, _ in best]
    below = int(np.sum(first.value < known["dnc"][point["down"]] * (1 - 1e-9)))
    low, high = sweep.wilson(below, point["starts"])
    values = np.array([value for _, value, _ in best])
    return (
        {"shares": shares, "lam": lam, "values": values, "ratios": values / known["dnc"]}
        | known
        | {
            "gradients": np.array([gradient for _, _, gradient in best]),
            "stalled": np.array([found.stop[int(np.argmin(found.value))] is not ufm.Stop.STEPS for found in ends]),
            "subgradients": np.array(
                [subgradient(problem_of(point, x), factors, seed) for x, (factors, _, _) in zip(lam, best, strict=True)]
            ),
            "kinks": np.array([kinks(point, factors) for factors, _, _ in best]),
            "spread": np.array([np.ptp(np.sort(found.value)[:2]) / found.value.min() for found in ends]),
            "ranks": np.stack([ranks(s) for s in layers]),  # (shares, LAYERS)
            "spectra": layers[point["down"]],
        }
        | {"below": below / point["starts"], "below_low": low, "below_high": high}
    )


def followed(point: dict[str, Any], lam: Floats, factors: Sequence[Floats]) -> list[ufm.Solution]:
    """The runs polished at the middle lambda, then at each next larger and smaller one from the last ends."""
    middle, found = point["down"], {}
    for order in (range(middle, len(lam)), range(middle - 1, -1, -1)):
        start = list(factors) if middle not in found else [to_numpy(f)[lowest(found[middle].value, KEPT)] for f in found[middle].factors]
        for i in order:
            steps = point["steps"] if i == middle else point["steps"] // 2
            given, runs = ufm.starts.given(start), len(start[0])
            found[i] = ufm.solve(problem_of(point, lam[i]), runs=runs, method="lbfgs", start=given, tol=1e-8, max_steps=steps)
            start = [to_numpy(f)[lowest(found[i].value, KEPT)] for f in found[i].factors]
    return [found[i] for i in range(len(lam))]


def lowest(values: Floats, many: int) -> NDArray[np.int64]:
    """The runs with the lowest values, lowest first."""
    return np.argsort(values, kind="stable")[:many]


def descent(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Values along gradient descent, where each seed ended after L-BFGS, and the shares of seeds at and below DNC."""
    problem, runs = problem_of(point, point["lam"]), point["starts"]
    path = ufm.simulate(
        problem,
        ufm.rules.GradientDescent(point["step"]),
        runs=runs,
        seed=seed,
        steps=point["steps"],
        every=max(1, point["steps"] // RECORDS),
        start=ufm.starts.normal(point["scale"]),
        device=point["device"],
    )
    ended = [to_numpy(f) for f in path.factors]
    given, most = ufm.starts.given(ended), point["steps"] // 8
    found = ufm.solve(problem, runs=runs, method="lbfgs", start=given, tol=1e-8, max_steps=most, device=point["device"])
    known = {name: float(level) for name, level in levels(point, np.array(point["lam"])).items()}
    ratios = found.value / known["dnc"]
    each = [[to_numpy(f)[b] for f in found.factors] for b in range(runs)]
    layers = [spectra(point, factors) for factors in each]
    best = int(np.argmin(found.value))
    kinds = {"below": ratios < 1 - SAME_VALUE, "dnc_share": np.abs(ratios - 1) <= SAME_VALUE}
    row = {"step_numbers": path.step, "paths": path.value, "end_values": found.value, "end_ratios": ratios} | known
    for name, mask in kinds.items():
        low, high = sweep.wilson(int(mask.sum()), runs)
        row |= {name: mask.mean(), f"{name}_low": low, f"{name}_high": high}
    rank = np.array([ranks(s)[2 * point["depth"] - 3] for s in layers])  # before the last ReLU
    rank[found.value >= known["zero"] * (1 - SAME_VALUE)] = 0.0
    return row | {
        "end_gradients": found.gradient_norm,
        "end_kinks": np.array([kinks(point, factors) for factors in each]),
        "end_ranks": np.stack([ranks(s) for s in layers]),
        "mean_rank": rank.mean(),
        "mean_rank_error": rank.std(ddof=1) / np.sqrt(runs) if runs > 1 else 0.0,
        "end_dnc1": np.array([within(point, factors) for factors in zip(*ended, strict=True)]),
        "spectra": layers[best],
        "diverged": int(sum(stop is ufm.Stop.DIVERGED for stop in path.stop)),
    }


def problem_of(point: dict[str, Any], lam: float) -> ufm.Problem:
    """Samples as columns: class means are not exact for ReLU chains."""
    return ufm.Problem(
        ufm.counts.balanced(point["K"], point["n"]),
        width=point["width"],
        depth=point["depth"],
        features="free",
        activation="relu",
        loss=LOSSES[point["loss"]],
        lam_w=lam,
        lam_h=lam,
        columns="samples",
    )


def collapse(point: dict[str, Any]) -> list[Block]:
    """DNC of ReLU chains."""
    return [deep_relu.orthogonal(point["K"], point["depth"])]


def constructed(point: dict[str, Any]) -> list[Block] | None:
    """The explicit solution that a search starts from, and that descent is held against; None for random and deepened starts."""
    if point["origin"] in ("random", "deepened"):
        return None
    if point["origin"] == "pairs":
        return deep_relu_ce.paired(point["K"], point["depth"])
    make = deep_relu_ce.graph_code if point["origin"] == "code" else deep_relu.graph
    return [make(deep_relu.vertices(point["K"]), point["depth"])]


def largest(point: dict[str, Any]) -> float:
    """The largest lambda_eff at which DNC is a critical point."""
    if point["loss"] == "MSE":
        return deep_relu.largest(collapse(point))
    return deep_points.largest(deep_relu_ce.code(collapse(point)), point["depth"])


def levels(point: dict[str, Any], lam: Floats) -> dict[str, Floats]:
    """Closed forms at lambda: DNC, linear DNC (a bound for ReLU DNC under Assumption 1), the explicit solution (NaN: none), zero."""
    level = deep.lambda_eff(point["n"], lam, np.repeat(lam[..., None], point["depth"], axis=-1))
    blocks, squared = constructed(point), point["loss"] == "MSE"
    value = deep_relu.squared_error if squared else deep_relu_ce.cross_entropy
    dnc = value(collapse(point), level).value
    return {
        "lam_eff": level,
        "dnc": dnc,
        "linear": dnc if squared else deep_points.levels(deep_points.dnc(point["K"]), level, point["depth"]).value,
        "explicit": np.full(level.shape, np.nan) if blocks is None else value(blocks, level).value,
        "zero": np.full(level.shape, 0.5 if squared else np.log(point["K"])),
    }


def start_of(point: dict[str, Any], lam: float, seed: int) -> ufm.starts.Start | ufm.starts.Given:
    """Random, the best of a smaller depth, or factors of the explicit solution: as they are, then with a twentieth of them as noise."""
    if point["origin"] == "deepened":
        return ufm.starts.given(grown(point, seed))
    blocks = constructed(point)
    if blocks is None:
        return ufm.starts.balanced()
    squared = point["loss"] == "MSE"
    scales = (deep_relu.squared_error if squared else deep_relu_ce.cross_entropy)(blocks, lam).scales
    factors = deep_relu.factors(blocks, scales, 1, lam, [lam] * point["depth"], point["width"], centred=not squared)
    rng = np.random.default_rng(seed)
    noise = [0.05 * np.abs(x).max() * rng.standard_normal((point["starts"] - 1, *x.shape)) for x in factors]
    return ufm.starts.given([np.concatenate([x[None], x + e]) for x, e in zip(factors, noise, strict=True)])


def grown(point: dict[str, Any], seed: int) -> list[Floats]:
    """The lowest ends of random starts at depth SHALLOW, a layer more at a time up to the point's depth, solved again before each."""
    at = point | {"origin": "random", "depth": SHALLOW}
    start: Any = start_of(at, 0.0, seed)
    runs = point["random_starts"]
    while True:
        lam = SHARES[MIDDLE] * largest(at)
        found = ufm.solve(problem_of(at, lam), runs=runs, seed=seed, method="lbfgs", start=start, tol=1e-8, max_steps=point["steps"] // 3)
        factors = deeper([to_numpy(f)[lowest(found.value, point["starts"])] for f in found.factors])
        at["depth"] += 1
        if at["depth"] == point["depth"]:
            return factors
        start, runs = ufm.starts.given(factors), len(factors[0])


def deeper(factors: Sequence[Floats]) -> list[Floats]:
    """The same map with a layer more behind W_1, the projector on the span of its activations, and all norms made equal; 0 stays 0."""
    H, W, *rest = factors
    activations = np.maximum(W @ H, 0.0)
    longer = [H, W, activations @ np.linalg.pinv(activations), *rest]
    norms = np.maximum([np.linalg.norm(f, axis=(1, 2), keepdims=True) for f in longer], 1e-300)
    scales = np.exp(np.mean(np.log(norms), axis=0)) / norms
    return [f * scale for f, scale in zip(longer, scales, strict=True)]


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first: which (K, L) beat DNC at each lambda, and how often descent does."""
    said: dict[str, Any] = {}
    rows = table.where(panel="search")
    for loss in LOSSES:
        for depth in np.unique(rows["depth"]):
            own = rows.where(loss=loss, depth=depth)
            best: dict[tuple[float, int], float] = {}
            for K, ratios, down in zip(own["K"].tolist(), own.values("ratios"), own["down"].tolist(), strict=True):
                for share, ratio in zip(SHARES[MIDDLE - down :], ratios, strict=False):
                    best[share, K] = min(best.get((share, K), np.inf), float(ratio))
            for share in sorted({share for share, _ in best}):
                told = ", ".join(f"{K} ({r:.4f})" for (at, K), r in sorted(best.items()) if at == share and r < 1 - 1e-9)
                said[f"{loss}, L = {depth}, {share:g} of DNC's largest lambda: K below DNC (ratio of values)"] = told or "none"
    ends = table.pick(table["panel"] != "search")
    said["seeds of descent below DNC"] = f"{round(np.sum(ends['below'] * ends['starts']))} of {int(np.sum(ends['starts']))}"
    return said


def _best(found: ufm.Solution) -> tuple[list[Floats], float, float]:
    """Factors, value and gradient norm of the lowest run."""
    b = int(np.argmin(found.value))
    return [to_numpy(f)[b] for f in found.factors], float(found.value[b]), float(found.gradient_norm[b])
