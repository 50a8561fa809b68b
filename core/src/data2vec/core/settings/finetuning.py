"""The settings of fine-tuning: where it starts, and how the pretrained parts learn.

Sources of the recipes' values: data2vec 1.0 (arXiv 2202.03555) and BEiT's fine-tuning for images, wav2vec 2.0's for
speech, RoBERTa's for text, and the released configurations of data2vec 2.0 (arXiv 2212.07525).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from data2vec.core.settings.declare import (
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    RATE,
    SHARE,
    TEXT,
    Free,
    at_least,
    each,
    section,
    setting,
)
from data2vec.core.settings.fields import Recipe


class Weights(StrEnum):
    """The encoder of a pretraining run that is trained on; ``none``: its network, but with fresh weights."""

    STUDENT = "student"
    TEACHER = "teacher"
    NONE = "none"


class Freeze(StrEnum):
    """The pretrained parts that never learn: none, the feature ``extractor``, the lowest ``layers``, or all."""

    NONE = "none"
    EXTRACTOR = "extractor"
    LAYERS = "layers"
    ALL = "all"


LOWER_IS_BETTER = frozenset({"validation_loss", "squared_error", "wer", "cer"})
"""Scores of which the lowest is the best."""


class Pool(StrEnum):
    """The vector of a sample: the ``mean`` over its positions, or the ``first`` one (CLS token, ``<s>``)."""

    MEAN = "mean"
    FIRST = "first"


class LabelKind(StrEnum):
    """The label of a sample, and the member that holds it.

    ``class``: one class number (``cls``). ``classes``: any number of them, apart by spaces (``classes``). ``number``: a
    real number (``number``).
    """

    CLASS = "class"
    CLASSES = "classes"
    NUMBER = "number"


SCORES: dict[LabelKind, tuple[str, ...]] = {
    LabelKind.CLASS: ("accuracy", "top5", "macro_f1", "f1", "matthews", "validation_loss"),
    LabelKind.CLASSES: ("mean_average_precision", "micro_f1", "validation_loss"),
    LabelKind.NUMBER: ("pearson", "spearman", "squared_error", "validation_loss"),
}
"""The scores of a classification by the kind of its labels, the one that tells most first."""


@dataclass(frozen=True)
class HeadConfig:
    """From the features of a sample to its logits: pool, layer norm, dense and tanh, dropout, projection."""

    pool: Pool = Pool.MEAN
    norm: bool = True  # layer norm (eps 1e-6) of the pooled vector, instead of a pre-norm Transformer's last one
    hidden: bool = False  # a dense layer of the Transformer's width with tanh (RoBERTa's head)
    dropout: float = setting(0.0, RATE)  # before each dense layer
    init_std: float = setting(0.02, POSITIVE)  # of the projection's weights


@dataclass(frozen=True)
class LabelConfig:
    """The labels that are learnt, and their weights in the loss."""

    kind: LabelKind = LabelKind.CLASS
    # Names of the class numbers; empty: those of the shards' index, or else the numbers that training has.
    classes: tuple[str, ...] = setting((), free=Free.YES)
    # Learn from so many labelled samples alone, in equal shares of each class, drawn by train.seed.
    count: int | None = setting(None, at_least(1))
    smoothing: float = setting(0.0, RATE)
    balanced: bool = False  # weigh each class by the inverse of its share of the training samples
    weights: tuple[float, ...] = setting((), each(POSITIVE))  # of each class in the loss; empty: all alike


@dataclass(frozen=True)
class MixConfig:
    """Mixtures of two training samples and of their labels: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019).

    ``mixup``, ``cutmix``: alpha of the beta distribution of the share; 0 switches one off. ``chance``: of a batch to
    be mixed. ``switch``: chance of CutMix where both are on.
    """

    mixup: float = setting(0.0, NOT_NEGATIVE)
    cutmix: float = setting(0.0, NOT_NEGATIVE)
    chance: float = setting(1.0, SHARE)
    switch: float = setting(0.5, SHARE)

    @property
    def is_on(self) -> bool:
        """Tell whether anything is mixed."""
        return self.chance > 0 and max(self.mixup, self.cutmix) > 0


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) on the linear layers of blocks, which learn in place of the encoder; needs peft."""

    rank: int = setting(0, NOT_NEGATIVE)  # 0: none
    alpha: int = setting(16, at_least(1))  # what an adapter adds is multiplied by alpha / rank
    dropout: float = setting(0.0, RATE)  # of an adapter's input


