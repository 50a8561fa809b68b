"""Synthetic speech with phoneme times from espeak-ng, which the package ``espeakng_loader`` carries.

What espeak-ng says depends on what it said before and on a seed that it takes from the clock, so all clips are made
one after another in a fresh process with the seed set before each. That process runs this file, which therefore
imports nothing but numpy and the standard library until it synthesises.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

RATE = 22_050  # Hz, of espeak-ng's voices
_PACKAGE = "espeakng_loader"
_LONGEST_PATH = 150  # espeak-ng cuts data paths off at 160 characters

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS, _PHONEME_EVENTS, _DO_NOT_EXIT = 2, 0x0001, 0x8000
_RATE_PARAMETER, _PITCH_PARAMETER, _RANGE_PARAMETER = 1, 3, 4
_END_OF_EVENTS, _PHONEME_EVENT = 0, 7
_UTF8 = 1

_HEAD = struct.Struct("<II")  # samples, phonemes
_PHONEME = struct.Struct("<I8s")  # first sample, mnemonic


@dataclass(frozen=True)
class Utterance:
    """An utterance and its voice: words per minute, pitch and its range from 0 to 99 (espeak-ng's default is 50)."""

    text: str
    voice: str  # accent+variant, such as en-us+m3
    rate: int = 175
    pitch: int = 50
    range: int = 50


@dataclass(frozen=True)
class Spoken:
    """``samples``: int16 at 22,050 Hz. ``phonemes``: first sample and espeak-ng's mnemonic, with its stress mark."""

    samples: NDArray[np.int16]
    phonemes: tuple[tuple[int, str], ...]


class SynthesisError(Exception):
    """espeak-ng is not installed, or failed; the message says what to do."""


def speak(utterances: Sequence[Utterance]) -> Generator[Spoken, None, None]:
    """Synthesise utterances in a process of their own; the same list gives the same samples.

    Raises:
        SynthesisError: espeakng_loader is not installed, or espeak-ng failed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise SynthesisError(
            "the speech synthesiser is not installed: it comes with the dependency group 'demo'. Run `uv sync --group "
            "demo`, or `pip install espeakng-loader`, or name your own shards with data.train"
        )
    with tempfile.TemporaryFile() as requests, tempfile.TemporaryFile() as errors:
        requests.write(json.dumps([asdict(utterance) for utterance in utterances]).encode())
        requests.seek(0)
        # -P: this file's folder has modules whose names others use too.
        command = [sys.executable, "-P", __file__]
        with subprocess.Popen(command, stdin=requests, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                for _ in utterances:
                    yield _read(process.stdout)
            except EOFError:
                process.wait()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
                raise SynthesisError(f"espeak-ng failed: {lines[-1]}; install espeakng-loader anew") from None
            finally:
                process.kill()


def _read(stream: IO[bytes]) -> Spoken:
    samples, phonemes = _HEAD.unpack(_exactly(stream, _HEAD.size))
    audio = np.frombuffer(_exactly(stream, 2 * samples), dtype="<i2")
    events = _PHONEME.iter_unpack(_exactly(stream, phonemes * _PHONEME.size))
    return Spoken(audio, tuple((first, name.rstrip(b"\0").decode()) for first, name in events))


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


# What follows runs in the process that synthesises.


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """``espeak_EVENT``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Synthesiser:
    """espeak-ng in this process; there can be one only."""

    def __init__(self, library: str, data: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _PHONEME_EVENTS | _DO_NOT_EXIT)
        if rate != RATE:
            raise SystemExit(f"its data could not be loaded from {data} (initialise returned {rate}, not {RATE})")
        self._samples: list[NDArray[np.int16]] = []
        self._phonemes: list[tuple[int, bytes]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds no reference to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type != _END_OF_EVENTS:
            if events[number].type == _PHONEME_EVENT:
                self._phonemes.append((events[number].sample, bytes(events[number].id.string)))
            number += 1
        return 0

    def say(self, utterance: Utterance) -> bytes:
        """The utterance as :func:`_read` takes it."""
        self._samples, self._phonemes = [], []
        library = self._library
        library.espeak_ng_SetRandSeed(1)
        if library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise SystemExit(f"it has no voice {utterance.voice}")
        library.espeak_SetParameter(_RATE_PARAMETER, utterance.rate, 0)
        library.espeak_SetParameter(_PITCH_PARAMETER, utterance.pitch, 0)
        library.espeak_SetParameter(_RANGE_PARAMETER, utterance.range, 0)
        text = utterance.text.encode()
        if library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _UTF8, None, None) != 0 or not self._samples:
            raise SystemExit(f"it could not say {utterance.text!r}")
        audio = np.concatenate(self._samples).astype("<i2")
        names = b"".join(_PHONEME.pack(first, name) for first, name in self._phonemes)
        return _HEAD.pack(len(audio), len(self._phonemes)) + audio.tobytes() + names


def _short_folder() -> str | None:
    """Find where a link to the data gets a path short enough: not always in the default folder for temporary files."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(folder) < _LONGEST_PATH - 40 and os.access(folder, os.W_OK):
            return folder
    return None


def _serve() -> None:
    """Read utterances as JSON from the standard input and write what is spoken to the standard output."""
    import espeakng_loader

    utterances = [Utterance(**fields) for fields in json.load(sys.stdin)]
    data = espeakng_loader.get_data_path()
    with tempfile.TemporaryDirectory(prefix="espeak-", dir=_short_folder()) as folder:
        os.symlink(data, os.path.join(folder, "espeak-ng-data"))
        synthesiser = _Synthesiser(espeakng_loader.get_library_path(), folder)
        for utterance in utterances:
            sys.stdout.buffer.write(synthesiser.say(utterance))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
