"""Supervised classification of images: a second kind of training, which touches no file of core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core import Batch
from data2vec.core.model.encoder import Backbone
from data2vec.core.settings.fields import OptimConfig
from data2vec.core.task import Group, Step, Task

DECAY = 0.5  # of the learning rate from each block to the one below


@dataclass(frozen=True)
class Labelled:
    inputs: Tensor
    labels: Tensor

    @property
    def count(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Labelled:
        return Labelled(self.inputs.to(device), self.labels.to(device))


class Classification(Task[Labelled]):
    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)

    def prepare(self, batch: Batch, *, seed: int, update: int) -> Labelled:
        return Labelled(batch.inputs, batch.labels)

    def forward(self, prepared: Labelled, *, seed: int = 0, update: int = 0) -> Step:
        features, _ = self.backbone(prepared.inputs)
        logits = self.head(features.mean(1))
        right = (logits.argmax(1) == prepared.labels).float().mean()
        return Step(F.cross_entropy(logits, prepared.labels, reduction="sum"), prepared.count, {"accuracy": right})

    def groups(self, optim: OptimConfig) -> list[Group]:
        blocks = list(self.backbone.encoder.transformer.blocks)
        above = {id(p): len(blocks) - number for number, block in enumerate(blocks) for p in block.parameters()}
        above |= {id(p): 0 for p in self.head.parameters()}
        scales: dict[float, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            scales.setdefault(DECAY ** above.get(id(parameter), len(blocks) + 1), []).append(parameter)
        return [Group(tuple(own), optim.weight_decay, scale) for scale, own in scales.items()]
