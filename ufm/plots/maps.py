"""What all maps share: the grid of cells, theory's lines and measured points over it, cells that are not coloured as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.plots import style
from ufm.plots.keys import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection, QuadMesh
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Boundary:
    """A line of theory: points x, y (P,), NaN where it is not drawn; a label for the legend or None; width in points.

    dash: lengths of strokes and gaps in widths. halo: whether a white rim sets it off from dark cells.
    """

    x: ArrayLike
    y: ArrayLike
    label: str | None = None
    colour: str = "#000000"
    width: float = 1.2
    dash: tuple[float, ...] = ()
    halo: bool = True

    @property
    def key(self) -> Key | None:
        """Its entry of the legend; None without a label or without a point to draw."""
        drawn = self.label and np.isfinite(np.asarray(self.y, dtype=float)).any()
        return Key(self.label or "", colours=(self.colour,), kind="line", width=self.width, dash=self.dash) if drawn else None


@dataclass(frozen=True, eq=False)
class Dots:
    """Measured points x, y (P,) over a map, with their entry of the legend."""

    x: ArrayLike
    y: ArrayLike
    label: str

    @property
    def key(self) -> Key:
        """Their entry of the legend."""
        return Key(self.label, colours=("#FFFFFF",), kind="dot")


@dataclass(frozen=True, eq=False, kw_only=True)
class CellMap:
    """Cells over two axes, checked: centres x (nx,), y (ny,), rising; log: whether each axis is; hover (ny, nx) text or None.

    The kinds of map say which cells are coloured as data, and which are hatched. Titles and labels may hold mathtext. Raises ValueError.
    """

    x: Any
    y: Any
    title: str = ""
    labels: tuple[str, str] = ("", "")
    log: tuple[bool, bool] = (True, True)
    boundaries: Sequence[Boundary] = ()
    dots: Dots | None = None
    hover: Any = None

    def __post_init__(self) -> None:
        self.put("x", np.asarray(self.x, dtype=np.float64))
        self.put("y", np.asarray(self.y, dtype=np.float64))
        self.put("hover", None if self.hover is None else np.asarray(self.hover, dtype=str))
        for name, centres, log in zip("xy", (self.x, self.y), self.log, strict=True):
            if centres.ndim != 1 or centres.size < 2 or not np.all(np.diff(centres) > 0) or (log and centres[0] <= 0):
                rule = "two or more rising numbers" + (", above 0 on a logarithmic axis" if log else "")
                raise ValueError(f"{self.name}: {name} has shape {centres.shape} and starts at {centres.flat[:3]}, but must be {rule}")
        if self.hover is not None:
            self.check_shape("hover")

    def put(self, name: str, value: Any) -> None:
        """Set a field while the record is made."""
        object.__setattr__(self, name, value)

    def check_shape(self, *names: str) -> None:
        """ValueError unless these fields have one entry a cell."""
        shape = (self.y.size, self.x.size)
        for name in names:
            if (got := getattr(self, name).shape) != shape:
                raise ValueError(f"{self.name}: {name} has shape {got}, but y and x ask for {shape}")

    @property
    def name(self) -> str:
        """How messages call it."""
        return type(self).__name__

    @property
    def edges(self) -> tuple[Floats, Floats]:
        """Cell edges (nx + 1,), (ny + 1,): halfway between the centres on the axis as drawn."""
        x, y = (_edges(centres, log) for centres, log in zip((self.x, self.y), self.log, strict=True))
        return x, y

    @property
    def over(self) -> list[Key]:
        """The legend's entries of what lies over the cells."""
        keys = [boundary.key for boundary in self.boundaries]
        return [key for key in (*keys, self.dots.key if self.dots else None) if key]


class Drawn(NamedTuple):
    """The artists of a map: hatched and plain are None where no cell is."""

    axes: Axes
    cells: QuadMesh
    hatched: PolyCollection | None
    plain: PolyCollection | None
    lines: tuple[Line2D, ...]
    dots: Line2D | None


MANY_DECADES = 1e9  # ends of a logarithmic axis from which on not every decade has a tick
FEW = 100.0  # ends of one below which 2 and 5 times the decades have numbers too, written plainly
RIM = 0.6  # points of white on both sides of a line with a halo


