"""F of one run as a textbook would compute it by hand: loops over layers, columns and entries, on lists of Python floats.

    F = sum_c (m_c/N) loss(Z_:c, y_c) + sum_l (lam_w[l]/2)||W_l||^2 + (lam_h/2) sum_c m_c ||H_:c||^2 + (lam_b/2)||b||^2

The slow and obvious oracle of `ufm.objective`: it reads the options a problem was given and calls no formula of the package.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

Row = list[float]


def value(problem: Any, cell: int, factors: Any) -> float:
    """F of one run of one cell, at its factors (H, W_1, ..., W_L[, b]) without the batch axis."""
    loss, penalty = parts(problem, cell, factors)
    return loss + penalty


def parts(problem: Any, cell: int, factors: Any) -> tuple[float, float]:
    """The losses' sum and the penalties' sum."""
    counts, L = [int(n) for n in problem.counts[cell]], problem.depth
    H, weights, biases = listed(factors[0]), [listed(W) for W in factors[1 : L + 1]], [listed(b) for b in factors[L + 1 :]]
    assert len(weights) == L
    assert len(biases) == (problem.lam_b is not None)
    loss = penalty = 0.0
    for c, (y, m) in enumerate(columns(problem, cell)):
        h = [row[c] for row in H]
        if problem.features == "relu_of_free":
            h = [max(x, 0.0) for x in h]
        z = logits(problem, h, weights, biases)
        loss += m / sum(counts) * column_loss(problem.loss, cell, counts, z, y)
        penalty += float(problem.lam_h[cell]) / 2 * m * squares([h])
    for lam, W in zip(problem.lam_w[cell], weights, strict=True):
        penalty += float(lam) / 2 * squares(W)
    for b in biases:
        penalty += float(problem.lam_b[cell]) / 2 * squares(b)
    return loss, penalty


def listed(matrix: Any) -> list[Row]:
    return [[float(x) for x in row] for row in matrix]


def squares(matrix: list[Row]) -> float:
    return sum(x * x for row in matrix for x in row)


def columns(problem: Any, cell: int) -> list[tuple[int, int]]:
    """(class, samples it stands for) of each column, classes in order."""
    counts = [int(n) for n in problem.counts[cell]]
    if problem.columns == "means":
        return list(enumerate(counts))
    return [(k, 1) for k, n in enumerate(counts) for _ in range(n)]


def logits(problem: Any, h: Row, weights: list[list[Row]], biases: list[list[Row]]) -> Row:
    """z of one column: every weight matrix in turn, a ReLU between two of them if the problem has it, the bias last."""
    for i, W in enumerate(weights):
        h = [sum(w * x for w, x in zip(row, h, strict=True)) for row in W]
        if problem.activation == "relu" and i < len(weights) - 1:
            h = [max(x, 0.0) for x in h]
    for b in biases:
        h = [x + b[j][0] for j, x in enumerate(h)]
    return h


def column_loss(loss: Any, cell: int, counts: list[int], z: Row, y: int) -> float:
    """The loss of one sample of class y with logits z."""
    K = len(z)
    if loss.name == "autograd":
        import autograd.numpy as anp

        return float(loss.function(anp.array(z), anp.array([float(j == y) for j in range(K)])))
    if loss.name == "MSE":
        return sum((z[j] - float(j == y)) ** 2 for j in range(K)) / 2
    if loss.name == "DR":
        return (z[y] - 1) ** 2 / 2
    if loss.name == "focal":
        log_p = log_softmax(z)[y]
        return (1 - math.exp(log_p)) ** loss.gamma * -log_p
    tau = [entry(loss.temperature, cell, j) for j in range(K)]
    u = [z[j] / tau[j] + adjustment(loss, cell, counts, j) for j in range(K)]
    target = [(1 - loss.label_smoothing) * float(j == y) + loss.label_smoothing / K for j in range(K)]
    omega = 1.0 if loss.class_weights is None else entry(loss.class_weights, cell, y)
    return -omega * sum(t * log_p for t, log_p in zip(target, log_softmax(u), strict=True))


def log_softmax(z: Row) -> Row:
    total = math.log(sum(math.exp(x - max(z)) for x in z)) + max(z)
    return [x - total for x in z]


def adjustment(loss: Any, cell: int, counts: list[int], k: int) -> float:
    """What is added to logit k: as given per class, or tau log(n_k/N) for a single number tau."""
    if loss.logit_adjustment is None:
        return 0.0
    given = entry(loss.logit_adjustment, cell, k)
    return given if loss.logit_adjustment.ndim else given * math.log(counts[k] / sum(counts))


def entry(parameter: Any, cell: int, k: int) -> float:
    """A loss parameter of class k: one number for all, one a class, or one a class of each cell."""
    if parameter.ndim == 2:
        return float(parameter[cell][k])
    return float(parameter[k]) if parameter.ndim else float(parameter)


def expanded(problem: Any, cell: int, factors: Any) -> tuple[Any, list[Any]]:
    """A problem of class means as one of samples, and a run's factors with every class mean given to all samples of its class."""
    H = [[x for x, n in zip(row, problem.counts[cell], strict=True) for _ in range(int(n))] for row in listed(factors[0])]
    return replace(problem, columns="samples"), [H, *factors[1:]]
