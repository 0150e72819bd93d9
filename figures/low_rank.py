"""What both figures of networks with deep heads share: their rows, settings in words, what came to rest, what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures import stored
from ufm import plots, sweep

Row = dict[str, Any]

STUDY = "network_low_rank"
COLUMNS = (
    *("panel", "activation", "penalty", "depth", "lam", "dataset", "K", "n", "width", "rate", "epochs", "settled_below"),
    *("lam_t", "objective", "loss", "ranks", "gradient", "drift", "ratio", "below", "rank", "narrowest", "order", "logits", "spectra"),
    *("weight_spectra", "dnc", "dnc_loss", "test_accuracy", "path_lam_t", "paths", "end_ratios", "end_ranks", "end_narrowest", "settled"),
    *("names", "levels", "minima_values", "minima_ranks"),
)
SETTING = ("activation", "penalty", "depth", "lam")
PAPERS = {("linear", "features"): 3, ("relu", "features"): 4, ("linear", "decay"): 3}  # depths of the heads in the papers
OKABE = plots.style.OKABE_ITO
NETWORKS, RANDOM, OWN = OKABE["blue"], OKABE["orange"], OKABE["green"]
STARTS = {"random": ("model, random starts", RANDOM), "network": ("model from the networks' starts", OWN)}
LEVELS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "dnc": ("DNC", "black", ()),
    "best": ("lowest predicted", OKABE["vermillion"], (4.0, 1.5)),
    "linear": ("linear DNC", OKABE["purple"], (1.0, 1.0)),
}


def read(folder: Path) -> sweep.Table:
    """The rows in the study's folder."""
    return stored.read(folder, STUDY, COLUMNS)


def rows_of(table: sweep.Table, **equal: Any) -> list[Row]:
    """The rows with these values, as dictionaries; none where there are none."""
    own = table.where(**equal)
    columns = {name: own.values(name) for name in own.names}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(own))]


def mains(table: sweep.Table) -> list[Row]:
    """The setting of each of the three lines: linear, ReLU, weight decay; the first of each kind in the table's order of depth 3 and 4."""
    found: dict[tuple[Any, Any], Row] = {}
    for row in rows_of(table, panel="trained"):
        key = row["activation"], row["penalty"]
        if key not in found or abs(row["depth"] - PAPERS[key]) < abs(found[key]["depth"] - PAPERS[key]):
            found[key] = {name: row[name] for name in SETTING}
    return [found[key] for key in PAPERS if key in found]


def title(setting: Row) -> str:
    """A setting in a few words."""
    held = ", weight decay" if setting["penalty"] == "decay" else ""
    return f"{'ReLU' if setting['activation'] == 'relu' else 'linear'} head, $L={setting['depth']}${held}"


def brief(setting: Row) -> str:
    """A setting as the title of a narrow panel."""
    return f"{'weight decay' if setting['penalty'] == 'decay' else title(setting).split(',')[0]}, $L={setting['depth']}$"


def settled(row: Row) -> bool:
    """Whether a network's objective has stopped falling; gradients do not vanish at kinks of the ReLU, nor under the noise of batches."""
    return bool(row["drift"] <= row["settled_below"])


def rest_told(own: Sequence[Row]) -> str:
    """How many runs came to rest, in words."""
    many, most = sum(map(settled, own)), max(row["gradient"] for row in own)
    return (
        f"At rest (objective fell by at most {100 * own[0]['settled_below']:g} % over the last tenth of training): {many} of {len(own)} "
        f"networks; largest scale-free gradient norm {most:.2g}, of batch noise and, under ReLU, kinks."
    )


def known_levels(table: sweep.Table, setting: Row) -> dict[str, float]:
    """DNC's level, the lowest of all that is predicted, and under ReLU that of linear DNC; {} without predictions."""
    rows = rows_of(table, panel="predicted", **setting)
    if not rows:
        return {}
    values = dict(zip(np.asarray(rows[0]["names"]).tolist(), np.asarray(rows[0]["levels"]).tolist(), strict=True))
    bound = values.pop("linear DNC", None)
    minima = rows[0]["minima_values"]
    best = min([value for value in values.values() if np.isfinite(value)] + ([] if minima is None else np.asarray(minima).tolist()))
    return {"dnc": values["DNC"], "best": best} | ({} if bound is None else {"linear": bound})


def lowest(row: Row) -> dict[str, float]:
    """Value over DNC's, and rank, of the lowest minimum predicted."""
    at = int(np.argmin(row["minima_values"]))
    return {"ratio": float(row["minima_values"][at] / row["dnc"]), "rank": float(row["minima_ranks"][at])}
