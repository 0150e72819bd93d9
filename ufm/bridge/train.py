"""A short training loop for any module: full or mini batches, records on the way, checkpoints from which a run goes on bit for bit.

    history = train(model, data, Training(epochs=400, optimiser=SGD(0.05, momentum=0.9), batch=128, schedule="cosine"))

The loop is `train`; what it minimises is in `ufm.bridge.objective`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ufm.arrays import MANY_THREADS, threads_for
from ufm.bridge.checkpoint import Checkpoint, Record, configuration
from ufm.bridge.data import Data, device_named
from ufm.bridge.monitor import Monitor
from ufm.bridge.objective import Loss, Objective, Penalty
from ufm.bridge.options import SGD, Adam, Training
from ufm.bridge.readings import Report
from ufm.records import Floats, Saved, Stop

__all__ = ["SGD", "Adam", "History", "Training", "train"]

LOG = logging.getLogger(__name__)
SAID_EVERY = 30.0  # seconds between two lines of the log


@dataclass(frozen=True, eq=False)
class History(Saved):
    """What training saw at its T records: after `epoch` epochs, the first before any and the last at the end.

    loss (T,): mean data loss; objective: with the penalty and weight decay; gradient_norm: of the objective, over the larger of the norms
    of its loss part and its penalty part (plain without a penalty); all three over the training set, in training mode, under the sampling.
    Decayed weights before a BatchNorm, whose scale changes no logit, keep the gradient norm from becoming small: there is no minimum.
    accuracy, test_accuracy (NaN without a test set): in evaluation mode. rates: lr of the epoch that follows. metrics: the monitor's,
    name@layer -> (T, ...). stops: why it ended, one entry.
    """

    epoch: np.ndarray[Any, np.dtype[np.int64]]
    loss: Floats
    objective: Floats
    gradient_norm: Floats
    accuracy: Floats
    test_accuracy: Floats
    rates: Floats
    metrics: dict[str, Floats]
    stops: tuple[Stop, ...]

    @property
    def stop(self) -> Stop:
        """Why training ended: STEPS after all epochs, GRADIENT within tol, or DIVERGED."""
        return self.stops[0]


def train(
    model: nn.Module,
    data: Data,
    training: Training,
    *,
    loss: Loss | None = None,
    penalty: Penalty | None = None,
    monitor: Monitor | None = None,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> History:
    """Train `model` in place and say what was seen on the way; the same seed and first weights give the same run, bit for bit on a CPU.

    loss(logits, labels): the plain mean over a batch of one term a sample, by default the cross-entropy in nats; of a class-weighted mean
    in mini-batches the record is the mean of the batches' weighted means. penalty(model, features, B): added to it, `features` the output
    of `model.body` for the B samples of the batch; its expectation over batches is minimised (see `penalty` of this package).
    monitor: a `Monitor` of this model, run over the training set at each record. checkpoint: a file written at each record, from which the
    same call goes on after it was cut off. Networks narrower than 512 and without convolutions run on one thread.
    ValueError, NoDevice with one sentence for what cannot be trained; a loss that becomes NaN ends training, with Stop.DIVERGED.
    """
    loss = nn.functional.cross_entropy if loss is None else loss
    names = {"loss": loss, "penalty": penalty, "monitor": monitor}
    store = None if checkpoint is None else Checkpoint(Path(checkpoint), configuration(training, model, data, **names))
    placed = device_named(device)
    model, data, mode = model.to(placed, training.dtype), data.to(placed, training.dtype), model.training
    objective = Objective(
        model,
        data,
        loss,
        penalty,
        batch=training.batch,
        balanced=training.sampling == "balanced",
        augment=training.augment,
        weight_decay=training.weight_decay,
        seed=training.seed,
    )
    bar = Progress(training.epochs, progress)
    with threads_for(_width(model)), _own_randomness(placed), objective.listening():
        torch.manual_seed(training.seed)
        try:
            return _trained(objective, training, monitor, store, bar)
        finally:
            bar.close()
            model.train(mode)
            model.zero_grad()


def _trained(objective: Objective, training: Training, monitor: Monitor | None, store: Checkpoint | None, bar: Progress) -> History:
    model, device = objective.model, objective.device
    optimiser = training.optimiser.made(objective.parameters, training.weight_decay)
    draws = torch.Generator(device).manual_seed(training.seed)
    records: list[Record] = []
    if store is not None and (saved := store.read()) is not None:
        with _undisturbed(model):
            store.same_start(objective.measured(), saved)
        records = store.restore(saved, model, optimiser, draws)
    epoch = records[-1]["epoch"] if records else 0
    bar.add(epoch)
    while True:
        due = epoch % training.every == 0 or epoch == training.epochs
        if due and not (records and records[-1]["epoch"] == epoch):
            with _own_randomness(device):
                records.append(_record(objective, training, monitor, epoch))
            if store is not None:
                store.write(records, model, optimiser, draws)
        if due and (stop := _stop(records[-1], training)) is not None:
            return _history(records, stop)
        if due:
            model.train()
        for group in optimiser.param_groups:
            group["lr"] = training.rate(epoch)
        for inputs, labels in objective.batches(draws):
            for p in objective.parameters:
                p.grad = None
            objective.total(inputs, labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        epoch += 1
        bar.add(1, records[-1]["objective"])


def _record(objective: Objective, training: Training, monitor: Monitor | None, epoch: int) -> Record:
    """What the run is worth after `epoch` epochs; before the first, evaluation is in the state that one pass in training mode leaves.

    Until then BatchNorm has seen no data, and a nearest ETF has no classifier.
    """
    record: Record = {"epoch": epoch, "rates": training.rate(epoch)}
    with _undisturbed(objective.model):
        record |= objective.measured()
        if epoch == 0:
            return record | _evaluated(objective, training, monitor, record)
    return record | _evaluated(objective, training, monitor, record)


@torch.no_grad()
def _evaluated(objective: Objective, training: Training, monitor: Monitor | None, record: Record) -> Record:
    """Accuracies and the monitor's metrics in evaluation mode; NaN of a run that has diverged."""
    model, data = objective.model, objective.data
    if not math.isfinite(record["objective"]):
        return {"accuracy": math.nan, "test_accuracy": math.nan, "metrics": {}}
    model.eval()

    def right(batch: Callable[[slice], tuple[Tensor, Tensor]], size: int, watched: Any) -> float:
        found = torch.zeros((), dtype=torch.int64, device=objective.device)
        step = training.batch or objective.size
        for at in range(0, size, step):
            inputs, labels = batch(slice(at, at + step))
            with nullcontext() if watched is None else watched.watch(labels):
                found += (model(inputs).argmax(dim=1) == labels).sum()
        return float(found) / size if size else math.nan

    accuracy = right(data.batch, objective.size, monitor)
    metrics = {} if monitor is None else _readings(monitor.report())
    return {"accuracy": accuracy, "test_accuracy": right(data.test, len(data.test_labels), None), "metrics": metrics}


