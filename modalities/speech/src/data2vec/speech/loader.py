"""From the bytes of a shard to normalised waveforms and padded batches.

Shapes: B clips, L samples of the longest at 16 kHz, T frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.batch import Batch, Example, Sample, decode_label
from data2vec.core.errors import SampleError
from data2vec.core.settings.declare import setting
from data2vec.speech.audio import Waveform, decode, read_header

EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3")
SILENCE = 2.0**-30  # variance of an alternation by one step of 16 bits, with full scale at 1
_FRAME_LABELS = re.compile(rb"(?:[0-9]{1,9} (?:-1|[0-9]{1,4})(?:\n|$))*")


@dataclass(frozen=True)
class AudioConfig:
    """The clips that are used and how much of them, in waveform samples at 16 kHz.

    ``min_length``: training leaves shorter clips out. ``max_length``: longer clips are cropped, at a random place for
    training and in the middle for evaluation; null: never. ``normalise``: to zero mean and unit variance over the
    whole clip, before it is cropped (paper 1).
    """

    min_length: int = setting(32_000, anew=True)
    max_length: int | None = setting(320_000, anew=True)
    normalise: bool = True


@dataclass(frozen=True)
class AudioDecoder:
    """Decodes the first audio member of a sample: a pure function of the sample and the seed.

    Args:
        audio: which clips are used, and how much of them.
        train: crop at random instead of in the middle, and leave out clips below ``audio.min_length``.
        minimum: receptive field of the extractor; a shorter clip has no frame.
        hop: waveform samples from one frame to the next.
        receptive: waveform samples that one frame sees.
    """

    audio: AudioConfig
    train: bool
    minimum: int
    hop: int = 320
    receptive: int = 400

    def __call__(self, sample: Sample, seed: int) -> Example:
        """``inputs``: (L,) float32 at 16 kHz. ``label``: from the member ``cls``. ``position_labels``: (T,) int64, the
        class at the centre of every frame, from the member ``frames``.

        ``frames`` is ASCII text, a line for each segment: its first sample at 16 kHz, a blank, its class number (-1:
        unknown). Starts rise; a segment lasts until the next one or the clip's end. What lies before the first
        segment is unknown.

        Raises:
            SampleError: no audio, or audio that cannot be decoded, is too short or silent.
        """
        label = decode_label(sample)
        waveform = decode(sample.members[_audio_member(sample.members)])
        shortest = max(self.minimum, self.audio.min_length if self.train else 1)
        if len(waveform) < shortest:
            raise SampleError(f"{len(waveform)} samples at 16 kHz; at least {shortest} are needed")
        segments, unused = None, {}
        try:
            segments = decode_frame_labels(sample, len(waveform))
        except SampleError as error:  # they serve a probe; the clip itself can be used
            unused["frames"] = str(error)
        start, length = self._crop(len(waveform), seed)
        inputs = self.normalised(waveform, start, length)
        labels = None if segments is None else self._rasterised(segments, start, length)
        return Example(torch.from_numpy(inputs), label, labels, unused)

    def normalised(self, waveform: Waveform, start: int, length: int) -> Waveform:
        """(length,) a copy of what begins at ``start``, scaled as ``audio.normalise`` says by the whole (L,) waveform.

        Raises:
            SampleError: the waveform is silent.
        """
        variance = audible(waveform)
        part = waveform[start : start + length]
        if not self.audio.normalise:
            return part.copy()
        scaled: Waveform = ((part - waveform.mean(dtype=np.float64)) / np.sqrt(variance)).astype(np.float32)
        return scaled

    def _crop(self, length: int, seed: int) -> tuple[int, int]:
        """First sample and length of what is kept."""
        kept = length if self.audio.max_length is None else min(length, self.audio.max_length)
        if not self.train:
            return (length - kept) // 2, kept
        return int(np.random.default_rng(seed).integers(length - kept + 1)), kept

    def _rasterised(self, segments: NDArray[np.int64], start: int, length: int) -> Tensor:
        """(T,) class at the centre of each frame of a crop."""
        frames = frame_count(length, self.hop, self.receptive)
        centres = start + self.hop * np.arange(frames) + self.receptive // 2
        number = np.searchsorted(segments[:, 0], centres, side="right")
        return torch.from_numpy(np.concatenate([[-1], segments[:, 1]])[number])


def audible(waveform: Waveform) -> float:
    """The variance of a (L,) waveform.

    Raises:
        SampleError: it is silent, so that no model could learn from it.
    """
    variance = float(waveform.var(dtype=np.float64))
    if variance < SILENCE:
        raise SampleError(f"silent: its variance is {variance:.1e} of full scale, below {SILENCE:.1e}")
    return variance


def collate_audio(
    name: str, samples: Sequence[Sample], examples: Sequence[Example], *, hop: int = 320, receptive: int = 400
) -> Batch:
    """A batch of clips, zero-padded at the end.

    ``inputs`` (B, L) float32, ``lengths`` (B,) int64, ``labels`` (B,) int64, and ``position_labels`` (B, T) int64, -1
    where unknown or padded; None where no clip has any. ``hop`` and ``receptive`` as the clips were decoded with.

    Raises:
        ValueError: position labels that were made with another hop or receptive field.
    """
    lengths = [len(example.inputs) for example in examples]
    inputs = torch.zeros(len(examples), max(lengths))
    for row, example in zip(inputs, examples, strict=True):
        row[: len(example.inputs)] = example.inputs
    positions = None
    if any(example.position_labels is not None for example in examples):
        positions = torch.full((len(examples), frame_count(max(lengths), hop, receptive)), -1, dtype=torch.int64)
        for row, example, length in zip(positions, examples, lengths, strict=True):
            known, expected = example.position_labels, frame_count(length, hop, receptive)
            if known is not None and len(known) != expected:
                raise ValueError(f"{len(known)} position labels for {expected} frames of {length} samples (hop {hop})")
            if known is not None:
                row[:expected] = known
    return Batch(
        modality=name,
        inputs=inputs,
        ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        labels=torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        position_labels=positions,
        keys=tuple(f"{sample.shard}:{sample.key}" for sample in samples),
    )


def frame_count(length: int, hop: int, receptive: int) -> int:
    """Frames of an extractor without padding: its layers' floors compose to this one."""
    return max(0, (length - receptive) // hop + 1)


def length_of(members: Mapping[str, bytes]) -> int | None:
    """The length at 16 kHz of a sample's audio, from the file's header alone.

    Raises:
        SampleError: no audio, or a header that cannot be used.
    """
    return read_header(members[_audio_member(members)]).length


def decode_frame_labels(sample: Sample, length: int) -> NDArray[np.int64] | None:
    """(S, 2) first sample and class of each segment of the member ``frames``; None where there is no such member.

    ``length``: of the clip, in samples at 16 kHz.

    Raises:
        SampleError: another format than :class:`AudioDecoder` describes, or starts that do not rise within the clip.
    """
    text = sample.members.get("frames")
    if text is None:
        return None
    if not _FRAME_LABELS.fullmatch(text):
        raise SampleError("frames: must hold lines of a first sample and a class number, such as '3200 7'")
    segments = np.array(text.split(), dtype=np.int64).reshape(-1, 2)
    starts = segments[:, 0]
    if (np.diff(starts) <= 0).any() or (len(starts) and starts[-1] >= length):
        raise SampleError(
            f"frames: first samples must rise and lie below the clip's {length} samples at 16 kHz; "
            f"the last is {starts[-1]}"
        )
    return segments


def _audio_member(members: Mapping[str, bytes]) -> str:
    extension = next((extension for extension in EXTENSIONS if extension in members), None)
    if extension is None:
        found = ", ".join(sorted(members)) or "none"
        raise SampleError(f"no audio: members are {found}, expected one of {', '.join(EXTENSIONS)}")
    return extension
