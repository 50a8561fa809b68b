"""A finished run as a function from images to features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data2vec.core.batch import Sample
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.loading import LoadedRun, load_run
from data2vec.core.modality import Decoder
from data2vec.vision.config import Vision
from data2vec.vision.loader import ImageDecoder


@dataclass(frozen=True)
class ImageEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.pretraining.data2vec.Data2Vec.features`.
    """

    run: LoadedRun
    decoder: ImageDecoder
    layers: str | int = "top_k"
    of: str = "teacher"

    @classmethod
    def load(
        cls, run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
    ) -> ImageEncoder:
        """Read a run's folder or checkpoint.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without images.
        """
        loaded = load_run(run, device=device)
        vision = loaded.experiment.modalities.get(Vision.name)
        if not isinstance(vision, Vision):
            names = ", ".join(loaded.experiment.modalities)
            raise CheckpointError(f"{run}: this run has no images, only {names}")
        decoder: Decoder = vision.build_decoder(train=False)
        assert isinstance(decoder, ImageDecoder)
        return cls(loaded, decoder, layers, of)

    def prepare(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """(B, C, H, W) normalised pixels of files or PIL images, resized and cropped as in evaluation.

        Raises:
            SampleError: a file that is no image.
        """
        return torch.stack([self._prepared(image) for image in images])

    def _prepared(self, image: str | Path | Image.Image) -> Tensor:
        if isinstance(image, Image.Image):
            return self.decoder.prepare(image)
        path = Path(image)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error})") from None
        try:
            return self.decoder(Sample(path.name, str(path), 0, {"png": content}), 0).inputs
        except SampleError as error:
            raise SampleError(f"{path}: {error}") from None

    def patches(self, images: Tensor | Sequence[str | Path | Image.Image]) -> Tensor:
        """(B, h, w, D) float32, one vector for each patch."""
        inputs = images if isinstance(images, Tensor) else self.prepare(images)
        features = self.run.features(inputs, modality=Vision.name, layers=self.layers, of=self.of)
        grid: Tensor = features.x.unflatten(1, features.shape)
        return grid

    def __call__(self, images: Tensor | Sequence[str | Path | Image.Image]) -> Tensor:
        """(B, D) float32, one vector for each image: the mean over its patches.

        Args:
            images: files, PIL images, or normalised pixels (B, C, H, W) as :meth:`prepare` gives them.
        """
        pooled: Tensor = self.patches(images).flatten(1, 2).mean(1)
        return pooled


def load_encoder(
    run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
) -> ImageEncoder:
    """:meth:`ImageEncoder.load`."""
    return ImageEncoder.load(run, layers=layers, of=of, device=device)
