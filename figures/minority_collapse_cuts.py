"""When descent kills classes that the optimum keeps: cuts over the scale of the start, the width and the momentum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import collapse, stored
from ufm import plots, sweep

NAME = "minority_collapse_cuts"
# panel -> title, label of the axis, whether it is logarithmic, ticks
CUTS: dict[str, tuple[str, str, bool, tuple[float, ...]]] = {
    "scale": ("scale of the start", "initial scale", True, ()),
    "width": ("width", "$d/K$", True, (1, 1.5, 2, 3, 4, 6, 8)),
    "momentum": ("momentum, at equal flow time", "momentum", False, (0, 0.2, 0.4, 0.6, 0.8)),
}
LOOKS = [(plots.style.OKABE_ITO[name], marker) for name, marker in zip(("blue", "green", "orange", "vermillion"), "os^D", strict=True)]


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(collapse.read(folder, *collapse.DESCENT))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: a panel a cut, a curve a strength."""
    cuts = {panel: collapse.pick(table, panel=panel) for panel in CUTS}
    panels = [cut(panel, rows) for panel, rows in cuts.items()]
    first = cuts["scale"]
    K, ratio, width = (first[name][0] for name in ("K", "ratio", "width"))
    caption = (
        rf"ReLU features, no bias, $K={K}$, step counts with $R={ratio:g}$, $n_{{\min}}={first['n_min'][0]}$; "
        r"$t=\kappa^2K/((K-1)n_{\min})$: at the optimum the small classes vanish at $t=1$ and live below. "
        f"{collapse.killed(first)}. "
        f"{first['descents'][0]} seeds a point, bands: 95 % Wilson intervals. Where not varied: width $d={width // K}K$, scale "
        f"{cuts['width']['scale'][0]:g}, momentum {first['momentum'][0]:g}; projected gradient descent from balanced random starts, "
        f"at most {cuts['width']['steps'][0]} steps there, as many more as smaller steps need elsewhere."
    )
    return stored.Drawing([panels], "When descent kills classes that the optimum keeps", caption, height=2.75, ncols=5)


def cut(panel: str, rows: sweep.Table) -> plots.Curves:
    """The curves of a cut."""
    title, label, log, ticks = CUTS[panel]
    strengths = np.unique(rows["strength"])
    if len(strengths) > len(LOOKS):
        raise stored.BadRows(f"panel {panel!r} has {len(strengths)} strengths, but there are looks for {len(LOOKS)}; add some to LOOKS")
    curves = []
    for strength, (colour, marker) in zip(strengths, LOOKS, strict=False):
        own = rows.where(strength=strength)
        K = own["K"]
        t = strength * K[0] / (K[0] - 1)
        x = own["width"] / K if panel == "width" else own[panel]
        curves.append(collapse.killed_curve(own, x, rf"$t={t:.2f}$", colour, marker))
    return plots.Curves(
        curves,
        title=title,
        labels=(label, collapse.BAR),
        log=(log, False),
        limits=(-0.03, 1.03),
        ticks=ticks,
        hollow=collapse.UNSETTLED,
    )
