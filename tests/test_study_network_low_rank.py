"""The study of deep heads: a network's value is the model's at its features, levels are theory's, starts are shared, marks are drawn."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
import ufm
from figures import low_rank, network_low_rank_ends
from figures import network_low_rank as figure
from studies import low_rank_ends, network_low_rank
from ufm import plots, sweep
from ufm.theory import deep, deep_points, deep_relu, deep_relu_ce

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

SMOKE = network_low_rank.Options(smoke=True)
HEADS = {"linear": ("linear", "features"), "relu": ("relu", "features"), "decay": ("linear", "decay")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("low_rank")
    return studied.smoke("network_low_rank", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return sweep.load(smoke[1])


def point(head: str = "linear", panel: str = "trained", **other: Any) -> dict[str, Any]:
    """A smoke point of this head."""
    activation, penalty = HEADS[head]
    found = next(p for p in network_low_rank.points(SMOKE) if (p["panel"], p["activation"], p["penalty"]) == (panel, activation, penalty))
    return found | other


def slow_value(asked: dict[str, Any], features: Any, weights: Any, labels: Any, lam_h: float) -> tuple[float, float]:
    """F and its data loss by a loop over the samples."""
    loss = 0.0
    for h, y in zip(features, labels, strict=True):
        z = h
        for i, W in enumerate(weights):
            z = W @ z
            if asked["activation"] == "relu" and i < len(weights) - 1:
                z = np.where(z > 0, z, 0.0)
        loss += (np.log(sum(np.exp(x) for x in z)) - z[y]) / len(labels)
    held = sum(asked["lam"] / 2 * float((W**2).sum()) for W in weights) + lam_h / 2 * sum(float(h @ h) for h in features)
    return loss + held, loss


def test_a_small_run_leaves_its_files_and_says_what_it_found(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    own = table.where(panel="trained", activation="linear", penalty="features")
    assert said["linear head, L = 3, model's penalty 0.005"].startswith(f"{int(own['below'].sum())} of 2 networks below DNC (0.00 to 0.66)")
    assert "linear head, L = 3, model's penalty 0.005, simulated from random starts" in said
    assert all((out / f"{name}{kind}").is_file() for name in figure_names() for kind in (".png", ".pdf", ".html"))
    assert {path.name for path in out.glob("rows_*.csv")} == {f"rows_{panel}.csv" for panel in ("trained", "simulated", "predicted")}
    again = sweep.load(out)
    assert len(again) == len(network_low_rank.points(SMOKE)) == 3 * 2 + 2 * 2 + 2


def figure_names() -> tuple[str, str]:
    return "network_low_rank", "network_low_rank_ends"


@pytest.mark.parametrize("head", HEADS)
def test_a_network_is_a_point_of_its_model(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value by a loop over the samples; under the model's penalty it is what training minimised, so DNC's level bounds it likewise."""
    kept: list[Any] = []
    real = low_rank_ends.of_network

    def watched(*given: Any) -> Any:
        kept.append(given)
        return real(*given)

    monkeypatch.setattr(low_rank_ends, "of_network", watched)
    asked = point(head)
    row = network_low_rank.network_low_rank([asked], [0])[0]
    _, network, data = kept[0]
    with torch.no_grad():
        features = network.body(data.batch()[0]).double().numpy()
    weights = [W.detach().double().numpy() for W in network.head.parameters()]
    lam_h = asked["lam"] / asked["n"] if head != "decay" else asked["lam"] * (weights[0] ** 2).sum() / (features**2).sum()
    value, loss = slow_value(asked, features, weights, data.labels.numpy(), lam_h)
    assert row["value"] == pytest.approx(value, rel=1e-6)
    assert row["end_loss"] == pytest.approx(loss, rel=1e-6)
    assert row["loss"][-1] == pytest.approx(loss, rel=1e-4)
    if head != "decay":
        assert row["objective"][-1] == pytest.approx(value, rel=1e-4)
    else:
        everything = asked["lam"] / 2 * sum(float((p.detach().double() ** 2).sum()) for p in network.parameters())
        assert row["objective"][-1] == pytest.approx(loss + everything, rel=1e-4)
    assert row["lam_eff"] == pytest.approx((asked["n"] * lam_h * asked["lam"] ** asked["depth"]) ** (1 / (asked["depth"] + 1)), rel=1e-6)
    assert row["below"] == (row["value"] < row["dnc"])
    means = np.stack([features[data.labels.numpy() == k].mean(axis=0) for k in range(10)], axis=1)
    assert row["spectra"][0] == pytest.approx(np.linalg.svd(means, compute_uv=False), rel=1e-5)
    assert row["weight_spectra"][0] == pytest.approx(np.linalg.svd(weights[0], compute_uv=False), rel=1e-6)


