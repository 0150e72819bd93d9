"""Guided runs against the others: loss above its floor, margins, NC1, NC3 and equal norms over the iterations, a file for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

NAME = STUDY = "guided_etf"
MEASURED = ("excess", "margin_gap", "nc1", "nc3", "equinorm")
COLUMNS = (
    *("model", "K", "n", "width", "head", "gradient", "solver", "run", "steps", "gain", "radius", "iteration", *MEASURED, "floor", "limit"),
    *("finite", "at_collapse", "ranks", "margins"),
)
STEPS, SEEDS = 2000, 5  # what a whole comparison has
UNREAD = (100, 200, 1000)  # classes of the models whose width and samples are not the paper's
LEAST = 1e-16  # where logarithmic axes end: below it differences are rounding
# head, gradient, solver -> label, colour, dash, width: lines that coincide show through the gaps of the later ones
LOOKS: dict[tuple[str, bool | None, str | None], tuple[str, str, tuple[float, ...], float]] = {
    ("standard", None, None): ("standard", style.OKABE_ITO["vermillion"], (), 1.0),
    ("fixed", None, None): ("fixed ETF", style.OKABE_ITO["orange"], (), 1.0),
    ("nearest", True, "closed"): ("nearest ETF", style.OKABE_ITO["blue"], (), 1.6),
    ("nearest", False, "closed"): ("nearest ETF, gradient off", style.OKABE_ITO["sky"], (3.0, 2.0), 1.0),
    ("nearest", True, "pymanopt"): ("nearest ETF, pymanopt", style.OKABE_ITO["black"], (1.0, 3.0), 1.0),
    ("nearest", False, "pymanopt"): ("nearest ETF, pymanopt, gradient off", style.OKABE_ITO["green"], (1.0, 4.0), 1.0),
}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw every model in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, COLUMNS)
    return stored.write({file_of(K): make(stored.pick(table, STUDY, K=K)) for K in sorted(set(table.values("K")))}, out)


def file_of(classes: int) -> str:
    """guided_etf for UFM-10, with the classes behind it for the others."""
    return NAME if classes == 10 else f"{NAME}_{classes}"


def make(table: sweep.Table) -> stored.Drawing:
    """The figure of one model: five measures over the iterations and the sorted margins at the end, a curve a head."""
    rows = table.pick(table["steps"] == table["steps"].max())  # the longest runs, where a shorter study shares the folder
    heads = {key: own for key in LOOKS if len(own := rows.where(head=key[0], gradient=key[1], solver=key[2]))}
    most = max(map(len, heads.values()))
    named = {key: LOOKS[key][0] + remark(own, most) for key, own in heads.items()}
    steps = int(rows["steps"].max())
    x = "iteration" if steps >= STEPS else f"iteration (run to {steps} of {STEPS})"
    over = [
        ("excess", "loss above its floor", "cross-entropy less floor"),
        ("margin_gap", "mean cosine margin", "$K/(K-1)$ less the mean"),
        ("nc1", "NC1", "within over between"),
        ("nc3", "NC3", "distance"),
        ("equinorm", "equal norms", "$|$features less weights$|$"),
    ]
    first, second, *rest = [path(heads, named, name, title, (x, label)) for name, title, label in over]
    return stored.Drawing(
        [[first, second, sorted_margins(heads, named)], rest],
        f"{rows['model'][0]}: descent with the nearest simplex ETF as classifier, and without",
        caption(rows, heads),
        height=5.0,
        ncols=3,
    )


def remark(own: sweep.Table, most: int) -> str:
    """What is to be known of a curve: runs that diverged, and seeds that are fewer than those of another head."""
    lost = int(np.sum(~finite(own)))
    remarks = [f"{lost} of {len(own)} diverged"] * (lost > 0) + [f"{len(own)} of {most} seeds"] * (len(own) < most)
    return f" ({', '.join(remarks)})" if remarks else ""


def finite(own: sweep.Table) -> NDArray[np.bool_]:
    """Which runs did not diverge."""
    return np.array([bool(value) for value in own.values("finite")])


def path(heads: dict[Any, sweep.Table], named: dict[Any, str], name: str, title: str, labels: tuple[str, str]) -> Curves:
    """One measure over the iterations: median and range over the seeds, up to where the first run diverged."""
    curves = []
    for key, own in heads.items():
        iteration = own["iteration"][0]
        kept = (iteration > 0) & np.isfinite(own[name]).all(axis=0)
        if kept.any():
            curves.append(curve(key, named[key], iteration[kept], np.maximum(own[name][:, kept], LEAST), told(own, name, kept)))
    return Curves(curves, title=title, labels=labels, log=(True, True), limits=around(curves))


def curve(key: Any, label: str, x: NDArray[np.float64], values: NDArray[np.float64], hover: Any) -> Curve:
    """Median and range of values (seeds, P) over x."""
    _, colour, dash, width = LOOKS[key]
    return Curve(x, np.median(values, axis=0), values.min(axis=0), values.max(axis=0), label, colour, "", None, hover, width, dash)


def around(curves: Sequence[Curve]) -> tuple[float, float]:
    """Ends of a logarithmic axis around the curves."""
    return 0.5 * min(float(c.low.min()) for c in curves), 2 * max(float(c.high.max()) for c in curves)


def told(own: sweep.Table, name: str, kept: NDArray[np.bool_]) -> list[str]:
    """A text for each record."""
    at, values = own["iteration"][0][kept], own[name][:, kept]
    return [
        f"{LOOKS[key_of(own)][0]}, iteration {step:.0f}: {np.median(v):.3g} ({v.min():.3g} to {v.max():.3g}) over {len(v)} seeds"
        for step, v in zip(at, values.T, strict=True)
    ]


def key_of(own: sweep.Table) -> tuple[Any, Any, Any]:
    """Head, gradient and solver of rows that share them."""
    return own.values("head")[0], own.values("gradient")[0], own.values("solver")[0]


def sorted_margins(heads: dict[Any, sweep.Table], named: dict[Any, str]) -> Curves:
    """How far the cosine margin of each sample is from the limit at the end, samples in the order of their margins."""
    curves = []
    for key, own in heads.items():
        own = own.pick(finite(own))
        if len(own):
            share = (own["ranks"][0] + 0.5) / (own["K"][0] * own["n"][0])
            values = np.maximum(own["limit"][0] - own["margins"], LEAST)
            hover = [
                f"{LOOKS[key][0]}: {s:.1%} of samples have a smaller margin, {np.median(v):.3g}"
                for s, v in zip(share, values.T, strict=True)
            ]
            curves.append(curve(key, named[key], share, values, hover))
    labels = ("share of samples, sorted", "$K/(K-1)$ less the margin")
    return Curves(curves, title="cosine margins at the end", labels=labels, log=(False, True), limits=around(curves))


def caption(rows: sweep.Table, heads: dict[Any, sweep.Table]) -> str:
    """In words, what was run and what it is worth."""
    K, n, d, steps = (int(rows[name][0]) for name in ("K", "n", "width", "steps"))
    seeds = max(map(len, heads.values()))
    shorter = "" if steps >= STEPS and seeds >= SEEDS else f" Shorter than the whole comparison: {STEPS} iterations, {SEEDS} seeds."
    sizes = " The paper's sizes of this model could not be read: $d$ and $n$ are a choice of this study." if K in UNREAD else ""
    reached = "; ".join(f"{LOOKS[key][0]} {int(own['at_collapse'].sum())} of {len(own)}" for key, own in heads.items())
    lost = int(np.sum(~finite(rows)))
    return (
        rf"$K={K}$ classes of $n={n}$, $d={d}$; features of norm {rows['radius'][0]:g}, cross-entropy, no penalties; {steps} iterations of "
        rf"AGD with gain {rows['gain'][0]:g} from orthogonal starts that are the same for every head.{sizes} Median and range over "
        f"{seeds} seed{'s' if seeds > 1 else ''}, from the first iteration on.{shorter} {_diverged(lost)} Ends within $10^{{-6}}$ of the "
        rf"floor {rows['floor'][0]:.4f} of the loss and $10^{{-4}}$ of the limit $K/(K-1)$ of the mean margin: {reached}."
    )


def _diverged(lost: int) -> str:
    return f"Diverged: {lost} of all runs; their heads' curves end before, and (c) leaves them out." if lost else "No run diverged."
