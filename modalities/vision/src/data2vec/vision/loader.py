"""From the bytes of a shard to normalised image tensors, with the recipes' augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from data2vec.core.batch import Example, Sample, decode_label
from data2vec.core.data.stream.reading import preserved_generators, seed_generators
from data2vec.core.errors import SampleError
from data2vec.core.settings.declare import NOT_NEGATIVE, SHARE, Rule, setting
from data2vec.vision.augment import erase, random_augment
from data2vec.vision.image import MEMBERS, convert, read_image

EXTENSIONS = tuple(MEMBERS)


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentation of a training image, in this order; data2vec 1.0's augmentation follows BEiT's.

    ``crop_scale``: smallest and largest share of the image that a random crop keeps before it is resized (aspect 3/4
    to 4/3, bicubic); null: the whole image is resized and its centre taken. ``translate``: a shift of up to so many
    pixels both ways, filled with black, for small drawings that a crop would cut. ``flip``: chance of a horizontal
    flip. ``colour_jitter``: strength for brightness, contrast and saturation (2.0: 0). ``auto_augment``: timm's
    RandAugment, such as ``rand-m9-mstd0.5-inc1``, in place of the colour jitter. ``erase``: chance that a rectangle
    becomes noise.
    """

    crop_scale: tuple[float, float] | None = setting(
        (0.08, 1.0), Rule(lambda scale: 0 < scale[0] <= scale[1] <= 1, "must rise and lie above 0 and at most 1")
    )
    translate: int = setting(0, NOT_NEGATIVE)
    flip: float = setting(0.5, SHARE)
    colour_jitter: float = setting(0.4, NOT_NEGATIVE)
    auto_augment: str | None = None
    erase: float = setting(0.0, SHARE)

    def problems(self) -> list[str]:
        """List what timm cannot read, one line each."""
        if self.auto_augment is None:
            return []
        try:
            random_augment(self.auto_augment, 32, (0.5,))
        except ValueError as error:
            return [f"vision.augment.auto_augment={self.auto_augment}: {error}"]
        return []


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes the first image of a sample: a pure function of the sample and the seed.

    Args:
        size: side of the square image in pixels.
        channels: 3 (RGB) or 1 (grey).
        mean: of each channel in [0, 1], taken off.
        std: of each channel in [0, 1], divided by.
        augment: for training; None for evaluation.
        crop: evaluation scales the shorter side to ``size / crop`` and takes the centre.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentConfig | None = None
    crop: float = 0.875

    def __call__(self, sample: Sample, seed: int) -> Example:
        """``inputs``: (C, size, size) float32. ``label``: from the member ``cls``, a number in ASCII digits.

        Raises:
            SampleError: no image, or an image that cannot be decoded or is too large.
        """
        label = decode_label(sample)
        image = decode_image(sample, self.channels)
        if self.augment is None:
            return Example(self._normalised(centre_crop(image, self.size, self.crop)), label)
        if self.augment.crop_scale is None:
            image = centre_crop(image, self.size, 1.0)
        if not (self._steps or self.augment.erase):
            return Example(self._normalised(image), label)
        with preserved_generators():  # torchvision and timm draw from the global generators and take no others
            seed_generators(seed)
            for step in self._steps:
                image = step(image)
            pixels = self._normalised(image)
            return Example(erase(pixels, self.augment.erase) if self.augment.erase else pixels, label)

    def prepare(self, image: Image.Image, what: str = "it") -> Tensor:
        """(C, size, size) float32 of a PIL image, as evaluation sees it.

        Raises:
            SampleError: it cannot be decoded; the message begins with ``what``.
        """
        return self._normalised(centre_crop(convert(image, self.channels, what), self.size, self.crop))

    @cached_property
    def _steps(self) -> list[Callable[[Image.Image], Image.Image]]:
        """The random steps that are switched on."""
        augment = self.augment
        if augment is None:
            return []
        steps: list[Callable[[Image.Image], Image.Image]] = []
        if augment.crop_scale is not None:
            bicubic = InterpolationMode.BICUBIC
            steps.append(v2.RandomResizedCrop(self.size, scale=augment.crop_scale, interpolation=bicubic))
        if augment.translate:
            steps.append(v2.RandomCrop(self.size, padding=augment.translate))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.auto_augment is not None:
            steps.append(random_augment(augment.auto_augment, self.size, self.mean))
        elif augment.colour_jitter:
            strength = augment.colour_jitter
            steps.append(v2.ColorJitter(strength, strength, strength if self.channels == 3 else 0.0))
        return steps

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """(C,) factor and (C,) summand that turn bytes into normalised values."""
        std = 255.0 * torch.tensor(self.std, dtype=torch.float64)
        mean = 255.0 * torch.tensor(self.mean, dtype=torch.float64)
        return (1.0 / std).float(), (-mean / std).float()

    def _normalised(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, self.channels)
        factor, summand = self._normalisation
        return torch.addcmul(summand, pixels.float(), factor).permute(2, 0, 1).contiguous()


def decode_image(sample: Sample, channels: int) -> Image.Image:
    """The sample's image as RGB (3 channels) or grey (1), see :mod:`data2vec.vision.image`.

    Raises:
        SampleError: no image among the members, or one that cannot be decoded.
    """
    extension = next((extension for extension in EXTENSIONS if extension in sample.members), None)
    if extension is None:
        found = ", ".join(sorted(sample.members)) or "none"
        raise SampleError(f"no image: members are {found}, expected one of {', '.join(EXTENSIONS)}")
    data = sample.members[extension]
    what = f"{extension} of {len(data)} bytes"
    return convert(read_image(data, what), channels, what)


def centre_crop(image: Image.Image, size: int, crop: float) -> Image.Image:
    """A ``size`` x ``size`` image: the shorter side scaled to ``size / crop`` (bicubic), then the centre."""
    width, height = image.size
    side = crop * min(width, height)  # of the square in the original that becomes the image
    if (width, height) == (size, size) and crop == 1.0:
        return image
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
