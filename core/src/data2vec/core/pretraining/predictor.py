"""Heads that turn what the student encoded into predictions of the target at hidden positions.

Shapes: N rows (samples times masks), T positions, V visible ones, H hidden ones over all rows, D width, C decoder
channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.model.initialisation import initialise
from data2vec.core.model.mask import Mask, scatter_positions
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind


class Predictor(nn.Module, ABC):
    """Base of the heads."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Mask, shape: tuple[int, ...], padding: Tensor | None = None) -> Tensor:
        """(H, D) predictions, in the order of ``mask.positions``.

        Args:
            x: (N, V, D) encoded positions, V = T when the student sees all.
            mask: what is hidden.
            shape: the grid of the T positions.
            padding: (N, T) bool, true on padding.
        """


def _multilayer(width_in: int, hidden: int, width_out: int, layers: int) -> nn.Sequential:
    """``layers`` linear layers with GELU between them."""
    sizes = [width_in, *[hidden] * (layers - 1), width_out]
    modules: list[nn.Module] = []
    for index, (size_in, size_out) in enumerate(pairwise(sizes)):
        if index:
            modules.append(nn.GELU())
        modules.append(nn.Linear(size_in, size_out))
    return nn.Sequential(*modules).apply(initialise)


class PositionwisePredictor(Predictor):
    """Linear layers with GELU between them (none: the identity), applied at the hidden positions alone (1.0)."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = _multilayer(width, hidden, width, layers) if layers else nn.Sequential()

    def forward(self, x: Tensor, mask: Mask, shape: tuple[int, ...], padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x.flatten(0, 1).index_select(0, mask.positions))
        return out


class ConvolutionalPredictor(Predictor):
    """The decoder of data2vec 2.0 (paper 2, section 3.2): noise at hidden positions, then grouped convolutions.

    Each layer: convolution over the grid, layer norm over channels without affine parameters, GELU, and a residual
    where the widths agree.
    """

    def __init__(self, width: int, config: PredictorConfig) -> None:
        super().__init__()
        self.two_dimensional = config.kind is PredictorKind.CONV2D
        channels = config.width or width
        convolution = nn.Conv2d if self.two_dimensional else nn.Conv1d
        self.convolutions = nn.ModuleList(
            convolution(
                width if index == 0 else channels,
                channels,
                config.kernel,
                padding=config.kernel // 2,
                groups=config.groups,
            )
            for index in range(config.layers)
        )
        hidden = int(channels * config.projection_ratio)
        self.projection = _multilayer(channels, hidden, width, config.projection_layers)
        self.residual = config.residual
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.noise = config.mask_noise
        self.even = config.kernel % 2 == 0

    def forward(self, x: Tensor, mask: Mask, shape: tuple[int, ...], padding: Tensor | None = None) -> Tensor:
        decoded = self.decode(self.place(x, mask), shape, padding)
        out: Tensor = self.projection(decoded.flatten(0, 1).index_select(0, mask.positions))
        return out

    def place(self, x: Tensor, mask: Mask) -> Tensor:
        """(N, T, D): encoded positions back in their place, noise where the student saw nothing."""
        x = self.input_dropout(x)
        if mask.visible is None:
            return x
        filling = x.new_zeros(x.shape[0], mask.hidden.shape[-1], x.shape[-1])
        if self.noise:
            filling.normal_(0.0, self.noise)
        return scatter_positions(x, mask.visible, filling, mask.filler)

    def decode(self, x: Tensor, shape: tuple[int, ...], padding: Tensor | None = None) -> Tensor:
        """(N, T, C) from (N, T, D): all convolutions, before the projection; padding counts as zeros."""
        rows, length, _ = x.shape
        for convolution in self.convolutions:
            if padding is not None:
                x = x.masked_fill(padding.unsqueeze(-1), 0.0)
            # A transposed view of (N, H, W, C) is channels-last to torch: no copy on the way in or out.
            grid = x.view(rows, *shape, -1).movedim(-1, 1) if self.two_dimensional else x.transpose(1, 2)
            grid = convolution(grid)
            if self.even:  # an even kernel pads one position too many on the far side
                grid = grid[..., :-1, :-1] if self.two_dimensional else grid[..., :-1]
            out = grid.movedim(1, -1).reshape(rows, length, -1)
            out = F.gelu(F.layer_norm(out, out.shape[-1:]))
            x = x + out if self.residual and out.shape == x.shape else out
        return x


def build_predictor(width: int, config: PredictorConfig) -> Predictor:
    """The head that ``config`` describes, for a Transformer of this width."""
    match config.kind:
        case PredictorKind.IDENTITY:
            return PositionwisePredictor(width, width, 0)
        case PredictorKind.LINEAR:
            return PositionwisePredictor(width, width, 1)
        case PredictorKind.MLP:
            return PositionwisePredictor(width, config.width or 2 * width, config.layers)
        case PredictorKind.CONV1D | PredictorKind.CONV2D:
            return ConvolutionalPredictor(width, config)
