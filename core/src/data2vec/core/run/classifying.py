"""Classification as a kind of training: labels settled first, scores on validation data, and a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from data2vec.core.data.dataset import EvaluationData
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.finetuning.labels import settle_labels
from data2vec.core.finetuning.scores import Predictions, predict, scores
from data2vec.core.run.kind import Data, Subject
from data2vec.core.run.tuning import Tuning
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import Classification
from data2vec.core.training.progress import Progress


class Classifying(Tuning[Predictions]):
    """See :class:`data2vec.core.run.kind.Kind`."""

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Find the classes, and leave out the samples without a label."""
        assert isinstance(recipe, Classification)
        (name,) = recipe.modalities
        train, validation = data
        before = earlier.labels if isinstance(earlier, Classification) else None
        settled = settle_labels(recipe.labels, train[name], validation[name], seed=recipe.train.seed, earlier=before)
        return recipe.replace(labels=settled.labels), ({name: settled.train}, {name: settled.validation})

    def build(self, recipe: Recipe) -> ClassificationTask:
        """Build a model for settled labels."""
        assert isinstance(recipe, Classification)
        return ClassificationTask.build(recipe)

    def find(self, subject: Subject, data: EvaluationData, batch: int) -> Predictions:
        """Predict."""
        assert isinstance(subject.task, ClassificationTask)
        return predict(subject.task, data, subject.device, batch=batch)

    def judge(self, found: Predictions) -> Mapping[str, float]:
        """Score the predictions."""
        return scores(found)

    def report(self, subject: Subject, found: Predictions, progress: Progress, path: Path, update: int) -> Table:
        """Write a page with confusions and mistakes."""
        from data2vec.core.report.classified import write_classification_report  # drawing is slow to import

        recipe, task = subject.recipe, subject.task
        assert isinstance(recipe, Classification)
        assert isinstance(task, ClassificationTask)
        ((name, validation),) = subject.validation.items()
        return write_classification_report(
            path, recipe, task, name, subject.train[name], validation, found, update=update, progress=progress,
            folder=path.parent, device=subject.device,
        )  # fmt: skip
