"""Evaluation of a model: its teacher and student beside a random encoder of the same shape and the raw input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment
from data2vec.core.data.pipeline import EvaluationData, TrainData
from data2vec.core.evaluation.features import Features, extract_all
from data2vec.core.evaluation.positions import PER_SAMPLE, position_features
from data2vec.core.evaluation.probe import EvaluationResult, evaluate, with_positions
from data2vec.core.model.data2vec import Data2Vec

TEACHER, STUDENT, RANDOM = "teacher", "student", "random encoder"
_RANDOM_SEED = 1_000_003  # apart from any run's, so that the random encoder is not this run's starting point

Encode = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluated:
    """The table, and the test samples' features it was made from, by encoder."""

    table: EvaluationResult
    test: Mapping[str, Features]


def encoders(experiment: Experiment, model: Data2Vec, device: torch.device, name: str) -> dict[str, Encode]:
    """Functions from a batch of modality ``name`` to mean-pooled features (B, F), by row of the table."""
    untrained = _untrained(experiment, device)
    modality, layers = experiment.modalities[name], experiment.evaluation.layers

    def of(encoder: Data2Vec, which: str) -> Encode:
        return lambda batch: encoder.features(batch, layers=layers, of=which).mean()

    rows = {TEACHER: of(model, "teacher"), STUDENT: of(model, "student"), RANDOM: of(untrained, "teacher")}
    if modality.extractor_name is not None:
        rows[modality.extractor_name] = lambda batch: model.features(batch, layers="extractor", of="student").mean()
    return {**rows, modality.raw_name: modality.raw_features}


def position_encoders(experiment: Experiment, model: Data2Vec, device: torch.device, name: str) -> dict[str, Encode]:
    """Functions from a batch to the features of every position (B, T, D), by row of the table."""
    untrained = _untrained(experiment, device)
    modality, layers = experiment.modalities[name], experiment.evaluation.layers

    def of(encoder: Data2Vec, which: str) -> Encode:
        return lambda batch: encoder.features(batch, layers=layers, of=which).x

    return {
        TEACHER: of(model, "teacher"), STUDENT: of(model, "student"), RANDOM: of(untrained, "teacher"),
        modality.raw_name: modality.raw_positions,
    }  # fmt: skip


def _untrained(experiment: Experiment, device: torch.device) -> Data2Vec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED + experiment.train.seed)
        return Data2Vec.build(experiment).to(device).eval()


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
    functions = encoders(experiment, model, device, name)
    seen = features(experiment, functions, device, train.for_evaluation())
    judged = features(experiment, functions, device, test)
    seed, config = experiment.train.seed, experiment.evaluation
    table = evaluate(seen, judged, config, progress, seed=seed, device=device)
    if "positions" in config.tasks:
        at = position_encoders(experiment, model, device, name)
        samples = -(-config.max_positions // PER_SAMPLE)
        train_positions, test_positions = (
            position_features(
                at, data.evaluation_batches(config.batch, samples), max_positions=config.max_positions, device=device
            )
            for data in (train.for_evaluation(), test)
        )
        table = with_positions(table, train_positions, test_positions, progress, seed=seed, device=device)
    remarks = dict.fromkeys([*train.shards.remarks.values(), *test.shards.remarks.values()])  # why labels are missing
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
        functions = encoders(experiment, model, device, name)
        functions = {row: functions[row] for row in (TEACHER, STUDENT)}
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
