"""The steps that every kind of fine-tuning has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.dataset import EvaluationData
from data2vec.core.run.kind import Subject
from data2vec.core.settings.finetuning import LOWER_IS_BETTER, FineTuning
from data2vec.core.task import Task
from data2vec.core.training.progress import Progress
from data2vec.core.training.scoring import Scoring

F = TypeVar("F")


class Tuning(ABC, Generic[F]):
    """Scores while it trains and a page in the end, of whatever ``F`` a task finds in validation data."""

    @abstractmethod
    def find(self, subject: Subject, data: EvaluationData, batch: int) -> F:
        """Give the task's answers for evaluation data.

        Raises:
            DataError: no usable samples.
        """

    @abstractmethod
    def judge(self, found: F) -> Mapping[str, float]:
        """Score the answers."""

    @abstractmethod
    def report(self, subject: Subject, found: F, progress: Progress, path: Path, update: int) -> Table:
        """Write a page on the weights of an update; returns its scores for a terminal.

        Raises:
            OSError: it cannot be written.
        """

    def scoring(self, subject: Subject) -> Scoring:
        """Score the validation data while the task trains."""
        recipe = subject.recipe
        assert isinstance(recipe, FineTuning)
        evaluation = recipe.evaluation
        return Scoring(partial(self._scores, subject), evaluation.every, LOWER_IS_BETTER, evaluation.patience)

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Judge the best checkpoint, and write a page on it."""
        update = _take_the_best(subject.task, folder, progress)
        path = folder / "report.html"
        console.print(self.report(subject, self._found(subject), progress, path, update))
        console.print(f"[bold]report: {escape(str(path))}[/] (open it in a browser)", soft_wrap=True)

    def _scores(self, subject: Subject) -> Mapping[str, float]:
        return self.judge(self._found(subject))

    def _found(self, subject: Subject) -> F:
        (validation,) = subject.validation.values()
        assert isinstance(subject.recipe, FineTuning)
        return self.find(subject, validation, subject.recipe.evaluation.batch)


def _take_the_best(task: Task[Any], folder: Path, progress: Progress) -> int:
    """Take the weights of the checkpoint with the best score, where there is one; returns its update."""
    best = checkpoint.named(folder / "checkpoints", "best")
    if best is None:
        return progress.update
    saved = checkpoint.load(best)
    task.load_own_state(saved.tensors["model"])
    return int(saved.state["update"])
