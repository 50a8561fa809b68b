"""The length that a sound file's container states, compared with the bytes that are there.

libsndfile silently takes what a cut file still holds for the whole. :func:`complete` refuses such a file, and gives
one whose writer never knew the length, because it wrote to a pipe or crashed, the length that it has.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator

import numpy as np

from data2vec.core.errors import SampleError
from data2vec.speech.mpeg import with_count

MAX_VALUES = 100_000_000  # decoded values of one file, all channels: more than an hour and a half at 16 kHz
_UNKNOWN = 0x7FFF_0000  # bytes of audio from which a length is a placeholder: no clip of 2 GiB is ever decoded
_BLOCK = 1 << 16  # samples in time that are decoded at once where they are only counted
_MOST_CHUNKS = 4_096  # that are looked at: a file of millions of empty ones must not keep a loader busy
_FLAC_TOTAL = 18  # where the 8 bytes begin whose last 36 bits are a flac file's samples in time
_NIST_COUNTS = re.compile(rb"^(sample_count|channel_count|sample_n_bytes) -i ([0-9]{1,12})$", re.MULTILINE)
_W64_RIFF, _W64_DATA = b"riff\x2e\x91\xcf\x11", b"data\xf3\xac\xd3\x11"  # the first halves of their 16 bytes


def complete(data: bytes) -> bytes:
    """The file itself, or with the length in its header where that says nothing.

    Raises:
        SampleError: it is shorter than its header says, ends within a page, or is several ogg files in a row.
    """
    kind = data[:4]
    if kind in (b"RIFF", b"RIFX", b"RF64"):
        return _wave(data)
    if kind == b"fLaC":
        return _flac(data)
    if kind[:3] == b"ID3" or kind[:1] == b"\xff":
        return with_count(data)
    if kind == b"OggS":
        _check_pages(data)
    elif kind == b"FORM":
        for name, start, size, _ in _chunks(data, 12, ">4sI"):
            if name == b"SSND":
                _check(data, start, size)
    elif kind == b".snd" and len(data) >= 12:
        start, size = struct.unpack_from(">II", data, 4)
        if size < _UNKNOWN:  # all bits set: unknown, which libsndfile knows
            _check(data, start, size)
    elif kind == b"caff":
        for name, start, size, _ in _chunks(data, 8, ">4sq"):
            if name == b"data" and size >= 0:  # -1: to the end
                _check(data, start, size)
    elif data.startswith(b"NIST_1A\n"):
        start = int(match[1]) if (match := re.match(rb"NIST_1A\n *([0-9]{1,6})\n", data)) else 0
        said = {name: int(value) for name, value in _NIST_COUNTS.findall(data, 0, start)}
        if len(said) == 3:
            _check(data, start, math.prod(said.values()))
    elif data.startswith(_W64_RIFF):
        for name, start, size, _ in _chunks(data, 40, "<8s8xQ", align=8, counts_itself=True):
            if name == _W64_DATA:
                _check(data, start, size)
    return data


def _wave(data: bytes) -> bytes:
    order = ">" if data[:4] == b"RIFX" else "<"
    wide: tuple[int, int] | None = None  # of RF64: where the length of the audio stands, and that length
    for name, start, size, field in _chunks(data, 12, f"{order}4sI"):
        if name == b"ds64" and start + 16 <= len(data):
            wide = start + 8, struct.unpack_from("<Q", data, start + 8)[0]
        if name != b"data":
            continue
        if data[:4] == b"RF64" and wide is not None and size == 0xFFFF_FFFF:
            field, size, code = *wide, "<Q"
        else:
            code = f"{order}I"
        held = len(data) - start
        if size >= _UNKNOWN > held or (size == 0 and not _is_chunks(data, start, order)):
            return data[:field] + struct.pack(code, held) + data[field + struct.calcsize(code) :]
        _check(data, start, size)
        break
    return data


def _is_chunks(data: bytes, start: int, order: str) -> bool:
    """Tell whether nothing but further chunks follows, up to the end: then there is no audio indeed."""
    end = start
    for name, begin, size, _ in _chunks(data, start, f"{order}4sI"):
        if not all(32 <= letter < 127 for letter in name):
            return False
        end = begin + size + size % 2
    return end in (len(data), len(data) + 1)


def _flac(data: bytes) -> bytes:
    """A stream's encoder leaves 0 for the number of samples in time; they are counted by decoding."""
    if len(data) < _FLAC_TOTAL + 8:
        return data
    (packed,) = struct.unpack_from(">Q", data, _FLAC_TOTAL)
    if packed & (1 << 36) - 1:
        return data
    total = packed | _count(data)
    return data[:_FLAC_TOTAL] + struct.pack(">Q", total) + data[_FLAC_TOTAL + 8 :]


def _count(data: bytes) -> int:
    import soundfile

    class Sequential(soundfile.SoundFile):  # type: ignore[misc]
        """Never seeks, which libFLAC cannot where it knows no length."""

        def seekable(self) -> bool:
            return False

    frames = 0
    try:
        with Sequential(io.BytesIO(data)) as file:
            block = np.empty((_BLOCK, file.channels), np.int16)
            while read := file.buffer_read_into(block, "int16"):
                frames += read
                if frames * file.channels > MAX_VALUES:
                    break  # whoever reads the header refuses it
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError):
        raise SampleError(f"{len(data)} bytes of flac are damaged or cut short") from None
    return frames


def _check_pages(data: bytes) -> None:
    """An ogg file is pages one behind another; a stream begins on a page that says so."""
    position, begun = 0, False
    while data.startswith(b"OggS", position):
        segments = data[position + 26] if position + 27 <= len(data) else 0
        header = position + 27 + segments
        end = header + sum(data[position + 27 : header])
        if position + 27 > len(data) or header > len(data) or end > len(data):
            raise SampleError(f"the file is cut short: its {len(data)} bytes end within a page of ogg")
        begins = bool(data[position + 5] & 2)
        if begins and begun:
            raise SampleError("the file is several ogg files in a row, of which players read all; store each alone")
        begun = begun or not begins
        position = end
    if b"OggS".startswith(data[position:]) and position < len(data):
        raise SampleError(f"the file is cut short: its {len(data)} bytes end within a page of ogg")


def _chunks(
    data: bytes, position: int, layout: str, *, align: int = 2, counts_itself: bool = False
) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, first byte, size and place of the size of each chunk.

    ``layout``: of a chunk's head, its name and size. ``counts_itself``: the size includes the head.
    """
    head = struct.calcsize(layout)
    for _ in range(_MOST_CHUNKS):
        if position + head > len(data):
            return
        name, size = struct.unpack_from(layout, data, position)
        start = position + head
        if counts_itself:
            size -= head
        yield name, start, size, start - struct.calcsize(layout[0] + layout[-1])
        if size < 0:
            return
        position = start + -(-size // align) * align


def _check(data: bytes, start: int, size: int) -> None:
    held = max(0, len(data) - start)
    if size > held:
        raise SampleError(f"the file is cut short: its header says {size} bytes of audio, {held} are there")
