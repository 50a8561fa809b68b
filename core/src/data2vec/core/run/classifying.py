"""Classification as a kind of training: labels settled first, scores on validation data, and a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from data2vec.core.checkpoints import checkpoint
from data2vec.core.finetuning.classification import ClassificationTask as Task
from data2vec.core.finetuning.labels import settle_labels
from data2vec.core.finetuning.scores import predict, scores
from data2vec.core.run.kind import Data, Subject
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import LOWER_IS_BETTER, Classification
from data2vec.core.task import Task as AnyTask
from data2vec.core.training.progress import Progress
from data2vec.core.training.scoring import Scoring


class Classifying:
    """See :class:`data2vec.core.run.kind.Kind`."""

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Find the classes, and leave out the samples without a label."""
        assert isinstance(recipe, Classification)
        (name,) = recipe.modalities
        train, validation = data
        before = earlier.labels if isinstance(earlier, Classification) else None
        settled = settle_labels(recipe.labels, train[name], validation[name], seed=recipe.train.seed, earlier=before)
        return recipe.replace(labels=settled.labels), ({name: settled.train}, {name: settled.validation})

    def build(self, recipe: Recipe) -> Task:
        """Build a model for settled labels."""
        assert isinstance(recipe, Classification)
        return Task.build(recipe)

    def scoring(self, subject: Subject) -> Scoring:
        """Score the predictions for the validation data."""
        recipe = subject.recipe
        assert isinstance(recipe, Classification)
        score = partial(_scores, subject, recipe.evaluation.batch)
        return Scoring(score, recipe.evaluation.every, LOWER_IS_BETTER, recipe.evaluation.patience)

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Score the best checkpoint, and write a page on it."""
        from data2vec.core.report.classified import write_classification_report  # drawing is slow to import

        recipe, task = subject.recipe, subject.task
        assert isinstance(recipe, Classification)
        assert isinstance(task, Task)
        update = take_the_best(task, folder, progress)
        ((name, validation),) = subject.validation.items()
        found = predict(task, validation, subject.device, batch=recipe.evaluation.batch)
        path = folder / "report.html"
        table = write_classification_report(
            path, recipe, task, name, subject.train[name], validation, found, update=update, progress=progress,
            folder=folder, device=subject.device,
        )  # fmt: skip
        console.print(table)
        console.print(f"[bold]report: {path}[/] (open it in a browser)", soft_wrap=True)


def take_the_best(task: AnyTask[Any], folder: Path, progress: Progress) -> int:
    """Take the weights of the checkpoint with the best score, where there is one; returns its update."""
    best = checkpoint.named(folder / "checkpoints", "best")
    if best is None:
        return progress.update
    saved = checkpoint.load(best)
    task.load_own_state(saved.tensors["model"])
    return int(saved.state["update"])


def _scores(subject: Subject, batch: int) -> dict[str, float]:
    (validation,) = subject.validation.values()
    assert isinstance(subject.task, Task)
    return scores(predict(subject.task, validation, subject.device, batch=batch))
