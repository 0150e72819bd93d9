"""Symmetric codes: unit rows, the cosines of their definitions, and equal singular values on their span."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from math import cos, pi, sqrt
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ufm import frames

Floats = NDArray[np.float64]

# frame, rank, how often each cosine occurs in a row besides the 1 on the diagonal
CODES: dict[str, tuple[Callable[[], Floats], int, dict[float, int]]] = {
    "polygon 3": (lambda: frames.polygon(3), 2, {-0.5: 2}),
    "polygon 5": (lambda: frames.polygon(5), 2, {cos(2 * pi / 5): 2, cos(4 * pi / 5): 2}),
    "polygon 6": (lambda: frames.polygon(6), 2, {0.5: 2, -0.5: 2, -1.0: 1}),
    "pairs 2": (lambda: frames.pairs(2), 1, {-1.0: 1}),
    "pairs 8": (lambda: frames.pairs(8), 4, {-1.0: 1, 0.0: 6}),
    "cross-polytope": (lambda: frames.cross_polytope(3), 3, {-1.0: 1, 0.0: 4}),
    "T(3)": (lambda: frames.rectified_simplex(3), 2, {-0.5: 2}),
    "T(4)": (lambda: frames.rectified_simplex(4), 3, {-1.0: 1, 0.0: 4}),
    "T(6)": (lambda: frames.rectified_simplex(6), 5, {0.25: 8, -0.5: 6}),
    "icosahedron": (lambda: frames.icosahedron(), 3, {1 / sqrt(5): 5, -1 / sqrt(5): 5, -1.0: 1}),
}


@pytest.mark.parametrize("name", CODES)
def test_codes(name: str) -> None:
    """Unit rows, each with the stated cosines to the others; centred; d equal singular values squared K/d, the rest 0."""
    make, rank, cosines = CODES[name]
    V = make()
    gram = V @ V.T
    assert np.diag(gram) == pytest.approx(1, abs=1e-15)
    expected = Counter({round(c, 9) + 0.0: n for c, n in cosines.items()})
    for k in range(len(V)):
        assert Counter(round(float(c), 9) + 0.0 for j, c in enumerate(gram[k]) if j != k) == expected
    assert V.sum(axis=0) == pytest.approx(0, abs=1e-14)
    s = np.linalg.svd(gram, compute_uv=False)
    assert s[:rank] == pytest.approx(len(V) / rank, rel=1e-13)
    assert s[rank:] == pytest.approx(0, abs=1e-13)


def test_rectified_simplex_is_the_edges_of_a_complete_graph() -> None:
    """Edges in the order of pairs i < j: adjacent iff they share a vertex, entries 2 - 4/r, 1 - 4/r, -4/r."""
    for r in (4, 5, 7):
        gram = (2 - 4 / r) * frames.rectified_simplex(r) @ frames.rectified_simplex(r).T
        edges = list(combinations(range(r), 2))
        for a, e in enumerate(edges):
            for b, f in enumerate(edges):
                assert gram[a, b] == pytest.approx(len({*e} & {*f}) - 4 / r, abs=1e-14)


def test_a_lone_class_has_its_own_axis() -> None:
    assert np.array_equal(frames.pairs(5), [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1]])


def test_square_antiprism() -> None:
    """Each vertex sees its square at 90, 90, 180 degrees, the other at 45, 45, 135, 135, and twice the height away."""
    V = frames.square_antiprism(0.4)
    assert V.shape == (8, 3)
    for k in range(8):
        around = sorted(float(V[k, :2] @ V[j, :2]) for j in range(8) if j // 4 == k // 4 and j != k)
        across = sorted(float(V[k, :2] @ V[j, :2]) for j in range(8) if j // 4 != k // 4)
        assert around == pytest.approx([-1, 0, 0], abs=1e-15)
        assert across == pytest.approx([-sqrt(0.5)] * 2 + [sqrt(0.5)] * 2)
        assert V[k, 2] == (0.4 if k < 4 else -0.4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frames.polygon(2), "polygon: K is 2.*at least 3"),
        (lambda: frames.pairs(1), "pairs: K is 1"),
        (lambda: frames.cross_polytope(0), "cross_polytope: m is 0"),
        (lambda: frames.rectified_simplex(2), "rectified_simplex: r is 2"),
        (lambda: frames.polygon(5.0), "polygon: K is 5.0"),  # type: ignore[arg-type]
    ],
)
def test_door(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match="frames." + words):
        call()