def draw(data: CellMap, axes: Axes, values: Any, colours: dict[str, Any], hatched: Mask, hatch: str, plain: Mask, paint: str) -> Drawn:
    """Draw a map: masked values (ny, nx) in `colours` (cmap and norm), hatched cells, cells of one plain colour, lines and points."""
    x, y = data.edges
    scale(axes, data.log)
    cells = axes.pcolormesh(x, y, values, shading="flat", rasterized=True, **colours)
    crossed = _polygons(axes, x, y, hatched, {"facecolor": "white", "edgecolor": style.HATCHED, "hatch": hatch, "linewidth": 0.0})
    grey = _polygons(axes, x, y, plain, {"facecolor": paint, "linewidth": 0.0})
    lines = []
    for b in data.boundaries:
        if b.halo:
            axes.plot(b.x, b.y, color="white", linewidth=b.width + 2 * RIM, solid_capstyle="butt")
        look: dict[str, Any] = {"color": b.colour, "linewidth": b.width, "linestyle": (0, b.dash) if b.dash else "-"}
        lines += axes.plot(b.x, b.y, solid_capstyle="butt", **look)
    dots = axes.plot(data.dots.x, data.dots.y, linestyle="none", zorder=3, **style.DOT)[0] if data.dots else None
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    thin(axes, data.log)
    axes.set_title(data.title, loc="left")
    axes.set_xlabel(data.labels[0])
    axes.set_ylabel(data.labels[1])
    return Drawn(axes, cells, crossed, grey, tuple(lines), dots)


def scale(axes: Axes, log: tuple[bool, bool]) -> None:
    """Make axes logarithmic or linear; a logarithmic one has a tick every decade, however small the panel."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log" if log[0] else "linear")
    axes.set_yscale("log" if log[1] else "linear")
    for axis, is_log in zip((axes.xaxis, axes.yaxis), log, strict=True):
        if is_log:
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=12))


def thin(axes: Axes, log: tuple[bool, bool]) -> None:
    """Fewer ticks on a logarithmic axis of very many decades, whose numbers would run into each other; 1, 2, 5 on a very short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for axis, is_log in zip((axes.xaxis, axes.yaxis), log, strict=True):
        low, high = axis.get_view_interval()
        if is_log and high > MANY_DECADES * low:
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_minor_locator(NullLocator())
        elif is_log and high < FEW * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
            axis.set_minor_formatter(NullFormatter())


def one_two_five(low: float, high: float) -> dict[float, str]:
    """1, 2 and 5 times the powers of ten between two ends, and how each is written."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.floor(np.log10(high)) + 1)
    return {float(at): f"{at:g}" for at in np.outer(decades, (1.0, 2.0, 5.0)).ravel() if low <= at <= high}


def corners(x: Floats, y: Floats, where: Mask) -> Floats:
    """The corners (cells, 4, 2) of the cells chosen, between edges x and y."""
    j, i = np.nonzero(where)
    return np.stack([np.stack([x[i], x[i + 1], x[i + 1], x[i]], axis=1), np.stack([y[j], y[j], y[j + 1], y[j + 1]], axis=1)], axis=2)


def _edges(centres: Floats, log: bool) -> Floats:
    at = np.log(centres) if log else centres
    halfway = (at[1:] + at[:-1]) / 2
    edges = np.concatenate([[2 * at[0] - halfway[0]], halfway, [2 * at[-1] - halfway[-1]]])
    return np.exp(edges) if log else edges


def _polygons(axes: Axes, x: Floats, y: Floats, where: Mask, look: dict[str, Any]) -> PolyCollection | None:
    from matplotlib.collections import PolyCollection

    if not where.any():
        return None
    polygons = PolyCollection(list(corners(x, y, where)), **look)
    axes.add_collection(polygons, autolim=False)
    return polygons


def afresh(drawing: Callable[[Any, Axes], Any], data: Any) -> Any:
    """What `drawing` draws of the data into a new figure of one column's width, in the house's style whatever the user's is."""
    from matplotlib.figure import Figure

    with style.context():
        return drawing(data, Figure().add_subplot())
