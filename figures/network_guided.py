"""Networks with the nearest ETF as classifier and with others: curves over the epochs, on balanced and on long-tailed data; a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style
from ufm.sweep.store import write_whole

Floats = NDArray[np.float64]
Key = tuple[str, bool | None]

NAME = STUDY = "network_guided"
COLUMNS = (
    *("kind", "dataset", "head", "gradient", "ratio", "run", "seed", "K", "n", "width", "radius", "epochs", "batch", "lr", "momentum"),
    *("weight_decay", "epoch", "cross_entropy", "excess", "margin_gap", "nc1", "nc3", "equinorm", "accuracy", "test_accuracy", "levels"),
    *("tail_test_accuracy", "head_test_accuracy", "reached_excess", "reached_nc1", "ranks", "margins", "floor", "limit", "finite", "N"),
    *("at_collapse", "loss_gradient", "end_cross_entropy", "end_margin_gap", "end_nc3", "end_equinorm", "end_gradient_norm"),
)
EPOCHS, SEEDS = 200, 5  # what a whole comparison has
BLACK, BLUE, SKY, GREEN, ORANGE, RED = (style.OKABE_ITO[name] for name in ("black", "blue", "sky", "green", "orange", "vermillion"))
LEAST = 1e-8  # where logarithmic axes end: below it differences of single precision are rounding
FIXED: Key = ("fixed", None)  # what the others are held against, seed by seed
LOOKS: dict[Key, tuple[str, str, tuple[float, ...], float]] = {  # label, colour, dash, width
    ("linear", None): ("linear layer, no normalisation", BLACK, (), 0.8),
    ("standard", None): ("trained, unit rows", RED, (), 1.0),
    FIXED: ("fixed ETF", ORANGE, (), 1.0),
    ("nearest", True): ("nearest ETF", BLUE, (), 1.6),
    ("nearest", False): ("nearest ETF, gradient off", SKY, (3.0, 2.0), 1.0),
}
Heads = dict[Key, sweep.Table]


class Paired(NamedTuple):
    """Seeds at which both got there, the geometric mean over them of one number over the other, and its 95 % t interval."""

    seeds: int
    ratio: float
    low: float
    high: float


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw balanced and long-tailed data as png, pdf and html into `out`, and write the table of accuracies; the files written."""
    table = stored.read(folder, STUDY, COLUMNS)
    ratios = sorted(set(stored.pick(table, STUDY, kind="network").values("ratio")))
    files = stored.write({file_of(ratio): make(table, ratio) for ratio in ratios}, out)
    return [*files, write_whole(out / f"{NAME}_accuracy.md", accuracies(table))]


def file_of(ratio: float) -> str:
    """network_guided for balanced data, with "_tail" behind it for long-tailed data."""
    return NAME if ratio == 1 else f"{NAME}_tail"


def make(table: sweep.Table, ratio: float) -> stored.Drawing:
    """The figure of one set of class sizes: a curve a head, median and range over the seeds."""
    rows = stored.pick(table, STUDY, kind="network", ratio=ratio)
    heads = {key: own for key in LOOKS if len(own := rows.where(head=key[0], gradient=key[1]))}
    named = {key: LOOKS[key][0] + remark(own) for key, own in heads.items()}
    epochs, tailed = int(rows["epochs"].max()), ratio > 1
    x = "epoch" if epochs >= EPOCHS else f"epoch (run to {epochs} of {EPOCHS})"
    above = {key: own["cross_entropy"] - reference(table, ratio, *key) for key, own in heads.items()}
    ends = {key: table.where(kind="model", ratio=ratio, head=key[0], gradient=key[1]) for key in heads} if tailed else {}

    def falling(name: str, title: str, label: str) -> Curves:
        return path(heads, named, {key: own[name] for key, own in heads.items()}, title, (x, label), levels(ends, f"end_{name}"))

    def share(name: str, title: str, label: str) -> Curves:
        return path(heads, named, {key: own[name] for key, own in heads.items()}, title, (x, label), log=False)

    if tailed:
        loss = path(heads, named, above, "loss above the model's end", (x, "cross-entropy less model's"))
        known = [
            share("test_accuracy", "test accuracy", "accuracy"),
            share("tail_test_accuracy", "test, smaller half of the classes", "accuracy"),
            against_fixed(heads, named, "nc1", "NC1 falls to"),
        ]
    else:
        loss = path(heads, named, above, "loss above its floor", (x, "cross-entropy less floor"))
        known = [
            share("accuracy", "training accuracy", "accuracy"),
            share("test_accuracy", "test accuracy", "accuracy"),
            against_fixed(heads, named, "excess", "loss less floor falls to"),
        ]
    panels = [
        [loss, falling("margin_gap", "mean cosine margin", "$K/(K-1)$ less the mean"), sorted_margins(heads, named)],
        [
            falling("nc1", "NC1", "within over between"),
            falling("nc3", "NC3", "distance"),
            falling("equinorm", "equal norms", "$|$features less weights$|$"),
        ],
        known,
    ]
    sizes = "long-tailed" if tailed else "balanced"
    title = f"{rows['dataset'][0]}, {sizes}: networks with the nearest simplex ETF as classifier, and without"
    return stored.Drawing(panels, title, caption(table, rows, heads, above), height=7.4, ncols=3)


