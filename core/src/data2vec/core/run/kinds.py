"""The kinds of training, and the one interface between them and a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.settings.fields import Experiment
from data2vec.core.task import Task
from data2vec.core.training.progress import Progress


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a task on ``device``, the data it is trained on and the data that it is judged by."""

    experiment: Experiment
    task: Task[Any]
    device: torch.device
    train: Mapping[str, TrainData]
    validation: Mapping[str, EvaluationData]


class Kind(Protocol):
    """A kind of training: how its task is built, scored while it trains, and judged and shown in the end."""

    def build(self, experiment: Experiment) -> Task[Any]:
        """Build the task, freshly initialised; draws from torch's global generator."""

    def scores(self, subject: Subject) -> Callable[[], Mapping[str, float]]:
        """Make the function that scores a task while it trains, each rank on its own."""

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Evaluate the trained task and write the report into the run's folder.

        Raises:
            DataError: no usable samples.
            OSError: the report cannot be written.
        """


def kind_of(experiment: Experiment) -> Kind:
    """The kind of training that the settings describe."""
    from data2vec.core.run.pretraining import Pretraining

    return Pretraining()
