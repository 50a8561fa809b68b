"""Recognition as a kind of training: transcripts settled first, error rates on validation data, and a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from data2vec.core.data.dataset import EvaluationData
from data2vec.core.errors import ConfigError
from data2vec.core.finetuning.recognition import RecognitionTask
from data2vec.core.finetuning.transcribing import Transcript, error_rates, transcribe
from data2vec.core.finetuning.transcripts import settle_letters
from data2vec.core.run.kind import Data, Subject
from data2vec.core.run.tuning import Tuning
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import Recognition
from data2vec.core.training.progress import Progress


class Recognising(Tuning[list[Transcript]]):
    """See :class:`data2vec.core.run.kind.Kind`."""

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Find the symbols, and leave out the clips without a transcript."""
        assert isinstance(recipe, Recognition)
        ((name, modality),) = recipe.modalities.items()
        longest = modality.length_range[1]
        if longest is not None:
            key = f"{name}.{modality.crop_key}"
            raise ConfigError([f"{key}={longest}: crops clips, but not what is said in them; set it to null"])
        train, validation = data
        before = earlier.letters if isinstance(earlier, Recognition) else None
        settled = settle_letters(recipe.letters, train[name], validation[name], seed=recipe.train.seed, earlier=before)
        return recipe.replace(letters=settled.letters), ({name: settled.train}, {name: settled.validation})

    def build(self, recipe: Recipe) -> RecognitionTask:
        """Build a model for settled letters."""
        assert isinstance(recipe, Recognition)
        return RecognitionTask.build(recipe)

    def find(self, subject: Subject, data: EvaluationData, batch: int) -> list[Transcript]:
        """Transcribe."""
        assert isinstance(subject.task, RecognitionTask)
        return transcribe(subject.task, data, subject.device, batch=batch)

    def judge(self, found: list[Transcript]) -> Mapping[str, float]:
        """Take the error rates."""
        return error_rates(found)

    def report(self, subject: Subject, found: list[Transcript], progress: Progress, path: Path, update: int) -> Table:
        """Write a page with the worst transcripts."""
        from data2vec.core.report.recognised import write_recognition_report  # drawing is slow to import

        recipe, task = subject.recipe, subject.task
        assert isinstance(recipe, Recognition)
        assert isinstance(task, RecognitionTask)
        ((name, validation),) = subject.validation.items()
        return write_recognition_report(
            path, recipe, task, name, subject.train[name], validation, found, update=update, progress=progress,
            folder=path.parent, device=subject.device,
        )  # fmt: skip
