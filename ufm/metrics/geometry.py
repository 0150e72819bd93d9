"""Geometry of class means and classifier: distances to Grams, duality, lengths and angles, uniformity on the sphere, margins.

<A> = A/||A||_F, and <0> = 0: a zero matrix is at distance 1 from every target. Class means are vectors mu_k, the columns of means
(B, d, K), taken about a named centre: "classes" their unweighted mean, "samples" the mean of all samples, sum_k n_k mu_k/N (needs
counts, (K,) or (B, K)), "origin" none. For classifier rows pass W.mT, as a rule with centre="origin". Classes weigh equally.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from ufm.arrays import Array, column_sums, namespace, norm
from ufm.frames import Targets, etf_targets, imbalanced_classifier
from ufm.metrics.door import choice, constant, fits, matrices, membership, pairs, positive, quotient, squared_distances, units
from ufm.metrics.statistics import centred

Centre = Literal["classes", "samples", "origin"]
CENTRES = ("classes", "samples", "origin")


class Moments(NamedTuple):
    """Mean and variance over the pairs k < l, divided by their number, each (B,)."""

    mean: Array
    variance: Array


def gram_distance(gram: Array, target: Any) -> Array:
    """||<gram> - <target>||_F, (B,), of matrices (B, m, n), with a target (m, n) or (B, m, n): between 0 and 2, whatever their scales.

    Targets come from `ufm.frames`. A zero matrix is at distance 1 from any other and at 0 from zero.
    """
    gram = matrices("gram_distance", "gram", gram, "(B, m, n)")
    target = constant(target, gram)
    target = matrices("gram_distance", "target", target if target.ndim == 3 else target[None, ...], "(m, n) or (B, m, n)")
    fits("gram_distance", "target", target, tuple(gram.shape), "gram")
    return namespace(gram).linalg.matrix_norm(normalised(gram) - normalised(target))


def nc2(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """||<C^T C> - <I - 11^T/K>||_F, (B,), C the class means about the centre: distance to a simplex ETF. Source: Zhu et al. 2021."""
    C = about("nc2", means, centre, counts)
    return gram_distance(C.mT @ C, etf_targets(C.shape[-1]).features)


def nc3(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """||<W C> - <I - 11^T/K>||_F, (B,), of W (B, K, d) and C the class means about the centre. Source: Zhu et al. 2021."""
    W, C = _both("nc3", W, means, centre, counts)
    return gram_distance(W @ C, etf_targets(C.shape[-1]).logits)


def nc3_normalised(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """||<W> - <C^T>||_F, (B,), C the class means about the centre: self-duality up to one scale. Source: Papyan et al. 2020."""
    W, C = _both("nc3_normalised", W, means, centre, counts)
    return gram_distance(W, C.mT)


def nc3_raw(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """||W - C^T||_F, (B,), C the class means about the centre; scales with both."""
    W, C = _both("nc3_raw", W, means, centre, counts)
    return namespace(W).linalg.matrix_norm(W - C.mT)


def bias_term(W: Array, means: Array, bias: Array, *, centre: Centre = "samples", counts: Any = None) -> Array:
    """||b + W mu||, (B,), mu the centre of the class means ("samples": mu_G), bias (B, K, 1): zero where the bias removes the centre."""
    W, C = _both("bias_term", W, means, centre, counts)
    bias = matrices("bias_term", "bias", bias, "(B, K, 1)")
    fits("bias_term", "bias", bias, (W.shape[0], W.shape[1], 1), "W")
    point = matrices("bias_term", "means", means, "(B, d, K)")[:, :, :1] - C[:, :, :1]
    return namespace(W).linalg.matrix_norm(bias + W @ point)


def duality_variance(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Variance over k, divisor K - 1, of w_k . c_k, (B,), c_k the class means about the centre ("uniform duality")."""
    W, C = _both("duality_variance", W, means, centre, counts)
    return namespace(W).var(namespace(W).vecdot(W, C.mT), axis=-1, correction=1)


