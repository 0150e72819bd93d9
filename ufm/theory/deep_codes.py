"""Codes: families of class-logit matrices with one scale or a few, and the stationary scales at a lambda_eff.

    F(M) = mean_c CE(m_c) + (lambda_eff/2)(L+1) sum_i s_i(M)^p,   p = 2/(L+1)

Where a permutation group of the classes fixes M = sum_j sigma_j P_j, P_j on pairwise inequivalent irreducible parts, stationarity in
the sigma_j alone makes M critical. A `Code` has scales that decouple, a `Tied` code has a few that do not; both offer the same methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ufm.records import NoTheory
from ufm.theory import deep_scale
from ufm.theory.deep_scale import Branch, Part

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Code:
    """Scales that decouple, one a Part; `pattern` makes M (..., K, K) of them; `rest` is the loss of columns at zero."""

    name: str
    classes: int
    parts: tuple[Part, ...]
    pattern: Callable[[Floats], Floats]
    rest: float = 0.0

    def scales(self, lam: Floats, depth: int, branch: Branch) -> Floats:
        """The stationary scales, (..., S), NaN where one of them does not exist."""
        each = [deep_scale.scale(of, lam, depth, branch) for of in self.parts]
        x = np.stack(each, axis=-1) if each else np.zeros((*lam.shape, 0))
        return np.where(np.isnan(x).any(axis=-1, keepdims=True), np.nan, x)

    def fit(self, x: Floats) -> Floats:
        """Mean cross-entropy at scales x."""
        return np.asarray(sum((deep_scale.fit(of, x[..., i]) for i, of in enumerate(self.parts)), np.full(x.shape[:-1], self.rest)))

    def spectrum(self, x: Floats) -> tuple[Floats, Floats]:
        """Nonzero singular values (..., R) and their multiplicities (R,)."""
        parts = [x[..., i, None] * of.sigma for i, of in enumerate(self.parts)]
        return np.concatenate([np.zeros((*x.shape[:-1], 0)), *parts], axis=-1), np.concatenate([[], *(of.rank for of in self.parts)])

    def margin_constant(self, depth: int) -> float:
        """sum_i s_i^p at unit margin: value ~ (lambda/2)(L+1) R (log 1/lambda)^p as lambda -> 0; infinite if a class has no margin."""
        if self.rest:
            return np.inf
        p = deep_scale.exponent(depth)
        return float(sum(deep_scale.cost(of, depth) * of.gaps.min() ** -p for of in self.parts))


@dataclass(frozen=True, eq=False)
class Tied:
    """Scales x (..., S) that do not decouple: gaps are linear in x and squared singular values are sums of form_rs x_s^2.

    columns: (weight, gaps (J, S), multiplicity (J,)) each; forms (R, S); ranks (R,); start(lam, depth) -> x; limit: x at unit margin.
    """

    name: str
    classes: int
    columns: tuple[tuple[float, Floats, Floats], ...]
    forms: Floats
    ranks: Floats
    start: Callable[[Floats, int], Floats]
    limit: Floats
    pattern: Callable[[Floats], Floats]

    def scales(self, lam: Floats, depth: int, branch: Branch) -> Floats:
        """The minimum over x that Newton's method reaches from `start`, (..., S); NaN where it finds none. No small root."""
        if branch != "large":
            raise NoTheory(f"deep_codes: the small root of {self.name} is not known")
        level = np.where((lam > 0) & np.isfinite(lam), lam, 1.0)
        x = self.start(level, depth)
        for _ in range(NEWTON):
            g, H = self._slope_and_curve(x, level, depth)
            unit = np.abs(np.diagonal(H, axis1=-2, axis2=-1)).max(axis=-1)[..., None]
            values, vectors = np.linalg.eigh(H / unit[..., None])
            along = (vectors.mT @ (g / unit)[..., None])[..., 0] / np.maximum(np.abs(values), 1e-12)
            step = (vectors @ along[..., None])[..., 0]
            reach = 0.3 * np.linalg.norm(x, axis=-1) / np.maximum(np.linalg.norm(step, axis=-1), 1e-300)
            x = x - np.minimum(reach, 1.0)[..., None] * step
            if np.all(reach >= 3e8):  # the step just made squared this
                break
        g, H = self._slope_and_curve(x, level, depth)
        singular, _ = self.spectrum(x)
        size = level[..., None] * singular.max(axis=-1, keepdims=True) ** (deep_scale.exponent(depth) - 1)
        kept = (singular > 1e-3 * self.spectrum(self.limit)[0]).all(axis=-1)
        found = (np.abs(g) <= 1e-10 * size).all(axis=-1) & (np.linalg.eigvalsh(H)[..., 0] > 0) & kept
        return np.where((found & (lam > 0))[..., None], x, np.nan)

    def _slope_and_curve(self, x: Floats, lam: Floats, depth: int) -> tuple[Floats, Floats]:
        """Gradient (..., S) and Hessian (..., S, S) of F in x."""
        p, S = deep_scale.exponent(depth), x.shape[-1]
        g, H = np.zeros(x.shape), np.zeros((*x.shape, S))
        for weight, gaps, multiplicity in self.columns:
            E = multiplicity * np.exp(np.minimum(-(x @ gaps.T), 600.0))  # (..., J)
            P = E / (1 + E.sum(axis=-1, keepdims=True))
            first = P @ gaps
            g -= weight * first
            H += weight * ((P[..., None, :] * gaps.T) @ gaps - first[..., :, None] * first[..., None, :])
        for form, rank in zip(self.forms, self.ranks, strict=True):
            q, Qx = np.maximum((form * x * x).sum(axis=-1)[..., None], 1e-300), form * x
            scale = rank * lam[..., None] * q ** (p / 2 - 1)
            g += scale * Qx
            H += scale[..., None] * (np.diag(form) + (p - 2) * Qx[..., :, None] * (Qx / q)[..., None, :])
        return g, H

    def fit(self, x: Floats) -> Floats:
        """Mean cross-entropy at scales x."""
        return np.asarray(sum(w * np.log1p((m * np.exp(-(x @ gaps.T))).sum(axis=-1)) for w, gaps, m in self.columns))

    def spectrum(self, x: Floats) -> tuple[Floats, Floats]:
        """Nonzero singular values (..., R) and their multiplicities (R,)."""
        return np.sqrt((x * x) @ self.forms.T), self.ranks

    def margin_constant(self, depth: int) -> float:
        """sum_i s_i^p at unit margin, as for `Code`."""
        singular, ranks = self.spectrum(self.limit)
        return float((ranks * singular ** deep_scale.exponent(depth)).sum())


NEWTON = 80
