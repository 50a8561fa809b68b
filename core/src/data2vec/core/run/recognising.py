"""Recognition as a kind of training: transcripts settled first, error rates on validation data, and a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from data2vec.core.errors import ConfigError
from data2vec.core.finetuning.recognition import RecognitionTask as Task
from data2vec.core.finetuning.transcribing import error_rates, transcribe
from data2vec.core.finetuning.transcripts import settle_letters
from data2vec.core.run.classifying import take_the_best
from data2vec.core.run.kind import Data, Subject
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import LOWER_IS_BETTER, Recognition
from data2vec.core.training.progress import Progress
from data2vec.core.training.scoring import Scoring


class Recognising:
    """See :class:`data2vec.core.run.kind.Kind`."""

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Find the symbols, and leave out the clips without a transcript."""
        assert isinstance(recipe, Recognition)
        ((name, modality),) = recipe.modalities.items()
        longest = modality.length_range[1]
        if longest is not None:
            key = "audio.max_length" if name == "speech" else "its longest input"
            raise ConfigError([f"{name}.{key}={longest}: crops clips, but not what is said in them; set it to null"])
        train, validation = data
        before = earlier.letters if isinstance(earlier, Recognition) else None
        settled = settle_letters(recipe.letters, train[name], validation[name], seed=recipe.train.seed, earlier=before)
        return recipe.replace(letters=settled.letters), ({name: settled.train}, {name: settled.validation})

    def build(self, recipe: Recipe) -> Task:
        """Build a model for settled letters."""
        assert isinstance(recipe, Recognition)
        return Task.build(recipe)

    def scoring(self, subject: Subject) -> Scoring:
        """Take the error rates on the validation data."""
        recipe = subject.recipe
        assert isinstance(recipe, Recognition)
        score = partial(_scores, subject, recipe.evaluation.batch)
        return Scoring(score, recipe.evaluation.every, LOWER_IS_BETTER, recipe.evaluation.patience)

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Transcribe with the best checkpoint, and write a page on it."""
        from data2vec.core.report.recognised import write_recognition_report  # drawing is slow to import

        recipe, task = subject.recipe, subject.task
        assert isinstance(recipe, Recognition)
        assert isinstance(task, Task)
        update = take_the_best(task, folder, progress)
        ((name, validation),) = subject.validation.items()
        found = transcribe(task, validation, subject.device, batch=recipe.evaluation.batch)
        path = folder / "report.html"
        table = write_recognition_report(
            path, recipe, task, name, subject.train[name], validation, found, update=update, progress=progress,
            folder=folder, device=subject.device,
        )  # fmt: skip
        console.print(table)
        console.print(f"[bold]report: {path}[/] (open it in a browser)", soft_wrap=True)


def _scores(subject: Subject, batch: int) -> dict[str, float]:
    (validation,) = subject.validation.values()
    assert isinstance(subject.task, Task)
    device: torch.device = subject.device
    return error_rates(transcribe(subject.task, validation, device, batch=batch))
