"""Evaluation of a model: its teacher and student beside a random encoder of the same shape and the raw input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment
from data2vec.core.data.pipeline import EvaluationData, TrainData
from data2vec.core.evaluation.features import Features, extract_all
from data2vec.core.evaluation.positions import PER_SAMPLE, position_features
from data2vec.core.evaluation.probe import EvaluationResult, evaluate, with_positions
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.data2vec import Features as ModelFeatures

TEACHER, STUDENT, RANDOM = "teacher", "student", "random encoder"
_RANDOM_SEED = 1_000_003  # apart from any run's, so that the random encoder is not this run's starting point

Encode = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluated:
    """The table, and the test samples' features it was made from, by encoder."""

    table: EvaluationResult
    test: Mapping[str, Features]


class Encoders:
    """What is compared, by row of the table. The untrained encoder is built when it is first asked for features.

    Args:
        experiment: the settings; ``evaluation.layers`` chooses the features.
        model: teacher and student, on ``device``.
        device: where the untrained encoder runs.
        name: the modality.
    """

    def __init__(self, experiment: Experiment, model: Data2Vec, device: torch.device, name: str) -> None:
        self._experiment, self._model, self._device = experiment, model, device
        self._modality = experiment.modalities[name]

    def pooled(self) -> dict[str, Encode]:
        """Functions from a batch to mean-pooled features (B, F)."""
        modality = self._modality
        rows = {row: self._mean_of(row) for row in (TEACHER, STUDENT, RANDOM)}
        if modality.extractor_name is not None:
            rows[modality.extractor_name] = lambda batch: self._features(STUDENT, batch, "extractor").mean()
        return {**rows, modality.raw_name: modality.raw_features}

    def positions(self) -> dict[str, Encode]:
        """Functions from a batch to the features of every position (B, T, D)."""
        rows = {row: self._all_of(row) for row in (TEACHER, STUDENT, RANDOM)}
        return {**rows, self._modality.raw_name: self._modality.raw_positions}

    def _mean_of(self, row: str) -> Encode:
        return lambda batch: self._features(row, batch).mean()

    def _all_of(self, row: str) -> Encode:
        return lambda batch: self._features(row, batch).x

    def _features(self, row: str, batch: Batch, layers: str | None = None) -> ModelFeatures:
        model = self._untrained if row == RANDOM else self._model
        of = "student" if row == STUDENT else "teacher"
        return model.features(batch, layers=layers or self._experiment.evaluation.layers, of=of)

    @cached_property
    def _untrained(self) -> Data2Vec:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED + self._experiment.train.seed)
            return Data2Vec.build(self._experiment).to(self._device).eval()


def evaluate_model(
    experiment: Experiment,
    model: Data2Vec,
    device: torch.device,
    name: str,
    train: TrainData,
    test: EvaluationData,
    progress: Callable[[str], None] | None = None,
) -> Evaluated:
    """All tasks of ``evaluation.tasks`` for one modality.

    Args:
        experiment: settings; ``evaluation`` chooses tasks, layers and how many samples.
        model: on ``device``.
        device: where features and probes are computed.
        name: the modality.
        train: samples that probes are fitted on, read without augmentation.
        test: samples they are judged by.
        progress: called with a short line before each step.

    Raises:
        DataError: no usable samples.
    """
    encoders = Encoders(experiment, model, device, name)
    functions = encoders.pooled()
    seen = features(experiment, functions, device, train.for_evaluation())
    judged = features(experiment, functions, device, test)
    seed, config = experiment.train.seed, experiment.evaluation
    table = evaluate(seen, judged, config, progress, seed=seed, device=device)
    if "positions" in config.tasks:
        at = encoders.positions()
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
) -> dict[str, Features]:
    """Features of every encoder in one pass over the data."""
    config = experiment.evaluation
    batches = data.evaluation_batches(config.batch, config.max_samples, pin_memory=device.type == "cuda")
    return extract_all(functions, data.counted(batches), max_samples=config.max_samples, device=device)


def quick_evaluation(
    experiment: Experiment,
    model: Data2Vec,
    device: torch.device,
    train: Mapping[str, TrainData],
    test: Mapping[str, EvaluationData],
) -> dict[str, float]:
    """The teacher's and student's scores for the learning curve: ``teacher_knn``, ``student_linear`` and so on."""
    scores: dict[str, float] = {}
    for name in experiment.modalities:
        rows = Encoders(experiment, model, device, name).pooled()
        functions = {row: rows[row] for row in (TEACHER, STUDENT)}
        seen = features(experiment, functions, device, train[name].for_evaluation())
        judged = features(experiment, functions, device, test[name])
        table = evaluate(seen, judged, experiment.evaluation, seed=experiment.train.seed, device=device)
        prefix = "" if len(experiment.modalities) == 1 else f"{name}_"
        for row in table.rows:
            values = dataclasses.asdict(row)
            for task in ("knn", "linear", "rank"):
                if values[task] is not None:
                    scores[f"{prefix}{row.name}_{task}"] = values[task]
    model.train()
    return scores
