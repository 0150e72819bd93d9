"""The study of the stability of DNC: blocks give the dense spectrum, broken symmetry is noticed, maps show what was measured."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import dnc_stability as figure
from figures import dnc_stability_orbit, stored
from studies import dnc_stability as study
from ufm import sweep
from ufm.theory import deep_points, deep_scale


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("stability")
    return studied.smoke("dnc_stability", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "dnc_stability", figure.COLUMNS)


def problem(K: int, depth: int, alpha: float, width: int | None = None) -> ufm.Problem:
    lam = float(deep_scale.strength(deep_points.dnc(K).parts[0], alpha, depth))
    return ufm.Problem(ufm.counts.balanced(K, 1), width=width or K, depth=depth, features="free", lam_w=lam, lam_h=lam)


def test_a_small_run_agrees_with_theory_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    blocks = table.where(how="blocks")
    asked, dense = np.sum(blocks["panel"] != "edge"), len(table.where(how="dense"))
    assert said["index by blocks"] == f"{asked} of {asked} as predicted, 0 unclear"
    assert said["index by dense"] == f"{dense} of {dense} as predicted, 0 unclear"
    orbit = table.where(panel="orbit")
    assert said["nullity equal to L(rd - r(r+1)/2)"] == f"{len(orbit)} of {len(orbit)}"
    assert said["nullity equal to the published L r(d - r)"] == f"0 of {len(orbit)}"
    assert said["K = 10, L = 2"].endswith("0.04034 exact; lambda_max 0.0863")
    for name in ("dnc_stability", "dnc_stability_orbit"):
        assert all((out / f"{name}{kind}").is_file() for kind in (".png", ".pdf", ".html"))


def test_the_measured_line_is_at_a_c(table: sweep.Table) -> None:
    """Twelve halvings of an interval of about 2 K."""
    edges = table.where(panel="edge")
    for K, L in {(K, L) for K, L in zip(edges["K"], edges["depth"], strict=True)}:
        own = edges.where(K=K, depth=L)
        below, above = (own["alpha"][(own["lowest_symmetric"] > 0) == side] for side in (False, True))
        assert below.max() < K * (L - 1) / (L + 1) < above.min() <= below.max() + 1e-3 * K


@pytest.mark.parametrize(("K", "depth", "alpha"), [(4, 2, 0.83), (5, 3, 1.0), (6, 2, 3.0), (7, 4, 0.2)])
def test_blocks_by_symmetry_are_the_dense_spectrum(K: int, depth: int, alpha: float) -> None:
    at, factors = problem(K, depth, alpha), study.dnc_factors(K, depth, alpha)
    blocks = study.symmetry_blocks(at, factors)
    ours = np.concatenate([np.repeat(values, many) for values, many in zip(blocks.eigenvalues, blocks.multiplicities, strict=True)])
    dense = ufm.hessian(at, factors, method="dense").eigenvalues[0] / at.lam_h[0]
    np.testing.assert_allclose(np.sort(ours), dense, rtol=0, atol=1e-12 * np.abs(dense).max())
    assert blocks.leak < 1e-13


def test_representatives_span_each_part_once() -> None:
    """Moved by all permutations, the copies of each part span its multiplicity times its dimension; together all matrices."""
    K, rng = 5, np.random.default_rng(0)
    stacks, dimensions = study.representatives(K)
    permuted = [[s[:, p][:, :, p].reshape(len(s), -1) for p in (rng.permutation(K) for _ in range(80))] for s in stacks]
    ranks = [np.linalg.matrix_rank(np.concatenate(moved)) for moved in permuted]
    assert ranks == [len(s) * d for s, d in zip(stacks, dimensions, strict=True)]
    assert sum(ranks) == K * K
    everything = np.concatenate([np.concatenate(moved) for moved in permuted])
    assert np.linalg.matrix_rank(everything) == K * K


def test_broken_symmetry_is_unclear_and_never_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study.dnc_factors(6, 2, 3.0)
    tilted = [f + 1e-3 * np.random.default_rng(1).standard_normal(f.shape) for f in whole]
    assert study.symmetry_blocks(problem(6, 2, 3.0), tilted).leak > 1e-6
    monkeypatch.setattr(study, "dnc_factors", lambda *_: tilted)
    row = study.by_blocks(problem(6, 2, 3.0), study.at("map", "blocks", 6, 2, 3.0))
    assert np.isnan(row["index"])
    assert row["gradient_norm"] > figure.STATIONARY


def test_stationary_factors_in_other_frames_are_unclear_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of the same orbit that permutations do not fix: its gradient vanishes, but its blocks are none."""
    Q = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    H, W1, W2 = study.dnc_factors(6, 2, 3.0)
    monkeypatch.setattr(study, "dnc_factors", lambda *_: [Q @ H, W1 @ Q.T, W2])
    row = study.by_blocks(problem(6, 2, 3.0), study.at("map", "blocks", 6, 2, 3.0))
    assert row["gradient_norm"] < 1e-12
    assert np.isnan(row["index"])


@pytest.mark.parametrize(("K", "depth"), [(7, 2), (40, 3), (100, 2)])
def test_the_index_jumps_by_k_k_minus_3_over_2_at_a_c(K: int, depth: int) -> None:
    line = K * (depth - 1) / (depth + 1)
    rows = study.dnc_stability([study.at("map", "blocks", K, depth, x * line) for x in (1 - 1e-6, 1 + 1e-6)], [0, 0])
    assert [row["index"] for row in rows] == [K * (K - 3) / 2, 0]
    assert all(row["gradient_norm"] < 1e-11 for row in rows)


def test_lanczos_bounds_the_index_from_below() -> None:
    rows = study.dnc_stability([study.at("lanczos", "lanczos", 12, 2, x * 4.0) for x in (0.9, 1.1)], [0, 0])
    assert 0 < rows[0]["at_least"] <= 12 * 9 / 2
    assert rows[1]["at_least"] == 0
    assert all("index" not in row and row["obtained"] == "lanczos, lower bound" for row in rows)


def test_maps_show_what_was_measured_and_hatch_the_rest(table: sweep.Table) -> None:
    rows = table.where(panel="map", depth=2)
    grid = rows.on_grid("level", "K")
    panel = figure.over_classes(rows)
    stable = panel.codes == list(figure.OUTCOMES).index("")
    assert np.array_equal(stable, grid["index"] == 0)
    assert panel.known.all()
    assert stable.any()
    assert not stable.all()
    grid["index"][0, 0], grid["gradient_norm"][1, 1] = np.nan, 1e-3

    class Rows:
        def on_grid(self, x: str, y: str) -> Any:
            return grid

    hatched = ~figure.phase(Rows(), "level", "K", title="t").known  # type: ignore[arg-type]
    assert np.argwhere(hatched).tolist() == [[0, 0], [1, 1]]


def test_the_orbit_s_curves_are_the_rows(table: sweep.Table) -> None:
    rows = table.where(panel="orbit", K=4)
    panel = dnc_stability_orbit.counts(rows)
    for code in ("DNC", "pairs"):
        own = rows.where(code=code)
        curve = next(curve for curve in panel.curves if curve.label == f"{code}: measured")
        np.testing.assert_array_equal(curve.y, own["nullity"][np.argsort(own["width"])])
    assert panel.limits[1] > rows["nullity"].max()


def test_another_run_computes_nothing_again(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.dnc_stability.MEASURE": {}, "figures.dnc_stability.draw_all": studied.no_figure}
    assert studied.again("dnc_stability", out, monkeypatch, broken) == studied.told(done)
