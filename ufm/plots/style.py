"""The look of the figures, and files that come out the same, byte for byte, every time."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm.sweep.store import write_whole

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
NEUTRAL, HATCHED = "#D9D9D9", "#666666"
DOT: dict[str, Any] = {"marker": "o", "markersize": 1.8, "markerfacecolor": "white", "markeredgecolor": "black", "markeredgewidth": 0.4}
# ColorBrewer's RdPu without its white: light to dark, told apart from the regimes' colours
SHARE = ("#FDE9E4", "#FCC5C0", "#FA9FB5", "#F768A1", "#DD3497", "#AE017E", "#7A0177", "#49006A")
# ColorBrewer's RdBu, blue below 0, and viridis, dark to light
DIVERGING = ("#053061", "#2166AC", "#4393C3", "#92C5DE", "#D1E5F0", "#F7F7F7", "#FDDBC7", "#F4A582", "#D6604D", "#B2182B", "#67001F")
MAGNITUDE = ("#440154", "#472D7B", "#3B528B", "#2C728E", "#21918C", "#28AE80", "#5EC962", "#ADDC30", "#FDE725")

RC: dict[str, Any] = {
    "figure.figsize": (COLUMN, 2.6),
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.titlepad": 4.0,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "hatch.linewidth": 0.5,
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

# the mathtext that `html` knows
SYMBOLS = {
    "alpha": "α",
    "beta": "β",
    "delta": "δ",
    "kappa": "κ",
    "lambda": "λ",
    "mu": "μ",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "log": "log",
    "leq": "≤",
    "geq": "≥",
    "times": "×",
    "min": "min",
    "max": "max",
    "sqrt": "√",
}
SPACES = {",": " ", ";": " ", " ": " "}


def ordered(many: int) -> list[str]:
    """So many colours of one scale, dark to light: for outcomes that have an order."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("ordered", list(MAGNITUDE))
    return [str(to_hex(scale(i / max(many - 1, 1)))) for i in range(many)]


def context() -> AbstractContextManager[None]:
    """matplotlib's own defaults and `RC`, whatever the user's matplotlibrc says; make and save figures inside."""
    import matplotlib.style
    from cycler import cycler

    cycle = {"axes.prop_cycle": cycler(color=[c for name, c in OKABE_ITO.items() if name not in ("black", "yellow")])}
    return matplotlib.style.context(RC | cycle, after_reset=True)


def render(figure: Figure, suffix: str) -> bytes:
    """The figure as a file (".png", ".pdf" or ".svg"), equal bytes for equal figures; ValueError."""
    if suffix not in METADATA:
        raise ValueError(f"plots.save: the name ends in {suffix!r}, but must end in one of {', '.join(METADATA)}")
    file = io.BytesIO()
    with context():
        figure.savefig(file, format=suffix[1:], metadata=METADATA[suffix])
    return file.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure (png, pdf or svg by its suffix), whole or not at all, equal bytes for equal figures; OSError, ValueError."""
    path = Path(path)
    return write_whole(path, render(figure, path.suffix))


def html(text: str) -> str:
    r"""Text with simple mathtext between dollars as HTML: `$\kappa^2/n_{\min}$` is κ<sup>2</sup>/n<sub>min</sub>; ValueError."""
    parts = escape(text, quote=False).split("$")
    if not len(parts) % 2:
        raise ValueError(f"plots.html: {text!r} has an odd number of dollars; give each formula two")
    return "".join(_formula(part) if i % 2 else part for i, part in enumerate(parts)).replace("\n", "<br>")


def _formula(text: str) -> str:
    text = re.sub(r"\\mathrm\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\([A-Za-z]+|.)", _symbol, text).replace("-", "−")
    for mark, tag in (("_", "sub"), ("^", "sup")):
        text = re.sub(rf"\{mark}(?:\{{([^{{}}]*)\}}|(.))", lambda m, tag=tag: f"<{tag}>{m[1] or m[2]}</{tag}>", text)  # type: ignore[misc]
    return text.replace("{", "").replace("}", "")


def _symbol(match: re.Match[str]) -> str:
    known = SYMBOLS | SPACES
    if match[1] not in known:
        raise ValueError(f"plots.html: {match[0]} is not one of the known symbols ({', '.join(known)}); add it to SYMBOLS")
    return known[match[1]]