@dataclass(frozen=True)
class ScoreConfig:
    """Scores on the validation data, every ``every`` updates and at the end."""

    every: int | None = setting(None, at_least(1))
    batch: int = setting(64, at_least(1))
    # Stop when so many evaluations in a row have not improved train.keep_best; null: train to the end.
    patience: int | None = setting(None, at_least(1))


@dataclass(frozen=True, kw_only=True)
class FineTuning(Recipe, ABC):
    """The settings of the training of an encoder for a task with labels.

    With ``start`` the network is that of the run it names: of ``transformer`` and of the modality only those settings
    count that say how it is trained (dropout, augmentation, image size).
    """

    # The run or checkpoint whose encoder is trained on; null: a new one is trained from scratch.
    start: str | None = setting(None, TEXT, Free.YES)
    weights: Weights = Weights.STUDENT
    freeze: Freeze = Freeze.NONE
    freeze_layers: int = setting(0, NOT_NEGATIVE)  # of freeze=layers: blocks that never learn, and what is below them
    freeze_updates: int = setting(0, NOT_NEGATIVE)  # in which the head alone learns
    layer_decay: float = setting(1.0, PART)  # factor of the learning rate from each block to the one below it
    # Whether it goes on to what is below the blocks; the released code of 2.0 leaves that at the full rate.
    layer_decay_embeddings: bool = True
    adapters: AdapterConfig = section(AdapterConfig)
    evaluation: ScoreConfig = section(ScoreConfig, Free.YES)

    @property
    def source(self) -> str | None:
        return None if self.weights is Weights.NONE else self.start

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...]:
        """The scores on the validation data, the one that tells most first."""


_SHARED = (
    "start", "weights", "freeze", "freeze_layers", "freeze_updates", "layer_decay", "layer_decay_embeddings",
    "adapters",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Classification(FineTuning):
    """The settings of fine-tuning for classes or numbers: one label, or one set of them, for each sample."""

    kind: ClassVar[str] = "classification"
    order: ClassVar[tuple[str, ...]] = (
        "kind", "name", "modalities", *_SHARED, "labels", "head", "mix", "transformer", "optim", "data", "train",
        "engine", "evaluation",
    )  # fmt: skip

    labels: LabelConfig = section(LabelConfig)
    head: HeadConfig = section(HeadConfig)
    mix: MixConfig = section(MixConfig)

    @property
    def scores(self) -> tuple[str, ...]:
        return SCORES[self.labels.kind]


class Case(StrEnum):
    """The letters of transcripts as they are, or all of them in upper or lower case."""

    KEEP = "keep"
    UPPER = "upper"
    LOWER = "lower"


@dataclass(frozen=True)
class LetterConfig:
    """The symbols that speech is written with, and the transcripts that are learnt from (member ``txt``)."""

    # The rows of the head: the first is CTC's blank, ``|`` stands between words. Empty: a blank, ``|`` and the letters
    # of the training transcripts.
    symbols: tuple[str, ...] = setting((), free=Free.YES)
    case: Case = Case.KEEP
    # Learn from so many minutes of the transcribed clips alone, drawn by train.seed; null: from all of them.
    minutes: float | None = setting(None, POSITIVE)
    min_words: int = setting(1, at_least(1))  # clips with fewer words are left out


@dataclass(frozen=True)
class FrameMaskConfig:
    """The masks of wav2vec 2.0 in fine-tuning (Baevski et al. 2020, section 4.3): of frames, and of channels.

    Hidden frames become the mask token, hidden channels 0.

    ``time``, ``channels``: the length of all spans together as a share of the frames, or of the channels; overlaps
    count twice. 0 switches one off.
    """

    time: float = setting(0.65, NOT_NEGATIVE)
    time_length: int = setting(10, at_least(1))  # frames of a span
    channels: float = setting(0.25, NOT_NEGATIVE)
    channel_length: int = setting(64, at_least(1))  # channels of a span


@dataclass(frozen=True, kw_only=True)
class Recognition(FineTuning):
    """The settings of fine-tuning for letters with CTC (Graves et al. 2006)."""

    kind: ClassVar[str] = "recognition"
    order: ClassVar[tuple[str, ...]] = (
        "kind", "name", "modalities", *_SHARED, "letters", "frame_masks", "final_dropout", "transformer", "optim",
        "data", "train", "engine", "evaluation",
    )  # fmt: skip

    letters: LetterConfig = section(LetterConfig)
    frame_masks: FrameMaskConfig = section(FrameMaskConfig)
    final_dropout: float = setting(0.0, RATE)  # before the projection onto letters

    @property
    def scores(self) -> tuple[str, ...]:
        return ("wer", "cer", "validation_loss")
