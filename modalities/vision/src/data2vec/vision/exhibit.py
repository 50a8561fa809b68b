"""The exhibit of vision: raw pixels, pictures of masks and features, sample digits, random images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Exhibit, Illustrations, Panel, RandomInput, only_own
from data2vec.vision.panels import panels, pictures
from data2vec.vision.samples import write_mnist_shards

if TYPE_CHECKING:
    from data2vec.vision.config import Vision

_RAW_SIZE = 32  # pixels along a side of the images that the raw-pixel row of an evaluation sees


class VisionExhibit(Exhibit):
    """The exhibit of images of some settings."""

    raw_name: ClassVar[str] = "raw pixels"

    def __init__(self, vision: Vision) -> None:
        self._vision = vision

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) pixels, larger images averaged down to 32 x 32: probes of whole photos would not fit in memory."""
        images = batch.inputs.float()
        if images.shape[-1] > _RAW_SIZE:
            images = torch.nn.functional.adaptive_avg_pool2d(images, _RAW_SIZE)
        return images.flatten(1)

    def raw_picture(self, batch: Batch) -> Tensor | None:
        return batch.inputs.float()

    def panels(self, drawn: Illustrations) -> list[Panel]:
        vision = self._vision
        return panels(drawn, mean=vision.mean, std=vision.std, patch=vision.patch_size)

    def cards(self, batch: Batch) -> list[str]:
        return pictures(batch.inputs, self._vision.mean, self._vision.std)

    def write_sample_shards(self, folder: Path, which: str | None = None) -> None:
        only_own(which)
        write_mnist_shards(folder)

    def random_input(self, samples: int) -> RandomInput:
        size, generator = self._vision.image_size, torch.Generator().manual_seed(0)
        return RandomInput(torch.randn(samples, self._vision.channels, size, size, generator=generator), "images")
