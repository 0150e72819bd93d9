"""Without regularisation, does depth lower the rank of the logits that gradient flow tends to, and does width raise it?

Deep linear chain, cross-entropy, K = 10, no penalty: the loss tends to 0 and the factors grow without end, so gradient flow is taken in
loss-normalised time (the flow of log F) down to F = 1e-250, where margins are about 580. From normal starts over depth, width and scale,
and from spectral starts (Garrod, Keating & Thrampoulidis 2026): effective and stable rank of Z; its margin over the Schatten quasi-norm of
p = 2/(L+1), against that of deep neural collapse and of the best catalogued code (late training tends to a KKT point of that max-margin
problem); and how far the direction still turns between 1e-125 and 1e-250, as slowly as 1/log(1/F).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import computed, finish
from ufm import metrics, sweep
from ufm.arrays import to_numpy
from ufm.dynamics import iterate
from ufm.objective import chain_of
from ufm.starts import first_factors
from ufm.theory import deep

Floats = NDArray[np.float64]

SAME = ("panel", "start", "K", "depth", "width", "scale", "seeds", "floor", "device")
RTOL = 1e-4
STEPS, EVERY = 20_000, 4  # most trial steps of the flow, and between two records; a path that is shown has them all, to a smaller error
LEVELS = ("start", "half", "1e-10", "end")  # losses at which the spectrum is kept: at the start, half of it, 1e-10, the floor
TURNING = 1e-3  # 1 - cosine of the logits at sqrt(floor) and at the floor below which the direction counts as converged
COORDINATES = 4e5  # of the runs that are followed together


@dataclass(frozen=True)
class Options(Common):
    """Does depth alone lower the rank? Unregularised flow over depth, width, scale and kind of start, in loss-normalised time."""


@dataclass(frozen=True)
class Size:
    """Seeds of a point, depths, widths, largest width x depth followed, scales and the width they are varied at, loss."""

    seeds: int = 50
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    widths: tuple[int, ...] = (10, 14, 20, 35, 50, 70, 100, 200)
    largest: int = 600
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 1.4, 2.0)
    width: int = 35
    floor: float = 1e-250


SIZES = {
    "full": Size(),
    "quick": Size(10, (1, 2, 3, 5), (10, 20, 50), 200, (0.5, 1.0, 2.0), 20),
    "smoke": Size(2, (1, 3), (10, 14), 60, (0.5,), 10, 1e-40),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import depth_implicit_bias as figure

    table = computed(depth_implicit_bias, points(options), options, "unregularised flow", same=SAME)
    return finish(options.folder, {"rows": table}, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every point, the longest first: depth by width, depth by scale, spectral starts, and the paths that are shown."""
    size = SIZES[options.size]
    rest = {"K": 10, "floor": size.floor, "device": options.device, "seed": options.seed}

    def panel(name: str, start: str, seeds: int, **axes: Any) -> list[dict[str, Any]]:
        one = {"panel": [name], "start": [start], "seeds": [seeds], "width": [size.width], "scale": [1.0]}
        return [point | rest for point in sweep.grid(**one | axes)]

    deepest = size.depths[-1]
    shown = [("normal", 1, 1.0), ("normal", min(4, deepest), 1.0), ("spectral", min(3, deepest), 0.05)]
    found = [
        *(p for p in panel("width", "normal", size.seeds, depth=size.depths, width=size.widths) if p["width"] * p["depth"] <= size.largest),
        *panel("scale", "normal", size.seeds, depth=size.depths, scale=size.scales),
        *panel("spectral", "spectral", size.seeds, depth=size.depths, width=[10], scale=[0.05]),
        *(
            point
            for start, L, scale in shown
            for point in panel("path", start, 1, depth=[L], scale=[scale], width=[size.width if start == "normal" else 10])
        ),
    ]
    return sorted(found, key=lambda p: -p["seeds"] * p["depth"] ** 2 * p["width"] ** 2)


