"""Ratios of the closed form to pymanopt's trust regions, one process, one thread, in turns: `pytest tests/benchmarks -s`.

Nothing here asserts a time. Two opponents: `stiefel.nearest_etf` (own gradient and Hessian product with what they share kept, polar
retraction), which is the better one, and pymanopt as shipped (its conversion of the Euclidean gradient and Hessian, QR retraction, its
own stopping rule at the same gradient norm). Both start at the same random point and stop at a gradient norm of TOL or less.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ufm import etf
from ufm.solvers.manifolds import Stiefel, draw
from ufm.solvers.stiefel import nearest_etf

Floats = NDArray[np.float64]
TOL = 1e-8


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    with threadpool_limits(1):
        yield


def means_of(d: int, K: int, condition: float | None) -> Floats:
    """Standard normal class means, or with geometrically spaced singular values down to 1/condition."""
    Y = np.random.default_rng([d, K]).standard_normal((d, K))
    if condition is None:
        return Y
    P, _, Qt = np.linalg.svd(Y - Y.mean(axis=1, keepdims=True), full_matrices=False)
    return np.asarray((P[:, : K - 1] * np.geomspace(1, 1 / condition, K - 1)) @ Qt[: K - 1])


def shipped(posed: etf.Posed, prox: Any, start: Floats) -> Any:
    """The same problem as its manual has it: Euclidean gradient and Hessian, everything else pymanopt's."""
    import pymanopt
    from pymanopt.manifolds import Stiefel as Manifold
    from pymanopt.optimizers import TrustRegions

    manifold, F, Y, delta = Manifold(*start.shape), posed.frame, posed.means, posed.delta
    near = np.zeros_like(start) if prox is None else prox
    curved = 2 * F.T @ F + delta * np.eye(F.shape[1])

    @pymanopt.function.numpy(manifold)
    def cost(U: Floats) -> float:
        return float(np.sum((Y - U @ F.T) ** 2) + 0.5 * delta * np.sum((U - near) ** 2))

    @pymanopt.function.numpy(manifold)
    def gradient(U: Floats) -> Floats:
        return np.asarray(U @ curved - posed.A)

    @pymanopt.function.numpy(manifold)
    def hessian(U: Floats, V: Floats) -> Floats:
        return np.asarray(V @ curved)

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    return TrustRegions(verbosity=0, min_gradient_norm=TOL, max_time=np.inf).run(problem, initial_point=start)


FULL = dict(form="full", delta=1e-3)
CASES = [
    pytest.param(512, 100, None, {}, id="512-100-random"),
    pytest.param(512, 100, None, FULL, id="512-100-random-full"),
    pytest.param(512, 10, None, {}, id="512-10-random"),
    pytest.param(512, 10, None, FULL, id="512-10-random-full"),
    pytest.param(512, 10, 1e6, {}, id="512-10-condition-1e6"),
    pytest.param(512, 10, 1e8, {}, id="512-10-condition-1e8"),
    pytest.param(512, 100, 1e6, {}, id="512-100-condition-1e6", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("d", "K", "condition", "options"), CASES)
def test_closed_form_against_trust_regions(benchmark: Any, d: int, K: int, condition: float | None, options: dict[str, Any]) -> None:
    """The forward solution alone, record included."""
    means = means_of(d, K, condition)
    shape = (d, K if options else K - 1)
    start = draw(Stiefel(*shape), np.random.default_rng(1))
    prox = draw(Stiefel(*shape), np.random.default_rng(2)) if options else None
    options = dict(options, prox=prox)
    posed = etf.pose("benchmark", means, **options)

    def ours() -> Any:
        return etf.nearest(means, **options)

    def tuned() -> Any:
        return nearest_etf(means, **options, start=start, tol=TOL)

    def plain() -> Any:
        return shipped(posed, prox, start)

    slow = condition is not None and K > 10
    closed, calls = ours(), [(ours, 50), (tuned, 1), *([] if slow else [(plain, 1)])]
    least = [np.inf] * len(calls)
    for _ in range(5 if condition is None else 1):
        for i, (call, times) in enumerate(calls):
            began = time.process_time()
            for _ in range(times):
                found = call()
            least[i] = min(least[i], (time.process_time() - began) / times)
            if call is tuned:
                assert found.success
                assert np.sum(found.U * posed.A) == pytest.approx(np.sum(closed.U * posed.A), rel=1e-9)
            elif call is plain:
                assert found.gradient_norm <= TOL or condition is not None
                assert np.sum(found.point * posed.A) == pytest.approx(np.sum(closed.U * posed.A), rel=1e-6)
    ratios = [t / least[0] for t in least[1:]]
    names = ("tuned", "shipped")
    benchmark.extra_info |= {"ours_s": least[0], **{f"{name}_ratio": r for name, r in zip(names, ratios, strict=False)}}
    said = ", ".join(f"{name} {1e3 * t:.1f} ms, ratio {r:.0f}" for name, t, r in zip(names, least[1:], ratios, strict=False))
    print(f"\nnearest ETF (closed by {closed.method}) {1e6 * least[0]:.0f} microseconds of CPU; trust regions to {TOL:.0e}: {said}")
    benchmark.pedantic(ours, rounds=20)
