"""The exhibit of text: bags of tokens and embeddings, pictures of masks and neighbours, sample texts, random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Exhibit, Illustrations, Panel, RandomInput, only_own
from data2vec.text.features import bag_of_tokens
from data2vec.text.panels import panels, snippets

if TYPE_CHECKING:
    from data2vec.text.config import Text


class TextExhibit(Exhibit):
    """The exhibit of texts of some settings."""

    extractor_name: ClassVar[str | None] = "bag of embeddings"
    raw_name: ClassVar[str] = "bag of tokens"

    def __init__(self, text: Text) -> None:
        self._text = text

    def raw_features(self, batch: Batch) -> Tensor:
        return bag_of_tokens(batch, self._text.vocabulary)

    def panels(self, drawn: Illustrations) -> list[Panel]:
        return panels(drawn, self._text.loaded_tokenizer)

    def cards(self, batch: Batch) -> list[str]:
        return snippets(batch, self._text.loaded_tokenizer)

    def write_sample_shards(self, folder: Path, which: str | None = None) -> None:
        from data2vec.text.samples import write_order_shards, write_text_shards

        if which == "order":
            write_order_shards(folder)
            return
        only_own(which)
        write_text_shards(folder)

    def random_input(self, samples: int) -> RandomInput:
        text = self._text
        specials = text.loaded_tokenizer.specials
        ordinary = torch.tensor([token for token in range(text.vocabulary) if token not in specials])
        drawn = torch.randint(len(ordinary), (samples, text.block), generator=torch.Generator().manual_seed(0))
        return RandomInput(ordinary[drawn], "tokens", text.block)