def reference(table: sweep.Table, ratio: float, head: str, gradient: bool | None) -> float:
    """The proven floor of the loss of balanced data, or where the model ends under this head; NaN without either."""
    own = table.where(kind="network" if ratio == 1 else "model", ratio=ratio, head=head, gradient=gradient)
    return float(own["floor" if ratio == 1 else "end_cross_entropy"][0]) if len(own) else float("nan")


def remark(own: sweep.Table) -> str:
    """What is to be known of a curve: runs that diverged."""
    lost = int(np.sum(~finite(own)))
    return f" ({lost} of {len(own)} diverged)" if lost else ""


def finite(own: sweep.Table) -> NDArray[np.bool_]:
    """Which runs did not diverge."""
    return np.array([bool(value) for value in own.values("finite")])


def path(
    heads: Heads,
    named: dict[Key, str],
    values: dict[Key, Floats],
    title: str,
    labels: tuple[str, str],
    flat: dict[Key, float] | None = None,
    log: bool = True,
) -> Curves:
    """A measure over the epochs: median and range over the seeds, up to where the first run diverged; flat: dotted levels of the model."""
    curves = []
    for key, own in heads.items():
        epoch = own["epoch"][0]
        kept = (epoch > 0) & np.isfinite(values[key]).all(axis=0)
        if kept.any():
            shown = np.maximum(values[key][:, kept], LEAST) if log else values[key][:, kept]
            told = [
                f"{LOOKS[key][0]}, epoch {at:g}: {np.median(v):.4g} ({v.min():.4g} to {v.max():.4g}) over {len(v)} seeds"
                for at, v in zip(epoch[kept], values[key][:, kept].T, strict=True)
            ]
            curves.append(curve(key, named[key], epoch[kept], shown, told))
    for key, level in (flat or {}).items():
        line, told = np.full(2, level), [f"{LOOKS[key][0]}, the model: {level:.4g}"] * 2
        curves.append(Curve(heads[key]["epoch"][0][[1, -1]], line, line, line, "", LOOKS[key][1], "", None, told, 0.8, (1, 2)))
    return Curves(curves, title=title, labels=labels, log=(True, log), limits=around(curves, log))


def levels(ends: Heads, name: str) -> dict[Key, float]:
    """Where the model ends, head by head, where it does not end at collapse."""
    return {key: float(end[name][0]) for key, end in ends.items() if len(end) and key != ("nearest", False) and end[name][0] > 1e-3}


def curve(key: Key, label: str, x: Floats, values: Floats, hover: Sequence[str]) -> Curve:
    """Median and range of values (seeds, P) over x."""
    _, colour, dash, width = LOOKS[key]
    return Curve(x, np.median(values, axis=0), values.min(axis=0), values.max(axis=0), label, colour, "", None, hover, width, dash)


