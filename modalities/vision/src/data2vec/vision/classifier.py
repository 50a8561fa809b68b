"""A fine-tuned run as a function from images to their classes."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import overload

from PIL import Image

from data2vec.core.run.naming import Named, name, require_classifier
from data2vec.vision.encoder import ImageEncoder, Images

_BATCH = 64


@dataclass(frozen=True)
class ImageClassifier:
    """The classifier of a run: of files or PIL images, one or many."""

    encoder: ImageEncoder

    @overload
    def __call__(self, images: str | PathLike[str] | Image.Image) -> Named: ...

    @overload
    def __call__(self, images: Images) -> Named | list[Named]: ...

    def __call__(self, images: Images) -> Named | list[Named]:
        """Name the class of an image, or of each of several.

        Raises:
            SampleError: a file that cannot be read, or that is no image.
        """
        one = isinstance(images, str | PathLike | Image.Image)
        several = [images] if isinstance(images, str | PathLike | Image.Image) else list(images)
        found: list[Named] = []
        for start in range(0, len(several), _BATCH):
            found += name(self.encoder.run, self.encoder.prepare(several[start : start + _BATCH]))
        return found[0] if one else found


def load_classifier(run: str | Path, *, device: str = "auto") -> ImageClassifier:
    """Read a run's folder (its best checkpoint) or a checkpoint.

    Raises:
        CheckpointError: no complete checkpoint there, or a run that names no classes of images.
    """
    encoder = ImageEncoder.load(run, device=device)
    require_classifier(encoder.run)
    return ImageClassifier(encoder)
