"""The settings of text and the parts they describe.

Defaults are data2vec 1.0's (Baevski et al. 2022, arXiv 2202.03555, section 4.4, "paper 1"); "paper 2" is data2vec 2.0
(arXiv 2212.07525).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.exhibit import Exhibit
from data2vec.core.modality import Decoder, Masker, Modality
from data2vec.core.model.encoder import Frontend
from data2vec.core.model.transformer import build_blocks
from data2vec.core.settings.declare import INSIDE, NOT_NEGATIVE, RATE, at_least, setting
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind
from data2vec.core.settings.rules import checked, predictor_problems
from data2vec.text.extractor import TextExtractor
from data2vec.text.loader import EXTENSIONS, TextDecoder, collate_text, length_of
from data2vec.text.masker import SpanMasker, TokenMasker, corrupt
from data2vec.text.tokenizer import FILE_NAME, SPECIALS, Tokenizer

_SHORTEST = 3  # tokens: <s>, one that can be hidden, </s>


class MaskKind(StrEnum):
    """``token``: single tokens (BERT, 1.0 and 2.0). ``span``: several in a row (paper 1's variant)."""

    TOKEN = "token"
    SPAN = "span"


@dataclass(frozen=True)
class MaskConfig:
    """The tokens that the student does not see, and what stands in their place.

    ``length`` and ``adjust`` belong to ``span``, see :class:`data2vec.text.masker.SpanMasker`; ``random_share`` and
    ``kept_share`` to ``replace``, see :func:`data2vec.text.masker.corrupt`.
    """

    kind: MaskKind = MaskKind.TOKEN
    ratio: float = setting(0.15, INSIDE)  # share of the tokens that is hidden; for spans before they overlap
    masks: int = setting(1, at_least(1))  # different masks of each sample in one update
    length: int = setting(4, at_least(1))  # tokens
    adjust: float = setting(0.0, NOT_NEGATIVE)
    # True: hidden tokens are replaced in the student's input (1.0). False: they reach its extractor and are hidden
    # afterwards, by taking them away (2.0) or by a learned vector, as student_sees says.
    replace: bool = True
    random_share: float = 0.1  # of the hidden tokens become another token (the configuration of 1.0 has 0)
    kept_share: float = 0.1  # of the hidden tokens stay as they are (there 0)

    def build(self) -> Masker:
        """Build the masker."""
        if self.kind is MaskKind.SPAN:
            return SpanMasker(ratio=self.ratio, length=self.length, adjust=self.adjust, masks=self.masks)
        return TokenMasker(ratio=self.ratio, masks=self.masks)

    def problems(self) -> list[str]:
        """List what does not go together, one line each."""
        found = []
        if self.kind is MaskKind.SPAN and not self.ratio + self.adjust < 1:
            found.append(f"text.mask.adjust={self.adjust}: with text.mask.ratio={self.ratio} it must be below 1")
        if not self.replace:
            return found
        if self.masks > 1:
            found.append(
                f"text.mask.masks={self.masks}: the student reads one input of each sample where tokens are replaced; "
                "choose text.mask.masks=1 or text.mask.replace=false"
            )
        shares = self.random_share, self.kept_share
        if min(shares) < 0 or sum(shares) > 1:
            found.append(
                f"text.mask.random_share={shares[0]}: with text.mask.kept_share={shares[1]} it must be at most 1, "
                "and both 0 or more"
            )
        return found


@dataclass(frozen=True)
class Text(Modality):
    """Text as token numbers, in blocks of up to ``block`` tokens that begin with ``<s>`` and end with ``</s>``.

    The tokenizer decides which numbers the special tokens have: RoBERTa's, whose vocabulary data2vec uses, has
    ``<mask>`` as its last token, those that are trained here as token 4.
    """

    name: ClassVar[str] = "text"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    length_unit: ClassVar[str] = "tokens"
    crop_key: ClassVar[str] = "block"
    assets: ClassVar[tuple[str, ...]] = (FILE_NAME,)

    # Rows of the embedding; at least the tokenizer's tokens.
    vocabulary: int = setting(50_265, at_least(len(SPECIALS) + 1))
    tokenizer: str | None = None  # tokenizer.json; null: the one beside the shards, or else the bytes of UTF-8
    block: int = setting(512, at_least(_SHORTEST))
    dropout: float = setting(0.1, RATE, anew=True)  # after the embedding's layer norm
    # Transformer blocks of this modality alone, before the shared ones.
    blocks: int = setting(0, NOT_NEGATIVE)
    mask: MaskConfig = field(default_factory=MaskConfig)
    predictor: PredictorConfig = field(default_factory=lambda: PredictorConfig(PredictorKind.MLP, layers=2))

    @property
    def predictor_config(self) -> PredictorConfig:
        return self.predictor

    @property
    def uses_mask_token(self) -> bool:
        return not self.mask.replace

    @property
    def length_range(self) -> tuple[int, int | None]:
        return _SHORTEST, self.block

    def problems(self, transformer: TransformerConfig) -> list[str]:
        return checked(
            self, "text.", (("mask.",), self.mask.problems),
            (("predictor.",), lambda: self._predictor_problems(transformer)),
        )  # fmt: skip

    @cached_property
    def loaded_tokenizer(self) -> Tokenizer:
        """The tokenizer that the settings name, read when it is first needed.

        Raises:
            DataError: no such file, or no tokenizer.
        """
        return Tokenizer.bytes() if self.tokenizer is None else Tokenizer.load(self.tokenizer)

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        extractor = TextExtractor(
            vocabulary=self.vocabulary,
            width=transformer.width,
            block=self.block,
            pad=self.loaded_tokenizer.pad,
            norm_eps=transformer.norm_eps,
        )
        # The teacher takes what the extractor gives to the student: dropout comes after it, so it sees no dropout.
        return Frontend(
            extractor,
            width=transformer.width,
            dropout=self.dropout,
            blocks=build_blocks(transformer, self.blocks),
        )

    def build_masker(self) -> Masker:
        return self.mask.build()

    def build_decoder(self, *, train: bool) -> Decoder:
        return TextDecoder(self.tokenizer, self.block, train)

    def maskable(self, batch: Batch) -> Tensor:
        """(B, T) bool: no special tokens, of which packed blocks have some also inside, and no padding."""
        specials = torch.tensor(sorted(self.loaded_tokenizer.specials), device=batch.inputs.device)
        allowed = torch.isin(batch.inputs, specials, invert=True)
        if batch.lengths is None:
            return allowed
        return allowed & (torch.arange(allowed.shape[1], device=allowed.device) < batch.lengths.unsqueeze(1))

    def student_inputs(self, batch: Batch, hidden: Tensor, *, seed: int, update: int) -> Tensor | None:
        """(B, T) tokens with the hidden ones replaced, for 1.0; see :class:`data2vec.core.modality.Modality`."""
        if not self.mask.replace:
            return None
        tokenizer = self.loaded_tokenizer
        return corrupt(
            batch.inputs,
            hidden[:, 0],
            batch.ids,
            seed=seed,
            update=update,
            mask=tokenizer.mask,
            vocabulary=min(self.vocabulary, tokenizer.vocabulary),
            specials=tokenizer.specials,
            random_share=self.mask.random_share,
            kept_share=self.mask.kept_share,
        )

    def collate(self, samples: Sequence[Sample], examples: Sequence[Example]) -> Batch:
        """Shorter texts are filled up. Without any, ``lengths`` is None, because attention without a mask is faster."""
        batch = collate_text(self.name, samples, examples, pad=self.loaded_tokenizer.pad)
        full = batch.lengths is not None and int(batch.lengths.min()) == batch.inputs.shape[1]
        return replace(batch, lengths=None) if full else batch

    @staticmethod
    def length_of(members: Mapping[str, bytes]) -> int | None:
        return length_of(members)

    def located(self, folder: Path) -> Self:
        """The same with the tokenizer in ``folder``, where there is one: that of the shards.

        Raises:
            ConfigError: ``tokenizer`` names another one.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return self
        if self.tokenizer is not None and not _same_content(Path(self.tokenizer), path):
            raise ConfigError(
                [
                    f"text.tokenizer={self.tokenizer}: differs from {path}, with which the shards were made; "
                    "leave text.tokenizer=null, or make the shards anew"
                ]
            )
        return replace(self, tokenizer=str(path))

    def asset_problems(self) -> list[str]:
        try:
            tokenizer = self.loaded_tokenizer
        except DataError as error:
            return [f"text.tokenizer={self.tokenizer}: {error}"]
        if tokenizer.vocabulary > self.vocabulary:
            name = self.tokenizer or "of bytes"
            return [
                f"text.vocabulary={self.vocabulary}: the tokenizer {name} has {tokenizer.vocabulary} tokens; "
                f"choose text.vocabulary={tokenizer.vocabulary} or more"
            ]
        return []

    @property
    def exhibit(self) -> Exhibit:
        from data2vec.text.exhibit import TextExhibit  # drawing is not needed to train

        return TextExhibit(self)

    def _predictor_problems(self, transformer: TransformerConfig) -> list[str]:
        why = "text has one dimension"
        return predictor_problems("text", self.predictor, transformer.width, dimensions=1, why=why)


def _same_content(one: Path, other: Path) -> bool:
    """Tell whether two files are equal; a file that is no longer there says nothing against the other."""
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return True
