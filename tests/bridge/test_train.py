"""Training: steps against formulas, records against autograd, runs that repeat and go on bit for bit, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from ufm import frames, metrics  # noqa: E402
from ufm.arrays import NoDevice  # noqa: E402
from ufm.bridge import data, models  # noqa: E402
from ufm.bridge.heads import NearestETFHead  # noqa: E402
from ufm.bridge.monitor import Monitor  # noqa: E402
from ufm.bridge.objective import Objective  # noqa: E402
from ufm.bridge.train import SGD, Adam, History, Training, train  # noqa: E402
from ufm.records import Stop  # noqa: E402

DOUBLE = torch.float64
DATA = data.clusters([12, 9, 4], dimension=6, noise=1.0, separation=3.0, test=5)
PICTURES = data.Data(
    "pictures",
    torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(20) % 2,
    2,
    torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    torch.zeros(0, dtype=torch.int64),
)


def network(batch_norm: bool = False, dropout: bool = False, seed: int = 0) -> models.Network:
    with models.seeded(seed):
        body = models.mlp((6, 8, 5), batch_norm=batch_norm)
        return models.Network(nn.Sequential(body, nn.Dropout(0.3)) if dropout else body, nn.Linear(5, 3))


def guided() -> models.Network:
    with models.seeded(0):
        return models.Network(models.mlp((6, 8, 5)), NearestETFHead(5, 3))


def residual() -> models.Network:
    with models.seeded(0):
        body = models.ResNet(1, 2, (1, 1), projected=False)
        return models.Network(body, nn.Linear(body.out_features, 2))


def behind() -> models.Network:
    """A guided head behind a layer of its own."""
    with models.seeded(0):
        return models.Network(models.mlp((6, 8, 5)), nn.Sequential(nn.Linear(5, 4), NearestETFHead(4, 3)))


class Between(nn.Module):
    """Logits W relu(bn(h)): of the features h that a penalty is given, not those that the head is given."""

    def __init__(self) -> None:
        super().__init__()
        with models.seeded(0):
            self.body, self.bn, self.head = models.mlp((6, 8, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bn(self.body(inputs))))


def decay(model: nn.Module, features: torch.Tensor, B: int) -> torch.Tensor:
    """A penalty of a UFM on N = 25 samples."""
    return 0.01 / 2 * (model.head.weight**2).sum() + 2e-3 / 2 * 25 / B * (features**2).sum()


def state(model: nn.Module) -> list[np.ndarray]:
    return [value.detach().numpy().copy() for value in model.state_dict().values()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def equal(a: History, b: History) -> bool:
    names = ("epoch", "loss", "objective", "gradient_norm", "accuracy", "test_accuracy", "rates")
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True) for name in names)
        and a.metrics.keys() == b.metrics.keys()
        and all(np.array_equal(a.metrics[name], b.metrics[name], equal_nan=True) for name in a.metrics)
        and a.stops == b.stops
    )


def gradients(model: nn.Module, training: Training, penalty: Any) -> list[torch.Tensor]:
    x, y = DATA.to(dtype=DOUBLE).batch()
    features = model.body(x)
    total = nn.functional.cross_entropy(model.head(features), y)
    total = total if penalty is None else total + penalty(model, features, len(y))
    total = total + training.weight_decay / 2 * sum((p**2).sum() for p in model.parameters())
    return list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("optimiser", [SGD(0.3), SGD(0.1, 0.9), SGD(0.1, 0.9, nesterov=True), Adam(0.01), Adam(0.05, 0.8, 0.95, 1e-4)])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("penalty", [None, decay])
def test_steps_are_their_formulas(optimiser: Any, schedule: Any, penalty: Any) -> None:
    """Full batches: eight epochs are eight steps of the formula, with weight decay in the gradient and the schedule's rate."""
    training = Training(8, optimiser, schedule=schedule, factor=0.5, milestones=(0.25, 0.5), weight_decay=0.02, dtype=DOUBLE)
    model, plain = network(), network().double()
    history = train(model, DATA, training, penalty=penalty, progress=False)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()]
    for e in range(8):
        share = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * e / 8)) / 2, "step": 0.5 ** ((e >= 2) + (e >= 4))}[schedule]
        rate, slopes = optimiser.lr * share, gradients(plain, training, penalty)
        for p, g, (m, v) in zip(plain.parameters(), slopes, moments, strict=True):
            if isinstance(optimiser, SGD):
                m.mul_(optimiser.momentum).add_(g)
                move = g + optimiser.momentum * m if optimiser.nesterov else m
            else:
                m.mul_(optimiser.beta1).add_((1 - optimiser.beta1) * g)
                v.mul_(optimiser.beta2).add_((1 - optimiser.beta2) * g * g)
                first, second = m / (1 - optimiser.beta1 ** (e + 1)), v / (1 - optimiser.beta2 ** (e + 1))
                move = first / (second.sqrt() + optimiser.epsilon)
            p.data -= rate * move
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-10, atol=1e-12)
    assert history.epoch.tolist() == [0, 8]
    assert history.rates[0] == optimiser.lr
    assert history.stop is Stop.STEPS


