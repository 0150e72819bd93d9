"""Features and weights on spheres or with orthonormal columns: the exact floors, another route to the same value, the door."""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest

import ufm
from ufm.records import Stop
from ufm.solvers.constrained import constrained
from ufm.solvers.manifolds import Flat, Manifold, Oblique, Stiefel
from ufm.solvers.riemannian import STEPS
from ufm.solvers.stiefel import minimise


def on_sphere(K: int, d: int, n: int = 1, radius: float = 5.0, head: Any = None, **options: Any) -> ufm.Problem:
    head = ufm.heads.UnitRows() if head is None else head
    counts = options.pop("counts", ufm.counts.balanced(K, n))
    return ufm.Problem(counts, width=d, features="free", lam_w=options.pop("lam_w", 0), lam_h=0, radius=radius, head=head, **options)


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize(
    ("K", "d", "columns"), [(2, 2, "means"), (4, 3, "means"), (4, 4, "means"), (10, 16, "samples"), (10, 512, "means")]
)
@pytest.mark.parametrize("orthonormal", [(), ("weights",), ("weights", "features")])
def test_floors(K: int, d: int, columns: Any, orthonormal: tuple[str, ...], solver: Any) -> None:
    """Balanced cross-entropy: log(1 + (K-1) e^-m), m = tau K/(K-1) sqrt(1 - |mean row|^2), attained and never passed.

    Unit rows can sum to zero, orthonormal ones have |mean row|^2 = 1/K; with orthonormal features too, W H = tau R with R a rotation
    at best the identity: m = tau.
    """
    if orthonormal and (d < K or columns == "samples"):
        pytest.skip("no such frame")
    tau = 5.0
    found = constrained(on_sphere(K, d, 3, tau, columns=columns), orthonormal=orthonormal, solver=solver, tol=1e-8)
    margin = {0: K / (K - 1), 1: np.sqrt(K / (K - 1)), 2: 1.0}[len(orthonormal)] * tau
    floor = np.log1p((K - 1) * np.exp(-margin))
    assert found.run.success
    assert found.run.stop is Stop.GRADIENT
    assert found.run.value == pytest.approx(floor, abs=1e-14 + found.run.gradient_norm**2 / floor)  # the curvature is about the floor
    assert found.run.value >= floor - 1e-15
    H, W = found.factors
    Z = W @ H
    labels = np.repeat(np.arange(K), 3 if columns == "samples" else 1)
    direct = np.mean(np.log(np.exp(Z - Z[labels, np.arange(len(labels))]).sum(axis=0)))
    assert direct == pytest.approx(found.run.value, abs=1e-14)
    assert np.abs(np.linalg.norm(H, axis=0) - tau).max() < 1e-13
    assert np.abs(np.linalg.norm(W, axis=1) - 1).max() < 1e-13
    if orthonormal:
        assert np.abs(W @ W.T - np.eye(K)).max() < 1e-13


@pytest.mark.parametrize("bias", [None, 0.0, 0.02])
@pytest.mark.parametrize(
    ("head", "orthonormal"),
    [(ufm.heads.UnitRows(), ()), (ufm.heads.Learned(), ()), (ufm.heads.Learned(), ("weights",)), (ufm.heads.UnitRows(), ("features",))],
)
def test_against_autograd(head: Any, orthonormal: tuple[str, ...], bias: float | None) -> None:
    """Imbalanced classes, a bias, weights of three kinds: value and gradient norm of the objective written out for autograd."""
    counts, d, tau = np.array([20, 5, 3]), 5, 2.0
    free = isinstance(head, ufm.heads.Learned) and not orthonormal
    problem = on_sphere(3, d, counts=counts, radius=tau, head=head, lam_w=0.01 if free else 0, lam_b=bias)
    found = constrained(problem, orthonormal=orthonormal, seed=2)
    share, eye = counts / counts.sum(), np.eye(3)

    def cost(X: Any, V: Any, *b: Any) -> Any:
        Z = tau * anp.dot(anp.transpose(V), X) + (b[0] if b else 0.0)
        Z = Z - anp.sum(Z * eye, axis=0)
        penalty = 0.005 * anp.sum(V * V) * free + (0.5 * (bias or 0.0) * anp.sum(b[0] ** 2) if b else 0.0)
        return anp.sum(share * anp.log(anp.sum(anp.exp(Z), axis=0))) + penalty

    kinds: dict[bool, Any] = {True: Stiefel, False: Oblique}
    weights: Manifold = Flat((d, 3)) if free else kinds["weights" in orthonormal or not isinstance(head, ufm.heads.UnitRows)](d, 3)
    manifolds: list[Manifold] = [kinds["features" in orthonormal](d, 3), weights]
    manifolds += [] if bias is None else [Flat((3, 1))]
    theirs = minimise(cost, *manifolds, seed=2, tol=1e-9)
    assert found.run.success
    assert theirs.success
    assert found.run.value == pytest.approx(theirs.value, abs=1e-13)
    early = constrained(problem, orthonormal=orthonormal, seed=2, max_steps=2, tol=1e-3)
    same = minimise(cost, *manifolds, start=list(early.run.points), tol=1e9)
    assert early.run.gradient_norm == pytest.approx(same.gradient_norm, rel=1e-8, abs=1e-13)
    assert len(found.factors) == (2 if bias is None else 3)


def test_asked_for_too_much() -> None:
    """The sphere-constrained model with a gradient norm below rounding: it ends by itself, soon, and does not claim it."""
    run = constrained(on_sphere(10, 16, 10, columns="samples"), tol=1e-18).run
    assert (run.stop, run.success) == (Stop.STALLED, False)
    assert run.iterations < 100
    assert run.gradient_norm < 1e-13


FREE: Any = dict(width=4, features="free", lam_w=0.1, lam_h=0.1)
BAD = {
    "cells": (lambda: constrained(ufm.Problem([[2, 1], [1, 1]], **FREE)), "constrained: the problem has 2 cells"),
    "depth": (lambda: constrained(ufm.Problem([2, 1], **FREE, depth=2)), "constrained: the problem has 1 cells, depth 2"),
    "name": (lambda: constrained(on_sphere(3, 4), orthonormal=("rows",)), "constrained: orthonormal is"),
    "narrow": (lambda: constrained(on_sphere(3, 2), orthonormal=("weights",)), "constrained: 3 orthonormal weights need width 3"),
    "samples": (
        lambda: constrained(on_sphere(3, 4, 2, columns="samples"), orthonormal=("features",)),
        "constrained: 6 orthonormal features need width 6.*columns='means'",
    ),
    "free": (lambda: constrained(on_sphere(3, 4, head=ufm.heads.Learned())), "constrained: the weights are free and without a penalty"),
    "tol": (lambda: constrained(on_sphere(3, 4), tol=-1), "tol is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_no_problem() -> None:
    with pytest.raises(TypeError, match="constrained: problem is 3"):
        constrained(3)  # type: ignore[arg-type]
