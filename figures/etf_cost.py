"""Time and peak memory of the nearest simplex ETF and of its gradient over the classes, by three routes and by width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures import stored
from ufm import sweep
from ufm.plots import Curve, Curves, style

NAME = STUDY = "etf_cost"
COLUMNS = ("K", "d", "dtype", "input", "method", "ratio", "forward_peak", "layer_flops", "converged", "gradient_difference", "turns")
INPUTS = ("random", "near collapse", "ill-conditioned")
WIDTH = 512  # of the panels of routes
TICKS = (10, 20, 50, 100, 200, 500, 1000)
HOLLOW, OFF = "not trusted", 0.01  # hollow: not converged, or the gradient off by more than this

CLOSED, TRUST, NODE = "closed form", "trust regions", "declarative node"
# method in the rows -> name in the legend, colour, marker, width of the line
LOOKS = {
    "svd": ("by SVD", style.OKABE_ITO["sky"], "v", 0.7),
    "gram": ("by Gram matrix", style.OKABE_ITO["green"], "D", 0.7),
    "newton-schulz": ("by Newton\N{EN DASH}Schulz", style.OKABE_ITO["purple"], "s", 0.7),
    TRUST: ("trust regions (pymanopt)", style.OKABE_ITO["vermillion"], "^", 1.2),
    NODE: ("declarative node", style.OKABE_ITO["black"], "s", 1.2),
    CLOSED: ("closed form, chosen", style.OKABE_ITO["blue"], "o", 1.6),
}
DASHES = {"float64": (), "float32": (4.0, 2.0)}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the rows in the study's folder as png, pdf and html into `out`; the files written."""
    return stored.write({NAME: make(stored.read(folder, STUDY, COLUMNS))}, out)


def make(table: sweep.Table) -> stored.Drawing:
    """The figure: time by route and by width, a panel an input; memory by route, a panel a width."""
    widths = np.unique(table["d"]).tolist()
    stored.pick(table, STUDY, method=CLOSED, d=WIDTH, dtype="float64")
    time = "forward + backward, in SVDs"
    routes = [_routes(table.where(d=WIDTH, input=name, dtype="float64")) for name in INPUTS]
    by_width = [_by_width(table.where(input=name, method=CLOSED), widths) for name in INPUTS]
    memory = [_memory(table.where(d=d, input="random", dtype="float64")) for d in widths[-3:]]
    panels = [
        _row(routes, [f"{name}, $d={WIDTH}$, float64" for name in INPUTS], time),
        _row(by_width, [f"closed form, {name}" for name in INPUTS], time),
        _row(memory, [f"memory, random, $d={d}$, float64" for d in widths[-3:]], "peak in bytes"),
    ]
    plain, near, ill = (table.where(input=name) for name in INPUTS)
    caption = (
        "Above: seconds of CPU of forward and backward over those of a bare thin SVD of the same $d \\times K$ matrix, in turns in "
        f"one process with one BLAS thread ({table['turns'].min()} to {table['turns'].max()} turns); least against least, bands to median "
        "against median. Reduced form without proximal term, one draw a point. Trust regions from a random start, in float64, with the "
        "closed pullback; the node is a dense system for the backward pass, its forward the closed form, and the dotted line goes on "
        "from its last point as $1.5 d K^5$ flops. "
        f"Hollow: not converged, or the gradient off by more than {OFF:.0%} from that in double. Means, with their conditions: standard "
        f"normal ({_conditions(plain)}), an ETF with noise $10^{{-3}}$ ({_conditions(near)}), ill-conditioned ({_conditions(ill)}). "
        "Below: the larger of both peaks of one call, numpy's arrays without LAPACK's workspace; dotted, what the released layer holds in "
        "float64, $8(K^3(K+1)/2 + d K^3 + d K^2(K+1))$."
    )
    return stored.Drawing(panels, "What the nearest simplex ETF and its gradient cost", caption, height=7.6, ncols=4)


def _row(curves: Sequence[list[Curve]], titles: Sequence[str], label: str) -> list[Curves | None]:
    """Panels with one logarithmic y axis, and empty places up to three."""
    ends = np.concatenate([np.concatenate([c.low, c.high]) for panel in curves for c in panel])
    limits = (float(ends.min()) / 1.5, 1.5 * float(ends.max()))
    ticks = [[K for K in TICKS if any(c.x[0] <= K <= c.x[-1] for c in panel)] for panel in curves]
    row: list[Curves | None] = [
        Curves(panel, title, ("$K$", label), (True, True), limits, at, HOLLOW)
        for panel, title, at in zip(curves, titles, ticks, strict=True)
    ]
    return [*row, *[None] * (3 - len(row))]


def _routes(rows: sweep.Table) -> list[Curve]:
    """A curve a method, the SVD at 1, and where the dense system would go on."""
    curves = [_cost(own, *LOOKS[method]) for method in LOOKS if len(own := _sorted(rows.where(method=method)))]
    return [_unit(rows), *_onwards(rows), *curves]