@pytest.mark.parametrize("penalty", [None, decay])
def test_the_model_itself_is_trained(penalty: Any) -> None:
    """Losses, objectives, weights and running means are those of steps on model(x), whatever lies between body and head."""
    training = Training(4, SGD(0.3), weight_decay=0.02, every=1, dtype=DOUBLE)
    model, plain = Between(), Between().double()
    history = train(model, DATA, training, penalty=penalty, progress=False)
    x, y = DATA.to(dtype=DOUBLE).batch()
    for epoch in range(4):
        loss = nn.functional.cross_entropy(plain(x), y)
        total = loss if penalty is None else loss + penalty(plain, plain.body(x), len(y))
        squares = sum((p.detach() ** 2).sum() for p in plain.parameters())
        assert history.loss[epoch] == pytest.approx(loss.item(), rel=1e-12)
        assert history.objective[epoch] == pytest.approx((total + 0.01 * squares).item(), rel=1e-12)
        slopes = torch.autograd.grad(total, list(plain.parameters()))
        with torch.no_grad():
            for p, slope in zip(plain.parameters(), slopes, strict=True):
                p -= 0.3 * (slope + 0.02 * p)
    for ours, theirs in zip(state(model), state(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not model.body._forward_hooks


def test_labels_reach_heads_anywhere() -> None:
    """A guided head inside a head trains as the same layers in a row do."""
    training = Training(3, SGD(0.05, 0.9), batch=9, every=1)
    parted, body, (layer, head) = behind(), behind().body, behind().head
    row = nn.Sequential(body, layer, head)
    assert equal(train(parted, DATA, training, progress=False), train(row, DATA, training, progress=False))
    assert same(state(parted), state(row))


def test_numbers_are_taken_as_constants() -> None:
    """A loss or a penalty may be a Python number, of some batches or of all."""
    training, ends = Training(3, SGD(0.1, 0.9), batch=7, weight_decay=0.01, every=1), []
    for constant in (0.0, np.float64(0.0), torch.zeros(())):
        model = network()
        history = train(model, DATA, training, penalty=lambda m, f, B, constant=constant: constant, progress=False)
        ends.append((history, state(model)))
    assert equal(ends[0][0], ends[2][0])
    assert equal(ends[1][0], ends[2][0])
    assert same(ends[0][1], ends[2][1])
    model = network()
    history = train(model, DATA, training, loss=lambda logits, labels: 2, penalty=decay, progress=False)
    np.testing.assert_allclose(history.loss, 2.0, rtol=1e-6)
    assert history.objective[-1] < history.objective[0]
    ends = []
    for nothing in (lambda logits: 0.0, lambda logits: 0.0 * logits.sum()):
        model = network()

        def some(logits: torch.Tensor, labels: torch.Tensor, nothing: Any = nothing) -> Any:
            return nn.functional.cross_entropy(logits, labels) if 0 in labels[:2] else nothing(logits)

        ends.append((train(model, DATA, replace(training, batch=2), loss=some, progress=False), state(model)))
    assert equal(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_weighted_losses_are_recorded_as_the_mean_of_their_batches() -> None:
    """Of full batches the class-weighted mean; of mini-batches the mean of the batches' weighted means."""
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
    x, y = DATA.to(dtype=DOUBLE).batch()
    for batch in (None, 7):
        model = network().double()
        seen = objective(model, loss=nn.CrossEntropyLoss(weight=weight), batch=batch)
        mean = 0.0
        for index in seen.fixed.tensor_split(1 if batch is None else 4):
            terms = nn.functional.cross_entropy(model(x[index]), y[index], reduction="none").detach()
            mean += len(index) / 25 * float((weight[y[index]] * terms).sum() / weight[y[index]].sum())
        assert seen.measured()["loss"] == pytest.approx(mean, rel=1e-12)


def objective(model: nn.Module, penalty: Any = None, **changed: Any) -> Objective:
    options: dict[str, Any] = dict(batch=None, balanced=False, augment=False, weight_decay=0.0, seed=0)
    loss = changed.pop("loss", nn.functional.cross_entropy)
    return Objective(model.double(), DATA.to(dtype=DOUBLE), loss, penalty, **(options | changed))


@pytest.mark.parametrize(("batch", "balanced"), [(None, False), (25, False), (7, False), (1, False), (25, True), (7, True), (1, True)])
@pytest.mark.parametrize("penalty", [None, decay])
@pytest.mark.parametrize("wd", [0.0, 0.03])
def test_what_is_measured(batch: int | None, balanced: bool, penalty: Any, wd: float) -> None:
    """Loss, objective and scale-free gradient norm are those of F written out at once, whatever the batch, samples weighted as drawn."""
    model = network()
    seen = objective(model, penalty, batch=batch, balanced=balanced, weight_decay=wd)
    with seen.listening():
        found = seen.measured()
    x, y = DATA.to(dtype=DOUBLE).batch()
    weights = torch.tensor([1 / (3 * DATA.counts[k]) if balanced else 1 / 25 for k in y.tolist()], dtype=DOUBLE)
    features = model.body(x)
    loss = (weights * nn.functional.cross_entropy(model.head(features), y, reduction="none")).sum()
    extra = wd / 2 * sum((p**2).sum() for p in model.parameters())
    if penalty:
        extra = extra + 0.005 * (model.head.weight**2).sum() + 1e-3 * 25 * (weights[:, None] * features**2).sum()
    parameters = list(model.parameters())

    def flat(term: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    norm = float(flat(loss + extra).norm())
    if penalty or wd:
        norm /= max(float(flat(loss).norm()), float(flat(extra).norm()))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert found["objective"] == pytest.approx((loss + extra).item(), rel=1e-12)
    assert found["gradient_norm"] == pytest.approx(norm, rel=1e-10)


def test_plain_batches_are_a_partition() -> None:
    """Each sample once an epoch, in batches equal up to one sample, another order in each epoch."""
    seen = objective(network(), batch=10)
    draws = torch.Generator().manual_seed(0)
    epochs = [[x for x, _ in seen.batches(draws)] for _ in range(3)]
    rows = sorted(map(tuple, DATA.to(dtype=DOUBLE).inputs.tolist()))
    for batches in epochs:
        assert [len(x) for x in batches] == [9, 8, 8]
        assert sorted(map(tuple, torch.cat(batches).tolist())) == rows
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_balanced_batches_draw_classes_alike() -> None:
    """Each class has a third of the draws and each of its samples the same share of these; inputs come with their labels."""
    seen, draws = objective(network(), batch=10, balanced=True), torch.Generator().manual_seed(1)
    drawn = [batch for _ in range(400) for batch in seen.batches(draws)]
    labels = torch.cat([y for _, y in drawn])
    n = len(labels)
    assert n == 400 * 25
    assert (torch.bincount(labels) / n - 1 / 3).abs().max() < 5 * np.sqrt(2 / 9 / n)
    place = {tuple(x): i for i, x in enumerate(DATA.to(dtype=DOUBLE).inputs.tolist())}
    places = torch.tensor([place[tuple(x)] for x in torch.cat([x for x, _ in drawn]).tolist()])
    assert torch.equal(DATA.labels[places], labels)
    shares = torch.bincount(places, minlength=25) / n
    expected = torch.tensor([1 / (3 * DATA.counts[k]) for k in DATA.labels.tolist()])
    assert ((shares - expected).abs() < 5 * (expected / n).sqrt()).all()


@pytest.mark.parametrize("batch", [None, 9])
def test_pictures_are_varied_where_asked(batch: int | None) -> None:
    """Each epoch trains on other crops and flips of the same pictures; without augment on the pictures themselves."""
    plain, varied = (
        Objective(residual(), PICTURES, Counted(), None, batch=batch, balanced=False, augment=augment, weight_decay=0.0, seed=0)
        for augment in (False, True)
    )
    draws = torch.Generator().manual_seed(0)
    seen = [torch.cat([x for x, _ in objective.batches(draws)]) for objective in (plain, varied, varied)]
    pictures = {tuple(x) for x in PICTURES.batch()[0].flatten(1).tolist()}
    assert [sum(tuple(x) in pictures for x in epoch.flatten(1).tolist()) < 5 for epoch in seen] == [False, True, True]
    assert {tuple(x) for x in seen[0].flatten(1).tolist()} == pictures
    assert not torch.equal(seen[1], seen[2])


CASES: dict[str, tuple[Any, data.Data, Training, Any]] = {
    "full batch, Adam": (network, DATA, Training(6, Adam(0.01), every=2, dtype=DOUBLE), decay),
    "balanced, BatchNorm, dropout": (
        lambda: network(batch_norm=True, dropout=True),
        DATA,
        Training(6, SGD(0.05, 0.9), batch=7, schedule="cosine", sampling="balanced", weight_decay=1e-3, every=2),
        decay,
    ),
    "nearest ETF": (guided, DATA, Training(6, SGD(0.05, 0.9), batch=9, every=2), None),
    "nearest ETF, one module": (
        lambda: nn.Sequential(*guided().children()),
        DATA,
        Training(4, Adam(0.01), batch=13, every=2),
        None,
    ),
    "nearest ETF behind a layer": (behind, DATA, Training(4, SGD(0.05, 0.9), batch=9, every=2), lambda m, f, B: 1e-3 * (f**2).mean()),
    "a layer between": (Between, DATA, Training(4, SGD(0.05, 0.9), batch=9, sampling="balanced", every=2), decay),
    "varied pictures, ResNet": (
        residual,
        PICTURES,
        Training(4, SGD(0.05, 0.9, nesterov=True), batch=9, schedule="step", augment=True, weight_decay=1e-3, every=2),
        None,
    ),
}


class Cut(Exception):
    """What stops a run half-way."""


class Counted:
    """Cross-entropy that counts its calls, and raises at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.calls, self.last = 0, last

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise Cut
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("case", CASES)
def test_runs_repeat(case: str) -> None:
    """The same seed gives the same run bit for bit; another seed another one, where anything is drawn."""
    make, source, training, penalty = CASES[case]
    runs = []
    for seed in (0, 0, 1):
        model = make()
        torch.randn(3)
        runs.append((train(model, source, replace(training, seed=seed), penalty=penalty, progress=False), state(model)))
    assert equal(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])
    assert same(runs[0][1], runs[2][1]) == (training.batch is None)


@pytest.mark.parametrize("case", CASES)
def test_records_change_nothing(case: str) -> None:
    """The weights, running means and classifiers at the end are the same however often a run is looked at."""
    make, source, training, penalty = CASES[case]
    ends = []
    for every in (1, 3, training.epochs):
        model = make()
        train(model, source, replace(training, every=every), penalty=penalty, progress=False)
        ends.append(state(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_where_it_was_cut(case: str, tmp_path: Path) -> None:
    """Cut off at whichever batch or record and called again, it ends with the records and weights of the run that never was."""
    make, source, training, penalty = CASES[case]
    model, loss = make(), Counted()
    expected, end = train(model, source, training, loss=loss, penalty=penalty, progress=False), state(model)
    for cuts in ((2,), (loss.calls // 3, loss.calls // 2), (loss.calls // 2, loss.calls // 2), (loss.calls,)):
        path = tmp_path / "runs" / f"{cuts}.pt"
        for at in cuts:
            with pytest.raises(Cut):
                train(make(), source, training, loss=Counted(at), penalty=penalty, checkpoint=path, progress=False)
        model = make()
        found = train(model, source, training, loss=Counted(), penalty=penalty, checkpoint=path, progress=False)
        assert equal(found, expected)
        assert same(state(model), end)
    assert len(list((tmp_path / "runs").iterdir())) == 4  # no file half written


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    """A call whose run is complete takes no step and gives the records and weights it ended with."""
    training, path = Training(4, SGD(0.1), every=3), tmp_path / "run.pt"
    first, second = network(), network()
    history, before = train(first, DATA, training, checkpoint=path, progress=False), path.read_bytes()
    loss = Counted()
    named = train(second, DATA, training, checkpoint=path, progress=False)
    assert equal(history, named)
    assert same(state(first), state(second))
    assert path.read_bytes() == before
    assert history.epoch.tolist() == [0, 3, 4]
    assert loss.calls == 0


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    """The sentence names what differs: an option, the data, the model, its first weights, or a penalty of the same name."""
    training, path = Training(4, SGD(0.1)), tmp_path / "run.pt"
    train(network(), DATA, training, penalty=decay, checkpoint=path, progress=False)
    strength = [1.0]

    def stronger(model: nn.Module, features: torch.Tensor, B: int) -> torch.Tensor:
        return strength[0] * decay(model, features, B)

    def call(model: Any = None, source: Any = DATA, options: Training = training, penalty: Any = decay, at: Path = path) -> None:
        train(model or network(), source, options, penalty=penalty, checkpoint=at, progress=False)

    other = data.clusters([12, 9, 4], dimension=6, noise=1.0, separation=3.0, test=5, seed=1)
    for change, message in (
        (dict(options=replace(training, epochs=5)), r"Training\.epochs 4 there, 5 here"),
        (dict(options=replace(training, optimiser=SGD(0.2))), r"Training\.optimiser SGD\(lr=0\.1.* there, SGD\(lr=0\.2"),
        (dict(source=data.subsample(DATA, [12, 9, 3])), r"data clusters, counts \[12, 9, 4\] there, clusters, counts \[12, 9, 3\] here"),
        (dict(source=other), "the data's content"),
        (dict(model=network(seed=1)), "the model's first weights"),
        (dict(model=network(batch_norm=True)), "the model's layers"),
        (dict(penalty=None), r"penalty \S*decay there, none here"),
    ):
        with pytest.raises(ValueError, match=f"of another run \\({message}"):
            call(**change)  # type: ignore[arg-type]
    call(network(batch_norm=True), penalty=stronger, at=tmp_path / "two.pt")
    strength[0], model = 1.5, network(batch_norm=True)
    before = state(model)
    with pytest.raises(ValueError, match=r"of another run \(penalty .* before the first epoch there"):
        call(model, penalty=stronger, at=tmp_path / "two.pt")
    assert same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_checkpoints_of_other_small_penalties_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where the penalty is a millionth of the loss and of the weight decay, or of the same value with another gradient."""
    settings: dict[str, Any] = {"lam": 1e-7, "detached": False}

    def small(model: nn.Module, features: torch.Tensor, B: int) -> torch.Tensor:
        weights = model.head.weight.detach() if settings["detached"] else model.head.weight
        return settings["lam"] / 2 * ((features**2).sum() / B + (weights**2).sum())

    def call(at: str) -> History:
        training = Training(2, SGD(0.1), batch=7, weight_decay=0.1, dtype=dtype)
        return train(network(), DATA, training, penalty=small, checkpoint=tmp_path / at, progress=False)

    history = call("small.pt")
    assert equal(call("small.pt"), history)
    settings["lam"] = 3e-7
    with pytest.raises(ValueError, match=r"of another run \(penalty .* before the first epoch there"):
        call("small.pt")
    settings["lam"] = 0.1
    history = call("large.pt")
    settings["detached"] = True
    with pytest.raises(ValueError, match=r"of another run \(gradient_norm .* before the first epoch there"):
        call("large.pt")


WATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (dict(layers=["body.1", "body.3"]), r"layers \['body.1'\] there, \['body.1', 'body.3'\] here"),
    "head": (dict(head=None, penalties=None), r"head \['head'\] there, \[\] here"),
    "classes": (dict(classes=4), "classes 3 there, 4 here"),
    "measure": (dict(measure="full"), "measure and keep "),
    "keep": (dict(keep="all"), "measure and keep "),
    "conv": (dict(conv="pool"), "conv flatten there, pool here"),
    "centre": (dict(centre="samples"), "centre classes there, samples here"),
    "weights": (dict(weights="samples"), "weights classes there, samples here"),
    "no targets": (dict(targets=None), r"targets \w+ there, None here"),
    "targets": (dict(targets=frames.orthogonal_targets(3)), r"targets \w+ there, \w+ here"),
    "penalties": (dict(penalties=(0.1, 0.3)), r"penalties \[0.1, 0.2\] there, \[0.1, 0.3\] here"),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with a monitor."""
    path = tmp_path_factory.mktemp("watched") / "run.pt"
    watch(path)
    return path


def watch(path: Path, **changed: Any) -> History:
    model = network()
    options = dict(layers=["body.1"], head="head", classes=3, targets=frames.etf_targets(3), penalties=(0.1, 0.2))
    monitor = Monitor(model, **(options | changed))
    return train(model, DATA, Training(2, SGD(0.1)), monitor=monitor, checkpoint=path, progress=False)


@pytest.mark.parametrize("option", WATCHED)
def test_checkpoints_of_other_monitors_are_refused(option: str, watched: Path) -> None:
    changed, message = WATCHED[option]
    with pytest.raises(ValueError, match=f"of another run \\(the monitor's {message}"):
        watch(watched, **changed)


def test_checkpoints_of_equal_monitors_are_taken(watched: Path) -> None:
    """Options are compared by value."""
    assert equal(watch(watched, penalties=[0.1, np.float64(0.2)]), watch(watched))


def test_unreadable_checkpoints_are_refused(tmp_path: Path) -> None:
    """Also one that would run code when read."""
    path = tmp_path / "run.pt"
    for content in (b"", b"not one", {"epoch": 3}, {"configuration": 3}, {"configuration": logging.getLogger("x")}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before, message = (
            path.read_bytes(),
            r"run\.pt cannot be read as a checkpoint of ufm, and is left as it is; remove it, or give another",
        )
        with pytest.raises(ValueError, match=message):
            train(network(), DATA, Training(2, SGD(0.1)), checkpoint=path, progress=False)
        assert path.read_bytes() == before


@pytest.mark.parametrize("make", [network, guided, behind])
def test_divergence_is_a_reason_to_stop(make: Any, tmp_path: Path) -> None:
    """A rate far too long ends the run at the next record, which says so; what cannot be measured is NaN."""
    model = make()
    monitor = Monitor(model, head="head", classes=3)
    training = Training(200, SGD(1e30), batch=5, every=5)
    history = train(model, DATA, training, penalty=lambda m, f, B: (f**2).sum(), monitor=monitor, progress=False)
    assert history.stop is Stop.DIVERGED
    assert history.epoch.tolist() == [0, 5]
    assert np.isfinite(history.objective[0])
    assert not np.isfinite(history.objective[1])
    assert np.isnan(history.accuracy[1])
    assert np.isfinite(history.metrics["nc2@head"][0])
    assert np.isnan(history.metrics["nc2@head"][1])


def test_stopping_at_a_gradient() -> None:
    """A strictly convex objective, the last layer alone, is trained to the tolerance and no further; the record shows it."""
    model = network().requires_grad_(False)
    model.head.requires_grad_(True)
    training = Training(20_000, SGD(0.5, 0.9), weight_decay=0.1, every=50, tol=1e-9, dtype=DOUBLE)
    history = train(model, DATA, training, progress=False)
    assert history.stop is Stop.GRADIENT
    assert history.gradient_norm[-1] <= 1e-9 < history.gradient_norm[-2]
    assert history.epoch[-1] < 20_000
    features, y = model.body(DATA.to(dtype=DOUBLE).inputs), DATA.labels
    W, b = model.head.weight, model.head.bias
    slope = ((model.head(features).softmax(1) - nn.functional.one_hot(y, 3)) / 25).detach()
    np.testing.assert_allclose((slope.mT @ features).detach().numpy(), (-0.1 * W).detach().numpy(), atol=1e-9)
    np.testing.assert_allclose(slope.sum(0).numpy(), (-0.1 * b).detach().numpy(), atol=1e-9)


def test_accuracy_and_metrics_are_those_of_the_model() -> None:
    """In evaluation mode, over the training set and the test set; numbers and lists of the monitor, in order."""
    model = network(batch_norm=True)
    monitor = Monitor(model, ["body.3"], head="head", classes=3)
    training = Training(9, SGD(0.05, 0.9), batch=7, every=4)
    history = train(model, DATA, training, monitor=monitor, progress=False)
    assert history.epoch.tolist() == [0, 4, 8, 9]
    model.eval()
    for (x, y), accuracy in ((DATA.batch(), history.accuracy), (DATA.test(), history.test_accuracy)):
        assert accuracy[-1] == sum(int(row.argmax()) == int(k) for row, k in zip(model(x), y, strict=True)) / len(y)
    with torch.no_grad(), monitor.watch(DATA.labels):
        model(DATA.inputs)
    report = monitor.report()
    assert history.metrics["nc2@head"][-1] == pytest.approx(report["head"].values["nc2"], rel=1e-6)
    assert history.metrics["nc2@body.3"].shape == (4,)
    np.testing.assert_allclose(history.metrics["class_norms@head"][-1], report["head"].arrays["class_norms"], rtol=1e-6)
    assert history.metrics["class_norms@head"].shape == (4, 3)
    assert "sorted_margins@head" not in history.metrics


def test_a_monitor_changes_nothing(tmp_path: Path) -> None:
    """Nor does it hinder a run from going on: its metrics are in the checkpoint."""
    training, ends = Training(6, SGD(0.05, 0.9), batch=7, every=2), []
    for watched in (False, True):
        model = network(batch_norm=True, dropout=True)
        monitor = Monitor(model, head="head", classes=3) if watched else None
        ends.append((train(model, DATA, training, monitor=monitor, progress=False), state(model)))
    assert same(ends[0][1], ends[1][1])
    path = tmp_path / "run.pt"
    for loss in (Counted(9), Counted()):
        model = network(batch_norm=True, dropout=True)
        options: dict[str, Any] = dict(loss=loss, monitor=Monitor(model, head="head", classes=3), checkpoint=path, progress=False)
        if loss.last:
            with pytest.raises(Cut):
                train(model, DATA, training, **options)
        else:
            assert equal(train(model, DATA, training, **options), ends[1][0])


@pytest.mark.parametrize("mode", [True, False])
def test_the_surroundings_are_left_alone(mode: bool) -> None:
    """Torch's generator, the mode of the model and its gradients are as before."""
    model = network(dropout=True).train(mode)
    before = torch.get_rng_state()
    train(model, DATA, Training(2, SGD(0.1), batch=5), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is mode
    assert all(p.grad is None for p in model.parameters())


def test_histories_are_kept(tmp_path: Path) -> None:
    model = network()
    history = train(model, DATA, Training(4, SGD(0.1), every=2), monitor=Monitor(model, head="head", classes=3), progress=False)
    history.save(tmp_path / "history.npz")
    assert equal(History.load(tmp_path / "history.npz"), history)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal a line in the log now and then, and nothing on stdout or stderr; none at all on request."""
    monkeypatch.setattr(import_module("ufm.bridge.train"), "SAID_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="ufm"):
        train(network(), DATA, Training(3, SGD(0.1)), progress=False)
        assert caplog.messages == []
        train(network(), DATA, Training(3, SGD(0.1)))
    assert [line.split(",")[0] for line in caplog.messages] == [f"train: {i} of 3 epochs done" for i in (1, 2, 3)]
    assert capsys.readouterr() == ("", "")


class Unheaded(nn.Sequential):
    """A module without body and head."""


class Doubled(models.Network):
    """The body runs twice."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.body(inputs) + self.body(inputs))


class Pair(nn.Linear):
    """Gives a tuple."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class First(nn.Linear):
    """Takes the first of a tuple."""

    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x[0])


class Demanding(nn.Linear):
    """Asks for labels that it cannot be given."""

    needs_labels = True


def tried(model: Any = None, training: Training | None = None, **options: Any) -> History:
    return train(model or network(), DATA, training or Training(3, SGD(0.1)), progress=False, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Training(0, SGD(0.1)), "Training: epochs is 0, but must be a whole number of at least 1"),
        (lambda: Training(None, SGD(0.1)), "Training: epochs is None, but must be a whole number of at least 1"),  # type: ignore[arg-type]
        (lambda: Training(True, SGD(0.1)), "epochs is True"),
        (lambda: Training(3.0, SGD(0.1)), "epochs is 3.0"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), every=float("nan")), "every is nan"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), batch=True), "batch is True"),
        (lambda: Training(3, SGD(0.1), seed="a"), r"seed is 'a', but must be a whole number of at least 0 and below 2\^63"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), seed=2**63), "seed is 9223372036854775808"),
        (lambda: Training(3, SGD(0.1), milestones=0.5), "milestones is 0.5, but must be a tuple of shares"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), milestones=("a",)), r"milestones is \('a',\)"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), schedule=["step"]), r"schedule is \['step'\]"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), tol=False), "tol is False"),
        (lambda: Training(3, SGD(0.1), every=0), "every is 0"),
        (lambda: Training(3, SGD(0.1), batch=0), "batch is 0"),
        (lambda: Training(3, "sgd"), r"optimiser is 'sgd', but there are SGD\(lr, ...\) and Adam\(lr, ...\)"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), schedule="linear"), "schedule is 'linear', but there are constant, cosine, step"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), sampling="even"), "sampling is 'even', but there are plain and balanced"),  # type: ignore[arg-type]
        (lambda: Training(3, SGD(0.1), sampling="balanced"), "sampling is 'balanced' on full batches"),
        (lambda: Training(3, SGD(0.1), milestones=(0.5, 2.0)), r"milestones is \(0.5, 2.0\)"),
        (lambda: Training(3, SGD(0.1), dtype=torch.float16), "dtype is torch.float16"),
        (lambda: Training(3, SGD(0.1), weight_decay=-1.0), "weight_decay is -1.0, but must be a finite number, at least 0"),
        (lambda: Training(3, SGD(0.1), tol=float("nan")), "tol is nan"),
        (lambda: SGD(float("inf")), "SGD: lr is inf"),
        (lambda: SGD(0.1, 1.0), "SGD: momentum is 1.0, but must be a finite number, at least 0 and below 1"),
        (lambda: SGD(0.1, nesterov=True), "nesterov is True, but needs a momentum"),
        (lambda: Adam("fast"), "Adam: lr is 'fast'"),  # type: ignore[arg-type]
        (lambda: Adam(0.1, beta2=1.5), "Adam: beta2 is 1.5"),
        (lambda: train(network(), DATA, Training(3, SGD(0.1), batch=26)), "batch is 26, but there are 25 training samples; give at most"),
        (lambda: train(network(), DATA, Training(3, SGD(0.1), augment=True)), "augment varies pictures, but the inputs of 'clusters'"),
        (lambda: train(network().requires_grad_(False), DATA, Training(3, SGD(0.1))), "no parameter that asks for a gradient"),
        (
            lambda: train(Unheaded(*network().children()), DATA, Training(3, SGD(0.1)), penalty=decay),
            "penalty needs features, the output of the model's body, but the model has no module `body`",
        ),
        (lambda: tried(Doubled(models.mlp((6, 5)), nn.Linear(5, 3)), penalty=decay), "the model's body ran 2 times in one forward pass"),
        (lambda: tried(models.Network(Pair(6, 5), First(5, 3)), penalty=decay), "the model's body gives a tuple for 25 samples"),
        (
            lambda: tried(models.Network(nn.Sequential(nn.Linear(6, 5), nn.Flatten(0)), nn.Unflatten(0, (25, 5))), penalty=decay),
            r"the model's body gives a tensor of shape \(125,\) for 25 samples",
        ),
        (lambda: tried(models.Network(models.mlp((6, 5)), Pair(5, 3))), r"the model gives a tuple for 25 samples of 3 classes"),
        (lambda: tried(models.Network(models.mlp((6, 5)), Demanding(5, 3))), "Demanding asks for labels .* but cannot be given them"),
        (
            lambda: tried(training=Training(3, SGD(0.1), batch=5, sampling="balanced"), loss=nn.CrossEntropyLoss(torch.ones(3))),
            "loss has class weights, .* which sampling='balanced' needs; leave the weights out, or give sampling='plain'",
        ),
        (lambda: tried(loss=lambda z, y: 1.0), "neither loss nor penalty has a gradient"),
        (lambda: tried(loss=lambda z, y: z.detach().mean(), penalty=lambda m, f, B: 0.0), "neither loss nor penalty has a gradient"),
        (lambda: tried(loss=lambda z, y: None), "loss gives a NoneType, but must give one number"),
        (lambda: tried(device="meta"), "device 'meta' is none to train on; use 'cpu' or 'cuda'$"),
        (lambda: tried(device="gpu"), "device 'gpu' is none to train on; use 'cpu' or 'cuda'$"),
        (
            lambda: train(models.Network(models.mlp((6, 5)), nn.Linear(5, 4)), DATA, Training(3, SGD(0.1))),
            r"outputs of shape \(25, 4\) for 25 samples of 3 classes; its last layer must give \(B, 3\)",
        ),
        (
            lambda: train(network(), DATA, Training(3, SGD(0.1)), loss=nn.CrossEntropyLoss(reduction="none")),
            r"loss gives shape \(25,\), but must give one number",
        ),
        (lambda: train(network(), DATA, Training(3, SGD(0.1)), penalty=lambda m, f, B: f), r"penalty gives shape \(25, 5\)"),
        (lambda: train(network(), DATA, Training(3, SGD(0.1)), device="numpy"), "'numpy' trains no network"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_head_that_refuses_is_heard() -> None:
    """Only features that are not finite are taken for divergence."""
    model = models.Network(models.mlp((6, 5)), NearestETFHead(5, 2))
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        train(model, DATA, Training(3, SGD(0.1)), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device() -> None:
    with pytest.raises(NoDevice, match="device 'cuda' is not to be had here"):
        train(network(), DATA, Training(3, SGD(0.1)), device="cuda")


def collapse(batch_norm: bool, epochs: int) -> tuple[float, float, float, float]:
    """NC1, NC2, NC3 and accuracy of an MLP trained on 1500 balanced digits, of its features over the training set."""
    digits = data.digits()
    with models.seeded(0):
        model = models.Network(models.mlp((64, 256, 256, 64), batch_norm=batch_norm), nn.Linear(64, 10))
    training = Training(epochs, SGD(0.05, 0.9), batch=200, schedule="cosine", weight_decay=2e-2 if batch_norm else 5e-3, every=epochs)
    history = train(model, digits, training, progress=False)
    with torch.no_grad():
        features = model.eval().body(digits.inputs).double().mT[None]
    stats = metrics.class_statistics(features, digits.labels, 10)
    W = model.head.weight.detach().double()[None]
    nc1, nc2, nc3 = metrics.nc1(stats), metrics.nc2(stats.means), metrics.nc3_normalised(W, stats.means)
    return float(nc1), float(nc2), float(nc3), float(history.accuracy[-1])


@pytest.mark.slow
def test_digits_collapse_with_batch_norm_alone() -> None:
    """With BatchNorm NC1 < 2e-3, NC2 and NC3 < 0.02 after 400 epochs; without it all digits are learned as well, and nothing collapses."""
    nc1, nc2, nc3, accuracy = collapse(True, 400)
    assert accuracy == 1
    assert nc1 < 2e-3
    assert max(nc2, nc3) < 0.02
    nc1, nc2, nc3, accuracy = collapse(False, 400)
    assert accuracy == 1
    assert nc1 > 0.1
    assert min(nc2, nc3) > 0.2


def test_digits_begin_to_collapse_with_batch_norm() -> None:
    """After 60 epochs NC1 is at its end already, NC2 and NC3 on their way; without BatchNorm none of them is."""
    nc1, nc2, nc3, accuracy = collapse(True, 60)
    assert accuracy == 1
    assert nc1 < 2e-3
    assert max(nc2, nc3) < 0.2
    nc1, nc2, nc3, accuracy = collapse(False, 60)
    assert accuracy > 0.99
    assert nc1 > 0.1
    assert min(nc2, nc3) > 0.2
