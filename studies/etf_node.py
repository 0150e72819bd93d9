"""The gradient of the nearest simplex ETF by the dense linear system of a declarative node: slow, obvious, and no part of `ufm`.

Single problems in numpy, float64. The system is the one that the layer of Markou, Ajanthan and Gould (NeurIPS 2024) solves in its backward
pass: the implicit-function theorem for min f(U, Y) subject to U^T U = I, with Y the normalised class means and f of `dense_gradient`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def constraint_jacobian(U: Floats) -> Floats:
    """The derivative of (U^T U)_ij, i >= j, in U, (m(m+1)/2, d m)."""
    d, m = U.shape
    A = np.zeros((m * (m + 1) // 2, d, m))
    for row, (i, j) in enumerate(zip(*np.tril_indices(m), strict=True)):
        A[row, :, i] += U[:, j]
        A[row, :, j] += U[:, i]
    return A.reshape(len(A), d * m)


def dense_gradient(Y: Floats, F: Floats, U: Floats, grad_U: Floats, prox: Floats | None = None, delta: float = 0.0) -> Floats:
    """The gradient in Y, (d, K), of a function with gradient grad_U at U = argmin of ||Y - U F^T||_F^2 + (delta/2) ||U - prox||_F^2.

    Dy = H^-1 A^T (A H^-1 A^T)^-1 A H^-1 B - H^-1 B,   H = I_d (x) (2 F^T F + delta I - Sigma),   Sigma = sym(U^T f_U),   B = -2 I (x) F^T
    """
    d, m = U.shape
    f_U = 2 * (U @ F.T - Y) @ F + (delta * (U - prox) if prox is not None else 0)
    multiplier = 0.5 * (U.T @ f_U + f_U.T @ U)
    block = 2 * F.T @ F + delta * np.eye(m) - multiplier
    A = constraint_jacobian(U)

    def solve(rows: Any) -> Floats:
        """rows H^-1, (n, d m)."""
        return np.asarray(np.linalg.solve(block, rows.reshape(-1, m).T).T.reshape(-1, d * m))

    w = -solve(grad_U.reshape(1, -1))
    t = solve(A)
    s = np.linalg.solve(A @ t.T, -A @ w[0])
    return np.asarray(-2 * (w[0] + t.T @ s).reshape(d, m) @ F.T)


def normalised(means: Floats) -> Floats:
    """Class means about their mean, of unit Frobenius norm."""
    B = means - means.mean(axis=1, keepdims=True)
    return np.asarray(B / np.linalg.norm(B))


def dense_pullback(means: Floats, grad_W: Floats, F: Floats, U: Floats, prox: Floats | None = None, delta: float = 0.0) -> Floats:
    """The gradient in the class means, (d, K), from one in W = sqrt(K) F U^T, (K, d), at the solution U of their problem."""
    Y = normalised(means)
    g = dense_gradient(Y, F, U, np.sqrt(means.shape[1]) * grad_W.T @ F, prox, delta)
    size = np.linalg.norm(means - means.mean(axis=1, keepdims=True))
    g = (g - np.sum(g * Y) * Y) / size
    return np.asarray(g - g.mean(axis=1, keepdims=True))


def layer_bytes(d: int, K: int, itemsize: int) -> int:
    """What the released layer holds for its backward pass: the constraints' Hessians and Jacobian, B, and their solutions."""
    return itemsize * (K**3 * (K + 1) // 2 + d * K**3 + d * K**2 * (K + 1))


def layer_flops(d: int, K: int) -> float:
    """What its backward pass computes, to leading order."""
    return 1.5 * d * float(K) ** 5
