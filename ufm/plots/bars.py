"""Stacked shares of outcomes, a bar a point of an axis; runs that did not settle are hatched on top and never coloured as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ufm.plots import maps, style
from ufm.plots.keys import Key
from ufm.plots.share import HATCH
from ufm.sweep.intervals import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer

Floats = NDArray[np.float64]
WIDTH = 0.86  # of a bar, in distances of their middles
LETTERS = 24  # along the axis, beyond which its names are written aslant


@dataclass(frozen=True, eq=False, kw_only=True)
class Bars:
    """How many runs ended in which outcome: counts (M, P) of M outcomes at P points, from the bottom up. Raises ValueError.

    x: the points' names along the axis, text or numbers, in order and equally far apart. names, colours: of the outcomes. unsettled
    (P,): runs that belong to no outcome yet, none by default; `untrusted` says in the legend why. Shares are of all runs of the point.
    shared: whether the legend names outcomes that occur at no point here too, in order, for panels that have it in common.
    """

    x: Sequence[Any]
    counts: Any
    names: Sequence[str]
    colours: Sequence[Any]
    unsettled: Any = None
    untrusted: str = "not settled"
    title: str = ""
    labels: tuple[str, str] = ("", "share of runs")
    shared: bool = False

    def __post_init__(self) -> None:
        counts, many = np.asarray(self.counts), len(self.x)
        unsettled = np.zeros(many, dtype=np.int64) if self.unsettled is None else np.asarray(self.unsettled)
        if counts.shape != (len(self.names), many) or unsettled.shape != (many,) or len(self.colours) != len(self.names):
            raise ValueError(
                f"Bars {self.title!r}: counts have shape {counts.shape} and unsettled {unsettled.shape}, but there are {len(self.names)} "
                f"names, {len(self.colours)} colours and {many} points; give counts (outcomes, points)"
            )
        whole = np.concatenate([counts, unsettled[None]])
        if not (
            np.isfinite(whole).all() and np.array_equal(whole, np.floor(whole)) and (whole >= 0).all() and (whole.sum(axis=0) > 0).all()
        ):
            raise ValueError(f"Bars {self.title!r}: counts must be whole numbers, at least 0, with a run or more at every point")
        object.__setattr__(self, "x", tuple(x if isinstance(x, str) else f"{x:g}" for x in self.x))
        object.__setattr__(self, "counts", counts.astype(np.int64))
        object.__setattr__(self, "unsettled", unsettled.astype(np.int64))

    @property
    def totals(self) -> NDArray[np.int64]:
        """Runs of each point, settled or not, (P,)."""
        return np.asarray(self.counts.sum(axis=0) + self.unsettled)

    @property
    def shares(self) -> Floats:
        """(M + 1, P), the unsettled last: every point's add up to 1."""
        return np.asarray(np.concatenate([self.counts, self.unsettled[None]]) / self.totals)

    @property
    def bottoms(self) -> Floats:
        """Where each part of a bar begins, (M + 1, P)."""
        return np.asarray(np.cumsum(self.shares, axis=0) - self.shares)

    @property
    def hover(self) -> NDArray[np.str_]:
        """What to say of each part, (M + 1, P): counts, the share and its Wilson interval."""
        counts = np.concatenate([self.counts, self.unsettled[None]])
        low, high = wilson(counts, self.totals)
        texts = [
            f"{name}: {counts[i, j]} of {self.totals[j]} runs, share {self.shares[i, j]:.3f} ({low[i, j]:.3f} to {high[i, j]:.3f})"
            for i, name in enumerate((*self.names, self.untrusted))
            for j in range(len(self.x))
        ]
        return np.array(texts, dtype=str).reshape(counts.shape)

    @property
    def log(self) -> tuple[bool, bool]:
        """Neither axis is logarithmic."""
        return False, False

    @property
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both axes from left to right and from below to above."""
        return (-0.5, len(self.x) - 0.5), (0.0, 1.0)

    @property
    def ticks(self) -> tuple[dict[float, str], dict[float, str]]:
        """Position -> name along x; nothing for y, whose numbers fall as they may."""
        return {float(i): name for i, name in enumerate(self.x)}, {}

    @property
    def keys(self) -> list[Key]:
        """The legend: outcomes that occur, or all, and hatching where some run is not settled."""
        occurs = self.counts.any(axis=1) | self.shared
        named = [Key(n, colours=(c,)) for n, c, some in zip(self.names, self.colours, occurs, strict=True) if some]
        return [*named, *([Key(self.untrusted, kind="hatch", hatch=HATCH)] if self.unsettled.any() else [])]


def letters(names: Sequence[str]) -> int:
    """How many letters stand side by side: those of the longest line of each name."""
    return sum(max(map(len, name.split("\n"))) for name in names)


class Drawn(NamedTuple):
    """The artists of a panel of bars: a container an outcome that occurs, and that of the unsettled or None."""

    axes: Axes
    bars: list[BarContainer]
    hatched: BarContainer | None


def draw_bars(data: Bars, axes: Axes | None = None) -> Drawn:
    """Draw the bars into `axes`, or into a new figure of one column's width (`result.axes.figure`)."""
    if axes is None:
        return cast(Drawn, maps.afresh(draw_bars, data))
    at = np.arange(len(data.x))
    bars = [
        axes.bar(at, share, WIDTH, bottom, color=colour, linewidth=0.3, edgecolor="white")
        for share, bottom, colour in zip(data.shares, data.bottoms, data.colours, strict=False)
        if share.any()
    ]
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": style.HATCHED, "hatch": HATCH, "linewidth": 0.3}
    hatched = axes.bar(at, data.shares[-1], WIDTH, data.bottoms[-1], **look) if data.unsettled.any() else None
    (left, right), height = data.ends
    axes.set_xlim(left, right)
    axes.set_ylim(*height)
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if letters(data.x) > LETTERS else {}
    axes.set_xticks(list(data.ticks[0]), list(data.ticks[0].values()), **slanted)
    axes.set_title(data.title, loc="left")
    axes.set_xlabel(data.labels[0])
    axes.set_ylabel(data.labels[1])
    return Drawn(axes, bars, hatched)
