"""Scales and values against 50 digits: roots between neighbouring floats, both branches, from 1e-30 to the fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deep_oracle import slope, value
from oracle import mp
from ufm.records import NoTheory
from ufm.theory import deep_points as points
from ufm.theory import deep_scale

DEPTHS = (1, 2, 3, 8, 20)


def entries(K: int, entry: Any) -> Any:
    return mp.matrix([[entry(i, j) for j in range(K)] for i in range(K)])


def pair(i: int, j: int) -> int:
    return 0 if i // 2 != j // 2 else (1 if i == j else -1)


def edge(r: int) -> Any:
    edges = [(i, j) for i in range(r) for j in range(i + 1, r)]
    return entries(len(edges), lambda a, b: len({*edges[a]} & {*edges[b]}) - mp.mpf(4) / r)


def ico() -> Any:
    """Gram of (0, +-1, +-phi) and cyclic, antipodes next to each other, in the order of the frame."""
    phi = (1 + mp.sqrt(5)) / 2
    half = []
    for shift in range(3):
        for s in (1, -1):
            v = [mp.mpf(0), mp.mpf(1), s * phi]
            half.append([v[(i - shift) % 3] for i in range(3)])
    rows = [[sign * x for x in v] for v in half for sign in (1, -1)]
    return entries(12, lambda i, j: sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) / (1 + phi**2))


# code, its matrix at scale 1, singular values of that (the document's table)
ONE_SCALE = {
    "dnc2": (points.dnc(2), entries(2, lambda i, j: (i == j) - mp.mpf(1) / 2), [1]),
    "dnc7": (points.dnc(7), entries(7, lambda i, j: (i == j) - mp.mpf(1) / 7), [1] * 6),
    "pairs2": (points.pairs(2), entries(2, pair), [2]),
    "pairs6": (points.pairs(6), entries(6, pair), [2] * 3),
    "5-gon": (points.polygon(5), entries(5, lambda i, j: mp.cos(2 * mp.pi * (i - j) / 5)), [mp.mpf(5) / 2] * 2),
    "8-gon": (points.polygon(8), entries(8, lambda i, j: mp.cos(2 * mp.pi * (i - j) / 8)), [4] * 2),
    "T5": (points.rectified_simplex(5), edge(5), [3] * 4),
    "icosahedron": (points.icosahedron(), ico(), [4] * 3),
}
ROOM = 4e-15


@pytest.mark.parametrize("name", ONE_SCALE)
@pytest.mark.parametrize("depth", DEPTHS)
def test_one_scale_at_50_digits(name: str, depth: int) -> None:
    """The derivative changes sign within 4e-15 of each root, from below on the large branch; the value agrees to 1e-14; M is a P."""
    code, P, singular = ONE_SCALE[name]
    top = points.largest(code, depth)
    for lam in (1e-30, 1e-9, 1e-3 * top, 0.3 * top, 0.9 * top):
        for branch, sign in (("large", 1), ("small", -1)):
            if branch == "small" and depth == 1:
                continue
            point = points.at(code, lam, depth, branch)  # type: ignore[arg-type]
            a = mp.mpf(float(point.scales[0]))
            width = ROOM * (30 if lam > 0.8 * top else 1)
            assert sign * slope(P, a * (1 - width), lam, depth, singular) < 0 < sign * slope(P, a * (1 + width), lam, depth, singular)
            exact = value(P * a, lam, depth, [s * a for s in singular])
            assert abs(mp.mpf(float(point.value)) - exact) <= 1e-14 * exact
            assert point.fit + point.penalty == point.value
            scaled = np.array((P * a).tolist(), dtype=np.float64)
            assert point.M == pytest.approx(scaled, rel=1e-13, abs=1e-15 * float(a))
            assert point.rank == len(singular)


@pytest.mark.parametrize("K", [2, 3, 100, 1000])
@pytest.mark.parametrize("depth", [1, 2, 5, 20])
def test_dnc_scale_equation(K: int, depth: int) -> None:
    """lambda = alpha^{(L-1)/(L+1)}/(e^alpha + K - 1), both roots, log(1/lambda - K + 1) at L = 1; the fold's equation."""

    def curve(a: Any) -> Any:
        return a ** (mp.mpf(depth - 1) / (depth + 1)) / (mp.exp(a) + K - 1)

    code = points.dnc(K)
    top = points.largest(code, depth)
    lam = np.array([1e-30, 1e-20, 1e-8, 0.1 * top, 0.99 * top])
    for branch, falls in (("large", True), ("small", False)):
        if depth == 1 and not falls:
            continue
        scales = points.levels(code, lam, depth, branch).scales[:, 0]  # type: ignore[arg-type]
        for x, a in zip(lam, scales, strict=True):
            room = 1e-12 if x > 0.98 * top else ROOM
            low, high = curve(mp.mpf(a) * (1 - room)), curve(mp.mpf(a) * (1 + room))
            assert (high < x < low) if falls else (low < x < high)
    if depth == 1:
        assert points.levels(code, lam, 1).scales[:, 0] == pytest.approx([float(mp.log(1 / mp.mpf(x) - K + 1)) for x in lam], rel=1e-12)
        assert top == pytest.approx(1 / K, rel=1e-15)
    else:
        a = mp.mpf(deep_scale.fold(code.parts[0], depth))
        assert (depth - 1) * (mp.exp(a) + K - 1) / ((depth + 1) * a * mp.exp(a)) == pytest.approx(1, abs=1e-12)
        assert top == pytest.approx(float(curve(a)), rel=1e-14)


