"""Sample data: English sentences and single words, synthesised by espeak-ng in many voices.

Sentences carry no class; the single words do. No voice of the validation set is heard in training. Pauses around the
speech and faint noise keep the clips from being cleaner than any recording.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.errors import DataError
from data2vec.speech.audio import RATE, Waveform, resample, resampled_length
from data2vec.speech.espeak import RATE as SPOKEN_RATE
from data2vec.speech.espeak import Spoken, SynthesisError, Utterance, speak
from data2vec.speech.sentences import WORDS, sentence

# The phonemes of the CMU pronouncing dictionary, and silence.
POSITION_CLASSES = (
    "SIL", "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH",
    "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)  # fmt: skip
# espeak-ng's English mnemonics, without stress marks, by class. A vowel with an r in it counts as the vowel.
_MNEMONICS = {
    "SIL": "_ _: _! _| | ;", "AA": "0 A: A@ A", "AE": "a aa", "AH": "V @ @2 @5 a# @-", "AO": "O: O2 O@ O o@ o:",
    "AW": "aU aU@", "AY": "aI aI2 aI3 aI@", "B": "b", "CH": "tS", "D": "d d[", "DH": "D", "EH": "E e@ E2",
    "ER": "3 3: IR VR @r", "EY": "eI e:", "F": "f", "G": "g", "HH": "h H", "IH": "I I2 I#", "IY": "i i: i@ i@3",
    "JH": "dZ", "K": "k x", "L": "l @L l/2 L", "M": "m m-", "N": "n n-", "NG": "N N-", "OW": "oU o", "OY": "OI",
    "P": "p", "R": "r r/ r- R", "S": "s", "SH": "S", "T": "t t# t[ t2 ?", "TH": "T", "UH": "U U@", "UW": "u: u",
    "V": "v", "W": "w w#", "Y": "j", "Z": "z z#", "ZH": "Z",
}  # fmt: skip
_CLASS_OF = {m: POSITION_CLASSES.index(name) for name, mnemonics in _MNEMONICS.items() for m in mnemonics.split()}

_ACCENTS = ("en", "en-us", "en-gb-scotland")
# espeak-ng's variants of a voice. Those that sound alike are on one side; those that sound like machines, or whose
# words are hardly recognised from the spectra of other voices, on neither.
_VARIANTS = {
    "train": (
        "Alex", "Andy", "Annie", "Denis", "Diogo", "Gene", "Hugo", "Jacky", "Marco", "Mario", "antonio", "belinda",
        "benjamin", "david", "ed", "edward", "f1", "f2", "f5", "grandma", "gustave", "john", "klatt3", "klatt5", "m1",
        "m2", "m4", "m5", "m6", "m7", "marcelo", "max", "michel", "norbert", "paul", "pedro", "quincy", "rob",
    ),
    "validation": (
        "Andrea", "Michael", "Mr serious", "aunty", "boris", "f3", "iven", "linda", "m3", "m8", "pablo",
    ),
}  # fmt: skip
_TAKES = {"train": 1, "validation": 2}  # of every word by every variant
_SENTENCES = {"train": 1_000, "validation": 100}
_SAMPLES_PER_SHARD = 180
_SEED = 0  # fixed: every run compares on the same clips
_LOUDNESS = (0.02, 0.1)  # root mean square of a clip, of full scale
_PAUSE = (0.05, 0.25)  # s before and after the speech
_NOISE_LENGTH = 2**20  # samples, of which every clip gets a part
_SNR = (25.0, 40.0)  # dB


@dataclass(frozen=True)
class Clip:
    """One utterance of a set; ``label`` is its word's number, None for a sentence."""

    utterance: Utterance
    label: int | None


def write_speech_shards(folder: Path) -> None:
    """Write 1,760 training and 540 validation clips, and the index of both.

    The shards ``train-*.tar`` and ``validation-*.tar`` hold clips as 16-bit flac at 16 kHz, the text (``txt``), the
    class of single words (``cls``) and the phonemes (``frames``, with the classes of ``POSITION_CLASSES``).

    Raises:
        DataError: espeakng_loader is not installed or does not work, or the folder cannot be written to.
    """
    plans = {prefix: plan(prefix) for prefix in _VARIANTS}
    try:
        with closing(speak([clip.utterance for clips in plans.values() for clip in clips])) as spoken:
            for prefix, clips in plans.items():
                _write(folder, prefix, clips, spoken)
    except SynthesisError as error:
        raise DataError(str(error)) from None


