"""Fine-tuned runs as functions from speech to text, and to classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data2vec.core.errors import CheckpointError
from data2vec.core.finetuning.recognition import RecognitionTask, Transcribed
from data2vec.core.finetuning.transcripts import SPACE, greedy
from data2vec.core.run.naming import Named, name, require_classifier
from data2vec.speech.audio import RATE
from data2vec.speech.config import Speech
from data2vec.speech.encoder import Clip, Clips, SpeechEncoder, several_clips

_BATCH = 8


@dataclass(frozen=True)
class Word:
    """A word that was heard, from ``start`` to ``end`` in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Heard:
    """The text of a clip, and its words with their times."""

    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Recogniser:
    """A run as a listener: the likeliest letter of each frame, of one clip or many."""

    encoder: SpeechEncoder
    model: RecognitionTask

    def __call__(self, clips: Clips) -> Heard | list[Heard]:
        """The text of a clip, or of each of several.

        Raises:
            SampleError: a file that cannot be decoded, what is no clip, or one that is too short or silent.
        """
        several, one = several_clips(clips)
        found = [self._heard(logits) for part in _parts(several) for logits in self.logits(part)]
        return found[0] if one else found

    @torch.no_grad()
    def logits(self, clips: Iterable[Clip]) -> list[Tensor]:
        """(T, C) logits of each clip's frames on the CPU."""
        waveforms = self.encoder.prepare(list(clips))
        if not waveforms:
            return []
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        inputs = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        none = torch.zeros(len(waveforms), 0, dtype=torch.int64)
        prepared = Transcribed(inputs, none, none.sum(1), lengths).to(self.encoder.run.device)
        logits, frames = self.model.logits(prepared)
        return [own[:count] for own, count in zip(logits.cpu(), frames.tolist(), strict=True)]

    def _heard(self, logits: Tensor) -> Heard:
        geometry = self.encoder.run.settings_of(Speech).geometry
        second = RATE / geometry.hop  # frames
        words: list[Word] = []
        letters: list[tuple[int, int, int]] = []
        space = self.model.letters.symbols.index(SPACE)
        for found in (*greedy(logits), (space, 0, 0)):
            if found[0] != space:
                letters.append(found)
                continue
            text = self.model.letters.decode([symbol for symbol, _, _ in letters])
            if text:
                words.append(Word(text, letters[0][1] / second, letters[-1][2] / second))
            letters = []
        return Heard(" ".join(word.text for word in words), tuple(words))


@dataclass(frozen=True)
class ClipClassifier:
    """The classifier of a run: keywords, speakers and the like, of one clip or many."""

    encoder: SpeechEncoder

    def __call__(self, clips: Clips) -> Named | list[Named]:
        """Name the class of a clip, or of each of several; the errors are those of :class:`Recogniser`."""
        several, one = several_clips(clips)
        found: list[Named] = []
        for part in _parts(several):
            waveforms = self.encoder.prepare(part)
            lengths = torch.tensor([len(waveform) for waveform in waveforms])
            inputs = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
            found += name(self.encoder.run, inputs, lengths)
        return found[0] if one else found


def _parts(clips: list[Clip]) -> Iterator[list[Clip]]:
    return (clips[start : start + _BATCH] for start in range(0, len(clips), _BATCH))


def load_recogniser(run: str | Path, *, device: str = "auto") -> Recogniser:
    """Read a run's folder (its best checkpoint) or a checkpoint.

    Raises:
        CheckpointError: no complete checkpoint there, or a run that was not fine-tuned for letters.
    """
    encoder = SpeechEncoder.load(run, device=device)
    model = encoder.run.model
    if not isinstance(model, RecognitionTask):
        raise CheckpointError(
            f"{encoder.run.folder}: a run of {encoder.run.experiment.kind}, which writes no text; fine-tune it with "
            "experiments/speech_ctc.py"
        )
    return Recogniser(encoder, model)


def load_classifier(run: str | Path, *, device: str = "auto") -> ClipClassifier:
    """Read a run's folder (its best checkpoint) or a checkpoint.

    Raises:
        CheckpointError: no complete checkpoint there, or a run that names no classes of clips.
    """
    encoder = SpeechEncoder.load(run, device=device)
    require_classifier(encoder.run)
    return ClipClassifier(encoder)
