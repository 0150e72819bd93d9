"""Counts, means, variances and within-class covariance per class: all that the variability metrics need of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ufm.arrays import Array, column_sums, namespace, readable
from ufm.metrics.door import fits, matrices, membership, positive, residuals


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """First and second moments of the samples of each class.

    counts n_k (B, K), multiplicities summed; means mu_k (B, d, K); variances v_k (B, K), the mean squared distance to mu_k.
    With U an orthonormal basis of the span of the class means about their unweighted mean, m = min(d, K) columns: coordinates
    U^T (mu_k - mean of the mu), (B, m, K), and within = U^T Sigma_W U, (B, m, m), Sigma_W = (1/N) sum (x - mu_y)(x - mu_y)^T.
    Every Sigma_B lies in this span, whatever its centre and weights.
    """

    counts: Array
    means: Array
    variances: Array
    coordinates: Array
    within: Array


def class_statistics(H: Array, labels: Any, classes: int, multiplicity: Any = None) -> ClassStatistics:
    """Moments of features H (B, d, cols) with labels (cols,) or (B, cols) in 0 ... classes - 1, from residuals, without d x d matrices.

    multiplicity (cols,) or (B, cols): the samples a column stands for (1 by default; n_k where columns are class means, which leaves
    zero variances). Any d, N and K. ValueError for labels out of range and for a class without samples.
    """
    H = matrices("class_statistics", "H", H, "(B, d, cols)")
    xp = namespace(H)
    member = membership("class_statistics", labels, classes, H)
    ones = np.ones(H.shape[-1])
    weight = positive("class_statistics", "multiplicity", ones if multiplicity is None else multiplicity, H, H.shape[-1])
    counts = column_sums(member * weight.mT)  # (B or 1, 1, K)
    nobody_missing("class_statistics", counts)
    means, rest = residuals(H, member, weight)
    squares = column_sums(rest * rest) * weight
    basis, coordinates = _span(means)
    inside = basis.mT @ rest * xp.sqrt(weight / xp.sum(counts, axis=-1, keepdims=True))  # (B, m, cols)
    spread = squares @ member / counts
    return ClassStatistics(xp.broadcast_to(counts[:, 0, :], spread[:, 0, :].shape), means, spread[:, 0, :], coordinates, inside @ inside.mT)


def from_scatter(counts: Any, means: Array, variances: Array, scatter: Array) -> ClassStatistics:
    """The same record from class means (B, d, K), variances (B, K) and Sigma_W itself, (B, d, d), for who sees the samples in turn."""
    means = matrices("from_scatter", "means", means, "(B, d, K)")
    scatter = matrices("from_scatter", "scatter", scatter, "(B, d, d)")
    fits("from_scatter", "scatter", scatter, (means.shape[0], means.shape[1], means.shape[1]), "means")
    n = positive("from_scatter", "counts", counts, means, means.shape[-1])[:, 0, :]
    v = matrices("from_scatter", "variances", variances[:, None, :], "(B, 1, K)")[:, 0, :]
    basis, coordinates = _span(means)
    return ClassStatistics(namespace(n, v).broadcast_to(n, v.shape), means, v, coordinates, basis.mT @ scatter @ basis)


def centred(means: Array) -> Array:
    """Class means (B, d, K) about their unweighted mean."""
    return means - namespace(means).mean(means, axis=-1, keepdims=True)


def _span(means: Array) -> tuple[Array, Array]:
    """Basis (B, d, m) and coordinates (B, m, K) of the centred class means."""
    basis, coordinates = namespace(means).linalg.qr(centred(means), mode="reduced")
    return basis, coordinates


def nobody_missing(call: str, counts: Array) -> None:
    """Refuse class counts (B, 1, K) with a zero in some run."""
    if readable(counts) and not bool(namespace(counts).all(counts > 0)):
        K = counts.shape[-1]
        absent = [k for k in range(K) if not bool(namespace(counts).all(counts[:, 0, k] > 0))]
        raise ValueError(
            f"metrics.{call}: class {absent[0]} of {K} has no samples in some run, hence no mean; number the classes that occur"
        )
