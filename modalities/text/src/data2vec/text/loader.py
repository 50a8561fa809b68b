"""From the bytes of a shard to token ids.

A sample is a block that was made ready when the shards were written (member ``tokens``: its ids, special tokens
included) or a document (member ``txt``: UTF-8, cut into tokens when it is read).

Layout of ``tokens``, little-endian: ``D2VT``, a byte of the format's version (1), a byte w of the ids' width in bytes
(2 or 4), two zero bytes, the number n of ids as uint32, then n unsigned ids of w bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data2vec.core.batch import Batch, Example, Sample, decode_label
from data2vec.core.errors import SampleError
from data2vec.core.hashing import derive
from data2vec.text.tokenizer import Tokenizer

EXTENSIONS = ("tokens", "txt")
PAIR = "pair"  # the second text of a sample with two
_HEADER = struct.Struct("<4sBBHI")  # magic, version, width, zero, count
_MAGIC, _VERSION = b"D2VT", 1
_TYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_WINDOW = 21  # stream of random numbers


@dataclass(frozen=True)
class TextDecoder:
    """Gives the ids of a sample: a pure function of the sample and the seed.

    Args:
        tokenizer_file: path of a ``tokenizer.json``; None: the tokens are the bytes of UTF-8.
        block: tokens that the model reads at most, the first (``<s>``) and the last (``</s>``) included; 3 or more.
        train: take a random part of a document that is longer than a block; else its beginning.
    """

    tokenizer_file: str | None
    block: int
    train: bool

    def __call__(self, sample: Sample, seed: int) -> Example:
        """``inputs``: (L,) int64 ids, L at most ``block``. ``label``: from the member ``cls``, a number in digits.

        Raises:
            SampleError: neither ``tokens`` nor ``txt``; a block that is damaged, longer than ``block``, or has an id
                beyond the vocabulary; a document that is not UTF-8; or nothing but special tokens.
        """
        label = decode_label(sample)
        if "tokens" in sample.members:
            ids = self._ready(sample.members["tokens"])
        elif "txt" in sample.members:
            ids = self._cut(sample.members, seed)
        else:
            found = ", ".join(sorted(sample.members)) or "none"
            raise SampleError(f"no text: members are {found}, expected one of {', '.join(EXTENSIONS)}")
        return Example(ids, label)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when the first sample is.

        Raises:
            DataError: the file is missing, or is no tokenizer with the special tokens.
        """
        return Tokenizer.bytes() if self.tokenizer_file is None else Tokenizer.load(self.tokenizer_file)

    def __getstate__(self) -> dict[str, object]:
        return {"tokenizer_file": self.tokenizer_file, "block": self.block, "train": self.train}

    def _ready(self, data: bytes) -> Tensor:
        ids = unpack_ids(data)
        if len(ids) > self.block:
            raise SampleError(
                f"a block of {len(ids)} tokens is longer than the {self.block} that the model reads; "
                f"write the shards with --block {self.block}, or let the model read {len(ids)}"
            )
        vocabulary = self.tokenizer.vocabulary
        if len(ids) and int(ids.max()) >= vocabulary:
            raise SampleError(
                f"token id {int(ids.max())} is beyond the tokenizer's vocabulary of {vocabulary}; "
                "use the tokenizer.json that lies beside the shards"
            )
        specials = np.array(sorted(self.tokenizer.specials - {self.tokenizer.unk}))
        if np.isin(ids, specials).all():
            raise SampleError("an empty document: it has nothing but special tokens")
        return torch.from_numpy(ids.astype(np.int64))

    def _cut(self, members: Mapping[str, bytes], seed: int) -> Tensor:
        """``<s> text </s>``, or ``<s> text </s></s> pair </s>``."""
        ids = self._ids(members["txt"])
        most = self.block - 2
        if PAIR in members:
            return self._joined(ids, self._ids(members[PAIR]))
        start = derive(seed, _WINDOW) % (len(ids) - most + 1) if self.train and len(ids) > most else 0
        return torch.tensor([self.tokenizer.bos, *ids[start : start + most], self.tokenizer.eos], dtype=torch.int64)

    def _joined(self, first: list[int], second: list[int]) -> Tensor:
        """A pair of texts as RoBERTa reads it; of the longer one tokens are left out until both fit."""
        bos, eos, room = self.tokenizer.bos, self.tokenizer.eos, self.block - 4
        if room < 2:
            raise SampleError(f"a pair of texts does not fit into {self.block} tokens")
        half = room // 2
        if len(first) + len(second) > room:
            keep = max(half, room - len(second))
            first = first[:keep]
            second = second[: room - len(first)]
        return torch.tensor([bos, *first, eos, eos, *second, eos], dtype=torch.int64)

    def _ids(self, data: bytes) -> list[int]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"txt is not UTF-8 (byte {error.start} of {len(data)}); convert it") from None
        if "\0" in text:
            raise SampleError("txt holds a zero character, which no text has; it is binary, or UTF-16 to convert")
        ids = self.tokenizer.encode(text.strip())
        if not ids:
            raise SampleError(f"an empty document: txt of {len(data)} bytes has no tokens")
        return ids


