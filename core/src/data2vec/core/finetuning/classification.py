"""Fine-tuning for classes and numbers.

Shapes: B samples, C classes (1 for a number).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.finetuning.finetuned import FineTuned, Learning
from data2vec.core.finetuning.head import Head
from data2vec.core.finetuning.labels import label_targets, one_hot
from data2vec.core.modality import Mixer
from data2vec.core.model.encoder import Backbone
from data2vec.core.settings.finetuning import Classification as Settings
from data2vec.core.settings.finetuning import HeadConfig, LabelConfig, LabelKind
from data2vec.core.task import Step


@dataclass(frozen=True)
class Labelled:
    """Samples with their targets.

    ``inputs``: (B, ...) as the extractor reads them. ``lengths``: (B,) or None. ``targets``: (B, C) float32, shares of
    each class (rows sum to 1), each class by itself in [0, 1], or (B, 1) numbers.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None

    @property
    def count(self) -> int:
        """Samples."""
        return len(self)

    def __len__(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device, non_blocking=True)
        inputs, targets = (value.to(device, non_blocking=True) for value in (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets, lengths=lengths)


class ClassificationTask(FineTuned[Labelled]):
    """An encoder with a head that names the class of a sample, its classes, or a number.

    Args:
        backbone: the encoder.
        labels: their kind, names and weights.
        head: the settings of the head.
        learning: which parts learn.
        mixer: mixes training samples; None: none are mixed.
    """

    def __init__(
        self,
        backbone: Backbone,
        labels: LabelConfig,
        head: HeadConfig,
        learning: Learning | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        transformer = backbone.encoder.transformer
        if head.norm:
            transformer.norm = nn.Identity()  # as in BEiT: the mean is normalised, not what it is taken of
        super().__init__(backbone, learning)
        self.labels = labels
        self.classes = max(1, len(labels.classes))
        self.head = Head(backbone.width, self.classes, head)
        self.mixer = mixer
        weights = torch.tensor(labels.weights or (1.0,) * self.classes)
        self.register_buffer("class_weights", weights, persistent=False)

    @classmethod
    def build(cls, recipe: Settings) -> Self:
        """A freshly initialised model of settled labels; draws from torch's global generator."""
        (modality,) = recipe.modalities.values()
        labels = recipe.labels
        mixer = modality.build_mixer(recipe.mix) if recipe.mix.is_on else None
        return cls(cls.build_backbone(recipe), labels, recipe.head, Learning.of(recipe), mixer)

    def prepare(self, batch: Batch, *, seed: int, update: int) -> Labelled:
        """Read the labels of a batch and mix its samples, on the CPU."""
        targets = label_targets(batch, self.labels)
        inputs = batch.inputs
        if self.labels.kind is LabelKind.CLASS:
            targets = one_hot(targets, self.classes, self.labels.smoothing)
        if self.mixer is not None and self.training:
            inputs, targets = self.mixer(inputs, targets, batch.ids, seed=seed, update=update)
        return Labelled(inputs, targets, batch.lengths)

    def forward(self, prepared: Labelled, *, seed: int = 0, update: int = 0) -> Step:
        """The loss of a batch: cross entropy, binary cross entropy averaged over classes, or squared error."""
        logits = self.logits(prepared.inputs, prepared.lengths, seed=seed, update=update)
        losses = self.losses(logits, prepared.targets)
        values = {}
        if self.labels.kind is LabelKind.CLASS:
            right = logits.argmax(1) == prepared.targets.argmax(1)
            values["accuracy"] = right.float().mean()
        return Step(losses.sum(), len(prepared), values)

    def logits(self, inputs: Tensor, lengths: Tensor | None = None, *, seed: int = 0, update: int = 0) -> Tensor:
        """(B, C) float32 logits of (B, ...) inputs."""
        with self.encoding(update):
            encoded, tokens = self.backbone.encoder(
                self.backbone.modality, inputs, lengths, dropped=self.dropped(seed, update)
            )
        out: Tensor = self.head(encoded, tokens.padding).float()
        return out

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) the loss of each sample; its classes count by their weights."""
        weights = self.class_weights
        assert isinstance(weights, Tensor)
        if self.labels.kind is LabelKind.CLASS:
            return -(targets * weights * F.log_softmax(logits, 1)).sum(1)
        if self.labels.kind is LabelKind.CLASSES:
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            return (each * weights).mean(1)
        return (logits - targets).square().mean(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) of each class, or the numbers as they are."""
        if self.labels.kind is LabelKind.CLASS:
            return logits.softmax(1)
        return logits.sigmoid() if self.labels.kind is LabelKind.CLASSES else logits
