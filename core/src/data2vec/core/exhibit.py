"""The exhibit of a modality: baselines for probes, pictures for the report, sample data, random input.

Nothing of it is needed to train.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.errors import ConfigError


@dataclass(frozen=True)
class Panel:
    """One section of the report: a heading, a sentence on how to read it, and self-contained HTML."""

    title: str
    caption: str
    html: str


@dataclass(frozen=True)
class Illustrations:
    """The material of a modality's panels: a few evaluation samples as the trained model sees them.

    ``batch``: B samples. ``mask``: (B, M, T) as in training. ``features``: (B, T, D) of the teacher, mean of the
    top K layers. ``shape``: the grid of the T positions.
    """

    batch: Batch
    mask: Tensor
    features: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RandomInput:
    """Input that stands for a batch, to measure speed with.

    ``inputs``: (B, ...) on the CPU. ``unit``, ``per_sample``: what a rate counts ("images"), and how many a sample has.
    """

    inputs: Tensor
    unit: str = "samples"
    per_sample: float = 1.0


class Exhibit:
    """The things that a modality shows. Each of them derives one and supplies what it has."""

    # The row of an evaluation for the mean of the extractor's output (a bag of embeddings); None: no such row.
    extractor_name: ClassVar[str | None] = None
    raw_name: ClassVar[str] = "raw input"

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) the plainest representation of the input, which probes compare with (raw pixels, pooled spectra)."""
        return batch.inputs.flatten(1).float()

    def raw_positions(self, batch: Batch) -> Tensor:
        """(B, T, F) the plainest representation of each position, where ``batch.position_labels`` has its class."""
        raise ConfigError(
            [f"evaluation.tasks=positions: {batch.modality} has no raw representation of single positions"]
        )

    def raw_picture(self, batch: Batch) -> Tensor | None:
        """(B, C, H, W) of the input as a picture (pixels, spectrograms); None where it is none."""
        return None

    def panels(self, drawn: Illustrations) -> list[Panel]:
        """Draw this modality's sections of the report."""
        return []

    def cards(self, batch: Batch) -> list[str]:
        """Self-contained HTML that shows each sample of a batch: a picture, a player, its text."""
        return [html.escape(key) for key in batch.keys]

    def write_sample_shards(self, folder: Path, which: str | None = None) -> None:
        """Write the sample data as shards ``train-*.tar`` and ``validation-*.tar`` with an index each.

        ``which``: the name of one of several; None for that which pretraining learns from.

        Raises:
            DataError: no sample data is installed.
            ConfigError: there is none of that name.
        """
        raise ConfigError(["data.train: this modality has no sample data; name shards"])

    def random_input(self, samples: int) -> RandomInput:
        """Make random input of as many samples, the same at every call."""
        raise ConfigError(["this modality has no random input to measure speed with"])


def only_own(which: str | None) -> None:
    """Refuse a name of sample data where a modality has but one.

    Raises:
        ConfigError: a name is given.
    """
    if which is not None:
        raise ConfigError([f"data.sample={which}: there is no sample data of that name; set data.sample=null"])
