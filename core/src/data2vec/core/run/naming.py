"""A fine-tuned run as a function from prepared inputs to labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec.core.errors import CheckpointError
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.run.load import LoadedRun
from data2vec.core.settings.finetuning import LabelKind

_LIKELY = 0.5  # from which on a class of several is named


@dataclass(frozen=True)
class Named:
    """The answer of a classifier for one sample.

    ``label``: the likeliest class; of several that may hold together, all of 50 % or more, joined by commas; of a
    number its text. ``probability``: of the class that is named (the lowest of several); 1 where a number is predicted.
    ``probabilities``: of every class by its name. ``value``: the number, where one is predicted.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]
    value: float | None = None


def require_classifier(run: LoadedRun) -> ClassificationTask:
    """The run's model.

    Raises:
        CheckpointError: it names no classes.
    """
    if not isinstance(run.model, ClassificationTask):
        raise CheckpointError(
            f"{run.folder}: a run of {run.experiment.kind}, which names no classes; fine-tune it for classes first"
        )
    return run.model


@torch.no_grad()
def name(run: LoadedRun, inputs: Tensor, lengths: Tensor | None = None) -> list[Named]:
    """Name the classes of prepared inputs (B, ...), of which the first ``lengths`` (B,) are valid."""
    model = require_classifier(run)
    if not len(inputs):
        return []
    on = run.device
    logits = model.logits(inputs.to(on), None if lengths is None else lengths.to(on))
    return [_named(model, row) for row in model.probabilities(logits).cpu()]


def _named(model: ClassificationTask, row: Tensor) -> Named:
    if model.labels.kind is LabelKind.NUMBER:
        value = float(row[0])
        return Named(f"{value:.4g}", 1.0, {}, value)
    shares = dict(zip(model.labels.classes, row.tolist(), strict=True))
    if model.labels.kind is LabelKind.CLASS:
        label = max(shares, key=lambda key: shares[key])
        return Named(label, shares[label], shares)
    held = [label for label, share in shares.items() if share >= _LIKELY]
    return Named(", ".join(held), min((shares[label] for label in held), default=0.0), shares)