def depth_implicit_bias(points: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: what its runs reached; for the panel "path" also the spectrum along the run."""
    return [_row(point, seed) for point, seed in zip(points, seeds, strict=True)]


class Path(NamedTuple):
    """The records of a run: loss-normalised time and loss (T,), class logits (T, K, K)."""

    time: Floats
    value: Floats
    logits: Floats

    def first_below(self, level: float) -> int:
        """The first record with at most this loss; the last one if there is none."""
        below = np.flatnonzero(self.value <= level)
        return int(below[0]) if len(below) else len(self.value) - 1


def follow(point: dict[str, Any], seed: int) -> Iterator[Path]:
    """The flow of log F of every seed until its loss is at most `floor`."""
    from threadpoolctl import threadpool_limits

    d, L, runs, floor = (point[name] for name in ("width", "depth", "seeds", "floor"))
    counts = np.full((runs, point["K"]), 1)
    problem = ufm.Problem(counts, width=d, depth=L, features="free", lam_w=0.0, lam_h=0.0)
    start = ufm.starts.TABLE[point["start"]](point["scale"])
    chain = chain_of(problem)
    factors = first_factors(problem.cell(0), start, runs, seed, chain)
    block = max(1, int(COORDINATES / (L * d * d + 2 * d * point["K"])))
    fine = point["panel"] == "path"
    rtol = 1e-2 * RTOL if fine else RTOL
    rule = ufm.rules.GradientFlow(rtol=rtol, atol=1e-3 * rtol, normalised=True)
    with threadpool_limits(1), np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # trials that overflow are not kept
        for first in range(0, runs, block):
            some = slice(first, min(first + block, runs))
            mine = [f[some] for f in factors]
            flow = iterate(problem.pick(np.arange(runs)[some]), rule, mine, steps=STEPS, every=1 if fine else EVERY, device=point["device"])
            yield from _paths(flow, floor)


def _paths(flow: Iterator[ufm.dynamics.Snapshot], floor: float) -> Iterator[Path]:
    """The runs of a flow, each until its loss is at most `floor`."""
    records: list[tuple[Floats, Floats, Floats]] = []
    for at in flow:
        records.append((at.time, at.value, to_numpy(at.logits)))
        if len(at.runs) < len(records[0][0]) or (at.value <= floor).all():
            break
    whole = [record for record in records if len(record[0]) == len(records[0][0])]
    time, value, logits = (np.stack([record[i] for record in whole]) for i in range(3))
    for b in range(value.shape[1]):
        last = int(np.argmax(value[:, b] <= floor)) if (value[:, b] <= floor).any() else len(value) - 1
        yield Path(time[: last + 1, b], value[: last + 1, b], logits[: last + 1, b])


def _row(point: dict[str, Any], seed: int) -> dict[str, Any]:
    floor, L, K = point["floor"], point["depth"], point["K"]
    paths = list(follow(point, seed))
    at = [[0, path.first_below(path.value[0] / 2), path.first_below(1e-10), len(path.value) - 1] for path in paths]
    spectra = np.array([[np.linalg.svd(path.logits[i], compute_uv=False) for i in four] for path, four in zip(paths, at, strict=True)])
    ends = np.stack([path.logits[-1] for path in paths])
    halfway = np.stack([path.logits[path.first_below(floor**0.5)] for path in paths])
    turned = 1 - np.sum(ends * halfway, axis=(1, 2)) / np.linalg.norm(ends, axis=(1, 2)) / np.linalg.norm(halfway, axis=(1, 2))
    value = np.array([path.value[-1] for path in paths])
    converged = (value <= floor) & (turned <= TURNING)
    margins = margin(ends, L)
    best = deep.margin_constants(K, L)
    spread = np.log10(spectra[..., 0] / spectra[..., K - 2])
    row = {
        **interval("rank", metrics.effective_rank(ends)),
        **interval("stable", metrics.stable_rank(ends)),
        **interval("margin", margins),
        **interval("time", np.array([path.time[-1] for path in paths])),
        "dnc_margin": best[f"DNC of {K} classes"] ** (-(L + 1) / 2),
        "best_margin": min(best.values()) ** (-(L + 1) / 2),
        "best_code": min(best, key=lambda name: best[name]),
        "loss": float(value.max()),
        "separated": float(np.mean(margins > 0)),
        "turned": float(np.median(turned)),
        "rank_change": float(np.mean(metrics.effective_rank(ends) - metrics.effective_rank(halfway))),
        "converged": float(converged.mean()),
        "spread": np.quantile(spread, (0.25, 0.5, 0.75), axis=0).T,  # (levels, quartiles)
        "repelled": float(np.mean(spread[:, 1] > spread[:, 0])),
        "rank_quartiles": np.quantile(metrics.effective_rank(ends), (0.25, 0.5, 0.75)),
        "spectra": np.median(spectra, axis=0),
    }
    row |= dict(zip(("repelled_low", "repelled_high"), sweep.wilson(int(np.sum(spread[:, 1] > spread[:, 0])), point["seeds"]), strict=True))
    return row | (_path(paths[0], K) if point["panel"] == "path" else {})


def _path(path: Path, K: int) -> dict[str, Any]:
    """The records of a run at up to 400 of its distinct times, padded with NaN."""
    distinct = np.unique(path.time, return_index=True)[1]
    kept = distinct[np.unique(np.linspace(0, len(distinct) - 1, 400).round().astype(int))]
    time, value, s = np.full(400, np.nan), np.full(400, np.nan), np.full((400, K), np.nan)
    time[: len(kept)], value[: len(kept)] = path.time[kept], path.value[kept]
    s[: len(kept)] = np.linalg.svd(path.logits[kept], compute_uv=False)
    return {"path_time": time, "path_value": value, "path_spectrum": s}


def margin(M: Floats, depth: int) -> Floats:
    """min_c (m_cc - max_{j != c} m_jc) over (sum_i s_i^p)^{1/p}, p = 2/(L+1), of logits (B, K, K); at most that of the best code."""
    least = metrics.margins(M, np.arange(M.shape[-1])).min(axis=-1)
    return np.asarray(least / deep.schatten(M, depth) ** ((depth + 1) / 2))


def interval(name: str, values: Floats) -> dict[str, float]:
    """The mean over seeds and its 95 % interval by Student's t."""
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    mean = float(values.mean())
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    wide = table.where(panel="width")
    said: dict[str, Any] = {
        "points": len(table),
        "largest loss at the end": float(table["loss"].max()),
        "points whose runs have all separated the classes": int(np.sum(table["separated"] == 1)),
        "points whose directions have converged in nine runs of ten": int(np.sum(table["converged"] >= 0.9)),
    }
    for L in np.unique(wide["depth"]):
        own = wide.where(depth=L)
        own = own.pick(np.argsort(own["width"]))
        said[f"L = {L}: effective rank over d"] = ", ".join(f"{d}: {rank:.2f}" for d, rank in zip(own["width"], own["rank"], strict=True))
    said["largest change of a mean effective rank over the last half of log F"] = float(np.abs(table["rank_change"]).max())
    said["largest mean margin, as a share of the best catalogued"] = float(np.max(table["margin"] / table["best_margin"]))
    spectral = table.where(panel="spectral")
    said["spectral starts whose singular values spread early"] = ", ".join(
        f"L = {L}: {share:.2f}" for L, share in sorted(zip(spectral["depth"], spectral["repelled"], strict=True))
    )
    return said
