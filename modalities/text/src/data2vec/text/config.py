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
from data2vec.core.modality import Decoder, Illustrations, Masker, Modality, Panel
from data2vec.core.model.encoder import Frontend
from data2vec.core.model.transformer import build_blocks
from data2vec.core.settings.fields import PredictorConfig, PredictorKind, TransformerConfig
from data2vec.text.extractor import TextExtractor
from data2vec.text.features import bag_of_tokens
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
    """How many tokens the student does not see, and what stands in their place.

    ``length`` and ``adjust`` belong to ``span``, see :class:`data2vec.text.masker.SpanMasker`; ``random_share`` and
    ``kept_share`` to ``replace``, see :func:`data2vec.text.masker.corrupt`.
    """

    kind: MaskKind = MaskKind.TOKEN
    ratio: float = 0.15  # share of the tokens that is hidden; for spans before they overlap
    masks: int = 1  # different masks of each sample in one update
    length: int = 4  # tokens
    adjust: float = 0.0
    # True: hidden tokens are replaced in the student's input (1.0). False: they reach its extractor and are hidden
    # afterwards, by taking them away (2.0) or by a learned vector, as student_sees says.
    replace: bool = True
    random_share: float = 0.1  # of the hidden tokens become another token (the configuration of 1.0 has 0)
    kept_share: float = 0.1  # of the hidden tokens stay as they are (there 0)


@dataclass(frozen=True)
class Text(Modality):
    """Text as token numbers, in blocks of up to ``block`` tokens that begin with ``<s>`` and end with ``</s>``.

    The tokenizer decides which numbers the special tokens have: RoBERTa's, whose vocabulary data2vec uses, has
    ``<mask>`` as its last token, those that are trained here as token 4.
    """

    name: ClassVar[str] = "text"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    raw_name: ClassVar[str] = "bag of tokens"
    extractor_name: ClassVar[str | None] = "bag of embeddings"
    length_unit: ClassVar[str] = "tokens"
    assets: ClassVar[tuple[str, ...]] = (FILE_NAME,)

    vocabulary: int = 50_265  # rows of the embedding; at least the tokenizer's tokens
    tokenizer: str | None = None  # tokenizer.json; null: the one beside the shards, or else the bytes of UTF-8
    block: int = 512
    dropout: float = 0.1  # after the embedding's layer norm
    blocks: int = 0  # Transformer blocks of this modality alone, before the shared ones
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
        found = _below(
            self, "", ("vocabulary", len(SPECIALS) + 1), ("block", _SHORTEST), ("blocks", 0)
        ) + _outside_rate(self, "", "dropout")
        return found + self._mask_problems() + self._predictor_problems(transformer)

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
        mask = self.mask
        if mask.kind is MaskKind.SPAN:
            return SpanMasker(ratio=mask.ratio, length=mask.length, adjust=mask.adjust, masks=mask.masks)
        return TokenMasker(ratio=mask.ratio, masks=mask.masks)

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

    def raw_features(self, batch: Batch) -> Tensor:
        return bag_of_tokens(batch, self.vocabulary)

    def panels(self, drawn: Illustrations) -> list[Panel]:
        from data2vec.text.panels import panels  # drawing is not needed to train

        return panels(drawn, self.loaded_tokenizer)

    def write_sample_shards(self, folder: Path) -> None:
        from data2vec.text.samples import write_text_shards  # nor is the sample data

        write_text_shards(folder)

    def _mask_problems(self) -> list[str]:
        mask = self.mask
        found = _below(mask, "mask.", ("masks", 1), ("length", 1), ("adjust", 0))
        if not 0 < mask.ratio < 1:
            found.append(f"text.mask.ratio={mask.ratio}: must be above 0 and below 1")
        elif mask.kind is MaskKind.SPAN and not mask.ratio + mask.adjust < 1:
            found.append(f"text.mask.adjust={mask.adjust}: with text.mask.ratio={mask.ratio} it must be below 1")
        if not mask.replace:
            return found
        if mask.masks > 1:
            found.append(
                f"text.mask.masks={mask.masks}: the student reads one input of each sample where tokens are replaced; "
                "choose text.mask.masks=1 or text.mask.replace=false"
            )
        shares = mask.random_share, mask.kept_share
        if min(shares) < 0 or sum(shares) > 1:
            found.append(
                f"text.mask.random_share={shares[0]}: with text.mask.kept_share={shares[1]} it must be at most 1, "
                "and both 0 or more"
            )
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
        ) + _outside_rate(predictor, "predictor.", "input_dropout")
        if predictor.kind is PredictorKind.CONV2D:
            found.append("text.predictor.kind=conv2d: text has one dimension; choose conv1d, linear or mlp")
        if predictor.projection_ratio <= 0:
            found.append(f"text.predictor.projection_ratio={predictor.projection_ratio}: must be above 0")
        if predictor.kind is PredictorKind.CONV1D and predictor.groups >= 1:
            widths = {"transformer.width": transformer.width}
            if predictor.width is not None:
                widths["text.predictor.width"] = predictor.width
            found += [
                f"text.predictor.groups={predictor.groups}: does not divide {name}={width}; choose a common divisor"
                for name, width in widths.items()
                if width % predictor.groups
            ]
        return found


def _same_content(one: Path, other: Path) -> bool:
    """Whether two files are equal; a file that is no longer there says nothing against the other."""
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return True


def _below(section: object, prefix: str, *least: tuple[str, int]) -> list[str]:
    """A line for each setting that is smaller than it may be; null is no problem."""
    found = []
    for key, low in least:
        value = getattr(section, key)
        if value is not None and value < low:
            found.append(f"text.{prefix}{key}={value}: must be {low} or more")
    return found


def _outside_rate(section: object, prefix: str, key: str) -> list[str]:
    value = getattr(section, key)
    return [] if 0 <= value < 1 else [f"text.{prefix}{key}={value}: must be from 0 to below 1"]
