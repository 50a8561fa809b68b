"""The length of an mp3 file: its frames, of which none says how many there are.

Encoders put a frame without sound in front that counts the others (Xing's). Where there is none libsndfile guesses the
length from the first frame's size, and its guess is wrong wherever frames differ in size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from data2vec.core.errors import SampleError

_KBIT = {  # per second, by the header's number; layer III of MPEG 1, and of 2 and 2.5
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz
_WIDE = 9  # the header's number of a bit rate whose frames have room for the count
_COUNTS = (b"Xing", b"Info")
_COUNTED = tuple(bytes([flags]) for flags in range(1, 16, 2))  # the last byte of the flags, if a count follows
_MOST = 200_000  # frames that are counted: of 576 values or more, so that what has more is too long anyway


@dataclass(frozen=True)
class _Frame:
    start: int
    size: int
    about: int  # bytes from its start that describe its sound: then comes the sound, or a count


def with_count(data: bytes) -> bytes:
    """An mp3 file that counts its frames: itself, or with such a frame in front. Anything else is returned as it is.

    Raises:
        SampleError: it ends within a frame, or is several files in a row.
    """
    frames = _frames(data, _sound(data))
    first = next(frames, None)
    if first is None:
        return data
    counted = _is_count(data, first)
    place = first.start + first.about
    if counted and data[place + 7] & 2 and place + 16 <= len(data):
        (said,) = struct.unpack_from(">I", data, place + 12)
        if said > len(data):
            raise SampleError(f"the file is cut short: it says that it has {said} bytes, {len(data)} are there")
    total, end = 1, first.start + first.size
    for frame in islice(frames, _MOST):
        total, end = total + 1, frame.start + frame.size
        if counted and _is_count(data, frame):
            raise SampleError("the file is several mp3 files in a row, of which players read all; store each alone")
    if counted:
        return data
    if end > len(data):
        raise SampleError(f"the file is cut short: its {len(data)} bytes end within a frame of mp3")
    head = bytearray(data[first.start : first.start + 4])
    head[1] |= 1  # without a checksum
    head[2] = _WIDE << 4 | head[2] & 0x0C
    own = _frame(bytes(head), 0)
    assert own is not None
    count = bytes(head) + bytes(own.about - 4) + b"Xing" + struct.pack(">II", 1, total)
    return data[: first.start] + count.ljust(own.size, b"\0") + data[first.start :]


def _is_count(data: bytes, frame: _Frame) -> bool:
    """Tell whether a frame says how many others there are."""
    place = frame.start + frame.about
    return data.startswith(_COUNTS, place) and data[place + 7 : place + 8] in _COUNTED


def _sound(data: bytes) -> int:
    """Find where the tags in front of the first frame end."""
    position = 0
    while data.startswith(b"ID3", position) and position + 10 <= len(data):
        size = 0
        for byte in data[position + 6 : position + 10]:
            size = size << 7 | byte & 0x7F
        position += 10 + size + (10 if data[position + 5] & 0x10 else 0)
    return position


def _frames(data: bytes, position: int) -> Iterator[_Frame]:
    """Frames one behind another, the last of which may be cut."""
    while (frame := _frame(data, position)) is not None:
        yield frame
        position += frame.size


def _frame(data: bytes, start: int) -> _Frame | None:
    """The frame that begins at a byte; None: there is none of layer III."""
    if start + 4 > len(data) or data[start] != 0xFF or data[start + 1] & 0xE6 != 0xE2:
        return None
    version, rate = data[start + 1] >> 3 & 3, data[start + 2] >> 2 & 3
    number, padded = data[start + 2] >> 4, data[start + 2] >> 1 & 1
    if version == 1 or rate == 3 or number in (0, 15):
        return None
    one, mono = version == 3, data[start + 3] >> 6 == 3
    size = (144_000 if one else 72_000) * _KBIT[one][number] // _RATES[version][rate] + padded
    about = 4 + ((17 if mono else 32) if one else (9 if mono else 17))
    return _Frame(start, size, about)
