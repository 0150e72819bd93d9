"""What do the nearest simplex ETF and its gradient cost? Time and peak memory over K and d, three routes, a bare thin SVD as the unit.

Routes: the closed form (`ufm.etf`, the back end it chooses, and each one by name); pymanopt's trust regions from a random start
(`ufm.solvers.stiefel`, forward; its backward is our pullback); the dense linear system of a declarative node (`studies.etf_node`, backward;
its forward is the closed form), as far as it fits. All solve one problem, the reduced form without a proximal term, and are measured in
turns with the SVD of the same matrix: seconds of CPU in one process, one BLAS thread. Peaks are those of one call by tracemalloc, which
sees numpy's arrays and not the workspace inside LAPACK. Every row says what its result is worth against the SVD's in double precision.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from studies.command import Options as Common
from studies.command import finish
from studies.etf_node import dense_pullback, layer_bytes, layer_flops
from ufm import sweep
from ufm.etf import NearestETF, nearest, pullback
from ufm.frames import helmert
from ufm.solvers.stiefel import nearest_etf

Matrix = NDArray[Any]

SAME = ("K", "d", "dtype", "input", "seed", "budget")  # one problem: its routes are measured in turns
NAMED = ("svd", "gram", "newton-schulz")
NEAR, CONDITION = 1e-3, 1e6  # noise of the means near collapse, over their length; condition of ill-conditioned ones
SHORT = 5e-3  # seconds of CPU that a turn lasts at least, in as many calls as it takes
MOST_TURNS = 15
TARGETS = ((512, 10), (512, 100), (2048, 1000))  # (d, K) spoken of at the end


@dataclass(frozen=True)
class Options(Common):
    """Time and peak memory of the nearest simplex ETF and of its gradient, over classes and width, by three routes."""

    workers: int | None = 1
    """processes; one by default, since neighbours disturb each other's times"""


@dataclass(frozen=True)
class Size:
    """Classes at each width; most classes for named back ends and for trust regions (ill-conditioned ones apart), both at d = 512, and for
    trust regions elsewhere; most flops of the dense system; seconds of CPU after which a route rests.
    """

    K: Mapping[int, tuple[int, ...]]
    named: int
    trust: int
    trust_ill: int
    trust_wide: int
    flops: float
    budget: float


FEW = (10, 20, 50, 100, 200, 500, 1000)
SIZES = {
    "full": Size({512: (10, 20, 30, 40, 50, 100, 200, 500), 1024: FEW, 2048: FEW}, 500, 500, 100, 100, 5e11, 4.0),
    "quick": Size({512: (10, 20, 50, 100, 200), 1024: (10, 100), 2048: (10, 100)}, 100, 200, 20, 10, 5e9, 0.15),
    "smoke": Size({64: (5, 10), 512: (10,)}, 10, 10, 10, 5, 1e9, 0.0),
}


def main(options: Options) -> int:
    """Measure what is missing, store, draw, and say on standard output what came out."""
    from figures import etf_cost as figure

    with options.workforce() as executor:
        table = sweep.run(
            etf_cost, points(options), out=options.folder, same=SAME, block=len(ROUTES), executor=executor,
            retry_failed=options.retry_failed, label="cost", options=options.plain(),
        )  # fmt: skip
    return finish(options.folder, {"rows": table}, {} if table.failures else summary(table), figure.draw)


def points(options: Options) -> list[dict[str, Any]]:
    """Every route on every problem that it fits."""
    size = SIZES[options.size]
    return [
        {"K": K, "d": d, "dtype": dtype, "input": name, "method": method, "seed": options.seed, "budget": size.budget}
        for d, classes in size.K.items()
        for K in classes
        for dtype in ("float64", "float32")
        for name in INPUTS
        for method in ROUTES
        if _fits(size, d, K, dtype, name, method)
    ]


def _fits(size: Size, d: int, K: int, dtype: str, name: str, method: str) -> bool:
    """Trust regions and the dense system compute in float64 alone."""
    if method == "closed form":
        return True
    if method in NAMED:
        return d == 512 and K <= size.named
    if method == "declarative node":
        return dtype == "float64" and layer_flops(d, K) <= size.flops
    most = size.trust_ill if name == "ill-conditioned" else size.trust
    return dtype == "float64" and min(most, size.trust if d == 512 else size.trust_wide) >= K


def random(rng: np.random.Generator, d: int, K: int) -> Matrix:
    """Standard normal means."""
    return rng.standard_normal((d, K))


def near_collapse(rng: np.random.Generator, d: int, K: int) -> Matrix:
    """A simplex ETF at a random place, with noise."""
    return np.asarray(_haar(rng, d, K - 1) @ helmert(K) + NEAR * rng.standard_normal((d, K)) / np.sqrt(d))