def duality_cosine(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Mean over k of cos(w_k, c_k), (B,), c_k the class means about the centre; NaN where a vector is zero."""
    W, C = _both("duality_cosine", W, means, centre, counts)
    return namespace(W).mean(column_sums(units(W.mT) * units(C)), axis=(1, 2))


def duality_distance(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Mean over k of || w_k/||w_k|| - c_k/||c_k|| ||, (B,), c_k the class means about the centre; NaN where a vector is zero."""
    W, C = _both("duality_distance", W, means, centre, counts)
    return namespace(W).mean(norm((units(W.mT) - units(C)).mT), axis=-1)


def equinorm(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Standard deviation (divisor K - 1) over mean of the norms ||c_k||, (B,), about the centre. Source: Papyan et al. 2020."""
    lengths = norm(about("equinorm", means, centre, counts).mT)
    xp = namespace(lengths)
    return quotient(xp.std(lengths, axis=-1, correction=1), xp.mean(lengths, axis=-1))


def equinorm_difference(W: Array, means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """|equinorm of the class means about the centre - equinorm of the rows of W (B, K, d)|, (B,). Source: Markou et al. 2024."""
    W, _ = _both("equinorm_difference", W, means, centre, counts)
    return namespace(W).abs(equinorm(means, centre=centre, counts=counts) - equinorm(W.mT, centre="origin"))


def equiangularity(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Standard deviation over the pairs k < l (divisor their number) of cos(c_k, c_l), (B,); NaN where a vector is zero.

    Source: Papyan et al. 2020.
    """
    cosines = _cosines("equiangularity", means, centre, counts)
    return namespace(cosines).std(cosines, axis=-1)


def maximal_angle(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Array:
    """Mean over the pairs k < l of |cos(c_k, c_l) + 1/(K-1)|, (B,); NaN where a vector is zero. Source: Papyan et al. 2020."""
    cosines = _cosines("maximal_angle", means, centre, counts)
    xp = namespace(cosines)
    return xp.mean(xp.abs(cosines + 1.0 / (means.shape[-1] - 1)), axis=-1)


def distance_kernel(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Moments:
    """Mean and variance over the pairs of ||u_k - u_l||, u_k = c_k/||c_k||; sqrt(2K/(K-1)) and 0 for a simplex ETF.

    NaN where a vector is zero. Source: Liu et al. 2023 (hyperspherical uniformity, arXiv 2303.06484).
    """
    apart = pairs(squared_distances(units(about("distance_kernel", means, centre, counts))))
    return _moments(namespace(apart).sqrt(apart))


def log_distance_kernel(means: Array, *, centre: Centre = "classes", counts: Any = None) -> Moments:
    """Mean and variance over the pairs of -log ||u_k - u_l||, u_k = c_k/||c_k||; infinite and NaN where two coincide.

    NaN where a vector is zero. Source: Liu et al. 2023 (hyperspherical uniformity, arXiv 2303.06484).
    """
    apart = pairs(squared_distances(units(about("log_distance_kernel", means, centre, counts))))
    with np.errstate(divide="ignore"):
        return _moments(-0.5 * namespace(apart).log(apart))


def target_distances(W: Array, means: Array, targets: Targets) -> Targets:
    """Distances (B,) of means^T means, W W^T and W means to the Grams of `ufm.frames`, in the fields features, classifier, logits.

    means (B, d, K) about the origin. With `imbalanced_targets` classifier and logits are NC2_WWT and NC3_WH of Dang et al. 2024 (features
    is NC2_H without its ReLU); with `seli_targets` they are the distances to the SELI geometry, with `etf_targets` to the ETF.
    """
    W, M = _both("target_distances", W, means, "origin", None)
    return Targets(
        gram_distance(M.mT @ M, targets.features), gram_distance(W @ W.mT, targets.classifier), gram_distance(W @ M, targets.logits)
    )


def nc2_h(means: Array, target: Any) -> Array:
    """||<relu(M)^T relu(M)> - <target>||_F, (B,), of means M (B, d, K) about the origin, with target `imbalanced_targets(...).features`.

    The ReLU changes nothing where features are nonnegative. Source: Dang et al., ICML 2024 (arXiv 2401.02058).
    """
    M = matrices("nc2_h", "means", means, "(B, d, K)")
    M = namespace(M).clip(M, 0.0, None)
    return gram_distance(M.mT @ M, target)


def nc2_w(W: Array, means: Array, counts: Any) -> Array:
    """||<W> - <rows K sqrt(n_k) mu_k - sum_m sqrt(n_m) mu_m>||_F, (B,), means about the origin.

    counts (K,) or (B, K). Source: Dang et al., ICML 2024 (arXiv 2401.02058).
    """
    W, M = _both("nc2_w", W, means, "origin", None)
    return gram_distance(W, imbalanced_classifier(M, positive("nc2_w", "counts", counts, M, M.shape[2])[:, 0, :]))


def margins(logits: Array, labels: Any, against: Literal["mean", "max"] = "max") -> Array:
    """z_y - max_{j != y} z_j, or z_y - mean_{j != y} z_j, of each column of logits (B, K, cols), (B, cols); labels (cols,) or (B, cols)."""
    choice("margins", "against", against, ("mean", "max"))
    Z = matrices("margins", "logits", logits, "(B, K, cols)")
    K = Z.shape[1]
    if K < 2:
        raise ValueError("metrics.margins: logits has one row, but a margin needs at least two classes")
    xp = namespace(Z)
    member = membership("margins", labels, K, Z).mT  # (B or 1, K, cols)
    gaps = column_sums(Z * member) - Z
    if against == "mean":
        return xp.sum(gaps, axis=1) / (K - 1)
    return xp.min(xp.where(member > 0, xp.inf, gaps), axis=1)


def sorted_margins(logits: Array, labels: Any, against: Literal["mean", "max"] = "max") -> Array:
    """`margins` of each run in rising order, (B, cols): the margin distribution."""
    values = margins(logits, labels, against)
    return namespace(values).sort(values, axis=-1)


def about(call: str, means: Array, centre: Centre, counts: Any) -> Array:
    """Class means about the centre, (B, d, K)."""
    choice(call, "centre", centre, CENTRES)
    means = matrices(call, "means", means, "(B, d, K)")
    if means.shape[-1] < 2:
        raise ValueError(f"metrics.{call}: means has one column, but geometry needs at least two classes")
    if centre != "samples":
        return means if centre == "origin" else centred(means)
    if counts is None:
        raise ValueError(f"metrics.{call}: centre is 'samples', which needs the class counts; give counts=, or centre='classes'")
    n = positive(call, "counts", counts, means, means.shape[-1])
    C = centred(means)
    return C - C @ (n / namespace(n).sum(n, axis=-1, keepdims=True)).mT


def _both(call: str, W: Array, means: Array, centre: Centre, counts: Any) -> tuple[Array, Array]:
    """W (B, K, d) and the class means about the centre (B, d, K)."""
    W, C = matrices(call, "W", W, "(B, K, d)"), about(call, means, centre, counts)
    fits(call, "W", W, (C.shape[0], C.shape[2], C.shape[1]), "means")
    return W, C


def _cosines(call: str, means: Array, centre: Centre, counts: Any) -> Array:
    U = units(about(call, means, centre, counts))
    return pairs(U.mT @ U)


def normalised(A: Array) -> Array:
    """<A>, with <0> = 0; scaled by the largest entry first, so that no square is lost."""
    xp = namespace(A)
    A = quotient(A, xp.max(xp.abs(A), axis=(1, 2), keepdims=True))
    return quotient(A, xp.linalg.matrix_norm(A, keepdims=True))


def _moments(values: Array) -> Moments:
    xp = namespace(values)
    mean = xp.mean(values, axis=-1)
    with np.errstate(invalid="ignore"):
        return Moments(mean, xp.mean((values - mean[:, None]) ** 2, axis=-1))
