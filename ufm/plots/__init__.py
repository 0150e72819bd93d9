"""Figures from prepared data, by matplotlib (still) and plotly (interactive); either is loaded when something is drawn.

A panel is a record that checks its data once: `PhaseMap`, `ShareMap`, `Curves`, `Matrix`, `Bars`. `phase_diagram`, `share_map`,
`draw_curves`, `draw_matrix` and `draw_bars` draw it into matplotlib's axes, `legend` names what occurs in several, and `page` and
`write_page` put the same records into one HTML file.
"""

from ufm.plots.bars import Bars, draw_bars
from ufm.plots.curves import Curve, Curves, draw_curves
from ufm.plots.keys import Key, legend
from ufm.plots.maps import Boundary, Dots
from ufm.plots.matrix import Matrix, draw_matrix
from ufm.plots.phase import REGIME_COLOURS, PhaseMap, phase_diagram
from ufm.plots.report import page, write_page
from ufm.plots.share import ShareMap, share_map

__all__ = [
    "REGIME_COLOURS",
    "Bars",
    "Boundary",
    "Curve",
    "Curves",
    "Dots",
    "Key",
    "Matrix",
    "PhaseMap",
    "ShareMap",
    "draw_bars",
    "draw_curves",
    "draw_matrix",
    "legend",
    "page",
    "phase_diagram",
    "share_map",
    "write_page",
]
