"""A run's report: gathers what the page shows."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data2vec.core.data.dataset import EvaluationData
from data2vec.core.evaluation.embedding import embedding_map
from data2vec.core.evaluation.evaluate import TEACHER, Evaluated
from data2vec.core.exhibit import Illustrations, Panel
from data2vec.core.files import write_atomically
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.report.page import Report, write_report
from data2vec.core.settings.fields import TrainConfig
from data2vec.core.settings.overrides import tree
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.training.monitor import read_metrics

_DRAWN = 64  # samples that the pictures are drawn from
_MAPPED = 1_000  # samples in the embedding map


def write_run_report(
    path: Path,
    experiment: Experiment,
    model: Data2Vec,
    device: torch.device,
    name: str,
    data: EvaluationData,
    evaluated: Evaluated,
    *,
    folder: Path,
    update: int,
    seconds: float,
) -> None:
    """Write the page of one modality, and the table beside it as JSON.

    Args:
        path: of the page; the table goes to the same name with ``.json``.
        experiment: settings.
        model: trained, on ``device``.
        device: see ``model``.
        name: the modality.
        data: samples to draw.
        evaluated: scores and features of the test samples.
        folder: the run's, for its metrics.
        update: applied updates.
        seconds: spent training.
    """
    write_atomically(path.with_suffix(".json"), (json.dumps(evaluated.table.to_json(), indent=1) + "\n").encode())
    features = evaluated.test[TEACHER]
    settings = tree(experiment)
    train = experiment.train
    parameters = sum(parameter.numel() for parameter in model.student.parameters())
    history = read_metrics(folder / "metrics.jsonl")
    report = Report(
        title=experiment.name,
        subtitle=f"data2vec, {name}: {update:,} updates of {train.described_batch} in {duration(seconds)}",
        config=settings,
        history=history,
        thresholds={"target_spread": train.min_target_spread, "prediction_spread": train.min_prediction_spread},
        evaluation=evaluated.table,
        panels=_panels(experiment, model, device, name, data),
        embedding=embedding_map(
            features.x, features.labels, max_points=_MAPPED, seed=train.seed, class_names=data.class_names
        ),
        facts=facts(train, device, update=update, seconds=seconds, parameters=parameters),
    )
    write_report(path, report)


def _panels(
    experiment: Experiment, model: Data2Vec, device: torch.device, name: str, data: EvaluationData
) -> list[Panel]:
    (batch,) = islice(data.evaluation_batches(_DRAWN, _DRAWN), 1)
    modality = experiment.modalities[name]
    masked = model.prepare(batch, seed=experiment.train.seed, update=0)
    features = model.features(masked.batch.to(device))
    drawn = Illustrations(masked.batch, masked.mask.hidden, features.x.cpu(), features.shape)
    panels: list[Panel] = modality.exhibit.panels(drawn)
    return panels


def facts(train: TrainConfig, device: torch.device, *, update: int, seconds: float, parameters: int) -> dict[str, Any]:
    """The facts of a run that its page ends with."""
    return {
        "training time": duration(seconds),
        "updates": f"{update:,}",
        "data of one update": train.described_batch,
        "encoder parameters": f"{parameters:,}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "seed": train.seed,
        "versions": f"data2vec-core {version('data2vec-core')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }


def _processor() -> str:
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def duration(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
