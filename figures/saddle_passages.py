"""The staircase of the loss: runs that end at DNC and at pairs, singular values along the way, the critical points passed, heat maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Bars, Curve, Curves, Matrix, style

Floats = NDArray[np.float64]

NAME = STUDY = "saddle_passages"
COLUMNS = (
    *("panel", "K", "n", "width", "depth", "lam", "scale", "run", "passages", "names", "name", "settled", "value", "rank", "evaluations"),
    *("at", "lingers", "passed_value", "passed_gradient", "saddle_value", "saddle_rank", "saddle_index", "saddle_difference"),
    *("times", "values", "gradients", "spectra", "pictures", "dnc_value", "pairs_value"),
)
RUNS = [(style.OKABE_ITO[name], "") for name in ("blue", "vermillion", "green")]
RANKS = ("blue", "green", "orange", "vermillion", "purple", "sky")
DASH, DOTS = (4.0, 1.5), (1.0, 1.0)
TIME = "time (steps × 0.5)"
FIRST = 100.0  # time from which on runs are shown
SHOWN = 7  # names of critical points that have a colour of their own


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, STUDY, COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: losses, singular values, critical points passed and which; heat maps of ends and of critical points on the way."""
    runs, paths = (stored.pick(table, STUDY, panel=panel) for panel in ("run", "path"))
    most = int(np.argmax(paths["passages"]))
    panels = [[losses(paths), spectra(paths, most), apart(runs), passed(runs)], pictures(paths, most)]
    found = np.isfinite(runs["saddle_index"])
    off = np.abs(runs["passed_value"] / runs["saddle_value"] - 1)[found]
    catalogued = int(np.sum(np.abs(runs["saddle_difference"])[found] <= 1e-8))
    near = int(np.sum(np.abs(runs["saddle_difference"])[found] <= 1e-3))
    passing = np.isfinite(runs["at"])
    lingers = float(np.median(runs["lingers"][passing]) * runs["lam"][0]) if passing.any() else np.nan
    lam, K, d = float(runs["lam"][0]), int(runs["K"][0]), int(runs["width"][0])
    caption = (
        rf"Linear chain, cross-entropy, $K={K}$, $n={runs['n'][0]}$, $d={d}$, $\lambda=2^{{{np.log2(lam):.0f}}}$, normal starts. (a), (b), "
        "heat maps: plain gradient descent, step 0.5, $L=2$; dotted in (b): passages, dips of the scale-free gradient norm by a factor 2 "
        f"both ways. (c), (d): gradient flow from {len(runs)} seeds, {int(runs['settled'].sum())} of them ended at a minimum (scale-free "
        r"gradient $\leq 10^{-3}$, index 0). Critical points passed: by Newton's method from the dip at its rank, gradient $\leq 10^{-9}$; "
        f"found for {int(found.sum())} of {int(np.isfinite(runs['at']).sum())} passages, the others are hatched. {catalogued} are at a "
        rf"catalogued level to $10^{{-8}}$, {near} within a thousandth of one; 'near': a critical point of that rank with no closed form. "
        + (f"Plateaus differ from them in value by {np.median(off):.1e} in the median. " if len(off) else "")
        + (f"Median time at a plateau: {lingers:.1f}" r"$/\lambda$." if np.isfinite(lingers) else "")
    )
    return stored.Drawing(panels, "The staircase of the loss: saddles passed on the way to low rank", caption, height=5.6, ncols=4)


def losses(paths: sweep.Table) -> Curves:
    """Loss against time of the runs shown, with the levels of DNC and pairs and those of the critical points passed."""
    curves: list[Curve] = []
    closed = {"DNC": float(paths["dnc_value"][0]), "pairs": float(paths["pairs_value"][0])}
    span = np.array([FIRST, max(float(np.nanmax(times)) for times in paths["times"])])
    for (name, value), dash in zip(closed.items(), (DASH, ()), strict=False):
        curves.append(level(span, value, f"closed form: {name}", "#000000", dash))
    for value in np.unique(np.round(paths["saddle_value"][np.isfinite(paths["saddle_index"])], 9)):
        curves.append(level(span, float(value), "critical point passed", style.HATCHED, DOTS))
    for i, ((colour, _), name) in enumerate(zip(RUNS, paths["name"], strict=False)):
        t, F = (known(paths[column][i]) for column in ("times", "values"))
        keep = t >= span[0]
        curves.append(Curve(t[keep], F[keep], F[keep], F[keep], f"run {i + 1}, to {name}", colour, ""))
    limits = 0.985 * min(float(c.y.min()) for c in curves), 1.05 * closed["DNC"]
    return Curves(unlabelled(curves), title="loss", labels=(TIME, "loss $F$"), log=(True, False), limits=limits)


def spectra(paths: sweep.Table, i: int) -> Curves:
    """Singular values of the class logits against time in the run with most passages."""
    t = known(paths["times"][i])
    S = paths["spectra"][i].reshape(-1, int(paths["K"][0]))[np.isfinite(paths["times"][i])]
    keep = t >= FIRST
    look = dict(colour=RUNS[i % len(RUNS)][0], marker="", width=0.8)
    curves = [Curve(t[keep], s[keep], s[keep], s[keep], "", **look) for s in S.T]
    top = 1.05 * float(S[keep].max())
    for at in known(paths["at"][i]):
        x = np.array([at, at * 1.0001])
        curves.append(Curve(x, [0, top], [0, top], [0, top], "passage", style.HATCHED, "", dash=DOTS, width=0.8))
    return Curves(unlabelled(curves), title=f"run {i + 1}", labels=(TIME, "singular values"), log=(True, False), limits=(0, top))


