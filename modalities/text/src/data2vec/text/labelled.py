"""The labelled-text command of ``tools/shard.py``: rows of a table become samples of texts, or of pairs of texts.

tools/shard.py text-labelled train.tsv SHARDS --text sentence --label label --validation 0.1
tools/shard.py text-labelled reviews.jsonl SHARDS --text body --label stars --numbers
tools/shard.py text-labelled GLUE/MRPC/train.tsv SHARDS
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data2vec.core.data.shards.source import Source
from data2vec.core.errors import DataError, SampleError
from data2vec.text.loader import PAIR

_TABLES = {".tsv": "\t", ".csv": ","}
_LONGEST_CELL = 1 << 24  # characters; csv's own limit is 131,072
# GLUE's files by the columns that tell them apart: text, pair, label, and whether labels are numbers.
_LAYOUTS = (
    ("#1 String", "#2 String", "Quality", False),  # MRPC
    ("question1", "question2", "is_duplicate", False),  # QQP
    ("question", "sentence", "label", False),  # QNLI
    ("sentence1", "sentence2", "gold_label", False),  # MNLI
    ("sentence1", "sentence2", "score", True),  # STS-B
    ("sentence1", "sentence2", "label", False),  # RTE, WNLI
    ("sentence", None, "label", False),  # SST-2
)
_COLA = 4  # columns of CoLA's file, which has no header: source, label, the linguist's mark, sentence


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used."""

    text: str
    label: str
    pair: str | None = None
    numbers: bool = False


@dataclass(frozen=True)
class LabelledRow:
    """One row: texts and label, still as they stand in the file. ``line``: of the file, from 1."""

    line: int
    text: str
    label: str
    pair: str | None = field(default=None)

    @property
    def key(self) -> str:
        """The key of its sample."""
        return f"row{self.line:09d}"

    def describe(self) -> str:
        """Changes with anything that decides its sample."""
        content = json.dumps([self.line, self.text, self.pair, self.label])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class RowEncoder:
    """Turns a row into the members of a sample; picklable.

    ``numbers``: labels are real numbers; else they are ``classes``.
    """

    file: str
    classes: tuple[str, ...]
    numbers: bool

    def __call__(self, row: LabelledRow) -> dict[str, bytes]:
        """The members ``txt``, ``pair``, and ``cls`` or ``number``.

        Raises:
            SampleError: no text, or a label that cannot be used.
        """
        texts = {"txt": row.text} if row.pair is None else {"txt": row.text, PAIR: row.pair}
        empty = [name for name, text in texts.items() if not text.strip()]
        if empty:
            raise SampleError(f"{self.file}, line {row.line}: no text")
        members = {name: text.encode("utf-8", "replace") for name, text in texts.items()}
        if self.numbers:
            return {**members, "number": str(_number(row.label, self.file, row.line)).encode()}
        if row.label not in self.classes:
            raise SampleError(f"{self.file}, line {row.line}: the label {row.label[:30]!r} is none of the classes")
        return {**members, "cls": str(self.classes.index(row.label)).encode()}


def _number(text: str, file: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SampleError(f"{file}, line {line}: the label {text[:30]!r} is no number")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Source]:
    """Rows of FILE.tsv, .csv or .jsonl with a label each; the files of GLUE are known by their columns."""
    parser.add_argument("--text", metavar="COLUMN", help="the text, or the first of two")
    parser.add_argument("--pair", metavar="COLUMN", help="the second text of a pair")
    parser.add_argument("--label", metavar="COLUMN", help="the class, or the number with --numbers")
    parser.add_argument("--numbers", action="store_true", help="labels are numbers to be predicted (regression)")
    parser.add_argument(
        "--classes",
        metavar="A,B",
        help="names in the order of their numbers (default: sorted); give the same for training and validation",
    )

    def source(arguments: argparse.Namespace) -> Source:
        path: Path = arguments.folder
        header, records = read_table(path)
        columns = _columns(path, header, arguments)
        rows = list(_rows(records, columns))
        if not rows:
            raise DataError(f"{path}: has no rows")
        classes: tuple[str, ...] = ()
        if not columns.numbers:
            given = tuple(name.strip() for name in (arguments.classes or "").split(",") if name.strip())
            classes = given or tuple(sorted({row.label for row in rows}, key=_in_order))
            if len(classes) < 2:
                raise DataError(f"{path}: the column {columns.label} has one class only ({', '.join(classes)})")
        encode = RowEncoder(path.name, classes, columns.numbers)
        return Source("text", rows, classes, encode, f"{columns} {classes}", unit="rows", files=1)

    return source


