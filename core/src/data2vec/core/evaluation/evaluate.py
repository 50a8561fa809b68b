"""Evaluation of a model: its teacher and student beside a random encoder of the same shape and the raw input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.evaluation.features import Pooled, extract_all
from data2vec.core.evaluation.positions import PER_SAMPLE, position_features
from data2vec.core.evaluation.probe import EvaluationResult, evaluate, with_positions
from data2vec.core.exhibit import Exhibit
from data2vec.core.model.encoder import Encoder, Features
from data2vec.core.settings.pretraining import Experiment

TEACHER, STUDENT, UNTRAINED = "teacher", "student", "random encoder"

Encode = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluated:
    """The table, and the test samples' features it was made from, by encoder."""

    table: EvaluationResult
    test: Mapping[str, Pooled]


@dataclass(frozen=True)
class Compared:
    """The encoders that are compared, on one device.

    ``trained``: by row of the table. ``build``: makes the same encoder untrained; called where its row is asked for.
    """

    trained: Mapping[str, Encoder]
    build: Callable[[], Encoder]

    @cached_property
    def untrained(self) -> Encoder:
        """The untrained encoder."""
        return self.build()


class Rows:
    """Functions from a batch to features, by row of the table.

    Args:
        compared: whose features.
        exhibit: of the batches' modality.
        layers: see :meth:`data2vec.core.model.encoder.Encoder.features`.
    """

    def __init__(self, compared: Compared, exhibit: Exhibit, layers: str) -> None:
        self._compared, self._exhibit, self._layers = compared, exhibit, layers

    def pooled(self) -> dict[str, Encode]:
        """Mean-pooled features (B, F)."""
        exhibit = self._exhibit
        rows = {row: self._mean_of(row) for row in (*self._compared.trained, UNTRAINED)}
        if exhibit.extractor_name is not None:
            rows[exhibit.extractor_name] = self._mean_of(STUDENT, "extractor")
        return {**rows, exhibit.raw_name: exhibit.raw_features}

    def positions(self) -> dict[str, Encode]:
        """The features of every position (B, T, D)."""
        rows = {row: self._all_of(row) for row in (*self._compared.trained, UNTRAINED)}
        return {**rows, self._exhibit.raw_name: self._exhibit.raw_positions}

    def _mean_of(self, row: str, layers: str | None = None) -> Encode:
        return lambda batch: self._features(row, batch, layers).mean()

    def _all_of(self, row: str) -> Encode:
        return lambda batch: self._features(row, batch).x

    def _features(self, row: str, batch: Batch, layers: str | None = None) -> Features:
        encoder = self._compared.untrained if row == UNTRAINED else self._compared.trained[row]
        return encoder.features(batch.modality, batch.inputs, batch.lengths, layers=layers or self._layers)


def evaluate_model(
    experiment: Experiment,
    compared: Compared,
    device: torch.device,
    name: str,
    train: TrainData,
    test: EvaluationData,
    progress: Callable[[str], None] | None = None,
) -> Evaluated:
    """All tasks of ``evaluation.tasks`` for one modality.

    Args:
        experiment: settings; ``evaluation`` chooses tasks, layers and how many samples.
        compared: encoders, on ``device``.
        device: where features and probes are computed.
        name: the modality.
        train: samples that probes are fitted on, read without augmentation.
        test: samples they are judged by.
        progress: called with a short line before each step.

    Raises:
        DataError: no usable samples.
    """
    rows = Rows(compared, experiment.modalities[name].exhibit, experiment.evaluation.layers)
    functions = rows.pooled()
    seen = features(experiment, functions, device, train.for_evaluation())
    judged = features(experiment, functions, device, test)
    seed, config = experiment.train.seed, experiment.evaluation
    table = evaluate(seen, judged, config, progress, seed=seed, device=device)
    if "positions" in config.tasks:
        at = rows.positions()
        samples = -(-config.max_positions // PER_SAMPLE)
        train_positions, test_positions = (
            position_features(
                at, data.evaluation_batches(config.batch, samples), max_positions=config.max_positions, device=device
            )
            for data in (train.for_evaluation(), test)
        )
        table = with_positions(table, train_positions, test_positions, progress, seed=seed, device=device)
    remarks = {**test.shards.remarks, **train.shards.remarks}.values()  # why labels or samples are missing
    return Evaluated(dataclasses.replace(table, notes=(*table.notes, *remarks)), judged)


def features(
    experiment: Experiment, functions: Mapping[str, Encode], device: torch.device, data: EvaluationData
) -> dict[str, Pooled]:
    """Pooled of every encoder in one pass over the data."""
    config = experiment.evaluation
    batches = data.evaluation_batches(config.batch, config.max_samples, pin_memory=device.type == "cuda")
    return extract_all(functions, data.counted(batches), max_samples=config.max_samples, device=device)


def quick_evaluation(
    experiment: Experiment,
    compared: Compared,
    device: torch.device,
    train: Mapping[str, TrainData],
    test: Mapping[str, EvaluationData],
) -> dict[str, float]:
    """The teacher's and student's scores for the learning curve: ``teacher_knn``, ``student_linear`` and so on."""
    scores: dict[str, float] = {}
    for name in experiment.modalities:
        rows = Rows(compared, experiment.modalities[name].exhibit, experiment.evaluation.layers).pooled()
        functions = {row: rows[row] for row in compared.trained}
        seen = features(experiment, functions, device, train[name].for_evaluation())
        judged = features(experiment, functions, device, test[name])
        table = evaluate(seen, judged, experiment.evaluation, seed=experiment.train.seed, device=device)
        prefix = "" if len(experiment.modalities) == 1 else f"{name}_"
        for row in table.rows:
            values = dataclasses.asdict(row)
            for task in ("knn", "linear", "rank"):
                if values[task] is not None:
                    scores[f"{prefix}{row.name}_{task}"] = values[task]
    return scores
