"""The study of implicit bias: its flow is gradient flow in another clock, its margins are bounded by theory, spectra repel as they must."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
from figures import depth_implicit_bias as figure
from figures import stored
from studies import depth_implicit_bias as study
from ufm import sweep
from ufm.theory import deep_points


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("bias")
    return studied.smoke("depth_implicit_bias", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "depth_implicit_bias", figure.COLUMNS)


def point(**other: Any) -> dict[str, Any]:
    usual = {"panel": "width", "start": "normal", "K": 4, "depth": 2, "width": 5, "scale": 1.0, "seeds": 3, "floor": 1e-20}
    return usual | {"device": "numpy", "seed": 0} | other


def test_a_small_run_reaches_its_loss_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    assert np.all(table["loss"] <= table["floor"])
    assert np.all(table["separated"] == 1)
    assert np.all((table["rank"] >= 1) & (table["rank"] <= table["K"]) & (table["stable"] <= table["rank"] + 1e-9))
    wide = table.where(panel="width")
    shallow, deep = (wide.where(depth=L)["rank"].mean() for L in (1, 3))
    assert deep < shallow - 1, "depth lowers the rank"
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["points"] == str(len(table))
    assert all((out / f"depth_implicit_bias{kind}").is_file() for kind in (".png", ".pdf", ".html"))


def test_the_path_is_that_of_gradient_flow_in_plain_time() -> None:
    """Against scipy's integrator of dx/dt = -grad F: at equal losses equal logits, and the time is the integral of F dt."""
    from scipy.integrate import solve_ivp

    from ufm.starts import normal

    K, d = 4, 5
    path = next(iter(study.follow(point(panel="path", floor=1e-3), 7)))
    problem = study.ufm.Problem(np.full(K, 1), width=d, depth=2, features="free", lam_w=0.0, lam_h=0.0)
    start = normal(1.0).draw(problem, [(d, K), (d, d), (K, d)], np.random.default_rng([7, 0]))

    def slope(_: float, x: Any) -> Any:
        H, W1, W2 = x[: d * K].reshape(d, K), x[d * K : d * K + d * d].reshape(d, d), x[d * K + d * d :].reshape(K, d)
        Z = W2 @ W1 @ H
        P = np.exp(Z) / np.exp(Z).sum(axis=0)
        G = (P - np.eye(K)) / K
        return -np.concatenate([(W1.T @ W2.T @ G).ravel(), (W2.T @ G @ H.T).ravel(), (G @ (W1 @ H).T).ravel()])

    def loss(x: Any) -> tuple[float, Any]:
        H, W1, W2 = x[: d * K].reshape(d, K), x[d * K : d * K + d * d].reshape(d, d), x[d * K + d * d :].reshape(K, d)
        Z = W2 @ W1 @ H
        return float(np.mean(np.log(np.exp(Z).sum(axis=0)) - np.diagonal(Z))), Z

    solved = solve_ivp(slope, (0, 3000), np.concatenate([f.ravel() for f in start]), rtol=1e-9, atol=1e-11, dense_output=True)
    for i in (0, len(path.value) // 3, 2 * len(path.value) // 3, len(path.value) - 1):
        low, high = 0.0, 3000.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if loss(solved.sol(middle))[0] > path.value[i] else (low, middle)
        times = np.linspace(0, low, 4001)
        assert path.time[i] == pytest.approx(np.trapezoid([loss(x)[0] for x in solved.sol(times).T], times), rel=1e-3, abs=1e-12)
        np.testing.assert_allclose(path.logits[i], loss(solved.sol(low))[1], rtol=0, atol=1e-4 * np.abs(path.logits[i]).max() + 1e-6)


def test_the_loss_falls_along_each_run_and_ends_at_the_floor() -> None:
    runs = list(study.follow(point(), 3))
    assert len(runs) == 3
    for path in runs:
        assert np.all(np.diff(path.value) <= 0)
        assert np.all(np.diff(path.time) >= 0)
        assert path.value[-1] <= 1e-20 < path.value[-2]
        assert path.first_below(1e-3) == int(np.argmax(path.value <= 1e-3))
        assert path.first_below(0.0) == len(path.value) - 1


def test_runs_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    together = [path.logits[-1] for path in study.follow(point(), 5)]
    monkeypatch.setattr(study, "COORDINATES", 1.0)
    for a, b in zip(together, (path.logits[-1] for path in study.follow(point(), 5)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_margins_of_codes_are_those_of_theory(depth: int) -> None:
    row = study.depth_implicit_bias([point(K=6, depth=depth, width=6, seeds=2, floor=1e-3)], [1])[0]
    codes = {"dnc_margin": deep_points.dnc(6), "best_margin": deep_points.pairs(6) if depth > 1 else deep_points.dnc(6)}
    for name, code in codes.items():
        M = code.pattern(np.ones(1))
        assert study.margin(M[None], depth)[0] <= row["best_margin"] * (1 + 1e-12)
        if name == "dnc_margin":
            assert study.margin(3 * M[None], depth)[0] == pytest.approx(row[name], rel=1e-12)
    assert study.margin(deep_points.pairs(6).pattern(np.ones(1))[None], 2)[0] == pytest.approx(4.7622**-1.5, rel=1e-4)


def test_at_depth_one_no_margin_exceeds_that_of_neural_collapse() -> None:
    """R*(K, 1) = K - 1 is proven."""
    rng = np.random.default_rng(0)
    M = rng.standard_normal((200, 5, 5)) + rng.uniform(0, 20, (200, 1, 1)) * np.eye(5)
    margins = study.margin(M, 1)
    assert margins.max() <= 1 / 4
    assert margins.max() > 0.1


@pytest.mark.parametrize(("depth", "grows"), [(1, False), (2, True), (3, True), (5, True)])
def test_spectral_starts_repel_as_the_small_logit_law_says(depth: int, grows: bool) -> None:
    """While F is near log K, ds_i/dt = c s_i^{2L/(L+1)} for all i: s^{-q} - s'^{-q} is kept, q = (L-1)/(L+1); ratios at depth 1."""
    start = point(start="spectral", K=6, depth=depth, width=6, scale=1e-3, panel="path", seeds=1, floor=0.95 * np.log(6))
    path = next(iter(study.follow(start, 2)))
    s = np.linalg.svd(path.logits[[0, path.first_below(0.99 * np.log(6))]], compute_uv=False)[:, :5]
    assert s[1, 0] > 20 * s[0, 0]
    q = (depth - 1) / (depth + 1)
    law = s**-q if depth > 1 else -np.log(s)
    np.testing.assert_allclose(np.diff(law[1]), np.diff(law[0]), rtol=0.03)
    assert (s[1, 0] / s[1, -1] > 2 * s[0, 0] / s[0, -1]) == grows


def test_points_without_converged_directions_have_hollow_markers(table: sweep.Table) -> None:
    rows = table.where(panel="width")
    panel = figure.family(rows, "depth", "width", np.unique(rows["width"]).tolist(), "$d={}$")
    for curve in panel.curves:
        own = rows.where(width=int(curve.label[3:-1]))
        own = own.pick(np.argsort(own["depth"]))
        np.testing.assert_array_equal(curve.trusted, own["converged"] >= 0.9)
        np.testing.assert_array_equal(curve.y, own["rank"])


def test_another_run_computes_nothing_again(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.depth_implicit_bias._row": None, "figures.depth_implicit_bias.draw": studied.no_figure}
    assert studied.again("depth_implicit_bias", out, monkeypatch, broken) == studied.told(done)