@pytest.mark.parametrize("K", [4, 10, 1000])
def test_pairs_scale_equation(K: int) -> None:
    """The document's equation (2.2)."""
    for depth in DEPTHS:
        p = mp.mpf(2) / (depth + 1)
        lam = 1e-3 / K * np.array([1.0, 1e-27])
        for x, b in zip(lam, points.levels(points.pairs(K), lam, depth).scales[:, 0], strict=True):
            for beta, sign in ((mp.mpf(b) * (1 - ROOM), 1), (mp.mpf(b) * (1 + ROOM), -1)):
                u, v = mp.exp(-2 * beta), mp.exp(-beta)
                right = mp.mpf(2) / K * 2**-p * beta ** (1 - p) * (2 * u + (K - 2) * v) / (1 + u + (K - 2) * v)
                assert sign * (right - x) > 0


@pytest.mark.parametrize("sizes", [(2, 8), (2, 2, 6), (5, 3, 1), (2, 1), (4, 1, 1), (7, 500, 493)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_block_scale_equations(sizes: tuple[int, ...], depth: int) -> None:
    """The document's equation (2.3), block by block, and the value with log K for a class alone; repeated sizes share a scale."""
    K = sum(sizes)
    code = points.blocks(sizes)
    for lam in (1e-30, 1e-6 / K, 0.5 * points.largest(code, depth)):
        found = points.levels(code, lam, depth)
        distinct = sorted({k for k in sizes if k > 1}, reverse=True)
        scale = dict(zip(distinct, found.scales, strict=True))
        p, exact = mp.mpf(2) / (depth + 1), mp.mpf(0)
        for k in sizes:
            if k == 1:
                exact += mp.log(K) / K
                continue
            for a, sign in ((mp.mpf(scale[k]) * (1 - ROOM), 1), (mp.mpf(scale[k]) * (1 + ROOM), -1)):
                top = k * mp.exp(-a / k) + K - k
                below = mp.exp(a * (1 - mp.mpf(1) / k)) + (k - 1) * mp.exp(-a / k) + K - k
                assert sign * (a ** (1 - p) * top / below / K - lam) > 0
            a = mp.mpf(scale[k])
            exact += mp.mpf(k) / K * mp.log1p((k - 1) * mp.exp(-a) + (K - k) * mp.exp(-a * (1 - mp.mpf(1) / k)))
            exact += mp.mpf(lam) / 2 * (depth + 1) * (k - 1) * a**p
        assert abs(mp.mpf(float(found.value)) - exact) <= 1e-14 * exact


def test_blocks_reduce_to_dnc_and_pairs() -> None:
    lam = np.geomspace(1e-30, 1e-2, 7)
    for depth in DEPTHS:
        assert points.levels(points.blocks([2] * 4), lam, depth).value == pytest.approx(
            points.levels(points.pairs(8), lam, depth).value, rel=1e-14
        )
        assert np.array_equal(points.levels(points.blocks([6]), lam, depth).value, points.levels(points.dnc(6), lam, depth).value)


@pytest.mark.parametrize("depth", [2, 3, 7, 20])
def test_one_fold_and_the_largest_root(depth: int) -> None:
    """The scale equation has one maximum for every code, so that two roots are all: on a fine grid of scales, K to 1000."""
    codes = [points.dnc(K) for K in (2, 3, 1000)] + [points.pairs(1000), points.rectified_simplex(45), points.icosahedron()]
    codes += [points.polygon(K) for K in (5, 50, 999)] + [points.blocks([600, 390, 2, 2, 2, 3, 1])]
    for code in codes:
        for of in code.parts:
            turn = deep_scale.fold(of, depth)
            log_h = np.log(deep_scale.strength(of, turn * np.geomspace(1e-9, 1, 1500), depth))
            assert np.all(np.diff(log_h) > -1e-13)
            reach = min(600 / of.gaps.min(), 1e6 * turn)
            log_h = np.log(deep_scale.strength(of, np.geomspace(turn, reach, 3000), depth))
            assert np.all(np.diff(log_h) < 1e-13)


@pytest.mark.parametrize("depth", [2, 5, 20])
def test_at_the_fold(depth: int) -> None:
    """Both roots meet at lambda_max; just above it there is none, and the message names it; an array has NaN there."""
    for K in (2, 10, 1000):
        code = points.dnc(K)
        top = points.largest(code, depth)
        turn = deep_scale.fold(code.parts[0], depth)
        for branch in ("large", "small"):
            found = points.levels(code, top * (1 - 1e-12), depth, branch)  # type: ignore[arg-type]
            assert found.scales[0] == pytest.approx(turn, rel=1e-5)
        with pytest.raises(NoTheory, match=f"exists up to {top:.6g} only"):
            points.at(code, top * (1 + 1e-12), depth)
        both = points.at(code, np.array([0.5, 1.5]) * top, depth)
        assert np.isnan(both.value).tolist() == [False, True]
        assert both.M.shape == (2, K, K)
        assert np.isnan(both.M[1]).all()
        assert both.index is not None
        assert np.isnan(both.index).tolist() == [False, True]


def test_doors() -> None:
    with pytest.raises(NoTheory, match="no small root at depth 1"):
        points.at(points.dnc(4), 1e-3, 1, "small")
    with pytest.raises(NoTheory, match="pairs need an even number"):
        points.pairs(5)
    with pytest.raises(NoTheory, match="needs an odd number"):
        points.relaxed_pairs(6)
    with pytest.raises(NoTheory, match="small root of square antiprism is not known"):
        points.at(points.square_antiprism(), 1e-3, 2, "small")
    with pytest.raises(NoTheory, match="no minimum of its scales"):
        points.at(points.relaxed_pairs(5), 0.9, 2)
    with pytest.raises(ValueError, match=r"blocks: sizes is \[2, 0\]"):
        points.blocks([2, 0])
    assert points.at(points.blocks([1, 1, 1]), 1e-3, 3).value == pytest.approx(np.log(3), rel=1e-15)
