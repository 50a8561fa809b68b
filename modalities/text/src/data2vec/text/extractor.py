"""Token embeddings with learned positions, as in RoBERTa (Liu et al. 2019) and both versions of data2vec.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

import torch
from fairseq2.nn import LearnedPositionEncoder, StandardEmbedding
from torch import Tensor, nn

from data2vec.core.model.encoder import Extractor, Tokens
from data2vec.core.model.resizing import Resizable

_STD = 0.02  # of embeddings at first, as BERT and the authors' code


class Places(nn.Module):
    """fairseq2's table of learned positions, looked up for sequences that begin at the first place.

    fairseq2 looks up through a layout of the batch, which torch.export cannot follow.
    """

    def __init__(self, width: int, block: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = LearnedPositionEncoder(width, block).weight

    def forward(self, length: int) -> Tensor:
        """(1, T, D) of the first ``length`` places; row 0 of the table stands for padding."""
        places = torch.arange(1, 1 + length, device=self.weight.device)
        return nn.functional.embedding(places, self.weight).unsqueeze(0)


class TextExtractor(Extractor, Resizable):
    """Each token's embedding plus that of its place, layer-normalised.

    Positions are fairseq2's: ``positions.weight`` is (1 + ``block``, D), row 0 stands for padding and row 1 + i for
    place i. RoBERTa's table has one unused row more in front (place i in row 2 + i), see
    :mod:`data2vec.text.published`.

    Args:
        vocabulary: number of tokens.
        width: D.
        block: most tokens of an input.
        pad: the token of padding; its embedding is zero and is not learned.
        norm_eps: of the layer norm.
    """

    def __init__(self, *, vocabulary: int, width: int, block: int, pad: int = 1, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.block = block
        self.embed = StandardEmbedding(vocabulary, width, pad_idx=pad, init_fn=_initialise)
        self.positions = Places(width, block)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        with torch.no_grad():
            self.positions.weight.normal_(std=_STD)[0].zero_()

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        """Tokens (B, T, D) of token numbers (B, T) int64, of which the first ``lengths`` (B,) are valid.

        ``positions`` are the normalised embeddings of the places alone, for a learned mask vector: the layer norm of
        a sum has no part that depends on the place only.

        Raises:
            ValueError: no (B, T) integers, more tokens than ``block``, or none.
        """
        shape, valid = self.grid(inputs, lengths)
        embedded: Tensor = self.embed(inputs)
        # Places do not depend on the sample, so they are looked up once; padding gets some too, which nothing reads.
        places: Tensor = self.positions(shape[0])
        padding = None if valid is None else torch.arange(shape[0], device=inputs.device) >= valid.unsqueeze(1)
        return Tokens(self.norm(embedded + places), shape, padding, self.norm(places))

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int], Tensor | None]:
        """(T,) and the valid tokens of each sample, None where all T are; raises as ``forward``."""
        if inputs.ndim != 2 or inputs.is_floating_point() or not inputs.shape[1]:
            raise ValueError(f"text must be (samples, tokens) integers, got {tuple(inputs.shape)} {inputs.dtype}")
        if inputs.shape[1] > self.block:
            raise ValueError(f"{inputs.shape[1]} tokens, but there are positions for {self.block}; shorten the text")
        return (inputs.shape[1],), lengths

    def resized(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """Positions (1 + places, D) for more or fewer places; those that both have are the same.

        Further places repeat the table from its beginning, so that neighbours stay the neighbours that attention has
        learnt, except where a copy ends (Longformer, Beltagy et al. 2020, section 5). Interpolation would move all.
        """
        own = self.positions.weight
        if name != "positions.weight" or value.ndim != 2 or len(value) < 2 or value.shape[1] != own.shape[1]:
            return None
        places = len(value) - 1
        kept = value[1:].repeat(-(-self.block // places), 1)[: self.block]
        done = "cut" if self.block < places else "repeated"
        return torch.cat([value[:1], kept]), f"positions of {places} tokens {done} to {self.block}"


def _initialise(embedding: StandardEmbedding) -> None:
    nn.init.normal_(embedding.weight, std=_STD)
