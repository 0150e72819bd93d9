"""The ablation of the nearest ETF: shares, displacements and gains against slow oracles, shared starts, marked ends, figures of rows."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import etf_ablation as figure
from figures import stored
from studies import etf_ablation as study
from studies import etf_ablation_rows as rows_of
from ufm import etf, metrics, sweep
from ufm.dynamics import iterate
from ufm.theory import limits

POINTS = study.points(study.Options(smoke=True))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("ablation")
    return studied.smoke("etf_ablation", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return stored.read(smoke[1], "etf_ablation", figure.COLUMNS)


def point(panel: str = "averaging", **other: Any) -> dict[str, Any]:
    """A point of a panel at its smallest."""
    return next(p for p in POINTS if p["panel"] == panel) | other


def snapshots(at: dict[str, Any], steps: int) -> list[Any]:
    return list(iterate(rows_of.problem_of(at), ufm.rules.AGD(10.0), (rows_of.start_of(at),), steps=steps, every=1))


def slope_of(function: Any, z: np.ndarray) -> np.ndarray:
    """Central differences."""
    found = np.zeros(z.shape)
    for i in np.ndindex(*z.shape):
        e = np.zeros(z.shape)
        e[i] = 1e-5
        found[i] = (function(z + e) - function(z - e)) / 2e-5
    return found


def test_a_small_run_says_what_it_found_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["points"] == str(len(table)) == str(len(POINTS))
    assert said["diverged"] == "0"
    assert all((out / f"{name}{kind}").is_file() for name in ("etf_ablation", "etf_ablation_guard") for kind in (".png", ".pdf", ".html"))
    for text in ("steps to 1e-6, K = 4, d = 12", "indirect over direct gradient", "unrelated proximal point", "guard 0.05 at full rank"):
        assert any(name.startswith(text) for name in said)


@pytest.mark.parametrize(("steps", "law"), [(0, "2/(t+1)"), (3, "2/(t+1)"), (3, "none"), (3, "0.1")])
def test_the_share_is_that_of_differences_of_the_loss(steps: int, law: str) -> None:
    """The loss as a function of the features, W held or made anew from the average that they enter at rate a_t; parts along z left out."""
    at = point(K=3, width=4, n=2, averaging=law, seeds=1)
    last = snapshots(at, max(steps, 1))[steps]
    z, labels = last.factors[0][0], np.repeat(np.arange(3), 2)
    rate, average = rows_of.LAWS[law].rate(steps + 1), last.frame.guide.average.means[0]

    def centred(z: np.ndarray) -> np.ndarray:
        return z.reshape(4, 3, 2).mean(axis=2) - z.mean(axis=1, keepdims=True)

    def loss(z: np.ndarray, W: np.ndarray) -> float:
        logits = W @ (z - z.mean(axis=1, keepdims=True))
        return float(np.mean(np.log(np.exp(logits).sum(axis=0)) - logits[labels, np.arange(6)]))

    direct = slope_of(lambda y: loss(y, last.factors[1][0]), z)
    whole = slope_of(lambda y: loss(y, etf.nearest(average + rate * (centred(y) - centred(z))).W), z)
    direct, whole = (g - z * (g * z).sum(axis=0) / (z * z).sum(axis=0) for g in (direct, whole))
    assert rows_of.through(last, last.frame)[0] == pytest.approx(np.linalg.norm(whole - direct) / np.linalg.norm(direct), rel=1e-5)


def test_the_share_does_not_ask_whether_the_run_used_it() -> None:
    """Equal at the start, whatever the switch, and at the start above 1e-3."""
    on, off = (rows_of.followed(point(gradient=gradient))["share"][:, 0] for gradient in (True, False))
    assert np.array_equal(on, off)
    assert np.all(on > 1e-3)


def test_w_is_where_its_displacement_says() -> None:
    """Nowhere else without averaging; with it as far as `etf_separation` finds, a function of W and features alone."""
    for at in (point(averaging="none"), point("imbalance", averaging="none", pattern="step", ratio=4.0, weights="sizes", steps=20)):
        assert np.nanmax(rows_of.followed(at)["displacement"]) <= 1e-14
    at = point(averaging="0.1")
    found = rows_of.followed(at)["displacement"]
    last = snapshots(at, 5)[5]
    apart = metrics.etf_separation(last.factors[1].mT, last.statistics.means)
    assert np.allclose(found[:, rows_of.SHOWN.index(5)], np.sqrt(apart), rtol=1e-9)
    assert apart.min() > 1e-10


def test_levels_are_reached_where_the_loss_says() -> None:
    """First looks of a run that is looked at after every step, and the next look of one that is looked at every tenth."""
    at = point(K=10, width=12, n=4, steps=300)
    values = np.array([s.value for s in snapshots(at, 300)]) - float(limits.cross_entropy_floor(10, 5.0))
    often, seldom = rows_of.followed(at), rows_of.followed(at | {"every": 10})
    for name, level in rows_of.LEVELS.items():
        first = np.argmax(values <= level, axis=0)
        assert np.all((values <= level).any(axis=0))
        assert np.array_equal(often[f"reached_{name}"], first)
        assert np.array_equal(seldom[f"reached_{name}"], np.where(first <= 10, first, -(-first // 10) * 10))
    assert np.array_equal(often["settled"], np.argmax(values <= values[-1] + rows_of.SETTLED, axis=0))
    assert np.allclose(often["end_excess"], values[-1], atol=1e-15)
    assert set(often["stop"]) == {"STEPS"}
    assert np.all(np.isnan(rows_of.followed(at | {"steps": 1})["reached_6"]))


def test_all_options_start_at_the_same_place() -> None:
    """Nothing of the head enters the draw; sizes and seed do; every second class is as far from the one before it as asked."""
    at = point()
    H = rows_of.start_of(at)
    for other in (
        {"averaging": "none"},
        {"guard": 0.05},
        {"gradient": False},
        {"form": "full", "delta": 1e-3},
        {"steps": 3},
        {"panel": "x"},
    ):
        assert np.array_equal(H, rows_of.start_of(at | other))
    assert not np.array_equal(H, rows_of.start_of(at | {"seed": 1}))
    near = rows_of.start_of(at | {"apart": 1e-3})
    own, plain = (x.reshape(*x.shape[:2], at["K"], -1) for x in (near, H))
    assert np.array_equal(own[:, :, ::2], plain[:, :, ::2])
    assert np.allclose(own[:, :, 1::2] - own[:, :, ::2], 1e-3 * plain[:, :, 1::2], atol=1e-6)


def test_unequal_classes_are_told_class_by_class() -> None:
    """Loss and margins of classes by loops, the smaller half of them last; no floor."""
    at = point("imbalance", pattern="exponential", ratio=4.0, weights="sizes", K=5, steps=10)
    counts = rows_of.counts_of(at)
    assert counts[0] == 4 * counts[-1]
    assert np.all(np.diff(counts) <= 0)
    row = rows_of.followed(at)
    last = snapshots(at, 10)[10]
    labels = np.repeat(np.arange(5), counts)
    z, W = last.factors[0][0], last.factors[1][0]
    logits = W @ (z - z.mean(axis=1, keepdims=True))
    losses = np.log(np.exp(logits).sum(axis=0)) - logits[labels, np.arange(len(labels))]
    margins = metrics.cosine_margins(last.factors[0][:1], last.factors[1][:1], labels)[0]
    assert row["end_class_loss"][0] == pytest.approx(np.mean([losses[labels == k].mean() for k in range(5)]), rel=1e-12)
    assert row["end_loss"][0] == pytest.approx(losses.mean(), rel=1e-12)
    assert row["end_minority_margin"][0] == pytest.approx(np.mean([margins[labels == k].mean() for k in (3, 4)]), rel=1e-12)
    assert np.isnan(row["floor"])
    assert np.all(np.isnan(row["reached_2"]))
    assert last.frame.head.weights == pytest.approx(counts)


def test_an_unrelated_point_displaces_and_a_lagged_one_does_not() -> None:
    """rho is delta (K-1)/2, near collapse W moves by about rho times the part of the other frame across it, and nearest stays nearest."""
    at = point("displacement", K=9, width=40, means="near collapse", form="reduced", seeds=3, relative=0.0, delta=1e-3)
    moved = rows_of.displaced(at)["displaced"]
    assert np.allclose(moved, rows_of.displaced(at | {"delta": 0.0, "relative": 4e-3})["displaced"], rtol=1e-10)
    assert np.all((moved > 0.7 * 4e-3) & (moved <= 4e-3))
    assert rows_of.displaced(at | {"near": "lagged"})["displaced"].max() <= 1e-12
    changed = rows_of.displaced(at)["guard_changes"]  # across the span of the features by 0.05^2, within it by a quarter of that
    assert np.all((changed > 0.25 * 0.05**2) & (changed < 0.05**2))
    run = point("delta", averaging="none", form="reduced", delta=0.0, relative=0.1)
    off, lagged = (np.nanmin(rows_of.followed(run | {"near": near})["displacement"][:, 10]) for near in ("unrelated", "lagged"))
    assert off > 0.05 > 100 * lagged


@pytest.mark.parametrize("delta", [0.0, 1e-2])
def test_the_gain_is_that_of_differences(delta: float) -> None:
    at = point("pullback", K=4, width=6, pairs=1, apart=0.1, guard=0.0, form="reduced", delta=delta, seeds=1)
    B = rows_of.means_of(at, 0)
    near = rows_of.posed(at, B, 0)
    slope = np.random.default_rng([at["seed"], 0]).standard_normal(near.W.shape)
    prox = etf.nearest(B).U if delta else None
    gradient = slope_of(lambda Y: float(np.sum(slope * etf.nearest(Y, prox=prox, delta=delta).W)), B)
    size = np.linalg.norm(B - B.mean(axis=1, keepdims=True))
    expected = size * np.linalg.norm(gradient) / (2 * np.linalg.norm(slope - slope.mean(axis=0)))
    assert rows_of.pulled_back(at)["gain"][0] == pytest.approx(expected, rel=1e-6)


def test_without_a_guard_the_gradient_grows_as_classes_meet_and_the_run_stalls() -> None:
    """The gain grows like one over the distance, at most like one over delta; the guard holds it, and the run."""
    far, close = (
        rows_of.pulled_back(point("pullback", pairs=1, guard=0.0, form="reduced", delta=0.0, apart=a))["gain"] for a in (1e-3, 1e-5)
    )
    assert np.allclose(close / far, 100, rtol=0.01)
    assert rows_of.pulled_back(point("pullback", pairs=1, guard=0.05, form="reduced", delta=0.0, apart=1e-5))["gain"].max() < 2
    start = point("coinciding", form="reduced", delta=0.0, gradient=True, apart=1e-5, K=10, width=24, n=4, steps=100)
    free, held = (rows_of.followed(start | {"guard": guard}) for guard in (0.0, 0.05))
    assert held["end_excess"].max() < 1e-3 * free["end_excess"].min()


def test_a_run_that_diverges_is_named_and_has_no_curve_after_that(monkeypatch: pytest.MonkeyPatch, table: sweep.Table) -> None:
    """A rule that loses its second run at the fourth step: NaN from there on, the first run as it was."""

    class Lost(ufm.rules.AGD):
        def clock(self, state: Any, taken: int) -> Any:
            if taken == 4 and len(state[0]) > 1:
                state[0][1] = np.nan
            return super().clock(state, taken)

    at = point()
    whole = rows_of.followed(at)
    monkeypatch.setitem(rows_of.RULES, "AGD", Lost(10.0))
    row = rows_of.followed(at)
    assert row["stop"].tolist() == ["STEPS", "DIVERGED"]
    assert np.all(np.isfinite(row["excess"][1, :5]))
    assert np.all(np.isnan(row["excess"][1, 5:]))
    assert np.isnan(row["end_nc1"][1])
    shown = [rows_of.SHOWN.index(step) for step in (3, 10, 40)]
    assert np.array_equal(row["excess"][0, shown], whole["excess"][0, shown])
    results = [row | r if p["panel"] == "averaging" else r for p, r in zip(table.points, table.results, strict=True)]
    lost = sweep.Table(table.points, [r | {"stop": row["stop"]} if "stop" in r else r for r in results], table.errors, "x")
    runs = int(table.where(panel="averaging")["seeds"].sum())
    assert f"{runs // 2} of {runs} runs diverged" in figure.make(lost).caption
    assert study.summary(lost)["diverged"] > 0


def test_the_full_study_asks_what_it_should() -> None:
    """Five seeds everywhere; every law at every setting; K up to 1000 for the static panel alone; both patterns and all weights."""
    points = study.points(study.Options())
    assert {p["seeds"] for p in points} == {5}
    assert len({sweep.seed_of(p) for p in points}) == len(points)
    runs = [p for p in points if p["panel"] == "averaging" and p["n"] < 100]
    settings = {(p["K"], p["width"], p["rule"]) for p in runs}
    assert settings == {(10, 64, "AGD"), (10, 9, "AGD"), (10, 64, "Adam"), (10, 64, "momentum"), (100, 128, "AGD")}
    assert {(p["K"], p["width"], p["rule"], p["averaging"]) for p in runs} == {(*s, law) for s in settings for law in rows_of.LAWS}
    assert max(p["K"] for p in points) == 1000
    assert {p["panel"] for p in points if p["K"] > 100} == {"displacement"}
    tails = [p for p in points if p["panel"] == "imbalance"]
    assert len(tails) == len({(p["pattern"], p["ratio"], p["weights"]) for p in tails}) == 24
    assert all(p["steps"] in rows_of.SHOWN for p in points if "steps" in p)
    assert all(step in rows_of.SHOWN for p in points if p.get("every", 1) > 1 for step in range(11))


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.etf_ablation.followed": None, "studies.etf_ablation.keep_freed_memory": None}
    assert studied.again("etf_ablation", out, monkeypatch, broken | {"figures.etf_ablation.draw": studied.no_figure}) == studied.told(done)


def test_figures_show_the_rows(table: sweep.Table) -> None:
    """Medians and ranges as stored, laws against the source's seed by seed, hollow where a seed did not get there."""
    (loss, against, _), (_, by_size, static) = figure.make(table).panels
    narrow = table.where(panel="averaging", width=3)
    for key, curve in zip(figure.LAWS, loss.curves, strict=True):
        own = narrow.where(averaging=key[0], gradient=key[1])["excess"][0]
        at = [rows_of.SHOWN.index(int(step)) for step in curve.x]
        assert np.array_equal([curve.y, curve.low, curve.high], [f(own[:, at], axis=0) for f in (np.median, np.min, np.max)])
    assert len(against.curves) == len(figure.LAWS) - 1
    assert all(curve.low.min() > 0 for curve in against.curves)
    assert [c.label for c in by_size.curves if c.label] == ["$K=4$, $d=3$, $n=5$", "$K=4$, $d=12$, $n=5$"]
    assert len(static.curves) == 8
    (gain, arrival, lag), (loss, margin, change) = figure.make_guard(table).panels
    assert arrival.hollow == figure.UNFINISHED
    assert not any(curve.trusted.any() for curve in arrival.curves)  # no tiny run gets to 1e-4
    assert all(np.all(curve.y == 40) for curve in arrival.curves)
    assert [len(panel.curves) for panel in (gain, lag, loss, margin, change)] == [4, 6, 6, 6, 2]
    own = table.where(panel="imbalance", pattern="step", weights="sizes")
    order = np.argsort(own["ratio"])
    assert np.array_equal(margin.curves[-1].y, np.median(own["end_minority_margin"][order], axis=1))
