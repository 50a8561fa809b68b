"""Batches of samples of like length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.data.stream.lengths import LengthBatches
from data2vec.core.data.stream.order import Integers
from data2vec.core.errors import DataError

SHARDS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=6)


def batches(order: LengthBatches, first: int, count: int) -> list[tuple[Integers, Integers, Integers]]:
    return [order.locate([number]) for number in range(first, first + count)]


@settings(max_examples=100)
@given(SHARDS, st.integers(40, 200), st.integers(0, 2**63 - 1), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_has_every_sample_once_within_the_budget(shards, budget, seed, window, epoch):
    lengths = [np.array(shard) for shard in shards]
    order = LengthBatches(lengths, budget, seed, window)
    seen = []
    for epochs, numbers, indices in batches(order, epoch * order.total, order.total):
        assert set(epochs.tolist()) == {epoch}
        sizes = [int(lengths[shard][index]) for shard, index in zip(numbers, indices, strict=True)]
        assert max(sizes) * len(sizes) <= budget
        seen += list(zip(numbers.tolist(), indices.tolist(), strict=True))
    assert sorted(seen) == [(shard, index) for shard in range(len(shards)) for index in range(len(shards[shard]))]


@given(SHARDS, st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_any_batch_can_be_found_alone(shards, seed, number):
    """So a resumed run goes on anywhere, and ranks take turns."""
    lengths = [np.array(shard) for shard in shards]
    whole, alone = LengthBatches(lengths, 100, seed, 2), LengthBatches(lengths, 100, seed, 2)
    together = whole.locate(np.arange(number + 1))
    last = alone.locate([number])
    for all_of_it, part in zip(together, last, strict=True):
        assert all_of_it[len(all_of_it) - len(part) :].tolist() == part.tolist()


def test_padding_is_little_and_epochs_differ():
    lengths = [np.random.default_rng(shard).integers(10, 300, size=200) for shard in range(4)]
    order = LengthBatches(lengths, 3000, 0, 4)
    used = padded = 0
    for _, shards, indices in batches(order, 0, order.total):
        sizes = [int(lengths[s][i]) for s, i in zip(shards, indices, strict=True)]
        used, padded = used + sum(sizes), padded + max(sizes) * len(sizes)
    assert used > 0.93 * padded
    first, second = ([b[2].tolist() for b in batches(order, e * order.total, order.total)] for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_short_samples_are_left_out_and_long_ones_count_as_cropped():
    order = LengthBatches([np.array([0, 3, 9, 50, 100])], 60, 0, 1, (5, 20))
    samples = sorted(index for _, _, indices in batches(order, 0, order.total) for index in indices.tolist())
    assert samples == [2, 3, 4]
    with pytest.raises(DataError, match="as long as the 101"):
        LengthBatches([np.array([100])], 60, 0, 1, (101, None))
    with pytest.raises(DataError, match=r"length 100 is longer than train.micro_length=60"):
        LengthBatches([np.array([100])], 60, 0, 1)
