"""From a modality's input to contextual representations: what the teacher averages.

Shapes: B samples, N rows (samples times masks), T positions of the grid, V of them present, P prefix tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.model.attention import AttentionBias, attention_mask, present_padding
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.model.mask import gather_positions
from data2vec.core.model.transformer import Transformer
from data2vec.core.settings.fields import LayerOutput


@dataclass(frozen=True)
class Tokens:
    """Features of the whole, unmasked input, as an extractor returns them.

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

    @property
    def features(self) -> nn.Module:
        """The part that sees the raw input, which fine-tuning may leave as it is."""
        return self

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
        self.prefix_tokens = prefix_tokens  # beside the parameter, whose shape is gone where it is sharded
        self.prefix = nn.Parameter(torch.empty(1, prefix_tokens, width)) if prefix_tokens else None
        if self.prefix is not None:
            truncated_normal_(self.prefix)
        self.input_norm = input_norm if input_norm is not None else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks if blocks is not None else nn.ModuleList()

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
class View:
    """The part of a sample that a row shows to the blocks.

    ``visible``: (N, V) positions in order. ``filler``: (N, V) bool, where ``visible`` only fills up a row; None where
    nowhere. Nothing attends to these.
    """

    visible: Tensor
    filler: Tensor | None = None


@dataclass(frozen=True)
class Collect:
    """The output that is kept of the last ``top_k`` shared blocks (None: of all)."""

    output: LayerOutput
    top_k: int | None = None


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

    @property
    def layer_positions(self) -> list[Tensor]:
        """(N, V, D) of each collected layer, without the prefix tokens."""
        return [layer[:, self.prefix :] for layer in self.layers]


@dataclass(frozen=True)
class Features:
    """``x``: (B, T, D) without prefix tokens. ``shape``: their grid. ``padding``: (B, T) bool or None."""

    x: Tensor
    shape: tuple[int, ...]
    padding: Tensor | None

    def mean(self) -> Tensor:
        """(B, D), the mean over valid positions."""
        return mean_over_valid(self.x, self.padding)


def mean_over_valid(x: Tensor, padding: Tensor | None) -> Tensor:
    """(B, D), the mean of (B, T, D) over the positions that are not padding."""
    if padding is None:
        return x.mean(1)
    valid = (~padding).unsqueeze(-1).to(x.dtype)
    return (x * valid).sum(1) / valid.sum(1)


class Encoder(nn.Module):
    """From the inputs of one or several modalities to representations: what is learnt.

    Args:
        frontends: one for each modality.
        transformer: the Transformer they share.
        average: the layers whose mean ``features("top_k")`` are.
    """

    def __init__(
        self,
        frontends: Mapping[str, Frontend],
        transformer: Transformer,
        average: Collect = Collect(LayerOutput.FEED_FORWARD),
    ) -> None:
        super().__init__()
        self.frontends = nn.ModuleDict(dict(frontends))
        self.transformer = transformer
        self.average = average

    def frontend(self, modality: str) -> Frontend:
        """The part that belongs to a modality alone."""
        frontend = self.frontends[modality]
        assert isinstance(frontend, Frontend)
        return frontend

    def extract(self, modality: str, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        """The first half: one vector for each position of (B, ...) inputs, before any of them sees another.

        Several views of a sample share one extraction.
        """
        tokens: Tokens = self.frontend(modality).extractor(inputs, lengths)
        return tokens

    def encode(
        self,
        modality: str,
        tokens: Tokens,
        view: View | None = None,
        *,
        collect: Collect | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> Encoded:
        """The second half: contextual representations.

        Args:
            modality: which frontend.
            tokens: of B samples, or of N rows where masks have been applied.
            view: what the blocks see; None for every position.
            collect: which layer outputs to return; None for none.
            dropped: for each shared block whether layer drop skips it; None for none.
        """
        frontend = self.frontend(modality)
        prefix = frontend.prefix_tokens
        visible, filler = (None, None) if view is None else (view.visible, view.filler)
        embedded = frontend(tokens.x, tokens.padding, visible)
        bias = None if frontend.bias is None else frontend.bias(tokens.shape, prefix=prefix)
        present = present_padding(tokens.padding, visible, prefix, filler)
        mask = attention_mask(bias, present, visible, prefix=prefix, dtype=embedded.dtype)
        for block in frontend.blocks:
            embedded, _ = block(embedded, mask)
        output, top_k = (None, None) if collect is None else (collect.output, collect.top_k)
        out, layers = self.transformer(embedded, mask, collect=output, top_k=top_k, dropped=dropped)
        return Encoded(out, layers, prefix)

    def forward(
        self,
        modality: str,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        collect: Collect | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> tuple[Encoded, Tokens]:
        """Both halves, of whole inputs (B, ...) of which the first ``lengths`` (B,) are valid."""
        tokens = self.extract(modality, inputs, lengths)
        return self.encode(modality, tokens, collect=collect, dropped=dropped), tokens

    def single(self, modality: str) -> Backbone:
        """The encoder of one modality as a plain module, which shares its parameters."""
        return Backbone(Encoder({modality: self.frontend(modality)}, self.transformer, self.average), modality)

    @torch.no_grad()
    def features(
        self, modality: str, inputs: Tensor, lengths: Tensor | None = None, *, layers: str | int = "top_k"
    ) -> Features:
        """Representations of whole inputs, in evaluation mode.

        Args:
            modality: of the inputs.
            inputs: (B, ...) as the extractor reads them.
            lengths: (B,) valid lengths where inputs are padded.
            layers: ``top_k`` (mean of the layer-normalised outputs of the last K blocks, as the method averages
                them), ``all`` (the same over every block), ``last`` (the Transformer's output), ``extractor`` (what
                comes before any block), or the number of one block from 1, whose output is returned as it is.

        Raises:
            ValueError: no such layer.
        """
        depth = self.transformer.config.depth
        if isinstance(layers, str) and layers.isdecimal():
            layers = int(layers)
        if layers not in ("top_k", "all", "last", "extractor") and not (
            isinstance(layers, int) and 1 <= layers <= depth
        ):
            raise ValueError(f"layers={layers!r}: choose top_k, all, last, extractor or a block from 1 to {depth}")
        with evaluating(self.modules()):
            if layers == "extractor":
                tokens = self.extract(modality, inputs, lengths)
                return Features(tokens.x.float(), tokens.shape, tokens.padding)
            output = LayerOutput.BLOCK if isinstance(layers, int) else self.average.output
            top_k = {"top_k": self.average.top_k, "last": 1}.get(str(layers), depth)
            encoded, tokens = self(modality, inputs, lengths, collect=Collect(output, top_k))
        if layers == "last":
            x = encoded.positions.float()
        elif isinstance(layers, int):
            x = encoded.layer_positions[layers - 1].float()
        else:
            kept = [layer.float() for layer in encoded.layer_positions]
            x = torch.stack([F.layer_norm(layer, layer.shape[-1:]) for layer in kept]).mean(0)
        return Features(x, tokens.shape, tokens.padding)


class Backbone(nn.Module):
    """The encoder of one modality from inputs to features: what heads and exported models stand on."""

    def __init__(self, encoder: Encoder, modality: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = modality

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.transformer.config.width

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, dropped: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) features of (B, ...) inputs, and their (B, T) padding, None where there is none.

        ``dropped``: see :meth:`Encoder.encode`.
        """
        encoded, tokens = self.encoder(self.modality, inputs, lengths, dropped=dropped)
        return encoded.positions, tokens.padding


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and those that were training back."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
