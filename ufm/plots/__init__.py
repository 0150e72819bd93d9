"""Figures from prepared data; matplotlib is loaded when something is drawn, never through its global state."""

from ufm.plots.phase import REGIME_COLOURS, Boundary, PhaseMap, phase_diagram, phase_legend

__all__ = ["REGIME_COLOURS", "Boundary", "PhaseMap", "phase_diagram", "phase_legend"]
