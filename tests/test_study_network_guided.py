"""The study of guided networks: rows are those of a plain run, floors are kept, heads share starts and batches, pairs are told apart."""

from __future__ import annotations

import copy
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import studied
from figures import network_guided as figure
from studies import guided_networks, network_guided
from ufm import sweep

torch = pytest.importorskip("torch")

SMOKE = network_guided.Options(smoke=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("guided")
    return studied.smoke("network_guided", out), out


@pytest.fixture(scope="module")
def table(smoke: Any) -> sweep.Table:
    return sweep.load(smoke[1])


def point(head: str = "nearest", gradient: bool | None = True, kind: str = "network", **other: Any) -> dict[str, Any]:
    """A smoke point of this head on balanced data."""
    found = (p for p in network_guided.points(SMOKE) if (p["kind"], p["head"], p["gradient"]) == (kind, head, gradient))
    return next(found) | other


def row(asked: dict[str, Any]) -> dict[str, Any]:
    return guided_networks.network_guided([asked], [0])[0]


def test_a_small_run_says_what_it_found_and_draws(smoke: Any, table: sweep.Table) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (said["networks"], said["diverged"]) == ("20", "0")
    assert len(table.where(kind="model")) == 8
    assert "0 of 2 within 0.001" in said["balanced, fixed ETF"]
    assert said["balanced, plain linear layer"].startswith("cross-entropy")
    assert "no reference" in said["balanced, plain linear layer"]
    assert "above the model" in said["long-tailed 1:10, standard"]
    assert all((out / f"network_guided{tail}{kind}").is_file() for tail in ("", "_tail") for kind in (".png", ".pdf", ".html"))
    assert (out / "networks_tail.csv").is_file()


def slow(z: Any, W: Any, b: Any, labels: Any) -> tuple[float, list[float]]:
    """Mean cross-entropy of W z + b, and sorted cosine margins, by loops over samples and classes."""
    centre, loss, margins = z.mean(axis=0), 0.0, []
    for h, y in zip(z, labels, strict=True):
        logits = [float(w @ h) + float(c) for w, c in zip(W, b, strict=True)]
        loss += np.log(sum(np.exp(x - logits[y]) for x in logits)) / len(z)
        rows = W - W.mean(axis=0)
        cosines = [float((h - centre) @ w) / float(np.linalg.norm(h - centre) * np.linalg.norm(w)) for w in rows]
        margins.append(cosines[y] - max(c for j, c in enumerate(cosines) if j != y))
    return float(loss), sorted(margins)


@pytest.mark.parametrize(("head", "gradient"), network_guided.HEADS)
@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_a_row_is_a_plain_run_measured_by_loops(head: str, gradient: bool | None, ratio: float) -> None:
    """The same network trained by a loop written out here: losses, margins, accuracies and the loss's gradient at the end."""
    asked = point(head, gradient, ratio=ratio)
    data = guided_networks.data_of(asked)
    network = guided_networks.network_of(asked, data).double()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    draws = torch.Generator().manual_seed(sweep.seed_of({"draws of": 0, "seed": 0}) % 2**63)
    parts = -(-len(data.labels) // min(64, len(data.labels)))
    for epoch in range(4):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 + np.cos(np.pi * epoch / 4)) / 2
        for at in torch.randperm(len(data.labels), generator=draws).tensor_split(parts):
            optimiser.zero_grad()
            features, labels = network.body(data.inputs[at]), data.labels[at]
            logits = network.head(features, labels) if head == "nearest" else network.head(features)
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimiser.step()
    got = row(asked)
    network.eval()
    optimiser.zero_grad()
    logits = network(data.inputs)
    torch.nn.functional.cross_entropy(logits, data.labels).backward()
    slope = np.sqrt(sum(float((p.grad**2).sum()) for p in network.parameters()))
    with torch.no_grad():
        h = network.body(data.inputs)
        z = h.numpy() if head == "linear" else (5 * h / torch.linalg.vector_norm(h, dim=1, keepdim=True)).numpy()
        test = (network(data.test_inputs).argmax(dim=1) == data.test_labels).numpy()
    W, b = network.head.weight.detach().numpy(), getattr(network.head, "bias", None)
    loss, margins = slow(z, W, np.zeros(10) if b is None else b.detach().numpy(), data.labels.numpy())
    assert got["end_cross_entropy"] == pytest.approx(loss, rel=1e-9)
    assert np.allclose(got["margins"], margins, rtol=0, atol=1e-9)
    assert 10 / 9 - got["end_margin_gap"] == pytest.approx(np.mean(margins), abs=1e-9)
    assert got["loss_gradient"] == pytest.approx(slope, rel=1e-8)
    assert got["end_test_accuracy"] == test.mean()
    assert got["end_accuracy"] == float((logits.argmax(dim=1) == data.labels).double().mean())
    small = np.mean([test[data.test_labels.numpy() == k].mean() for k in range(5, 10)])
    assert got["end_tail_test_accuracy"] == pytest.approx(small, rel=1e-12)
    assert got["counts"].tolist() == data.counts
    assert got["taken"] == 4


def test_no_network_passes_the_limits(table: sweep.Table) -> None:
    balanced = table.where(kind="network", ratio=1.0)
    guided = balanced.pick(balanced["head"] != "linear")
    floor = np.log1p(9 * np.exp(-5 * 10 / 9))
    assert np.allclose(guided["floor"], floor, rtol=1e-14)
    assert np.allclose(guided["cross_entropy"] - floor, guided["excess"], rtol=0, atol=1e-14)
    assert np.all(guided["excess"] > 0)
    assert np.all(balanced["margin_gap"] > 0)
    assert np.isnan(table.where(kind="network", ratio=10.0)["floor"]).all()
    assert np.isnan(balanced.where(head="linear")["excess"]).all()


@pytest.mark.parametrize(("head", "gradient"), network_guided.HEADS[1:4])
def test_the_model_ends_at_the_floor_of_balanced_classes(head: str, gradient: bool | None) -> None:
    got = row(point(head, gradient, kind="model", steps=600))
    assert -1e-12 <= got["end_excess"] <= 1e-6
    assert abs(got["end_margin_gap"]) <= 1e-3
    assert got["end_nc3"] <= 1e-3


def test_heads_share_bodies_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither head, gradient nor class sizes enter the body's draw or that of the batches; seed and run do."""
    from ufm import bridge

    seeds = []
    real = bridge.train

    def caught(model: Any, data: Any, training: Any, **other: Any) -> Any:
        seeds.append(training.seed)
        return real(model, data, training, **other)

    monkeypatch.setattr(bridge, "train", caught)
    first = guided_networks.network_of(point(), guided_networks.data_of(point())).body.state_dict()
    others: list[dict[str, Any]] = [{"head": "fixed", "gradient": None}, {"gradient": False}, {"head": "linear", "gradient": None}]
    others += [{"head": "standard", "gradient": None, "ratio": 10.0}, {"run": 1}, {"seed": 1}]
    for other in others:
        asked = point() | other
        body = guided_networks.network_of(asked, guided_networks.data_of(asked)).body.state_dict()
        same = not ({"run", "seed"} & set(other))
        assert same == all(torch.equal(body[name], value) for name, value in first.items())
        row(asked | {"epochs": 1})
    assert len(set(seeds[:4])) == 1
    assert len(set(seeds)) == 3


def test_the_standard_head_keeps_unit_rows_and_its_slope_on_the_sphere() -> None:
    head = guided_networks.unit_rows(6, 4, 5.0).double()
    torch.manual_seed(0)
    h, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    optimiser = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(h), y).backward()
        assert torch.linalg.vector_norm(head.weight, dim=1).detach().numpy() == pytest.approx(np.ones(4), abs=1e-14)
        assert (head.weight * head.weight.grad).sum(dim=1).detach().numpy() == pytest.approx(np.zeros(4), abs=1e-14)
        before, used = copy.deepcopy(head.weight.detach()), head(h).detach()
        assert np.allclose(used, 5 * (h / torch.linalg.vector_norm(h, dim=1, keepdim=True)) @ before.mT, atol=1e-13)
        optimiser.step()
        assert not np.allclose(torch.linalg.vector_norm(head.weight, dim=1).detach(), 1.0, atol=1e-6)
    head.eval()(h)
    assert torch.linalg.vector_norm(head.weight, dim=1).detach().numpy() == pytest.approx(np.ones(4), abs=1e-14)


