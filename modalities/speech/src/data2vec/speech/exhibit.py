"""The exhibit of speech: spectra, pictures of masks and features, sample clips, random waveforms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Exhibit, Illustrations, Panel, RandomInput, only_own
from data2vec.speech.audio import RATE
from data2vec.speech.features import log_mel, log_mel_frames, log_mel_pooled
from data2vec.speech.panels import panels, players

if TYPE_CHECKING:
    from data2vec.speech.config import Speech

_CLIP_SECONDS = 15  # about the mean of LibriSpeech's longer clips, and what the peers' rates were measured with


class SpeechExhibit(Exhibit):
    """The exhibit of clips of some settings."""

    raw_name: ClassVar[str] = "log-mel spectrum"

    def __init__(self, speech: Speech) -> None:
        self._speech = speech

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) log-mel spectrum, pooled over time."""
        return log_mel_pooled(batch)

    def raw_positions(self, batch: Batch) -> Tensor:
        """(B, T, F) log-mel spectrum at each frame."""
        geometry = self._speech.geometry
        frames = geometry.frames(batch.inputs.shape[1])
        return log_mel_frames(batch, frames, geometry.hop, geometry.receptive_field)

    def raw_picture(self, batch: Batch) -> Tensor | None:
        """(B, 1, N, 80) log-mel spectrum."""
        return log_mel(batch.inputs).unsqueeze(1)

    def panels(self, drawn: Illustrations) -> list[Panel]:
        geometry = self._speech.geometry
        return panels(drawn, hop=geometry.hop, receptive=geometry.receptive_field)

    def cards(self, batch: Batch) -> list[str]:
        return players(batch)

    def write_sample_shards(self, folder: Path, which: str | None = None) -> None:
        only_own(which)
        from data2vec.speech.samples import write_speech_shards

        write_speech_shards(folder)

    def random_input(self, samples: int) -> RandomInput:
        longest = self._speech.audio.max_length
        length = min(longest or _CLIP_SECONDS * RATE, _CLIP_SECONDS * RATE)
        clips = torch.randn(samples, length, generator=torch.Generator().manual_seed(0))
        return RandomInput(clips, "audio s", length / RATE)
