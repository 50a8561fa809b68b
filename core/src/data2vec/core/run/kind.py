"""A kind of training: the one interface between it and a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.settings.fields import Recipe
from data2vec.core.task import Task
from data2vec.core.training.progress import Progress


@dataclass(frozen=True)
class Subject:
    """A task on ``device``, the data it is trained on and the data that it is judged by."""

    recipe: Recipe
    task: Task[Any]
    device: torch.device
    train: Mapping[str, TrainData]
    validation: Mapping[str, EvaluationData]


class Kind(Protocol):
    """A kind of training: how its task is built, scored while it trains, and judged and shown in the end."""

    def build(self, recipe: Recipe) -> Task[Any]:
        """Build the task, freshly initialised; draws from torch's global generator."""

    def scores(self, subject: Subject) -> tuple[Callable[[], Mapping[str, float]], int | None]:
        """Make the function that scores a task while it trains, each rank on its own, and say how often it is asked."""

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Evaluate the trained task and write the report into the run's folder.

        Raises:
            DataError: no usable samples.
            OSError: the report cannot be written.
        """
