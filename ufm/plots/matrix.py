"""Heat maps of one matrix: logits with their classes sorted into blocks, or spectra, layer by index, on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ufm.plots import maps, style
from ufm.plots.keys import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection, QuadMesh

Floats = NDArray[np.float64]
TICKS = 10  # most numbers along an axis


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """A matrix as a heat map, row 1 on top: values (m, n), NaN is left blank. Raises ValueError.

    colours: "diverging" about 0, or "log" for values >= 0. limits: values at the two ends of the colours; by default -+ the largest
    |value|, or the smallest positive value and the largest; values beyond take the colour at the end. blocks: sizes of the blocks
    into which rows and columns are sorted, parted by lines. names: of the columns, of the rows ("1", "2", ... by default). bar: label
    of the colour bar; without one, the bar of a later matrix in the same row of panels is this one's too. hover (m, n) text.
    """

    values: Any
    title: str = ""
    labels: tuple[str, str] = ("", "")
    colours: Literal["diverging", "log"] = "diverging"
    limits: Any = None
    blocks: Sequence[int] = ()
    names: tuple[Sequence[str], Sequence[str]] = ((), ())
    bar: str = ""
    hover: Any = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or not np.isfinite(values).any():
            raise ValueError(f"Matrix {self.title!r}: values have shape {values.shape}; give a matrix with finite numbers")
        if self.colours == "log" and not (values[np.isfinite(values)] >= 0).all():
            raise ValueError(f"Matrix {self.title!r}: values go down to {np.nanmin(values):g}; a logarithmic scale needs values >= 0")
        names = tuple(tuple(given) or _numbers(size) for given, size in zip(self.names, values.shape[::-1], strict=True))
        if (got := tuple(map(len, names))) != values.shape[::-1]:
            raise ValueError(
                f"Matrix {self.title!r}: {got[0]} and {got[1]} names of columns and rows, but values have shape {values.shape}"
            )
        if len(self.blocks) and {sum(self.blocks)} != set(values.shape):
            raise ValueError(f"Matrix {self.title!r}: blocks add up to {sum(self.blocks)}, but values have shape {values.shape}")
        hover = np.asarray(_texts(values, names) if self.hover is None else self.hover, dtype=str)
        if hover.shape != values.shape:
            raise ValueError(f"Matrix {self.title!r}: hover has shape {hover.shape}, but values ask for {values.shape}")
        limits = tuple(map(float, self.limits or _limits(values, self.colours)))
        if not limits[0] < limits[1] or (self.colours == "log" and limits[0] <= 0):
            raise ValueError(f"Matrix {self.title!r}: limits are {limits}, but must rise, and be above 0 on a logarithmic scale")
        for name, value in (("values", values), ("names", names), ("hover", hover), ("limits", limits)):
            object.__setattr__(self, name, value)

    @property
    def log(self) -> tuple[bool, bool]:
        """Neither axis is logarithmic."""
        return False, False

    @property
    def keys(self) -> list[Key]:
        """Nothing for the legend: a matrix has its bar."""
        return []

    @property
    def edges(self) -> tuple[Floats, Floats]:
        """Cell edges (n + 1,), (m + 1,): entry (i, j) is centred at x = j, y = i, counted from 1."""
        m, n = self.values.shape
        return np.arange(n + 1) + 0.5, np.arange(m + 1) + 0.5

    @property
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both axes from left to right and from below to above: rows are counted downwards."""
        x, y = self.edges
        return (x[0], x[-1]), (y[-1], y[0])

    @property
    def ticks(self) -> tuple[dict[float, str], dict[float, str]]:
        """Position -> name along x and along y, every so many where there are too many to write."""
        x, y = ({float(i): name[i - 1] for i in range(1, len(name) + 1, -(-len(name) // TICKS))} for name in self.names)
        return x, y

    @property
    def cuts(self) -> Floats:
        """Where the lines between blocks lie."""
        return np.cumsum(self.blocks)[:-1] + 0.5 if len(self.blocks) else np.zeros(0)

    @property
    def clipped(self) -> Floats:
        """The values as they are coloured, (m, n): within the limits, NaN where blank."""
        return np.asarray(np.clip(self.values, *self.limits))

    @property
    def beyond(self) -> tuple[bool, bool]:
        """Whether some value lies below the limits, and above them."""
        return bool(np.nanmin(self.values) < self.limits[0]), bool(np.nanmax(self.values) > self.limits[1])


class Drawn(NamedTuple):
    """The artists of a matrix; `cells` takes a colour bar, lines is None without blocks."""

    axes: Axes
    cells: QuadMesh
    lines: LineCollection | None


PALETTES = {"diverging": style.DIVERGING, "log": style.MAGNITUDE}


def draw_matrix(data: Matrix, axes: Axes | None = None) -> Drawn:
    """Draw the matrix into `axes`, or into a new figure of one column's width (`result.axes.figure`); a square one stays square."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    if axes is None:
        return cast(Drawn, maps.afresh(draw_matrix, data))
    (x, y), (across, down) = data.edges, data.ends
    norm = (LogNorm if data.colours == "log" else Normalize)(*data.limits)
    cmap = LinearSegmentedColormap.from_list(data.colours, list(PALETTES[data.colours]))
    cells = axes.pcolormesh(x, y, np.ma.masked_invalid(data.clipped), shading="flat", cmap=cmap, norm=norm, rasterized=True)
    segments = [line for cut in data.cuts for line in ([(cut, down[0]), (cut, down[1])], [(across[0], cut), (across[1], cut)])]
    lines = LineCollection(segments, colors="black", linewidths=0.4) if segments else None
    if lines is not None:
        axes.add_collection(lines, autolim=False)
    axes.set_xlim(*across)
    axes.set_ylim(*down)
    for axis, ticks in zip((axes.xaxis, axes.yaxis), data.ticks, strict=True):
        axis.set_ticks(list(ticks), list(ticks.values()))
    if len(x) == len(y):
        axes.set_aspect("equal")
    axes.set_title(data.title, loc="left")
    axes.set_xlabel(data.labels[0])
    axes.set_ylabel(data.labels[1])
    return Drawn(axes, cells, lines)


def _limits(values: Floats, colours: str) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    most = float(np.abs(finite).max()) or 1.0
    low = float(finite[finite > 0].min(initial=most)) if colours == "log" else -most
    return (low if low < most else most / 10), most


def _numbers(size: int) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(size))


def _texts(values: Floats, names: tuple[Sequence[str], ...]) -> list[list[str]]:
    columns, rows = names
    return [
        [f"row {a}, column {b}: {value:.4g}" for b, value in zip(columns, row, strict=True)] for a, row in zip(rows, values, strict=True)
    ]
