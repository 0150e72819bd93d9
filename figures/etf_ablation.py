"""Options of the nearest-ETF classifier: averaging, proximal point and the gradient through W; guard and class weights in a second file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

Floats = NDArray[np.float64]

NAME = STUDY = "etf_ablation"
COLUMNS = (
    *("panel", "K", "width", "n", "rule", "start", "steps", "seeds", "averaging", "gradient", "form", "delta", "relative", "near", "guard"),
    *("pattern", "ratio", "weights", "apart", "pairs", "means", "iteration", "excess", "share", "displacement", "reached_4", "reached_6"),
    *("stop", "end_class_loss", "end_minority_margin", "end_gradient_norm", "displaced", "guard_changes", "gain"),
)
LEAST = 1e-16  # where logarithmic axes end: below it differences are rounding
BLACK, BLUE, SKY, GREEN, ORANGE, RED, PURPLE = (
    style.OKABE_ITO[name] for name in ("black", "blue", "sky", "green", "orange", "vermillion", "purple")
)
Look = tuple[str, str, tuple[float, ...], float]  # label, colour, dash, width
LAWS: dict[tuple[str, bool], Look] = {
    ("0.01", True): ("$a_t=0.01$", ORANGE, (), 1.0),
    ("0.1", True): ("$a_t=0.1$", RED, (), 1.0),
    ("1/t", True): ("$a_t=1/t$", GREEN, (), 1.0),
    ("2/(t+1)", True): ("$a_t=2/(t+1)$", BLUE, (), 1.6),
    ("none", True): ("$a_t=1$, no averaging", BLACK, (3.0, 2.0), 1.0),
    ("2/(t+1)", False): ("$a_t=2/(t+1)$, gradient off", SKY, (1.0, 2.0), 1.4),
}
STRENGTHS: dict[tuple[str, str], Look] = {
    ("delta", "full"): (r"full, $\delta=10^{-3}$", RED, (), 1.4),
    ("delta", "reduced"): (r"reduced, $\delta=10^{-3}$", ORANGE, (3.0, 2.0), 1.0),
    ("relative", "full"): (r"full, $\rho={}$", BLUE, (), 1.4),
    ("relative", "reduced"): (r"reduced, $\rho={}$", SKY, (3.0, 2.0), 1.0),
}
GUARDED: dict[tuple[str, float, bool], Look] = {  # form, guard, gradient
    ("reduced", 0.0, True): ("reduced, no guard", RED, (), 1.4),
    ("full", 0.0, True): (r"full, $\delta=10^{-3}$, no guard", ORANGE, (), 1.2),
    ("full", 0.05, True): (r"full, $\delta=10^{-3}$, guard 0.05", GREEN, (3.0, 2.0), 1.2),
    ("reduced", 0.05, True): ("reduced, guard 0.05", BLUE, (), 1.4),
    ("reduced", 0.0, False): ("gradient off", BLACK, (1.0, 2.0), 1.2),
}
WEIGHTS = {"inverse sizes": (GREEN, "s"), "equal": (BLUE, "o"), "sizes": (RED, "^")}
PATTERNS = {"exponential": (), "step": (3.0, 2.0)}
UNFINISHED = "some seeds did not get there"


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    table = stored.read(folder, STUDY, COLUMNS)
    return stored.write({NAME: make(table), f"{NAME}_guard": make_guard(table)}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure of averaging and proximal points: loss, displacement of W and share of the gradient over the steps; W over K."""
    rows = stored.pick(table, STUDY, panel="averaging")
    static = stored.pick(table, STUDY, panel="displacement")
    wide = rows.pick(rows["width"] > rows["K"])
    narrow = rows.pick(rows["width"] == rows["K"] - 1)
    fewest = wide.where(K=int(wide["K"].min()), rule="AGD")
    usual = fewest.where(n=int(fewest["n"].min()))
    share = "indirect / direct gradient"
    panels = [
        [
            by_law(narrow, "excess", f"loss above its floor, {size(narrow)}", "$F-F_{min}$"),
            against_source(narrow),
            by_law(usual, "displacement", f"distance of $W$, {size(usual)}", "relative distance"),
        ],
        [by_law(usual, "share", f"gradient through $W$, {size(usual)}", share), by_size(rows, share), over_classes(static)],
    ]
    caption = (
        "Features of radius 5, cross-entropy, balanced classes, AGD with gain 10 from orthogonal starts; (a)-(d) "
        f"$K={usual['K'][0]}$, $n={usual['n'][0]}$. Median and range over {rows['seeds'].min()} seeds, the same starts for every law; "
        f"{lost(rows)}. (c): distance, relative to the norm of $W$, to the ETF "
        "nearest to the class means of the step; without averaging it is zero. (d), (e): gradient in the features through $W$ over the "
        "other part, measured at points of the run; (e) solid $a_t=2/(t+1)$, dashed no averaging. Below $10^{-12}$ all is rounding. (f): "
        "one ETF with an unrelated proximal point (Haar); features standard normal (dots) or near collapse (squares), "
        rf"$d=\max(2K,64)$; $\delta=2\rho/(K-1)$; {static['seeds'].min()} seeds."
    )
    return stored.Drawing(panels, "The nearest ETF as classifier: averaging, proximal point, gradient through it", caption, 5.6, 4)


