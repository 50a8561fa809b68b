"""The transcripts that a fine-tuned model writes of evaluation clips, and their error rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jiwer
import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import EvaluationData
from data2vec.core.finetuning.recognition import RecognitionTask, required_frames
from data2vec.core.finetuning.transcripts import MEMBER, greedy
from data2vec.core.model.encoder import evaluating


@dataclass(frozen=True)
class Transcript:
    """A clip as it was said and as it was heard, with its loss. ``key``: SHARD:KEY."""

    key: str
    said: str
    heard: str
    loss: float
    too_long: bool = False

    @property
    def word_errors(self) -> int:
        """Words that are wrong, missing or too many."""
        found = jiwer.process_words([self.said], [self.heard])
        return found.substitutions + found.deletions + found.insertions


@torch.no_grad()
def transcribe(task: RecognitionTask, data: EvaluationData, device: torch.device, *, batch: int) -> list[Transcript]:
    """Write down what the task hears in all clips of a set, letter by letter, in evaluation mode.

    Raises:
        DataError: no usable clips.
    """
    found = []
    with evaluating(task.modules()):
        for part in data.counted(data.evaluation_batches(batch, pin_memory=device.type == "cuda")):
            prepared = task.prepare(part, seed=0, update=0).to(device)
            logits, frames = task.logits(prepared)
            losses = task.losses(logits, frames, prepared).tolist()
            long = (required_frames(prepared.targets, prepared.target_lengths) > frames).tolist()
            heard = [text_of(task, own) for own in cut(logits.cpu(), frames)]
            for key, said, text, loss, is_long in zip(part.keys, said_in(task, part), heard, losses, long, strict=True):
                found.append(Transcript(key, said, text, loss, is_long))
    return found


def said_in(task: RecognitionTask, batch: Batch) -> list[str]:
    """The transcripts of a batch, their letters in the case that was learnt."""
    texts = batch.annotations[MEMBER]
    return [" ".join(task.letters.words((text or b"").decode("utf-8", "replace"))) for text in texts]


def cut(logits: Tensor, frames: Tensor) -> Iterator[Tensor]:
    """(T, C) logits of each clip, without what stands behind its last frame."""
    return (own[:count] for own, count in zip(logits, frames.tolist(), strict=True))


def text_of(task: RecognitionTask, logits: Tensor) -> str:
    """The text of (T, C) logits, with the likeliest symbol of each frame."""
    return task.letters.decode([symbol for symbol, _, _ in greedy(logits)])


def error_rates(found: list[Transcript]) -> dict[str, float]:
    """Word and letter error rate over all clips, as jiwer counts them, and the mean loss."""
    said, heard = [one.said for one in found], [one.heard for one in found]
    return {
        "wer": float(jiwer.wer(said, heard)),
        "cer": float(jiwer.cer(said, heard)),
        "validation_loss": sum(one.loss for one in found) / len(found),
    }
