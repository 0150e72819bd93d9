"""Legends as data: one entry a meaning, however many panels it occurs in; drawn by matplotlib here and by plotly in `report`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ufm.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend


@dataclass(frozen=True)
class Key:
    """An entry of a legend: patches of its colours side by side, a hatched patch, a line, a dot, or a curve with its marker."""

    label: str
    colours: tuple[Any, ...] = ()
    kind: Literal["patch", "hatch", "line", "dot", "curve"] = "patch"
    hatch: str = ""
    width: float = 1.2
    dash: tuple[float, ...] = ()
    marker: str = ""


class Keyed(Protocol):
    """A panel that says what its legend needs."""

    @property
    def keys(self) -> list[Key]:
        """The entries, in order."""
        ...


RANKED = ("patch", "curve")


def merged(panels: Iterable[Keyed]) -> list[Key]:
    """The entries of all panels: one a label and kind, with all its colours from light to dark; patches first, lines and points last.

    A patch or curve that only a later panel has comes before what follows it there; other entries in the order of the panels.
    """
    found: dict[tuple[str, str], Key] = {}
    names: list[tuple[str, str]] = []
    for panel in panels:
        keys = panel.keys
        place = len(names)
        for name in [(key.label, key.kind) for key in reversed(keys) if key.kind in RANKED]:
            if name in names:
                place = names.index(name)
            else:
                names.insert(place, name)
        names += dict.fromkeys((key.label, key.kind) for key in keys if (key.label, key.kind) not in names)
        for key in keys:
            name = key.label, key.kind
            known = found.get(name, replace(key, colours=()))
            colours = sorted(dict.fromkeys(known.colours + key.colours), key=_lightness, reverse=True)
            found[name] = replace(known, colours=tuple(colours))
    order = ["patch", "hatch", "curve", "line", "dot"]
    return sorted((found[name] for name in names), key=lambda key: order.index(key.kind))


def legend(owner: Figure | Axes, *panels: Keyed, **options: Any) -> Legend:
    """One matplotlib legend for the panels; options are matplotlib's."""
    from matplotlib.legend_handler import HandlerTuple

    keys = merged(panels)
    side_by_side = {tuple: HandlerTuple(ndivide=None, pad=0.0)}
    return owner.legend([_handle(key) for key in keys], [key.label for key in keys], handler_map=side_by_side, **options)


def _lightness(colour: Any) -> float:
    from matplotlib.colors import to_rgb

    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))


def _handle(key: Key) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.kind == "patch":
        return tuple(Patch(facecolor=colour, linewidth=0) for colour in key.colours)
    if key.kind == "hatch":
        return Patch(facecolor="white", edgecolor=style.HATCHED, hatch=key.hatch, linewidth=0.0)
    if key.kind == "dot":
        return Line2D([], [], linestyle="none", **style.DOT)
    marker: dict[str, Any] = {"marker": key.marker, "markersize": 3.0} if key.marker else {}
    return Line2D([], [], color=key.colours[0], linewidth=key.width, linestyle=(0, key.dash) if key.dash else "-", **marker)