def test_levels_are_reached_at_the_first_record_past_the_start() -> None:
    got = guided_networks.reached(np.array([0.0, 2, 4, 6]), np.array([0.0, 0.3, 0.04, 0.4]))
    at = dict(zip(guided_networks.LEVELS, got.tolist(), strict=True))
    assert (at[0.5], at[0.2], at[0.05]) == (2, 4, 4)
    assert np.isnan(at[0.02])
    lost = guided_networks.reached(np.array([0.0, 1]), np.array([0.1, np.nan]))
    assert np.isnan(lost).all()


def test_claims_count_seeds() -> None:
    def rows(loss: list[list[float]], test: list[list[float]]) -> sweep.Table:
        found = [
            {"epoch": np.array([0.0, 1, 4]), "cross_entropy": np.array(a), "nc1": np.array(a), "test_accuracy": np.array(b)}
            for a, b in zip(loss, test, strict=True)
        ]
        return sweep.Table([{"run": i} for i in range(2)], found, [None] * 2, "x")

    own = rows([[3, 1, 0.5], [3, 1, 0.5]], [[0, 0.5, 0.75], [0, 0.75, 1]])
    other = rows([[3, 2, 0.25], [3, 0.5, 0.25]], [[0, 0.25, 0.75], [0, 0.25, 0.75]])
    assert network_guided.claims(own, other, 1) == (
        "loss no higher in 1 of 2 seeds at epoch 1, 0 of 2 at epoch 4; NC1 in 1 of 2, 0 of 2; test accuracy no lower in 2 of 2, 2 of 2, "
        "its range over the seeds 0.25 against 0, 0.25 against 0"
    )


