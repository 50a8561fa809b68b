"""A finished run as a function from images to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data2vec.core.errors import SampleError
from data2vec.core.modality import Decoder
from data2vec.core.run.load import LoadedRun, load_run
from data2vec.vision.config import Vision
from data2vec.vision.image import file_formats, read_image
from data2vec.vision.loader import ImageDecoder

Images = str | PathLike[str] | Image.Image | Iterable[str | PathLike[str] | Image.Image]


@dataclass(frozen=True)
class ImageEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.pretraining.data2vec.Data2Vec.features`.
    """

    run: LoadedRun
    decoder: ImageDecoder
    layers: str | int = "top_k"
    of: str = ""

    @classmethod
    def load(cls, run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> ImageEncoder:
        """Read a run's folder or checkpoint.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without images.
        """
        loaded = load_run(run, device=device)
        decoder: Decoder = loaded.settings_of(Vision).build_decoder(train=False)
        assert isinstance(decoder, ImageDecoder)
        return cls(loaded, decoder, layers, of)

    def prepare(self, images: Images) -> Tensor:
        """(B, C, H, W) normalised pixels of files or PIL images, resized and cropped as in evaluation.

        A single one is a batch of one.

        Raises:
            SampleError: a file that cannot be read, or that is no image.
        """
        several = [images] if isinstance(images, str | PathLike | Image.Image) else images
        prepared = [self._prepared(number, image) for number, image in enumerate(several)]
        size, channels = self.decoder.size, self.decoder.channels
        return torch.stack(prepared) if prepared else torch.empty(0, channels, size, size)

    def _prepared(self, number: int, image: str | PathLike[str] | Image.Image) -> Tensor:
        if isinstance(image, Image.Image):
            return self.decoder.prepare(image, f"image {number} of those given")
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise SampleError(f"{image}: cannot be read ({error.strerror})") from None
        what = f"{image}:"
        return self.decoder.prepare(read_image(content, what, file_formats()), what)

    def patches(self, images: Tensor | Images) -> Tensor:
        """(B, h, w, D) float32, one vector for each patch; the arguments are those of a call."""
        inputs = images if isinstance(images, Tensor) else self.prepare(images)
        if inputs.ndim == 3:
            inputs = inputs.unsqueeze(0)
        if not len(inputs):  # the shape is that of a batch of one
            return self.patches(inputs.new_zeros(1, *inputs.shape[1:]))[:0]
        features = self.run.features(inputs, modality=Vision.name, layers=self.layers, of=self.of)
        grid: Tensor = features.x.unflatten(1, features.shape)
        return grid

    def __call__(self, images: Tensor | Images) -> Tensor:
        """(B, D) float32, one vector for each image: the mean over its patches.

        Args:
            images: files, PIL images, or normalised pixels (B, C, H, W) as :meth:`prepare` gives them. A single one
                is a batch of one, and none an empty batch.
        """
        pooled: Tensor = self.patches(images).flatten(1, 2).mean(1)
        return pooled


def load_encoder(run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> ImageEncoder:
    """:meth:`ImageEncoder.load`."""
    return ImageEncoder.load(run, layers=layers, of=of, device=device)
