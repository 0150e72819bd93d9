"""Networks with deep heads against deep neural collapse (DNC): objective and data loss over training, mean logits, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures import network_low_rank_ends, stored
from figures.low_rank import LEVELS, NETWORKS, STARTS, Row, brief, known_levels, mains, read, rest_told, rows_of
from ufm import plots, sweep

NAME = "network_low_rank"
SHOWN = 14  # singular values in a spectrum
LEAST = 1e-6  # where the colours of spectra end


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(read(folder))}, out)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """Draw both figures of networks with deep heads, or none."""
    table = read(folder)
    return stored.write({NAME: make(table), network_low_rank_ends.NAME: network_low_rank_ends.make(table)}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """A line of panels a setting: objective, data loss, spectra, mean logits."""
    shown = mains(table)
    panels: list[list[Any]] = []
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


def objective(table: sweep.Table, own: Sequence[Row], setting: Row) -> plots.Curves:
    """What was minimised over lambda t, the model's values beside it, and the levels."""
    held = setting["penalty"] == "features"
    since = min(float(row["lam_t"][row["lam_t"] > 0].min()) for row in own)  # earlier the model is far above the levels
    curves: list[plots.Curve] = []
    for start, (label, colour) in STARTS.items():
        for row in rows_of(table, panel="simulated", start=start, **setting):
            later = row["path_lam_t"] >= since
            curves += lines(row["path_lam_t"][later], row["paths"][:, later], label, colour, 0.6)
    for i, row in enumerate(own):
        curves += lines(row["lam_t"], row["objective"][None], "" if i else "networks", NETWORKS, 0.9, [told(row)])
    x = (min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves))
    values = np.array([row["objective"][-1] for row in own])
    low, high = values.min(), values.max()
    if held:
        known = known_levels(table, setting)
        curves += [level(x, value, *LEVELS[name]) for name, value in known.items()]
        low, high = min([low, *known.values()]), max([low, *known.values()])  # runs that are far from their end show their tails
    labels = (r"$\lambda t$", "objective")
    return plots.Curves(curves, title=brief(setting), labels=labels, log=(True, False), limits=(0.9 * low, 1.6 * high))


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
        f"fall over the last tenth {row['drift']:.1e}, scale-free gradient {row['gradient']:.1e}, NC1 {row['nc1']:.1e}, test accuracy "
        f"{row['test_accuracy']:.3f}, {row['stop']}"
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
        labels=("index", "layer"),
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
