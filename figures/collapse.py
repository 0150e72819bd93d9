"""The rows of the study of minority collapse as panels: regimes at the optimum, killed classes after descent, theory's lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import counts, sweep
from ufm.plots import REGIME_COLOURS, Boundary, Curve, Dots, PhaseMap, ShareMap, style
from ufm.records import Regime

Grid = dict[str, NDArray[Any]]

STUDY = "minority_collapse"
COLUMNS = (
    *("panel", "K", "width", "features", "pattern", "bias", "ratio", "strength", "scale", "momentum", "descents", "steps", "tol"),
    *("settled_below", "dead_below", "lam_b"),
    *("margins", "n_min", "N", "lam", "gap", "regime", "predicted_regime", "dead", "strength_merged", "strength_zero", "strength_all"),
)
DESCENT = ("killed", "killed_low", "killed_high", "killed_classes", "settled", "reached", "excess")
N_MAX = 5000  # samples of the largest class of an exponential pattern
SETTLED = 0.9  # share of a cell's descents that must have settled

LABELS = (r"imbalance ratio $R$", r"$\kappa^2/n_{\min}$,  $\kappa=N\lambda$")
FEW, MANY = "#FFDE9E", "#A85500"  # hardly any class at zero, almost all
BAR = "share killing a class"
UNSETTLED = f"< {100 * SETTLED:.0f} % of descents settled"

MERGED = {"label": "theory: equal classes merge", "dash": (1.0, 1.0)}
ZERO = {"label": "theory: first classes at zero"}
ALL = {"label": "theory: every class at zero", "dash": (4.0, 1.5)}
EACH = {"label": "theory: each class between", "width": 0.5, "halo": False}


def read(folder: Path, *more: str) -> sweep.Table:
    """The rows of the study, with the columns `more` beside the usual ones; BadRows, SweepError."""
    table = stored.read(folder, STUDY, (*COLUMNS, *more))
    strange = set(table["regime"].tolist()) - {regime.name for regime in Regime} - {""}
    if strange:
        raise stored.BadRows(f"{folder} holds {strange.pop()!r} in column 'regime', not one of {', '.join(r.name for r in Regime)}")
    return table


def pick(table: sweep.Table, **equal: Any) -> sweep.Table:
    """The rows with these values; BadRows if there are none."""
    rows = table.where(**equal)
    if not len(rows):
        wanted = ", ".join(f"{name} {value!r}" for name, value in equal.items())
        raise stored.BadRows(f"the folder holds no rows with {wanted}; run `python -m studies {STUDY}` to its end")
    return rows


def cells(table: sweep.Table, **equal: Any) -> Grid:
    """The rows with these values over imbalance ratio and strength; BadRows, SweepError unless they fill a grid."""
    grid = pick(table, **equal).on_grid("ratio", "strength")
    if min(grid["lam"].shape) < 2:
        raise stored.BadRows(
            f"the rows with {equal} are {grid['lam'].shape[1]} by {grid['lam'].shape[0]} cells, but a map needs two by two"
        )
    return grid


def certified(rows: Any) -> NDArray[np.bool_]:
    """Where the relative gap is proven to be within the tolerance."""
    return np.asarray(rows["gap"] <= rows["tol"])


def regime_map(grid: Grid, title: str, bisected: Dots | None = None, labels: tuple[str, str] = LABELS) -> PhaseMap:
    """The certified regimes, classes at zero shaded by their share; theory's lines; the boundary found by bisection."""
    K = int(grid["K"].flat[0])
    codes = np.select([np.isin(grid["regime"], ("", Regime.UNKNOWN.name)), grid["regime"] == Regime.MERGED.name], [-1, K + 1], grid["dead"])
    regimes = [Regime.DISTINCT, *[Regime.MINORITY_ZERO] * (K - 1), Regime.ALL_ZERO, Regime.MERGED]
    return PhaseMap(
        x=grid["ratio"],
        y=grid["strength"],
        title=title,
        labels=labels,
        codes=codes.astype(int),
        names=[regime.value for regime in regimes],
        colours=[REGIME_COLOURS[regimes[0]], *_shades(K), *(REGIME_COLOURS[regime] for regime in regimes[K:])],
        certified=certified(grid),
        boundaries=lines(grid),
        dots=bisected,
        hover=_told(grid, _optimum),
    )


