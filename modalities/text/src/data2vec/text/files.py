"""Text files, as they become shards: which files, where documents begin and end, and the blocks they give.

A corpus may be larger than memory. It is cut into *parts* of some 100 kB, runs of whole documents that are known by
their places in the files; a worker reads one part at a time, and no document lies in two.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data2vec.core.data.files import temporary_name
from data2vec.core.errors import DataError
from data2vec.text.loader import pack_ids
from data2vec.text.packing import Packing, pack
from data2vec.text.tokenizer import Tokenizer

PLAIN = (".txt",)
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".xz")
_CHUNK = 1 << 16
_BLANK = re.compile(rb"\n[ \t\r]*\n")


class Documents(StrEnum):
    """What a document is in a plain file: a ``line``, what stands between ``blank`` lines, or the ``file``."""

    LINE = "line"
    BLANK = "blank"
    FILE = "file"


@dataclass(frozen=True)
class TextFile:
    """One file: ``name`` relative to what was asked for; ``label``: the name of its class, None without classes."""

    path: Path
    name: str
    label: str | None = None

    @property
    def json(self) -> bool:
        """Whether its lines are JSON objects with a ``text``."""
        return _suffixes(self.name)[0] in JSON_LINES

    @property
    def compressed(self) -> bool:
        return _suffixes(self.name)[1] != ""


@dataclass(frozen=True)
class Span:
    """Whole documents: the bytes from ``start`` to ``end`` of a file. ``stamp`` changes when the file does."""

    file: TextFile
    start: int
    end: int
    stamp: str


@dataclass(frozen=True)
class TextPart:
    """Some documents that become blocks together; ``key`` is unique."""

    key: str
    spans: tuple[Span, ...]

    def describe(self) -> str:
        """Changes with anything that decides the blocks."""
        return " ".join([self.key, *(f"{s.file.name} {s.file.label} {s.start} {s.end} {s.stamp}" for s in self.spans)])


@dataclass(frozen=True)
class Document:
    """A document's text, the name of its class (None where unknown), and where it was found."""

    text: str
    label: str | None
    place: str


@dataclass(frozen=True)
class Skipped:
    """Why a document was left out, in one line that names its place."""

    reason: str


@dataclass(frozen=True)
class Samples:
    """What a part gives: (key, members) of each sample, a line for each document that was left out, and the number of
    those that were not.
    """

    samples: tuple[tuple[str, dict[str, bytes]], ...]
    skipped: tuple[str, ...]
    documents: int = 0


def find_text(path: Path, *, labelled: bool) -> tuple[TextFile, ...]:
    """The text files of a folder at any depth, of a glob, or one file, in the order of their names.

    A folder's files end in .txt (plain) or .jsonl, .ndjson, .json (lines of JSON), packed as .gz or .xz or not; hidden
    ones are skipped. A file that is named itself, or by a glob, may have any other ending: it is plain.

    Args:
        path: folder, file or glob.
        labelled: take a folder's subfolders for classes, where all files lie in some.

    Raises:
        DataError: nothing is found, or a folder has files in class subfolders and beside them.
    """
    if path.is_dir():
        files = sorted(_folder_files(path), key=lambda one: one.relative_to(path).parts)
        if not files:
            endings = ", ".join((*PLAIN, *JSON_LINES))
            raise DataError(f"{path}: has no text files ({endings}, also with {' or '.join(COMPRESSED)})")
        found = [TextFile(one, one.relative_to(path).as_posix()) for one in files]
        return _with_classes(path, found) if labelled else tuple(found)
    if path.is_file():
        return (TextFile(path, path.name),)
    matches = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not matches:
        raise DataError(f"{path}: no such file, folder or glob that matches a file")
    return tuple(TextFile(Path(name), Path(name).name) for name in matches)