def around(curves: Sequence[Curve], log: bool) -> tuple[float, float]:
    """Ends of an axis around the curves."""
    low, high = min(float(c.low.min()) for c in curves), max(float(c.high.max()) for c in curves)
    if log:
        return 0.6 * low, 1.6 * high
    room = max(0.05 * (high - low), 1e-3)
    return low - room, high + room


def sorted_margins(heads: Heads, named: dict[Key, str]) -> Curves:
    """The cosine margin of each training sample at the end, samples in the order of their margins, and the limit."""
    curves = []
    for key, own in heads.items():
        own = own.pick(finite(own))
        if len(own):
            share = (own["ranks"][0] + 0.5) / own["N"][0]
            told = [
                f"{LOOKS[key][0]}: {s:.1%} of samples have a smaller margin, {np.median(v):.4g}"
                for s, v in zip(share, own["margins"].T, strict=True)
            ]
            curves.append(curve(key, named[key], share, own["margins"], told))
    limit = next(iter(heads.values()))["limit"][0]
    line, labels = np.full(2, limit), ("share of samples, sorted", "margin")
    curves.append(Curve([0, 1], line, line, line, "$K/(K-1)$", "#777777", "", None, None, 0.8, (1, 2)))
    return Curves(curves, title="cosine margins at the end", labels=labels, log=(False, False), limits=around(curves, log=False))


def against_fixed(heads: Heads, named: dict[Key, str], name: str, label: str) -> Curves:
    """Epochs until a measure has fallen to a level, over those of the fixed ETF of the same seed: geometric mean and 95 % interval."""
    curves = []
    for key, own in heads.items():
        if key == FIXED or FIXED not in heads:
            continue
        found, many = paired(own, heads[FIXED], f"reached_{name}"), len(heads[FIXED])
        kept = [i for i in reversed(range(len(found))) if found[i].seeds > 1]
        if kept:
            x = own["levels"][0][kept]
            mean, low, high = (np.array([found[i][part] for i in kept]) for part in (1, 2, 3))
            told = [
                f"{LOOKS[key][0]}, {level:g}: {found[i].ratio:.3g} ({found[i].low:.3g} to {found[i].high:.3g}), {found[i].seeds} pairs"
                for level, i in zip(x, kept, strict=True)
            ]
            trusted = np.array([found[i].seeds == many for i in kept])
            _, colour, dash, width = LOOKS[key]
            curves.append(Curve(x, mean, low, high, named[key], colour, "o", trusted, told, width, dash))
    x = np.concatenate([c.x for c in curves]) if curves else np.array([0.01, 0.1])
    ends, one = np.array([x.min() / 1.1, x.max() * 1.1]), np.ones(2)
    curves.append(Curve(ends, one, one, one, "", LOOKS[FIXED][1], ""))
    low, high = around(curves, log=True)
    return Curves(
        curves,
        title="epochs, over the fixed ETF's",
        labels=(label, "ratio of epochs"),
        log=(True, True),
        limits=(max(low, 0.01), min(high, 100.0)),
        hollow="not every seed got there",
    )


def paired(own: sweep.Table, other: sweep.Table, name: str) -> list[Paired]:
    """A column of one head over that of another with the same seed, level by level, of the seeds at which both are known."""
    from scipy.stats import t

    runs = sorted(set(own.values("run")) & set(other.values("run")))
    a, b = (np.array([rows.where(run=run)[name][0] for run in runs]) for rows in (own, other))
    logs, found = np.log(a / b), []
    for ratios in (column[np.isfinite(column)] for column in logs.T):
        n, mean = len(ratios), ratios.mean() if len(ratios) else np.nan
        half = float(t.ppf(0.975, n - 1)) * ratios.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
        found.append(Paired(n, *(float(np.exp(mean + shift)) for shift in (0.0, -half, half))))
    return found


