"""A kind of training: the one interface between it and a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.settings.fields import Recipe
from data2vec.core.task import Task
from data2vec.core.training.progress import Progress
from data2vec.core.training.scoring import Scoring

Data = tuple[dict[str, TrainData], dict[str, EvaluationData]]
"""Training and evaluation data of each modality."""


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

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Complete the settings by what the data says, and choose the samples that are used, on every rank alike.

        Args:
            recipe: validated settings.
            data: as it was opened.
            earlier: the settled settings of the run that is continued.

        Raises:
            DataError: the data does not fit the task.
            ConfigError: the settings do not fit the data.
            CheckpointError: they do not fit the run that is continued.
        """

    def scoring(self, subject: Subject) -> Scoring:
        """Say how a task is scored while it trains."""

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Evaluate the trained task and write the report into the run's folder.

        Raises:
            DataError: no usable samples.
            OSError: the report cannot be written.
        """
