"""Text files, as they become shards: where documents begin and end, and the blocks they give.

A corpus may be larger than memory. It is cut into *parts* of some 100 kB, runs of whole documents that are known by
their places in the files; a worker reads one part at a time, and no document lies in two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

import numpy as np

from data2vec.core.errors import DataError
from data2vec.text.loader import pack_ids
from data2vec.text.packing import Packing, pack
from data2vec.text.sources import TextFile, stamp_of
from data2vec.text.tokenizer import Tokenizer

_CHUNK = 1 << 16
_ZERO = "holds a zero character, which no text has"
_BLANK = re.compile(rb"\n[ \t\r]*\n")


class Documents(StrEnum):
    """The unit that is a document in a plain file: a ``line``, what stands between ``blank`` lines, or the ``file``."""

    LINE = "line"
    BLANK = "blank"
    FILE = "file"


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
    """The reason why a document was left out, in one line that names its place."""

    reason: str


@dataclass(frozen=True)
class Samples:
    """The samples of a part: (key, members) of each, a line for each document that was left out, and the number of
    those that were not.
    """

    samples: tuple[tuple[str, dict[str, bytes]], ...]
    skipped: tuple[str, ...]
    documents: int = 0


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
        stamp = stamp_of(file.path)
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
class PartEncoder:
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


def _ends(file: TextFile, documents: Documents, first: int, size: int) -> Iterator[int]:
    """Find where the spans of a file end: after the first document end that lies ``first`` (then ``size``) bytes on."""
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
    if "\0" in text:
        return Skipped(f"{place}: {_ZERO}")
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
    if "\0" in text:
        return Skipped(f"{place}: its text {_ZERO}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped(f"{place}: its text has half a surrogate pair, which is no character")
    label = entry.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        return Skipped(f"{place}: label={json.dumps(label)[:40]} is neither text nor a whole number")
    return Document(text.strip(), file.label if label is None else str(label), place)
