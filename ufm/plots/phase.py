"""Phase diagrams: cells coloured by what was measured and proven there, theory's boundaries drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ufm.plots import maps, style
from ufm.plots.keys import Key
from ufm.records import Regime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REGIME_COLOURS = {
    Regime.DISTINCT: style.OKABE_ITO["sky"],
    Regime.MERGED: style.OKABE_ITO["green"],
    Regime.MINORITY_ZERO: style.OKABE_ITO["orange"],
    Regime.ALL_ZERO: style.NEUTRAL,
}
HATCH = 10 * "x"  # dense enough to show in a single cell of a 40 by 40 map


@dataclass(frozen=True, eq=False, kw_only=True)
class PhaseMap(maps.CellMap):
    """The data of a phase diagram: codes (ny, nx), indices of `colours` and `names`.

    certified (ny, nx) bool, all by default: cells that are not, and negative codes (unknown), are hatched and never coloured as
    data; `unproven` says so in the legend.
    """

    codes: Any
    names: Sequence[str]
    colours: Sequence[Any]
    certified: Any = None
    unproven: str = "not certified"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.put("codes", np.asarray(self.codes))
        self.put("certified", np.asarray(np.ones(self.codes.shape) if self.certified is None else self.certified, dtype=bool))
        self.check_shape("codes", "certified")
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
    def keys(self) -> list[Key]:
        """The legend: names that occur, hatching where it does, labelled boundaries and dots."""
        cells = [Key(self.names[code], colours=(self.colours[code],)) for code in np.unique(self.codes[self.known]).tolist()]
        hatch = [] if self.known.all() else [Key(self.unproven, kind="hatch", hatch=HATCH)]
        return [*cells, *hatch, *self.over]


def phase_diagram(data: PhaseMap, axes: Axes | None = None) -> maps.Drawn:
    """Draw the map into `axes`, or into a new figure of one column's width (`result.axes.figure`)."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if axes is None:
        return cast(maps.Drawn, maps.afresh(phase_diagram, data))
    levels = (np.arange(len(data.colours) + 1) - 0.5).tolist()
    colours = {"cmap": ListedColormap(list(data.colours)), "norm": BoundaryNorm(levels, len(data.colours))}
    codes, none = np.ma.masked_array(data.codes, mask=~data.known), np.zeros(data.codes.shape, dtype=bool)
    return maps.draw(data, axes, codes, colours, ~data.known, HATCH, none, "none")
