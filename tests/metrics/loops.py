"""Every metric of one run as its formula is printed: loops over samples, classes and entries of numpy arrays. The slow, obvious oracle.

H (d, N), y (N,), means (d, K), W (K, d), b (K,), Z (K, N), n (K,). Covariances are formed as d x d matrices, and inverted as such.
"""

from __future__ import annotations

from itertools import combinations
from math import log, sqrt
from typing import Any

import numpy as np


def class_means(H: Any, y: Any, K: int, m: Any) -> Any:
    return np.array([sum(m[i] * H[:, i] for i in range(len(y)) if y[i] == k) / sum(m[y == k]) for k in range(K)]).T


def variances(H: Any, y: Any, K: int, m: Any) -> Any:
    mu = class_means(H, y, K, m)
    return np.array([sum(m[i] * np.sum((H[:, i] - mu[:, k]) ** 2) for i in range(len(y)) if y[i] == k) / sum(m[y == k]) for k in range(K)])


def sigma_w(H: Any, y: Any, K: int, m: Any) -> Any:
    mu = class_means(H, y, K, m)
    return sum(m[i] * np.outer(H[:, i] - mu[:, y[i]], H[:, i] - mu[:, y[i]]) for i in range(len(y))) / sum(m)


def centre_of(means: Any, n: Any, centre: str) -> Any:
    K = means.shape[1]
    share = {"classes": np.ones(K) / K, "samples": n / sum(n), "origin": np.zeros(K)}[centre]
    return sum(share[k] * means[:, k] for k in range(K))


def sigma_b(means: Any, n: Any, centre: str, weights: str) -> Any:
    K, g = means.shape[1], centre_of(means, n, centre)
    omega = n / sum(n) if weights == "samples" else np.ones(K) / K
    return sum(omega[k] * np.outer(means[:, k] - g, means[:, k] - g) for k in range(K))


def nc1(H: Any, y: Any, K: int, m: Any, centre: str, weights: str) -> float:
    mu, n = class_means(H, y, K, m), np.array([sum(m[y == k]) for k in range(K)])
    return float(np.trace(np.linalg.pinv(sigma_b(mu, n, centre, weights)) @ sigma_w(H, y, K, m)) / K)


def nc1_quotient(H: Any, y: Any, K: int, m: Any, centre: str, weights: str) -> float:
    mu, n = class_means(H, y, K, m), np.array([sum(m[y == k]) for k in range(K)])
    return float(np.trace(sigma_w(H, y, K, m)) / np.trace(sigma_b(mu, n, centre, weights)))


def cdnv(means: Any, v: Any, power: float) -> float:
    terms = [(v[k] + v[j]) / (2 * np.sum((means[:, k] - means[:, j]) ** 2) ** power) for k, j in combinations(range(len(v)), 2)]
    return float(sum(terms) / len(terms))


def nc4(H: Any, W: Any, b: Any, means: Any, m: Any) -> float:
    agree = 0.0
    for i in range(H.shape[1]):
        logits = [W[k] @ H[:, i] + b[k] for k in range(len(W))]
        apart = [np.sum((H[:, i] - means[:, k]) ** 2) for k in range(len(W))]
        agree += m[i] * float(logits.index(max(logits)) == apart.index(min(apart)))
    return float(agree / sum(m))


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / sqrt(a @ a) / sqrt(b @ b))


def nc5(means: Any, g: Any) -> float:
    return sum(abs(cosine(column, g)) for column in means.T) / means.shape[1]


def normalised(A: Any) -> Any:
    """A/||A||_F, and zero for zero."""
    length = sqrt(sum(x * x for x in A.flat))
    return A / length if length > 0 else A


def gram_distance(A: Any, T: Any) -> float:
    return sqrt(np.sum((normalised(A) - normalised(T)) ** 2))


def etf(K: int) -> Any:
    return np.array([[float(k == j) - 1 / K for j in range(K)] for k in range(K)])


def about(means: Any, n: Any, centre: str) -> Any:
    return means - centre_of(means, n, centre)[:, None]


def duality_variance(W: Any, C: Any) -> float:
    products = [W[k] @ C[:, k] for k in range(len(W))]
    mean = sum(products) / len(W)
    return sum((p - mean) ** 2 for p in products) / (len(W) - 1)


def duality_cosine(W: Any, C: Any) -> float:
    return sum(cosine(W[k], C[:, k]) for k in range(len(W))) / len(W)


def duality_distance(W: Any, C: Any) -> float:
    return sum(sqrt(np.sum((W[k] / sqrt(W[k] @ W[k]) - c / sqrt(c @ c)) ** 2)) for k, c in enumerate(C.T)) / len(W)


def vci(H: Any, y: Any, K: int, m: Any, weights: str, rcond: float) -> float:
    mu, n = class_means(H, y, K, m), np.array([sum(m[y == k]) for k in range(K)])
    between = sigma_b(mu, n, "samples", weights)
    total = between + sigma_w(H, y, K, m)
    return float(1 - np.trace(np.linalg.pinv(total, rcond=rcond) @ between) / min(len(H), K - 1))


