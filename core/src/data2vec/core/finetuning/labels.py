"""Labels of samples: read from shards, settled before training, and as targets of a loss.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec.core.batch import Batch, label_problem
from data2vec.core.data.dataset import EvaluationData, ShardData, TrainData
from data2vec.core.data.shards.remote.address import is_url
from data2vec.core.errors import CheckpointError, ConfigError, DataError
from data2vec.core.settings.finetuning import LabelConfig, LabelKind

_log = logging.getLogger(__name__)
_FEW_LABELS = 21  # stream of random numbers
_ALL_READ = 200_000  # samples of a set whose labels are all read before training, where names of classes are known
_MEMBERS = {LabelKind.CLASS: "cls", LabelKind.CLASSES: "classes", LabelKind.NUMBER: "number"}

D = TypeVar("D", bound=ShardData)
Label = tuple[int, ...] | float


@dataclass(frozen=True)
class Settled:
    """Labels with the names of all classes, and the samples that have one."""

    labels: LabelConfig
    train: TrainData
    validation: EvaluationData


def read_label(kind: LabelKind, text: bytes) -> Label | None:
    """The label in a member; None where it is none. Class numbers are from 0 to 999,999,999."""
    if kind is LabelKind.NUMBER:
        try:
            value = float(text.decode("ascii"))
        except ValueError:
            return None
        return value if math.isfinite(value) else None
    parts = text.split() if kind is LabelKind.CLASSES else [text]
    return None if any(label_problem(part) for part in parts) else tuple(int(part) for part in parts)


def settle_labels(
    config: LabelConfig, train: TrainData, validation: EvaluationData, *, seed: int, earlier: LabelConfig | None = None
) -> Settled:
    """Find the classes, leave out samples without a label, and choose the few that are learnt from.

    Args:
        config: as the user set it.
        train, validation: of one modality.
        seed: of the choice of few labels.
        earlier: the settled labels of the run that is continued.

    Raises:
        DataError: no labels, one class alone, a class that training does not have, or what is no label.
        ConfigError: settings that do not fit the labels.
        CheckpointError: another number of classes than the continued run has.
    """
    kind = config.kind
    if kind is not LabelKind.CLASS:
        keep = (_MEMBERS[kind],)
        train, validation = replace(train, keep=keep), replace(validation, keep=keep)
    if earlier is not None:
        _check_same_head(config, earlier)
        config = replace(config, classes=earlier.classes)
    names = config.classes or train.class_names
    if names and _is_left_to_training(config, train):
        return Settled(replace(config, classes=names), train, validation)
    learnt, train = _labelled(kind, train)
    judged, validation = _labelled(kind, validation)
    if kind is not LabelKind.NUMBER:
        names = _names(names, learnt, train)
        _check_classes(learnt, judged, names, train, validation)
    if config.count is not None:
        train, learnt = _few(config, train, learnt, seed)
    weights = _balanced(learnt, len(names)) if config.balanced else config.weights
    if weights and len(weights) != len(names):
        raise ConfigError([f"labels.weights={list(weights)}: {len(weights)} weights for {len(names)} classes"])
    return Settled(replace(config, classes=names, weights=weights), train, validation)


def _check_same_head(config: LabelConfig, earlier: LabelConfig) -> None:
    if config.classes and config.classes != earlier.classes:
        raise CheckpointError(
            f"labels.classes has {len(config.classes)} classes, and the run that is continued was trained for "
            f"{len(earlier.classes)} ({', '.join(earlier.classes[:5])}...); leave labels.classes out, or choose "
            "another train.folder"
        )


def _is_left_to_training(config: LabelConfig, train: TrainData) -> bool:
    """Tell whether reading every label first would cost more than it tells; training meets what is wrong then."""
    needed = config.kind is not LabelKind.CLASS or config.count is not None or config.balanced
    remote = any(is_url(shard.location) for shard in train.shards.shards)
    return not needed and (remote or train.total > _ALL_READ)


def _labelled(kind: LabelKind, data: D) -> tuple[list[list[Label]], D]:
    """The labels of each shard's samples that have one, and these samples alone.

    Raises:
        DataError: none has one, or what should be a label is none.
    """
    member = _MEMBERS[kind]
    found: list[list[Label | None]] = []
    missing, wrong, example = 0, 0, ""
    for shard, samples in zip(data.shards.shards, data.annotations(member), strict=True):
        labels: list[Label | None] = []
        for members in samples:
            text = members.get(member)
            label = None if text is None else read_label(kind, text)
            missing += text is None
            if text is not None and label is None:
                wrong += 1
                example = example or f"{text[:20]!r} in {shard.name}"
            labels.append(label)
        found.append(labels)
    what = {"cls": "class number such as 7", "classes": "class numbers such as 3 7", "number": "number such as 2.5"}
    if wrong and (kind is not LabelKind.CLASS or wrong + missing == data.total):
        raise DataError(
            f"{data.shards.spec}: {wrong} of {data.total} labels (member {member}) are no {what[member]}, "
            f"as {example}; mend them, or choose another labels.kind"
        )
    if missing + wrong == data.total:
        raise DataError(
            f"{data.shards.spec}: none of its {data.total} samples has a label (member {member}); write shards with "
            "labels (docs/data.md), or choose another labels.kind"
        )
    if missing + wrong:
        _log.warning(
            "%s: %d of %d samples have no label and are left out", data.shards.spec, missing + wrong, data.total
        )
        data = data.chosen_of([[label is not None for label in labels] for labels in found])
    return [[label for label in labels if label is not None] for labels in found], data


def _names(names: Sequence[str], learnt: Sequence[Sequence[Label]], train: TrainData) -> tuple[str, ...]:
    """The names of all classes: those that are given, or the numbers that training has.

    Raises:
        DataError: a label is beyond the names; only one class.
    """
    numbers = {number for labels in learnt for label in labels for number in _numbers(label)}
    highest = max(numbers, default=0)
    if names and highest >= len(names):
        raise DataError(
            f"{train.shards.spec}: has class {highest}, but there are names for {len(names)} classes; give "
            "labels.classes as many names, or none"
        )
    if len(numbers) < 2:
        only = ", ".join(str(number) for number in sorted(numbers)) or "none"
        raise DataError(f"{train.shards.spec}: has one class only ({only}); at least two are needed to tell apart")
    return tuple(names) or tuple(str(number) for number in range(highest + 1))


def _numbers(label: Label) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else ()


def _check_classes(
    learnt: Sequence[Sequence[Label]],
    judged: Sequence[Sequence[Label]],
    names: Sequence[str],
    train: TrainData,
    validation: EvaluationData,
) -> None:
    """Check that training has every class that validation has.

    Raises:
        DataError: it has not, or the two number their classes differently.
    """
    theirs = validation.class_names
    if theirs and train.class_names and theirs != train.class_names:
        raise DataError(
            f"{validation.shards.spec}: its classes are {', '.join(theirs[:5])}..., those of {train.shards.spec} are "
            f"{', '.join(train.class_names[:5])}...: a number means another class there; write both with the same names"
        )
    seen = {number for labels in learnt for label in labels for number in _numbers(label)}
    counts = Counter(number for labels in judged for label in labels for number in _numbers(label))
    unseen = sorted(counts.keys() - seen)
    if unseen:
        first = names[unseen[0]] if unseen[0] < len(names) else str(unseen[0])
        more = f", and so of {len(unseen) - 1} more classes" if len(unseen) > 1 else ""
        raise DataError(
            f"{validation.shards.spec}: {counts[unseen[0]]} samples are of class {first!r}, of which training "
            f"({train.shards.spec}) has none{more}; "
            "add training samples of it, or leave it out of data.validation"
        )


def _few(
    config: LabelConfig, train: TrainData, learnt: Sequence[Sequence[Label]], seed: int
) -> tuple[TrainData, list[list[Label]]]:
    """So many training samples as ``labels.count`` says, in equal shares of each class.

    Raises:
        ConfigError: there are fewer, or more classes than that.
    """
    count, flat = config.count or 0, [label for labels in learnt for label in labels]
    if count > len(flat):
        raise ConfigError([f"labels.count={count}: there are {len(flat)} labelled samples; choose at most that"])
    generator = np.random.default_rng([seed, _FEW_LABELS])
    order = generator.permutation(len(flat))
    if config.kind is LabelKind.CLASS:
        places: dict[Label, list[int]] = {}
        for place in order.tolist():
            places.setdefault(flat[place], []).append(place)
        if count < len(places):
            raise ConfigError([f"labels.count={count}: fewer than the {len(places)} classes; choose more"])
        by_class = [places[label] for label in sorted(places)]
        # One of each class in turn, for as long as each has more.
        longest = max(map(len, by_class))
        order = np.array([members[turn] for turn in range(longest) for members in by_class if turn < len(members)])
    wanted = np.zeros(len(flat), dtype=bool)
    wanted[order[:count]] = True
    edges = np.cumsum([len(labels) for labels in learnt])[:-1]
    parts = np.split(wanted, edges)
    kept = [
        [label for label, w in zip(labels, own, strict=True) if w] for labels, own in zip(learnt, parts, strict=True)
    ]
    return train.chosen_of([own.tolist() for own in parts]), kept


def _balanced(learnt: Sequence[Sequence[Label]], classes: int) -> tuple[float, ...]:
    """Weights by the inverse of each class's count, whose mean over the training labels is 1."""
    counts = Counter(number for labels in learnt for label in labels for number in _numbers(label))
    present = len(counts)
    total = sum(counts.values())
    return tuple(total / (present * counts[number]) if counts[number] else 1.0 for number in range(classes))