def test_levels_are_those_of_theory(table: sweep.Table) -> None:
    """Linear: DNC and the codes; ReLU: orthogonal frames and the bound; no minimum found lies above the best code."""
    rows = {row["activation"][0]: row for row in (table.where(panel="predicted", activation=a) for a in ("linear", "relu"))}
    linear, relu = (dict(zip(rows[a].values("names")[0], rows[a].values("levels")[0], strict=True)) for a in ("linear", "relu"))
    for code in deep_points.candidates(10):
        name = "DNC" if code.name.startswith("DNC") else code.name
        assert linear[name] == pytest.approx(float(deep_points.levels(code, 5e-3, 3).value), rel=1e-12)
    assert relu["DNC"] == pytest.approx(float(deep_relu_ce.cross_entropy([deep_relu.orthogonal(10, 4)], 5e-3).value), rel=1e-12)
    assert relu["linear DNC"] == pytest.approx(float(deep_points.levels(deep_points.dnc(10), 5e-3, 4).value), rel=1e-12)
    assert relu["linear DNC"] < relu["DNC"]
    assert rows["linear"]["minima_values"].min() <= min(v for v in linear.values() if np.isfinite(v)) + 1e-9
    problem = network_low_rank.problem_of(point())
    alpha = deep_points.levels(deep_points.dnc(10), 5e-3, 3).scales[0]
    assert low_rank_ends.loss_at_collapse(problem) == pytest.approx(np.log1p(9 * np.exp(-alpha)), rel=1e-12)


def test_the_model_is_that_of_the_training_settings() -> None:
    """What the bridge reads off the settings is the problem that is simulated; lambda_eff is lambda, as in the papers."""
    for head in ("linear", "relu"):
        ours, theirs = network_low_rank.problem_of(point(head)), low_rank_ends.model_of(point(head), np.nan)
        for name in ("counts", "lam_w", "lam_h"):
            assert np.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-14, atol=0)
        assert (ours.depth, ours.width, ours.activation, ours.features) == (theirs.depth, theirs.width, theirs.activation, theirs.features)
        assert low_rank_ends.lambda_eff(ours) == pytest.approx(5e-3, rel=1e-14)
        assert low_rank_ends.lambda_eff(network_low_rank.problem_of(point(head), 5, "samples")) == pytest.approx(5e-3, rel=1e-14)
    assert low_rank_ends.model_of(point("decay"), 0.25).lam_h[0] == pytest.approx(0.01 * 0.25, rel=1e-14)


def test_collapse_is_at_its_level_and_pairs_are_below() -> None:
    """Factors of closed-form points in place of a network's: value, name, rank, partners side by side."""
    asked = point(n=3)
    problem, labels = network_low_rank.problem_of(asked), np.repeat(np.arange(10), 3)
    mixed = np.array([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])
    for code, name, rank in ((deep_points.dnc(10), "DNC", 9), (deep_points.pairs(10), "5 pairs", 5)):
        M = deep_points.at(code, 5e-3, 3).M[np.ix_(np.argsort(mixed), np.argsort(mixed))]
        H, *W = deep.balanced_factors(M, 3, 5e-3 / 3, [5e-3] * 3, asked["width"], np.random.default_rng(0))
        layers = low_rank_ends.hidden(asked, H[:, labels], W)
        value, _ = low_rank_ends.value_of(problem, H[:, labels], W, labels)
        assert value == pytest.approx(float(deep_points.levels(code, 5e-3, 3).value), rel=1e-12)
        assert (value < low_rank_ends.levels(problem)["DNC"] * (1 - 1e-9)) == (name != "DNC")
        end = low_rank_ends.ending(asked, problem, [H, *W])
        assert (end["name"], end["basin"]) == (name, name)
        shape = low_rank_ends.shape_of(M, [low_rank_ends.class_means(X.T, labels) for X in layers[:-1]], W)
        assert (shape["rank"], shape["feature_rank"], shape["narrowest"]) == (rank, rank, rank)
        assert shape["weight_ranks"][:3].tolist() == [rank] * 3
        assert np.isnan(shape["weight_ranks"][3:]).all()
        if rank == 5:
            assert all(M[a, b] < -1 for a, b in shape["order"].reshape(5, 2))


