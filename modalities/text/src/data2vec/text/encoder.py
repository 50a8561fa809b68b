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

    def prepare(self, texts: str | Iterable[str]) -> Batch:
        """Token numbers of texts, as in evaluation: ``<s>``, the first tokens of the text, ``</s>``, then padding.

        Raises:
            SampleError: something else than text, or one without tokens.
        """
        texts = _as_batch(texts)
        if not texts:
            none = torch.zeros(0, dtype=torch.int64)
            return Batch(Text.name, none.view(0, 0), none, none, none)
        decoder = self.text.build_decoder(train=False)
        samples = [Sample(f"{n}", "texts", n, {"txt": text.encode("utf-8", "replace")}) for n, text in enumerate(texts)]
        examples = []
        for sample in samples:
            try:
                examples.append(decoder(sample, 0))
            except SampleError as error:
                raise SampleError(f"text {sample.key}: {error}") from None
        return self.text.collate(samples, examples)

    def tokens(self, texts: str | Iterable[str] | Batch) -> Features:
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

    def __call__(self, texts: str | Iterable[str] | Batch) -> Tensor:
        """(B, D) float32, one vector for each text: the mean over its tokens, ``<s>`` and ``</s>`` included."""
        return self.tokens(texts).mean()


def _as_batch(texts: str | Iterable[str]) -> list[str]:
    """One text is a batch of one."""
    batch = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if isinstance(texts, bytes) or not all(isinstance(text, str) for text in batch):
        wrong = next((text for text in batch if not isinstance(text, str)), texts)
        raise SampleError(f"a text is a str, not {'bytes' if isinstance(texts, bytes) else type(wrong).__name__}")
    return batch


def load_encoder(run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> TextEncoder:
    """:meth:`TextEncoder.load`."""
    return TextEncoder.load(run, layers=layers, of=of, device=device)