def ill_conditioned(rng: np.random.Generator, d: int, K: int) -> Matrix:
    """Centred means with singular values from 1 to 1/CONDITION, evenly in the logarithm."""
    return np.asarray((_haar(rng, d, K - 1) * np.geomspace(1, 1 / CONDITION, K - 1)) @ _haar(rng, K - 1, K - 1) @ helmert(K))


def _haar(rng: np.random.Generator, d: int, m: int) -> Matrix:
    return np.asarray(np.linalg.qr(rng.standard_normal((d, m)))[0])


INPUTS: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "random": random,
    "near collapse": near_collapse,
    "ill-conditioned": ill_conditioned,
}


class Route(NamedTuple):
    """One way to the frame and to the gradient in the means (d, K) from one in W (K, d)."""

    forward: Callable[[Matrix], NearestETF]
    backward: Callable[[NearestETF, Matrix, Matrix], Matrix]


def _ours(solved: NearestETF, means: Matrix, grad_W: Matrix) -> Matrix:
    return np.asarray(pullback(solved, grad_W))


def _dense(solved: NearestETF, means: Matrix, grad_W: Matrix) -> Matrix:
    return dense_pullback(means, grad_W, solved.posed.frame, solved.U)


ROUTES = {
    "closed form": Route(nearest, _ours),
    "svd": Route(lambda means: nearest(means, method="svd"), _ours),
    "gram": Route(lambda means: nearest(means, method="gram"), _ours),
    "newton-schulz": Route(lambda means: nearest(means, method="newton-schulz"), _ours),
    "trust regions": Route(nearest_etf, _ours),
    "declarative node": Route(nearest, _dense),
}