def killed_map(grid: Grid, title: str, labels: tuple[str, str] = LABELS) -> ShareMap:
    """The share of seeds in which descent killed a class that the optimum keeps; theory's lines of the optimum."""
    return ShareMap(
        x=grid["ratio"],
        y=grid["strength"],
        title=title,
        labels=labels,
        values=grid["killed"],
        trusted=certified(grid) & (grid["settled"] >= SETTLED),
        idle=certified(grid) & (grid["regime"] == Regime.ALL_ZERO.name),
        untrusted=UNSETTLED,
        idle_name=Regime.ALL_ZERO.value,
        bar=BAR,
        boundaries=lines(grid),
        hover=_told(grid, _optimum, _descent),
    )


def killed_curve(rows: sweep.Table, x: NDArray[Any], label: str, colour: str, marker: str = "o") -> Curve:
    """The share killed of these rows over x (P,), with its interval."""
    order = np.argsort(x)
    if len(np.unique(x)) < len(x):
        raise stored.BadRows(f"two rows of the panel '{rows['panel'][0]}' have the same place; the folder mixes runs, draw another one")
    picked = rows.pick(order)
    column = {name: picked[name] for name in (*COLUMNS, *DESCENT)}
    return Curve(
        x=x[order],
        y=column["killed"],
        low=column["killed_low"],
        high=column["killed_high"],
        label=label,
        colour=colour,
        marker=marker,
        trusted=certified(column) & (column["settled"] >= SETTLED),
        hover=_told(column, _optimum, _descent),
    )


def lines(grid: Grid) -> list[Boundary]:
    """Theory's lines over the ratios of the grid. Where two coincide, the one of the later regime is drawn."""
    merged, zero, last = (grid[f"strength_{name}"][0] for name in ("merged", "zero", "all"))
    after_merging = np.where(np.isfinite(zero), zero, last)
    levels = [(_apart(merged, after_merging), MERGED), (_apart(zero, last), ZERO), (last, ALL)]
    between = [(level, EACH if k == 0 else EACH | {"label": None}) for k, level in enumerate(_class_levels(grid))]
    return [Boundary(grid["ratio"], level, **look) for level, look in (*between, *levels) if np.isfinite(level).any()]


def bisected(table: sweep.Table, **equal: Any) -> Dots | None:
    """Where classes cease to be distinct, found by bisection: the geometric middle of each ratio's last bracket; None without such rows."""
    rows = table.where(panel="boundary", **equal)
    rows = rows.pick(certified(rows)) if len(rows) else rows
    found = []
    for ratio in np.unique(rows["ratio"]) if len(rows) else ():
        here = rows["ratio"] == ratio
        below, above = (rows["strength"][here & (rows["distinct"] == side)] for side in (1, 0))
        if below.size and above.size:
            found.append((ratio, np.sqrt(below.max() * above.min())))
    return Dots(*np.transpose(found), "measured end of distinct classes") if found else None


CELLS = (
    f"; grey: the optimum keeps none; hatched: fewer than {100 * SETTLED:.0f} % of the descents settled, or the optimum is not certified."
)
RATIO = r"$R=n_{\max}/n_{\min}$ before rounding"


def killed(table: sweep.Table) -> str:
    """What counts as killed and as settled, for the caption."""
    share, tol = (np.unique(table[name])[0] for name in ("dead_below", "settled_below"))
    return (
        f"A seed kills a class if descent ends with it at zero (below {100 * share:g} % of its norm at the optimum) "
        "and the optimum keeps it; "
        rf"settled: scale-free gradient $\leq 10^{{{np.log10(tol):.3g}}}$"
    )


def proof(table: sweep.Table) -> str:
    """How many cells are proven, for the caption."""
    exponent = np.log10(np.nanmax(table["tol"]))
    return rf"relative gap proven $\leq 10^{{{exponent:.3g}}}$ in {np.count_nonzero(certified(table))} of {len(table)} cells"