def test_pairs_are_of_one_seed_and_have_the_interval_of_student() -> None:
    from scipy.stats import ttest_1samp

    def rows(head: str, values: list[list[float]], order: list[int]) -> sweep.Table:
        return sweep.Table(
            [{"head": head, "run": run} for run in order], [{"reached": np.array(v)} for v in values], [None] * len(order), "x"
        )

    a = rows("a", [[4.0, np.nan], [9.0, 2.0], [2.0, 3.0]], [2, 0, 1])
    b = rows("b", [[3.0, 4.0], [2.0, 3.0], [4.0, np.nan]], [0, 1, 2])
    first, second = figure.paired(a, b, "reached")
    logs = np.log([9 / 3, 2 / 2, 4 / 4])
    interval = ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert first.seeds == 3
    assert np.allclose(np.log(first[1:]), [logs.mean(), interval.low, interval.high], rtol=1e-12)
    assert second.seeds == 2
    assert second.ratio == pytest.approx(np.sqrt(2 / 4))


def test_a_network_that_diverges_is_marked_and_drawn_so(table: sweep.Table) -> None:
    asked = point("linear", None)
    got = row(asked | {"lr": 1e200})
    assert (got["stop"], got["finite"], got["at_collapse"]) == ("DIVERGED", False, False)
    assert np.isfinite(got["cross_entropy"][0])
    assert np.isnan(got["cross_entropy"][-1])
    assert np.isnan(got["margins"]).all()
    assert np.isnan(got["loss_gradient"])
    rows = [got if p == asked else old for p, old in zip(table.points, table.results, strict=True)]
    broken = sweep.Table(table.points, rows, table.errors, "x")
    drawing = figure.make(broken, 1.0)
    margins = drawing.panels[0][2]
    (end,) = (c for c in margins.curves if c.label.startswith("linear layer"))  # type: ignore[union-attr]
    assert end.label == "linear layer, no normalisation (1 of 2 diverged)"
    assert np.array_equal(end.low, end.high)
    assert "1 of 10 networks diverged" in drawing.caption
    assert network_guided.summary(broken)["diverged"] == 1


