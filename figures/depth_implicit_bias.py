"""Rank of the logits without regularisation: over depth, width and scale of the start, margins, and singular values along the flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

NAME = STUDY = "depth_implicit_bias"
COLUMNS = (
    *("panel", "start", "K", "depth", "width", "scale", "seeds", "floor", "loss", "separated", "turned", "converged", "rank_change"),
    *("rank", "rank_low", "rank_high", "stable", "margin", "margin_low", "margin_high", "time", "dnc_margin", "best_margin", "best_code"),
    *("spread", "repelled", "repelled_low", "repelled_high", "path_time", "path_value", "path_spectrum"),
)
COLOURS = [style.OKABE_ITO[name] for name in ("blue", "green", "orange", "vermillion", "purple", "sky")]
MARKERS = "os^Dvo"
WIDTHS = style.ordered(9)[::2]  # one of another family than the depths'
SHARE = 0.9  # of runs whose direction must have converged
HOLLOW = f"< {100 * SHARE:.0f} % of directions converged"
RANK = "effective rank of $Z$"
STAGES = (("at the start", style.NEUTRAL, "v"), ("at half the loss", COLOURS[0], "o"), ("at the end", COLOURS[3], "D"))
STAGE = (0, 1, 3)  # of the losses at which the spread is stored


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, STUDY, COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: effective rank over depth, width and scale, margins over depth; three runs, and the spread of spectral starts."""
    wide, scaled, spectral, paths = (stored.pick(table, STUDY, panel=panel) for panel in ("width", "scale", "spectral", "path"))
    K = int(table["K"][0])
    widths = thinned(np.unique(wide["width"]).tolist(), 4)
    depths = thinned(np.unique(wide["depth"]).tolist(), 4)
    top = (0.8, K - 0.7)
    ranks = [
        family(wide, "depth", "width", widths, "$d={}$", title="depth", labels=("depth $L$", RANK), limits=top),
        family(wide, "width", "depth", depths, "$L={}$", title="width", labels=("width $d$", RANK), limits=top, log=True),
        family(scaled, "scale", "depth", depths, "$L={}$", labels=("initial scale", RANK), limits=top, log=True, title="scale"),
        margins(wide),
    ]
    runs = [path(paths, i) for i in np.lexsort((paths["depth"], paths["start"] == "spectral"))]
    settled = int(np.sum(table["converged"] >= SHARE))
    d = int(scaled["width"][0])
    caption = (
        rf"Linear chain, cross-entropy, $K={K}$, no penalty: gradient flow in loss-normalised time until "
        rf"$F\leq10^{{{np.log10(table['floor'][0]):.0f}}}$ (largest {table['loss'].max():.0e}); {wide['seeds'][0]} seeds a point; 95 % "
        r"intervals of means. A direction counts as converged if the logits at the square root of that loss and at it have cosine "
        rf"at least $1-10^{{-3}}$: so in nine runs of ten at {settled} of {len(table)} points; mean effective ranks change by at most "
        rf"{np.abs(table['rank_change']).max():.2f} there. (a), (b): normal starts of scale 1; (c): $d={d}$. (d): smallest margin over the "
        r"Schatten quasi-norm of $p=2/(L+1)$, as a share of the best catalogued code's. (e)-(g): one run each. "
        r"(h): $d=10$, median and quartiles of the spread of the $K-1$ singular values."
    )
    title = "Rank of the logits without regularisation, over depth, width and scale of the start"
    return stored.Drawing([ranks, [*runs, spread(spectral)]], title, caption, height=5.4, ncols=5)


