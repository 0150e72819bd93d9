"""Curves with interval bands, over a logarithmic or linear axis; points that are not to be trusted have hollow markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ufm.plots import maps
from ufm.plots.keys import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import FillBetweenPolyCollection, PathCollection
    from matplotlib.lines import Line2D


@dataclass(frozen=True, eq=False)
class Curve:
    """Points x, y (P,), x rising, with the interval [low, high] of each; trusted (P,) bool, all by default; hover (P,) text or None.

    marker "" draws the line alone, as for a level or a path of many points; dash: lengths of strokes and gaps in widths of the line.
    """

    x: Any
    y: Any
    low: Any
    high: Any
    label: str
    colour: str
    marker: str = "o"
    trusted: Any = None
    hover: Any = None
    width: float = 1.0
    dash: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("x", "y", "low", "high"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        object.__setattr__(self, "trusted", np.asarray(np.ones(self.x.shape) if self.trusted is None else self.trusted, dtype=bool))
        object.__setattr__(self, "hover", None if self.hover is None else np.asarray(self.hover, dtype=str))
        for name in ("y", "low", "high", "trusted", *(() if self.hover is None else ("hover",))):
            if (got := getattr(self, name).shape) != self.x.shape:
                raise ValueError(f"Curve {self.label!r}: {name} has shape {got}, but x asks for {self.x.shape}")
        if self.x.ndim != 1 or not np.all(np.diff(self.x) > 0):
            raise ValueError(f"Curve {self.label!r}: x is {self.x}, but must be rising numbers")
        if ((self.low > self.y) | (self.y > self.high)).any():
            raise ValueError(f"Curve {self.label!r}: a value lies outside its interval; give low <= y <= high")


@dataclass(frozen=True, eq=False)
class Curves:
    """A panel of curves: limits of the y axis, ticks of the x axis (by default as they fall), hollow: what hollow markers mean.

    Later curves have smaller markers, so that curves which coincide show all the same.
    """

    curves: Sequence[Curve]
    title: str = ""
    labels: tuple[str, str] = ("", "")
    log: tuple[bool, bool] = (True, False)
    limits: tuple[float, float] = (0.0, 1.0)
    ticks: Sequence[float] = ()
    hollow: str = "not settled"

    def __post_init__(self) -> None:
        if not all(curve.x.size for curve in self.curves):
            raise ValueError("Curves: a curve has no point; leave it out")
        if self.log[0] and any(curve.x[0] <= 0 for curve in self.curves):
            raise ValueError("Curves: x must be above 0 on a logarithmic axis; give log=(False, ...)")

    @property
    def keys(self) -> list[Key]:
        """The legend: a curve each where there are several, hollow markers where there are any."""
        names = [
            Key(c.label, colours=(c.colour,), kind="curve", marker=c.marker, width=1.2 * c.width, dash=c.dash)
            for c in self.curves
            if c.label
        ]
        hollow = [] if all(c.trusted.all() for c in self.curves if c.marker) else [Key(self.hollow, colours=("#FFFFFF",), kind="dot")]
        return [*names, *hollow]


class Drawn(NamedTuple):
    """The artists of a panel of curves, one of each a curve; markers of those that have some."""

    axes: Axes
    bands: list[FillBetweenPolyCollection]
    lines: list[Line2D]
    markers: list[PathCollection]


BAND = 0.18  # opacity of the intervals


def draw_curves(data: Curves, axes: Axes | None = None) -> Drawn:
    """Draw the curves into `axes`, or into a new figure of one column's width (`result.axes.figure`)."""
    if axes is None:
        return cast(Drawn, maps.afresh(draw_curves, data))
    maps.scale(axes, data.log)
    bands, lines, markers = [], [], []
    for c, size in zip(data.curves, sizes(data), strict=True):
        bands.append(axes.fill_between(c.x, c.low, c.high, color=c.colour, alpha=BAND, linewidth=0))
        if not np.array_equal(c.low, c.high):
            axes.plot(c.x, c.low, c.x, c.high, color=c.colour, linewidth=0.4, alpha=0.5)
        lines += axes.plot(c.x, c.y, color=c.colour, linewidth=c.width, linestyle=(0, c.dash) if c.dash else "-")
        if not c.marker:
            continue
        faces = [c.colour if trusted else "white" for trusted in c.trusted]
        look: dict[str, Any] = {"s": size**2, "marker": c.marker, "edgecolors": c.colour, "linewidths": 0.7}
        markers.append(axes.scatter(c.x, c.y, facecolors=faces, zorder=3, clip_on=False, **look))
    axes.set_ylim(*data.limits)
    maps.thin(axes, data.log)
    if data.ticks:
        axes.set_xticks(data.ticks, [f"{tick:g}" for tick in data.ticks])
        axes.set_xticks([], minor=True)
    axes.set_title(data.title, loc="left")
    axes.set_xlabel(data.labels[0])
    axes.set_ylabel(data.labels[1])
    return Drawn(axes, bands, lines, markers)


def sizes(data: Curves) -> list[float]:
    """The widths of the curves' markers in points, falling."""
    return [3.0 + 0.5 * left for left in reversed(range(len(data.curves)))]
