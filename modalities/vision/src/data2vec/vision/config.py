"""The settings of images and the parts they describe.

Defaults are data2vec 1.0's for ImageNet (Baevski et al. 2022, arXiv 2202.03555, section 4.1, "paper 1"); "paper 2" is
data2vec 2.0 (arXiv 2212.07525).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.modality import Decoder, Illustrations, Masker, Modality, Panel
from data2vec.core.model.encoder import Frontend
from data2vec.core.model.transformer import build_blocks
from data2vec.core.settings.fields import PredictorConfig, PredictorKind, TransformerConfig
from data2vec.vision.extractor import PatchExtractor, PatchInit, RelativePositionBias, SinePositions
from data2vec.vision.loader import EXTENSIONS, AugmentConfig, ImageDecoder
from data2vec.vision.masker import BlockMasker, InverseBlockMasker, block_hidden, inverse_block_hidden
from data2vec.vision.samples import write_mnist_shards

_RAW_SIZE = 32  # pixels along a side of the images that the raw-pixel row of an evaluation sees


class PositionKind(StrEnum):
    """``relative``: BEiT's learned attention bias (1.0). ``sine``: fixed 2-D sine positions (2.0). ``none``."""

    RELATIVE = "relative"
    SINE = "sine"
    NONE = "none"


class MaskKind(StrEnum):
    """``block``: blocks are hidden (BEiT, 1.0). ``inverse_block``: square blocks are kept (2.0)."""

    BLOCK = "block"
    INVERSE_BLOCK = "inverse_block"


@dataclass(frozen=True)
class MaskConfig:
    """How much of an image the student does not see, and in which shapes.

    ``min_block`` to ``min_aspect`` belong to ``block``, ``adjust`` and ``block`` to ``inverse_block``: see
    :class:`data2vec.vision.masker.BlockMasker` and :class:`data2vec.vision.masker.InverseBlockMasker`.
    """

    kind: MaskKind = MaskKind.BLOCK
    ratio: float = 0.6  # share of the patches that is hidden
    masks: int = 1  # different masks of each image in one update
    min_block: int = 16  # patches
    max_block: int | None = None  # null: whatever remains to hide
    min_aspect: float = 0.3  # height / width; the largest is its inverse
    adjust: float = 0.07
    block: int = 3  # patches along a side


