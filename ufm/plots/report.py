"""Interactive pages: the panels of one study as one HTML file, drawn by plotly from the same prepared data as the still figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.plots import maps, phase, share, style
from ufm.plots.bars import WIDTH, Bars
from ufm.plots.curves import BAND, Curves, sizes
from ufm.plots.keys import Key, merged
from ufm.plots.matrix import PALETTES, Matrix
from ufm.plots.phase import PhaseMap
from ufm.plots.share import ShareMap
from ufm.sweep.store import write_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Panel = PhaseMap | ShareMap | Curves | Matrix | Bars
MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
MINOR = {"ticks": "outside", "ticklen": 3}
PX = 1.4  # pixels of the page a point of the still figure

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{font: 15px/1.45 sans-serif; margin: 1.5em auto; max-width: 1500px; padding: 0 1em}}
h1 {{font-size: 1.3em}}
sub, sup {{line-height: 0}}
</style></head>
<body>
<h1>{title}</h1>
{figure}
<p>{caption}</p>
</body>
</html>
"""


def write_page(path: str | Path, rows: Sequence[Sequence[Panel | None]], *, title: str, caption: str = "", height: int = 380) -> Path:
    """Write `page` to `path` and plotly's program beside it (plotly.min.js, one for all pages of a folder), each whole or not at all."""
    path = Path(path)
    document = page(rows, name=path.stem, title=title, caption=caption, height=height)
    put_program(path.parent)
    return write_whole(path, document)


def put_program(folder: Path) -> None:
    """Put plotly.min.js into a folder of pages, unless it is there."""
    from plotly.offline import get_plotlyjs

    program, text = folder / "plotly.min.js", get_plotlyjs().encode()
    if not (program.is_file() and program.stat().st_size == len(text)):
        write_whole(program, text)


def page(rows: Sequence[Sequence[Panel | None]], *, name: str, title: str, caption: str = "", height: int = 380) -> bytes:
    """The page as HTML, equal bytes for equal data; rows of panels (None leaves a place empty), `height` pixels a row.

    Opens without a network beside plotly.min.js. Axes of the same scale and range are zoomed together.
    """
    drawn = figure(rows, height).to_html(
        full_html=False, include_plotlyjs="directory", div_id=name, config={"responsive": True, "displaylogo": False}
    )
    return PAGE.format(title=style.html(title), figure=drawn, caption=style.html(caption)).encode()


def figure(rows: Sequence[Sequence[Panel | None]], height: int = 380) -> Figure:
    """The plotly figure of a page."""
    from plotly.subplots import make_subplots

    columns = max(map(len, rows))
    places = {(r, c): panel for r, row in enumerate(rows, 1) for c, panel in enumerate(row, 1) if panel is not None}
    titles = [style.html(places[r, c].title) if (r, c) in places else "" for r in range(1, len(rows) + 1) for c in range(1, columns + 1)]
    drawn = make_subplots(len(rows), columns, subplot_titles=titles, horizontal_spacing=0.28 / columns, vertical_spacing=0.2 / len(rows))
    axes: dict[Any, str] = {}
    for (r, c), panel in places.items():
        for trace in _traces(panel):
            drawn.add_trace(trace, row=r, col=c)
        for way, settings, again in zip("xy", _axes(panel), repeated(rows, r - 1, c - 1), strict=True):
            settings["title"]["text"] *= not again
            place = next(getattr(drawn, f"select_{way}axes")(row=r, col=c))
            own = place.plotly_name.replace("axis", "")
            first = axes.setdefault((way, settings["type"], tuple(settings["range"])), own)
            place.update(settings, **({} if first == own else {"matches": first}))
    for (r, c), panel in places.items():
        if isinstance(panel, Matrix) and panel.bar:
            bar = _bar(panel, *(axis.domain for axis in drawn.get_subplot(r, c)))
            drawn.update_traces(showscale=True, colorbar=bar, selector={"type": "heatmap"}, row=r, col=c)
    last_bar = any(isinstance(panel, Matrix) and panel.bar for (_, c), panel in places.items() if c == columns)
    for trace in _legend(merged(places.values())):
        drawn.add_trace(trace)
    drawn.update_layout(
        template="none",
        height=height * len(rows) + 90,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        legend={"x": 1.08 if last_bar else 1.01, "y": 1, "yanchor": "top", "font": {"size": 12}},
        barmode="stack",
        bargap=1 - WIDTH,
        hoverlabel={"align": "left"},
        coloraxis=_colours(next((panel.bar for panel in places.values() if isinstance(panel, ShareMap)), "")),
    )
    return drawn


