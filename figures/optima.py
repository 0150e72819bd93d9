"""The rows of the atlas of optima as cells, crossovers and panels: what its figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures import stored
from ufm import sweep
from ufm.plots import Dots, PhaseMap, ShareMap, style

STUDY = "deep_optimum"
CELL = (
    *("lam", "value", "rank", "name", "gradient_norm", "is_minimum", "negative", "reached", "made", "kinds", "runner_up", "evaluations"),
    *("dnc", "dnc_excess", "dnc_index"),
)
CHANGE = ("at", "mismatch", "from_rank", "to_rank", "from_name", "to_name")
COLUMNS = ("panel", "K", "depth", "lambda_zero", *CELL, *CHANGE, "R", "code_rank", "code", "catalogue", "residual")
STATIONARY = 1e-9  # largest scale-free gradient norm of a confirmed cell
UNCONFIRMED = "best found, not confirmed"
LABELS = (r"$\lambda/\lambda_0$", "classes $K$")

COLOURS = {
    "zero": style.NEUTRAL,
    "DNC": style.OKABE_ITO["vermillion"],
    "pairs": style.OKABE_ITO["orange"],
    "polygon": style.OKABE_ITO["purple"],
    "T(r)": style.OKABE_ITO["yellow"],
    "icosahedron": style.OKABE_ITO["black"],
    "square antiprism": "#8C564B",
    "other blocks": style.OKABE_ITO["sky"],
} | {f"other, rank {name}": colour for name, colour in zip((1, 2, 3, 4, 5, "6 or more"), style.ordered(7)[5::-1], strict=True)}
KINDS = list(COLOURS)


def grid_of(panels: Sequence[Any]) -> list[list[Any]]:
    """Panels in rows of at most four, empty places behind."""
    wide = min(4, len(panels))
    filled = [*panels, *[None] * (-len(panels) % wide)]
    return [filled[i : i + wide] for i in range(0, len(filled), wide)]


def search(cells: sweep.Table) -> str:
    """How much was searched, for the caption."""
    return (
        f"{len(cells)} cells, {int(cells['made'].sum())} starts in all, at every rank; scale-free gradient of the best at most "
        f"{cells['gradient_norm'].max():.0e}; {int(np.sum(confirmed(cells)))} cells confirmed."
    )


def phases(table: sweep.Table, depth: int) -> PhaseMap:
    """The best structures at one depth, the crossovers over them."""
    grid, changes = grid_at(table, depth), crossovers(table)
    changes = changes.where(depth=depth) if len(changes) else changes
    return PhaseMap(
        x=grid["level"],
        y=grid["K"],
        title=f"$L={depth}$",
        labels=LABELS,
        log=(True, False),
        codes=np.vectorize(code)(grid["name"], grid["rank"]).astype(int),
        names=KINDS,
        colours=list(COLOURS.values()),
        certified=confirmed(grid),
        unproven=UNCONFIRMED,
        dots=Dots(changes["level"], changes["K"], "crossover") if len(changes) else None,
        hover=told(grid),
    )


def excess(table: sweep.Table, depth: int) -> ShareMap:
    """How much of the value at deep neural collapse is excess over the best."""
    grid = grid_at(table, depth)
    missing = np.isnan(grid["dnc"])
    return ShareMap(
        x=grid["level"],
        y=grid["K"],
        title=f"$L={depth}$",
        labels=LABELS,
        log=(True, False),
        values=np.where(missing, 0.0, np.clip(1 - grid["value"] / np.where(missing, 1.0, grid["dnc"]), 0.0, 1.0)),
        trusted=confirmed(grid),
        idle=missing,
        untrusted=UNCONFIRMED,
        idle_name="DNC does not exist",
        bar="share of DNC's value above the best",
        hover=told(grid),
    )


def code(name: str, rank: int) -> int:
    """The number of the colour of a structure."""
    if name.startswith("other"):
        return KINDS.index(f"other, rank {rank}" if rank < 6 else "other, rank 6 or more")
    if name.endswith("pairs"):
        return KINDS.index("pairs")
    if name.startswith("blocks"):
        return KINDS.index("other blocks")
    return KINDS.index("polygon" if name.endswith("-gon") else "T(r)" if name.startswith("T(") else name)


def confirmed(cells: Any) -> NDArray[np.bool_]:
    """Whether the best of a cell is a genuine minimum to rounding that two starts or more of its own search reached, or zero."""
    often = (cells["reached"] > 1) | (cells["rank"] == 0)
    return np.asarray((cells["is_minimum"] == 1) & (cells["gradient_norm"] <= STATIONARY) & often)


def flat(table: sweep.Table) -> sweep.Table:
    """The cells of the atlas, one a row; level = lambda/lambda_zero."""
    rows = stored.pick(table, STUDY, panel="atlas")
    columns = {name: rows[name] for name in ("K", "depth", "lambda_zero", *CELL)}
    points, results = [], []
    for i in range(len(rows)):
        for j in range(columns["lam"].shape[1]):
            points.append({"K": int(columns["K"][i]), "depth": int(columns["depth"][i]), "cell": j})
            zero = float(columns["lambda_zero"][i])
            results.append(
                {"lambda_zero": zero, "level": float(columns["lam"][i, j]) / zero} | {name: columns[name][i, j].item() for name in CELL}
            )
    return sweep.Table(points, results, [None] * len(points), table.version)


def crossovers(table: sweep.Table) -> sweep.Table:
    """The crossovers of the atlas, one a row."""
    rows = stored.pick(table, STUDY, panel="atlas")
    columns = {name: rows[name] for name in ("K", "depth", "lambda_zero", *CHANGE)}
    points, results = [], []
    for i, j in np.argwhere(np.isfinite(columns["at"])):
        points.append({"K": int(columns["K"][i]), "depth": int(columns["depth"][i]), "number": int(j)})
        lam = float(columns["at"][i, j])
        row = {"lam": lam, "level": lam / float(columns["lambda_zero"][i])}
        results.append(row | {name: columns[name][i, j].item() for name in CHANGE if name != "at"})
    return sweep.Table(points, results, [None] * len(points), table.version)


def grid_at(table: sweep.Table, depth: int) -> dict[str, NDArray[Any]]:
    """The cells of one depth, (classes, cells) each; K and level rising; BadRows unless there are two by two."""
    grid = flat(table).where(depth=depth).on_grid("cell", "K")
    if min(grid["lam"].shape) < 2:
        raise stored.BadRows(f"depth {depth} has {grid['lam'].shape[0]} by {grid['lam'].shape[1]} cells, but a map needs two by two")
    return grid | {"level": grid["level"][0]}


def told(grid: dict[str, NDArray[Any]]) -> NDArray[np.str_]:
    """A text for each cell."""
    texts = [
        f"K = {grid['K'][k]:g}, λ = {grid['lam'][k, j]:.4g}, λ/λ₀ = {grid['level'][j]:.3g}\n"
        f"best found: {grid['name'][k, j]}, rank {grid['rank'][k, j]:g}, F = {grid['value'][k, j]:.8g}\n"
        f"reached by {grid['reached'][k, j]:g} of {grid['made'][k, j]:g} starts; next minimum {grid['runner_up'][k, j]:.1e} above\n"
        f"gradient {grid['gradient_norm'][k, j]:.0e}, negative eigenvalues {grid['negative'][k, j]:g}\n"
        f"DNC: {100 * grid['dnc_excess'][k, j]:.3g} % above, index {grid['dnc_index'][k, j]:g}"
        for k, j in np.ndindex(grid["lam"].shape)
    ]
    return np.array(texts).reshape(grid["lam"].shape)
