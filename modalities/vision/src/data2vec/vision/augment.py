"""Augmentation of training images beyond crops and flips, and mixtures of whole batches; timm has all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from data2vec.core.data.stream.reading import preserved_generators, seed_generators
from data2vec.core.hashing import derive
from data2vec.core.settings.finetuning import MixConfig

_MIX = 22  # stream of random numbers
_SHIFT = 0.45  # largest translation, as a share of the image; timm's


def random_augment(config: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """RandAugment (Cubuk et al. 2020) as timm writes it: ``rand-m9-mstd0.5-inc1``.

    Args:
        config: in timm's notation.
        size: side of the image in pixels.
        mean: of each channel in [0, 1]; fills what a step leaves open.

    Raises:
        ValueError: timm does not know such a configuration.
    """
    if not config.startswith("rand"):
        raise ValueError("begin with rand, as in rand-m9-mstd0.5-inc1")
    fill = tuple(min(255, round(255 * value)) for value in mean)
    try:
        transform = rand_augment_transform(
            config,
            {
                "translate_const": int(size * _SHIFT),
                "img_mean": fill if len(fill) > 1 else fill[0],
                "interpolation": Image.Resampling.BICUBIC,
            },
        )
    except (AssertionError, KeyError, IndexError) as error:
        raise ValueError(f"timm cannot read it ({error!r})") from None
    for step in transform.ops:
        if step.name.startswith("Posterize"):
            step.aug_fn = partial(_posterize, step.aug_fn)
    apply: Callable[[Image.Image], Image.Image] = transform
    return apply


def _posterize(original: Callable[..., Image.Image], image: Image.Image, bits: int, **arguments: Any) -> Image.Image:
    """Keep at least one bit: timm draws zero bits too, which Pillow refuses since version 12."""
    return original(image, max(1, bits), **arguments)


def erase(image: Tensor, chance: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of a normalised (C, H, W) image: a rectangle becomes noise."""
    erased: Tensor = RandomErasing(chance, mode="pixel", device="cpu")(image)
    return erased


@dataclass(frozen=True)
class ImageMixer:
    """Mixes images of a batch with those of the reverse order: one share for all of them, as the published recipes do.

    Of an odd number the last one stays as it is. See :class:`data2vec.core.modality.Mixer`.
    """

    mix: MixConfig

    def __call__(
        self, inputs: Tensor, targets: Tensor, ids: Tensor, *, seed: int, update: int
    ) -> tuple[Tensor, Tensor]:
        even = len(inputs) // 2 * 2
        if not even:
            return inputs, targets
        mixed = inputs.clone()
        with preserved_generators():
            seed_generators(derive(seed, update, int(ids[0]), _MIX))
            # As if each image were a class of its own: the labels are then the shares of the images.
            mixed[:even], shares = self._mixup(even)(mixed[:even], torch.arange(even))
        return mixed, torch.cat([shares.to(targets.dtype) @ targets[:even], targets[even:]])

    def _mixup(self, samples: int) -> Mixup:
        mix = self.mix
        return Mixup(mix.mixup, mix.cutmix, None, mix.chance, mix.switch, label_smoothing=0.0, num_classes=samples)
