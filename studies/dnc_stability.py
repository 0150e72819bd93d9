"""Is deep neural collapse (DNC) a local minimum? Measured index of the Hessian against the exact stability line, K up to 100 classes.

Linear chain, cross-entropy, n = 1, one penalty lambda (= lambda_eff), d = K: DNC has the class logits alpha (I - 11^T/K) and explicit
factors, in which the gradient is measured, not assumed, to vanish. Theory: no negative eigenvalue iff alpha >= a_c = K(L-1)/(L+1).
Index "dense": all eigenvalues of the Hessian (`ufm.hessian`), K <= 16. Index "blocks", any K: the Hessian commutes with permutations of
the classes (measured), so by Schur's lemma its products with one vector of each isotypic part give the whole spectrum, multiplicities
included. "lanczos": a lower bound at K = 32, without symmetry. "orbit": the nullity over the width at DNC and at pairs, against two
counts of the dimension of the solution set. The closed form is only held against these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ufm
from studies.command import Options as Common
from studies.command import finish
from ufm import sweep
from ufm.arrays import norm
from ufm.coordinates import balanced
from ufm.theory import deep, deep_points, deep_scale, deep_stability

Floats = NDArray[np.float64]

SAME = ("panel", "how", "K", "width", "depth", "code")
BAND = 100.0  # no eigenvalue may lie between the tolerance and this many times it
# the isotypic parts of matrices under permutations of the classes; the direction each stands for
PARTS = ("trivial", "standard", "symmetric, zero diagonal", "antisymmetric")
TABLE_K, TABLE_L = (4, 6, 10, 20, 50, 100), (2, 3, 5)


@dataclass(frozen=True)
class Options(Common):
    """Is deep neural collapse a local minimum? Index of the Hessian over classes, depth and penalty, and the dimension of its orbit."""


@dataclass(frozen=True)
class Size:
    """Classes and penalties of a map, depths mapped, classes and depths of the dense check, halvings of an edge, classes of Lanczos."""

    K: tuple[int, ...] = (4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 70, 84, 100)
    cells: int = 36
    dense: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 12, 16)
    depths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    halvings: int = 36
    lanczos: tuple[int, ...] = (24, 32)


SIZES = {
    "full": Size(),
    "quick": Size((4, 6, 8, 10, 14, 20, 32, 50, 70, 100), 16, (3, 4, 6, 8, 10), (2, 3, 5, 8), 30, (20,)),
    "smoke": Size((4, 6, 10), 6, (3, 4, 6), (2, 3), 12, ()),
}


def main(options: Options) -> int:
    """Compute what is missing, store, draw, and say on standard output what came out."""
    from figures import dnc_stability as figure

    common: dict[str, Any] = dict(out=options.folder, same=SAME, retry_failed=options.retry_failed, options=options.plain())
    with options.workforce() as executor:
        table = sweep.run(dnc_stability, points(options), block=12, executor=executor, label="index and nullity", **common)
        rows, between = edges(options)
        refined = sweep.refine(
            dnc_stability, rows, axis="alpha", between=between, sign="lowest_symmetric", steps=SIZES[options.size].halvings,
            executor=executor, label="stability line", **common,
        )  # fmt: skip
    said = {} if table.failures else summary(table) | line(refined)
    return finish(options.folder, {"rows": table, "edges": refined}, said, figure.draw_all)


def points(options: Options) -> list[dict[str, Any]]:
    """Every cell: maps over lambda/lambda_max, the neighbourhood of the fold, the dense checks, Lanczos, and widths for the nullity."""
    size = SIZES[options.size]
    levels = np.geomspace(1e-28, 10**-0.01, size.cells)
    around = np.linspace(0.6, 1.5, size.cells)
    shallow = np.geomspace(1e-6, 10**-0.01, size.cells)
    rows = []
    for L in [depth for depth in (2, 3, 5) if depth in size.depths]:
        rows += [at("map", "blocks", K, L, scale_at(K, L, level), level=float(level)) for K in size.K for level in levels]
    rows += [at("depth", "blocks", 10, L, scale_at(10, L, level), level=float(level)) for L in size.depths for level in shallow]
    rows += [at("fold", "blocks", K, 2, x * fold(K, 2), over_fold=float(x)) for K in size.K for x in around]
    rows += [at("dense", "dense", K, L, a) for K in size.dense for L in size.depths if (L + 1) * K**2 <= 2000 for a in checked(K, L)]
    rows += [at("lanczos", "lanczos", K, 2, x * stable_scale(K, 2)) for K in size.lanczos for x in (0.9, 1.1)]
    for K, L in [(K, L) for K, L in ((4, 2), (6, 2), (6, 3)) if L in size.depths and K in size.K]:
        widths = sorted({K, K + 1, K + 2, round(1.5 * K), 2 * K, 3 * K})
        alpha = 1.5 * stable_scale(K, L)
        rows += [at("orbit", "orbit", K, L, alpha, d, code) for code in CODES for d in (widths if size.cells > 6 else widths[:2])]
    return rows


def at(panel: str, how: str, K: int, depth: int, alpha: float, width: int | None = None, code: str = "DNC", **more: Any) -> dict[str, Any]:
    """A point; alpha is the scale of DNC, which fixes lambda_eff."""
    return {"panel": panel, "how": how, "K": K, "depth": depth, "width": width or K, "code": code, "alpha": float(alpha)} | more


def fold(K: int, depth: int) -> float:
    """The scale at lambda_max, where the large and the small root meet."""
    return deep_scale.fold(deep_points.dnc(K).parts[0], depth)


def scale_at(K: int, depth: int, level: float) -> float:
    """The large root at lambda_eff = level lambda_max."""
    of = deep_points.dnc(K).parts[0]
    return float(deep_scale.scale(of, level * deep_scale.largest(of, depth), depth))


def checked(K: int, depth: int) -> list[float]:
    """Scales of the dense check: below the fold, in the strip above it, and on both sides of a_c."""
    turn, top, line = fold(K, depth), deep_stability.strip_top(K, depth), stable_scale(K, depth)
    return [0.7 * turn, (turn + top) / 2, *(x * line for x in (0.75, 0.97, 1.03, 1.5) if x * line > turn)]


def stable_scale(K: int, depth: int) -> float:
    """The scale from which on DNC has no negative eigenvalue: a_c, at K = 3 the top of the strip."""
    return deep_stability.strip_top(K, depth) if K == 3 else deep_stability.stable_scale(K, depth)


CODES = {"DNC": deep_points.dnc, "pairs": deep_points.pairs}


def dnc_stability(points: Sequence[dict[str, Any]], _: Sequence[int]) -> list[dict[str, Any]]:
    """One row a point: the gradient there, the measured index and how it was got, and the closed form beside it."""
    from threadpoolctl import threadpool_limits

    first = points[0]
    lam = deep_scale.strength(deep_points.dnc(first["K"]).parts[0], [point["alpha"] for point in points], first["depth"])
    problem = ufm.Problem(
        ufm.counts.balanced(first["K"], 1), width=first["width"], depth=first["depth"], features="free", lam_w=lam, lam_h=lam
    )
    with threadpool_limits(1):
        return [{"lam": float(lam[g])} | MEASURE[first["how"]](problem.cell(g), point) | predicted(point) for g, point in enumerate(points)]


def predicted(point: dict[str, Any]) -> dict[str, Any]:
    """What the closed forms say at the point: index of DNC, both counts of the orbit's dimension, and the lines of theory for K and L."""
    K, L, d, alpha = (point[name] for name in ("K", "depth", "width", "alpha"))
    rank = K - 1 if point["code"] == "DNC" else K // 2
    index = int(deep_stability.dnc_index(K, alpha, L)) if point["code"] == "DNC" else None
    counts = {"orbit": deep.orbit_dimension(rank, L, d), "published": deep.published_orbit_dimension(rank, L, d)}
    return {"rank": rank, "predicted_index": index, **counts, **lines(K, L)}