def apart(runs: sweep.Table) -> Curves:
    """How far in value a plateau is from its critical point, against the gradient norm at its dip; a marker a passage."""
    found = np.isfinite(runs["saddle_index"])
    ranks = np.unique(runs["saddle_rank"][found]).astype(int).tolist()
    if not ranks:
        return Curves(
            [level(np.array([1e-3, 1.0]), 1.0, "", "#FFFFFF", ())], title="no critical point found", log=(True, True), limits=(1e-8, 1)
        )
    curves = []
    for rank, colour in zip(ranks[::-1], RANKS, strict=False):
        mine = found & (runs["saddle_rank"] == rank)
        x, first = np.unique(runs["passed_gradient"][mine], return_index=True)
        y = np.abs(runs["passed_value"] / runs["saddle_value"] - 1)[mine][first]
        y = np.maximum(y, 1e-12)
        curves.append(Curve(x, y, y, y, f"passed: rank {rank}", style.OKABE_ITO[colour], "o", width=0.0))
    low, high = min(float(c.y.min()) for c in curves), max(float(c.y.max()) for c in curves)
    labels = ("gradient norm at the dip", "relative difference of $F$")
    ends = min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves)
    ticks = [x for x in (1e-4, 1e-3, 0.01, 0.1, 1.0) if ends[0] <= x <= ends[1]]
    return Curves(curves, ticks=ticks, title="passages", labels=labels, log=(True, True), limits=(0.4 * low, 2.5 * high))


def passed(runs: sweep.Table) -> Bars:
    """Which critical points were passed, by depth and scale of the start."""
    groups = sorted(set(zip(runs["depth"].tolist(), runs["scale"].tolist(), strict=True)))
    counts = [Counter(text for names in runs.where(depth=L, scale=s)["names"] for text in names.split("; ") if text) for L, s in groups]
    some = [(group, count) for group, count in zip(groups, counts, strict=True) if count]
    total: Counter[str] = sum((count for _, count in some), Counter())
    names = [name for name, _ in total.most_common() if name != "none"]
    shown, rest = sorted(names[:SHOWN]), names[SHOWN:]
    rows = [[count[name] for _, count in some] for name in shown]
    rows += [[sum(count[name] for name in rest) for _, count in some]] if rest else []
    x = [f"$L={L}$, {scale:g} ({sum(count.values())})" for (L, scale), count in some] or ["no passage"]
    return Bars(
        x=x,
        counts=np.array(rows).reshape(len(shown) + bool(rest), len(some)) if some else np.zeros((0, 1)),
        names=[*shown, *(["other critical points"] if rest else [])],
        colours=[*style.ordered(len(shown)), *([style.NEUTRAL] if rest else [])],
        unsettled=[count["none"] for _, count in some] or [1],
        untrusted="no critical point near",
        title="which ones",
        labels=("depth, scale (count)", "share of passages"),
    )


def pictures(paths: sweep.Table, most: int) -> list[Matrix | None]:
    """Logits where the first run ended, of two critical points passed, and where the lowest ended; classes sorted into blocks."""
    ends = [0 if len(paths) == 1 else int(np.argmax(paths["rank"])), int(np.argmin(paths["rank"]))]
    names = [name for name in paths["names"][most].split("; ") if name]
    K = int(paths["K"][0])
    M = paths["pictures"].reshape(len(paths), -1, K, K)
    shown = [(M[ends[0], 0], f"end: {paths['name'][ends[0]]}")]
    shown += [(M[most, 1 + j], "dip, no critical point" if name == "none" else f"passed: {name}") for j, name in enumerate(names[:2])]
    shown.append((M[ends[1], 0], f"end: {paths['name'][ends[1]]}"))
    shown = [(logits, title) for logits, title in shown if np.isfinite(logits).all()]
    limit = max(float(np.abs(logits).max()) for logits, _ in shown)
    last = len(shown) - 1
    made: list[Matrix | None] = [heat(logits, title, limit, "class logit" if i == last else "") for i, (logits, title) in enumerate(shown)]
    return made + [None] * (4 - len(made))


def heat(logits: Floats, title: str, limit: float, bar: str) -> Matrix:
    """A matrix of class logits, its classes sorted into blocks: classes that repel each other, by negative logits, go together."""
    blocks = components((logits + logits.T) / 2 < -0.02 * np.abs(logits).max())
    order = [c for block in blocks for c in block]
    named = tuple(str(c + 1) for c in order)
    labels = ("class", "logit of class")
    sizes = [len(block) for block in blocks]
    return Matrix(
        values=logits[np.ix_(order, order)],
        title=title,
        labels=labels,
        blocks=sizes if len(sizes) > 1 else (),
        limits=(-limit, limit),
        names=(named, named),
        bar=bar,
    )


def components(linked: NDArray[np.bool_]) -> list[list[int]]:
    """The connected components of a graph, the largest first."""
    found: list[list[int]] = []
    left = set(range(len(linked)))
    while left:
        block, new = set(), {min(left)}
        while new:
            block |= new
            new = {j for i in new for j in np.flatnonzero(linked[i] | linked[:, i]).tolist()} - block
        left -= block
        found.append(sorted(block))
    return sorted(found, key=lambda block: (-len(block), block))


def level(x: Floats, value: float, label: str, colour: str, dash: tuple[float, ...]) -> Curve:
    """A horizontal line."""
    y = np.full(len(x), value)
    return Curve(x, y, y, y, label, colour, "", width=0.7, dash=dash)


def unlabelled(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, each label once."""
    seen: set[str] = set()
    for curve in curves:
        if curve.label in seen:
            object.__setattr__(curve, "label", "")
        seen.add(curve.label)
    return list(curves)


def known(values: Any) -> Floats:
    """The numbers before the padding."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