def label_targets(batch: Batch, config: LabelConfig) -> Tensor:
    """The labels of a batch: (B,) int64 classes, (B, C) float32 zeros and ones, or (B, 1) float32 numbers.

    Raises:
        DataError: a sample has none, or one that is no class.
    """
    classes = len(config.classes)
    if config.kind is LabelKind.CLASS:
        wrong = ((batch.labels < 0) | (batch.labels >= classes)).nonzero().flatten().tolist()
        if wrong:
            raise DataError(f"{batch.keys[wrong[0]]}: {_complaint(int(batch.labels[wrong[0]]), classes)}")
        return batch.labels
    texts = batch.annotations.get(_MEMBERS[config.kind], (None,) * len(batch))
    labels = [None if text is None else read_label(config.kind, text) for text in texts]
    rows: list[Any] = []
    for key, label in zip(batch.keys, labels, strict=True):
        beyond = [number for number in _numbers(label) if number >= classes] if label is not None else []
        if label is None or beyond:
            raise DataError(f"{key}: {_complaint(beyond[0] if beyond else -1, classes)}")
        rows.append([float(n in _numbers(label)) for n in range(classes)] if isinstance(label, tuple) else [label])
    return torch.tensor(rows, dtype=torch.float32)


def _complaint(label: int, classes: int) -> str:
    if label < 0:
        return "has no label; label it, or leave it out"
    return f"is of class {label}, but the model was made for {classes} classes (from 0); mend its label"


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """(B, C) float32 targets of (B,) classes, of which ``smoothing`` is spread over all (Szegedy et al. 2016)."""
    return F.one_hot(labels, classes).float() * (1.0 - smoothing) + smoothing / classes