def make_guard(table: sweep.Table) -> stored.Drawing:
    """The figure of guard, lag and class weights."""
    gains, starts, lags, tails, static = (
        stored.pick(table, STUDY, panel=panel) for panel in ("pullback", "coinciding", "delta", "imbalance", "displacement")
    )
    pairs, first = int(gains["pairs"].max()), lags.where(K=int(lags["K"].min()))
    gains = gains.where(pairs=pairs)
    panels = [
        [gain(gains, f"size of the gradient, {pairs} pairs"), arrival(starts), lag(first)],
        [
            tailed(tails, "end_class_loss", "loss, a mean over classes", "loss", True),
            tailed(tails, "end_minority_margin", "smaller half of the classes", "cosine margin", False),
            guard_change(static),
        ],
    ]
    K, d = int(starts["K"][0]), int(starts["width"][0])
    caption = (
        f"$K={K}$, $d={d}$; median and range over {starts['seeds'].min()} seeds. (a), (b): every second class lies at the one before it "
        "but for the share on the axis. (a): norm of the gradient in the class means times theirs, over that in $W$ times $\\sqrt{K}$, of "
        f"a random slope, for one ETF. (b): AGD from such starts, $n={starts['n'][0]}$; hollow: {UNFINISHED} within {starts['steps'][0]}. "
        "(c): how far $W$ lags behind the ETF nearest to the class means, without averaging; dotted: unrelated proximal point. (d), (e): "
        f"unequal classes after {tails['steps'][0]} steps, largest {tails['n'][0]}, exponential sizes solid, step dashed; gradient norms "
        f"left at most {np.nanmax(tails['end_gradient_norm']):.0e}; {lost(tails)}. (f): relative change of the gradient of a random slope."
    )
    return stored.Drawing(panels, "The nearest ETF as classifier: guard, proximal lag, unequal classes", caption, 5.6, 4)


def size(rows: sweep.Table) -> str:
    """The setting of rows that share it."""
    return f"$d={rows['width'][0]}$"


def lost(rows: sweep.Table) -> str:
    """How many runs diverged."""
    many = sum(int(np.sum(stops == "DIVERGED")) for stops in rows.values("stop"))
    return f"{many} of {int(rows['seeds'].sum())} runs diverged" if many else "no run diverged"


def by_law(rows: sweep.Table, name: str, title: str, label: str) -> Curves:
    """A column over the steps, a curve a law of averaging."""
    found = [(own, look) for key, look in LAWS.items() if len(own := rows.where(averaging=key[0], gradient=key[1]))]
    if name == "share":
        found = [(own, look) for own, look in found if own.values("gradient")[0]]
    if name == "displacement":
        found = [(own, look) for own, look in found if own["averaging"][0] != "none"]
    return over_steps([path(own, name, *look) for own, look in found], title, label)