def unpack(file: TextFile, folder: Path) -> TextFile:
    """The file with its compression undone in ``folder``; it is kept there for an interrupted command to go on with.

    Raises:
        DataError: it is damaged, or there is no room.
    """
    if not file.compressed:
        return file
    digest = hashlib.sha256(f"{file.path.absolute()} {_stamp(file.path)}".encode("utf-8", "backslashreplace"))
    target = folder / f"{digest.hexdigest()[:24]}.txt"
    if not target.exists():
        temporary = temporary_name(target)
        opened = gzip.open if _suffixes(file.name)[1] == ".gz" else lzma.open
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with opened(file.path, "rb") as source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            os.replace(temporary, target)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file.path}: cannot be unpacked into {folder} ({error})") from None
        finally:
            temporary.unlink(missing_ok=True)
    return TextFile(target, file.name.removesuffix(_suffixes(file.name)[1]), file.label)


def cut_into_parts(files: Sequence[TextFile], documents: Documents, size: int) -> tuple[TextPart, ...]:
    """Whole documents in runs of about ``size`` bytes, over the borders of files where these are smaller.

    Only the surroundings of the places where parts begin are read.

    Raises:
        DataError: a file cannot be read, or there is nothing in any of them.
    """
    parts: list[TextPart] = []
    spans: list[Span] = []
    held = 0

    def close() -> None:
        nonlocal held
        if spans:
            stem = re.sub(r"[^\w-]", "_", spans[0].file.name.partition(".")[0]).lstrip("_") or "text"
            parts.append(TextPart(f"{stem}-{len(parts):07d}", tuple(spans)))
            spans.clear()
            held = 0

    for file in files:
        stamp = _stamp(file.path)
        start = 0
        for end in _ends(file, documents, size - held, size):
            spans.append(Span(file, start, end, stamp))
            held += end - start
            start = end
            if held >= size:
                close()
    close()
    if not parts:
        raise DataError(f"the {len(files)} text files are empty")
    return tuple(parts)


def read_documents(part: TextPart, documents: Documents) -> Iterator[Document | Skipped]:
    """The documents of a part in their order; blank lines are none.

    A document is skipped that is not UTF-8 or empty, or a line that is no JSON object with a ``text``. A ``label`` in
    a JSON object (text or a whole number) comes before the class of its folder.

    Raises:
        DataError: a file cannot be read any more.
    """
    for span in part.spans:
        try:
            with span.file.path.open("rb") as file:
                file.seek(span.start)
                data = file.read(span.end - span.start)
        except OSError as error:
            raise DataError(f"{span.file.path}: cannot be read ({error.strerror})") from None
        whole = documents is Documents.FILE and not span.file.json
        pattern = None if whole else rb"\n" if span.file.json or documents is Documents.LINE else _BLANK.pattern
        for offset, piece in _split(data, pattern):
            if whole or piece.strip():
                place = span.file.name if whole else f"{span.file.name} at byte {span.start + offset}"
                yield _from_json(piece, place, span.file) if span.file.json else _from_text(piece, place, span.file)