def etf_cost(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point, all of one problem: seconds and peaks of its route and of the SVD, in turns, and what the result is worth."""
    from threadpoolctl import threadpool_limits

    first = points[0]
    means, grad_W = problem_of(first)
    with threadpool_limits(1):
        for point in points:  # what is imported or set up once is no part of a peak
            route, small = ROUTES[point["method"]], np.eye(4, 3, dtype=means.dtype)
            route.backward(route.forward(small), small, np.ones((3, 4), dtype=means.dtype))
        exact = nearest(means.astype(np.float64), method="svd")
        judged = exact, np.asarray(pullback(exact, grad_W.astype(np.float64)))
        calls: dict[Any, Callable[[], Any]] = {"svd": partial(np.linalg.svd, means, full_matrices=False)}
        common = {"condition": float(exact.condition), "matrix_bytes": means.nbytes, "svd_peak": peak(calls["svd"])[0]}
        rows = []
        for point in points:
            method, route = point["method"], ROUTES[point["method"]]
            forward_peak, solved = peak(partial(route.forward, means))
            backward_peak, gradient = peak(partial(route.backward, solved, means, grad_W))
            calls |= {
                (method, "forward"): partial(route.forward, means),
                (method, "backward"): partial(route.backward, solved, means, grad_W),
            }
            peaks = {"forward_peak": forward_peak, "backward_peak": backward_peak}
            rows.append(common | peaks | worth(solved, gradient, *judged, first["dtype"]) | needed(point, means.itemsize))
        seconds = in_turns(calls, first["budget"])
    return [row | times(seconds, point["method"]) for row, point in zip(rows, points, strict=True)]


def problem_of(point: dict[str, Any]) -> tuple[Matrix, Matrix]:
    """Class means (d, K) and a gradient in W (K, d), the same for every route, dtype and budget."""
    rng = np.random.default_rng(sweep.seed_of({name: point[name] for name in ("K", "d", "input", "seed")}))
    means = INPUTS[point["input"]](rng, point["d"], point["K"])
    grad_W = rng.standard_normal((point["K"], point["d"]))
    return means.astype(point["dtype"]), grad_W.astype(point["dtype"])


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of numpy's arrays during a call, beyond those there before, its result included; and the result."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


def in_turns(calls: Mapping[Any, Callable[[], Any]], budget: float) -> dict[Any, list[float]]:
    """Seconds of CPU of every call, turn by turn; a call takes part until it has spent its budget."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(MOST_TURNS):
        for name, call in calls.items():
            if turn == 0 or spent[name] < budget:
                many, lasted, began = 0, 0.0, time.process_time()
                while not many or lasted < SHORT:
                    call()
                    many, lasted = many + 1, time.process_time() - began
                seconds[name].append(lasted / many)
                spent[name] += lasted
    return seconds


def times(seconds: Mapping[Any, Sequence[float]], method: str) -> dict[str, Any]:
    """Least and median seconds of the SVD, forward and backward, turns, and the cost of both in SVDs by least and by median."""
    parts = {"svd_seconds": seconds["svd"], "forward": seconds[method, "forward"], "backward": seconds[method, "backward"]}
    found: dict[str, Any] = {name: min(part) for name, part in parts.items()}
    found |= {f"{name}_median": float(np.median(part)) for name, part in parts.items()}
    found |= {f"ratio{of}": (found[f"forward{of}"] + found[f"backward{of}"]) / found[f"svd_seconds{of}"] for of in ("", "_median")}
    return found | {"turns": len(parts["backward"])}


def worth(solved: NearestETF, gradient: Matrix, exact: NearestETF, exact_gradient: Matrix, dtype: str) -> dict[str, Any]:
    """How good a result is, seen in double precision; converged: stationary to half its digits, a maximum of <U, A>, orthogonal.

    gradient_norm: of the Riemannian gradient of <U, A>; least_curvature: the least eigenvalue of sym(U^T A), 0 or more at the maximum;
    differences of W and of the gradient from those by SVD in double precision, relative.
    """
    U, A = np.asarray(solved.U, dtype=np.float64), exact.posed.A
    S = 0.5 * (U.T @ A + A.T @ U)
    norm, least = float(np.linalg.norm(A - U @ S)), float(np.linalg.eigvalsh(S)[0])
    run = getattr(solved, "runs", (None,))[0]
    orthogonality, tolerance = float(solved.orthogonality), float(np.finfo(dtype).eps ** 0.5)
    limit = 1e-14 * U.shape[1] if dtype == "float64" else 1e-6
    sound = norm <= tolerance and least >= -tolerance and orthogonality <= limit
    return {
        "converged": sound and (run is None or run.success),
        "gradient_norm": norm,
        "least_curvature": least,
        "orthogonality": orthogonality,
        "W_difference": _apart(solved.W, exact.W),
        "gradient_difference": _apart(gradient, exact_gradient),
        "backend": str(solved.method),
        "success": None if run is None else run.success,
        "iterations": None if run is None else run.iterations,
        "products": None if run is None else run.products,
    }


def _apart(x: Matrix, exact: Matrix) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def needed(point: dict[str, Any], itemsize: int) -> dict[str, Any]:
    """What the released layer's backward pass would take by its formulas."""
    return {"layer_bytes": float(layer_bytes(point["d"], point["K"], itemsize)), "layer_flops": layer_flops(point["d"], point["K"])}


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    said: dict[str, Any] = {"points": len(table)}
    for d, K in TARGETS:
        for name in INPUTS:
            for dtype in ("float64", "float32"):
                said |= _ratios(table.where(d=d, K=K, input=name, dtype=dtype), f"({d}, {K}), {name}, {dtype}")
    double = table.where(dtype="float64")
    for name in INPUTS:
        for what in ("W", "gradient"):
            rows = double.where(input=name)
            worst = int(np.argmax(rows[f"{what}_difference"]))
            place = f"{rows['method'][worst]}, d = {rows['d'][worst]}, K = {rows['K'][worst]}"
            said[f"largest difference of {what}, {name}, float64"] = f"{rows[f'{what}_difference'][worst]:.1e} ({place})"
    named = table.pick(np.isin(table["method"], NAMED))
    said["named back ends replaced by the SVD"] = f"{np.sum(named['method'] != named['backend'])} of {len(named)}"
    said["not converged"] = ", ".join(_places(table.where(converged=False))) or "none"
    said["gradient off by over 1 %"] = ", ".join(_places(table.pick(table["gradient_difference"] > 0.01))) or "none"
    said |= {f"declarative node up to K, d = {d}": int(node["K"].max()) for d, node in _nodes(double) if len(node)}
    last = int(np.argmax(table["layer_bytes"]))
    need = f"{table['layer_bytes'][last]:.1e} bytes, {table['layer_flops'][last]:.1e} flops"
    return said | {f"what it would need at ({table['d'][last]}, {table['K'][last]})": need}


def _ratios(rows: sweep.Table, where: str) -> dict[str, str]:
    """Of one problem: the closed form in SVDs and its peak in matrices, trust regions (forward) in closed forms."""
    ours, theirs = (rows.where(method=method) for method in ("closed form", "trust regions"))
    said = {}
    if len(ours):
        most = max(ours["forward_peak"][0], ours["backward_peak"][0]) / ours["matrix_bytes"][0]
        ratios = f"{ours['ratio'][0]:.2f} SVDs, {ours['ratio_median'][0]:.2f} by medians"
        said[f"forward and backward {where}"] = f"{ratios}, peak {most:.1f} matrices ({ours['backend'][0]})"
    if len(theirs):
        least, median = (theirs[name][0] / ours[name][0] for name in ("forward", "forward_median"))
        said[f"trust regions, forward {where}"] = f"{least:.0f} closed forms, {median:.0f} by medians"
    return said


def _nodes(table: sweep.Table) -> list[tuple[int, sweep.Table]]:
    return [(int(d), table.where(method="declarative node", d=int(d))) for d in np.unique(table["d"])]


def _places(rows: sweep.Table) -> list[str]:
    """Each row in words."""
    names = zip(*(rows[name] for name in ("method", "input", "dtype", "d", "K")), strict=True)
    return [f"{method} {name} {dtype} ({d}, {K})" for method, name, dtype, d, K in names]
