"""From images to tokens: patch embedding, fixed sine positions and BEiT's relative position bias, on timm's layers.

Shapes: B images, C channels, H x W pixels, h x w patches, T = h * w positions, D width, P prefix tokens (CLS).
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import gen_relative_position_index, resize_rel_pos_bias_table_simple
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn

from data2vec.core.model.attention import AttentionBias
from data2vec.core.model.encoder import Extractor, Tokens
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.model.resizing import Resizable

_CLS_ENTRIES = 3  # of the bias table: from CLS to a patch, from a patch to CLS, from CLS to itself


class PatchInit(StrEnum):
    """The start of the patch projection: see :func:`initialise_patches`."""

    TRUNCATED_NORMAL = "truncated_normal"
    XAVIER = "xavier"


def initialise_patches(projection: nn.Conv2d, init: PatchInit) -> None:
    """Fill the patch projection in place.

    ``truncated_normal``: standard deviation 0.02 and no bias, BEiT's rule for every layer (Bao et al. 2021).
    ``xavier``: Xavier-uniform with the kernel seen as one linear layer, MAE's rule (He et al. 2021), which data2vec
    2.0 follows; the bias is zero.
    """
    if init is PatchInit.XAVIER:
        nn.init.xavier_uniform_(projection.weight.flatten(1))  # a view: fills the kernel itself
    else:
        truncated_normal_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def sine_positions(shape: tuple[int, int], width: int) -> Tensor:
    """(h * w, D) fixed 2-D sine positions in MAE's order of channels, which data2vec 2.0 uses.

    The first half of the channels encodes the column, the second half the row; in each half sines stand before
    cosines, with wavelengths in geometric progression up to 10000 (He et al. 2021; Vaswani et al. 2017).
    timm has row and column the other way round.
    """
    row_first: Tensor = build_sincos2d_pos_embed(list(shape), width, interleave_sin_cos=True)
    return row_first.roll(width // 2, dims=1)


class SinePositions(nn.Module, Resizable):
    """Fixed 2-D sine positions for any grid, kept in a buffer for the grid of training.

    The buffer is part of the state. Positions that were loaded from a checkpoint are used as they are; on another
    grid they are computed anew if they are the sine positions, and resampled (bicubic) if they are not.
    """

    positions: Tensor

    def __init__(self, *, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"2-D sine positions need a width that is a multiple of 4, got {width}")
        self.width = width
        self.grid = grid
        self.register_buffer("positions", sine_positions(grid, width).unsqueeze(0))

    def forward(self, shape: tuple[int, ...]) -> Tensor:
        """(1, T, D) for the grid ``shape`` = (h, w)."""
        if tuple(shape) == self.grid:
            return self.positions
        return self._resampled(self.positions, self.grid, (shape[0], shape[1]))

    def resized(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """Positions (1, T, D) of another square grid for this one."""
        side = round(value.shape[1] ** 0.5) if value.ndim == 3 else 0
        if value.shape != (1, side * side, self.width) or not side:
            return None
        return self._resampled(value, (side, side), self.grid), _resampling((side, side), self.grid)

    def _resampled(self, positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        if torch.allclose(positions[0].float().cpu(), sine_positions(source, self.width), atol=1e-4):
            return sine_positions(target, self.width).unsqueeze(0).to(positions)
        resampled: Tensor = resample_abs_pos_embed(
            positions, new_size=list(target), old_size=list(source), num_prefix_tokens=0
        )
        return resampled


class PatchExtractor(Extractor):
    """Cuts an image into square patches, projects each to the model's width, and adds fixed positions if given."""

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        width: int,
        positions: SinePositions | None = None,
        init: PatchInit = PatchInit.TRUNCATED_NORMAL,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.channels = channels
        self.embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=channels, embed_dim=width, strict_img_size=False
        )
        self.positions = positions
        initialise_patches(self.embed.proj, init)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        """Tokens (B, T, D) on the grid (h, w) of images (B, C, H, W); images have no padding.

        Raises:
            ValueError: another number of channels, or sides that are no multiple of the patch size.
        """
        shape, _ = self.grid(inputs)
        x: Tensor = self.embed(inputs)
        if self.positions is None:
            return Tokens(x=x, shape=shape)
        positions = self.positions(shape)
        return Tokens(x=x + positions, shape=shape, positions=positions)

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, int], None]:
        """(h, w) of images (B, C, H, W); raises as ``forward``."""
        if inputs.ndim != 4 or inputs.shape[1] != self.channels:
            raise ValueError(f"images must be (B, {self.channels}, H, W), got {tuple(inputs.shape)}")
        height, width = inputs.shape[-2:]
        size = self.patch_size
        if height % size or width % size or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {size} x {size}: "
                f"resize or crop them so that both sides are multiples of {size}"
            )
        return (height // size, width // size), None


@lru_cache(maxsize=32)
def relative_position_index(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(1 + T, 1 + T) int64: which entry of BEiT's table biases attention from a position (row) to another (column).

    Position 0 is CLS. Entries are numbered by row distance, then column distance; the last three are CLS's.
    """
    index: Tensor = gen_relative_position_index(shape, class_token=True, device=device)
    return index


def resample_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """BEiT's table of the grid ``source`` for the grid ``target``: bicubic over distances, CLS's entries unchanged."""
    heads = table.shape[1]
    distances = table[:-_CLS_ENTRIES].T.reshape(heads, 2 * source[0] - 1, 2 * source[1] - 1)
    shape = (heads, 2 * target[0] - 1, 2 * target[1] - 1)
    resampled = resize_rel_pos_bias_table_simple(distances, target, shape)
    return torch.cat([resampled.flatten(1).T, table[-_CLS_ENTRIES:]])


class RelativePositionBias(AttentionBias, Resizable):
    """BEiT's learned bias for each relative position of two patches, shared by all blocks (Bao et al. 2021).

    ``table``: ((2h - 1)(2w - 1) + 3, heads), zero at first. On another grid than ``grid`` the table is resampled
    (bicubic), as for fine-tuning at another resolution.
    """

    index: Tensor

    def __init__(self, *, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(_entries(grid), heads))
        # Follows from the grid, so it is no part of the state.
        self.register_buffer("index", relative_position_index(grid, torch.device("cpu")).clone(), persistent=False)

    def forward(self, shape: tuple[int, ...], *, prefix: int) -> Tensor:
        """(1, heads, P + T, P + T) for the grid ``shape`` = (h, w) behind ``prefix`` = 0 or 1 CLS tokens."""
        if prefix not in (0, 1):
            raise ValueError(f"the relative position bias knows one CLS token or none, got {prefix} prefix tokens")
        height, width = shape
        table: Tensor = self.table
        index = self.index
        if (height, width) != self.grid:
            table = resample_table(self.table, self.grid, (height, width))
            index = relative_position_index((height, width), self.table.device)
        first = 1 - prefix
        return table[index[first:, first:]].permute(2, 0, 1).unsqueeze(0)

    def resized(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """The table of another square grid for this one."""
        distances = round(max(0, len(value) - _CLS_ENTRIES) ** 0.5) if value.ndim == 2 else 0
        if not distances % 2 or value.shape != (distances**2 + _CLS_ENTRIES, self.heads):
            return None
        side = (distances + 1) // 2
        return resample_table(value, (side, side), self.grid), _resampling((side, side), self.grid)


def _entries(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + _CLS_ENTRIES


def _resampling(source: tuple[int, int], target: tuple[int, int]) -> str:
    return f"positions of {source[0]} x {source[1]} resampled to {target[0]} x {target[1]}"
