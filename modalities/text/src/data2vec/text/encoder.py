"""A finished run as a function from texts to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data2vec.core.batch import Batch, Sample
from data2vec.core.errors import SampleError
from data2vec.core.model.encoder import Features
from data2vec.core.run.load import LoadedRun, load_run
from data2vec.text.config import Text
from data2vec.text.loader import PAIR

Texts = str | Iterable[str | tuple[str, str]]


@dataclass(frozen=True)
class TextEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.pretraining.data2vec.Data2Vec.features`. A single text is
    a batch of one.
    """

    run: LoadedRun
    text: Text
    layers: str | int = "top_k"
    of: str = ""

    @classmethod
    def load(cls, run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> TextEncoder:
        """Read a run's folder or checkpoint, with the tokenizer that it keeps.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without text.
        """
        loaded = load_run(run, device=device)
        return cls(loaded, loaded.settings_of(Text), layers, of)

    def prepare(self, texts: Texts) -> Batch:
        """Token numbers of texts, as in evaluation: ``<s>``, the first tokens of the text, ``</s>``, then padding.

        A tuple is a pair of texts: ``<s> a </s></s> b </s>``.

        Raises:
            SampleError: something else than text, or one without tokens.
        """
        texts = _as_batch(texts)
        if not texts:
            none = torch.zeros(0, dtype=torch.int64)
            return Batch(Text.name, none.view(0, 0), none, none, none)
        decoder = self.text.build_decoder(train=False)
        samples = [Sample(f"{number}", "texts", number, _members(text)) for number, text in enumerate(texts)]
        examples = []
        for sample in samples:
            try:
                examples.append(decoder(sample, 0))
            except SampleError as error:
                raise SampleError(f"text {sample.key}: {error}") from None
        return self.text.collate(samples, examples)

    def tokens(self, texts: Texts | Batch) -> Features:
        """(B, T, D) float32, one vector for each token, and which are padding.

        Args:
            texts: texts, or the tokens that :meth:`prepare` makes of them.
        """
        batch = texts if isinstance(texts, Batch) else self.prepare(texts)
        if not len(batch):
            width = self.run.experiment.transformer.width
            return Features(torch.zeros(0, 0, width), (0,), torch.zeros(0, 0, dtype=torch.bool))
        features: Features = self.run.features(
            batch.inputs, lengths=batch.lengths, modality=Text.name, layers=self.layers, of=self.of
        )
        return features

    def __call__(self, texts: Texts | Batch) -> Tensor:
        """(B, D) float32, one vector for each text: the mean over its tokens, ``<s>`` and ``</s>`` included."""
        return self.tokens(texts).mean()


def _members(text: str | tuple[str, str]) -> dict[str, bytes]:
    """The members of a text's sample, or of a pair's."""
    first, *second = (text,) if isinstance(text, str) else text
    return {name: one.encode("utf-8", "replace") for name, one in zip(("txt", PAIR), (first, *second), strict=False)}


def _as_batch(texts: Texts) -> list[str | tuple[str, str]]:
    """One text is a batch of one."""
    single = isinstance(texts, str) or not isinstance(texts, Iterable)
    batch: list[str | tuple[str, str]] = [texts] if single else list(texts)  # type: ignore[list-item]
    fits = [isinstance(one, str) or (isinstance(one, tuple) and _is_pair(one)) for one in batch]
    if isinstance(texts, bytes) or not all(fits):
        wrong = next((one for one, right in zip(batch, fits, strict=True) if not right), texts)
        raise SampleError(f"a text is a str, not {'bytes' if isinstance(texts, bytes) else type(wrong).__name__}")
    return batch


def _is_pair(texts: tuple[object, ...]) -> bool:
    return len(texts) == 2 and all(isinstance(text, str) for text in texts)


def load_encoder(run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> TextEncoder:
    """:meth:`TextEncoder.load`."""
    return TextEncoder.load(run, layers=layers, of=of, device=device)
