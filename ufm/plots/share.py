"""Maps of a share, from light (0) to dark (1): cells whose runs did not settle are hatched, cells without a question are plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ufm.plots import maps, style
from ufm.plots.keys import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HATCH = 10 * "/"


@dataclass(frozen=True, eq=False, kw_only=True)
class ShareMap(maps.CellMap):
    """The data of a map of shares: values (ny, nx) in [0, 1], NaN (no data) is left blank.

    trusted (ny, nx) bool, all by default: cells that are not are hatched and never coloured as data; `untrusted` says why in the
    legend. idle (ny, nx) bool, none by default: cells where the question does not arise, in plain grey; `idle_name` says why.
    """

    values: Any
    trusted: Any = None
    idle: Any = None
    untrusted: str = "not settled"
    idle_name: str = "no question"
    bar: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.put("values", np.asarray(self.values, dtype=np.float64))
        self.put("trusted", np.asarray(np.ones(self.values.shape) if self.trusted is None else self.trusted, dtype=bool))
        self.put("idle", np.asarray(np.zeros(self.values.shape) if self.idle is None else self.idle, dtype=bool))
        self.check_shape("values", "trusted", "idle")
        if ((self.values < 0) | (self.values > 1)).any():
            raise ValueError(f"ShareMap: values run from {np.nanmin(self.values)} to {np.nanmax(self.values)}, but a share is in [0, 1]")

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Cells with data to which the question applies, (ny, nx)."""
        return np.asarray(np.isfinite(self.values) & ~self.idle)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Cells that may be coloured as data, (ny, nx)."""
        return np.asarray(self.asked & self.trusted)

    @property
    def hatched(self) -> NDArray[np.bool_]:
        """Cells with data that is not to be trusted, (ny, nx)."""
        return np.asarray(self.asked & ~self.trusted)

    @property
    def keys(self) -> list[Key]:
        """The legend: plain and hatched cells where there are any, labelled boundaries and dots; the shares have a bar of their own."""
        plain = [Key(self.idle_name, colours=(style.NEUTRAL,))] if self.idle.any() else []
        hatch = [Key(self.untrusted, kind="hatch", hatch=HATCH)] if self.hatched.any() else []
        return [*plain, *hatch, *self.over]


def share_map(data: ShareMap, axes: Axes | None = None) -> maps.Drawn:
    """Draw the map into `axes`, or into a new figure of one column's width (`result.axes.figure`); `result.cells` takes a colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if axes is None:
        return cast(maps.Drawn, maps.afresh(share_map, data))
    colours = {"cmap": LinearSegmentedColormap.from_list("share", list(style.SHARE)), "norm": Normalize(0, 1)}
    values = np.ma.masked_array(data.values, mask=~data.known)
    return maps.draw(data, axes, values, colours, data.hatched, HATCH, data.idle, style.NEUTRAL)
