"""Dot regression end to end: its proof, its known optimum, and the plain answers where theory and catalogue have nothing to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ufm
from ufm.losses import Targets
from ufm.theory import mse

COUNTS = np.array([[5, 3, 2], [4, 4, 4]])


def problem(**changes: Any) -> ufm.Problem:
    options = dict(counts=COUNTS, width=4, features="free", loss=ufm.DotRegression(), lam_w=0.02, lam_h=0.01) | changes
    return ufm.Problem(options.pop("counts"), **options)


@pytest.mark.parametrize("features", ["free", "relu"])
@pytest.mark.parametrize("columns", ["means", "samples"])
def test_the_optimum_is_that_of_squared_error(features: Any, columns: Any) -> None:
    """Without bias ||Z D^{1/2}||_* >= tr(Z D^{1/2}) makes a diagonal Z optimal, as for squared error: the same value, proven by solve."""
    counts = COUNTS if columns == "means" else COUNTS[0]
    grid = problem(counts=counts, features=features, columns=columns)
    found = ufm.solve(grid, runs=2, seed=0)
    exact = mse.optimal_value(grid.counts, grid.samples, np.full((grid.cells, 1), 0.02), np.full(grid.cells, 0.01))
    assert np.all(found.gap <= 1e-9)
    assert found.value == pytest.approx(np.repeat(exact, 2), rel=1e-8)
    assert np.all(ufm.certify(grid, found.factors).lower <= np.repeat(exact, 2) * (1 + 1e-12))


def test_the_geometry_is_not_determined() -> None:
    """Optimal logits are positive semidefinite with that diagonal once their columns are weighted: two starts end at different ones."""
    grid = problem().cell(1)
    found = ufm.solve(grid, runs=2, seed=0)
    assert np.max(np.abs(found.logits[0] - found.logits[1])) > 0.05
    for Z in found.logits:
        assert np.diagonal(Z) == pytest.approx(np.full(3, np.diagonal(Z)[0]), rel=1e-3)
        assert np.max(np.abs(Z - Z.T)) < 1e-3
        assert np.linalg.eigvalsh(Z + Z.T).min() > -1e-3


def test_a_free_bias_does_all() -> None:
    """b = 1 leaves no loss, so that everything else vanishes; the dual point of a free bias is zero and proves exactly that."""
    grid = problem(lam_b=0.0)
    found = ufm.solve(grid, runs=1)
    assert np.max(found.value) < 1e-12
    assert found.factors[2] == pytest.approx(1.0, abs=1e-6)
    assert np.all(ufm.certify(grid, found.factors).lower == 0)


def test_nothing_is_claimed_elsewhere() -> None:
    """No theorem, no bound for chains, no level of a structure."""
    with pytest.raises(ufm.NoTheory, match="loss is mean squared error"):
        ufm.predict(problem())
    deep = problem(depth=2)
    found = ufm.solve(deep, runs=1)
    assert np.all(np.isnan(found.gap))
    assert set(ufm.certify(deep, found.factors).bound) == {"no bound for this depth and loss"}
    assert np.all(np.isnan(ufm.classify(deep, found.factors).level))


def test_conjugate_domain() -> None:
    """Finite where slopes of wrong classes are zero, and (1 + g)^2/2 - 1/2 there; a class without columns is recentred without a NaN."""
    onehot = np.eye(3)[None, :, :2]  # the third class has no column
    T, loss = Targets(onehot, 1 - onehot), ufm.DotRegression()
    G = onehot * np.array([2.0, -0.5])
    assert loss.conjugate(G, T) == pytest.approx(np.array([[4.0, -0.375]]))
    for j, c in ((1, 0), (2, 1), (0, 1)):
        off = np.array(G)
        off[0, j, c] = 1e-300
        assert np.isinf(loss.conjugate(off, T)).tolist() == [[c == 0, c == 1]]
    assert np.all(loss.recentre(G, T, np.ones((1, 2))) == 0)
