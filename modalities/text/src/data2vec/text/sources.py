"""The text files of a corpus: which there are, and each as plain UTF-8."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data2vec.core.data.folder import count_left_out, list_files
from data2vec.core.data.plain import HEAD, encoding_of, packed_with
from data2vec.core.errors import DataError
from data2vec.core.files import replacing

PLAIN = (".txt",)
JSON_LINES = (".jsonl", ".ndjson", ".json")
_OPENERS: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
_PACKED_ENDINGS = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2"}
COMPRESSED = tuple(_PACKED_ENDINGS)
_COPIED = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class TextFile:
    """One file: ``name`` relative to what was asked for; ``label``: the name of its class, None without classes."""

    path: Path
    name: str
    label: str | None = None

    @property
    def json(self) -> bool:
        """True where its lines are JSON objects with a ``text``."""
        return _suffixes(self.name)[0] in JSON_LINES


class UnusableFileError(DataError):
    """A whole file that is no text; the others of a corpus can be used."""


@dataclass(frozen=True)
class TextFolder:
    """The text files of a corpus; ``left_out``: how many other files its folder holds, by ending or what they are."""

    files: tuple[TextFile, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def find_text(path: Path, *, labelled: bool) -> TextFolder:
    """The text files of a folder at any depth, of a glob, or one file, in the order of their names.

    A folder's files end in .txt (plain) or .jsonl, .ndjson, .json (lines of JSON), packed as .gz, .xz, .bz2 or not.
    Links are followed. A file that is named itself, or by a glob, may have any other ending: it is plain.

    Args:
        path: folder, file or glob.
        labelled: take a folder's subfolders for classes, where all files lie in some.

    Raises:
        DataError: nothing is found, or a folder has files in class subfolders and beside them.
    """
    if path.is_dir():
        listing = list_files(path, lambda name: _suffixes(name)[0] in (*PLAIN, *JSON_LINES))
        if not listing.paths:
            endings = ", ".join((*PLAIN, *JSON_LINES))
            held = f"; it holds {count_left_out(listing.left_out)}" if listing.left_out else ""
            raise DataError(f"{path}: has no text files ({endings}, also with {' or '.join(COMPRESSED)}){held}")
        found = tuple(TextFile(one, one.relative_to(path).as_posix()) for one in listing.paths)
        return TextFolder(_with_classes(path, found) if labelled else found, listing.left_out)
    if path.is_file():
        return TextFolder((TextFile(path, path.name),))
    matches = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not matches:
        raise DataError(f"{path}: no such file, folder or glob that matches a file")
    return TextFolder(tuple(TextFile(Path(name), Path(name).name) for name in matches))


def unpack(file: TextFile, folder: Path) -> TextFile:
    """The file itself if it is plain UTF-8, else a copy of it in ``folder`` that is.

    What it is compressed with is seen from its first bytes or its ending; UTF-16 and UTF-32 become UTF-8. The copy is
    kept for an interrupted command to go on with.

    Raises:
        UnusableFileError: it cannot be read, is damaged, compressed with something else, or no text.
        DataError: there is no room.
    """
    try:
        with file.path.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError as error:
        raise UnusableFileError(f"{file.path}: cannot be read ({error.strerror})") from None
    ending = _suffixes(file.name)[1]
    packed = _PACKED_ENDINGS.get(ending) or packed_with(head)
    if packed not in _OPENERS and _encoding(file, head) == "utf-8-sig":
        return file
    digest = hashlib.sha256(f"{file.path.absolute()} {stamp_of(file.path)}".encode("utf-8", "backslashreplace"))
    target = folder / f"{digest.hexdigest()[:24]}.txt"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unpacked = _OPENERS.get(packed or "", open)
            with replacing(target) as path, path.open("wb") as copy, unpacked(file.path, "rb") as source:
                _convert(_reader(source, file, packed), file, copy)
        except OSError as error:
            raise DataError(f"{file.path}: cannot be unpacked into {folder} ({error})") from None
    return TextFile(target, file.name.removesuffix(ending) if ending else file.name, file.label)


def _reader(source: BinaryIO, file: TextFile, packed: str | None) -> Callable[[int], bytes]:
    """Reads what a file unpacks to; a fault of the file is told from one of the disk."""

    def read(size: int) -> bytes:
        try:
            return source.read(size)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # not of the library that unpacks
                raise
            raise UnusableFileError(f"{file.path}: cannot be unpacked as {packed}: {error}") from None

    return read


def _convert(read: Callable[[int], bytes], file: TextFile, copy: BinaryIO) -> None:
    """Write what ``read`` gives as UTF-8."""
    data = read(HEAD)
    encoding = _encoding(file, data)
    decoder = None if encoding == "utf-8-sig" else codecs.getincrementaldecoder(encoding)()
    while data:
        try:
            copy.write(data if decoder is None else decoder.decode(data).encode())
            following = read(_COPIED)
            if decoder is not None and not following:
                decoder.decode(b"", final=True)
        except UnicodeError:
            raise UnusableFileError(f"{file.path}: begins as {encoding.upper()} and does not go on so") from None
        data = following


def _encoding(file: TextFile, head: bytes) -> str:
    try:
        return encoding_of(head)
    except DataError as error:
        raise UnusableFileError(f"{file.path}: {error}") from None


def stamp_of(path: Path) -> str:
    """Changes when the file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{status.st_size} {status.st_mtime_ns}"


def _with_classes(folder: Path, files: tuple[TextFile, ...]) -> tuple[TextFile, ...]:
    flat = sum("/" not in file.name for file in files)
    if flat == len(files):
        return files
    if flat:
        raise DataError(
            f"{folder}: has {flat} text files beside class subfolders with {len(files) - flat}; "
            "move them into a class, or all into one flat folder, or pack across documents, which needs no classes"
        )
    return tuple(TextFile(file.path, file.name, file.name.partition("/")[0]) for file in files)


def _suffixes(name: str) -> tuple[str, str]:
    """The ending that says what is in the file, and that of its compression, in lower case."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")
