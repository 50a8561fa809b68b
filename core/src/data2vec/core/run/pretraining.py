"""Pretraining as a kind of training: probes of frozen features, and a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from data2vec.core.evaluation.evaluate import Compared, evaluate_model, quick_evaluation
from data2vec.core.model.encoder import Encoder
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.kind import Data, Subject
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.task import Task
from data2vec.core.training.progress import Progress
from data2vec.core.training.scoring import Scoring

_UNTRAINED_SEED = 1_000_003  # apart from any run's, so that the untrained encoder is not where this run began


class Pretraining:
    """See :class:`data2vec.core.run.kind.Kind`."""

    def build(self, recipe: Recipe) -> Data2Vec:
        """Build a model of the experiment."""
        assert isinstance(recipe, Experiment)
        return Data2Vec.build(recipe)

    def settle(self, recipe: Recipe, data: Data, earlier: Recipe | None) -> tuple[Recipe, Data]:
        """Leave both as they are: pretraining has no labels."""
        return recipe, data

    def scoring(self, subject: Subject) -> Scoring:
        """Probe the teacher and the student."""
        experiment, device = subject.recipe, subject.device
        assert isinstance(experiment, Experiment)
        rows = compared(experiment, subject.task, device)
        probe = partial(quick_evaluation, experiment, rows, device, subject.train, subject.validation)
        return Scoring(probe, experiment.evaluation.every)

    def conclude(self, subject: Subject, progress: Progress, folder: Path, console: Console) -> None:
        """Probe the features of each modality, and write a page on it."""
        from data2vec.core.report.gather import write_run_report  # drawing is slow to import

        experiment, task, device = subject.recipe, subject.task, subject.device
        assert isinstance(experiment, Experiment)
        assert isinstance(task, Data2Vec)
        rows = compared(experiment, task, device)
        for name in experiment.modalities:
            console.print(f"evaluating {name} on frozen features")
            validation = subject.validation[name]
            result = evaluate_model(experiment, rows, device, name, subject.train[name], validation)
            console.print(result.table.to_rich())
            report = folder / ("report.html" if len(experiment.modalities) == 1 else f"report-{name}.html")
            write_run_report(
                report, experiment, task, device, name, validation, result,
                update=progress.update, seconds=progress.seconds, folder=folder,
            )  # fmt: skip
            console.print(f"[bold]report: {escape(str(report))}[/] (open it in a browser)", soft_wrap=True)


def compared(experiment: Experiment, task: Task[Any], device: torch.device) -> Compared:
    """The encoders that evaluation compares: those of the task, and an untrained one of the same shape."""

    def build() -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_UNTRAINED_SEED + experiment.train.seed)
            return Data2Vec.build(experiment).teacher.encoder.to(device).eval()

    return Compared(task.encoders(), build)
