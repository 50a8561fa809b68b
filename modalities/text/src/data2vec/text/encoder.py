"""A finished run as a function from texts to features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data2vec.core.batch import Batch, Sample
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.loading import LoadedRun, load_run
from data2vec.core.model.encoder import Features
from data2vec.text.config import Text


@dataclass(frozen=True)
class TextEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.pretraining.data2vec.Data2Vec.features`.
    """

    run: LoadedRun
    text: Text
    layers: str | int = "top_k"
    of: str = "teacher"

    @classmethod
    def load(
        cls, run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
    ) -> TextEncoder:
        """Read a run's folder or checkpoint, with the tokenizer that it keeps.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without text.
        """
        loaded = load_run(run, device=device)
        text = loaded.experiment.modalities.get(Text.name)
        if not isinstance(text, Text):
            names = ", ".join(loaded.experiment.modalities)
            raise CheckpointError(f"{run}: this run has no text, only {names}")
        return cls(loaded, text, layers, of)

    def prepare(self, texts: Sequence[str]) -> Batch:
        """Token numbers of texts, as in evaluation: ``<s>``, the first tokens of the text, ``</s>``, then padding.

        Raises:
            SampleError: no text at all, or one without tokens.
        """
        if not texts:
            raise SampleError("no texts; give one or more")
        decoder = self.text.build_decoder(train=False)
        samples = [Sample(f"{n}", "texts", n, {"txt": text.encode("utf-8", "replace")}) for n, text in enumerate(texts)]
        examples = []
        for sample in samples:
            try:
                examples.append(decoder(sample, 0))
            except SampleError as error:
                raise SampleError(f"text {sample.key}: {error}") from None
        return self.text.collate(samples, examples)

    def tokens(self, texts: Sequence[str] | Batch) -> Features:
        """(B, T, D) float32, one vector for each token, and which are padding.

        Args:
            texts: texts, or the tokens that :meth:`prepare` makes of them.
        """
        batch = texts if isinstance(texts, Batch) else self.prepare(texts)
        features: Features = self.run.features(
            batch.inputs, lengths=batch.lengths, modality=Text.name, layers=self.layers, of=self.of
        )
        return features

    def __call__(self, texts: Sequence[str] | Batch) -> Tensor:
        """(B, D) float32, one vector for each text: the mean over its tokens, ``<s>`` and ``</s>`` included."""
        return self.tokens(texts).mean()


def load_encoder(
    run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
) -> TextEncoder:
    """:meth:`TextEncoder.load`."""
    return TextEncoder.load(run, layers=layers, of=of, device=device)
