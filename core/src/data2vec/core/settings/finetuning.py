"""The settings of fine-tuning: where it starts, and how the pretrained parts learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from data2vec.core.settings.declare import NOT_NEGATIVE, PART, TEXT, Free, setting
from data2vec.core.settings.fields import Recipe


@dataclass(frozen=True, kw_only=True)
class FineTuning(Recipe):
    """The settings of the training of a pretrained encoder for a task with labels."""

    task: ClassVar[str] = "fine-tuning"
    order: ClassVar[tuple[str, ...]] = (
        "name", "modalities", "start", "transformer", "layer_decay", "freeze_updates", "optim", "data", "train",
        "engine",
    )  # fmt: skip

    start: str | None = setting(None, TEXT, Free.YES)  # the run or checkpoint whose encoder is trained on
    layer_decay: float = setting(1.0, PART)  # factor of the learning rate from each block to the one before it
    freeze_updates: int = setting(0, NOT_NEGATIVE)  # in which the head alone learns
