"""Networks with deep heads against deep neural collapse (DNC): loss over training, spectra, logits; and where networks and model end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import plots, sweep

Floats = NDArray[np.float64]
Row = dict[str, Any]

NAME = STUDY = "network_low_rank"
COLUMNS = (
    *("panel", "activation", "penalty", "depth", "lam", "dataset", "K", "n", "width", "rate", "epochs", "settled_below"),
    *("lam_t", "objective", "loss", "ranks", "gradient", "ratio", "below", "rank", "narrowest", "order", "logits", "spectra"),
    *("weight_spectra", "dnc", "dnc_loss", "test_accuracy", "path_lam_t", "paths", "end_ratios", "end_ranks", "end_narrowest", "settled"),
    *("names", "levels", "minima_values", "minima_ranks"),
)
OKABE = plots.style.OKABE_ITO
NETWORKS, RANDOM, OWN = OKABE["blue"], OKABE["orange"], OKABE["green"]
STARTS = {"random": ("model, random starts", RANDOM), "network": ("model from the networks' starts", OWN)}
SHOWN = 14  # singular values in a spectrum
LEAST = 1e-6  # where the colours of spectra end


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, COLUMNS)
    return stored.write({NAME: runs(table), f"{NAME}_ends": ends(table)}, out)


def rows_of(table: sweep.Table, **equal: Any) -> list[Row]:
    """The rows with these values, as dictionaries; none where there are none."""
    own = table.where(**equal)
    columns = {name: own.values(name) for name in own.names}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(own))]


def mains(table: sweep.Table) -> list[Row]:
    """The setting of each of the three lines: linear, ReLU, weight decay; the first of each kind in the table's order of depth 3 and 4."""
    found: dict[tuple[Any, Any], Row] = {}
    for row in rows_of(table, panel="trained"):
        key = row["activation"], row["penalty"]
        if key not in found or abs(row["depth"] - PAPERS[key]) < abs(found[key]["depth"] - PAPERS[key]):
            found[key] = {name: row[name] for name in SETTING}
    return [found[key] for key in PAPERS if key in found]


SETTING = ("activation", "penalty", "depth", "lam")
PAPERS = {("linear", "features"): 3, ("relu", "features"): 4, ("linear", "decay"): 3}  # depths of the heads in the papers


def title(setting: Row) -> str:
    """A setting in a few words."""
    held = ", weight decay" if setting["penalty"] == "decay" else ""
    return f"{'ReLU' if setting['activation'] == 'relu' else 'linear'} head, $L={setting['depth']}${held}"


def brief(setting: Row) -> str:
    """A setting as the title of a narrow panel."""
    return f"{'weight decay' if setting['penalty'] == 'decay' else title(setting).split(',')[0]}, $L={setting['depth']}$"


def settled(row: Row) -> bool:
    """Whether a network's training came to rest."""
    return bool(row["gradient"] <= row["settled_below"])


def runs(table: sweep.Table) -> stored.Drawing:
    """A line of panels a setting: objective, data loss, spectra, mean logits."""
    shown = mains(table)
    panels = []
    for setting in shown:
        own = rows_of(table, panel="trained", **setting)
        middle = sorted(own, key=lambda row: row["ratio"])[len(own) // 2]
        panels.append([objective(table, own, setting), losses(own), heat(middle), spectrum(middle)])
    own = rows_of(table, panel="trained")
    first, seeds = own[0], len(rows_of(table, panel="trained", **shown[0]))
    caption = (
        f"{first['dataset']}, $K={first['K']}$ classes of $n={first['n']}$; heads of width $d={first['width']}$; SGD without momentum, "
        f"rate {first['rate']:g}, five batches an epoch, {first['epochs']} epochs, {seeds} seeds; $t$ is rate times steps. Left: the "
        "networks' objective, and values of their unconstrained model under gradient flow (descent under ReLU); levels: DNC, the lowest "
        "structure predicted, linear DNC (a bound for ReLU DNC under Assumption 1 of Garrod & Keating). Under weight decay the objective "
        "counts every parameter and has no level; DNC's loss is that at the balance of scales measured. Spectra and logits: the network "
        "in the middle of the seeds; mean logits with partners side by side, red above 0 and blue below; singular values of class means "
        "(features $H$, before and after each ReLU or once a layer, logits $Z$) and of the weights, each row over its largest. "
        f"{rest_told(own)}"
    )
    return stored.Drawing(panels, f"{first['dataset']}: networks with deep heads against deep neural collapse", caption, 7.2, 4)


def rest_told(own: Sequence[Row]) -> str:
    """How many runs came to rest, in words."""
    many, largest = sum(map(settled, own)), max(row["gradient"] for row in own)
    return f"At rest (scale-free gradient norm up to {own[0]['settled_below']:g}): {many} of {len(own)} networks; largest {largest:.2g}."


def objective(table: sweep.Table, own: Sequence[Row], setting: Row) -> plots.Curves:
    """What was minimised over lambda t, the model's values beside it, and the levels."""
    held = setting["penalty"] == "features"
    curves: list[plots.Curve] = []
    for start, (label, colour) in STARTS.items():
        for row in rows_of(table, panel="simulated", start=start, **setting):
            curves += lines(row["path_lam_t"], row["paths"], label, colour, 0.6)
    for i, row in enumerate(own):
        curves += lines(row["lam_t"], row["objective"][None], "" if i else "networks", NETWORKS, 0.9, [told(row)])
    x = (min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves))
    values = np.array([row["objective"][-1] for row in own])
    low, high = values.min(), values.max()
    if held:
        known = known_levels(table, setting)
        curves += [level(x, value, *LEVELS[name]) for name, value in known.items()]
        low, high = min([low, *known.values()]), max(known.values())
    labels = (r"$\lambda t$", "objective")
    return plots.Curves(curves, title=brief(setting), labels=labels, log=(True, False), limits=(0.9 * low, 1.6 * high))


