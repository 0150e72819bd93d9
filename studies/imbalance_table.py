"""The table of the study of networks under imbalance: data set, ratio, t and quantity, predicted, simulated and trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufm import sweep

Floats = NDArray[np.float64]

# column of a run -> what it is; 0 at the optimum
ERRORS = {
    "margin": "largest relative error of a live margin",
    "norm": "largest relative error of a live norm",
    "cosine": "largest cosine of two live class means",
    "features": "feature Gram: distance",
    "classifier": "classifier Gram: distance",
    "logits": "logits: distance",
    "gap": "objective over the optimum's, less 1",
    "level_gap": "objective over that of its dead classes, less 1",
}


def networks(table: sweep.Table) -> Iterator[tuple[str, sweep.Table]]:
    """The networks of each data set."""
    rows = table.where(kind="network")
    yield from ((name, rows.where(dataset=name)) for name in dict.fromkeys(rows.values("dataset")))


def groups(table: sweep.Table) -> Iterator[tuple[str, float, sweep.Table]]:
    """The networks of each data set and imbalance ratio n_max/n_min that did not diverge."""
    for name, everything in networks(table):
        rows = everything.pick(everything["net_stop"] != "DIVERGED")
        ratios = rows["n_max"] / rows["n_min"]
        for ratio in np.unique(ratios):
            yield name, float(ratio), rows.pick(ratios == ratio)


def quantities(rows: sweep.Table, prefix: str) -> dict[str, Floats]:
    """Numbers of each run, (runs,): of live classes where they are of classes, NaN where none lives."""
    K = rows["K"][0]
    halves = {"majority": np.arange(K) < K - K // 2, "minority": np.arange(K) >= K - K // 2}
    own_dead = np.asarray(rows[f"{prefix}dead"], dtype=bool)
    dead = own_dead | np.asarray(rows["predicted_dead"], dtype=bool)
    found = {
        f"{what} of live {half} classes": mean_of(rows[f"{prefix}{name}"], ~dead & own)
        for what, name in (("margin", "margins"), ("feature norm", "norms"))
        for half, own in halves.items()
    }
    found["share of minority classes at zero"] = own_dead[:, halves["minority"]].mean(axis=1)
    if prefix == "predicted_":
        zeros = np.zeros(len(rows))
        return found | dict.fromkeys((*ERRORS.values(), "within- over between-class variance"), zeros)
    found |= {name: rows[f"{prefix}{column}"] for column, name in ERRORS.items()}
    nc1 = rows["net_nc1_quotient"] if prefix == "net_" else np.zeros(len(rows))  # free descent is of class means
    return found | {"within- over between-class variance": nc1}


def mean_of(values: Floats, where: NDArray[np.bool_]) -> Floats:
    """Mean over the classes chosen, run by run; NaN without any."""
    many = where.sum(axis=1)
    return np.where(many > 0, np.where(where, values, 0.0).sum(axis=1) / np.maximum(many, 1), np.nan)


def compared(table: sweep.Table) -> sweep.Table:
    """Data set, ratio, t and quantity: predicted, and of free descent ("simulated" with momentum, "adam") and networks median and range.

    Over the runs that have it, whose number stands beside. The share of minority classes at zero is a mean, with Wilson's interval of 95 %
    as if classes were independent.
    """
    asked: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for name, ratio, rows in groups(table):
        for t in np.unique(rows["t"]):
            own = rows.pick(rows["t"] == t)
            values = {prefix: quantities(own, prefix) for prefix in ("predicted_", "gd_", "adam_", "net_")}
            for quantity, predicted in values["predicted_"].items():
                asked.append({"dataset": name, "ratio": ratio, "t": float(t), "quantity": quantity})
                row: dict[str, Any] = {"predicted": float(predicted[0])}
                for prefix, column in (("gd_", "simulated"), ("adam_", "adam"), ("net_", "trained")):
                    low, middle, high = interval(quantity, values[prefix][quantity], own["K"][0] // 2)
                    many = int(np.isfinite(values[prefix][quantity]).sum())
                    row |= {column: middle, f"{column}_low": low, f"{column}_high": high, f"{column}_runs": many}
                found.append(row)
    return sweep.Table(asked, found, [None] * len(asked), table.version)


def interval(quantity: str, values: Floats, classes: int) -> tuple[float, float, float]:
    """Low, middle and high of some runs."""
    known = values[np.isfinite(values)]
    if not known.size:
        return np.nan, np.nan, np.nan
    if not quantity.startswith("share"):
        return float(known.min()), float(np.median(known)), float(known.max())
    low, high = sweep.wilson(round(float(known.sum()) * classes), known.size * classes)
    return float(low), float(known.mean()), float(high)
