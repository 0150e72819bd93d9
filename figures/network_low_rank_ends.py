"""Where networks with deep heads end and where their unconstrained model does: values and ranks over depth, over training, by start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from figures.low_rank import LEVELS, NETWORKS, OKABE, SETTING, STARTS, Row, lowest, mains, read, rest_told, rows_of, settled, title
from ufm import plots, sweep

Floats = NDArray[np.float64]

NAME = "network_low_rank_ends"
LEAST = 1e-8  # below it singular values of float32 weights are rounding


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(read(folder))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """Values and ranks over the depth of linear heads; ranks at the ends, over training; singular values that are left."""
    shown = mains(table)
    linear = [setting for setting in shown if (setting["activation"], setting["penalty"]) == ("linear", "features")]
    depths = sorted({row["depth"] for row in rows_of(table, panel="trained", activation="linear", penalty="features")})
    held = [setting for setting in shown if setting["penalty"] == "features"]
    panels: list[list[Any]] = [
        [over_depth(table, depths, "ratio"), over_depth(table, depths, "rank"), ranks_over_time(table, shown)],
        [*(outcomes(table, setting, shown) for setting in held), weights_left(table, linear[0] if linear else shown[0])],
    ]
    own = rows_of(table, panel="trained")
    shares = "; ".join(share_told(rows_of(table, panel="trained", **setting)) for setting in settings_of(own))
    caption = (
        "Predicted, simulated, trained. (a, b) Linear heads under the model's penalty: lowest predicted minimum; median and range over the "
        "seeds of the model's ends (gradient flow) and of the networks; at $L=1$ DNC is optimal, at $L\\geq 2$ it is not. Ranks: singular "
        "values of the mean logits above $10^{-3}$ of the largest; under ReLU the least over all layers. (f) Singular values of the "
        f"weights. Below DNC (95 % Wilson intervals): {shares}. {rest_told(own)}"
    )
    return stored.Drawing(panels, "Where networks with deep heads end, and where their unconstrained model does", caption, 5.4, 4)


def settings_of(own: Sequence[Row]) -> list[Row]:
    """The settings that occur."""
    return [dict(zip(SETTING, key, strict=True)) for key in dict.fromkeys(tuple(row[name] for name in SETTING) for row in own)]


def share_told(own: Sequence[Row]) -> str:
    """How many networks of a setting are below DNC."""
    below = int(sum(row["below"] for row in own))
    low, high = sweep.wilson(below, len(own))
    return f"{title(own[0])}: {below} of {len(own)} ({float(low):.2f} to {float(high):.2f})"


def over_depth(table: sweep.Table, depths: Sequence[int], what: str) -> plots.Curves:
    """Values over DNC's, or ranks of the logits, over the depth of linear heads."""
    kind: Row = {"activation": "linear", "penalty": "features"}
    curves = []
    for start, (label, colour) in STARTS.items():
        found = {row["depth"]: row for row in rows_of(table, panel="simulated", start=start, **kind)}
        values = {L: np.asarray(row["end_ratios" if what == "ratio" else "end_ranks"], dtype=np.float64) for L, row in found.items()}
        rest = {L: bool(np.all(row["settled"])) for L, row in found.items()}
        curves += spread(values, rest, label, colour, "s")
    rows = {L: rows_of(table, panel="trained", depth=L, **kind) for L in depths}
    values = {L: np.array([row[what] for row in own], dtype=np.float64) for L, own in rows.items()}
    curves += spread(values, {L: all(map(settled, own)) for L, own in rows.items()}, "networks", NETWORKS, "o")
    predictions = {row["depth"]: lowest(row) for row in rows_of(table, panel="predicted", **kind)}
    if predictions:
        y = [predictions[L][what] for L in sorted(predictions)]
        label, colour, dash = LEVELS["best"]
        curves.append(plots.Curve(sorted(predictions), y, y, y, label, colour, "", dash=dash))
    top = max(float(curve.high.max()) for curve in curves)
    low = min(float(curve.low.min()) for curve in curves)
    limits = (low - 0.05 * (top - low) - 0.02, top + 0.08 * (top - low) + 0.02)
    names = ("value over DNC's", "linear heads: value") if what == "ratio" else ("rank of the logits", "linear heads: rank")
    labels = ("depth $L$ of the head", names[0])
    return plots.Curves(curves, title=names[1], labels=labels, log=(False, False), limits=limits, ticks=depths, hollow="some not at rest")


