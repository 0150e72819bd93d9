"""The look of the figures, and files that come out the same, byte for byte, every time."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 3.4  # width of a journal column, inches
PAGE = 7.0  # width of two columns

# Okabe & Ito's palette, told apart under every common colour blindness
OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}

RC: dict[str, Any] = {
    "figure.figsize": (COLUMN, 2.6),
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "ufm",
}

# dates and program versions left out, so that equal figures are equal files
METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
}


def context() -> AbstractContextManager[None]:
    """matplotlib's own defaults and `RC`, whatever the user's matplotlibrc says; make and save figures inside."""
    import matplotlib.style
    from cycler import cycler

    cycle = {"axes.prop_cycle": cycler(color=[c for name, c in OKABE_ITO.items() if name not in ("black", "yellow")])}
    return matplotlib.style.context(RC | cycle, after_reset=True)


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure (png, pdf or svg by its suffix), whole or not at all, equal bytes for equal figures; OSError, ValueError."""
    path = Path(path)
    if path.suffix not in METADATA:
        raise ValueError(f"plots.save: {path.name} ends in {path.suffix!r}, but must end in one of {', '.join(METADATA)}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with context():
            figure.savefig(part, format=path.suffix[1:], metadata=METADATA[path.suffix])
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
