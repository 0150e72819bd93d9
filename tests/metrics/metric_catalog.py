"""Every metric with its oracle, and the points they are tried on. A new metric is a row of METRICS; each law is tried on each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import loops
from ufm import frames, metrics

CENTRES = ("classes", "samples")


@dataclass(frozen=True)
class Point:
    """A batch of B runs: samples with labels and multiplicities, their class means and variances, and a network's W_1, W, b."""

    H: Any
    labels: Any
    multiplicity: Any
    means: Any
    variances: Any
    counts: Any
    inner: Any
    W: Any
    bias: Any
    direction: Any

    @property
    def classes(self) -> int:
        return int(self.W.shape[1])

    @property
    def logits(self) -> Any:
        with np.errstate(invalid="ignore"):
            return self.W @ self.H + self.bias

    def map(self, function: Callable[[Any], Any]) -> Point:
        return Point(*(function(getattr(self, name)) for name in self.__dataclass_fields__))

    def run(self, b: int) -> Point:
        """Run b alone, still with its axis of runs."""
        return self.map(lambda x: x[b : b + 1])

    def with_features(self, H: Any) -> Point:
        """Other samples, their means and variances by loops."""
        runs, K = range(len(H)), self.classes
        means = np.stack([loops.class_means(H[b], self.labels[b], K, self.multiplicity[b]) for b in runs])
        spread = np.stack([loops.variances(H[b], self.labels[b], K, self.multiplicity[b]) for b in runs])
        return replace(self, H=H, means=means, variances=spread)


def point(counts: Any, d: int, noise: float, seed: int, B: int = 3, weighted: bool = True, relu: bool = False) -> Point:
    """Random class means with samples around them; labels in another order in each run."""
    rng = np.random.default_rng(seed)
    K, N = len(counts), sum(counts)
    labels = np.stack([rng.permutation(np.repeat(np.arange(K), counts)) for _ in range(B)])
    centres = rng.standard_normal((B, d, K))
    H = np.take_along_axis(centres, labels[:, None, :], axis=2) + noise * rng.standard_normal((B, d, N))
    H = np.maximum(H, 0) if relu else H
    m = rng.integers(1, 4, (B, N)) if weighted else np.ones((B, N))
    n = np.stack([[m[b][labels[b] == k].sum() for k in range(K)] for b in range(B)])
    parts = (rng.standard_normal(shape) for shape in ((B, d, d), (B, K, d), (B, K, 1), (B, d)))
    return Point(H, labels, m, np.zeros((B, d, K)), np.zeros((B, K)), n, *parts).with_features(H)


POINTS: dict[str, Point] = {
    "balanced": point([6] * 4, 7, 0.5, 0, weighted=False),
    "imbalanced": point([9, 5, 3, 1], 6, 0.5, 1),
    "wide": point([3, 2, 2], 20, 0.3, 2),
    "narrow": point([4, 3, 3, 2, 2, 1], 3, 0.4, 3),
    "line": point([4, 3, 3], 1, 0.4, 4),
    "two classes": point([5, 2], 4, 0.5, 5),
    "relu": point([6, 4, 2], 8, 0.2, 6, relu=True),
    "nearly collapsed": point([5, 4, 3], 6, 1e-7, 7),
}


def stats(p: Point) -> Any:
    return metrics.class_statistics(p.H, p.labels, p.classes, p.multiplicity)


def targets(K: int) -> frames.Targets:
    return frames.imbalanced_targets(np.arange(1.0, K + 1), np.linspace(1.0, 2.0, K))


def seli(K: int) -> frames.Targets:
    return frames.seli_targets(np.arange(1.0, K + 1))


Mine = Callable[[Point], Any]
Theirs = Callable[[Any], Any]


@dataclass(frozen=True)
class One:
    """One run of a point without its axis, as the loops take it."""

    H: Any
    y: Any
    m: Any
    mu: Any
    v: Any
    n: Any
    V: Any
    W: Any
    b: Any
    g: Any

    @property
    def K(self) -> int:
        return len(self.W)

    def about(self, centre: str) -> Any:
        return loops.about(self.mu, self.n, centre)


def one(p: Point, b: int) -> One:
    x = [np.asarray(getattr(p, name))[b] for name in p.__dataclass_fields__]
    x[8] = x[8][:, 0]
    return One(*x)