LEVELS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "dnc": ("DNC", "black", ()),
    "best": ("lowest predicted", OKABE["vermillion"], (4.0, 1.5)),
    "linear": ("linear DNC", OKABE["purple"], (1.0, 1.0)),
}


def known_levels(table: sweep.Table, setting: Row) -> dict[str, float]:
    """DNC's level, the lowest of all that is predicted, and under ReLU that of linear DNC; {} without predictions."""
    rows = rows_of(table, panel="predicted", **setting)
    if not rows:
        return {}
    values = dict(zip(np.asarray(rows[0]["names"]).tolist(), np.asarray(rows[0]["levels"]).tolist(), strict=True))
    bound = values.pop("linear DNC", None)
    minima = rows[0]["minima_values"]
    best = min([value for value in values.values() if np.isfinite(value)] + ([] if minima is None else np.asarray(minima).tolist()))
    return {"dnc": values["DNC"], "best": best} | ({} if bound is None else {"linear": bound})


def lines(x: Any, values: Any, label: str, colour: str, width: float, hover: Sequence[str] = ()) -> list[plots.Curve]:
    """A line a run, the label at the first; points at 0 and those of diverged runs left out."""
    found = []
    for i, y in enumerate(np.asarray(values, dtype=np.float64)):
        kept = np.isfinite(y) & (np.asarray(x) > 0)
        text = [hover[i] if hover else f"{label}, run {i}"] * int(kept.sum())
        if kept.any():
            found.append(plots.Curve(np.asarray(x)[kept], y[kept], y[kept], y[kept], "" if i else label, colour, "", None, text, width))
    return found


def level(x: tuple[float, float], value: float, label: str, colour: str, dash: tuple[float, ...]) -> plots.Curve:
    """A level across the panel."""
    y = [value, value]
    return plots.Curve(x, y, y, y, label, colour, "", None, [f"{label}: {value:.6g}"] * 2, 0.9, dash)


def told(row: Row) -> str:
    """What the end of a network is worth, for the interactive figure."""
    return (
        f"seed {row['run']}: value {row['value']:.5g}, over DNC's {row['ratio']:.4f}; at the class means {row['means_value']:.5g}, "
        f"L-BFGS from there {row['basin_value']:.5g}\n"
        f"rank of the logits {row['rank']} (gap {row['rank_gap']:.3g}), least over the layers {row['narrowest']}; end: {row['name']}, "
        f"L-BFGS: {row['basin']}\n"
        f"scale-free gradient {row['gradient']:.1e}, NC1 {row['nc1']:.1e}, test accuracy {row['test_accuracy']:.3f}, {row['stop']}"
    )


def losses(own: Sequence[Row]) -> plots.Curves:
    """The data loss over lambda t, and that of DNC."""
    curves: list[plots.Curve] = []
    for i, row in enumerate(own):
        curves += lines(row["lam_t"], row["loss"][None], "" if i else "networks", NETWORKS, 0.9, [told(row)])
    x = (min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves))
    known = [row["dnc_loss"] for row in own if np.isfinite(row["dnc_loss"])]
    if known:
        curves.append(level(x, float(np.median(known)), *LEVELS["dnc"]))
    least = min(float(c.y.min()) for c in curves)
    top = max(float(c.y.max()) for c in curves)
    labels = (r"$\lambda t$", "data loss")
    return plots.Curves(curves, title="cross-entropy", labels=labels, log=(True, True), limits=(0.6 * least, 1.4 * top))


