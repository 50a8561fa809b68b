"""A finished run as a function from speech to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.batch import Sample
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.loading import LoadedRun, load_run
from data2vec.core.model.data2vec import Features
from data2vec.speech.config import Speech
from data2vec.speech.loader import SILENCE, AudioDecoder

Clip = str | Path | Tensor | NDArray[np.float32]


@dataclass(frozen=True)
class SpeechEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.model.data2vec.Data2Vec.features`. Clips are files (flac,
    wav, ogg, opus or mp3 at any rate) or waveforms, one-dimensional and at 16 kHz. They are used in full: nothing is
    cropped. What a clip gives does not depend on the clips beside it. A single clip is a batch of one.
    """

    run: LoadedRun
    decoder: AudioDecoder
    layers: str | int = "top_k"
    of: str = "teacher"

    @classmethod
    def load(
        cls, run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
    ) -> SpeechEncoder:
        """Read a run's folder or checkpoint.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without speech.
        """
        loaded = load_run(run, device=device)
        speech = loaded.experiment.modalities.get(Speech.name)
        if not isinstance(speech, Speech):
            names = ", ".join(loaded.experiment.modalities)
            raise CheckpointError(f"{run}: this run has no speech, only {names}")
        decoder = speech.build_decoder(train=False)
        assert isinstance(decoder, AudioDecoder)
        whole = replace(decoder, audio=replace(speech.audio, max_length=None))
        return cls(loaded, whole, layers, of)

    def prepare(self, clips: Clip | Iterable[Clip]) -> list[Tensor]:
        """(L,) float32 of each clip: at 16 kHz and, where the run was trained so, with zero mean and unit variance.

        Raises:
            SampleError: a file that cannot be decoded, or a clip that is too short or silent.
        """
        return [self._prepared(clip) for clip in _as_batch(clips)]

    def _prepared(self, clip: Clip) -> Tensor:
        if not isinstance(clip, (str, Path)):
            if not isinstance(clip, (Tensor, np.ndarray)):
                raise SampleError(f"a clip is a path or a waveform (tensor or array), not {type(clip).__name__}")
            return self._normalised(torch.as_tensor(clip, dtype=torch.float32, device="cpu"))
        path = Path(clip)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error})") from None
        try:
            return self.decoder(Sample(path.name, str(path), 0, {"wav": content}), 0).inputs
        except SampleError as error:
            raise SampleError(f"{path}: {error}") from None

    def _normalised(self, waveform: Tensor) -> Tensor:
        """As the decoder does it for files."""
        if waveform.ndim != 1:
            raise SampleError(f"a waveform must have one dimension, got {tuple(waveform.shape)}; average its channels")
        if len(waveform) < self.decoder.minimum:
            raise SampleError(f"{len(waveform)} samples at 16 kHz; at least {self.decoder.minimum} are needed")
        if not torch.isfinite(waveform).all():
            raise SampleError("the waveform holds values that are not finite")
        variance, mean = torch.var_mean(waveform.double(), correction=0)
        if variance < SILENCE:
            raise SampleError(f"silent: the waveform's variance is {float(variance):.1e} of full scale")
        return ((waveform - mean) / variance.sqrt()).float() if self.decoder.audio.normalise else waveform

    def features(self, clips: Clip | Iterable[Clip]) -> Features:
        """(B, T, D) float32 of the padded batch, with the padding: one vector for each frame."""
        waveforms = self.prepare(clips)
        if not waveforms:
            width = self.run.experiment.transformer.width
            return Features(torch.zeros(0, 0, width), (0,), torch.zeros(0, 0, dtype=torch.bool))
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        inputs = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        return self.run.features(inputs, lengths=lengths, modality=Speech.name, layers=self.layers, of=self.of)

    def frames(self, clips: Clip | Iterable[Clip]) -> list[Tensor]:
        """(T, D) float32 of each clip, one vector for each frame (every 20 ms in published shapes)."""
        features = self.features(clips)
        assert features.padding is not None
        return [x[~padding] for x, padding in zip(features.x, features.padding, strict=True)]

    def __call__(self, clips: Clip | Iterable[Clip]) -> Tensor:
        """(B, D) float32, one vector for each clip: the mean over its frames."""
        return self.features(clips).mean()


def _as_batch(clips: Clip | Iterable[Clip]) -> list[Clip]:
    """One clip is a batch of one."""
    if isinstance(clips, (str, Path)) or (isinstance(clips, (Tensor, np.ndarray)) and clips.ndim < 2):
        return [clips]
    if not isinstance(clips, Iterable):
        raise SampleError(f"a clip is a path or a waveform (tensor or array), not {type(clips).__name__}")
    return list(clips)


def load_encoder(
    run: str | Path, *, layers: str | int = "top_k", of: str = "teacher", device: str = "auto"
) -> SpeechEncoder:
    """:meth:`SpeechEncoder.load`."""
    return SpeechEncoder.load(run, layers=layers, of=of, device=device)
