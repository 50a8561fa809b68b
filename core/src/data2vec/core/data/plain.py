"""Plain text of unknown origin: how its characters are written, and what is no plain text at all."""

from __future__ import annotations

import codecs

from data2vec.core.errors import DataError

HEAD = 1 << 16  # bytes at the beginning of a file that decide how it is read
_MARKS = {  # those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_WIDE = {"utf-32-le": 4, "utf-32-be": 4, "utf-16-le": 2, "utf-16-be": 2}
_PACKED = {
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd FILE"),
    b"\x1f\x8b": ("gzip", "gunzip FILE.gz"),
    b"BZh": ("bzip2", "bunzip2 FILE.bz2"),
    b"\xfd7zXZ\0": ("xz", "unxz FILE.xz"),
    b"PK\x03\x04": ("zip", "unzip FILE"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4 FILE"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x FILE"),
}
_MOST_STRANGE = 0.1  # of a text's characters may be controls or none at all; of a picture half are


def packed_with(head: bytes) -> str | None:
    """Tell by its first bytes what a file is compressed with: gzip, bzip2, xz, zstd, zip, lz4, 7-Zip; None: nothing."""
    return next((name for magic, (name, _) in _PACKED.items() if head.startswith(magic)), None)


def encoding_of(head: bytes) -> str:
    """The name of a text's encoding from its first bytes (:data:`HEAD` of them): ``utf-8-sig``, ``utf-16``, ...

    UTF-16 and UTF-32 are known by a byte-order mark, or by the zero bytes of its ASCII characters without one. What is
    not UTF-8 although nothing says so is UTF-8 here: the reader names the place.

    Raises:
        DataError: it is compressed, or binary.
    """
    packed = packed_with(head)
    if packed is not None:
        command = next(command for name, command in _PACKED.values() if name == packed)
        raise DataError(f"is compressed with {packed}; unpack it first ({command})")
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return "utf-8-sig"
    for encoding, width in _WIDE.items():
        units = head[: len(head) // width * width]
        if units and _is_wide(units, encoding, width):
            return encoding
    text = head.decode("utf-8", "replace")
    if sum(_is_strange(letter) for letter in text) > _MOST_STRANGE * len(text):
        raise DataError("is no text: it is binary, or in an unknown encoding; give UTF-8")
    return "utf-8-sig"


def decode_text(data: bytes) -> str:
    """The text of a whole file.

    Raises:
        DataError: see :func:`encoding_of`; or it is not what its beginning says.
    """
    encoding = encoding_of(data[:HEAD])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise DataError(f"is no text in {name}: byte {error.start} of {len(data)} fits no character") from None
    return text


def _is_wide(units: bytes, encoding: str, width: int) -> bool:
    """Tell whether the upper byte of many units of 2, or the upper half of every unit of 4, is zero, and it is text."""
    high = (width - 1) if encoding.endswith("le") else 0
    zeros = units[high::width].count(0)
    if zeros < (len(units) // width if width == 4 else len(units) // width / 8):
        return False
    text = units.decode(encoding, "replace")
    return sum(_is_strange(letter) for letter in text) <= _MOST_STRANGE * len(text)


def _is_strange(letter: str) -> bool:
    return letter == "\ufffd" or (letter < " " and letter not in "\t\n\r\f\v\b\x1b")
