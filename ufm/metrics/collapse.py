"""Variability collapse: NC1 in its forms, class distances, NC4, NC5, and what tells collapsed classes, samples and coordinates.

All within-class variability measured here is 0 where there is none, also between coinciding means (0/0 counts as 0).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ufm.arrays import Array, column_sums, device_of, namespace, norm
from ufm.metrics.door import (
    choice,
    constant,
    fits,
    index,
    matrices,
    membership,
    pairs,
    positive,
    quotient,
    residuals,
    squared_distances,
    units,
    where_finite,
)
from ufm.metrics.rank import svd
from ufm.metrics.statistics import ClassStatistics, centred, nobody_missing

Centre = Literal["classes", "samples"]
EPS = float(np.finfo(np.float64).eps)


def nc1(stats: ClassStatistics, *, centre: Centre = "classes", weights: Centre = "classes", rtol: float | None = None) -> Array:
    """tr(pinv(Sigma_B) Sigma_W)/K, (B,), with Sigma_B = sum_k omega_k (mu_k - mu)(mu_k - mu)^T; never negative.

    centre mu: "classes" the unweighted mean of the class means, "samples" the mean of all samples. weights omega_k: "classes" 1/K,
    "samples" n_k/N (Hong & Ling 2023). Directions whose eigenvalue of Sigma_B is at most rtol times the largest count as zero;
    rtol = max(d, K) 2^-52 by default, as in pinv of the d x d matrix. Solved in the span of the means. Source: Papyan et al. 2020.
    """
    C, omega = _between("nc1", stats, centre, weights)
    xp = namespace(C)
    U, s, _ = svd(C * xp.sqrt(omega))
    spread = xp.clip(column_sums(U * (stats.within @ U))[:, 0, :], 0.0, None)  # u^T Sigma_W u; rounding may leave -1e-33
    rtol = max(stats.means.shape[1:]) * EPS if rtol is None else rtol
    zero = quotient(s, s[:, :1]) ** 2 <= rtol
    return xp.sum(xp.where(zero, 0.0, xp.sqrt(spread) / xp.where(zero, 1.0, s)) ** 2, axis=-1) / C.shape[-1]


def nc1_quotient(stats: ClassStatistics, *, centre: Centre = "classes", weights: Centre = "classes") -> Array:
    """tr Sigma_W/tr Sigma_B, (B,), centre and weights as in `nc1`; infinite where the means coincide and samples do not."""
    C, omega = _between("nc1_quotient", stats, centre, weights)
    vecdot = namespace(C).vecdot
    share = stats.counts / namespace(C).sum(stats.counts, axis=-1, keepdims=True)
    return quotient(vecdot(share, stats.variances), vecdot(omega[:, 0, :], column_sums(C * C)[:, 0, :]))


def vci(H: Array, labels: Any, classes: int, multiplicity: Any = None, *, weights: Centre = "classes", rtol: float | None = None) -> Array:
    """Variability collapse index 1 - tr(pinv(Sigma_T) Sigma_B)/min(d, K - 1), (B,), Sigma_T = Sigma_W + Sigma_B: 0 at collapse, at most 1.

    H (B, d, cols), labels and multiplicity as in `class_statistics`; Sigma_B about the mean of all samples, with weights as in `nc1`.
    Directions whose eigenvalue of Sigma_T is at most rtol times the largest count as zero; rtol = d 2^-52 by default, as in pinv of the
    d x d matrix. Source: Xu & Liu 2023 (arXiv 2306.03440).
    """
    choice("vci", "weights", weights, ("classes", "samples"))
    H = matrices("vci", "H", H, "(B, d, cols)")
    xp = namespace(H)
    d, cols = H.shape[1:]
    member = membership("vci", labels, classes, H)
    m = positive("vci", "multiplicity", np.ones(cols) if multiplicity is None else multiplicity, H, cols)
    counts = column_sums(member * m.mT)
    nobody_missing("vci", counts)
    means, rest = residuals(H, member, m)
    share = counts / xp.sum(counts, axis=-1, keepdims=True)
    C = centred(means)
    between = (C - C @ share.mT) * (xp.sqrt(share) if weights == "samples" else classes**-0.5)
    within = rest * xp.sqrt(m / xp.sum(counts, axis=-1, keepdims=True))
    _, s, Vt = svd(xp.concat([between, within], axis=-1))  # its Gram is Sigma_T, and the trace the first K columns of V^T squared
    kept = quotient(s, s[:, :1]) ** 2 > (d * EPS if rtol is None else rtol)
    inside = xp.sum(xp.where(kept, xp.sum(Vt[:, :, classes:] ** 2, axis=-1), 0.0), axis=-1)  # tr(pinv(Sigma_T) Sigma_W)
    rank, most = xp.sum(xp.astype(kept, H.dtype), axis=-1), min(d, classes - 1)
    return where_finite((most - rank + inside) / most, H)


def cdnv(means: Array, variances: Array, power: float = 1.0) -> Array:
    """Class-distance normalised variance: mean over k < l of (v_k + v_l)/(2||mu_k - mu_l||^{2 power}), (B,).

    means (B, d, K), variances (B, K) as in `class_statistics`; classes weigh equally, no centre. Infinite where means of classes with
    variance coincide. Source: Galanti, György & Hutter 2022 (power 1).
    """
    means = _two_classes("cdnv", matrices("cdnv", "means", means, "(B, d, K)"))
    B, _, K = means.shape
    if tuple(variances.shape) != (B, K):
        raise ValueError(f"metrics.cdnv: variances has shape {tuple(variances.shape)}, but means asks for ({B}, {K})")
    v = matrices("cdnv", "variances", variances[:, None, :], "(B, 1, K)")[:, 0, :]
    xp = namespace(means, v)
    closeness = squared_distances(means)
    with np.errstate(divide="ignore"):
        closeness **= -power  # in place: fresh memory costs more than the power
    each = xp.sum(closeness, axis=-1)  # in the sum of (v_k + v_l)/2 over k < l, v_k has half of row k
    with np.errstate(invalid="ignore"):
        return xp.sum(xp.where(v == 0, 0.0, v * each), axis=-1) / (K * (K - 1))


def nc4(H: Array, W: Array, means: Array, bias: Array | None = None, *, multiplicity: Any = None) -> Array:
    """Share of samples whose largest logit, of W h + b, is that of the nearest class mean, (B,); 1 at collapse.

    H (B, d, cols), W (B, K, d), means (B, d, K), bias (B, K, 1); columns weigh multiplicity (cols,) or (B, cols), 1 by default. Among
    equal logits or distances the first class counts. Some papers report 1 minus this. Source: Papyan et al. 2020.
    """
    H, W, means = (matrices("nc4", n, x, a) for n, x, a in (("H", H, "(B, d, cols)"), ("W", W, "(B, K, d)"), ("means", means, "(B, d, K)")))
    B, d, K = means.shape
    fits("nc4", "W", W, (B, K, d), "means")
    fits("nc4", "H", H, (B, d, H.shape[2]), "means")
    xp = namespace(H, W, means)
    logits = W @ H
    if bias is not None:
        bias = matrices("nc4", "bias", bias, "(B, K, 1)")
        fits("nc4", "bias", bias, (W.shape[0], K, 1), "W")
        logits = logits + bias
    C = centred(means)  # about a point among the data, so that distances far from the origin keep their digits
    inner = C.mT @ (H - xp.mean(means, axis=-1, keepdims=True))
    nearness = inner - 0.5 * column_sums(C * C).mT  # -||h - mu_k||^2/2 up to a number per column
    same = xp.astype(xp.argmax(logits, axis=1) == xp.argmax(nearness, axis=1), H.dtype)
    m = positive("nc4", "multiplicity", np.ones(H.shape[2]) if multiplicity is None else multiplicity, H, H.shape[2])[:, 0, :]
    share = xp.vecdot(same, xp.broadcast_to(m, same.shape)) / xp.sum(m, axis=-1)
    return where_finite(where_finite(share, logits), nearness)


def ncc_mismatch(H: Array, W: Array, means: Array, bias: Array | None = None, *, multiplicity: Any = None) -> Array:
    """1 - `nc4`, (B,): the share of samples whose nearest class mean is not the class the network predicts; 0 at collapse."""
    return 1.0 - nc4(H, W, means, bias, multiplicity=multiplicity)


def nc5(means: Array, direction: Any) -> Array:
    """Mean over classes of |cos(mu_k, direction)|, (B,): means (B, d, K) about the origin, direction (d,) or (B, d), classes equally.

    The direction is the mean feature of out-of-distribution data. NaN where a mean or the direction is zero. Source: Ammar et al. 2024.
    """
    means = matrices("nc5", "means", means, "(B, d, K)")
    g = constant(direction, means)
    B, d, _ = means.shape
    if tuple(g.shape) not in ((d,), (1, d), (B, d)):
        raise ValueError(f"metrics.nc5: direction has shape {tuple(g.shape)}, but must be ({d},) or ({B}, {d})")
    xp = namespace(means)
    cosines = units(means).mT @ units(xp.reshape(g, (-1, d, 1)))  # (B, K, 1)
    return xp.mean(xp.abs(cosines[:, :, 0]), axis=-1)


def class_norms(means: Array) -> Array:
    """||mu_k||, (B, K), of class means (B, d, K) about the origin: zero for a collapsed class of a ReLU model."""
    return norm(matrices("class_norms", "means", means, "(B, d, K)").mT)


def smallest_row_distance(W: Array) -> Array:
    """min over k != l of ||(e_k - e_l)^T W||, (B,), of W (B, K, d): zero where minority collapse has made two rows equal."""
    W = _two_classes("smallest_row_distance", matrices("smallest_row_distance", "W", W, "(B, K, d)").mT)
    xp = namespace(W)
    return xp.sqrt(xp.min(squared_distances(W), axis=(1, 2)))


def row_cosines(W: Array, rows: Any) -> Array:
    """Cosines of the pairs k > l of the given rows of W (B, K, d), in their order, (B, m(m-1)/2): 1 for a collapsed minority.

    rows: m class indices. NaN where a row is zero.
    """
    W = matrices("row_cosines", "W", W, "(B, K, d)")
    xp = namespace(W)
    at = xp.asarray(index("row_cosines", "rows", rows, W.shape[1]), device=device_of(W))
    chosen = units(_two_classes("row_cosines", xp.take(W, at, axis=1).mT))
    return pairs(chosen.mT @ chosen)


def group_spread(logits: Array, groups: Any) -> Array:
    """Largest ||z_k - mean of z over k's group|| in each group, (B, groups), of the classes' mean logits z (B, K, K): zero once they merge.

    groups: a group 0, 1, ... for each of the K columns, (K,); classes weigh equally. ValueError for a group without classes.
    """
    Z = matrices("group_spread", "logits", logits, "(B, K, columns)")
    xp = namespace(Z)
    at = index("group_spread", "groups", groups, Z.shape[2])
    if at.size != Z.shape[2] or set(at.tolist()) != set(range(at.max() + 1)):
        raise ValueError(f"metrics.group_spread: groups is {groups!r}, but must number the group of each column, 0, 1, ... without a gap")
    member = membership("group_spread", at, int(at.max()) + 1, Z, "groups")
    _, rest = residuals(Z, member)
    return xp.max(norm(rest.mT)[:, :, None] * member, axis=1)


def distinct_columns(logits: Array, rtol: float = 1e-6) -> Array:
    """Number of distinct columns of logits (B, K, cols), (B,): those farther than rtol times the longest column from all before them."""
    Z = matrices("distinct_columns", "logits", logits, "(B, K, cols)")
    xp = namespace(Z)
    longest = xp.max(norm(Z.mT), axis=-1)[:, None, None]
    seen = xp.any(xp.tril(xp.sqrt(squared_distances(Z)) <= rtol * longest, k=-1), axis=-1)
    return where_finite(xp.sum(xp.astype(~seen, Z.dtype), axis=-1), Z)


def dead_samples(H: Array, rtol: float = 0.0) -> Array:
    """Number of columns of H (B, d, cols) with every entry at most rtol times the largest of the run (exactly zero by default), (B,)."""
    return _dead("dead_samples", H, rtol, 1)


def dead_coordinates(H: Array, rtol: float = 0.0) -> Array:
    """Number of rows of H (B, d, cols) with every entry at most rtol times the largest of the run (exactly zero by default), (B,)."""
    return _dead("dead_coordinates", H, rtol, 2)


def _dead(call: str, H: Array, rtol: float, axis: int) -> Array:
    H = matrices(call, "H", H, "(B, d, cols)")
    xp = namespace(H)
    top = xp.max(xp.abs(H), axis=axis)
    dead = top <= rtol * xp.max(top, axis=-1, keepdims=True)
    return where_finite(xp.sum(xp.astype(dead, H.dtype), axis=-1), H)


def _between(call: str, stats: ClassStatistics, centre: Centre, weights: Centre) -> tuple[Array, Array]:
    """Coordinates of the means about the centre, (B, m, K), and their weights omega, (B, 1, K)."""
    choice(call, "centre", centre, ("classes", "samples"))
    choice(call, "weights", weights, ("classes", "samples"))
    xp = namespace(stats.counts)
    share = (stats.counts / xp.sum(stats.counts, axis=-1, keepdims=True))[:, None, :]
    C = stats.coordinates
    C = C if centre == "classes" else C - C @ share.mT
    return C, share if weights == "samples" else xp.full(share.shape, 1.0 / C.shape[-1], dtype=share.dtype, device=device_of(share))


def _two_classes(call: str, means: Array) -> Array:
    if means.shape[-1] < 2:
        raise ValueError(f"metrics.{call}: there is one class, but pairs need at least two")
    return means