def test_networks_of_a_run_start_alike_and_simulations_start_from_them() -> None:
    data = network_low_rank.dataset_of(point())
    first, decayed, other = (network_low_rank.network_of(p, data) for p in (point(), point("decay"), point(run=1)))
    for a, b, c in zip(first.parameters(), decayed.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    spread = float(torch.cat([W.detach().flatten() for W in list(first.head.parameters())[:2]]).std())
    assert spread == pytest.approx(16**-0.5, rel=0.1)
    wide = network_low_rank.network_of(point("relu", width=200), data)
    assert float(next(wide.head.parameters()).detach().std()) == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    asked = point(panel="simulated", start="network")
    start = network_low_rank.start_of_networks(asked, network_low_rank.problem_of(asked))
    inputs, labels = data.batch()
    with torch.no_grad():
        h = first.body(inputs).double()
    assert np.allclose(start.factors[0][0][:, 3], h[labels == 3].mean(dim=0).numpy(), rtol=1e-6, atol=1e-8)
    assert np.array_equal(start.factors[2][1], list(other.head.parameters())[1].detach().double().numpy())
    relu = point("relu", "simulated", start="network")
    problem = network_low_rank.problem_of(relu, 5, "samples")
    H = network_low_rank.start_of_networks(relu, problem).factors[0]
    assert H.shape == (2, 16, 50)
    with torch.no_grad():
        own = network_low_rank.network_of(relu | {"run": 1}, data).body(inputs[labels == 7][:5]).double().numpy()
    assert np.allclose(H[1][:, 35:40], own.T, rtol=1e-6, atol=1e-8)


def test_simulated_paths_are_those_of_simulate(table: sweep.Table) -> None:
    asked = point(panel="simulated", start="network")
    problem = network_low_rank.problem_of(asked)
    start = network_low_rank.start_of_networks(asked, problem)
    row = network_low_rank.network_low_rank([asked], [0])[0]
    flow = ufm.rules.GradientFlow(until=float(row["path_lam_t"][-1] / asked["lam"]))
    path = ufm.simulate(problem, flow, runs=2, steps=5000, start=start)
    assert row["paths"][:, -1] == pytest.approx(path.value[np.arange(2), np.sum(np.isfinite(path.value), axis=1) - 1], rel=1e-2)
    assert np.all(row["end_ratios"] <= row["paths"][:, -1] / row["dnc"])
    for rows in (table.where(panel="simulated", activation="linear"),):
        assert np.all(rows["end_gradients"] < 1e-6)
        assert np.all(rows["end_minima"] == 1)
        assert np.all(rows["settled"])
        assert np.array_equal(rows["below_count"], (rows["end_ratios"] < 1).sum(axis=1))


def test_a_shallow_head_ends_no_lower_than_collapse() -> None:
    """L = 1, where DNC is optimal: a network comes within 2 % of its level, not below; the model ends on it."""
    other: dict[str, Any] = {"depth": 1, "epochs": 400, "hidden": 64, "rate": 0.2}
    row = network_low_rank.network_low_rank([point(**other)], [0])[0]
    assert 1 <= row["ratio"] < 1.02
    assert not row["below"]
    assert (row["rank"], row["basin"]) == (9, "DNC")
    assert row["basin_value"] == pytest.approx(row["dnc"], rel=1e-8)
    assert row["ranks"][-1] == 9


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {f"studies.network_low_rank.{name}": None for name in ("trained", "simulated", "predicted")}
    assert studied.again(
        "network_low_rank", out, monkeypatch, broken | {"figures.network_low_rank.draw_all": studied.no_figure}
    ) == studied.told(done)


def test_a_row_does_not_depend_on_its_block_or_seed(table: sweep.Table) -> None:
    """Computed beside another point, the same bits."""
    asked = point("linear", run=1)
    row = network_low_rank.network_low_rank([point("linear"), asked], [1, 2])[1]
    stored = table.where(panel="trained", activation="linear", penalty="features", run=1)
    assert all(np.array_equal(stored.values(name)[0], row[name]) for name in ("objective", "logits", "value"))


def test_the_full_study_asks_what_it_should(tmp_path: Path) -> None:
    points = network_low_rank.points(network_low_rank.Options())
    trained = [p for p in points if p["panel"] == "trained"]
    kinds = {(p["activation"], p["penalty"], p["depth"], p["lam"]) for p in trained}
    assert kinds == {("linear", "features", L, 5e-3) for L in (1, 2, 3, 4)} | {("relu", "features", 4, 5e-3), ("linear", "decay", 3, 1e-2)}
    assert {(p["rate"], p["width"], p["K"], p["n"]) for p in trained} == {(0.05, 64, 10, 150)}
    assert len(trained) == 5 * len(kinds)
    assert {p["lam"] * low_rank_ends.duration(p) for p in trained if p["penalty"] == "features"} == {15.0}
    pictures = network_low_rank.points(network_low_rank.Options(dataset="cifar10", root=tmp_path, epochs=50))
    assert {(p["n"], p["lam"] / p["n"], p["epochs"]) for p in pictures if p["penalty"] == "features"} == {(5000, 1e-6, 50)}


@pytest.mark.parametrize("wrong", [{"dataset": "mnist"}, {"epochs": 3}])
def test_options_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--root|--epochs"):
        network_low_rank.Options(**wrong)


def test_pictures_get_a_residual_body_with_free_features() -> None:
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    from ufm.bridge.data import Data

    data = Data("pictures", images, torch.arange(10).repeat(2), 10, images[:0], torch.arange(0))
    network = network_low_rank.network_of(point(), data)
    features, labels = low_rank_ends.features_of(network, data)
    assert features.shape == (20, 16)
    assert (features < 0).any()
    assert labels.tolist() == list(range(10)) * 2


def test_figures_show_the_rows(table: sweep.Table) -> None:
    first = figure.make(table).panels
    assert len(first) == 3
    for line, head in zip(first, HEADS, strict=True):
        activation, penalty = HEADS[head]
        own = table.where(panel="trained", activation=activation, penalty=penalty)
        networks = [c for c in line[0].curves if c.colour == low_rank.NETWORKS]  # type: ignore[union-attr]
        kept = own["lam_t"][0] > 0
        assert np.array_equal([c.y for c in networks], own["objective"][:, kept])
        middle = sorted(range(2), key=lambda i: own["ratio"][i])[1]
        order = own["order"][middle].astype(int)
        expected = own["logits"][middle][np.ix_(order, order)]
        assert line[2].values == pytest.approx(expected / np.abs(expected).max())  # type: ignore[union-attr]
        spectrum = line[3].values  # type: ignore[union-attr]
        assert spectrum[0, :10] == pytest.approx(own["spectra"][middle][0] / own["spectra"][middle][0, 0])
        weights = own["weight_spectra"][middle][own["depth"][0] - 1, :10]
        assert spectrum[-1, :10] == pytest.approx(weights / weights[0])
    levels = {c.label: c.y[0] for c in first[0][0].curves if c.y.size == 2}  # type: ignore[union-attr]
    predicted = table.where(panel="predicted", activation="linear")
    assert (levels["DNC"], levels["lowest predicted"]) == (predicted["dnc"][0], predicted["minima_values"].min())
    assert not [c for c in first[2][0].curves if c.label == "DNC"]  # type: ignore[union-attr]


def test_what_did_not_come_to_rest_is_marked(table: sweep.Table) -> None:
    (value, rank, _), (linear, _relu, _) = network_low_rank_ends.make(table).panels
    networks = next(c for c in value.curves if c.label == "networks")  # type: ignore[union-attr]
    assert not networks.trusted.any()
    assert next(c for c in rank.curves if c.label.startswith("model, random")).trusted.all()  # type: ignore[union-attr]
    assert isinstance(linear, plots.Bars)
    assert linear.unsettled.tolist() == [0, 0, 0, 2]
    at_rest = sweep.Table(
        table.points,
        [row | ({"drift": 1e-3} if p["panel"] == "trained" else {}) for p, row in zip(table.points, table.results, strict=True)],
        table.errors,
        "x",
    )
    again = network_low_rank_ends.make(at_rest)
    assert next(c for c in again.panels[0][0].curves if c.label == "networks").trusted.all()  # type: ignore[union-attr]
    assert again.panels[1][0].unsettled.tolist() == [0] * 4  # type: ignore[union-attr]
    assert "6 of 6 networks" in again.caption
