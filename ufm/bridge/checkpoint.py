"""Checkpoints: one file, written whole or not at all, read without running code, and only for the run that wrote it."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ufm.bridge.data import Data
from ufm.bridge.monitor import Monitor

Record = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A file of model, optimiser, generators and records, and the configuration of the run that it belongs to."""

    path: Path
    configuration: dict[str, str]

    def read(self) -> dict[str, Any] | None:
        """What the file holds, None without a file; ValueError if it is unreadable or of another configuration."""
        if not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            there = dict(saved["configuration"])
        except Exception as error:
            raise ValueError(
                f"train: {self.path} cannot be read as a checkpoint of ufm, and is left as it is; remove it, or give another path"
            ) from error
        if there != self.configuration:
            names = dict.fromkeys([*self.configuration, *there])
            name = next(name for name in names if there.get(name) != self.configuration.get(name))
            raise self._other(f"{name} {there.get(name)} there, {self.configuration.get(name)} here")
        return saved

    def same_start(self, measured: dict[str, float], saved: dict[str, Any]) -> None:
        """ValueError where the run begins at another objective: what the configuration cannot tell of losses and penalties.

        Rounding may differ: by 1e-4 of a value at most, 1e-3 of a gradient's norm, whose parts may cancel to 1e-6.
        """
        for name, relative, rounding in (("loss", 1e-4, 0.0), ("penalty", 1e-4, 0.0), ("gradient_norm", 1e-3, 1e-6)):
            here, there = measured[name], saved["records"][0][name]
            if abs(here - there) > relative * abs(there) + rounding:
                raise self._other(f"{name} {there:.6g} before the first epoch there, {here:.6g} here")

    def write(self, records: list[Record], model: nn.Module, optimiser: torch.optim.Optimizer, draws: torch.Generator) -> None:
        """Put the state of a run into the file."""
        state = {
            "configuration": self.configuration,
            "records": records,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "draws": draws.get_state(),
            "cpu": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(draws.device) if draws.device.type == "cuda" else None,
        }
        part = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, part)
            os.replace(part, self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def restore(self, saved: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer, draws: torch.Generator) -> list[Record]:
        """Put a run back where it was when the file was written; its records."""
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        draws.set_state(saved["draws"])
        torch.set_rng_state(saved["cpu"])
        if draws.device.type == "cuda" and saved["device"] is not None:
            torch.cuda.set_rng_state(saved["device"], draws.device)
        return list(saved["records"])

    def _other(self, difference: str) -> ValueError:
        return ValueError(
            f"train: the checkpoint {self.path} is of another run ({difference}); remove it, give another path, or start from the same"
        )


def configuration(training: Any, model: nn.Module, data: Data, **functions: Any) -> dict[str, str]:
    """What tells one run from another, name -> text: options, data, first weights, the names of functions, a monitor's options."""
    monitor = functions.get("monitor")
    return (
        {f"Training.{f.name}": repr(getattr(training, f.name)) for f in fields(training)}
        | {"data": f"{data.name}, counts {data.counts}", "the data's content": _digest(_tensors(data))}
        | {"the model's layers": hashlib.sha256(str(model).encode()).hexdigest()[:16]}
        | {"the model's first weights": _digest(value for value in model.state_dict().values() if isinstance(value, Tensor))}
        | {name: _name(function) for name, function in functions.items()}
        | {f"the monitor's {name}": _told(value) for name, value in (monitor.settings if isinstance(monitor, Monitor) else {}).items()}
    )


def _told(value: Any) -> str:
    """An option as text, a tuple of arrays by their content."""
    return _digest(map(torch.as_tensor, value)) if isinstance(value, tuple) else str(value)


def _tensors(data: Data) -> list[Tensor]:
    return [value for f in fields(data) if isinstance(value := getattr(data, f.name), Tensor)]


def _digest(tensors: Iterable[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return "none" if function is None else f"{named.__module__}.{named.__qualname__}"