def plan(prefix: str) -> list[Clip]:
    """List what ``train`` or ``validation`` says, in random order: every variant says every word, and sentences."""
    generator = np.random.default_rng([_SEED, list(_VARIANTS).index(prefix)])
    variants = _VARIANTS[prefix]
    clips = [
        Clip(_utterance(word, variant, generator), number)
        for variant in variants
        for number, word in enumerate(WORDS)
        for _ in range(_TAKES[prefix])
    ]
    clips += [
        Clip(_utterance(sentence(generator), variants[number % len(variants)], generator), None)
        for number in range(_SENTENCES[prefix])
    ]
    return [clips[number] for number in generator.permutation(len(clips))]


def _utterance(text: str, variant: str, generator: np.random.Generator) -> Utterance:
    accent = _ACCENTS[generator.integers(len(_ACCENTS))]
    rate, pitch, pitch_range = (int(generator.integers(low, high)) for low, high in ((150, 211), (30, 71), (30, 71)))
    return Utterance(text, f"{accent}+{variant}", rate, pitch, pitch_range)


def _write(folder: Path, prefix: str, clips: Sequence[Clip], spoken: Iterator[Spoken]) -> None:
    generator = np.random.default_rng([_SEED, 1, list(_VARIANTS).index(prefix)])
    noise = _pink_noise(generator)
    with ShardWriter(folder, prefix, "speech", samples_per_shard=_SAMPLES_PER_SHARD, class_names=list(WORDS)) as writer:
        for number, clip in enumerate(clips):
            waveform, segments = _recorded(next(spoken), noise, generator)
            members = {
                "flac": _flac(waveform),
                "txt": clip.utterance.text.encode(),
                "frames": "".join(f"{start} {label}\n" for start, label in segments).encode(),
            }
            if clip.label is not None:
                members["cls"] = str(clip.label).encode()
            writer.write(f"{prefix}-{number:04d}", members)


def _recorded(
    spoken: Spoken, noise: Waveform, generator: np.random.Generator
) -> tuple[Waveform, list[tuple[int, int]]]:
    """(L,) the speech at 16 kHz between pauses, with noise, and its segments: first sample and class."""
    speech = resample(spoken.samples.astype(np.float32) * np.float32(2**-15), SPOKEN_RATE)
    before, after = (round(RATE * pause) for pause in generator.uniform(*_PAUSE, size=2))
    length = before + len(speech) + after
    start = generator.integers(len(noise) - length)
    amplitude = speech.std() * 10 ** (-generator.uniform(*_SNR) / 20)
    clip = np.pad(speech, (before, after)) + noise[start : start + length] * np.float32(amplitude)
    loudness = np.exp(generator.uniform(*np.log(_LOUDNESS)))
    clip *= np.float32(min(loudness / clip.std(), 0.99 / np.abs(clip).max()))
    return clip, _segments(spoken.phonemes, before, len(speech))


def _segments(phonemes: Sequence[tuple[int, str]], before: int, length: int) -> list[tuple[int, int]]:
    """First sample and class of each segment at 16 kHz, from one change of class to the next; -1 where unknown.

    Args:
        phonemes: first sample at espeak-ng's rate, and mnemonic.
        before: samples of the pause before the speech.
        length: samples of the speech.
    """
    silence = POSITION_CLASSES.index("SIL")
    starts = {0: silence}
    for first, mnemonic in phonemes:
        start = resampled_length(first, SPOKEN_RATE)
        if start < length:
            starts[before + start] = _CLASS_OF.get(mnemonic.lstrip("',%="), -1)
    starts[before + length] = silence
    segments: list[tuple[int, int]] = []
    for start, label in sorted(starts.items()):
        if not segments or segments[-1][1] != label:
            segments.append((start, label))
    return segments


def _pink_noise(generator: np.random.Generator) -> Waveform:
    """Noise of unit power with as much energy in each octave, and none below 60 Hz."""
    spectrum = np.fft.rfft(generator.standard_normal(_NOISE_LENGTH))
    frequency = np.fft.rfftfreq(_NOISE_LENGTH, 1 / RATE)
    noise = np.fft.irfft(np.where(frequency < 60, 0.0, spectrum / np.sqrt(np.maximum(frequency, 60))))
    scaled: Waveform = (noise / noise.std()).astype(np.float32)
    return scaled


def _flac(waveform: Waveform) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
