"""A fine-tuned run as a function from texts, or pairs of texts, to their classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data2vec.core.run.naming import Named, name, require_classifier
from data2vec.text.encoder import TextEncoder

_BATCH = 64
Item = str | tuple[str, str]


@dataclass(frozen=True)
class TextClassifier:
    """The classifier of a run: of texts, or of pairs of texts as tuples; one or many."""

    encoder: TextEncoder

    def __call__(self, texts: Item | Iterable[Item]) -> Named | list[Named]:
        """Name the class of a text, or of each of several.

        Raises:
            SampleError: something else than a text or a pair, or one without tokens.
        """
        one = isinstance(texts, str | tuple)
        several: list[Item] = [texts] if isinstance(texts, str | tuple) else list(texts)
        found: list[Named] = []
        for start in range(0, len(several), _BATCH):
            batch = self.encoder.prepare(several[start : start + _BATCH])
            found += name(self.encoder.run, batch.inputs, batch.lengths)
        return found[0] if one else found


def load_text_classifier(run: str | Path, *, device: str = "auto") -> TextClassifier:
    """Read a run's folder (its best checkpoint) or a checkpoint.

    Raises:
        CheckpointError: no complete checkpoint there, or a run that names no classes of texts.
    """
    encoder = TextEncoder.load(run, device=device)
    require_classifier(encoder.run)
    return TextClassifier(encoder)
