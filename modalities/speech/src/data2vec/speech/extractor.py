"""From waveforms to frames: strided convolutions and position convolutions, in wav2vec 2.0's shape.

Shapes: B clips, N rows (clips times masks), L waveform samples at 16 kHz, T frames, C channels of the convolutions,
D width.

Nothing that lies behind a clip's end reaches one of its frames. The strided convolutions have no padding of their own,
so that a frame sees only waveform samples from its own start on, and :meth:`Geometry.frames` counts exactly those
frames that end within the clip. Position convolutions look both ways, so padded frames are set to zero before each of
them; the released code does so before the first alone, and its second one reads what the first wrote into the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.model.encoder import Extractor, Positions, Tokens
from data2vec.speech.audio import RATE
from data2vec.speech.features import hertz_to_mel

Length = TypeVar("Length", int, Tensor)


@dataclass(frozen=True)
class Geometry:
    """The waveform samples that a stack of convolutions without padding sees."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def hop(self) -> int:
        """Waveform samples from one frame to the next (320, 20 ms, in every published model)."""
        return math.prod(self.strides)

    @property
    def receptive_field(self) -> int:
        """Waveform samples that one frame sees (400, 25 ms): the shortest clip that has a frame."""
        field, step = 1, 1
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            field += (kernel - 1) * step
            step *= stride
        return field

    def frames(self, length: Length) -> Length:
        """Frames of a clip of ``length`` samples, a number or a tensor of them, in integers: layer by layer a length
        of n becomes ``(n - kernel) // stride + 1``, and these floors compose to one.
        """
        count = (length - self.receptive_field) // self.hop + 1
        return count.clamp(min=0) if isinstance(count, Tensor) else max(count, 0)


