"""The settings of fine-tuning: where it starts, and how the pretrained parts learn.

Sources of the recipes' values: data2vec 1.0 (arXiv 2202.03555) and BEiT's fine-tuning for images, wav2vec 2.0's for
speech, RoBERTa's for text, and the released configurations of data2vec 2.0 (arXiv 2212.07525).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from data2vec.core.settings.declare import NOT_NEGATIVE, PART, TEXT, Free, setting
from data2vec.core.settings.fields import Recipe


class Weights(StrEnum):
    """The encoder of a pretraining run that is trained on."""

    STUDENT = "student"
    TEACHER = "teacher"


class Freeze(StrEnum):
    """The pretrained parts that never learn: none, the feature ``extractor``, the lowest ``layers``, or all."""

    NONE = "none"
    EXTRACTOR = "extractor"
    LAYERS = "layers"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class FineTuning(Recipe):
    """The settings of the training of an encoder for a task with labels.

    With ``start`` the network is that of the run it names: of ``transformer`` and of the modality only those settings
    count that say how it is trained (dropout, augmentation, image size).
    """

    kind: ClassVar[str] = "fine-tuning"
    order: ClassVar[tuple[str, ...]] = (
        "kind", "name", "modalities", "start", "weights", "freeze", "freeze_layers", "freeze_updates", "layer_decay",
        "layer_decay_embeddings", "transformer", "optim", "data", "train", "engine",
    )  # fmt: skip

    # The run or checkpoint whose encoder is trained on; null: a new one is trained from scratch.
    start: str | None = setting(None, TEXT, Free.YES)
    weights: Weights = Weights.STUDENT
    freeze: Freeze = Freeze.NONE
    freeze_layers: int = setting(0, NOT_NEGATIVE)  # of freeze=layers: blocks that never learn, and what is below them
    freeze_updates: int = setting(0, NOT_NEGATIVE)  # in which the head alone learns
    layer_decay: float = setting(1.0, PART)  # factor of the learning rate from each block to the one below it
    # Whether it goes on to what is below the blocks; the released code of 2.0 leaves that at the full rate.
    layer_decay_embeddings: bool = True

    @property
    def source(self) -> str | None:
        return self.start
