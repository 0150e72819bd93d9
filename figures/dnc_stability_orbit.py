"""Dimension of the solution sets of DNC and of pairs over the width: measured zero eigenvalues against two counts, and their ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

NAME, STUDY = "dnc_stability_orbit", "dnc_stability"
COLUMNS = ("panel", "K", "depth", "width", "code", "nullity", "tangents", "orbit", "published", "gradient_norm", "index")
LOOKS = {"DNC": (style.OKABE_ITO["blue"], "o"), "pairs": (style.OKABE_ITO["vermillion"], "s")}
DASH, DOTS = (4.0, 1.5), (1.0, 1.0)


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, STUDY, COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: nullity over width for each number of classes and depth, and the ratio of DNC's to that of pairs."""
    rows = stored.pick(table, STUDY, panel="orbit")
    sizes = sorted(set(zip(rows["K"].tolist(), rows["depth"].tolist(), strict=True)))
    panels = [counts(rows.where(K=K, depth=L)) for K, L in sizes]
    K, L = sizes[-1]
    panels.append(ratio(rows.where(K=K, depth=L)))
    gradient = float(rows["gradient_norm"].max())
    size = f"scale-free gradient at most {gradient:.0e}" if gradient else "gradients zero to the rounding of float64"
    caption = (
        r"Zero eigenvalues of the dense Hessian at balanced factors with random frames, $n=1$, one penalty, $\lambda$ where DNC has "
        rf"$\alpha=1.5\,a_c$; {size}. "
        f"The measured nullity equals the count $L(rd-r(r+1)/2)$ of the orbit in {np.sum(rows['nullity'] == rows['orbit'])} of {len(rows)} "
        f"points, and the rank of the orbit's tangents in {np.sum(rows['nullity'] == rows['tangents'])}; the published count $Lr(d-r)$ for "
        f"equal singular values (Garrod & Keating 2025, Theorem 5, as we read it) in {np.sum(rows['nullity'] == rows['published'])}. "
        r"Last panel: DNC has the larger set at $d=K$ already, and the ratio rises towards $(K-1)/r$ of pairs."
    )
    return stored.Drawing([panels], "Dimension of the solution sets of deep neural collapse", caption, height=3.0, ncols=4)


def counts(rows: sweep.Table) -> Curves:
    """Measured nullity and both counts at one number of classes and depth."""
    curves = []
    for code, (colour, marker) in LOOKS.items():
        own = rows.where(code=code)
        own = own.pick(np.argsort(own["width"]))
        d, nullity = own["width"], own["nullity"]
        for name, dash, label in (("orbit", (), "orbit of frames"), ("published", DOTS, "published count")):
            curves.append(Curve(d, own[name], own[name], own[name], f"{code}: {label}", colour, "", width=0.9, dash=dash))
        known = np.isfinite(nullity)
        hover = [f"d = {w}: {m:g} zero eigenvalues, tangents' rank {t:g}" for w, m, t in zip(d, nullity, own["tangents"], strict=True)]
        if known.any():
            y = nullity[known]
            curves.append(Curve(d[known], y, y, y, f"{code}: measured", colour, marker, None, np.array(hover)[known], width=0.0))
    K, L = rows["K"][0], rows["depth"][0]
    limits = (0.0, 1.06 * float(max(np.nanmax(curve.y) for curve in curves)))
    return Curves(
        curves, title=f"$K={K}$, $L={L}$", labels=("width $d$", "zero eigenvalues"), log=(False, False), limits=limits, ticks=ticks(K)
    )


def ratio(rows: sweep.Table) -> Curves:
    """DNC's dimension over that of pairs: measured, by both counts, and the limit."""
    dnc, pairs = (rows.where(code=code) for code in LOOKS)
    dnc, pairs = (own.pick(np.argsort(own["width"])) for own in (dnc, pairs))
    d, K = dnc["width"], int(rows["K"][0])
    dashes = {"nullity": (), "published": DOTS}
    curves = []
    for name, dash in dashes.items():
        y = dnc[name] / pairs[name]
        marker, colour = ("D", style.OKABE_ITO["green"]) if name == "nullity" else ("", "#000000")
        label = "ratio: measured" if name == "nullity" else "ratio: published count"
        curves.append(Curve(d, y, y, y, label, colour, marker, dash=dash))
    limit = np.full(len(d), (K - 1) / (K / 2))
    curves.append(Curve(d, limit, limit, limit, "ratio: limit $(K-1)/r$", style.OKABE_ITO["purple"], "", dash=DASH))
    labels = ("width $d$", "ratio of dimensions")
    return Curves(curves, title=f"DNC over pairs, $K={K}$", labels=labels, log=(False, False), limits=(0, 1.8), ticks=ticks(K))


def ticks(K: int) -> tuple[int, ...]:
    """Widths named on the axis."""
    return (K, 3 * K // 2, 2 * K, 3 * K)