def _variability() -> dict[str, tuple[Mine, Theirs]]:
    rows: dict[str, tuple[Mine, Theirs]] = {}
    for c in CENTRES:
        for w in CENTRES:
            rows[f"nc1 {c} {w}"] = (
                lambda p, c=c, w=w: metrics.nc1(stats(p), centre=c, weights=w),
                lambda o, c=c, w=w: loops.nc1(o.H, o.y, o.K, o.m, c, w),
            )
            rows[f"nc1_quotient {c} {w}"] = (
                lambda p, c=c, w=w: metrics.nc1_quotient(stats(p), centre=c, weights=w),
                lambda o, c=c, w=w: loops.nc1_quotient(o.H, o.y, o.K, o.m, c, w),
            )
    return rows


ABOUT: dict[str, tuple[Callable[[Point, Any, Any], Any], Callable[[One, Any], Any]]] = {
    "nc2": (lambda p, c, n: metrics.nc2(p.means, centre=c, counts=n), lambda o, C: loops.gram_distance(C.T @ C, loops.etf(o.K))),
    "nc3": (lambda p, c, n: metrics.nc3(p.W, p.means, centre=c, counts=n), lambda o, C: loops.gram_distance(o.W @ C, loops.etf(o.K))),
    "nc3_normalised": (
        lambda p, c, n: metrics.nc3_normalised(p.W, p.means, centre=c, counts=n),
        lambda o, C: loops.gram_distance(o.W, C.T),
    ),
    "nc3_raw": (lambda p, c, n: metrics.nc3_raw(p.W, p.means, centre=c, counts=n), lambda o, C: np.linalg.norm(o.W - C.T)),
    "bias_term": (
        lambda p, c, n: metrics.bias_term(p.W, p.means, p.bias, centre=c, counts=n),
        lambda o, C: np.linalg.norm(o.b + o.W @ (o.mu - C)[:, 0]),
    ),
    "duality_variance": (
        lambda p, c, n: metrics.duality_variance(p.W, p.means, centre=c, counts=n),
        lambda o, C: loops.duality_variance(o.W, C),
    ),
    "duality_cosine": (
        lambda p, c, n: metrics.duality_cosine(p.W, p.means, centre=c, counts=n),
        lambda o, C: loops.duality_cosine(o.W, C),
    ),
    "duality_distance": (
        lambda p, c, n: metrics.duality_distance(p.W, p.means, centre=c, counts=n),
        lambda o, C: loops.duality_distance(o.W, C),
    ),
    "equinorm": (lambda p, c, n: metrics.equinorm(p.means, centre=c, counts=n), lambda o, C: loops.equinorm(C)),
    "equiangularity": (
        lambda p, c, n: metrics.equiangularity(p.means, centre=c, counts=n),
        lambda o, C: loops.moments(loops.cosines(C))[1] ** 0.5,
    ),
    "equinorm_difference": (
        lambda p, c, n: metrics.equinorm_difference(p.W, p.means, centre=c, counts=n),
        lambda o, C: abs(loops.equinorm(C) - loops.equinorm(o.W.T)),
    ),
    "etf_distance": (lambda p, c, n: metrics.etf_distance(p.means, centre=c, counts=n), lambda o, C: loops.etf_distance(C)),
    "maximal_angle": (
        lambda p, c, n: metrics.maximal_angle(p.means, centre=c, counts=n),
        lambda o, C: np.mean([abs(x + 1 / (o.K - 1)) for x in loops.cosines(C)]),
    ),
    "distance_kernel mean": (
        lambda p, c, n: metrics.distance_kernel(p.means, centre=c, counts=n).mean,
        lambda o, C: loops.moments(loops.distances(C))[0],
    ),
    "distance_kernel variance": (
        lambda p, c, n: metrics.distance_kernel(p.means, centre=c, counts=n).variance,
        lambda o, C: loops.moments(loops.distances(C))[1],
    ),
    "log_distance_kernel mean": (
        lambda p, c, n: metrics.log_distance_kernel(p.means, centre=c, counts=n).mean,
        lambda o, C: loops.moments(loops.logs(C))[0],
    ),
    "log_distance_kernel variance": (
        lambda p, c, n: metrics.log_distance_kernel(p.means, centre=c, counts=n).variance,
        lambda o, C: loops.moments(loops.logs(C))[1],
    ),
}