def against_source(rows: sweep.Table) -> Curves:
    """The loss above its floor over that of the source's law from the same start, over the steps, a curve a law."""
    source, curves = rows.where(averaging="2/(t+1)", gradient=True)["excess"][0], []
    for (law, gradient), look in LAWS.items():
        own = rows.where(averaging=law, gradient=gradient)
        if len(own) and (law, gradient) != ("2/(t+1)", True):
            curves.append(path(own, "excess", *look, over=source))
    return over_steps(curves, f"over that of $2/(t+1)$, {size(rows)}", "ratio")


def by_size(rows: sweep.Table, label: str) -> Curves:
    """The share of the gradient over the steps, a colour a setting, with the source's averaging and without."""
    keys = sorted(dict.fromkeys(zip(rows["K"], rows["width"], rows["n"], strict=True)))
    colours = style.ordered(len(keys) + 1)
    curves = []
    for (K, d, n), colour in zip(keys, colours, strict=False):
        own = rows.where(K=K, width=d, n=n, rule="AGD", gradient=True)
        for law, dash in (("2/(t+1)", ()), ("none", (3.0, 2.0))):
            text = f"$K={K}$, $d={d}$, $n={n}$" if not dash else ""
            curves.append(path(own.where(averaging=law), "share", text, colour, dash, 1.0))
    return over_steps(curves, "gradient through $W$, AGD", label)


def path(own: sweep.Table, name: str, label: str, colour: str, dash: tuple[float, ...], width: float, over: Any = 1.0) -> Curve:
    """A column of one row over the steps, divided by `over`: median and range over the seeds, up to where the first diverged."""
    values, at = own[name][0] / over, own["iteration"][0]
    kept = (at > 0) & np.isfinite(values).all(axis=0)
    shown = np.maximum(values[:, kept], LEAST)
    hover = [f"{label or 'no averaging'}, step {t:.0f}: {told(v)}" for t, v in zip(at[kept], shown.T, strict=True)]
    return Curve(at[kept], np.median(shown, axis=0), shown.min(axis=0), shown.max(axis=0), label, colour, "", None, hover, width, dash)


def over_steps(curves: Sequence[Curve], title: str, label: str) -> Curves:
    """Curves over the steps on two logarithmic axes."""
    return Curves(curves, title, ("step", label), (True, True), around(curves))


def around(curves: Sequence[Curve], least: float = 0.3 * LEAST) -> tuple[float, float]:
    """Ends of a logarithmic axis around the curves."""
    return max(least, 0.5 * min(float(c.low.min()) for c in curves)), 2 * max(float(c.high.max()) for c in curves)


def told(values: Floats) -> str:
    """Median, range and how many seeds these are."""
    known = values[np.isfinite(values)]
    return f"{np.median(known):.3g} ({known.min():.3g} to {known.max():.3g}) over {known.size} of {values.size} seeds"


def points(rows: sweep.Table, x: str, name: str, look: Look, marker: str = "o", trusted: Any = None, what: str = "") -> Curve:
    """A column over another, a point a row: median and range over the seeds."""
    order = np.argsort(rows[x])
    values, at = rows[name][order], rows[x][order]
    label, colour, dash, width = look
    hover = [f"{what or label}, {at_[1]:g}: {told(v)}" for at_, v in zip(enumerate(at), values, strict=True)]
    return Curve(
        at, np.nanmedian(values, 1), np.nanmin(values, 1), np.nanmax(values, 1), label, colour, marker, trusted, hover, width, dash
    )


def over_classes(rows: sweep.Table) -> Curves:
    """W's displacement by an unrelated proximal point, over K: a line a strength and form, a marker a kind of means."""
    curves = []
    for (strength, form), (label, *rest) in STRENGTHS.items():
        own = rows.where(form=form)
        own = own.pick(own[strength] > 0)
        look = (label.replace("{}", f"{own['relative'].max():.2g}"), *rest)
        for means, marker in (("normal", "o"), ("near collapse", "s")):
            curves.append(points(own.where(means=means), "K", "displaced", look, marker, what=f"{look[0]}, {means}, K"))  # type: ignore[arg-type]
    named = [c if c.marker == "o" else unnamed(c) for c in curves]
    return Curves(named, "unrelated proximal point", ("$K$", "displacement of $W$"), (True, True), around(curves))