def spectrum(row: Row) -> plots.Matrix:
    """Singular values of class means, layer by layer, and of the weights below, over the largest of each."""
    L = row["depth"]
    between = [f"{p}{i}" for i in range(1, L) for p in ("pre ", "post ")] if row["activation"] == "relu" else [f"{i}" for i in range(1, L)]
    layers = ["$H$", *between, "$Z$"]
    s = np.asarray(row["spectra"], dtype=np.float64)[: len(layers)]
    w = np.asarray(row["weight_spectra"], dtype=np.float64)[:L]
    most = min(SHOWN, w.shape[1])
    values = np.full((len(layers) + L, most), np.nan)
    for i, found in enumerate((*s, *w)):
        values[i, : min(most, len(found))] = (found / max(found[0], 1e-300))[:most]
    return plots.Matrix(
        values=values,
        title="singular values",
        labels=("index", "class means; weights"),
        colours="log",
        limits=(LEAST, 1.0),
        names=([str(i + 1) for i in range(most)], [*layers, *(f"$W_{i}$" for i in range(1, L + 1))]),
        bar="over the largest",
    )


def heat(row: Row) -> plots.Matrix:
    """Mean logits, classes in the order of their partners."""
    order = np.asarray(row["order"], dtype=np.int64)
    M = np.asarray(row["logits"], dtype=np.float64)[np.ix_(order, order)]
    names = [str(k) for k in order]
    size = np.abs(M).max()
    return plots.Matrix(
        values=M / max(size, 1e-300),
        title=f"logits, rank {row['rank']}",
        labels=("class", "logit"),
        limits=(-1.0, 1.0),
        names=(names, names),
    )


def ends(table: sweep.Table) -> stored.Drawing:
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
    predictions = {row["depth"]: lowest(row) for row in rows_of(table, panel="predicted", **kind)}
    if predictions:
        y = [predictions[L][what] for L in sorted(predictions)]
        label, colour, dash = LEVELS["best"]
        curves.append(plots.Curve(sorted(predictions), y, y, y, label, colour, "", dash=dash))
    for start, (label, colour) in STARTS.items():
        found = {row["depth"]: row for row in rows_of(table, panel="simulated", start=start, **kind)}
        values = {L: np.asarray(row["end_ratios" if what == "ratio" else "end_ranks"], dtype=np.float64) for L, row in found.items()}
        rest = {L: bool(np.all(row["settled"])) for L, row in found.items()}
        curves += spread(values, rest, label, colour, "s")
    rows = {L: rows_of(table, panel="trained", depth=L, **kind) for L in depths}
    values = {L: np.array([row[what] for row in own], dtype=np.float64) for L, own in rows.items()}
    curves += spread(values, {L: all(map(settled, own)) for L, own in rows.items()}, "networks", NETWORKS, "o")
    top = max(float(curve.high.max()) for curve in curves)
    low = min(float(curve.low.min()) for curve in curves)
    limits = (low - 0.05 * (top - low) - 0.02, top + 0.08 * (top - low) + 0.02)
    names = ("value over DNC's", "linear heads: value") if what == "ratio" else ("rank of the logits", "linear heads: rank")
    labels = ("depth $L$ of the head", names[0])
    return plots.Curves(curves, title=names[1], labels=labels, log=(False, False), limits=limits, ticks=depths, hollow="some not at rest")


def lowest(row: Row) -> dict[str, float]:
    """Value over DNC's, and rank, of the lowest minimum predicted."""
    at = int(np.argmin(row["minima_values"]))
    return {"ratio": float(row["minima_values"][at] / row["dnc"]), "rank": float(row["minima_ranks"][at])}


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
        s = np.maximum(s / s[:, :1], LEAST / 100)
        hover = [f"W_{layer + 1}, singular value {i + 1}: {np.median(v):.3g} ({v.min():.3g} to {v.max():.3g})" for i, v in enumerate(s.T)]
        y, low, high = (of(s, axis=0) for of in (np.median, np.min, np.max))
        curves.append(plots.Curve(np.arange(1, s.shape[1] + 1), y, low, high, f"$W_{layer + 1}$", colour, "", None, hover))
    least = min(float(curve.low.min()) for curve in curves)
    labels = ("index", "singular value, over the largest")
    return plots.Curves(curves, title=f"{title(setting)}: weights", labels=labels, log=(True, True), limits=(0.5 * least, 2.0))
