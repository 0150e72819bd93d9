"""How the classifier W of a problem comes about: options only; `ufm.headed` moves features and weights with them.

A head that is not trained has a bias of its own, b = -W mu_G with mu_G the mean of the features over samples: "attached" where
the gradient sees it as that function, "detached" where as a constant, None for none. Adding a head is adding a class and a line in TABLE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ufm import etf, etf_policies
from ufm.arrays import Array, to_numpy
from ufm.frames import helmert, simplex_etf

Floats = NDArray[np.float64]
Bias = Literal["attached", "detached"] | None
BIASES = ("attached", "detached", None)
STIEFEL = "ufm.solvers.stiefel:nearest_etf"  # named, not imported: it stands storeys above, and needs pymanopt


@dataclass(frozen=True)
class Learned:
    """W is trained, with its penalty and, where lam_b is given, a trained bias: the plain model."""

    name: ClassVar[str] = "Learned"
    trained: ClassVar[bool] = True
    bias: ClassVar[Bias] = None
    norms: ClassVar[str | None] = None

    def check(self, classes: int, width: int) -> None:
        """Any sizes will do."""


@dataclass(frozen=True)
class UnitRows:
    """W is trained, its rows renormalised to norm 1 at the start and after every step; a bias is trained where lam_b is given."""

    name: ClassVar[str] = "UnitRows"
    trained: ClassVar[bool] = True
    bias: ClassVar[Bias] = None
    norms: ClassVar[str | None] = "keeps every row of W at norm 1"

    def check(self, classes: int, width: int) -> None:
        """Any sizes will do."""


@dataclass(frozen=True)
class FixedETF:
    """W = sqrt(K/(K-1)) (I - 11^T/K) P with orthonormal rows P (K, d), the same in every run, never trained.

    rotation: "canonical" (P = eye(K, d); at d = K - 1 the columns of `frames.simplex_etf`), or "random" (Haar, drawn from `seed`).
    """

    rotation: Literal["canonical", "random"] = "canonical"
    seed: int = 0
    bias: Bias = "detached"
    name: ClassVar[str] = "FixedETF"
    trained: ClassVar[bool] = False
    norms: ClassVar[str | None] = "fixes W"

    def __post_init__(self) -> None:
        one_of("FixedETF", "rotation", self.rotation, ("canonical", "random"))
        one_of("FixedETF", "bias", self.bias, BIASES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"heads.FixedETF: seed is {self.seed!r}, but must be a whole number, at least 0")

    def check(self, classes: int, width: int) -> None:
        wide_enough("FixedETF", classes, width, classes - 1)

    def weights(self, classes: int, width: int) -> Floats:
        """W (K, d)."""
        K = classes
        if self.rotation == "canonical":
            return np.pad(simplex_etf(K), ((0, 0), (0, width - K))) if width >= K else simplex_etf(K, width)
        Q, R = np.linalg.qr(np.random.default_rng(self.seed).standard_normal((width, K - 1)))
        return np.asarray(np.sqrt(K / (K - 1)) * helmert(K).T @ (Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)).T)


@dataclass(frozen=True, eq=False)
class NearestETF:
    """W is at every step the simplex ETF nearest to the running average of the class means of the features about mu_G; not trained.

    form, delta, relative_delta, weights (K,), method: of `etf.nearest`; prox, averaging, missing: policies of `ufm.etf_policies` (prox
    where delta > 0; no class is missing in full batches). gradient: whether the loss is differentiated through W too, with `guard` of
    `etf.pullback`. solver: "closed" form, "stiefel" (pymanopt, from the previous U), or a function with the options of
    `solvers.stiefel.nearest_etf` up to start. The source has form="full", delta=1e-3 (Markou, Ajanthan, Gould, NeurIPS 2024).
    """

    form: etf.Form = "reduced"
    delta: float = 0.0
    relative_delta: float | None = None
    weights: Any = None
    method: Literal["auto", "svd", "gram", "newton-schulz"] = "auto"
    prox: etf_policies.Proximal = field(default_factory=etf_policies.Lagged)
    averaging: etf_policies.Averaging = field(default_factory=etf_policies.Paper)
    missing: etf_policies.Missing = field(default_factory=etf_policies.Fixed)
    guard: float = 0.0
    gradient: bool = True
    bias: Bias = "attached"
    solver: Literal["closed", "stiefel"] | Callable[..., etf.NearestETF] = "closed"
    name: ClassVar[str] = "NearestETF"
    trained: ClassVar[bool] = False
    norms: ClassVar[str | None] = "computes W from the features"

    def __post_init__(self) -> None:
        one_of("NearestETF", "form", self.form, ("reduced", "full"))
        one_of("NearestETF", "method", self.method, ("auto", "svd", "gram", "newton-schulz"))
        one_of("NearestETF", "gradient", self.gradient, (True, False))
        one_of("NearestETF", "bias", self.bias, BIASES)
        if not callable(self.solver) and self.solver not in ("closed", "stiefel"):
            raise ValueError(f"heads.NearestETF: solver is {self.solver!r}, but must be 'closed', 'stiefel' or a function")
        for name, method in (("prox", "point"), ("averaging", "rate"), ("missing", "step")):
            policy = getattr(self, name)
            if isinstance(policy, type) or not hasattr(policy, method):
                raise TypeError(f"heads.NearestETF: {name} is {policy!r}, but must be a policy of ufm.etf_policies, called")
        if self.delta and self.relative_delta is not None:
            raise ValueError(
                f"heads.NearestETF: delta is {self.delta!r} and relative_delta {self.relative_delta!r}, but they are one number; give one"
            )
        for name in ("delta", "guard", "relative_delta"):
            value = getattr(self, name)
            missing = value is None and name == "relative_delta"
            if not missing and (isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < np.inf):
                raise ValueError(f"heads.NearestETF: {name} is {value!r}, but must be a finite number, at least 0")

    def check(self, classes: int, width: int) -> None:
        wide_enough("NearestETF", classes, width, classes - 1 if self.form == "reduced" else classes)
        w = np.ones(classes) if self.weights is None else np.asarray(to_numpy(self.weights), dtype=np.float64)
        if w.shape != (classes,) or not np.all((w >= 0) & np.isfinite(w)) or np.sum(w > 0) < 2:
            raise ValueError(
                f"Problem: head=NearestETF has weights {self.weights!r:.60}, but needs one >= 0 for each of {classes} classes, "
                "all finite and two above 0"
            )
        if isinstance(self.prox, etf_policies.Reference) and np.ndim(self.prox.U) != 2:
            raise ValueError(
                f"Problem: head=NearestETF has a reference of {np.ndim(self.prox.U)} axes, but needs one U (d, m) for all runs"
            )

    def nearest(self, means: Array, previous: Array | None) -> etf.NearestETF:
        """The ETF nearest to averaged class means (..., d, K), after the one whose U was `previous`."""
        near = self.prox.point(means, previous, self.form, self.weights) if self.delta or self.relative_delta else None
        posed = {"weights": self.weights, "prox": near, "delta": self.delta, "relative_delta": self.relative_delta, "form": self.form}
        if self.solver == "closed":
            return etf.nearest(means, method=self.method, **posed)
        solve = self.solver if callable(self.solver) else resolve_name(STIEFEL)
        found: etf.NearestETF = solve(means, start=near if previous is None else previous, **posed)
        return found


def one_of(head: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"heads.{head}: {name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def wide_enough(head: str, classes: int, width: int, least: int) -> None:
    if width < least:
        raise ValueError(
            f"Problem: width is {width}, but head={head} needs at least {least} for an ETF of {classes} classes; use width >= {least}"
        )


Head = Learned | UnitRows | FixedETF | NearestETF

TABLE: dict[str, type[Head]] = {"Learned": Learned, "UnitRows": UnitRows, "FixedETF": FixedETF, "NearestETF": NearestETF}
