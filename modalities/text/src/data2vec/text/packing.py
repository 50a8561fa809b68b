"""From documents to blocks of bounded length: pure functions of arrays.

A block is ``<s> ... </s>``. *Within*: a block holds one document or a piece of it. *Across*: the documents follow one
another, ``</s>`` between them, and the stream is cut into full blocks; only the last may be short.

Shapes: n tokens of a document, L tokens of a block, special tokens included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]  # of any integer type

LEAST = 3
"""Tokens of the shortest block: the two special tokens and one of text."""


class Packing(StrEnum):
    """``across``: full blocks that span documents. ``within``: no block crosses the end of a document."""

    ACROSS = "across"
    WITHIN = "within"


def pack(documents: Iterable[Ids], packing: Packing, *, block: int, bos: int, eos: int) -> list[Ids]:
    """Blocks of at most ``block`` tokens that hold every token of the documents once and in order.

    Args:
        documents: (n,) ids each, without special tokens; those with n = 0 add nothing.
        packing: how documents and blocks meet.
        block: L at most.
        bos: id of ``<s>``.
        eos: id of ``</s>``.

    Raises:
        ValueError: ``block`` below 3.
    """
    if block < LEAST:
        raise ValueError(f"a block of {block} tokens has no room beside its special tokens; choose {LEAST} or more")
    filled = [np.asarray(document, dtype=np.int64) for document in documents if len(document)]
    if packing is Packing.WITHIN:
        return [b for document in filled for b in _blocks(document, block, bos, eos)]
    return _blocks(_joined(filled, eos), block, bos, eos)


def documents_in(blocks: Sequence[Ids], *, eos: int) -> Iterator[Ids]:
    """The documents (n,) that :func:`pack` put into blocks, across them.

    The inverse of ``across``. Of ``within`` it gives one document in the same way, all of whose blocks are given.
    """
    stream = np.concatenate([np.asarray(block)[1:-1] for block in blocks]) if blocks else np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(stream == eos)
    start = 0
    for end in [*ends.tolist(), len(stream)]:
        if end > start:
            yield stream[start:end]
        start = end + 1


def _joined(documents: Sequence[Ids], eos: int) -> Ids:
    """(n,) the documents one after another, with ``eos`` between them."""
    if not documents:
        return np.zeros(0, dtype=np.int64)
    ends = np.cumsum([len(document) for document in documents])
    between = ends[:-1]  # np.insert puts the separator before this position of the plain stream
    joined: Ids = np.insert(np.concatenate(documents), between, eos)
    return joined


def _blocks(stream: Ids, block: int, bos: int, eos: int) -> list[Ids]:
    """A stream (n,) cut into ceil(n / (block - 2)) blocks."""
    if not len(stream):
        return []
    room = block - 2
    full = len(stream) // room
    table = np.empty((full, block), dtype=np.int64)
    table[:, 0], table[:, -1] = bos, eos
    table[:, 1:-1] = stream[: full * room].reshape(full, room)
    blocks: list[Ids] = list(table)
    if len(stream) > full * room:
        blocks.append(np.concatenate(([bos], stream[full * room :], [eos])))
    return blocks