def accuracies(table: sweep.Table) -> bytes:
    """Accuracies in percent at a quarter of the epochs and at the end, median and range over the seeds, as a table in Markdown."""
    networks = stored.pick(table, STUDY, kind="network")
    epochs = networks["epoch"][0]
    quarter = early(networks)
    at = [(quarter, f"{epochs[quarter]:g}"), (-1, f"{epochs[-1]:g}")]
    columns = [
        (name, f"{words}, epoch {epoch}", i) for i, epoch in at for name, words in (("accuracy", "train"), ("test_accuracy", "test"))
    ]
    columns += [("head_test_accuracy", "test, larger half", -1), ("tail_test_accuracy", "test, smaller half", -1)]
    lines = ["| " + " | ".join(["data", "head", *(words for _, words, _ in columns)]) + " |", "| --- " * (2 + len(columns)) + "|"]
    for ratio in sorted(set(networks.values("ratio"))):
        for (head, gradient), look in LOOKS.items():
            own = networks.where(ratio=ratio, head=head, gradient=gradient)
            if len(own):
                data = f"{own['dataset'][0]}, {'balanced' if ratio == 1 else f'1:{ratio:g}'}"
                lines.append(
                    "| " + " | ".join([data, look[0] + remark(own), *(_percent(own[name][:, i]) for name, _, i in columns)]) + " |"
                )
    return ("\n".join(lines) + "\n").encode()


def early(networks: sweep.Table) -> int:
    """Which record is that of a quarter of the epochs, as epoch 50 of the source's 200."""
    return 1 + int(np.argmin(np.abs(networks["epoch"][0][1:] - networks["epochs"][0] / 4)))


def _percent(values: Floats) -> str:
    known = 100 * values[np.isfinite(values)]
    return f"{np.median(known):.2f} ({known.min():.2f} to {known.max():.2f})" if known.size else ""


def caption(table: sweep.Table, rows: sweep.Table, heads: Heads, above: dict[Key, Floats]) -> str:
    """In words, what was run and what it is worth."""
    names = ("K", "n", "N", "width", "radius", "epochs", "batch", "lr", "momentum", "weight_decay", "ratio")
    first = {name: rows[name][0] for name in names}
    tailed, seeds = first["ratio"] > 1, max(map(len, heads.values()))
    shorter = "" if first["epochs"] >= EPOCHS and seeds >= SEEDS else f" Shorter than the whole comparison: {EPOCHS} epochs, {SEEDS} seeds."
    sizes = f"sizes {first['n']} to {round(first['n'] / first['ratio'])}, exponential" if tailed else f"{first['n']} samples each"
    ends = "; ".join(
        f"{LOOKS[key][0]} {np.nanmedian(a[:, -1]):.2g}" + (f" ({under} below)" if (under := int(np.sum(a[:, -1] < -1e-6))) else "")
        for key, a in above.items()
        if np.isfinite(a[:, -1]).any()
    )
    what = "where the model (free features, same class sizes and head) ends" if tailed else "the proven floor"
    if tailed:
        gradients = [float(value) for value in table.where(kind="model", ratio=first["ratio"])["end_gradient_norm"]]
        worth = f" Dotted in (b), (e), (f): the model's ends (gradient norms at most {max(gradients):.0e})." if gradients else ""
    else:
        worth = f" At collapse: {sum(int(own['at_collapse'].sum()) for own in heads.values())} of {len(rows)} networks."
    batch = min(int(first["batch"]), int(first["N"]))
    lost = int(np.sum(~finite(rows)))
    return (
        rf"$K={first['K']}$, {sizes}; features of width {first['width']} and norm {first['radius']:g} (plain linear layer: free); "
        rf"SGD, batches of at most {batch}, momentum {first['momentum']:g}, rate {first['lr']:g} falling along a cosine, weight decay "
        rf"{first['weight_decay']:g}. Curves: median and range over {seeds} seeds, same first body and batches for every head.{shorter} "
        f"{'No network' if not lost else f'{lost} of {len(rows)} networks'} diverged. Metrics of the training set, evaluated, about "
        f"the mean of all samples. (a): over {what}, which the plain linear layer lacks; medians left: {ends}.{worth} "
        f"Norms of the loss's gradient left: {rows['loss_gradient'].min():.1e} to {rows['loss_gradient'].max():.1e}. "
        "(i): geometric mean and 95 % t interval over pairs of one seed; hollow where not every seed got there."
    )