def spread(values: dict[int, Floats], rest: dict[int, bool], label: str, colour: str, marker: str) -> list[plots.Curve]:
    """Median and range over the seeds at each depth."""
    at = sorted(values)
    if not at:
        return []
    middle, low, high = (np.array([of(values[L]) for L in at]) for of in (np.median, np.min, np.max))
    hover = [f"{label}, L = {L}: {', '.join(f'{v:.4g}' for v in np.sort(values[L]))}" for L in at]
    return [plots.Curve(at, middle, low, high, label, colour, marker, [rest[L] for L in at], hover)]


def ranks_over_time(table: sweep.Table, shown: Sequence[Row]) -> plots.Curves:
    """The rank of the centred class-mean logits over lambda t: median and range over the seeds, a colour a setting."""
    curves = []
    for setting, colour, dash in zip(shown, (NETWORKS, OKABE["vermillion"], "black"), ((), (4.0, 1.5), (1.0, 1.0)), strict=False):
        own = rows_of(table, panel="trained", **setting)
        ranks = np.stack([row["ranks"] for row in own])
        x = np.asarray(own[0]["lam_t"])
        kept = np.isfinite(ranks).all(axis=0) & (x > 0)
        hover = [f"{title(setting)}: ranks {', '.join(f'{r:g}' for r in column)}" for column in ranks[:, kept].T]
        middle, low, high = (of(ranks[:, kept], axis=0) for of in (np.median, np.min, np.max))
        curves.append(plots.Curve(x[kept], middle, low, high, title(setting), colour, "", None, hover, 1.2, dash))
    top = max(float(curve.high.max()) for curve in curves)
    labels = (r"$\lambda t$", "rank of the logits")
    return plots.Curves(curves, title="networks: rank over training", labels=labels, log=(True, False), limits=(0.0, top + 0.8))


def outcomes(table: sweep.Table, setting: Row, shown: Sequence[Row]) -> plots.Bars:
    """Ranks at the ends: predicted (linear chains), simulated from both starts, trained."""
    relu = setting["activation"] == "relu"
    found: dict[str, tuple[Sequence[int], Sequence[bool]]] = {}
    predictions = rows_of(table, panel="predicted", **setting)
    if predictions and not relu:
        found["lowest\npredicted"] = [int(lowest(predictions[0])["rank"])], [True]
    for start, name in (("random", "model,\nrandom"), ("network", "model,\nown starts")):
        for row in rows_of(table, panel="simulated", start=start, **setting):
            ranks = np.asarray(row["end_narrowest" if relu else "end_ranks"]).astype(int).tolist()
            found[name] = ranks, [bool(rest) for rest in row["settled"]]
    own = rows_of(table, panel="trained", **setting)
    found["networks"] = [int(row["narrowest" if relu else "rank"]) for row in own], list(map(settled, own))
    least, most = (of(r for ranks, _ in found.values() for r in ranks) for of in (min, max))
    span = range(least, most + 1)
    counts = [[sum(r == rank and ok for r, ok in zip(*found[x], strict=True)) for x in found] for rank in span]
    colours = plots.style.ordered(int(own[0]["K"]))
    return plots.Bars(
        x=list(found),
        counts=counts,
        names=[f"rank {rank}" for rank in span],
        colours=[colours[min(rank, len(colours) - 1)] for rank in span],
        unsettled=[sum(not ok for ok in rest) for _, rest in found.values()],
        untrusted="not at rest",
        title=f"{title(setting)}: ends",
        labels=("", "share of runs"),
    )


def weights_left(table: sweep.Table, setting: Row) -> plots.Curves:
    """Singular values of W_1 and W_L over the largest, all seeds: those that decay alone holds fall to the bottom."""
    curves = []
    own = rows_of(table, panel="trained", **setting)
    for layer, colour in ((0, NETWORKS), (own[0]["depth"] - 1, OKABE["vermillion"])):
        s = np.stack([np.asarray(row["weight_spectra"], dtype=np.float64)[layer] for row in own])
        s = s[:, np.isfinite(s).all(axis=0)]
        s = np.maximum(s / s[:, :1], LEAST)
        hover = [f"W_{layer + 1}, singular value {i + 1}: {np.median(v):.3g} ({v.min():.3g} to {v.max():.3g})" for i, v in enumerate(s.T)]
        y, low, high = (of(s, axis=0) for of in (np.median, np.min, np.max))
        curves.append(plots.Curve(np.arange(1, s.shape[1] + 1), y, low, high, f"$W_{layer + 1}$", colour, "", None, hover))
    least = min(float(curve.low.min()) for curve in curves)
    labels = ("index", "over the largest")
    return plots.Curves(curves, title=f"{title(setting)}: weights", labels=labels, log=(True, True), limits=(0.5 * least, 2.0))