def rule(table: sweep.Table, what: Sequence[str] = ("momentum", "scale", "width", "steps", "descents")) -> str:
    """How descent was done, for the caption; what varies is left out."""
    rows = table.pick(table["descents"] > 0)
    one = {name: np.unique(rows[name])[0] for name in what if len(np.unique(rows[name])) == 1}
    momentum = f" with momentum {one['momentum']:g}" if "momentum" in one else " with momentum"
    scale = f", balanced random starts of scale {one['scale']:g}" if "scale" in one else ", balanced random starts"
    steps = f", at most {one['steps']:g} steps" if "steps" in one else ""
    return f"projected gradient descent{momentum}{scale}{steps}"


def _apart(level: NDArray[np.float64], following: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isclose(level, following, rtol=1e-9, atol=0), np.nan, level)


def _class_levels(grid: Grid) -> list[NDArray[np.float64]]:
    """kappa^2/n_min at which class k = 2 ... K-1 of an exponential pattern reaches zero, ReLU without bias: (K-1)/K n_k/n_min."""
    if (grid["features"][0, 0], grid["bias"][0, 0], grid["pattern"][0, 0]) != ("relu", "none", "exponential"):
        return []
    K = int(grid["K"].flat[0])
    n = np.array([counts.exponential(K, N_MAX, ratio) for ratio in grid["ratio"]])
    if not np.array_equal(n.sum(axis=1), grid["N"][0]):
        raise stored.BadRows(f"the rows have {grid['N'][0]} samples, not those of an exponential pattern with {N_MAX} in the largest class")
    return list(((K - 1) / K * n / n[:, -1:])[:, 1:-1].T)


def _shades(K: int) -> list[tuple[float, ...]]:
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("zero", [FEW, style.OKABE_ITO["orange"], MANY])
    return [tuple(colour) for colour in scale(np.arange(1, K) / K)]


def _told(rows: Any, *parts: Any) -> NDArray[np.str_]:
    """A text for each cell, made of the parts' lines."""
    shape = np.shape(rows["lam"])
    wide = {name: rows[name] for name in (*COLUMNS, *(DESCENT if _descent in parts else ()))}
    if len(shape) == 2:
        x, y = np.meshgrid(rows["ratio"], rows["strength"])
        wide |= {"ratio": x, "strength": y}
    texts = ["\n".join(part({name: values[at] for name, values in wide.items()}) for part in parts) for at in np.ndindex(shape)]
    return np.array(texts).reshape(shape)


def _optimum(row: dict[str, Any]) -> str:
    regime, predicted = (Regime[row[name] or "UNKNOWN"].value for name in ("regime", "predicted_regime"))
    return (
        f"R = {row['ratio']:.4g}, κ²/n_min = {row['strength']:.4g}, λ = {row['lam']:.3g}, n_min = {row['n_min']:g}, N = {row['N']:g}\n"
        f"optimum: {regime} ({row['dead']:g} of {row['K']:g} at zero); theory: {predicted}; proven relative gap {row['gap']:.1e}\n"
        f"margins of the classes, largest first: {_grouped(row['margins'])}"
    )


def _grouped(margins: NDArray[np.float64]) -> str:
    """Equal margins together: 6.85 (5 classes), 3.04 (5 classes)."""
    values, many = np.unique(np.round(margins, 3) + 0.0, return_counts=True)
    return ", ".join(
        f"{value:g}" + (f" ({count} classes)" if count > 1 else "") for value, count in zip(values[::-1], many[::-1], strict=True)
    )


def _descent(row: dict[str, Any]) -> str:
    return (
        f"descent: {row['killed'] * row['descents']:.0f} of {row['descents']:g} seeds killed a class, share {row['killed']:.2f} "
        f"({row['killed_low']:.2f} to {row['killed_high']:.2f}), {row['killed_classes']:.2f} classes a seed\n"
        f"settled {row['settled']:.0%}, at the optimum {row['reached']:.0%}, median excess of the value {row['excess']:.1e}"
    )