@cache
def lines(K: int, depth: int) -> dict[str, float]:
    """The scale a_c and its lambda_eff/lambda_max; a_c and the top of the strip over the scale of the fold."""
    of, a_c, turn = deep_points.dnc(K).parts[0], stable_scale(K, depth), fold(K, depth)
    level = float(deep_scale.strength(of, a_c, depth) / deep_scale.largest(of, depth))
    strip = deep_stability.strip_top(K, depth) / turn
    return {"stable_scale": a_c, "stable_level": level, "stable_over_fold": a_c / turn, "strip_over_fold": strip}


def dnc_factors(K: int, depth: int, alpha: float) -> list[Floats]:
    """Factors alpha^{1/(L+1)} (I - 11^T/K), each fixed by every permutation of the classes; d = K."""
    return [alpha ** (1 / (depth + 1)) * (np.eye(K) - 1 / K)[None]] * (depth + 1)


class Blocks(NamedTuple):
    """Eigenvalues over lambda of each isotypic part (a list a part), their multiplicities, and how exactly the parts are invariant.

    leak: largest part of a product outside its span; force: ||gradient||/||x||; norm-free, over the largest eigenvalue.
    """

    eigenvalues: list[Floats]
    multiplicities: list[int]
    leak: float
    force: float


def representatives(K: int) -> tuple[list[Floats], list[int]]:
    """One vector of each copy of each part in K x K matrices, (copies, K, K), and the parts' dimensions; K >= 4.

    V (x) V = 2 (K) + 3 (K-1,1) + (K-2,2) + (K-2,1,1): I and 11^T; diag(u), u1^T, 1u^T with u = e_1 - 1/K; (e_1 - e_2)(e_3 - e_4)^T
    symmetrised; the cycle 1 -> 2 -> 3 -> 1, antisymmetrised.
    """
    eye, one = np.eye(K), np.ones(K)
    u, a, b = eye[0] - 1 / K, eye[0] - eye[1], eye[2] - eye[3]
    cycle = np.outer(eye[0], eye[1]) + np.outer(eye[1], eye[2]) + np.outer(eye[2], eye[0])
    standard = np.stack([np.diag(u), np.outer(u, one), np.outer(one, u)])
    stacks = [np.stack([eye, np.outer(one, one)]), standard, (np.outer(a, b) + np.outer(b, a))[None], (cycle - cycle.T)[None]]
    return stacks, [1, K - 1, K * (K - 3) // 2, (K - 1) * (K - 2) // 2]


def symmetry_blocks(problem: ufm.Problem, factors: Sequence[Floats]) -> Blocks:
    """The whole spectrum of the Hessian over lambda at factors fixed by all permutations, from its products with representatives."""
    K, frame = problem.classes, balanced(problem)
    x = frame.from_factors(factors)
    stacks, multiplicities = representatives(K)
    found, leak = [], 0.0
    for stack in stacks:
        Q = np.linalg.qr(stack.reshape(len(stack), -1).T)[0].T  # (copies, K^2), orthonormal
        moves = np.kron(np.eye(problem.depth + 1), Q)  # each copy in each factor
        images = frame.pick(np.zeros(len(moves), dtype=int)).hessian_product(np.repeat(x, len(moves), axis=0), moves)
        block = moves @ images.T
        found.append(np.linalg.eigvalsh((block + block.T) / 2))
        leak = max(leak, float(norm(images - block.T @ moves).max()), float(np.abs(block - block.T).max()))
    scale = max(float(np.abs(values).max()) for values in found)
    return Blocks(found, multiplicities, leak / scale, float((norm(frame.gradient(x)) / norm(x))[0]))


def by_blocks(problem: ufm.Problem, point: dict[str, Any]) -> dict[str, Any]:
    """Full inertia by symmetry: signs counted with multiplicities, NaN where zero is not told from the rest."""
    factors = dnc_factors(point["K"], point["depth"], point["alpha"])
    frame, spectrum = balanced(problem), symmetry_blocks(problem, factors)
    values = np.concatenate(spectrum.eigenvalues)
    copies = np.repeat(spectrum.multiplicities, [len(v) for v in spectrum.eigenvalues])
    tolerance = (1e-12 + spectrum.leak) * np.abs(values).max() + 100 * spectrum.force
    clear = not np.any((np.abs(values) > tolerance) & (np.abs(values) < BAND * tolerance))
    below = [int((part < -tolerance).sum()) * m for part, m in zip(spectrum.eigenvalues, spectrum.multiplicities, strict=True)]
    exact = deep_stability.dnc_spectrum(point["K"], point["alpha"], point["depth"], point["K"])
    theirs = np.sort(np.repeat(exact.eigenvalues / problem.lam_h[0], exact.multiplicities))
    return {
        "index": float(sum(below)) if clear else np.nan,
        "nullity": float(copies[np.abs(values) <= tolerance].sum()) if clear else np.nan,
        "negative_parts": ", ".join(name for name, many in zip(PARTS, below, strict=True) if many),
        "lowest_symmetric": float(spectrum.eigenvalues[2].min()),
        "difference": float(np.abs(np.sort(np.repeat(values, copies)) - theirs).max() / np.abs(theirs).max()),
        "gradient_norm": float(frame.scale_free_norm(frame.from_factors(factors))[0]),
        "leak": spectrum.leak,
        "obtained": "symmetry blocks, full inertia",
    }


def by_hessian(problem: ufm.Problem, point: dict[str, Any]) -> dict[str, Any]:
    """`ufm.hessian` without any use of symmetry: dense, or Lanczos, whose count is a lower bound."""
    method = "lanczos" if point["how"] == "lanczos" else "dense"
    spectrum = ufm.hessian(problem, dnc_factors(point["K"], point["depth"], point["alpha"]), method=method)
    full = {"index": float(spectrum.index[0]), "nullity": float(spectrum.zero[0])} if method == "dense" else {}
    return full | {
        "at_least": float(spectrum.at_least[0]),
        "lowest": float(spectrum.eigenvalues[0, 0] / problem.lam_h[0]),
        "gradient_norm": float(spectrum.gradient_norm[0]),
        "is_minimum": float(spectrum.is_minimum[0]),
        "reason": str(spectrum.reason[0]),
        "obtained": "dense, full inertia" if method == "dense" else "lanczos, lower bound",
    }


def nullity(problem: ufm.Problem, point: dict[str, Any]) -> dict[str, Any]:
    """Zero eigenvalues of the dense Hessian at balanced factors of a code at this lambda, with random frames; and the tangents' rank."""
    critical = deep_points.at(CODES[point["code"]](point["K"]), problem.lam_h[0], point["depth"])
    rng = np.random.default_rng(sweep.seed_of(point))
    factors = deep.balanced_factors(critical.M, 1, problem.lam_h[0], problem.lam_w[0], point["width"], rng)
    spectrum = ufm.hessian(problem, [f[None] for f in factors], method="dense")
    return {
        "index": float(spectrum.index[0]),
        "nullity": float(spectrum.zero[0]),
        "tangents": float(spectrum.orbit[0]),
        "separation": float(spectrum.separation[0]),
        "gradient_norm": float(spectrum.gradient_norm[0]),
        "obtained": "dense, full inertia",
    }


MEASURE = {"blocks": by_blocks, "dense": by_hessian, "lanczos": by_hessian, "orbit": nullity}


def edges(options: Options) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """Where the measured eigenvalue of the symmetric, zero-diagonal directions changes sign, for the table of lambda_c."""
    size = SIZES[options.size]
    rows = [at("edge", "blocks", K, L, 0.0) for K in TABLE_K for L in TABLE_L if K in size.K and L in size.depths]
    spans = [(0.5 * stable_scale(row["K"], row["depth"]), 2.0 * row["K"]) for row in rows]
    return [{name: value for name, value in row.items() if name != "alpha"} for row in rows], spans


def line(refined: sweep.Table) -> dict[str, Any]:
    """The measured stability line against the closed form, with the table of lambda_c and lambda_max."""
    if not len(refined):
        return {}
    said = {}
    for K, L, alpha in zip(refined["K"], refined["depth"], refined["estimate"], strict=True):
        of, exact = deep_points.dnc(K).parts[0], deep_stability.stability_level(K, L)
        measured, top = deep_scale.strength(of, alpha, L), deep_scale.largest(of, L)
        said[f"K = {K}, L = {L}"] = f"lambda_c {measured:.4g} measured, {exact:.4g} exact; lambda_max {top:.3g}"
    a_c = refined["K"] * (refined["depth"] - 1) / (refined["depth"] + 1)
    return said | {"largest relative error of a measured a_c": float(np.abs(refined["estimate"] / a_c - 1).max())}


def summary(table: sweep.Table) -> dict[str, Any]:
    """What a reader wants to know first."""
    said: dict[str, Any] = {}
    for how in ("blocks", "dense"):
        rows = table.where(how=how)
        clear = np.isfinite(rows["index"])
        said[f"index by {how}"] = (
            f"{np.sum(rows['index'] == rows['predicted_index'])} of {clear.sum()} as predicted, {(~clear).sum()} unclear"
        )
        said[f"largest scale-free gradient, {how}"] = float(rows["gradient_norm"].max())
    blocks, orbit, lanczos = (table.where(how=how) for how in ("blocks", "orbit", "lanczos"))
    said["largest difference of a spectrum, over its largest eigenvalue"] = float(blocks["difference"].max())
    said["largest leak of a symmetry block"] = float(blocks["leak"].max())
    if len(lanczos):
        predicted = np.where(lanczos["predicted_index"] > 0, lanczos["at_least"] > 0, lanczos["at_least"] == 0)
        said["signs by lanczos"] = f"{predicted.sum()} of {len(lanczos)} as predicted"
    held = []
    for name, words in (("orbit", "L(rd - r(r+1)/2)"), ("published", "the published L r(d - r)")):
        same = orbit["nullity"] == orbit[name]
        said[f"nullity equal to {words}"] = f"{np.sum(same)} of {len(orbit)}"
        held += [words] if same.all() else []
    return said | {"so the count that holds, at DNC and at pairs, at every width, is": " and ".join(held) or "neither"}
