"""The settings of images and the parts they describe.

Defaults are data2vec 1.0's for ImageNet (Baevski et al. 2022, arXiv 2202.03555, section 4.1, "paper 1"); "paper 2" is
data2vec 2.0 (arXiv 2212.07525).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from torch import nn

from data2vec.core.exhibit import Exhibit
from data2vec.core.modality import Decoder, Masker, Mixer, Modality
from data2vec.core.model.encoder import Frontend
from data2vec.core.model.transformer import build_blocks
from data2vec.core.settings.declare import INSIDE, NOT_NEGATIVE, PART, Rule, at_least, section, setting
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.finetuning import MixConfig
from data2vec.core.settings.pretraining import PredictorConfig
from data2vec.core.settings.rules import checked, predictor_problems
from data2vec.vision.augment import ImageMixer
from data2vec.vision.extractor import PatchExtractor, PatchInit, RelativePositionBias, SinePositions
from data2vec.vision.loader import EXTENSIONS, AugmentConfig, ImageDecoder
from data2vec.vision.masker import BlockMasker, InverseBlockMasker, block_hidden, inverse_block_hidden

_ABOVE_0 = Rule(lambda values: min(values, default=1) > 0, "must be above 0")


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
    """The part of an image that the student does not see, and its shapes.

    ``min_block`` to ``min_aspect`` belong to ``block``, ``adjust`` and ``block`` to ``inverse_block``: see
    :class:`data2vec.vision.masker.BlockMasker` and :class:`data2vec.vision.masker.InverseBlockMasker`.
    """

    kind: MaskKind = MaskKind.BLOCK
    ratio: float = setting(0.6, INSIDE)  # share of the patches that is hidden
    masks: int = setting(1, at_least(1))  # different masks of each image in one update
    min_block: int = setting(16, at_least(1))  # patches
    max_block: int | None = setting(None, at_least(1))  # null: whatever remains to hide
    min_aspect: float = setting(0.3, PART)  # height / width; the largest is its inverse
    adjust: float = setting(0.07, NOT_NEGATIVE)
    block: int = setting(3, at_least(1))  # patches along a side

    def build(self) -> Masker:
        """Build the masker."""
        if self.kind is MaskKind.INVERSE_BLOCK:
            return InverseBlockMasker(ratio=self.ratio, adjust=self.adjust, block=self.block, masks=self.masks)
        return BlockMasker(
            ratio=self.ratio, min_block=self.min_block, max_block=self.max_block, min_aspect=self.min_aspect,
            masks=self.masks,
        )  # fmt: skip

    def hidden(self, total: int) -> int:
        """Count the patches of ``total`` that each mask hides."""
        return (block_hidden if self.kind is MaskKind.BLOCK else inverse_block_hidden)(self.ratio, total)

    def problems(self, grid: tuple[int, int]) -> list[str]:
        """List what does not go together, or not with a grid of patches, one line each."""
        total = grid[0] * grid[1]
        # What the ratio alone asks for, before at least one patch is hidden and one shown.
        wanted = round(self.ratio * total)
        if self.kind is MaskKind.INVERSE_BLOCK:
            wanted = total - int((1 - self.ratio) * total + 1e-6)
        found = []
        if not 0 < wanted < total:
            found.append(
                f"vision.mask.ratio={self.ratio}: hides {'nothing' if wanted <= 0 else 'everything'} of {total} "
                f"patches; choose from {1.5 / total:.3f} to {1 - 1.5 / total:.3f}"
            )
        if self.kind is MaskKind.INVERSE_BLOCK and self.block > grid[0]:
            found.append(
                f"vision.mask.block={self.block}: larger than the grid of {grid[0]} x {grid[1]} patches; "
                f"choose 1 to {grid[0]}"
            )
        if self.kind is MaskKind.INVERSE_BLOCK:
            return found
        if self.max_block is not None and self.max_block < self.min_block:
            found.append(
                f"vision.mask.max_block={self.max_block}: below vision.mask.min_block={self.min_block}; "
                f"choose {self.min_block} or more"
            )
        hidden = self.hidden(total)
        if not found and self.min_block > hidden:
            found.append(
                f"vision.mask.min_block={self.min_block}: more than the {hidden} of {total} patches that "
                f"vision.mask.ratio={self.ratio} hides; choose 1 to {hidden}"
            )
        return found


@dataclass(frozen=True)
class Vision(Modality):
    """Images of ``image_size`` x ``image_size`` pixels, cut into square patches."""

    name: ClassVar[str] = "vision"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS

    image_size: int = setting(224, at_least(1), anew=True, inherited=True)
    patch_size: int = setting(16, at_least(1))
    channels: int = setting(3, Rule(lambda channels: channels in (1, 3), "choose 3 (RGB) or 1 (grey)"))
    positions: PositionKind = PositionKind.RELATIVE
    cls_token: bool = True
    # Transformer blocks of this modality alone, before the shared ones (paper 2: 2 in base).
    blocks: int = setting(0, NOT_NEGATIVE)
    input_norm: bool = False  # layer norm before the first block (2.0's post-norm Transformer)
    patch_init: PatchInit = PatchInit.TRUNCATED_NORMAL  # 2.0: xavier
    mask: MaskConfig = field(default_factory=MaskConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    augment: AugmentConfig = section(AugmentConfig, anew=True)
    # Share of the shorter side that evaluation looks at.
    evaluation_crop: float = setting(0.875, PART, anew=True, inherited=True)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet's channels in [0, 1]
    std: tuple[float, ...] = setting((0.229, 0.224, 0.225), _ABOVE_0)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def hidden(self) -> int:
        """Patches that each mask hides."""
        return self.mask.hidden(self.grid[0] * self.grid[1])

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
        image = ("image_size", "patch_size")
        return checked(
            self, "vision.", (image, self._image_problems),
            ((*image, "mask."), lambda: [] if self._image_problems() else self.mask.problems(self.grid)),
            ((), lambda: self._position_problems(transformer)),
            (("predictor.",), lambda: self._predictor_problems(transformer)),
            (("augment.",), self.augment.problems),
            (("channels", "mean", "std"), self._statistics_problems),
        )  # fmt: skip

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
        return self.mask.build()

    def build_mixer(self, mix: MixConfig) -> Mixer:
        return ImageMixer(mix)

    def build_decoder(self, *, train: bool) -> Decoder:
        return ImageDecoder(
            size=self.image_size,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            augment=self.augment if train else None,
            crop=self.evaluation_crop,
        )

    @property
    def exhibit(self) -> Exhibit:
        from data2vec.vision.exhibit import VisionExhibit  # drawing is not needed to train

        return VisionExhibit(self)

    def _image_problems(self) -> list[str]:
        size, patch = self.image_size, self.patch_size
        if size % patch:
            choices = " or ".join(str(choice) for choice in _multiples_near(size, patch))
            return [f"vision.image_size={size}: not a multiple of vision.patch_size={patch}; choose {choices}"]
        if size == patch:
            return [f"vision.image_size={size}: a single patch, so nothing can be hidden; choose {2 * patch} or more"]
        return []

    def _position_problems(self, transformer: TransformerConfig) -> list[str]:
        width = transformer.width
        if self.positions is not PositionKind.SINE or width % 4 == 0:
            return []
        choices = " or ".join(str(choice) for choice in _multiples_near(width, 4))
        return [f"transformer.width={width}: vision.positions=sine needs a multiple of 4; choose {choices}"]

    def _predictor_problems(self, transformer: TransformerConfig) -> list[str]:
        why = "images have two dimensions"
        return predictor_problems("vision", self.predictor, transformer.width, dimensions=2, why=why)

    def _statistics_problems(self) -> list[str]:
        count = self.channels
        return [
            f"vision.{key}={list(values)}: {len(values)} values for vision.channels={count}; give one each"
            for key, values in (("mean", self.mean), ("std", self.std))
            if len(values) != count
        ]


def _multiples_near(value: int, divisor: int) -> list[int]:
    """The multiples of ``divisor`` around ``value``, the nearer one first."""
    lower = value // divisor * divisor
    pair = sorted([lower, lower + divisor], key=lambda choice: abs(choice - value))
    return [choice for choice in pair if choice > 0]