def class_names(parts: Iterable[TextPart], documents: Documents) -> tuple[str, ...]:
    """The classes of all documents, numbers in their order before names in theirs. Only JSON lines need be read."""
    found = set()
    for part in parts:
        found |= {span.file.label for span in part.spans if span.file.label is not None and not span.file.json}
        if any(span.file.json for span in part.spans):
            read = read_documents(part, documents)
            found |= {one.label for one in read if isinstance(one, Document) and one.label is not None}
    return tuple(sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


@dataclass(frozen=True)
class TextEncoder:
    """Turns a part into samples; picklable, so that workers may run it.

    Args:
        tokenizer: cuts text into tokens.
        block: tokens of a sample at most.
        packing: across documents, which have no labels then, or within them.
        documents: what a document is in a plain file.
        class_names: gives each class its number.
    """

    tokenizer: Tokenizer
    block: int
    packing: Packing
    documents: Documents
    class_names: tuple[str, ...] = ()

    def __call__(self, part: TextPart) -> Samples:
        """Read, tokenise and pack; a document that cannot be used is named in the result.

        Raises:
            DataError: a file cannot be read any more.
        """
        read = list(read_documents(part, self.documents))
        skipped = [one.reason for one in read if isinstance(one, Skipped)]
        found: list[tuple[Document, np.ndarray]] = []
        for one in read:
            if isinstance(one, Document):
                ids = np.array(self.tokenizer.encode(one.text), dtype=np.int64)
                if len(ids):
                    found.append((one, ids))
                else:
                    skipped.append(f"{one.place}: gives no tokens")
        if self.packing is Packing.ACROSS:
            across = enumerate(self._blocks([ids for _, ids in found]))
            samples = [(f"{part.key}/{number:05d}", self._members(block, None)) for number, block in across]
        else:
            samples = [
                (f"{part.key}/{number:05d}-{piece:05d}", self._members(block, document.label))
                for number, (document, ids) in enumerate(found)
                for piece, block in enumerate(self._blocks([ids]))
            ]
        return Samples(tuple(samples), tuple(skipped), len(found))

    def _blocks(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        return pack(documents, self.packing, block=self.block, bos=self.tokenizer.bos, eos=self.tokenizer.eos)

    def _members(self, ids: np.ndarray, label: str | None) -> dict[str, bytes]:
        members = {"tokens": pack_ids(ids, self.tokenizer.vocabulary)}
        return members if label is None else {**members, "cls": str(self.class_names.index(label)).encode()}


def _suffixes(name: str) -> tuple[str, str]:
    """The ending that says what is in the file, and that of its compression, in lower case."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def _folder_files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        paths += [Path(root, name) for name in shown if _suffixes(name)[0] in (*PLAIN, *JSON_LINES)]
    return paths


def _with_classes(folder: Path, files: list[TextFile]) -> tuple[TextFile, ...]:
    flat = sum("/" not in file.name for file in files)
    if flat == len(files):
        return tuple(files)
    if flat:
        raise DataError(
            f"{folder}: has {flat} text files beside class subfolders with {len(files) - flat}; "
            "move them into a class, or all into one flat folder, or pack across documents, which needs no classes"
        )
    return tuple(TextFile(file.path, file.name, file.name.partition("/")[0]) for file in files)


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{status.st_size} {status.st_mtime_ns}"


def _ends(file: TextFile, documents: Documents, first: int, size: int) -> Iterator[int]:
    """Where the spans of a file end: after the first document end that lies ``first`` (then ``size``) bytes on."""
    try:
        total = file.path.stat().st_size
        if documents is Documents.FILE and not file.json:
            yield total
            return
        pattern = re.compile(rb"\n") if file.json or documents is Documents.LINE else _BLANK
        with file.path.open("rb") as opened:
            position, wanted = 0, first
            while position < total:
                position = _next_end(opened, position + max(1, wanted), total, pattern)
                yield position
                wanted = size
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None


def _next_end(file: BinaryIO, position: int, total: int, pattern: re.Pattern[bytes]) -> int:
    """The first place after ``position`` where a document ends, past what separates it from the next."""
    if position >= total:
        return total
    start = position - 1  # the separator may begin with the byte before
    file.seek(start)
    seen = b""
    while chunk := file.read(_CHUNK):
        seen += chunk
        found = pattern.search(seen)
        if found:
            return start + found.end()
        # Of what was searched only the white space at the end may belong to a separator.
        kept = len(seen) - len(seen.rstrip(b" \t\r\n"))
        start, seen = start + len(seen) - kept, seen[len(seen) - kept :]
    return total


def _split(data: bytes, pattern: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The pieces between matches of a pattern, each with its offset; None: one piece."""
    start = 0
    for match in re.finditer(pattern, data) if pattern is not None else ():
        yield start, data[start : match.start()]
        start = match.end()
    yield start, data[start:]


def _from_text(data: bytes, place: str, file: TextFile) -> Document | Skipped:
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        return Skipped(f"{place}: is not UTF-8 (byte {error.start} of the document)")
    return Document(text, file.label, place) if text else Skipped(f"{place}: is empty")


def _from_json(line: bytes, place: str, file: TextFile) -> Document | Skipped:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skipped(f"{place}: is not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError):
        return Skipped(f"{place}: the line is no JSON")
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        return Skipped(f"{place}: the line is no JSON object with a text")
    if not text.strip():
        return Skipped(f"{place}: its text is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped(f"{place}: its text has half a surrogate pair, which is no character")
    label = entry.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        return Skipped(f"{place}: label={json.dumps(label)[:40]} is neither text nor a whole number")
    return Document(text.strip(), file.label if label is None else str(label), place)