def repeated(rows: Sequence[Sequence[Panel | None]], r: int, c: int) -> tuple[bool, bool]:
    """Whether the panel at (r, c) has its x label in common with the one below, and its y label with the one to the left."""
    panel, below = rows[r][c], rows[r + 1][c] if r + 1 < len(rows) and c < len(rows[r + 1]) else None
    left = rows[r][c - 1] if c else None
    return tuple(bool(panel and other and panel.labels[i] == other.labels[i]) for i, other in enumerate((below, left)))  # type: ignore[return-value]


def _colours(title: str) -> dict[str, Any]:
    bar = {"title": {"text": style.html(title), "side": "right"}, "x": 1.01, "xanchor": "left", "y": 0, "yanchor": "bottom"}
    scale = [[i / (len(style.SHARE) - 1), colour] for i, colour in enumerate(style.SHARE)]
    return {"cmin": 0, "cmax": 1, "colorscale": scale, "colorbar": bar | {"len": 0.45, "thickness": 14}}


def _bar(panel: Matrix, across: tuple[float, float], up: tuple[float, float]) -> dict[str, Any]:
    """The colour bar of a matrix, at the right of its panel."""
    place = {"x": across[1] + 0.004, "xanchor": "left", "xpad": 0, "y": up[0], "yanchor": "bottom", "ypad": 0, "len": up[1] - up[0]}
    decades = {"dtick": 1, "tickprefix": "10<sup>", "ticksuffix": "</sup>"} if panel.colours == "log" else {}
    return {"title": {"text": style.html(panel.bar), "side": "right"}, "thickness": 10, **place, **decades}


