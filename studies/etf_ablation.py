"""Which options of the nearest-ETF classifier matter: averaging, proximal term, form, guard, class weights, the gradient through W?

Free features of radius tau = 5, cross-entropy, no penalties; every run of a setting starts where those of the other settings of its sizes
do, so that steps are compared seed by seed. Runs: a loss above its floor (`theory.limits`, balanced classes), W's relative distance
||W - W'||_F/||W||_F to the ETF W' nearest to the class means of the moment, and the share ||indirect||/||direct|| of the gradient in the
features (tangent to the sphere) that comes through W, taken at recorded points by switching it on and off there, whether or not the run
used it. Two static panels: W's displacement by an unrelated proximal point over K, and the size of the pullback where classes coincide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from studies.command import Options as Common
from studies.command import computed, finish, span
from studies.etf_ablation_rows import GUARD, LAWS, MEASURE, SHOWN, WEIGHTS, followed
from ufm import sweep
from ufm.arrays import keep_freed_memory

Floats = NDArray[np.float64]

DELTA = 1e-3  # of the source


@dataclass(frozen=True)
class Options(Common):
    """Which options of the nearest-ETF classifier matter, and how much of the gradient comes through it?"""


class Setting(NamedTuple):
    """Classes, width and samples of a class; rule and start; steps, and steps between two looks at the loss after the first ten."""

    K: int
    width: int
    n: int
    rule: str
    start: str
    steps: int
    every: int = 1


@dataclass(frozen=True)
class Size:
    """Settings of the averaging laws (the first also of the guard), which of them of delta, and a large one; seeds.

    classes: of the static panel; apart: distances of coinciding classes; ratios of the largest class, of `most` samples, to the smallest.
    """

    settings: tuple[Setting, ...] = (
        Setting(10, 64, 10, "AGD", "agd", 400),
        Setting(10, 9, 10, "AGD", "agd", 400),
        Setting(10, 64, 10, "Adam", "normal", 400),
        Setting(10, 64, 10, "momentum", "normal", 600),
        Setting(100, 128, 5, "AGD", "agd", 100),
    )
    delta: tuple[int, ...] = (0, 4)
    large: Setting | None = None
    seeds: int = 5
    classes: tuple[int, ...] = (4, 10, 30, 100, 300, 1000)
    apart: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    ratios: tuple[float, ...] = (2.0, 5.0, 20.0, 100.0)
    most: int = 100


LARGE = Setting(10, 512, 100, "AGD", "agd", 500, 10)
TINY = (Setting(4, 12, 5, "AGD", "agd", 40), Setting(4, 3, 5, "AGD", "agd", 40))
SIZES = {
    "full": Size(large=LARGE),
    "quick": Size(Size.settings[:3], (0,), None, 5, (4, 10, 30, 100), (1.0, 1e-2, 1e-4, 1e-6), (5.0, 50.0), 50),
    "smoke": Size(TINY, (0,), None, 2, (4, 6), (1.0, 1e-3), (2.0, 4.0), 8),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import etf_ablation as figure

    table = computed(etf_ablation, points(options), options, "ablations")
    tables = {name: table.where(panel=name) for name in dict.fromkeys(table.values("panel"))}
    return finish(options.folder, tables, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every point of every panel, the longest first, so that no worker is left alone with them."""
    size = SIZES[options.size]
    first = size.settings[0]
    common = {"seeds": size.seeds, "seed": options.seed, "device": options.device}
    usual = {"pattern": "balanced", "ratio": 1.0, "apart": 1.0, "averaging": "2/(t+1)", "gradient": True, "weights": "equal", **prox()}

    def runs(panel: str, setting: Setting, **other: Any) -> dict[str, Any]:
        return {"panel": panel, **setting._asdict(), **usual, **other, **common}

    def static(panel: str, K: int, width: int, **other: Any) -> dict[str, Any]:
        return {"panel": panel, "K": K, "width": width, **prox(), **other, **common}

    found = [runs("averaging", s, averaging=law) for s in size.settings for law in LAWS]
    found += [runs("averaging", s, gradient=False) for s in size.settings]
    found += [runs("averaging", size.large, averaging=law) for law in ("2/(t+1)", "none") if size.large is not None]
    posings: list[dict[str, Any]] = [
        prox(),
        *(prox(form=form, delta=DELTA) for form in ("reduced", "full")),
        *(prox(form=form, relative=0.5) for form in ("reduced", "full")),
        prox(form="full", delta=DELTA, near="unrelated"),
        prox(form="full", relative=0.5, near="unrelated"),
    ]
    found += [runs("delta", size.settings[i], averaging="none", **how) for i in size.delta for how in posings]
    guarded: list[dict[str, Any]] = [
        {},
        {"guard": GUARD},
        {"gradient": False},
        prox(form="full", delta=DELTA),
        prox(form="full", delta=DELTA, guard=GUARD),
    ]
    found += [runs("coinciding", first, apart=apart, **other) for apart in size.apart for other in guarded]
    tailed = Setting(first.K, first.width, size.most, "AGD", "agd", first.steps, 10)
    found += [
        runs("imbalance", tailed, pattern=pattern, ratio=ratio, weights=weights)
        for pattern in ("exponential", "step")
        for ratio in size.ratios
        for weights in WEIGHTS
    ]
    unrelated = [prox(form=form, near="unrelated", **strength) for form in ("reduced", "full") for strength in ({"delta": DELTA}, RHO)]
    found += [
        static("displacement", K, max(64, 2 * K), means=means, **how)
        for K in size.classes
        for means in ("normal", "near collapse")
        for how in unrelated
    ]
    lost = [prox(), prox(guard=GUARD), prox(form="full", delta=DELTA), prox(form="full", delta=DELTA, guard=GUARD)]
    found += [
        static("pullback", first.K, first.width, pairs=pairs, apart=apart, **how)
        for pairs in sorted({1, first.K // 2})
        for apart in size.apart
        for how in lost
    ]
    return sorted(found, key=lambda p: -p["width"] * p["K"] * p.get("n", 1) * (p.get("steps", 0) + 10))


def prox(form: str = "reduced", delta: float = 0.0, relative: float = 0.0, near: str = "lagged", guard: float = 0.0) -> dict[str, Any]:
    """The keys of a point that say how the nearest ETF is posed, and how its gradient is guarded."""
    return {"form": form, "delta": delta, "relative": relative, "near": near, "guard": guard}


RHO = {"relative": DELTA * 9 / 2}  # what the source's delta is at ten classes


def etf_ablation(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point, (S,) or (S, T) of the seeds: a whole run with its curves, or one nearest ETF."""
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        return [MEASURE.get(point["panel"], followed)(point) for point in points]


def summary(table: sweep.Table) -> dict[str, Any]:
    """Option by option: what it changes, and by how much."""
    runs = table.pick([panel not in MEASURE for panel in table.values("panel")])
    lost = sum(int(np.sum(stops == "DIVERGED")) for stops in runs.values("stop"))
    return {"points": len(table), "runs": int(runs["seeds"].sum()), "diverged": lost} | {
        name: text for say in (averaging, shares, proximal, guarding, imbalance) for name, text in say(table).items()
    }


def averaging(table: sweep.Table) -> dict[str, str]:
    """Steps to the lowest level, law by law, those of the other laws less those of the source's from the same starts."""
    rows, said = table.where(panel="averaging"), {}
    for setting in settings(rows):
        own = rows.where(**setting)
        reference = own.where(averaging="2/(t+1)", gradient=True)["reached_6"][0]
        others = [
            f"{own['averaging'][i]}{'' if own['gradient'][i] else ', gradient off'}: {span(own['reached_6'][i] - reference, 'never')}"
            for i in range(len(own))
            if (own["averaging"][i], own["gradient"][i]) != ("2/(t+1)", True)
        ]
        said[f"steps to 1e-6, {title(setting)}"] = (
            f"averaging 2/(t+1): {span(reference, 'never')}; the others less that: {'; '.join(others)}"
        )
    return said


def shares(table: sweep.Table) -> dict[str, str]:
    """How much of the gradient comes through the ETF."""
    rows, said = table.where(panel="averaging", gradient=True), {}
    for setting in settings(rows):
        for law in ("2/(t+1)", "none"):
            share = rows.where(**setting, averaging=law)["share"][0]
            at = [i for i, step in enumerate(SHOWN) if step in (0, 1, 10, 100, 500) and np.isfinite(share[:, i]).any()]
            said[f"indirect over direct gradient, {title(setting)}, averaging {law}"] = ", ".join(
                f"{span(share[:, i])} at step {SHOWN[i]}" for i in at
            )
    return said


def proximal(table: sweep.Table) -> dict[str, str]:
    """W's displacement: by an unrelated proximal point, and as a lag behind the features; what the guard changes at full rank."""
    rows, runs, said = table.where(panel="displacement"), table.where(panel="delta"), {}
    for means in dict.fromkeys(rows.values("means")):
        at_full_rank = rows.where(means=means, form="reduced", relative=0.0)
        for how in [{"form": form, "relative": rho} for form in ("full", "reduced") for rho in np.unique(rows["relative"])]:
            own = rows.where(means=means, **how)
            said[f"unrelated proximal point, {means}, {posing(own, 0)}"] = over(own, "K", "K = ", 100 * own["displaced"], " %")
        said[f"guard {GUARD} at full rank, {means}, changes gradients by"] = over(
            at_full_rank, "K", "K = ", 100 * at_full_rank["guard_changes"], " %"
        )
    for setting in settings(runs):
        own = runs.where(**setting)
        for i in range(len(own)):
            said[f"{title(setting)}, {posing(own, i)}, no averaging"] = (
                f"W off by {span(own['displacement'][i, :, SHOWN.index(10)])} at step 10, "
                f"{span(own['displacement'][i, :, SHOWN.index(20)])} at step 20; steps to 1e-6: {span(own['reached_6'][i], 'never')}"
            )
    return said


def guarding(table: sweep.Table) -> dict[str, str]:
    """Where classes start at one place: steps, and how large the pullback is, by the distance of the classes."""
    starts, gains, said = table.where(panel="coinciding"), table.where(panel="pullback"), {}
    for rows, name, what in ((starts, "reached_4", "steps to 1e-4"), (gains, "gain", "size of the pullback, all pairs")):
        own = rows if name != "gain" else rows.where(pairs=rows["pairs"].max())
        for how in dict.fromkeys(f"{posing(own, i)}, {guard_of(own, i)}" for i in range(len(own))):
            same = own.pick([f"{posing(own, i)}, {guard_of(own, i)}" == how for i in range(len(own))])
            said[f"pairs of classes close, {how}, {what}"] = over(same, "apart", "apart ", same[name])
    return said


def imbalance(table: sweep.Table) -> dict[str, str]:
    """Loss and margins of the smaller half of the classes at the end, and steps to get there, by class weights of the nearest ETF."""
    rows, said = table.where(panel="imbalance"), {}
    for pattern, ratio in sorted(set(zip(rows.values("pattern"), rows.values("ratio"), strict=True))):
        own = rows.where(pattern=pattern, ratio=ratio)
        said[f"{pattern} sizes, ratio {ratio:g}, by class weights"] = "; ".join(
            f"{own['weights'][i]}: loss {span(own['end_loss'][i])}, minority margin {span(own['end_minority_margin'][i])}, within 1e-4 "
            f"of its end at step {span(own['settled'][i], 'never')}"
            for i in range(len(own))
        )
    return said


def over(rows: sweep.Table, x: str, name: str, values: Floats, unit: str = "") -> str:
    """Values (P, S) over a column, in its order."""
    return "; ".join(f"{span(values[i])}{unit} at {name}{rows[x][i]:g}" for i in np.argsort(-rows[x] if x == "apart" else rows[x]))


def settings(rows: sweep.Table) -> list[dict[str, Any]]:
    """The sizes, rules and starts that occur."""
    names = ("K", "width", "n", "rule", "start")
    return [dict(zip(names, key, strict=True)) for key in dict.fromkeys(zip(*(rows.values(name) for name in names), strict=True))]


def title(setting: dict[str, Any]) -> str:
    """A setting in words."""
    return f"K = {setting['K']}, d = {setting['width']}, n = {setting['n']}, {setting['rule']}"


def posing(rows: sweep.Table, i: int) -> str:
    """How row i poses the nearest ETF, in words."""
    strength = f"rho {rows['relative'][i]:g}" if rows["relative"][i] else f"delta {rows['delta'][i]:g}"
    return f"{rows['form'][i]} form, {strength}" + (", unrelated" if rows["near"][i] == "unrelated" else "")


def guard_of(rows: sweep.Table, i: int) -> str:
    """Whether row i has a gradient through W, and its guard."""
    return f"guard {rows['guard'][i]:g}" if "gradient" not in rows.names or rows.values("gradient")[i] is not False else "gradient off"
