"""The text command of ``tools/shard.py``: files of text become blocks of tokens.

tools/shard.py text CORPUS SHARDS --train-tokenizer 50000
tools/shard.py text 'wiki/*.jsonl.gz' SHARDS --tokenizer tokenizer.json --block 512
tools/shard.py text REVIEWS SHARDS --bytes --pack within --documents file --validation 0.1
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data2vec.core.data.shards.index import INDEX_NAME
from data2vec.core.data.shards.source import Source
from data2vec.core.errors import DataError
from data2vec.text import files, labelled
from data2vec.text.files import Document, Documents, PartEncoder, TextPart, read_documents
from data2vec.text.packing import Packing
from data2vec.text.sources import TextFile, UnusableFileError, find_text, unpack
from data2vec.text.tokenizer import FILE_NAME, Tokenizer, train_bpe

COMMANDS = {"text-labelled": labelled.add_arguments}
"""Further commands by name."""

UNPACKED_NAME = ".unpacked"
_BYTES_PER_TOKEN = 4  # of English, about; decides only how large a part is
_PARTS = 2_000  # at least so many, where the corpus is large enough: the unit of shuffling and of --validation
_MOST_BLOCKS, _FEWEST_BLOCKS = 64, 16  # of a part that is packed across documents: its last block is short
_TOKENIZER_BYTES = 64_000_000  # of text that a tokenizer is trained on
_LEAST_BLOCK = 3  # two special tokens and one of text
_NAMED = 10  # files that are no text
_PROBED = 16  # parts from which the number of samples is estimated


def add_arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Source]:
    """Text files or lines of JSON, in a folder (class subfolders give labels), a glob in quotes, or one file."""
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json")
    tokens.add_argument("--train-tokenizer", type=_vocabulary, metavar="VOCAB", help="learn byte pair encoding")
    tokens.add_argument("--bytes", action="store_true", help="a token for each byte of UTF-8")
    parser.add_argument("--block", type=_block, default=512, metavar="N", help="tokens of a sample; default 512")
    parser.add_argument(
        "--pack",
        choices=["across", "within"],
        default="across",
        help="full samples that span documents (default), or none that crosses a document's end, which keeps labels",
    )
    parser.add_argument(
        "--documents",
        choices=["line", "blank", "file"],
        default="line",
        help="what a document is in a plain file: a line, what stands between blank lines, or the file",
    )

    def source(arguments: argparse.Namespace) -> Source:
        packing, documents = Packing(arguments.pack), files.Documents(arguments.documents)
        corpus = find_text(arguments.folder, labelled=packing is Packing.WITHIN)
        if (arguments.out / INDEX_NAME).exists() and not arguments.force:  # before the long work, not after it
            raise DataError(f"{arguments.out}: holds shards already; name another folder, or --force replaces them")
        scratch = arguments.out / UNPACKED_NAME
        found, unusable = _unpacked(corpus.files, scratch)
        parts = files.cut_into_parts(found, documents, _part_size(found, packing is Packing.ACROSS, arguments.block))
        tokenizer = _tokenizer(arguments, parts, documents)
        classes = files.class_names(parts, documents) if packing is Packing.WITHIN else ()
        encode = files.PartEncoder(tokenizer, arguments.block, packing, documents, classes)
        settings = f"{arguments.block} {packing} {documents} {hashlib.sha256(tokenizer.content).hexdigest()}"
        beside = {FILE_NAME: tokenizer.content}
        samples = _estimate(parts, encode)
        left_out = dict(corpus.left_out) | ({"unusable": unusable} if unusable else {})
        return Source(
            "text", parts, classes, encode, settings, samples, beside, scratch, unit="documents", files=len(found),
            left_out=left_out,
        )  # fmt: skip

    return source


def _unpacked(found: Sequence[TextFile], scratch: Path) -> tuple[list[TextFile], int]:
    """The files as plain UTF-8, and how many are no text, of which the first are named on the error stream."""
    usable, reasons = [], []
    for file in found:
        try:
            usable.append(unpack(file, scratch))
        except UnusableFileError as error:
            reasons.append(str(error))
    if not usable:
        others = f"; {len(reasons) - 1} other files cannot be used either" if len(reasons) > 1 else ""
        raise DataError(f"{reasons[0]}{others}")
    for line in reasons[:_NAMED]:
        print(line, file=sys.stderr)
    if len(reasons) > _NAMED:
        print(f"... and {len(reasons) - _NAMED} more files that cannot be used", file=sys.stderr)
    return usable, len(reasons)


def _part_size(found: Sequence[TextFile], across: bool, block: int) -> int:
    """Bytes of a part: small enough to shuffle and split a small corpus, large enough to fill blocks."""
    try:
        total = sum(file.path.stat().st_size for file in found)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    whole = _BYTES_PER_TOKEN * block
    least = _FEWEST_BLOCKS * whole if across else 1
    return min(max(total // _PARTS, least), _MOST_BLOCKS * whole)


def _tokenizer(arguments: argparse.Namespace, parts: Sequence[TextPart], documents: Documents) -> Tokenizer:
    if arguments.tokenizer is not None:
        return Tokenizer.load(arguments.tokenizer)
    if arguments.bytes:
        return Tokenizer.bytes()
    return train_bpe(_texts(parts, documents), arguments.train_tokenizer)


def _texts(parts: Sequence[TextPart], documents: Documents) -> Iterator[str]:
    """The documents of parts that are evenly spread over the corpus, up to a number of bytes."""
    total = sum(span.end - span.start for part in parts for span in part.spans)
    wanted = max(1, int(len(parts) * min(1.0, _TOKENIZER_BYTES / max(1, total))))
    for number in np.linspace(0, len(parts) - 1, wanted).round().astype(int):
        for one in read_documents(parts[number], documents):
            if isinstance(one, Document):
                yield one.text


def _estimate(parts: Sequence[TextPart], encode: PartEncoder) -> int:
    """About how many samples all parts make, from some of them."""
    chosen = np.linspace(0, len(parts) - 1, min(_PROBED, len(parts))).round().astype(int)
    made = sum(len(encode(parts[number]).samples) for number in chosen)
    return max(1, round(made * len(parts) / len(chosen)))


def _block(text: str) -> int:
    if not text.isdecimal() or int(text) < _LEAST_BLOCK:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens from {_LEAST_BLOCK} up")
    return int(text)


def _vocabulary(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 50000")
    return int(text)