def _axes(panel: Panel) -> Iterator[dict[str, Any]]:
    named: tuple[dict[float, str], dict[float, str]] = ({}, {})
    if isinstance(panel, (Matrix, Bars)):
        limits: Any = panel.ends
        named = panel.ticks
    elif isinstance(panel, Curves):
        x = np.concatenate([curve.x for curve in panel.curves])
        limits = (_padded(x.min(), x.max(), panel.log[0]), panel.limits)
        named = ({tick: f"{tick:g}" for tick in panel.ticks}, {})
    else:
        limits = tuple(edges[[0, -1]] for edges in panel.edges)
    for label, log, (low, high), ticks in zip(panel.labels, panel.log, limits, named, strict=True):
        ends = [float(np.log10(end)) if log else float(end) for end in (low, high)]
        look = {"showline": True, "mirror": True, "ticks": "outside", "showgrid": False, "zeroline": False}
        span = abs(ends[1] - ends[0])
        if log and not ticks and span < np.log10(maps.FEW):
            ticks = maps.one_two_five(low, high)
        every = 1 if span <= np.log10(maps.MANY_DECADES) else -(-span // 5)
        decades = {"type": "log", "dtick": every, "minor": MINOR, "exponentformat": "power"}
        powers: dict[str, Any] = decades if log else {"type": "linear"}
        if ticks:
            powers |= {"tickvals": list(ticks), "ticktext": [style.html(text) for text in ticks.values()], "minor": None}
        yield look | powers | {"range": ends, "title": {"text": style.html(label), "standoff": 6}}


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    pad = (high / low) ** 0.04 if log else 0.04 * (high - low)
    return (low / pad, high * pad) if log else (low - pad, high + pad)


def _traces(panel: Panel) -> Iterator[Any]:
    if isinstance(panel, Curves):
        yield from _curves(panel)
        return
    if isinstance(panel, Matrix):
        yield from _matrix(panel)
        return
    if isinstance(panel, Bars):
        yield from _bars(panel)
        return
    yield _cells(panel)
    if isinstance(panel, PhaseMap):
        yield from _filled(panel, ~panel.known, _hatch(phase.HATCH))
    else:
        yield from _filled(panel, panel.idle, {"fillcolor": style.NEUTRAL})
        yield from _filled(panel, panel.hatched, _hatch(share.HATCH))
    for boundary in panel.boundaries:
        yield from _lines(boundary)
    if panel.dots:
        yield _scatter(panel.dots.x, panel.dots.y, mode="markers", marker=DOT)


DOT = {"size": 5, "color": "white", "line": {"color": "black", "width": 0.8}}


def _cells(panel: PhaseMap | ShareMap) -> Any:
    from plotly.graph_objects import Heatmap

    x, y = (edges.astype(np.float32) for edges in panel.edges)
    if isinstance(panel, PhaseMap):
        shown, bounds = panel.codes, np.arange(len(panel.colours) + 1) / len(panel.colours)
        scale = [[float(end), _hex(colour)] for i, colour in enumerate(panel.colours) for end in bounds[[i, i + 1]]]
        colours: dict[str, Any] = {"colorscale": scale, "zmin": -0.5, "zmax": len(panel.colours) - 0.5, "showscale": False}
    else:
        shown, colours = panel.values, {"coloraxis": "coloraxis"}
    values = np.where(panel.known, shown, np.nan).astype(np.float32)
    return Heatmap(x=x, y=y, z=values, **colours, **_hover(panel.hover))


def _filled(panel: PhaseMap | ShareMap, where: NDArray[np.bool_], fill: dict[str, Any]) -> Iterator[Any]:
    if not where.any():
        return
    corners = maps.corners(*panel.edges, where)
    closed = np.concatenate([corners, corners[:, :1], np.full_like(corners[:, :1], np.nan)], axis=1).reshape(-1, 2)
    yield _scatter(closed[:, 0], closed[:, 1], mode="lines", fill="toself", line={"width": 0}, **fill)


def _hatch(hatch: str) -> dict[str, Any]:
    pattern = {"shape": hatch[0], "fgcolor": style.HATCHED, "bgcolor": "white", "fillmode": "replace", "size": 4, "solidity": 0.3}
    return {"fillpattern": pattern, "fillcolor": style.HATCHED}


def _lines(boundary: maps.Boundary) -> Iterator[Any]:
    if boundary.halo:
        yield _scatter(boundary.x, boundary.y, mode="lines", line={"color": "white", "width": PX * (boundary.width + 2 * maps.RIM)})
    yield _scatter(boundary.x, boundary.y, mode="lines", line=_line(boundary.colour, boundary.width, boundary.dash))


def _curves(panel: Curves) -> Iterator[Any]:
    from matplotlib.colors import to_rgb

    for c in panel.curves:
        if np.array_equal(c.low, c.high):
            continue
        red, green, blue = (round(255 * part) for part in to_rgb(c.colour))
        around = (np.concatenate([c.x, c.x[::-1]]), np.concatenate([c.low, c.high[::-1]]))
        yield _scatter(*around, mode="lines", fill="toself", line={"width": 0}, fillcolor=f"rgba({red},{green},{blue},{BAND})")
    for c, size in zip(panel.curves, sizes(panel), strict=True):
        faces = [c.colour if trusted else "white" for trusted in c.trusted]
        marker = {"symbol": MARKERS.get(c.marker), "size": 2.2 * size, "color": faces, "line": {"color": c.colour, "width": 1.2}}
        line = _line(c.colour, c.width, c.dash)
        look = {"mode": "lines+markers", "marker": marker, "cliponaxis": False} if c.marker else {"mode": "lines"}
        yield _scatter(c.x, c.y, line=line, **look | _hover(c.hover))


def _matrix(panel: Matrix) -> Iterator[Any]:
    from plotly.graph_objects import Heatmap

    x, y = (edges.astype(np.float32) for edges in panel.edges)
    shown, ends = (np.log10(values) if panel.colours == "log" else np.asarray(values) for values in (panel.clipped, panel.limits))
    palette = PALETTES[panel.colours]
    colours = {"colorscale": [[i / (len(palette) - 1), colour] for i, colour in enumerate(palette)], "zmin": ends[0], "zmax": ends[1]}
    yield Heatmap(x=x, y=y, z=shown.astype(np.float32), showscale=False, **colours, **_hover(panel.hover))
    (left, right), (below, above) = panel.ends
    for cut in panel.cuts:
        yield _scatter([cut, cut, np.nan, left, right], [below, above, np.nan, cut, cut], mode="lines", line=_line("black", 0.4, ()))


def _bars(panel: Bars) -> Iterator[Any]:
    from plotly.graph_objects import Bar

    at = np.arange(len(panel.x), dtype=np.float32)
    hatch = {"color": "white", "pattern": {"shape": share.HATCH[0], "fgcolor": style.HATCHED, "size": 4, "solidity": 0.3}}
    looks = [*({"color": _hex(colour)} for colour in panel.colours), hatch]
    for height, look, texts in zip(panel.shares.astype(np.float32), looks, panel.hover, strict=True):
        if height.any():
            yield Bar(x=at, y=height, marker=look, showlegend=False, **_hover(texts))


def _scatter(x: ArrayLike, y: ArrayLike, **look: Any) -> Any:
    from plotly.graph_objects import Scatter

    x, y = (np.asarray(values, dtype=np.float32) for values in (x, y))
    return Scatter(x=x, y=y, **{"showlegend": False, "hoverinfo": "skip"} | look)


def _legend(keys: Sequence[Key]) -> Iterator[Any]:
    for key in keys:
        colour = _hex(key.colours[len(key.colours) // 2]) if key.colours else style.HATCHED
        look: dict[str, Any] = {
            "patch": {"mode": "markers", "marker": {"symbol": "square", "size": 14, "color": colour}},
            "hatch": {"mode": "lines", "fill": "toself", "line": {"width": 0}, **_hatch(key.hatch or phase.HATCH)},
            "line": {"mode": "lines", "line": _line(colour, key.width, key.dash)},
            "dot": {"mode": "markers", "marker": DOT},
            "curve": {"mode": "lines", "line": _line(colour, key.width, key.dash)},
        }[key.kind]
        if key.kind == "curve" and key.marker:
            look |= {"mode": "lines+markers", "marker": {"symbol": MARKERS[key.marker], "color": colour}}
        yield _scatter([np.nan], [np.nan], name=style.html(key.label), showlegend=True, **look)


def _line(colour: str, width: float, dash: tuple[float, ...]) -> dict[str, Any]:
    strokes = ",".join(f"{PX * width * part:.3g}px" for part in dash)
    return {"color": colour, "width": PX * width} | ({"dash": strokes} if dash else {})


def _hex(colour: Any) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(colour))


def _hover(texts: NDArray[np.str_] | None) -> dict[str, Any]:
    if texts is None:
        return {"hoverinfo": "skip"}
    lines = [escape(text, quote=False).replace("\n", "<br>") for text in texts.flat]
    written = np.array(lines, dtype=object).reshape(texts.shape)
    return {"hovertext": written, "hovertemplate": "%{hovertext}<extra></extra>", "hoverinfo": "text"}
