"""From a study's folder to the files of a figure: what every figure does the same way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ufm import plots, sweep
from ufm.plots import report, style
from ufm.sweep.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAW: dict[type, Any] = {
    plots.PhaseMap: plots.phase_diagram,
    plots.ShareMap: plots.share_map,
    plots.Curves: plots.draw_curves,
    plots.Matrix: plots.draw_matrix,
    plots.Bars: plots.draw_bars,
}
EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}


class BadRows(sweep.SweepError):
    """The rows are not those of this figure's study, or not all of them; the message says which and what to do."""


class Drawing(NamedTuple):
    """A figure before it is drawn: panels in rows of one length, None for an empty place; in words what they are; height and columns of
    legend of the still one.
    """

    panels: Sequence[Sequence[report.Panel | None]]
    title: str
    caption: str
    height: float
    ncols: int


def read(stored: Path, study: str, columns: Sequence[str]) -> sweep.Table:
    """The rows in the folder of `study`; BadRows if they lack a column, SweepError if there are none to read."""
    table = sweep.load(stored)
    missing = [name for name in columns if name not in table.names]
    if missing:
        remedy = f"give the folder of `python -m studies {study}` with --rows"
        raise BadRows(f"{stored} holds no column {missing[0]!r}, so its rows are not of this study; {remedy}")
    return table


def pick(table: sweep.Table, study: str, **equal: Any) -> sweep.Table:
    """The rows with these values; BadRows if there are none."""
    rows = table.where(**equal)
    if not len(rows):
        wanted = ", ".join(f"{name} {value!r}" for name, value in equal.items())
        raise BadRows(f"the folder holds no rows with {wanted}; run `python -m studies {study}` to its end")
    return rows


def still(drawing: Drawing) -> Figure:
    """The matplotlib figure: lettered panels, outer labels only, one legend above, one bar of shares, those of matrices, the caption."""
    from matplotlib.figure import Figure

    rows = drawing.panels
    places = [(r, c, panel) for r, row in enumerate(rows) for c, panel in enumerate(row) if panel is not None]
    with style.context():
        figure = Figure(figsize=(style.PAGE, drawing.height))
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)  # type: ignore[call-arg]
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        bar: Any = None
        beside = 0  # the bar stands beside the last map of shares
        without: list[Any] = []  # matrices that wait for the bar of a later one
        for axes in grid.flat:
            axes.set_visible(False)
        for letter, (r, c, panel) in enumerate(places, ord("a")):
            grid[r, c].set_visible(True)
            drawn = DRAW[type(panel)](panel, grid[r, c])
            drawn.axes.set_title(f"({chr(letter)}) {panel.title}", loc="left")
            if isinstance(panel, plots.ShareMap):
                bar, beside = (drawn.cells, panel.bar), max(beside, c)
            if isinstance(panel, plots.Matrix):
                without.append(drawn.axes)
                if panel.bar:
                    figure.colorbar(drawn.cells, ax=without, pad=0.015, label=panel.bar, extend=EXTEND[panel.beyond])
                    without = []
        for r, c, _ in places:
            _outer_labels(rows, grid, r, c)
        if bar:
            figure.colorbar(bar[0], ax=grid[:, : beside + 1], pad=0.015, aspect=20 * len(rows), label=bar[1])
        plots.legend(
            figure,
            *(panel for _, _, panel in places),
            loc="outside upper center",
            ncols=drawing.ncols,
            handlelength=2.6,
            columnspacing=1.5,
        )
        figure.supxlabel(wrapped(drawing.caption), fontsize=7, x=0.01, ha="left", linespacing=1.35)
    return figure


def lettered(rows: Sequence[Sequence[report.Panel | None]]) -> list[list[report.Panel | None]]:
    """The panels with (a), (b), ... before their titles, as the caption calls them."""
    letters = map(chr, range(ord("a"), ord("z") + 1))
    return [[panel and replace(panel, title=f"({next(letters)}) {panel.title}") for panel in row] for row in rows]


def wrapped(text: str, width: int = 132) -> str:
    """The text in lines of about that many letters, formulas counted as they look and never broken."""
    lines = [""]
    for word in re.findall(r"(?:\$[^$]*\$|\S)+", text):
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if len(re.sub("<[^>]*>", "", style.html(longer))) <= width else [lines[-1], word]
    return "\n".join(lines)


def _outer_labels(rows: Sequence[Sequence[report.Panel | None]], grid: Any, r: int, c: int) -> None:
    """Leave out labels that the panel below, or the one to the left, has too, and numbers where the axes agree."""
    panel, (below, left) = grid[r, c], report.repeated(rows, r, c)
    if below and type(rows[r][c]) is type(rows[r + 1][c]) and _x_axis(panel) == _x_axis(grid[r + 1, c]):
        panel.set_xlabel("")
        panel.tick_params(labelbottom=False)
    if left:
        panel.set_ylabel("")
        panel.tick_params(labelleft=panel.get_ylim() != grid[r, c - 1].get_ylim())


def _x_axis(axes: Any) -> tuple[Any, ...]:
    """The ends of the x axis, and the names given to points of it, if any."""
    from matplotlib.ticker import FixedFormatter

    formatter = axes.xaxis.get_major_formatter()
    return axes.get_xlim(), tuple(formatter.seq) if isinstance(formatter, FixedFormatter) else ()


def write(drawings: Mapping[str, Drawing], out: Path) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.html of each drawing into `out`; all are made before the first is written."""
    made: dict[Path, bytes] = {}
    for name, drawing in drawings.items():
        figure = still(drawing)
        # the layout settles at the second drawing, where ticks depend on the panels' sizes: the picture that is looked at comes last
        drawn = {kind: style.render(figure, kind) for kind in (".pdf", ".png")}
        made |= {out / f"{name}{kind}": drawn[kind] for kind in (".png", ".pdf")}
        page = plots.page(lettered(drawing.panels), name=name, title=drawing.title, caption=drawing.caption)
        made[out / f"{name}.html"] = page
    out.mkdir(parents=True, exist_ok=True)
    report.put_program(out)
    return [write_whole(path, data) for path, data in made.items()]