def _readings(report: Report) -> dict[str, Tensor]:
    """Numbers by name@layer, and arrays of one axis but for those of a number a sample."""
    layers, samples = report.layers.values(), report.counts.sum()
    lists = {f"{name}@{layer.name}": a for layer in layers for name, a in layer.arrays.items() if a.ndim == 1 and len(a) < samples}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in (report.row() | lists).items()}


def _stop(record: Record, training: Training) -> Stop | None:
    if not math.isfinite(record["objective"]):
        return Stop.DIVERGED
    if training.tol is not None and record["gradient_norm"] <= training.tol:
        return Stop.GRADIENT
    return Stop.STEPS if record["epoch"] == training.epochs else None


def _history(records: list[Record], stop: Stop) -> History:
    seen = {
        f.name: np.array([record[f.name] for record in records]) for f in fields(History) if f.name in records[0] and f.name != "metrics"
    }
    names = {name: value for record in records for name, value in record["metrics"].items()}
    nothing = {name: torch.full_like(value, math.nan) for name, value in names.items()}
    metrics = {name: np.stack([record["metrics"].get(name, nothing[name]).cpu().numpy() for record in records]) for name in names}
    return History(**seen, metrics=metrics, stops=(stop,))


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """What is drawn inside from torch's own generators is not seen outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the running means of BatchNorm, have their values back afterwards."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def _width(model: nn.Module) -> int:
    """The widest layer; convolutions count as wide."""
    return max((MANY_THREADS if p.ndim > 2 else max(p.shape, default=1) for p in model.parameters()), default=1)


class Progress:
    """Epochs done: a bar on a terminal; elsewhere a line in the log every 30 seconds."""

    def __init__(self, total: int, shown: bool) -> None:
        from tqdm import tqdm

        self.total, self.done, self.shown = total, 0, shown
        self.bar = tqdm(total=total, desc="train", unit="epoch", mininterval=0.5, disable=None if shown else True)
        self.begun = self.said = time.monotonic()
        self.before = 0

    def add(self, epochs: int, objective: float | None = None) -> None:
        """Count finished epochs; the objective is that of the last record, None for epochs of an earlier call."""
        self.done += epochs
        self.bar.update(epochs)
        if objective is None:
            self.before = epochs
        elif self.shown and (moment := time.monotonic()) - self.said >= SAID_EVERY:
            self.said = moment
            left = (moment - self.begun) / (self.done - self.before) * (self.total - self.done)
            LOG.info("train: %d of %d epochs done, objective %.6g, %.0f s left", self.done, self.total, objective, left)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