def _in_order(label: str) -> tuple[int, str]:
    """Whole numbers by their value, then texts by the alphabet."""
    return (int(label), "") if label.isdecimal() and len(label) < 10 else (1 << 40, label)


def read_table(path: Path) -> tuple[list[str], Iterable[tuple[int, Mapping[str, str]]]]:
    """The columns of a table, and its rows: the line in the file, and the cells by column.

    CoLA's columns, which its file does not name, get names.

    Raises:
        DataError: it cannot be read, or is no table.
    """
    if path.suffix not in (*_TABLES, ".jsonl", ".json"):
        raise DataError(f"{path}: is no .tsv, .csv or .jsonl file; give one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 ({error})") from None
    if path.suffix in (".jsonl", ".json"):
        return _read_lines_of_json(path, text)
    csv.field_size_limit(_LONGEST_CELL)
    # A tab cannot stand in a cell of GLUE's files, and quotation marks there are part of the text.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
    try:
        lines = list(csv.reader(text.splitlines(keepends=True), delimiter=_TABLES[path.suffix], quoting=quoting))
    except csv.Error as error:
        raise DataError(f"{path}: is no table ({error})") from None
    if not lines:
        raise DataError(f"{path}: is empty")
    header = [name.strip() for name in lines[0]]
    numbered = list(enumerate(lines, 1))
    if len(header) == _COLA and header[1] in ("0", "1"):
        header = ["source", "label", "mark", "sentence"]
    else:
        numbered = numbered[1:]
    return header, ((line, dict(zip(header, cells, strict=False))) for line, cells in numbered)


def _read_lines_of_json(path: Path, text: str) -> tuple[list[str], list[tuple[int, Mapping[str, str]]]]:
    records: list[tuple[int, Mapping[str, str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise DataError(f"{path}, line {number}: is no JSON") from None
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: is no object with columns, such as {{"text": ..., "label": 1}}')
        cells = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
        records.append((number, cells))
    if not records:
        raise DataError(f"{path}: is empty")
    return list(records[0][1]), records


def _columns(path: Path, header: Sequence[str], arguments: argparse.Namespace) -> Columns:
    """The columns that are meant: those of the command line, or of a file of GLUE.

    Raises:
        DataError: there is no such column, or none is named and the file is not known.
    """
    known = next((one for one in _LAYOUTS if {c for c in one[:3] if c} <= set(header)), None)
    text, pair, label, numbers = known or (None, None, None, False)
    if arguments.text or arguments.label:
        text, label, pair, numbers = arguments.text, arguments.label, arguments.pair, arguments.numbers
    named = [column for column in (text, pair, label) if column]
    missing = [column for column in named if column not in header]
    if missing:
        raise DataError(f"{path}: has no column {missing[0]!r}; there is {', '.join(header)}")
    if not text or not label:
        raise DataError(f"{path}: name its columns with --text and --label (and --pair); there is {', '.join(header)}")
    return Columns(text, label, pair, numbers or arguments.numbers)


def _rows(records: Iterable[tuple[int, Mapping[str, str]]], columns: Columns) -> Iterator[LabelledRow]:
    for line, record in records:
        pair = None if columns.pair is None else record.get(columns.pair) or ""
        yield LabelledRow(line, record.get(columns.text) or "", (record.get(columns.label) or "").strip(), pair)