def cosine_margins(H: Any, W: Any, y: Any, m: Any) -> list[float]:
    mean, rows = sum(m[i] * H[:, i] for i in range(len(y))) / sum(m), W - sum(W) / len(W)
    out = []
    for i in range(len(y)):
        c = [cosine(H[:, i] - mean, row) for row in rows]
        out.append(c[y[i]] - max(c[j] for j in range(len(W)) if j != y[i]))
    return out


def own_cosine(H: Any, W: Any, y: Any, m: Any) -> float:
    return sum(m[i] * cosine(H[:, i], W[y[i]]) for i in range(len(y))) / sum(m)


def nearest_etf(Y: Any) -> Any:
    """U Mt with U = A (A^T A)^{-1/2}, A = Y Q over an orthonormal basis Q of the vectors that sum to zero, by eigenvectors of A^T A."""
    K = Y.shape[1]
    Q = np.linalg.eigh(etf(K))[1][:, 1:]
    A = Y @ Q
    s, V = np.linalg.eigh(A.T @ A)
    return A @ V @ np.diag(s**-0.5) @ V.T @ Q.T / sqrt(K - 1)


def etf_distance(C: Any) -> float:
    """1 + ||Y||^2 - 2||Y M||_*/sqrt(K - 1), as printed."""
    Y, K = normalised(C), C.shape[1]
    return float(1 + np.sum(Y * Y) - 2 * sum(singular_values(Y @ etf(K))[: K - 1]) / sqrt(K - 1))


def nuclear_rank(A: Any) -> float:
    return float(np.linalg.norm(A, "nuc") ** 2 / np.sum(A * A))


def class_rank(H: Any, y: Any, K: int, m: Any) -> float:
    return sum(nuclear_rank(np.repeat(H[:, y == k], np.int64(m[y == k]), axis=1)) for k in range(K)) / K


def equinorm(C: Any) -> float:
    lengths = [sqrt(c @ c) for c in C.T]
    mean = sum(lengths) / len(lengths)
    return sqrt(sum((x - mean) ** 2 for x in lengths) / (len(lengths) - 1)) / mean


def cosines(C: Any) -> list[float]:
    return [cosine(C[:, k], C[:, j]) for k in range(C.shape[1]) for j in range(k)]


def moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((x - mean) ** 2 for x in values) / len(values)


def distances(C: Any) -> list[float]:
    U = [c / sqrt(c @ c) for c in C.T]
    return [sqrt(np.sum((a - b) ** 2)) for a, b in combinations(U, 2)]


def logs(C: Any) -> list[float]:
    return [-log(x) for x in distances(C)]


def margins(Z: Any, y: Any, against: str) -> list[float]:
    out = []
    for i in range(Z.shape[1]):
        others = [Z[j, i] for j in range(len(Z)) if j != y[i]]
        out.append(Z[y[i], i] - (max(others) if against == "max" else sum(others) / len(others)))
    return out


def nc2_w(W: Any, means: Any, n: Any) -> float:
    K = len(W)
    total = sum(sqrt(n[j]) * means[:, j] for j in range(K))
    return gram_distance(W, np.array([K * sqrt(n[k]) * means[:, k] - total for k in range(K)]))


def group_spread(Z: Any, groups: Any) -> list[float]:
    out = []
    for g in range(max(groups) + 1):
        inside = [Z[:, k] for k in range(Z.shape[1]) if groups[k] == g]
        mean = sum(inside) / len(inside)
        out.append(max(sqrt(np.sum((z - mean) ** 2)) for z in inside))
    return out


def distinct(Z: Any, rtol: float) -> int:
    longest, count = max(np.linalg.norm(z) for z in Z.T), 0
    for k in range(Z.shape[1]):
        count += all(np.linalg.norm(Z[:, k] - Z[:, j]) > rtol * longest for j in range(k))
    return count


def singular_values(A: Any) -> list[float]:
    """Square roots of the eigenvalues of the smaller of A A^T and A^T A."""
    small = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    return sorted((sqrt(max(x, 0.0)) for x in np.linalg.eigvalsh(small)), reverse=True)


def effective_rank(A: Any) -> float:
    s = singular_values(A)
    return float(np.exp(-sum(x / sum(s) * log(x / sum(s)) for x in s if x > 0)))


def balance(factors: Any, penalties: Any, m: Any) -> list[float]:
    out = []
    for i in range(len(factors) - 1):
        weight = np.diag(m) if i == 0 else np.eye(factors[i].shape[1])
        A = penalties[i + 1] * factors[i + 1].T @ factors[i + 1]
        B = penalties[i] * factors[i] @ weight @ factors[i].T
        out.append(sqrt(np.sum((A - B) ** 2)) / (sqrt(np.sum(A * A)) + sqrt(np.sum(B * B))))
    return out
