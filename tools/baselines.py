"""Baselines for the labels of a fine-tuned run: a linear classifier and a small convolutional network."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.evaluation.features import Pooled
from data2vec.core.evaluation.linear import linear_accuracy
from data2vec.core.exhibit import Exhibit
from data2vec.core.finetuning.labels import settle_labels
from data2vec.core.run.prepare import open_data, with_assets
from data2vec.core.settings.finetuning import Classification

_BATCH = 64
_UPDATES = 1_000
_WIDTHS = (32, 64, 128)


def opened(recipe: Classification, folder: Path) -> tuple[TrainData, EvaluationData]:
    """The labelled samples that a run learnt from, and those that judged it."""
    train, validation = open_data(recipe, folder / "cache")
    with_assets(recipe, train, validation, folder, started=True)
    (name,) = recipe.modalities
    settled = settle_labels(recipe.labels, train[name], validation[name], seed=recipe.train.seed)
    return settled.train, settled.validation


def linear_score(recipe: Classification, folder: Path) -> float:
    """The accuracy of a linear classifier of the plainest representation of the input."""
    (modality,) = recipe.modalities.values()
    train, validation = opened(recipe, folder)
    seen, judged = (
        _features(modality.exhibit, data) for data in (train.for_evaluation(), validation)
    )  # without augmentation
    return linear_accuracy(seen, judged, seed=recipe.train.seed)


def _features(exhibit: Exhibit, data: EvaluationData) -> Pooled:
    batches = list(data.evaluation_batches(_BATCH))
    x = torch.cat([exhibit.raw_features(batch) for batch in batches])
    return Pooled(x, torch.cat([batch.labels for batch in batches]))


class ConvolutionalNetwork(nn.Module):
    """Three convolutions of 3 x 3 with batch norm and pooling, then a linear classifier.

    Args:
        channels: of the pictures.
        classes: to be told apart.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, classes) logits of (B, channels, H, W)."""
        logits: Tensor = self.head(self.layers(pictures))
        return logits


def convolutional_score(recipe: Classification, folder: Path) -> float | None:
    """The accuracy of a small convolutional network, augmented as the run was; None where inputs are no pictures."""
    (modality,) = recipe.modalities.values()
    exhibit: Exhibit = modality.exhibit
    train, validation = opened(recipe, folder)
    first = next(iter(validation.evaluation_batches(1)))
    picture = exhibit.raw_picture(first)
    if picture is None:
        return None
    torch.manual_seed(recipe.train.seed)
    network = ConvolutionalNetwork(picture.shape[1], len(recipe.labels.classes))
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=_UPDATES)
    stream = train.batches(0, min(_BATCH, train.total))
    for batch in islice(stream, _UPDATES):
        loss = nn.functional.cross_entropy(network(_picture(exhibit, batch)), batch.labels, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    right = total = 0
    with torch.no_grad():
        for batch in validation.evaluation_batches(_BATCH):
            right += int((network(_picture(exhibit, batch)).argmax(1) == batch.labels).sum())
            total += len(batch)
    return right / total


def _picture(exhibit: Exhibit, batch: Batch) -> Tensor:
    picture = exhibit.raw_picture(batch)
    assert picture is not None
    return picture
