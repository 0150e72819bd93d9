"""The monitor as a callback of Lightning, where that is installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ufm.bridge.monitor import Monitor
from ufm.bridge.readings import Report


def lightning_callback(monitor: Monitor, batches: Iterable[Any], *, every: int = 1) -> Any:
    """A Lightning callback that measures over the batches at the end of every `every`-th training epoch and logs the row.

    Its `report` is the last one. ImportError where neither lightning nor pytorch_lightning is installed.
    """

    class MonitorCallback(_lightning().Callback):  # type: ignore[misc]
        report: Report | None = None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if (trainer.current_epoch + 1) % every == 0:
                self.report = monitor.measure(batches)
                pl_module.log_dict(self.report.row())

    return MonitorCallback()


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ImportError(
        "bridge.lightning_callback needs lightning or pytorch_lightning; install one, or call monitor.measure in your own loop"
    )