def position_kernel(width: int, depth: int) -> int:
    """The kernel of each of ``depth`` position convolutions that together have ``width`` (95 and 5: 19)."""
    return max(3, width // depth)


MEL_PHASES = 4  # of each band of :func:`mel_filters`; the number of filters is a multiple of it
_MEL_RANGE = (60.0, 7_600.0)  # Hz, centres of the lowest and the highest band


def mel_filters(count: int, kernel: int) -> Tensor:
    """(count, 1, kernel) filters of unit norm: ``count // 4`` bands, equally far apart on the mel scale, each a cosine
    under a Hann window in four phases, a quarter of a period apart.

    After the GELU a band's four phases add up to about its amplitude, wherever in its period a frame begins.
    """
    bands = count // MEL_PHASES
    lowest, highest = hertz_to_mel(torch.tensor(_MEL_RANGE, dtype=torch.float64)).tolist()
    centres = 700.0 * (10.0 ** (torch.linspace(lowest, highest, bands, dtype=torch.float64) / 2595.0) - 1.0)
    time = (torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2) / RATE
    phases = torch.arange(MEL_PHASES, dtype=torch.float64) * (2 * math.pi / MEL_PHASES)
    waves = torch.cos(2 * math.pi * centres[:, None, None] * time + phases[:, None])  # (bands, phases, kernel)
    filters: Tensor = (waves * torch.hann_window(kernel, periodic=False, dtype=torch.float64)).flatten(0, 1)
    filters = filters / filters.norm(dim=1, keepdim=True)
    return filters.unsqueeze(1).float()


class PositionConvolutions(Positions):
    """Positions from the neighbourhood of each frame: ``depth`` times grouped convolution, layer norm, GELU.

    The layer norm, over channels, has no parameters. fairseq2's stack of the same layers is not used: it zeroes padded
    frames before the first convolution only, and puts the odd frame of an even kernel on the other side.
    """

    def __init__(self, width: int, *, kernel: int, depth: int, groups: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )
        self.even = kernel % 2 == 0

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(N, T, D) to be added to ``x`` (N, T, D); ``padding``: (N, T) bool, true on padding."""
        for convolution in self.convolutions:
            if padding is not None:
                x = x.masked_fill(padding.unsqueeze(-1), 0.0)
            x = convolution(x.transpose(1, 2)).transpose(1, 2)
            if self.even:  # padded by one frame too many at the end
                x = x[:, :-1]
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return x


class SpeechExtractor(Extractor):
    """Waveforms to frames (paper 1, section 4.2): strided convolutions, layer norm, linear projection.

    The convolutions are fairseq2's, each followed by a layer norm over channels and GELU (its layer-norm mode), which
    makes a frame independent of every other; the group norm of other wav2vec 2.0 models averages over time, padding
    included.

    Args:
        channels, kernels, strides: of each convolution.
        width: D.
        mel: the first convolution starts from :func:`mel_filters` instead of random numbers; it is trained all the
            same.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        *,
        width: int,
        mel: bool = False,
    ) -> None:
        # Importing it takes seconds, which only a model is worth.
        from fairseq2.models.wav2vec2.feature_extractor import Wav2Vec2FeatureExtractor

        super().__init__()
        self.geometry = Geometry(tuple(kernels), tuple(strides))
        layers = list(zip(channels, kernels, strides, strict=True))
        self.convolutions: nn.Sequential = Wav2Vec2FeatureExtractor(layers, bias=False, layer_norm=True).layers
        self.norm = nn.LayerNorm(channels[-1])
        self.projection = nn.Linear(channels[-1], width)
        if mel:
            first = next(module for module in self.convolutions.modules() if isinstance(module, nn.Conv1d))
            with torch.no_grad():
                first.weight.copy_(mel_filters(channels[0], kernels[0]))

    @property
    def receptive_field(self) -> int:
        return self.geometry.receptive_field

    @property
    def hop(self) -> int:
        return self.geometry.hop

    @property
    def features(self) -> nn.Module:
        """The convolutions; the projection onto the Transformer's width goes on learning, as in wav2vec 2.0."""
        return self.convolutions

    def frames(self, length: Length) -> Length:
        """See :meth:`Geometry.frames`."""
        return self.geometry.frames(length)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        """Tokens (B, T, D) of waveforms (B, L), zero on padding.

        Args:
            inputs: at 16 kHz; what lies behind a clip's end does not matter, whatever it is.
            lengths: (B,) samples of each clip, None where all have L.

        Raises:
            ValueError: another shape, or a clip without a frame.
        """
        _, counts = self.grid(inputs, lengths)
        if lengths is not None:  # NaN in the padding would reach no frame, but the gradients of the weights
            behind = torch.arange(inputs.shape[1], device=inputs.device) >= lengths.to(inputs.device).unsqueeze(1)
            inputs = inputs.masked_fill(behind, 0.0)
        x: Tensor = self.convolutions(inputs.unsqueeze(1)).transpose(1, 2)
        x = self.projection(self.norm(x))
        shape = (x.shape[1],)  # as the grid says, in a form that a traced model can prove
        if counts is None:
            return Tokens(x=x, shape=shape)
        padding = torch.arange(shape[0], device=x.device) >= counts.to(x.device).unsqueeze(1)
        return Tokens(x=x.masked_fill(padding.unsqueeze(-1), 0.0), shape=shape, padding=padding)

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        """(T,) and the (B,) frames of each clip of waveforms (B, L); None for these without ``lengths``.

        Raises:
            ValueError: as ``forward``; lengths that are not on the CPU are not looked at, which would wait for a GPU,
                nor those of a model that is traced.
        """
        if inputs.ndim != 2:
            raise ValueError(f"waveforms must be (B, L), got {tuple(inputs.shape)}")
        shortest = inputs.shape[1]
        if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            shortest = min(shortest, int(lengths.min()))
        if shortest < self.receptive_field:
            raise ValueError(f"a clip of {shortest} samples has no frame; {self.receptive_field} make the first one")
        return (self.frames(inputs.shape[1]),), None if lengths is None else self.frames(lengths)
