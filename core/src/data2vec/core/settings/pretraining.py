"""The settings of pretraining: what the student sees, what it regresses, and how it is judged.

Defaults are those of data2vec 1.0 base (Baevski et al. 2022, arXiv 2202.03555, "paper 1") unless a comment
says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from data2vec.core.settings.declare import NOT_NEGATIVE, POSITIVE, RATE, SHARE, Free, Rule, at_least, section, setting
from data2vec.core.settings.fields import LayerOutput, Recipe


class TargetNorm(StrEnum):
    """The normalisation of a teacher layer, or of the mean of the layers; none has learned parameters.

    ``layer``: over channels of each position. ``instance``: over the positions of each sample, per channel.
    ``batch``: over all positions of the batch, per channel.
    """

    NONE = "none"
    LAYER = "layer"
    INSTANCE = "instance"
    BATCH = "batch"


class StudentSees(StrEnum):
    """``all`` positions with masked ones replaced by a mask token (1.0), or the ``visible`` ones alone (2.0)."""

    ALL = "all"
    VISIBLE = "visible"


class TeacherShares(StrEnum):
    """The parts that the teacher takes from the student instead of averaging them.

    ``nothing``; the feature ``extractor``; that and the ``positions`` computed from its features; or the whole
    ``frontend`` (also prefix tokens, input norm and modality blocks), so that only the shared Transformer and its
    attention bias are averaged.
    """

    NOTHING = "nothing"
    EXTRACTOR = "extractor"
    POSITIONS = "positions"
    FRONTEND = "frontend"


class PredictorKind(StrEnum):
    """``identity``: the student's output is the prediction, as in the released vision code of data2vec 1.0."""

    IDENTITY = "identity"
    LINEAR = "linear"
    MLP = "mlp"
    CONV1D = "conv1d"
    CONV2D = "conv2d"


@dataclass(frozen=True)
class PredictorConfig:
    """The head that turns student outputs into predictions of the target.

    ``linear`` and ``mlp`` (``layers`` linear layers, GELU between, ``width`` = hidden width, null = twice the
    Transformer's) act on each position; the convolutional decoders of data2vec 2.0 see all positions.
    """

    kind: PredictorKind = PredictorKind.LINEAR
    layers: int = setting(1, at_least(1))
    width: int | None = setting(None, at_least(1))
    kernel: int = setting(3, at_least(1))
    groups: int = setting(1, at_least(1))
    residual: bool = True
    projection_layers: int = setting(1, at_least(1))
    projection_ratio: float = setting(2.0, Rule(lambda ratio: ratio > 0, "must be above 0"))
    input_dropout: float = setting(0.0, RATE)
    # Standard deviation of the tokens that stand at masked positions (2.0).
    mask_noise: float = setting(0.01, NOT_NEGATIVE)


@dataclass(frozen=True)
class TeacherConfig:
    """Decay rises linearly from ``decay_start`` to ``decay_end`` over ``decay_updates`` updates, then stays."""

    decay_start: float = setting(0.999, SHARE)
    decay_end: float = setting(0.9999, SHARE)
    decay_updates: int = setting(30_000, NOT_NEGATIVE)
    shares: TeacherShares = TeacherShares.EXTRACTOR


@dataclass(frozen=True)
class TargetsConfig:
    """Mean over the teacher's last ``top_k`` blocks, each normalised by ``layer_norm``, the mean by ``mean_norm``."""

    top_k: int = setting(8, at_least(1))
    output: LayerOutput = LayerOutput.FEED_FORWARD
    layer_norm: TargetNorm = TargetNorm.INSTANCE
    mean_norm: TargetNorm = TargetNorm.NONE


@dataclass(frozen=True)
class LossConfig:
    """Smooth L1 with ``beta`` (0: squared error), times ``scale`` (null: 1 / sqrt(width)), summed over channels."""

    beta: float = setting(0.0, NOT_NEGATIVE)
    scale: float | None = setting(None, POSITIVE)
    # Of the CLS token's regression of the mean target, averaged over rows (samples x masks).
    cls_weight: float = setting(0.0, NOT_NEGATIVE)


@dataclass(frozen=True)
class EvaluationConfig:
    """Probes of frozen features, run after training (and every ``every`` updates when that is set)."""

    tasks: tuple[str, ...] = ("knn", "linear", "rank")
    layers: str = "top_k"  # top_k: mean of the top K layers; last; all; or a layer number
    neighbours: int = setting(20, at_least(1))
    few_labels: int = setting(200, at_least(1))
    max_samples: int = setting(50_000, at_least(1))
    # Single positions (frames) that the task positions is fitted to, and judged by.
    max_positions: int = setting(10_000, at_least(1))
    batch: int = setting(256, at_least(1))
    every: int | None = setting(None, at_least(1))


@dataclass(frozen=True, kw_only=True)
class Experiment(Recipe):
    """The settings of a pretraining run."""

    kind: ClassVar[str] = "pretraining"
    order: ClassVar[tuple[str, ...]] = (
        "name", "modalities", "student_sees", "transformer", "teacher", "targets", "loss", "optim", "data", "train",
        "engine", "evaluation",
    )  # fmt: skip

    student_sees: StudentSees = StudentSees.ALL
    teacher: TeacherConfig = section(TeacherConfig)
    targets: TargetsConfig = section(TargetsConfig)
    loss: LossConfig = section(LossConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig, Free.YES)
