"""The catalogue of end points: structures with a closed form, as class logits and value at each lambda_eff, by kind of problem.

Classes are balanced and features free. Linear chains with plain cross-entropy: `ufm.theory.deep_points`, on both branches of every scale;
with squared error: the orthogonal frame z I. ReLU chains: `ufm.theory.deep_relu`, `deep_relu_ce`, largest roots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np

from ufm import frames
from ufm.landscape.point import Floats
from ufm.losses import CrossEntropy
from ufm.problem import Problem
from ufm.theory import deep_points, deep_relu, deep_relu_ce
from ufm.theory.deep_codes import Code, Tied

BOUND = 1e-3  # classes whose logits for each other are below this share of the largest are in different blocks


class Level(NamedTuple):
    """Logits M (B, K, K) and value (B,) of one branch at each lambda_eff, NaN where it does not exist; a remark for the name."""

    remark: str
    M: Floats
    value: Floats


class Structure(NamedTuple):
    """kind and name as in `EndPoint`, and what the structure is worth: at(lambda_eff (B,)), a Level a branch."""

    kind: str
    name: str
    at: Callable[[Floats], Sequence[Level]]


def structures(problem: Problem) -> list[Structure]:
    """The structures with a closed form in this kind of problem, block simplices apart; () where nothing is catalogued."""
    K, L = problem.classes, problem.depth
    squared, plain = problem.loss.name == "MSE", is_plain(problem)
    if problem.features != "free" or not (plain or (squared and problem.lam_b is None)):
        return []
    linear = L == 1 or problem.activation == "linear"
    if linear and plain:
        return [_of_code(*_label(code, K), code, L) for code in deep_points.candidates(K)]
    if linear:
        frame = partial(_squared, [deep_relu.orthogonal(K, L)]) if L > 1 else partial(_shallow_frame, K)
        return [Structure("dnc", "DNC", frame)]
    found = [("dnc", "DNC", [deep_relu.orthogonal(K, L)])]
    r = frames.triangular_root(K)
    if L > 2 and r > 2:
        found.append(("graph", "graph solution", [deep_relu.graph(r, L)]))
    if plain and r > 3:
        found.append(("code", f"nonnegative T({r})", [deep_relu_ce.graph_code(r, L)]))
    if plain:
        found.append(("blocks", "shifted pairs", deep_relu_ce.paired(K, L)))
        return [_of_code(kind, name, deep_relu_ce.code(some), L) for kind, name, some in found]
    return [Structure(kind, name, partial(_squared, some)) for kind, name, some in found]


def is_plain(problem: Problem) -> bool:
    """Whether the loss is cross-entropy without options."""
    return isinstance(problem.loss, CrossEntropy) and problem.loss.plain()


def blocks(sizes: Sequence[int], depth: int) -> Structure:
    """Block simplices of these sizes, cross-entropy: pairs by their number, others by their sizes."""
    pairs = set(sizes) == {2}
    name = f"{len(sizes)} pairs" if pairs else "blocks " + "+".join(map(str, sorted(sizes)))
    return _of_code("blocks", name, deep_points.blocks(sizes), depth)


def partitions(M: Floats) -> list[tuple[int, ...]]:
    """The sizes, largest first, of the sets of classes that M (B, K, K) connects by logits above BOUND times the largest."""
    size = np.abs(M)
    near = np.maximum(size, size.mT) > BOUND * size.max(axis=(1, 2), keepdims=True)
    near |= np.eye(M.shape[-1], dtype=bool)
    for _ in range(M.shape[-1].bit_length()):
        near = near @ near
    members = near.sum(axis=-1)  # of the set each class is in, (B, K)
    return [tuple(k for k in np.unique(row)[::-1].tolist() for _ in range(int(np.sum(row == k)) // k)) for row in members]


def invariants(M: Floats) -> Floats:
    """Continuous functions of M (B, K, K) that the order of the classes does not change, (B, m)."""
    entries, cubes = M.reshape(len(M), M.shape[1] ** 2), M**3
    own = np.diagonal(M, axis1=-2, axis2=-1)
    sums = [own, entries, cubes.sum(axis=-1), cubes.sum(axis=-2)]
    return np.concatenate([*(np.sort(x, axis=-1) for x in sums), np.linalg.svd(M, compute_uv=False)], axis=-1)


def _label(code: Code | Tied, K: int) -> tuple[str, str]:
    """(kind, name) of a code of the catalogue."""
    if code.name == deep_points.dnc(K).name:
        return "dnc", "DNC"
    if code.name.endswith("pairs"):
        return "blocks", code.name
    return "code", "relaxed pairs" if code.name.endswith("relaxed") else code.name


def _of_code(kind: str, name: str, code: Code | Tied, depth: int) -> Structure:
    def at(lam: Floats) -> list[Level]:
        return [Level(remark, code.pattern(x), deep_points.levels_at(code, x, lam, depth).value) for remark, x in _roots(code, lam, depth)]

    return Structure(kind, name, at)


def _roots(code: Code | Tied, lam: Floats, depth: int) -> list[tuple[str, Floats]]:
    """(remark, scales (B, S)) for every choice of the large or the small root of each scale."""
    large = code.scales(lam, depth, "large")
    if isinstance(code, Tied) or depth == 1:
        return [("", large)]
    small = code.scales(lam, depth, "small")
    choices = product((False, True), repeat=large.shape[-1])
    return [(", small root" if any(choice) else "", np.where(choice, small, large)) for choice in choices]


def _squared(some: Sequence[deep_relu.Block], lam: Floats) -> list[Level]:
    found = deep_relu.squared_error(some, lam)
    K = sum(block.classes for block in some)
    return [Level("", found.scales[..., None] * np.eye(K), found.value)]


def _shallow_frame(K: int, lam: Floats) -> list[Level]:
    """L = 1: Z = z I with z = 1 - K lambda_eff, where it is positive."""
    z = np.where(K * lam < 1, 1 - K * lam, np.nan)
    return [Level("", z[:, None, None] * np.eye(K), (1 - z) ** 2 / 2 + lam * K * z)]
