"""Phase diagrams: cells coloured by what was measured and proven there, theory's boundaries drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufm.plots import style
from ufm.records import Regime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection, QuadMesh
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]

REGIME_COLOURS = {
    Regime.DISTINCT: style.OKABE_ITO["sky"],
    Regime.MERGED: style.OKABE_ITO["green"],
    Regime.MINORITY_ZERO: style.OKABE_ITO["orange"],
    Regime.ALL_ZERO: "#D9D9D9",
}


@dataclass(frozen=True, eq=False)
class Boundary:
    """A line of theory: points x, y (P,), a label for the legend or None, and matplotlib's properties of lines."""

    x: ArrayLike
    y: ArrayLike
    label: str | None = None
    look: Any = None


@dataclass(frozen=True, eq=False)
class PhaseMap:
    """The data of a phase diagram, checked: cell centres x (nx,), y (ny,), rising; codes (ny, nx), indices of `colours` and `names`.

    certified (ny, nx) bool, all by default: cells that are not, and negative codes (unknown), are hatched and never coloured as
    data. log: whether each axis is logarithmic. Raises ValueError.
    """

    x: Any
    y: Any
    codes: Any
    names: Sequence[str]
    colours: Sequence[Any]
    certified: Any = None
    boundaries: Sequence[Boundary] = ()
    log: tuple[bool, bool] = (True, True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", np.asarray(self.x, dtype=np.float64))
        object.__setattr__(self, "y", np.asarray(self.y, dtype=np.float64))
        object.__setattr__(self, "codes", np.asarray(self.codes))
        certified = np.ones(self.codes.shape) if self.certified is None else self.certified
        object.__setattr__(self, "certified", np.asarray(certified, dtype=bool))
        self._check()

    def _check(self) -> None:
        for name, centres, log in zip("xy", (self.x, self.y), self.log, strict=True):
            if centres.ndim != 1 or centres.size < 2 or not np.all(np.diff(centres) > 0) or (log and centres[0] <= 0):
                rule = "two or more rising numbers" + (", above 0 on a logarithmic axis" if log else "")
                raise ValueError(f"PhaseMap: {name} has shape {centres.shape} and starts at {centres.flat[:3]}, but must be {rule}")
        shape = (self.y.size, self.x.size)
        for name, array in (("codes", self.codes), ("certified", self.certified)):
            if array.shape != shape:
                raise ValueError(f"PhaseMap: {name} has shape {array.shape}, but y and x ask for {shape}")
        if len(self.names) != len(self.colours) or self.codes.max() >= len(self.names):
            raise ValueError(
                f"PhaseMap: codes go up to {self.codes.max()}, but there are {len(self.names)} names and {len(self.colours)} colours; "
                "give one of each per code"
            )

    @property
    def known(self) -> NDArray[np.bool_]:
        """Cells that may be coloured as data, (ny, nx)."""
        return np.asarray(self.certified & (self.codes >= 0))

    @property
    def edges(self) -> tuple[Floats, Floats]:
        """Cell edges (nx + 1,), (ny + 1,): halfway between the centres on the axis as drawn."""
        x, y = (_edges(centres, log) for centres, log in zip((self.x, self.y), self.log, strict=True))
        return x, y


class Drawn(NamedTuple):
    """The artists of a phase diagram: hatched is None where every cell is known."""

    axes: Axes
    cells: QuadMesh
    hatched: PolyCollection | None
    lines: tuple[Line2D, ...]


def phase_diagram(data: PhaseMap, axes: Axes | None = None) -> Drawn:
    """Draw the map into `axes`, or into a new figure of one column's width (`result.axes.figure`)."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    axes = _new_axes() if axes is None else axes
    x, y = data.edges
    axes.set_xscale("log" if data.log[0] else "linear")
    axes.set_yscale("log" if data.log[1] else "linear")
    colours, levels = ListedColormap(list(data.colours)), np.arange(len(data.colours) + 1) - 0.5
    codes = np.ma.masked_array(data.codes, mask=~data.known)
    norm = BoundaryNorm(levels.tolist(), len(data.colours))
    cells = axes.pcolormesh(x, y, codes, cmap=colours, norm=norm, shading="flat", rasterized=True)
    hatched = _hatch(axes, x, y, ~data.known)
    lines = tuple(axes.plot(b.x, b.y, label=b.label, **LOOK | (b.look or {}))[0] for b in data.boundaries)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    return Drawn(axes, cells, hatched, lines)


LOOK: dict[str, Any] = {"color": "black", "linewidth": 1.2, "solid_capstyle": "butt"}
HATCH: dict[str, Any] = {"facecolor": "white", "edgecolor": "#666666", "hatch": "xxxxxx", "linewidth": 0.0}


def phase_legend(owner: Figure | Axes, *maps: PhaseMap, unproven: str = "not certified", **legend: Any) -> Legend:
    """One legend for maps with the same codes: codes that occur (one entry a name, all its colours), hatching, labelled boundaries."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shades: dict[str, list[Patch]] = {}
    for code in np.unique(np.concatenate([data.codes[data.known] for data in maps])).tolist():
        shades.setdefault(maps[0].names[code], []).append(Patch(facecolor=maps[0].colours[code]))
    entries: dict[str, Any] = {name: tuple(patches) for name, patches in shades.items()}
    if not all(data.known.all() for data in maps):
        entries[unproven] = Patch(**HATCH)
    entries |= {b.label: Line2D([], [], **LOOK | (b.look or {})) for data in maps for b in data.boundaries if b.label}
    side_by_side = {tuple: HandlerTuple(ndivide=None, pad=0.0)}
    return owner.legend(list(entries.values()), list(entries), handler_map=side_by_side, **legend)


def _new_axes() -> Axes:
    from matplotlib.figure import Figure

    with style.context():
        return Figure().add_subplot()


def _edges(centres: Floats, log: bool) -> Floats:
    at = np.log(centres) if log else centres
    halfway = (at[1:] + at[:-1]) / 2
    edges = np.concatenate([[2 * at[0] - halfway[0]], halfway, [2 * at[-1] - halfway[-1]]])
    return np.exp(edges) if log else edges


def _hatch(axes: Axes, x: Floats, y: Floats, where: NDArray[np.bool_]) -> PolyCollection | None:
    from matplotlib.collections import PolyCollection

    corners = [[(x[i], y[j]), (x[i + 1], y[j]), (x[i + 1], y[j + 1]), (x[i], y[j + 1])] for j, i in np.argwhere(where)]
    if not corners:
        return None
    hatched = PolyCollection(corners, **HATCH)
    axes.add_collection(hatched, autolim=False)
    return hatched