def _by_width(rows: sweep.Table, widths: Sequence[int]) -> list[Curve]:
    """A curve a width and dtype."""
    curves = [
        _cost(own, f"$d={d}$, {dtype}", colour, "o" if dtype == "float64" else "D", 1.0, dash)
        for d, colour in zip(widths, style.ordered(len(widths) + 1), strict=False)
        for dtype, dash in DASHES.items()
        if len(own := _sorted(rows.where(d=d, dtype=dtype)))
    ]
    return [_unit(rows), *curves]


def _memory(rows: sweep.Table) -> list[Curve]:
    """The larger peak of each route, the matrix itself, and the released layer by its formula."""
    ours = _sorted(rows.where(method=CLOSED))
    curves = [
        _line(ours, ours["matrix_bytes"], "the matrix of means itself", style.OKABE_ITO["orange"], ()),
        _line(ours, ours["layer_bytes"], "declarative node, by formula", style.OKABE_ITO["black"], (1.0, 1.5)),
    ]
    for method in (TRUST, NODE, CLOSED):
        if len(own := _sorted(rows.where(method=method))):
            top = np.maximum(own["forward_peak"], own["backward_peak"])
            label, colour, marker, width = LOOKS[method]
            curves.append(Curve(own["K"], top, top, top, label, colour, marker, _trusted(own), _told(own), width))
    return curves


def _cost(own: sweep.Table, label: str, colour: str, marker: str, width: float, dash: tuple[float, ...] = ()) -> Curve:
    y, median = own["ratio"], own["ratio_median"]
    band = np.minimum(y, median), np.maximum(y, median)
    return Curve(own["K"], y, *band, label, colour, marker, _trusted(own), _told(own), width, dash)


def _onwards(rows: sweep.Table) -> list[Curve]:
    """The dense system beyond its last point: its flops there per second, the closed form for its forward pass."""
    node, ours = (_sorted(rows.where(method=method)) for method in (NODE, CLOSED))
    if not len(node):
        return []
    later = ours.pick(ours["K"] >= node["K"][-1])
    backward = node["backward"][-1] / node["layer_flops"][-1] * later["layer_flops"]
    return [
        _line(
            later,
            (later["forward"] + backward) / later["svd_seconds"],
            "declarative node, by formula",
            style.OKABE_ITO["black"],
            (1.0, 1.5),
        )
    ]


def _trusted(rows: sweep.Table) -> Any:
    return (rows["converged"] == 1) & (rows["gradient_difference"] <= OFF)


def _unit(rows: sweep.Table) -> Curve:
    ends = np.unique(rows["K"])
    one = np.ones(ends.shape)
    return Curve(ends, one, one, one, "one SVD", style.HATCHED, "", width=0.8)


def _line(rows: sweep.Table, y: Any, label: str, colour: str, dash: tuple[float, ...]) -> Curve:
    return Curve(rows["K"], y, y, y, label, colour, "", width=0.9, dash=dash)


def _sorted(rows: sweep.Table) -> sweep.Table:
    return rows.pick(np.argsort(rows["K"])) if len(rows) else rows


def _conditions(rows: sweep.Table) -> str:
    """The conditions of the inputs, from least to largest."""
    ends = [f"{at:.3g}" if at < 1e4 else f"$10^{{{np.log10(at):.3g}}}$" for at in (rows["condition"].min(), rows["condition"].max())]
    return " to ".join(dict.fromkeys(ends))


def _told(rows: sweep.Table) -> list[str]:
    """Each row in words."""
    return [_tell({name: rows[name][i] for name in rows.names}) for i in range(len(rows))]


def _tell(row: dict[str, Any]) -> str:
    solver = f", {row['iterations']:.0f} steps, {row['products']:.0f} products" if row["method"] == TRUST else ""
    return "\n".join(
        [
            f"{row['method']}, {row['input']}, {row['dtype']}, d = {row['d']}, K = {row['K']}",
            f"{row['ratio']:.3g} SVDs ({row['ratio_median']:.3g} by medians), {row['turns']} turns",
            f"forward {1e3 * row['forward']:.3g} ms, backward {1e3 * row['backward']:.3g} ms, SVD {1e3 * row['svd_seconds']:.3g} ms",
            f"peaks {row['forward_peak']:.3g} and {row['backward_peak']:.3g} bytes, matrix {row['matrix_bytes']:.3g}",
            f"back end {row['backend']}, condition {row['condition']:.2g}{solver}",
            f"gradient norm {row['gradient_norm']:.1e}, orthogonality {row['orthogonality']:.1e}",
            f"off the SVD in double: W {row['W_difference']:.1e}, gradient {row['gradient_difference']:.1e}",
            "converged" if row["converged"] else "not converged",
        ]
    )
