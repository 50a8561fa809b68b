"""From the bytes of a sound file to a mono waveform at 16 kHz.

The header is read first, so that a file which would unpack to more than fits in memory is refused before anything is
decoded. fairseq2's native decoder does the rest where it can be loaded, soundfile elsewhere: both call libsndfile and
give the same samples.

Shapes: T samples in time at the file's rate, C channels, L samples at 16 kHz.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data2vec.core.errors import SampleError
from data2vec.speech.containers import MAX_VALUES, complete

RATE = 16_000  # Hz, of every published model
_RATES = (4_000, 384_000)  # Hz, of a file
_MAX_CHANNELS = 32
# By libsndfile's name of a container, the extension of a member that holds one; opus is a kind of ogg. Beside these,
# people's files may be of those that become flac in a shard. No other of libsndfile's decoders ever runs.
CONTAINERS = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "RF64": "wav", "OGG": "ogg", "MP3": "mp3"}
CONVERTED = {"AIFF": (".aiff", ".aif", ".aifc"), "AU": (".au",), "CAF": (".caf",), "W64": (".w64",), "NIST": (".sph",)}
_HALF_WIDTH = 10  # of the resampling filter, in samples of the lower rate on either side

Waveform = NDArray[np.float32]


@dataclass(frozen=True)
class Header:
    """The header of a file: samples in time, channels, samples per second, and libsndfile's name of its kind."""

    frames: int
    channels: int
    rate: int
    container: str = "WAV"

    @property
    def length(self) -> int:
        """Samples at 16 kHz, exactly as many as :func:`decode` returns."""
        return resampled_length(self.frames, self.rate)


def read_header(data: bytes, *, converted: bool = False) -> Header:
    """Length, channels and rate of a flac, wav, ogg, opus or mp3 file, without decoding it.

    A length that the header leaves open is found; see :func:`data2vec.speech.containers.complete`.

    Args:
        data: the file.
        converted: take those of ``CONVERTED``, too.

    Raises:
        SampleError: no such file, no audio in it, cut short, or a length, rate or number of channels that cannot be
            meant.
    """
    return _read_header(complete(data), converted)


def _read_header(data: bytes, converted: bool) -> Header:
    import soundfile

    if not data:
        raise SampleError("the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            header = Header(file.frames, file.channels, file.samplerate, file.format)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise SampleError(f"{len(data)} bytes are no usable audio: {_reason(error)}") from None
    if header.container not in CONTAINERS and not (converted and header.container in CONVERTED):
        others = f" ({', '.join(CONVERTED).lower()})" if converted else ""
        raise SampleError(f"{len(data)} bytes are {header.container}; give flac, wav, ogg, opus or mp3{others}")
    if header.frames < 1:
        raise SampleError("the file holds no audio")
    if not 1 <= header.channels <= _MAX_CHANNELS or not _RATES[0] <= header.rate <= _RATES[1]:
        raise SampleError(
            f"{header.channels} channels at {header.rate} Hz; give up to {_MAX_CHANNELS} channels at "
            f"{_RATES[0]} to {_RATES[1]} Hz"
        )
    if max(header.frames * header.channels, header.length) > MAX_VALUES:
        raise SampleError(
            f"{len(data)} bytes claim {header.frames / header.rate:.0f} s of audio in {header.channels} channels; "
            "cut recordings into clips"
        )
    return header


def decode(data: bytes, *, converted: bool = False) -> Waveform:
    """(L,) the file's audio, channels averaged, at 16 kHz; full scale is 1.

    Raises:
        SampleError: see :func:`read_header`; or the audio is damaged, cut short, or not finite.
    """
    data = complete(data)
    header = _read_header(data, converted)
    try:
        samples = _decoder()(data)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SampleError(f"{len(data)} bytes of audio are damaged or cut short: {_reason(error)}") from None
    if samples.shape != (header.frames, header.channels):
        raise SampleError(f"the header says {header.frames} samples in time, the file holds {len(samples)}")
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so, and is found below
        mono = samples[:, 0] if header.channels == 1 else samples.mean(axis=1, dtype=np.float64).astype(np.float32)
        waveform = resample(mono, header.rate)
    if not np.isfinite(waveform).all():
        raise SampleError("the audio holds values that are not finite")
    return waveform


def resampled_length(frames: int, rate: int) -> int:
    """Samples at 16 kHz of ``frames`` samples at ``rate`` Hz, rounded up."""
    return -(-frames * RATE // rate)


def resample(x: Waveform, rate: int) -> Waveform:
    """(T,) at ``rate`` Hz to (L,) at 16 kHz by a polyphase filter (Kaiser window, beta 5)."""
    if rate == RATE:
        return np.ascontiguousarray(x)
    from scipy.signal import resample_poly

    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common
    resampled = resample_poly(x, up, down, window=_filter(up, down))
    return np.ascontiguousarray(resampled, dtype=np.float32)


@lru_cache(maxsize=16)
def _filter(up: int, down: int) -> Waveform:
    """The low-pass filter that ``resample_poly`` would design anew for every clip."""
    from scipy.signal import firwin

    widest = max(up, down)
    taps = firwin(2 * _HALF_WIDTH * widest + 1, 1.0 / widest, window=("kaiser", 5.0))
    return np.asarray(taps, dtype=np.float32)


@lru_cache(maxsize=1)
def _decoder() -> Callable[[bytes], Waveform]:
    """Of this process: fairseq2's decoder, or soundfile's where fairseq2's native part cannot be loaded."""
    try:
        return native_decoder()
    except (ImportError, OSError):
        return soundfile_decoder()


def native_decoder() -> Callable[[bytes], Waveform]:
    """fairseq2's decoder: bytes to (T, C) float32.

    Raises:
        ImportError, OSError: fairseq2 or its native library is missing or does not fit this system.
    """
    from fairseq2.data._memory import MemoryBlock
    from fairseq2.data.audio import AudioDecoder

    native = AudioDecoder(keepdim=True)

    def run(data: bytes) -> Waveform:
        waveform: Waveform = native(MemoryBlock(data))["waveform"].numpy()
        return waveform

    return run


def soundfile_decoder() -> Callable[[bytes], Waveform]:
    """soundfile's decoder: bytes to (T, C) float32."""
    import soundfile

    def run(data: bytes) -> Waveform:
        waveform: Waveform = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]
        return waveform

    return run


def _reason(error: Exception) -> str:
    """The library's words, without the address of the file object or a request to report a bug."""
    text = str(getattr(error, "error_string", "") or error).strip()
    if "bug report" in text or "See nested" in text or " object at " in text or not text:
        return "libsndfile cannot decode them"
    return text.removeprefix("Error : ").removesuffix(".")
