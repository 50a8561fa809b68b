"""Members of a shard become token ids; what is broken is one SampleError that says why."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.batch import Example, Sample
from data2vec.core.errors import DataError, SampleError
from data2vec.text.loader import EXTENSIONS, TextDecoder, collate_text, length_of, pack_ids, unpack_ids
from data2vec.text.tokenizer import Tokenizer, train_bpe

BYTES = Tokenizer.bytes()


def sample(**members: bytes) -> Sample:
    return Sample("key", "shard.tar", 7, members)


def decoder(block: int = 12, *, train: bool = False, file: str | None = None) -> TextDecoder:
    return TextDecoder(file, block, train)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.integers(1, 2**32))
def test_ids_survive_their_member(ids: list[int], vocabulary: int) -> None:
    ids = [token % vocabulary for token in ids]
    member = pack_ids(ids, vocabulary)
    assert unpack_ids(member).tolist() == ids
    assert length_of({"tokens": member, "cls": b"1"}) == len(ids)
    assert len(member) == 12 + len(ids) * (2 if vocabulary <= 65_536 else 4)


@given(st.binary(max_size=40))
def test_damaged_members_never_pass(data: bytes) -> None:
    good = pack_ids([0, 9, 9, 2], 300)
    for broken in (data, good[:4] + data, good + data + b"x", good[:-1], b"D2VT" + data):
        with pytest.raises(SampleError, match="tokens"):
            unpack_ids(broken)
        with pytest.raises(SampleError, match="tokens"):
            length_of({"tokens": broken})


@pytest.mark.parametrize("ids", [[5, 300], [-1], [[1, 2]]])
def test_ids_that_do_not_fit_are_not_written(ids: list) -> None:
    with pytest.raises(ValueError, match="ids"):
        pack_ids(ids, 300)


def test_a_ready_block_is_read_as_it_is() -> None:
    ids = [0, *BYTES.encode("ab"), 2, *BYTES.encode("c"), 2]
    example = decoder()(sample(tokens=pack_ids(ids, 261), cls=b"3"), 0)
    assert example.inputs.dtype == torch.int64
    assert example.inputs.tolist() == ids
    assert example.label == 3
    assert decoder()(sample(tokens=pack_ids(ids, 261), cls=b"seven"), 0).label is None
    assert length_of({"txt": b"abc"}) is None
    assert EXTENSIONS == ("tokens", "txt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"1"}, "no text: members are cls"),
        ({"tokens": pack_ids([0, 5, 261, 2], 300)}, "id 261 is beyond the tokenizer's vocabulary of 261"),
        ({"tokens": pack_ids([0] + [9] * 12, 300)}, "block of 13 tokens is longer than the 12"),
        ({"tokens": pack_ids([0, 2], 300)}, "empty document"),
        ({"tokens": pack_ids([], 300)}, "empty document"),
        ({"tokens": b"no"}, "write them anew"),
        ({"txt": b"a\xff"}, r"not UTF-8 \(byte 1 of 2\)"),
        ({"txt": b" \n"}, "empty document"),
    ],
)
def test_every_fault_of_a_sample_is_named(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        decoder()(sample(**members), 0)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(0, 2**63 - 1), st.booleans())
def test_a_document_gives_a_window_of_itself(text: str, seed: int, train: bool) -> None:
    tokens = BYTES.encode(text.strip())
    if not tokens:
        return
    example = decoder(train=train)(sample(txt=text.encode()), seed)
    ids = example.inputs.tolist()
    inside = ids[1:-1]
    assert (ids[0], ids[-1]) == (BYTES.bos, BYTES.eos)
    assert len(inside) == min(len(tokens), 10)
    starts = range(len(tokens) - len(inside) + 1) if train else range(1)
    assert inside in [tokens[start : start + len(inside)] for start in starts]
    assert decoder(train=train)(sample(txt=text.encode()), seed).inputs.tolist() == ids


def test_training_windows_move_over_the_whole_document() -> None:
    text = bytes(range(65, 90))
    found = {decoder(train=True)(sample(txt=text), seed).inputs[1].item() for seed in range(400)}
    assert found == set(range(65 + 5, 65 + 5 + 25 - 10 + 1))


def test_a_tokenizer_file_is_read_in_the_worker(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the student and the teacher"] * 3, 280)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.content)
    mine = decoder(file=str(path))
    text = sample(txt=b"the student")
    before = mine(text, 0).inputs
    copy = pickle.loads(pickle.dumps(mine))
    assert "tokenizer" not in vars(copy)  # the file's path travels, not its content
    assert torch.equal(copy(text, 0).inputs, before)
    assert before.tolist() == [0, *tokenizer.encode("the student"), 2]
    with pytest.raises(DataError, match="cannot be read"):
        decoder(file=str(tmp_path / "gone"))(text, 0)


def test_a_batch_is_filled_with_padding() -> None:
    lengths = [3, 5, 1]
    samples = [Sample(str(n), "s.tar", n, {}) for n in range(3)]
    examples = [Example(torch.arange(n) + 10, None if n == 5 else n) for n in lengths]
    batch = collate_text("text", samples, examples, pad=1)
    assert batch.inputs.tolist() == [[10, 11, 12, 1, 1], [10, 11, 12, 13, 14], [10, 1, 1, 1, 1]]
    assert batch.lengths is not None
    assert (batch.lengths.tolist(), batch.labels.tolist(), batch.ids.tolist()) == (lengths, [3, -1, 1], [0, 1, 2])
    assert batch.inputs.dtype == batch.lengths.dtype == torch.int64
    assert batch.keys == ("s.tar:0", "s.tar:1", "s.tar:2")
    assert batch.modality == "text"


def test_ids_are_little_endian_on_every_machine() -> None:
    member = pack_ids(np.array([1, 258]), 300)
    assert member == b"D2VT\x01\x02\x00\x00\x02\x00\x00\x00\x01\x00\x02\x01"
