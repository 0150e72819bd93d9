"""What a `Monitor` reads off the moments of a layer: tables of names and metrics, and the records they end in.

A row of a table is a name and its formula of a `View`; every formula is of `ufm.metrics`. A number whose data were not kept is NaN, an
array whose data were not kept is left out, and the record says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufm import metrics
from ufm.arrays import to_numpy
from ufm.frames import Targets
from ufm.metrics import ClassStatistics
from ufm.metrics.geometry import about

Centre = Literal["classes", "samples"]
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Layer:
    """Readings of one layer: numbers and arrays by the names of the tables, and why one is NaN or left out."""

    name: str
    width: int
    values: dict[str, float]
    arrays: dict[str, NDArray[np.float64]]
    reasons: dict[str, str]


@dataclass(frozen=True, eq=False)
class Report:
    """Readings of all layers by name, samples seen of each class, and the name of the layer that feeds the classifier (None without)."""

    layers: dict[str, Layer]
    counts: NDArray[np.int64]
    last: str | None

    def __getitem__(self, name: str) -> Layer:
        return self.layers[name]

    def row(self) -> dict[str, float]:
        """Every number in one flat dict, by name@layer."""
        return {f"{name}@{layer.name}": value for layer in self.layers.values() for name, value in layer.values.items()}


@dataclass(frozen=True, eq=False)
class View:
    """One layer in float64 on its device, one run: what the formulas take, None where it was not kept.

    counts (1, K), means (1, d, K), variances (1, K); base: class statistics without the scatter, stats with it; rows (1, d, r) with the
    Gram of the features; samples (1, d, N), labels (N,); largest entries of coordinates (1, d, 1) and samples (1, 1, N); weight (1, m, d)
    of the linear map behind the layer. The last layer has W (1, K, d), b (1, K, 1) and the margins (1, N) of the network's own logits;
    the head's first layer has the chain of weights (W_1, ..., W_L).
    """

    centre: Centre
    weights: Centre
    counts: Tensor
    means: Tensor
    variances: Tensor
    base: ClassStatistics
    labels: Tensor
    stats: ClassStatistics | None = None
    rows: Tensor | None = None
    samples: Tensor | None = None
    coordinates: Tensor | None = None
    tops: Tensor | None = None
    weight: Tensor | None = None
    W: Any = None
    b: Any = None
    margins: Any = None
    chain: tuple[Tensor, ...] | None = None
    targets: Targets | None = None
    penalties: Sequence[float] | None = None

    @property
    def K(self) -> int:
        return int(self.counts.shape[1])

    @property
    def about(self) -> dict[str, Any]:
        return {"centre": self.centre, "counts": self.counts}

    @property
    def both(self) -> dict[str, Any]:
        return {"centre": self.centre, "weights": self.weights}

    @property
    def centred(self) -> Any:
        """Class means about the centre, (1, min(d, K), K), in coordinates of their span, which keep all inner products."""
        return about("Monitor", self.base.coordinates, self.centre, self.counts)

    @property
    def features(self) -> Tensor | None:
        """The samples, or in their place what has the same Gram."""
        return self.rows if self.samples is None else self.samples

    @property
    def rtol(self) -> float:
        """Of the numerical rank of all features, (d, N)."""
        return max(self.means.shape[1], int(self.counts.sum())) * EPS

    @property
    def mean_logits(self) -> Any:
        return self.W @ self.means + self.b


Table = dict[str, Callable[[Any], Any]]  # of a View whose needs are met


def _ranks(prefix: str, matrix: Callable[[Any], Tensor], rtol: Callable[[Any], float | None] = lambda v: None) -> Table:
    """The five ranks of a matrix."""
    smooth = (metrics.stable_rank, metrics.effective_rank, metrics.participation_ratio, metrics.nuclear_rank)
    table: Table = {f"{prefix}numerical_rank": lambda v: metrics.numerical_rank(matrix(v), rtol(v))}
    return table | {f"{prefix}{rank.__name__}": _of(rank, matrix) for rank in smooth}


def _of(metric: Callable[[Any], Any], matrix: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda v: metric(matrix(v))


def _balances(v: View) -> Any:
    return metrics.balance((v.features, *(v.chain or ())), v.penalties or ())


MEANS: Table = {
    "nc1_quotient": lambda v: metrics.nc1_quotient(v.base, **v.both),
    "cdnv": lambda v: metrics.cdnv(v.base.coordinates, v.variances),
    "nc2": lambda v: metrics.nc2(v.base.coordinates, **v.about),
    "equinorm": lambda v: metrics.equinorm(v.base.coordinates, **v.about),
    "equiangularity": lambda v: metrics.equiangularity(v.base.coordinates, **v.about),
    "maximal_angle": lambda v: metrics.maximal_angle(v.base.coordinates, **v.about),
    "distance_mean": lambda v: metrics.distance_kernel(v.base.coordinates, **v.about).mean,
    "distance_variance": lambda v: metrics.distance_kernel(v.base.coordinates, **v.about).variance,
    "log_distance_mean": lambda v: metrics.log_distance_kernel(v.base.coordinates, **v.about).mean,
    "log_distance_variance": lambda v: metrics.log_distance_kernel(v.base.coordinates, **v.about).variance,
    "etf_distance": lambda v: metrics.etf_distance(v.base.coordinates, **v.about),
    **_ranks("means_", lambda v: v.centred),
}
SCATTER: Table = {"nc1": lambda v: metrics.nc1(v.stats, **v.both)}
ROWS: Table = _ranks("", lambda v: v.rows, lambda v: v.rtol)
SAMPLES: Table = {
    "vci": lambda v: metrics.vci(v.samples, v.labels, v.K, weights=v.weights),
    "class_rank": lambda v: metrics.class_rank(v.samples, v.labels, v.K),
}
EXTREMES: Table = {
    "dead_samples": lambda v: metrics.dead_samples(v.tops),
    "dead_coordinates": lambda v: metrics.dead_coordinates(v.coordinates),
}
TARGETS: Table = {
    "nc2_h": lambda v: metrics.nc2_h(v.means, v.targets.features),
    "target_features": lambda v: metrics.target_distances(v.W, v.means, v.targets).features,
    "target_classifier": lambda v: metrics.target_distances(v.W, v.means, v.targets).classifier,
    "target_logits": lambda v: metrics.target_distances(v.W, v.means, v.targets).logits,
}
CLASSIFIER: Table = {
    "nc3": lambda v: metrics.nc3(v.W, v.means, **v.about),
    "nc3_normalised": lambda v: metrics.nc3_normalised(v.W, v.means, **v.about),
    "nc3_raw": lambda v: metrics.nc3_raw(v.W, v.means, **v.about),
    "bias_term": lambda v: metrics.bias_term(v.W, v.means, v.b, centre="samples", counts=v.counts),
    "duality_variance": lambda v: metrics.duality_variance(v.W, v.means, **v.about),
    "duality_cosine": lambda v: metrics.duality_cosine(v.W, v.means, **v.about),
    "duality_distance": lambda v: metrics.duality_distance(v.W, v.means, **v.about),
    "equinorm_difference": lambda v: metrics.equinorm_difference(v.W, v.means, **v.about),
    "etf_separation": lambda v: metrics.etf_separation(v.means, v.W.mT),
    "nc2_w": lambda v: metrics.nc2_w(v.W, v.means, v.counts),
    "classifier_nc2": lambda v: metrics.nc2(v.W.mT, centre="origin"),
    "classifier_equinorm": lambda v: metrics.equinorm(v.W.mT, centre="origin"),
    "classifier_equiangularity": lambda v: metrics.equiangularity(v.W.mT, centre="origin"),
    "classifier_maximal_angle": lambda v: metrics.maximal_angle(v.W.mT, centre="origin"),
    "classifier_etf_distance": lambda v: metrics.etf_distance(v.W.mT),
    "smallest_row_distance": lambda v: metrics.smallest_row_distance(v.W),
    "distinct_columns": lambda v: metrics.distinct_columns(v.mean_logits),
    "margin_mean": lambda v: v.margins.mean(dim=-1),
    "margin_min": lambda v: v.margins.min(dim=-1).values,
}
DECISIONS: Table = {
    "nc4": lambda v: metrics.nc4(v.samples, v.W, v.means, v.b),
    "ncc_mismatch": lambda v: metrics.ncc_mismatch(v.samples, v.W, v.means, v.b),
    "cosine_margin": lambda v: metrics.cosine_margin(v.samples, v.W, v.labels),
    "own_cosine": lambda v: metrics.own_cosine(v.samples, v.W, v.labels),
}
WEIGHT: Table = _ranks("weight_", lambda v: v.weight)
BALANCE: Table = {"balance": lambda v: _balances(v).max(dim=-1).values}

NUMBERS: tuple[tuple[tuple[str, ...], Table], ...] = (
    ((), MEANS),
    (("stats",), SCATTER),
    (("rows",), ROWS),
    (("rows", "samples"), SAMPLES),
    (("tops", "coordinates"), EXTREMES),
    (("W",), CLASSIFIER),
    (("W", "samples"), DECISIONS),
    (("W", "targets"), TARGETS),
    (("weight",), WEIGHT),
    (("chain", "penalties", "features"), BALANCE),
)
ARRAYS: tuple[tuple[tuple[str, ...], Table], ...] = (
    (
        (),
        {
            "counts": lambda v: v.counts,
            "means": lambda v: v.means,
            "variances": lambda v: v.variances,
            "class_norms": lambda v: metrics.class_norms(v.means),
            "means_spectrum": lambda v: metrics.singular_values(v.centred),
        },
    ),
    (("rows",), {"spectrum": lambda v: metrics.singular_values(v.rows)}),
    (("weight",), {"weight_spectrum": lambda v: metrics.singular_values(v.weight)}),
    (
        ("W",),
        {
            "classifier": lambda v: v.W,
            "bias": lambda v: v.b[:, :, 0],
            "mean_logits": lambda v: v.mean_logits,
            "class_margins": lambda v: metrics.margins(v.mean_logits, np.arange(v.K), "mean"),
            "sorted_margins": lambda v: v.margins.sort(dim=-1).values,
        },
    ),
    (("W", "samples"), {"sorted_cosine_margins": lambda v: metrics.sorted_cosine_margins(v.samples, v.W, v.labels)}),
    (("chain", "penalties", "features"), {"balances": _balances}),
)
OTHERS = ("W", "weight", "chain")  # what only some layers have, kept or not: their tables are left out elsewhere
WHY = {
    "stats": "needs the scatter; give measure='full' for this layer, or keep its samples",
    "rows": "needs the spectrum of all features; give measure='full' for this layer",
    "tops": "needs the largest entries; give measure='full' for this layer",
    "samples": "needs the samples; give keep='last', or 'all' for other layers than the last",
    "targets": "needs Grams to compare with; give targets=",
    "features": "needs the Gram of all features; give measure='full' for this layer, or keep its samples",
    "penalties": "needs the penalties (lam_h, lam_1, ..., lam_L); give penalties=",
}


def read(name: str, view: View) -> Layer:
    """All readings of a layer; the numbers come from the device at once."""
    numbers, reasons = _evaluated(view, NUMBERS)
    arrays, more = _evaluated(view, ARRAYS)
    found = [name for name, value in numbers.items() if value is not None]
    flat = torch.stack([numbers[name][0].to(torch.float64) for name in found]).tolist()
    values = dict.fromkeys(numbers, nan) | dict(zip(found, flat, strict=True))
    kept = {name: to_numpy(value[0]).copy() for name, value in arrays.items() if value is not None}  # some are the network's own memory
    return Layer(name, int(view.means.shape[1]), values, kept, reasons | more)


def _evaluated(view: View, tables: tuple[tuple[tuple[str, ...], Table], ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Results (1, ...) by name, None where something is missing, with the reasons."""
    results: dict[str, Any] = {}
    reasons = {}
    for needs, table in tables:
        lacking = [need for need in needs if getattr(view, need) is None]
        if set(lacking) & set(OTHERS):
            continue
        for name, formula in table.items():
            try:
                results[name] = None if lacking else formula(view)
            except ValueError as error:  # a hypothesis of the metric, such as a width that has no simplex ETF
                results[name], reasons[name] = None, str(error)
            if lacking:
                reasons[name] = WHY[lacking[0]]
    return results, reasons