@dataclass(frozen=True)
class Vision(Modality):
    """Images of ``image_size`` x ``image_size`` pixels, cut into square patches."""

    name: ClassVar[str] = "vision"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    raw_name: ClassVar[str] = "raw pixels"

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3  # 3: RGB; 1: grey
    positions: PositionKind = PositionKind.RELATIVE
    cls_token: bool = True
    blocks: int = 0  # Transformer blocks of this modality alone, before the shared ones (paper 2: 2 in base)
    input_norm: bool = False  # layer norm before the first block (2.0's post-norm Transformer)
    patch_init: PatchInit = PatchInit.TRUNCATED_NORMAL  # 2.0: xavier
    mask: MaskConfig = field(default_factory=MaskConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluation_crop: float = 0.875  # share of the shorter side that evaluation looks at
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet's channels in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def hidden(self) -> int:
        """Patches that each mask hides."""
        count = block_hidden if self.mask.kind is MaskKind.BLOCK else inverse_block_hidden
        return count(self.mask.ratio, self.grid[0] * self.grid[1])

    @property
    def predictor_config(self) -> PredictorConfig:
        return self.predictor

    @property
    def uses_mask_token(self) -> bool:
        return True

    @property
    def has_cls_token(self) -> bool:
        return self.cls_token

    def problems(self, transformer: TransformerConfig) -> list[str]:
        found = self._image_problems()
        if not found:  # the rest needs a grid
            found += self._mask_problems()
        found += self._position_problems(transformer)
        found += self._predictor_problems(transformer)
        return found + self._augment_problems()

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        width = transformer.width
        sine = SinePositions(width=width, grid=self.grid) if self.positions is PositionKind.SINE else None
        relative = (
            RelativePositionBias(heads=transformer.heads, grid=self.grid)
            if self.positions is PositionKind.RELATIVE
            else None
        )
        extractor = PatchExtractor(
            patch_size=self.patch_size, channels=self.channels, width=width, positions=sine, init=self.patch_init
        )
        return Frontend(
            extractor,
            width=width,
            bias=relative,
            prefix_tokens=int(self.cls_token),
            input_norm=nn.LayerNorm(width, eps=transformer.norm_eps) if self.input_norm else None,
            blocks=build_blocks(transformer, self.blocks),
        )

    def build_masker(self) -> Masker:
        mask = self.mask
        if mask.kind is MaskKind.INVERSE_BLOCK:
            return InverseBlockMasker(ratio=mask.ratio, adjust=mask.adjust, block=mask.block, masks=mask.masks)
        return BlockMasker(
            ratio=mask.ratio,
            min_block=mask.min_block,
            max_block=mask.max_block,
            min_aspect=mask.min_aspect,
            masks=mask.masks,
        )

    def build_decoder(self, *, train: bool) -> Decoder:
        return ImageDecoder(
            size=self.image_size,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            augment=self.augment if train else None,
            crop=self.evaluation_crop,
        )

    def write_sample_shards(self, folder: Path) -> None:
        write_mnist_shards(folder)

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) pixels, larger images averaged down to 32 x 32: probes of whole photos would not fit in memory."""
        images = batch.inputs.float()
        if images.shape[-1] > _RAW_SIZE:
            images = torch.nn.functional.adaptive_avg_pool2d(images, _RAW_SIZE)
        return images.flatten(1)

    def panels(self, drawn: Illustrations) -> list[Panel]:
        from data2vec.vision.panels import panels  # drawing is not needed to train

        return panels(drawn, mean=self.mean, std=self.std, patch=self.patch_size)

    def _image_problems(self) -> list[str]:
        found = _below(self, "", ("image_size", 1), ("patch_size", 1))
        size, patch = self.image_size, self.patch_size
        if not found and size % patch:
            choices = " or ".join(str(choice) for choice in _multiples_near(size, patch))
            found.append(f"vision.image_size={size}: not a multiple of vision.patch_size={patch}; choose {choices}")
        elif not found and size == patch:
            found.append(
                f"vision.image_size={size}: a single patch, so nothing can be hidden; choose {2 * patch} or more"
            )
        return found

    def _mask_problems(self) -> list[str]:
        mask, total = self.mask, self.grid[0] * self.grid[1]
        found = _below(mask, "mask.", ("masks", 1), ("min_block", 1), ("max_block", 1), ("block", 1), ("adjust", 0))
        if not 0 < mask.ratio < 1:
            found.append(f"vision.mask.ratio={mask.ratio}: must be above 0 and below 1")
        elif not 0 < self._wanted_hidden() < total:
            what = "nothing" if self._wanted_hidden() <= 0 else "everything"
            found.append(
                f"vision.mask.ratio={mask.ratio}: hides {what} of {total} patches; "
                f"choose from {1.5 / total:.3f} to {1 - 1.5 / total:.3f}"
            )
        if not 0 < mask.min_aspect <= 1:
            found.append(f"vision.mask.min_aspect={mask.min_aspect}: must be above 0 and at most 1")
        if mask.kind is MaskKind.BLOCK:
            if mask.max_block is not None and mask.max_block < mask.min_block:
                found.append(
                    f"vision.mask.max_block={mask.max_block}: below vision.mask.min_block={mask.min_block}; "
                    f"choose {mask.min_block} or more"
                )
            if not found and mask.min_block > self.hidden:
                found.append(
                    f"vision.mask.min_block={mask.min_block}: more than the {self.hidden} of {total} patches that "
                    f"vision.mask.ratio={mask.ratio} hides; choose 1 to {self.hidden}"
                )
        elif mask.block > self.grid[0]:
            found.append(
                f"vision.mask.block={mask.block}: larger than the grid of {self.grid[0]} x {self.grid[1]} patches; "
                f"choose 1 to {self.grid[0]}"
            )
        return found

    def _wanted_hidden(self) -> int:
        """What the ratio alone asks for, before at least one patch is hidden and one shown."""
        total = self.grid[0] * self.grid[1]
        if self.mask.kind is MaskKind.BLOCK:
            return round(self.mask.ratio * total)
        return total - int((1 - self.mask.ratio) * total + 1e-6)

    def _position_problems(self, transformer: TransformerConfig) -> list[str]:
        found = _below(self, "", ("blocks", 0))
        if self.positions is PositionKind.SINE and transformer.width % 4:
            width = transformer.width
            choices = " or ".join(str(choice) for choice in _multiples_near(width, 4))
            found.append(f"transformer.width={width}: vision.positions=sine needs a multiple of 4; choose {choices}")
        return found

    def _predictor_problems(self, transformer: TransformerConfig) -> list[str]:
        predictor = self.predictor
        found = _below(
            predictor,
            "predictor.",
            ("layers", 1),
            ("width", 1),
            ("kernel", 1),
            ("groups", 1),
            ("projection_layers", 1),
            ("mask_noise", 0),
        )
        if predictor.kind is PredictorKind.CONV1D:
            found.append("vision.predictor.kind=conv1d: images have two dimensions; choose conv2d, linear or mlp")
        if predictor.projection_ratio <= 0:
            found.append(f"vision.predictor.projection_ratio={predictor.projection_ratio}: must be above 0")
        if not 0 <= predictor.input_dropout < 1:
            found.append(f"vision.predictor.input_dropout={predictor.input_dropout}: must be from 0 to below 1")
        if predictor.kind is PredictorKind.CONV2D and predictor.groups >= 1:
            widths = {"transformer.width": transformer.width}
            if predictor.width is not None:
                widths["vision.predictor.width"] = predictor.width
            found += [
                f"vision.predictor.groups={predictor.groups}: does not divide {name}={width}; choose a common divisor"
                for name, width in widths.items()
                if width % predictor.groups
            ]
        return found

    def _augment_problems(self) -> list[str]:
        augment = self.augment
        found = _below(augment, "augment.", ("translate", 0), ("colour_jitter", 0))
        scale = augment.crop_scale
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            shown = f"[{scale[0]}, {scale[1]}]"
            found.append(f"vision.augment.crop_scale={shown}: must rise and lie above 0 and at most 1")
        if not 0 <= augment.flip <= 1:
            found.append(f"vision.augment.flip={augment.flip}: must be from 0 to 1")
        if not 0 < self.evaluation_crop <= 1:
            found.append(f"vision.evaluation_crop={self.evaluation_crop}: must be above 0 and at most 1")
        if self.channels not in (1, 3):
            return [*found, f"vision.channels={self.channels}: choose 3 (RGB) or 1 (grey)"]
        found += self._statistics_problems("mean", self.mean)
        found += self._statistics_problems("std", self.std)
        if any(value <= 0 for value in self.std):
            found.append(f"vision.std={list(self.std)}: must be above 0")
        return found

    def _statistics_problems(self, key: str, values: Sequence[float]) -> list[str]:
        if len(values) == self.channels:
            return []
        return [f"vision.{key}={list(values)}: {len(values)} values for vision.channels={self.channels}; give one each"]


def _below(section: object, prefix: str, *least: tuple[str, int]) -> list[str]:
    """A line for each setting that is smaller than it may be; null is no problem."""
    found = []
    for key, low in least:
        value = getattr(section, key)
        if value is not None and value < low:
            found.append(f"vision.{prefix}{key}={value}: must be {low} or more")
    return found


def _multiples_near(value: int, divisor: int) -> list[int]:
    """The multiples of ``divisor`` around ``value``, the nearer one first."""
    lower = value // divisor * divisor
    pair = sorted([lower, lower + divisor], key=lambda choice: abs(choice - value))
    return [choice for choice in pair if choice > 0]