def thinned(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, both ends included."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def family(rows: sweep.Table, x: str, by: str, values: Sequence[int], label: str, *, log: bool = False, **look: Any) -> Curves:
    """Effective rank over one column, a curve each value of another."""
    curves = []
    for i, value in enumerate(values):
        own = rows.where(**{by: value})
        own = own.pick(np.argsort(own[x]))
        curves.append(
            Curve(
                own[x],
                own["rank"],
                own["rank_low"],
                own["rank_high"],
                label.format(value),
                WIDTHS[i] if by == "width" else COLOURS[i],
                MARKERS[i],
                own["converged"] >= SHARE,
                told(own),
            )
        )
    ticks = tuple(np.unique(rows[x]).tolist()) if len(np.unique(rows[x])) <= 6 else ()
    return Curves(curves, log=(log, False), hollow=HOLLOW, ticks=ticks, **look)


def margins(rows: sweep.Table) -> Curves:
    """Normalised margin over depth, as a share of the best catalogued one, with DNC's."""
    curves = []
    for i, d in enumerate(thinned(np.unique(rows["width"]).tolist(), 4)):
        own = rows.where(width=d)
        own = own.pick(np.argsort(own["depth"]))
        y, low, high = (own[name] / own["best_margin"] for name in ("margin", "margin_low", "margin_high"))
        curves.append(Curve(own["depth"], y, low, high, f"$d={d}$", WIDTHS[i], MARKERS[i], own["converged"] >= SHARE, told(own)))
    own = rows.where(width=int(rows["width"].min()))
    own = own.pick(np.argsort(own["depth"]))
    y = own["dnc_margin"] / own["best_margin"]
    curves.append(Curve(own["depth"], y, y, y, "neural collapse", "#000000", "", dash=(4.0, 1.5)))
    labels = ("depth $L$", "margin / best catalogued")
    ticks = tuple(np.unique(rows["depth"]).tolist())
    return Curves(curves, title="normalised margin", labels=labels, log=(False, False), limits=(0, 1.15), ticks=ticks, hollow=HOLLOW)


def path(paths: sweep.Table, i: int) -> Curves:
    """Singular values along one run: over the largest for a normal start, as they are for a spectral one."""
    known = np.isfinite(paths["path_time"][i])
    time, value, S = paths["path_time"][i][known], paths["path_value"][i][known], paths["path_spectrum"][i][known]
    spectral = paths["start"][i] == "spectral"
    shown = S if spectral else S / S[:, :1]
    if spectral:
        shown = shown[:, : int(paths["K"][0]) - 1]
    hover = np.array([f"time {t:.4g}, loss {F:.2e}" for t, F in zip(time, value, strict=True)])
    colours = style.ordered(10)
    curves = [Curve(time, s, s, s, "", colours[j], "", None, hover, width=0.8) for j, s in enumerate(shown.T)]
    labels = ("loss-normalised time", "singular value $s_i$" if spectral else "$s_i/s_1$")
    limits = (0.5 * float(shown.min()), 2 * float(shown.max())) if spectral else (-0.03, 1.03)
    return Curves(curves, title=f"{paths['start'][i]} start, $L={paths['depth'][i]}$", labels=labels, log=(False, spectral), limits=limits)


def spread(rows: sweep.Table) -> Curves:
    """Decades between the largest and the smallest of the K - 1 singular values, over depth, at three stages."""
    own = rows.pick(np.argsort(rows["depth"]))
    curves = []
    for (name, colour, marker), stage in zip(STAGES, STAGE, strict=True):
        low, y, high = own["spread"][:, stage].T
        share = [f"spread early in {r:.0%} of seeds ({a:.2f} to {b:.2f})" for r, a, b in shares(own)]
        colour = "#000000" if colour == style.NEUTRAL else colour
        curves.append(Curve(own["depth"], y, low, high, name, colour, marker, None, np.array(share)))
    labels = ("depth $L$", r"$\log_{10}(s_1/s_{K-1})$")
    limits = (0.0, 1.05 * float(max(curve.high.max() for curve in curves)))
    ticks = tuple(own["depth"].tolist())
    return Curves(curves, title="spectral starts", labels=labels, log=(False, False), limits=limits, ticks=ticks)


def shares(own: sweep.Table) -> list[tuple[float, float, float]]:
    """Share of seeds whose singular values spread until half the loss, with its interval."""
    return list(zip(own["repelled"], own["repelled_low"], own["repelled_high"], strict=True))


def told(own: sweep.Table) -> Any:
    """A text for each point: what it is worth."""
    return np.array(
        [
            f"L = {row['depth']}, d = {row['width']}, scale {row['scale']:g}: effective rank {row['rank']:.2f} "
            f"({row['rank_low']:.2f} to {row['rank_high']:.2f}), stable rank {row['stable']:.2f}\n"
            f"normalised margin {row['margin']:.3g}, neural collapse {row['dnc_margin']:.3g}, "
            f"best catalogued {row['best_margin']:.3g} ({row['best_code']})\n"
            f"{row['seeds']} seeds to a loss of {row['loss']:.0e} or less, mean time {row['time']:.3g}; separated {row['separated']:.0%}, "
            f"direction converged {row['converged']:.0%} (median 1 - cos {row['turned']:.0e})"
            for row in ({name: own[name][i] for name in COLUMNS} for i in range(len(own)))
        ]
    )
