"""Predictions of a fine-tuned model on evaluation data, and the scores that follow from them.

Shapes: N samples, C classes (1 for a number).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data2vec.core.data.dataset import EvaluationData
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.finetuning.labels import label_targets, one_hot
from data2vec.core.model.encoder import evaluating
from data2vec.core.settings.finetuning import LabelKind

_LIKELY = 0.5  # from which on a class of several is named


@dataclass(frozen=True)
class Predictions:
    """The outputs for evaluation samples beside their labels, on the CPU.

    ``outputs``: (N, C) probabilities, or numbers. ``targets``: (N,) int64 classes, or (N, C) float32. ``losses``: (N,).
    ``keys``: SHARD:KEY of each sample.
    """

    kind: LabelKind
    outputs: Tensor
    targets: Tensor
    losses: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.outputs)


@torch.no_grad()
def predict(task: ClassificationTask, data: EvaluationData, device: torch.device, *, batch: int) -> Predictions:
    """The task's outputs for all samples of a set, in evaluation mode.

    Raises:
        DataError: no usable samples.
    """
    labels = task.labels
    keys: list[str] = []
    outputs, targets, losses = [], [], []
    with evaluating(task.modules()):
        for part in data.counted(data.evaluation_batches(batch, pin_memory=device.type == "cuda")):
            own = label_targets(part, labels)
            wanted = one_hot(own, task.classes) if labels.kind is LabelKind.CLASS else own
            on = part.to(device)
            logits = task.logits(on.inputs, on.lengths)
            outputs.append(task.probabilities(logits).cpu())
            losses.append(task.losses(logits, wanted.to(device)).cpu())
            targets.append(own)
            keys += part.keys
    return Predictions(labels.kind, torch.cat(outputs), torch.cat(targets), torch.cat(losses), tuple(keys))


def scores(found: Predictions) -> dict[str, float]:
    """The scores that fit the kind of labels; see :data:`data2vec.core.settings.finetuning.SCORES`.

    ``f1`` is of class 1 of two. Scores that are not defined (a correlation with what never varies) are 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nothing was predicted for
        values = _FUNCTIONS[found.kind](found.outputs.double().numpy(), found.targets.numpy())
    finite = {key: float(value) if np.isfinite(value) else 0.0 for key, value in values.items()}
    return {**finite, "validation_loss": float(found.losses.double().mean())}


def _of_class(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # slow to import, and whoever loads a run does not need it

    named, classes = outputs.argmax(1), outputs.shape[1]
    values = {"accuracy": metrics.accuracy_score(targets, named)}
    if classes > 5:
        highest = np.argpartition(outputs, -5, axis=1)[:, -5:]
        values["top5"] = float((highest == targets[:, None]).any(1).mean())
    values["macro_f1"] = metrics.f1_score(targets, named, average="macro")
    if classes == 2:
        values["f1"] = metrics.f1_score(targets, named, pos_label=1)
    return {**values, "matthews": metrics.matthews_corrcoef(targets, named)}


def _of_classes(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # slow to import, and whoever loads a run does not need it

    present = targets.any(0)
    precision = metrics.average_precision_score(targets[:, present], outputs[:, present], average="macro")
    return {
        "mean_average_precision": precision,
        "micro_f1": metrics.f1_score(targets, outputs >= _LIKELY, average="micro"),
    }


def _of_number(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # slow to import, and whoever loads a run does not need it

    given, wanted = outputs[:, 0], targets[:, 0].astype(np.float64)
    return {
        "pearson": _correlation(given, wanted),
        "spearman": _correlation(_ranks(given), _ranks(wanted)),
        "squared_error": metrics.mean_squared_error(wanted, given),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; not a number where one of them never varies."""
    if len(one) < 2 or not one.std() or not other.std():
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, of equal ones the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = (ends - (counts - 1) / 2.0)[place]
    return means


_FUNCTIONS: Mapping[LabelKind, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    LabelKind.CLASS: _of_class,
    LabelKind.CLASSES: _of_classes,
    LabelKind.NUMBER: _of_number,
}