def _geometry() -> dict[str, tuple[Mine, Theirs]]:
    rows: dict[str, tuple[Mine, Theirs]] = {}
    for name, (mine, theirs) in ABOUT.items():
        for c in ("classes", "samples", "origin"):
            rows[f"{name} {c}"] = (lambda p, c=c, f=mine: f(p, c, p.counts), lambda o, c=c, f=theirs: f(o, o.about(c)))
    return rows


# metric -> (the package's, on a batch; the loops', on one run)
METRICS: dict[str, tuple[Mine, Theirs]] = {
    "means": (lambda p: stats(p).means, lambda o: o.mu),
    "variances": (lambda p: stats(p).variances, lambda o: o.v),
    "counts": (lambda p: stats(p).counts, lambda o: o.n),
    **_variability(),
    "cdnv": (lambda p: metrics.cdnv(p.means, p.variances), lambda o: loops.cdnv(o.mu, o.v, 1)),
    "cdnv power 2": (lambda p: metrics.cdnv(p.means, p.variances, 2), lambda o: loops.cdnv(o.mu, o.v, 2)),
    "nc4": (
        lambda p: metrics.nc4(p.H, p.W, p.means, p.bias, multiplicity=p.multiplicity),
        lambda o: loops.nc4(o.H, o.W, o.b, o.mu, o.m),
    ),
    "nc4 no bias": (lambda p: metrics.nc4(p.H, p.W, p.means), lambda o: loops.nc4(o.H, o.W, 0 * o.b, o.mu, 0 * o.m + 1)),
    "nc5": (lambda p: metrics.nc5(p.means, p.direction), lambda o: loops.nc5(o.mu, o.g)),
    "ncc_mismatch": (
        lambda p: metrics.ncc_mismatch(p.H, p.W, p.means, p.bias, multiplicity=p.multiplicity),
        lambda o: 1 - loops.nc4(o.H, o.W, o.b, o.mu, o.m),
    ),
    "vci classes": (
        lambda p: metrics.vci(p.H, p.labels, p.classes, p.multiplicity, rtol=1e-9),
        lambda o: loops.vci(o.H, o.y, o.K, o.m, "classes", 1e-9),
    ),
    "vci samples": (
        lambda p: metrics.vci(p.H, p.labels, p.classes, p.multiplicity, weights="samples", rtol=1e-9),
        lambda o: loops.vci(o.H, o.y, o.K, o.m, "samples", 1e-9),
    ),
    "class_norms": (lambda p: metrics.class_norms(p.means), lambda o: [np.linalg.norm(c) for c in o.mu.T]),
    "smallest_row_distance": (
        lambda p: metrics.smallest_row_distance(p.W),
        lambda o: min(np.linalg.norm(o.W[k] - o.W[j]) for k in range(o.K) for j in range(k)),
    ),
    "row_cosines": (lambda p: metrics.row_cosines(p.W, [p.classes - 1, 0]), lambda o: [loops.cosine(o.W[0], o.W[-1])]),
    "group_spread": (
        lambda p: metrics.group_spread(p.means, np.arange(p.classes) % 2),
        lambda o: loops.group_spread(o.mu, np.arange(o.K) % 2),
    ),
    "distinct_columns": (lambda p: metrics.distinct_columns(p.logits, 0.2), lambda o: loops.distinct(o.W @ o.H + o.b[:, None], 0.2)),
    "dead_samples": (lambda p: metrics.dead_samples(p.H), lambda o: sum(not h.any() for h in o.H.T)),
    "dead_samples 0.5": (
        lambda p: metrics.dead_samples(p.H, 0.5),
        lambda o: sum(max(abs(h)) <= 0.5 * np.abs(o.H).max() for h in o.H.T),
    ),
    "dead_coordinates": (
        lambda p: metrics.dead_coordinates(p.H, 0.7),
        lambda o: sum(max(abs(h)) <= 0.7 * np.abs(o.H).max() for h in o.H),
    ),
    **_geometry(),
    "gram_distance": (
        lambda p: metrics.gram_distance(p.W, np.tri(*p.W.shape[1:])),
        lambda o: loops.gram_distance(o.W, np.tri(*o.W.shape)),
    ),
    "target_distances features": (
        lambda p: metrics.target_distances(p.W, p.means, seli(p.classes)).features,
        lambda o: loops.gram_distance(o.mu.T @ o.mu, seli(o.K).features),
    ),
    "target_distances classifier": (
        lambda p: metrics.target_distances(p.W, p.means, seli(p.classes)).classifier,
        lambda o: loops.gram_distance(o.W @ o.W.T, seli(o.K).classifier),
    ),
    "target_distances logits": (
        lambda p: metrics.target_distances(p.W, p.means, targets(p.classes)).logits,
        lambda o: loops.gram_distance(o.W @ o.mu, targets(o.K).logits),
    ),
    "nc2_h": (
        lambda p: metrics.nc2_h(p.means, targets(p.classes).features),
        lambda o: loops.gram_distance(np.maximum(o.mu, 0).T @ np.maximum(o.mu, 0), targets(o.K).features),
    ),
    "nc2_w": (lambda p: metrics.nc2_w(p.W, p.means, p.counts), lambda o: loops.nc2_w(o.W, o.mu, o.n)),
    "margins max": (lambda p: metrics.margins(p.logits, p.labels), lambda o: loops.margins(o.W @ o.H + o.b[:, None], o.y, "max")),
    "margins mean": (
        lambda p: metrics.margins(p.logits, p.labels, "mean"),
        lambda o: loops.margins(o.W @ o.H + o.b[:, None], o.y, "mean"),
    ),
    "sorted_margins": (
        lambda p: metrics.sorted_margins(p.logits, p.labels),
        lambda o: sorted(loops.margins(o.W @ o.H + o.b[:, None], o.y, "max")),
    ),
    "cosine_margins": (
        lambda p: metrics.cosine_margins(p.H, p.W, p.labels, p.multiplicity),
        lambda o: loops.cosine_margins(o.H, o.W, o.y, o.m),
    ),
    "sorted_cosine_margins": (
        lambda p: metrics.sorted_cosine_margins(p.H, p.W, p.labels),
        lambda o: sorted(loops.cosine_margins(o.H, o.W, o.y, 0 * o.m + 1)),
    ),
    "cosine_margin": (
        lambda p: metrics.cosine_margin(p.H, p.W, p.labels, p.multiplicity),
        lambda o: np.average(loops.cosine_margins(o.H, o.W, o.y, o.m), weights=o.m),
    ),
    "own_cosine": (
        lambda p: metrics.own_cosine(p.H, p.W, p.labels, p.multiplicity),
        lambda o: loops.own_cosine(o.H, o.W, o.y, o.m),
    ),
    "etf_separation": (
        lambda p: metrics.etf_separation(p.means, p.W.mT),
        lambda o: np.sum((loops.nearest_etf(o.mu) - loops.nearest_etf(o.W.T)) ** 2),
    ),
    "nuclear_rank": (lambda p: metrics.nuclear_rank(p.W), lambda o: loops.nuclear_rank(o.W)),
    "class_rank": (
        lambda p: metrics.class_rank(p.H, p.labels, p.classes, p.multiplicity),
        lambda o: loops.class_rank(o.H, o.y, o.K, o.m),
    ),
    "singular_values": (lambda p: metrics.singular_values(p.W), lambda o: loops.singular_values(o.W)),
    "numerical_rank": (lambda p: metrics.numerical_rank(p.W, 0.3), lambda o: rank(loops.singular_values(o.W), 0.3)),
    "stable_rank": (lambda p: metrics.stable_rank(p.W), lambda o: (o.W**2).sum() / loops.singular_values(o.W)[0] ** 2),
    "effective_rank": (lambda p: metrics.effective_rank(p.W), lambda o: loops.effective_rank(o.W)),
    "participation_ratio": (
        lambda p: metrics.participation_ratio(p.W),
        lambda o: sum(s**2 for s in loops.singular_values(o.W)) ** 2 / sum(s**4 for s in loops.singular_values(o.W)),
    ),
    "balance": (
        lambda p: metrics.balance((p.H, p.inner, p.W), (0.1, 0.2, 0.7), p.multiplicity),
        lambda o: loops.balance((o.H, o.V, o.W), (0.1, 0.2, 0.7), o.m),
    ),
    "balance of two": (
        lambda p: metrics.balance((p.means, p.W), (0.3, 0.2)),
        lambda o: loops.balance((o.mu, o.W), (0.3, 0.2), 0 * o.n + 1),
    ),
}


def rank(s: list[float], rtol: float) -> int:
    return sum(x > rtol * s[0] for x in s)
