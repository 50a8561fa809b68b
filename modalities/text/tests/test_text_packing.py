"""Documents become blocks: no token is lost, doubled or moved, and every block is one the model can read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data2vec.text.packing import Packing, documents_in, pack

BOS, EOS = 0, 2
documents = st.lists(st.lists(st.integers(5, 40), max_size=30), max_size=12)
blocks = st.integers(3, 20)


def packed(texts: list[list[int]], packing: Packing, block: int) -> list[list[int]]:
    arrays = [np.array(text, dtype=np.uint16) for text in texts]
    return [one.tolist() for one in pack(arrays, packing, block=block, bos=BOS, eos=EOS)]


@given(documents, blocks, st.sampled_from(Packing))
def test_blocks_are_well_formed(texts: list[list[int]], block: int, packing: Packing) -> None:
    for one in packed(texts, packing, block):
        assert 3 <= len(one) <= block
        assert (one[0], one[-1]) == (BOS, EOS)
        assert BOS not in one[1:]
        if packing is Packing.WITHIN:
            assert EOS not in one[:-1]


@given(documents, blocks, st.sampled_from(Packing))
def test_no_token_is_lost_doubled_or_moved(texts: list[list[int]], block: int, packing: Packing) -> None:
    tokens = [token for one in packed(texts, packing, block) for token in one if token not in (BOS, EOS)]
    assert tokens == [token for text in texts for token in text]


@given(documents, blocks)
def test_across_fills_its_blocks_and_comes_back(texts: list[list[int]], block: int) -> None:
    found = packed(texts, Packing.ACROSS, block)
    assert all(len(one) == block for one in found[:-1])
    assert [document.tolist() for document in documents_in(found, eos=EOS)] == [text for text in texts if text]
    ends = [token for one in found for token in one[1:-1] if token == EOS]
    assert len(ends) == max(0, sum(map(bool, texts)) - 1)  # between documents only


@given(documents, blocks)
def test_within_cuts_every_document_by_itself(texts: list[list[int]], block: int) -> None:
    assert packed(texts, Packing.WITHIN, block) == [
        one for text in texts for one in packed([text], Packing.WITHIN, block)
    ]
    for text in texts:
        found = packed([text], Packing.WITHIN, block)
        assert len(found) == -(-len(text) // (block - 2))
        assert all(len(one) == block for one in found[:-1])
        assert [document.tolist() for document in documents_in(found, eos=EOS)] == ([text] if text else [])


def test_an_example() -> None:
    texts = [[10, 11, 12], [], [20]]
    assert packed(texts, Packing.ACROSS, 5) == [[0, 10, 11, 12, 2], [0, 2, 20, 2]]
    assert packed(texts, Packing.WITHIN, 4) == [[0, 10, 11, 2], [0, 12, 2], [0, 20, 2]]


def test_ids_of_a_large_vocabulary_survive() -> None:
    document = np.array([70_000, 4_000_000_000], dtype=np.uint32)
    assert pack([document], Packing.WITHIN, block=9, bos=0, eos=2)[0].tolist() == [0, 70_000, 4_000_000_000, 2]


def test_a_block_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="block of 2 tokens"):
        pack([], Packing.ACROSS, block=2, bos=0, eos=2)
