"""A finished run as a function from speech to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.errors import SampleError
from data2vec.core.model.encoder import Features
from data2vec.core.run.load import LoadedRun, load_run
from data2vec.speech.audio import Waveform, decode
from data2vec.speech.config import Speech
from data2vec.speech.loader import AudioDecoder

Clip = str | PathLike[str] | Tensor | NDArray[Any]
Clips = Clip | Iterable[Clip]
_INTEGERS = (np.dtype(np.int16), np.dtype(np.int32))  # in which audio is kept


@dataclass(frozen=True)
class SpeechEncoder:
    """The teacher (or student) of a run, on the run's device.

    ``layers`` and ``of`` are those of :meth:`data2vec.core.pretraining.data2vec.Data2Vec.features`. Clips are files of
    any kind and rate that ``tools/shard.py`` reads, or waveforms: one-dimensional, at 16 kHz, numbers of which 1 (or
    the largest integer of their type) is full scale. They are used in full: nothing is cropped. What a clip gives does
    not depend on the clips beside it. A single clip is a batch of one, and no clips are an empty batch.
    """

    run: LoadedRun
    decoder: AudioDecoder
    layers: str | int = "top_k"
    of: str = ""

    @classmethod
    def load(cls, run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> SpeechEncoder:
        """Read a run's folder or checkpoint.

        Raises:
            CheckpointError: no complete checkpoint there, or a run without speech.
        """
        loaded = load_run(run, device=device)
        decoder = loaded.settings_of(Speech).build_decoder(train=False)
        assert isinstance(decoder, AudioDecoder)
        return cls(loaded, decoder, layers, of)

    def prepare(self, clips: Clips) -> list[Tensor]:
        """(L,) float32 of each clip: at 16 kHz and, where the run was trained so, with zero mean and unit variance.

        Raises:
            SampleError: a file that cannot be decoded, what is no clip, or one that is too short or silent.
        """
        return [self._prepared(number, clip) for number, clip in enumerate(several_clips(clips)[0])]

    def _prepared(self, number: int, clip: Clip) -> Tensor:
        is_file = isinstance(clip, str | PathLike)
        try:
            waveform = _read(Path(clip)) if isinstance(clip, str | PathLike) else _waveform(clip)
            if len(waveform) < self.decoder.minimum:
                raise SampleError(f"{len(waveform)} samples at 16 kHz; at least {self.decoder.minimum} are needed")
            return torch.from_numpy(self.decoder.normalised(waveform, 0, len(waveform)))
        except SampleError as error:
            raise SampleError(f"{clip if is_file else f'clip {number} of those given'}: {error}") from None

    def features(self, clips: Clips) -> Features:
        """(B, T, D) float32 of the padded batch, with the padding: one vector for each frame."""
        waveforms = self.prepare(clips)
        if not waveforms:
            empty = torch.zeros(0, 0, self.run.experiment.transformer.width, device=self.run.device)
            return Features(empty, (0,), torch.zeros(0, 0, dtype=torch.bool, device=self.run.device))
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        inputs = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        return self.run.features(inputs, lengths=lengths, modality=Speech.name, layers=self.layers, of=self.of)

    def frames(self, clips: Clips) -> list[Tensor]:
        """(T, D) float32 of each clip, one vector for each frame (every 20 ms in published shapes)."""
        features = self.features(clips)
        assert features.padding is not None
        return [x[~padding] for x, padding in zip(features.x, features.padding, strict=True)]

    def __call__(self, clips: Clips) -> Tensor:
        """(B, D) float32, one vector for each clip: the mean over its frames."""
        return self.features(clips).mean()


def several_clips(clips: Clips) -> tuple[list[Clip], bool]:
    """The clips of a batch, and whether it is a single one; what holds no clips is one itself."""
    if isinstance(clips, np.ndarray):
        single = clips.ndim < 2 and clips.dtype.kind not in "OU"  # those hold paths
    elif isinstance(clips, Tensor):
        single = clips.ndim < 2
    else:
        single = isinstance(clips, str | PathLike | bytes) or not isinstance(clips, Iterable)
    return (cast(list[Clip], [clips]) if single else list(cast(Iterable[Clip], clips))), single


def _read(path: Path) -> Waveform:
    try:
        return decode(path.read_bytes(), converted=True)
    except OSError as error:
        raise SampleError(f"cannot be read ({error.strerror})") from None


def _waveform(clip: Tensor | NDArray[Any]) -> Waveform:
    """(L,) float32 of one that was given as numbers.

    Raises:
        SampleError: it is of another type or shape, or not finite.
    """
    if isinstance(clip, Tensor):
        clip = (clip.detach().float() if clip.is_floating_point() else clip).cpu().numpy()
    if not isinstance(clip, np.ndarray):
        raise SampleError(f"is of type {type(clip).__name__}; give a file's path, or a waveform as an array or tensor")
    if clip.ndim != 1:
        raise SampleError(f"a waveform must have one dimension, got {clip.shape}; average its channels")
    if clip.dtype in _INTEGERS:
        clip = clip / -float(np.iinfo(clip.dtype).min)
    elif clip.dtype.kind != "f":
        raise SampleError(f"a waveform of {clip.dtype}; give floats with full scale at 1, or integers of 16 or 32 bits")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        waveform = clip.astype(np.float32)
    if not np.isfinite(waveform).all():
        raise SampleError("the waveform holds values that are not finite")
    return waveform


def load_encoder(run: str | Path, *, layers: str | int = "top_k", of: str = "", device: str = "auto") -> SpeechEncoder:
    """:meth:`SpeechEncoder.load`."""
    return SpeechEncoder.load(run, layers=layers, of=of, device=device)
