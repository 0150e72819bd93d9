"""What the studies of trained networks share: the options of their data, and where torch computes."""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from studies.command import Options as Common

Dataset = Literal["digits", "clusters", "mnist", "fashionmnist", "kmnist", "cifar10", "cifar100"]

MADE = ("digits", "clusters")  # without files


@dataclass(frozen=True)
class Options(Common):
    """Options of every study of trained networks."""

    dataset: Dataset | None = "digits"
    """what to train on; all but digits and clusters are read from files"""
    root: Path | None = None
    """folder of the files of mnist, fashionmnist, kmnist, cifar10, cifar100"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None and type(self).dataset is not None:
            raise ValueError("--dataset is None, but this study trains on one data set; name it")
        if self.dataset not in (None, *MADE) and self.root is None:
            raise ValueError(f"--dataset {self.dataset} is read from files, and nothing is downloaded; give their folder with --root")
        if self.dataset in (None, *MADE) and self.root is not None:
            raise ValueError(f"--root is {self.root}, but digits and clusters need no files; leave it out, or name another --dataset")

    @property
    def folder(self) -> Path:
        """As of every study; another data set than the study's own has a folder of its own."""
        usual = super().folder
        return usual if self.out or self.dataset == type(self).dataset else usual.with_name(f"{usual.name}-{self.dataset}")

    def workforce(self) -> AbstractContextManager[Executor]:
        """As of every study; ImportError where torch is missing, said here and not point by point."""
        import ufm.bridge  # noqa: F401

        return super().workforce()


def device_of(point: dict[str, Any]) -> str:
    """Where torch computes: on a CPU where the model is numpy's."""
    return "cpu" if point["device"] == "numpy" else str(point["device"])