def unnamed(c: Curve) -> Curve:
    """The curve without an entry of its own in the legend."""
    return Curve(c.x, c.y, c.low, c.high, "", c.colour, c.marker, c.trusted, c.hover, c.width, c.dash)


def gain(rows: sweep.Table, title: str) -> Curves:
    """The size of the gradient over the distance of the classes."""
    curves = [
        points(own, "apart", "gain", look)
        for (form, guard, gradient), look in GUARDED.items()
        if gradient and len(own := rows.where(form=form, guard=guard))
    ]
    return Curves(curves, title, ("distance of two classes", "gradient, relative"), (True, True), around(curves), decades(rows["apart"]))


def decades(x: Floats) -> Sequence[float]:
    """Every second decade where all of them would touch; as they fall elsewhere."""
    return [e for e in (1e-8, 1e-6, 1e-4, 1e-2, 1.0) if e >= 0.99 * x.min()] if x.min() < 1e-6 else ()


def arrival(rows: sweep.Table) -> Curves:
    """Steps to 1e-4 over the distance of the classes at the start; where a seed did not get there, its last step, hollow."""
    end = rows["steps"][0]
    curves = []
    for (form, guard, gradient), look in GUARDED.items():
        own = rows.where(form=form, guard=guard, gradient=gradient)
        order = np.argsort(own["apart"])
        values = own["reached_4"][order]
        shown, arrived = np.where(np.isfinite(values), values, end), np.isfinite(values).all(axis=1)
        hover = [
            f"{look[0]}, {a:g} apart: {sum(np.isfinite(v))} of {len(v)} seeds there, {v}"
            for a, v in zip(own["apart"][order], values, strict=True)
        ]
        ends = shown.min(axis=1), shown.max(axis=1)
        curves.append(Curve(own["apart"][order], np.median(shown, 1), *ends, look[0], look[1], "o", arrived, hover, look[3], look[2]))
    labels = ("distance of two classes at the start", "steps to $10^{-4}$")
    return Curves(curves, "classes that start together", labels, (True, True), around(curves), decades(rows["apart"]), UNFINISHED)


def lag(rows: sweep.Table) -> Curves:
    """W's distance to the ETF nearest to the class means over the steps, a curve a proximal term."""
    curves = []
    for (strength, form), (label, colour, dash, width) in STRENGTHS.items():
        own = rows.where(form=form)
        own = own.pick(own[strength] > 0)
        text = label.replace("{}", f"{own['relative'].max():.2g}")
        curves.append(path(own.where(near="lagged"), "displacement", text, colour, dash, width))
        if len(far := own.where(near="unrelated")):
            curves.append(path(far, "displacement", "", colour, (1.0, 2.0), 1.0))
    return over_steps(curves, "lag of $W$ by its proximal point", "distance of $W$")


def tailed(rows: sweep.Table, name: str, title: str, label: str, log: bool) -> Curves:
    """A column at the end over the ratio of class sizes, a colour a class weight and a dash a pattern."""
    curves = [
        points(
            rows.where(pattern=pattern, weights=weights),
            "ratio",
            name,
            (f"class weights: {weights}" if pattern == "exponential" else "", colour, dash, 1.2),
            marker,
            what=f"{pattern}, class weights {weights}, ratio",
        )
        for weights, (colour, marker) in WEIGHTS.items()
        for pattern, dash in PATTERNS.items()
    ]
    low, high = min(float(c.low.min()) for c in curves), max(float(c.high.max()) for c in curves)
    limits = around(curves) if log else (low - 0.1 * (high - low), high + 0.1 * (high - low))
    return Curves(curves, title, ("largest over smallest class", label), (True, log), limits)


def guard_change(rows: sweep.Table) -> Curves:
    """The relative change of a gradient by the guard at full rank, over K."""
    own = rows.where(form="reduced", relative=0.0)
    looks: dict[str, Look] = {
        "normal": ("normal features", PURPLE, (), 1.2),
        "near collapse": ("features near collapse", BLACK, (3.0, 2.0), 1.2),
    }
    curves = [points(own.where(means=means), "K", "guard_changes", look) for means, look in looks.items()]
    return Curves(curves, "what guard 0.05 changes", ("$K$", "change of the gradient"), (True, True), around(curves))
