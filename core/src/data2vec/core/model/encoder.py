"""From a modality's input to contextual representations: what the teacher averages.

Shapes: B samples, N rows (samples times masks), T positions of the grid, V of them present, P prefix tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data2vec.core.config import LayerOutput
from data2vec.core.model.attention import AttentionBias, attention_mask, present_padding
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.model.mask import gather_positions
from data2vec.core.model.transformer import Transformer


@dataclass(frozen=True)
class Tokens:
    """What an extractor returns: features of the whole, unmasked input.

    ``x``: (B, T, D). ``shape``: the grid of positions, (T,) or (height, width). ``padding``: (B, T) bool, true on
    padding, or None where there is none. ``positions``: (1 or B, T, D), the part of ``x`` that depends on the position
    alone, which a mask token keeps; None where ``x`` has no such part.
    """

    x: Tensor
    shape: tuple[int, ...]
    padding: Tensor | None = None
    positions: Tensor | None = None


class Extractor(nn.Module, ABC):
    """Turns raw input into one vector for each position, with positions that do not depend on the content."""

    @abstractmethod
    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens: ...

    @abstractmethod
    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        """The grid of positions that ``forward`` would return, and the (B,) valid positions where samples differ."""


class Positions(nn.Module, ABC):
    """Positions computed from the (masked) features, such as speech's position convolutions; they are added."""

    @abstractmethod
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(N, T, D) from (N, T, D); padded positions must not reach valid ones."""


class Frontend(nn.Module):
    """All of a modality that comes before the shared Transformer.

    Args:
        extractor: raw input to features.
        width: D.
        positions: positions that depend on the features, or None.
        bias: attention bias, or None. The teacher always averages it: it belongs to the attention layers.
        prefix_tokens: learned tokens before the first position (a CLS token: 1); the last one is the CLS token.
        input_norm: normalisation after positions and prefix, or None.
        dropout: rate after ``input_norm``.
        blocks: this modality's own Transformer blocks (2.0), or None.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        width: int,
        positions: Positions | None = None,
        bias: AttentionBias | None = None,
        prefix_tokens: int = 0,
        input_norm: nn.Module | None = None,
        dropout: float = 0.0,
        blocks: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.positions = positions
        self.bias = bias
        self.prefix = nn.Parameter(torch.empty(1, prefix_tokens, width)) if prefix_tokens else None
        if self.prefix is not None:
            truncated_normal_(self.prefix)
        self.input_norm = input_norm if input_norm is not None else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks if blocks is not None else nn.ModuleList()

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[1]

    def forward(self, x: Tensor, padding: Tensor | None, visible: Tensor | None) -> Tensor:
        """(N, P + V, D): positions added, visible ones taken, prefix tokens in front, normalised.

        ``x`` is (B, T, D) or (N, T, D) with masks already applied, ``visible`` (N, V) or None for all.
        """
        if self.positions is not None:
            x = x + self.positions(x, padding)
        if visible is not None:
            x = gather_positions(x, visible)
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        out: Tensor = self.dropout(self.input_norm(x))
        return out


@dataclass(frozen=True)
class Encoded:
    """``x``: (N, P + V, D). ``layers``: collected outputs of the shared blocks, (N, P + V, D) each."""

    x: Tensor
    layers: list[Tensor]
    prefix: int

    @property
    def positions(self) -> Tensor:
        """(N, V, D), without the prefix tokens."""
        return self.x[:, self.prefix :]


class Encoder(nn.Module):
    """One frontend for each modality and the Transformer they share. The student is one, the teacher another."""

    def __init__(self, frontends: Mapping[str, Frontend], transformer: Transformer) -> None:
        super().__init__()
        self.frontends = nn.ModuleDict(dict(frontends))
        self.transformer = transformer

    def frontend(self, modality: str) -> Frontend:
        frontend = self.frontends[modality]
        assert isinstance(frontend, Frontend)
        return frontend

    def forward(
        self,
        modality: str,
        x: Tensor,
        shape: tuple[int, ...],
        *,
        padding: Tensor | None = None,
        visible: Tensor | None = None,
        filler: Tensor | None = None,
        collect: LayerOutput | None = None,
        top_k: int | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> Encoded:
        """Encode extracted features.

        Args:
            modality: which frontend.
            x: (B, T, D) features, or (N, T, D) with masks applied.
            shape: the grid of the T positions.
            padding: (B or N, T) bool or None.
            visible: (N, V) positions the encoder sees, None for all.
            filler: (N, V) bool, where ``visible`` only fills up a row; None where nowhere. Nothing attends to these.
            collect: as in :class:`Transformer`; so are ``top_k`` and ``dropped``.
        """
        frontend = self.frontend(modality)
        prefix = frontend.prefix_tokens
        embedded = frontend(x, padding, visible)
        bias = None if frontend.bias is None else frontend.bias(shape, prefix=prefix)
        present = present_padding(padding, visible, prefix, filler)
        mask = attention_mask(bias, present, visible, prefix=prefix, dtype=embedded.dtype)
        for block in frontend.blocks:
            embedded, _ = block(embedded, mask)
        out, layers = self.transformer(embedded, mask, collect=collect, top_k=top_k, dropped=dropped)
        return Encoded(out, layers, prefix)
