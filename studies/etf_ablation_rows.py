"""One row of the ablation of the nearest ETF: a setting's runs with their curves, or one nearest ETF and its gradient.

Arrays are (S,) of the seeds, or (S, T) at the steps SHOWN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from ufm import etf, etf_policies, metrics, sweep
from ufm.arrays import flatten, namespace, norm, to_numpy
from ufm.dynamics import Snapshot, iterate
from ufm.headed import Headed
from ufm.objective import chain_of
from ufm.starts import first_factors
from ufm.theory import limits

Floats = NDArray[np.float64]

RADIUS = 5.0
LEVELS = {"2": 1e-2, "4": 1e-4, "6": 1e-6}  # above the floor
SETTLED = 1e-4  # a run is settled once its loss is within this of its own end
GUARD = 0.05  # the recommended one
SHOWN = (
    *range(11),
    13,
    16,
    20,
    25,
    30,
    35,
    40,
    45,
    50,
    60,
    70,
    80,
    90,
    100,
    120,
    140,
    160,
    180,
    200,
    230,
    260,
    300,
    350,
    400,
    500,
    600,
    700,
    800,
)
RULES: dict[str, Any] = {
    "AGD": ufm.rules.AGD(10.0),
    "Adam": ufm.rules.Adam(0.2),
    "momentum": ufm.rules.GradientDescent(150.0, 0.9),
}
LAWS: dict[str, etf_policies.Averaging] = {
    "2/(t+1)": etf_policies.Paper(),
    "1/t": etf_policies.Cumulative(),
    "0.1": etf_policies.Constant(0.1),
    "0.01": etf_policies.Constant(0.01),
    "none": etf_policies.Latest(),
}
WEIGHTS = {"equal": 0.0, "sizes": 1.0, "inverse sizes": -1.0}  # powers of the class sizes


def counts_of(point: dict[str, Any]) -> NDArray[np.int64]:
    """Class sizes, the largest n."""
    if point["pattern"] == "step":
        return ufm.counts.step(point["K"], round(point["n"] / point["ratio"]), point["ratio"])
    return ufm.counts.exponential(point["K"], point["n"], point["ratio"])


def problem_of(point: dict[str, Any]) -> ufm.Problem:
    """The problem of a point, a cell for each seed."""
    counts = counts_of(point)
    head = ufm.heads.NearestETF(
        form=point["form"],
        delta=point["delta"],
        relative_delta=point["relative"] or None,
        weights=None if point["weights"] == "equal" else counts ** WEIGHTS[point["weights"]],
        prox=etf_policies.Lagged() if point["near"] == "lagged" else etf_policies.Reference(unrelated(point, 0)),
        averaging=LAWS[point["averaging"]],
        guard=point["guard"],
        gradient=point["gradient"],
    )
    plain: dict[str, Any] = {"features": "free", "lam_w": 0.0, "lam_h": 0.0, "columns": "samples"}
    return ufm.Problem(np.tile(counts, (point["seeds"], 1)), width=point["width"], head=head, radius=RADIUS, **plain)


def start_of(point: dict[str, Any]) -> Floats:
    """Features (S, d, N), equal for all options of the head; every second class at the one before it but for a share `apart`."""
    problem = problem_of(point)
    seed = sweep.seed_of({name: point[name] for name in ("K", "width", "n", "pattern", "ratio", "start", "seed")})
    law = ufm.starts.agd() if point["start"] == "agd" else ufm.starts.normal(np.sqrt(point["width"]))  # entries of variance 1
    H = first_factors(problem.cell(0), law, point["seeds"], seed, chain_of(problem))[0]
    if point["apart"] < 1:
        own = H.reshape(*H.shape[:2], point["K"], -1)
        even, odd = own[:, :, 0 : point["K"] // 2 * 2 : 2], own[:, :, 1::2]
        odd[:] = np.sqrt(1 - point["apart"] ** 2) * even + point["apart"] * odd
    return H


class Record(NamedTuple):
    """What is measured of a run at a step; the names are the columns, NaN once it has diverged."""

    excess: Floats  # the loss above its floor, NaN for unequal classes
    loss: Floats
    class_loss: Floats  # mean over classes of the mean loss of a class
    gradient_norm: Floats
    share: Floats  # ||indirect||/||direct|| of the gradient in the features
    displacement: Floats  # ||W - W'||_F/||W||_F, W' the ETF nearest to the class means of the step, by the same class weights
    s_min: Floats
    condition: Floats
    nc1: Floats
    nc3: Floats
    margin: Floats  # mean cosine margin
    minority_margin: Floats  # of the smaller half of the classes, a mean of class means


def record(snapshot: Snapshot, floor: float) -> Record:
    """The measurements of a snapshot's runs."""
    frame, of, near = snapshot.frame, snapshot.statistics, snapshot.nearest
    assert isinstance(frame, Headed)
    assert near is not None
    W = snapshot.factors[1]
    losses, _ = frame.objective.loss.value_and_slope(snapshot.logits, frame.objective.targets)
    margins = metrics.cosine_margins(*snapshot.factors[:2], snapshot.problem.labels)
    ones = namespace(losses).ones_like(losses)[:, None, :]
    by_class = [frame.classes.means(x[:, None, :], ones)[:, 0, :] for x in (losses, margins)]
    found = (
        snapshot.value - floor,
        snapshot.value,
        by_class[0].mean(axis=-1),
        snapshot.gradient_norm,
        through(snapshot, frame),
        norm(flatten(W - etf.nearest(of.means, weights=frame.head.weights).W)) / norm(flatten(W)),  # type: ignore[union-attr]
        near.s_min,
        near.condition,
        metrics.nc1(of),
        metrics.nc3(W, of.means),
        margins.mean(axis=-1),
        by_class[1][:, W.shape[1] - W.shape[1] // 2 :].mean(axis=-1),
    )
    return Record(*map(to_numpy, found))


def through(snapshot: Snapshot, frame: Headed) -> Any:
    """||indirect||/||direct|| of the gradient in the features as used, tangent to their sphere, (B',)."""
    x = frame.from_factors(snapshot.factors)
    direct, whole = (replace(frame, head=replace(frame.head, gradient=on)).gradient(x) for on in (False, True))  # type: ignore[call-arg]
    return norm(whole - direct) / norm(direct)


def stages(point: dict[str, Any]) -> list[tuple[int, int]]:
    """Steps, and steps between two looks, of the runs that make up a row: the first ten steps by themselves where looks are rarer."""
    return [*([(10, 1)] if point["every"] > 1 else []), (point["steps"], point["every"])]


def followed(point: dict[str, Any]) -> dict[str, Any]:
    """The runs of a setting: curves (S, T) at the steps SHOWN, first looks near the floor and near a run's own end, the end."""
    problem, H = problem_of(point), start_of(point)
    floor = float(limits.at_radius(problem).value[0])
    curves = {name: np.full((point["seeds"], len(SHOWN)), np.nan) for name in Record._fields}
    reached = {name: np.full(point["seeds"], np.nan) for name in LEVELS}
    stop, looks = np.full(point["seeds"], "DIVERGED", dtype="U8"), []
    for steps, every in stages(point):
        for snapshot in iterate(problem, RULES[point["rule"]], (H,), steps=steps, every=every, device=point["device"]):
            runs = snapshot.runs
            looks.append((snapshot.step, np.full(point["seeds"], np.nan)))
            looks[-1][1][runs] = snapshot.value
            for name, level in LEVELS.items():
                reached[name][runs[(snapshot.value - floor <= level) & ~(reached[name][runs] <= snapshot.step)]] = snapshot.step
            if snapshot.step in SHOWN and ufm.Stop.DIVERGED not in snapshot.stop:  # at the next look such runs have left
                for name, values in record(snapshot, floor)._asdict().items():
                    curves[name][runs, SHOWN.index(snapshot.step)] = values
    stop[runs] = [reason.name for reason in snapshot.stop if reason is not None]
    near = [np.where(value <= curves["loss"][:, SHOWN.index(point["steps"])] + SETTLED, step, np.nan) for step, value in looks]
    ends = {f"end_{name}": values[:, SHOWN.index(point["steps"])] for name, values in curves.items()}
    settled = np.fmin.reduce(near)
    return (
        {"iteration": np.array(SHOWN), "floor": floor, "stop": stop, "settled": settled}
        | curves
        | ends
        | {f"reached_{k}": v for k, v in reached.items()}
    )


def unrelated(point: dict[str, Any], run: int) -> Floats:
    """A U that knows nothing of the features: Haar-distributed orthonormal columns, (d, m)."""
    generator = np.random.default_rng([sweep.seed_of({name: point[name] for name in ("K", "width", "form", "seed")}), run])
    Q, R = np.linalg.qr(generator.standard_normal((point["width"], point["K"] - (point["form"] == "reduced"))))
    return np.asarray(Q * np.where(np.diagonal(R) < 0, -1.0, 1.0))


def means_of(point: dict[str, Any], run: int) -> Floats:
    """Class means (d, K): standard normal, or near a simplex ETF, off by a thousandth; pairs of classes at one place but for `apart`."""
    generator = np.random.default_rng([sweep.seed_of({name: point[name] for name in ("K", "width", "seed")}), run])
    B = generator.standard_normal((point["width"], point["K"]))
    if point.get("means") == "near collapse":
        B = etf.nearest(B).W.mT
        noise = generator.standard_normal(B.shape)
        B += 1e-3 * np.linalg.norm(B) / np.linalg.norm(noise) * noise
    for i in range(point.get("pairs", 0)):
        B[:, 2 * i + 1] = np.sqrt(1 - point["apart"] ** 2) * B[:, 2 * i] + point["apart"] * B[:, 2 * i + 1]
    return B


def posed(point: dict[str, Any], B: Floats, run: int) -> etf.NearestETF:
    """The nearest ETF to means B as the point poses it."""
    near = unrelated(point, run) if point["near"] == "unrelated" else etf_policies.Lagged().point(B, None, point["form"])
    strength: dict[str, Any] = {"relative_delta": point["relative"]} if point["relative"] else {"delta": point["delta"]}
    return etf.nearest(B, prox=near if point["relative"] or point["delta"] else None, form=point["form"], **strength)


def displaced(point: dict[str, Any]) -> dict[str, Any]:
    """||W - W'||_F/||W||_F of W with an unrelated proximal point and W' without; by how much the guard changes a gradient, relatively."""
    rows = []
    for run in range(point["seeds"]):
        B = means_of(point, run)
        plain, with_prox = etf.nearest(B), posed(point, B, run)
        slope = np.random.default_rng([point["seed"], run]).standard_normal(plain.W.shape)
        free, guarded = (etf.pullback(plain, slope, guard=guard) for guard in (0.0, GUARD))
        rows.append((np.linalg.norm(with_prox.W - plain.W) / np.sqrt(point["K"]), np.linalg.norm(guarded - free) / np.linalg.norm(free)))
    found = np.array(rows).T
    return {"displaced": found[0], "guard_changes": found[1]}


def pulled_back(point: dict[str, Any]) -> dict[str, Any]:
    """||Hbar||_F ||dL/dHbar||_F over sqrt(K) ||dL/dW (centred)||_F, Hbar the centred means: at most 1 at collapse; s_min/s_max of A."""
    rows = []
    for run in range(point["seeds"]):
        B = means_of(point, run)
        near = posed(point, B, run)
        slope = np.random.default_rng([point["seed"], run]).standard_normal(near.W.shape)
        size = np.linalg.norm(B - B.mean(axis=1, keepdims=True)) / np.linalg.norm(slope - slope.mean(axis=0)) / np.sqrt(point["K"])
        rows.append((size * np.linalg.norm(etf.pullback(near, slope, guard=point["guard"])), 1 / near.condition))
    found = np.array(rows).T
    return {"gain": found[0], "end_condition": 1 / found[1]}


MEASURE = {"displacement": displaced, "pullback": pulled_back}