def test_figures_show_the_rows(table: sweep.Table) -> None:
    """Medians and ranges over the seeds without the start; loss less the floor, or less the model's end under the same head."""
    for ratio in (1.0, 10.0):
        drawing = figure.make(table, ratio)
        panels = [panel for line in drawing.panels for panel in line]
        own = table.where(kind="network", ratio=ratio, head="nearest", gradient=True)
        level = np.log1p(9 * np.exp(-50 / 9))
        if ratio > 1:
            level = table.where(kind="model", ratio=ratio, head="nearest", gradient=True)["end_cross_entropy"][0]
        expected = {0: own["cross_entropy"] - level, 1: own["margin_gap"], 3: own["nc1"], 4: own["nc3"], 5: own["equinorm"]}
        expected |= {6: own["accuracy" if ratio == 1 else "test_accuracy"], 7: own["test_accuracy" if ratio == 1 else "tail_test_accuracy"]}
        for i, values in expected.items():
            (curve,) = (c for c in panels[i].curves if c.label == "nearest ETF")  # type: ignore[union-attr]
            kept = values[:, 1:]
            assert np.allclose([curve.low, curve.y, curve.high], [kept.min(axis=0), np.median(kept, axis=0), kept.max(axis=0)], rtol=1e-12)
            assert curve.x.tolist() == [2.0, 4.0]
        assert not any(c.label.startswith("linear") for c in panels[0].curves)  # type: ignore[union-attr]
        dotted = [c.y[0] for c in panels[4].curves if not c.label]  # type: ignore[union-attr]
        model = table.where(kind="model", ratio=10.0)
        ends = model.pick([gradient is not False for gradient in model.values("gradient")])["end_nc3"] if ratio > 1 else []
        assert sorted(dotted) == sorted(ends)
        assert "Shorter than the whole comparison" in drawing.caption


def test_the_table_holds_the_accuracies(table: sweep.Table) -> None:
    lines = figure.accuracies(table).decode().splitlines()
    assert len(lines) == 2 + 10
    own = table.where(kind="network", ratio=10.0, head="standard")
    (line,) = (text for text in lines if text.startswith("| digits, 1:10 | trained"))
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    shown = [own["accuracy"][:, 1], own["test_accuracy"][:, 1], own["accuracy"][:, 2], own["test_accuracy"][:, 2]]
    shown += [own["head_test_accuracy"][:, 2], own["tail_test_accuracy"][:, 2]]
    assert cells == [f"{100 * np.median(v):.2f} ({100 * v.min():.2f} to {100 * v.max():.2f})" for v in shown]


@pytest.mark.slow
def test_pictures_go_the_same_road(tmp_path: Path) -> None:
    """Made-up CIFAR-10 files, a ResNet-18, one epoch."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = np.arange(10, dtype=np.uint8)[:, None]
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, rng.integers(0, 256, (10, 3072), dtype=np.uint8)]).tobytes())
    options = network_guided.Options(dataset="cifar10", root=tmp_path, smoke=True)
    asked = next(p for p in network_guided.points(options) if p["head"] == "nearest") | {"n": 2, "epochs": 1, "every": 1}
    got = row(asked)
    assert got["finite"]
    assert got["counts"].tolist() == [2] * 10
    assert got["epoch"].tolist() == [0, 1]
    assert (asked["precision"], options.folder.name) == ("float32", "network_guided-smoke-cifar10")


def test_the_full_study_asks_what_it_should() -> None:
    points = [p for p in network_guided.points(network_guided.Options()) if p["kind"] == "network"]
    assert len(points) == 2 * 5 * 5
    named = ("epochs", "batch", "momentum", "radius", "n", "width", "hidden", "precision")
    assert {tuple(p[name] for name in named) for p in points} == {(200, 256, 0.9, 5.0, 150, 64, 256, "float64")}
    assert {p["ratio"] for p in points} == {1.0, 10.0}
    full = network_guided.points(network_guided.Options(dataset="cifar10", root=Path("x"), device="cpu"))
    assert {(p["width"], p["n"]) for p in full if p["kind"] == "network"} == {(512, 5000)}
    assert {(p["width"], p["n"]) for p in full if p["kind"] == "model"} == {(512, 500)}
    hundred = network_guided.points(network_guided.Options(dataset="cifar100", root=Path("x")))
    assert {(p["K"], p["n"]) for p in hundred} == {(100, 500)}


@pytest.mark.parametrize("wrong", [{"dataset": "cifar10"}, {"ratio": 1.0}, {"weight_decay": -1.0}, {"runs": 0}, {"epochs": 3}])
def test_options_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^--(dataset|ratio|weight-decay|runs|epochs) "):
        network_guided.Options(**wrong)


def test_a_second_call_computes_and_changes_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = smoke
    broken = {"studies.guided_networks.trained": None, "figures.network_guided.draw": studied.no_figure}
    assert studied.again("network_guided", out, monkeypatch, broken) == studied.told(done)