def pack_ids(ids: ArrayLike, vocabulary: int) -> bytes:
    """The member ``tokens`` of ids (n,): two bytes for each where the vocabulary has at most 65,536 ids, else four.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    values = np.asarray(ids)
    if values.ndim != 1 or (len(values) and not 0 <= values.min() <= values.max() < vocabulary):
        raise ValueError(f"ids {values.shape} are no list of ids below {vocabulary}")
    width = 2 if vocabulary <= 1 << 16 else 4
    return _HEADER.pack(_MAGIC, _VERSION, width, 0, len(values)) + values.astype(_TYPES[width]).tobytes()


def unpack_ids(data: bytes) -> NDArray[Any]:
    """The ids (n,), uint16 or uint32, in a member ``tokens``.

    Raises:
        SampleError: not such a member, of another version, or not as long as it says.
    """
    width, count = _header(data)
    return np.frombuffer(data, _TYPES[width], count, _HEADER.size)


def length_of(members: Mapping[str, bytes]) -> int | None:
    """Tokens of a sample from the header of its ``tokens``; None for a document, which is not cut yet.

    Raises:
        SampleError: ``tokens`` is damaged.
    """
    return _header(members["tokens"])[1] if "tokens" in members else None


def _header(data: bytes) -> tuple[int, int]:
    """Width and number of the ids, checked against the size."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise SampleError(f"tokens of {len(data)} bytes begin with {data[:4]!r}, not with {_MAGIC!r}; write them anew")
    _, version, width, zero, count = _HEADER.unpack_from(data)
    if version != _VERSION or width not in _TYPES or zero:
        raise SampleError(
            f"tokens of version {version} with ids of {width} bytes are unknown, this version reads {_VERSION} "
            "with 2 or 4; write them anew"
        )
    if len(data) != _HEADER.size + width * count:
        expected = _HEADER.size + width * count
        raise SampleError(f"tokens have {len(data)} bytes, {count} ids need {expected}: damaged; write them anew")
    return width, count


def collate_text(name: str, samples: Sequence[Sample], examples: Sequence[Example], *, pad: int) -> Batch:
    """A batch of texts, the shorter ones filled with ``pad``.

    Returns:
        ``inputs`` (B, L) int64, L the longest; ``lengths`` (B,) valid tokens; ``labels`` (B,), -1 where unknown.
    """
    lengths = torch.tensor([len(example.inputs) for example in examples], dtype=torch.int64)
    inputs = torch.nn.utils.rnn.pad_sequence([e.inputs for e in examples], batch_first=True, padding_value=pad)
    return Batch(
        modality=name,
        inputs=inputs,
        ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        labels=torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64),
        lengths=lengths,
        keys=tuple(f"{sample.shard}:{sample.key}" for sample in samples),
    )
