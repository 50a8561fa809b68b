"""The order of samples: a permutation per epoch, a pure function of the position."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.data.stream.order import EpochOrder
from data2vec.core.errors import DataError

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda values: sum(values) > 0)


def visits(order: EpochOrder, positions: object) -> list[tuple[int, int, int]]:
    return list(zip(*(array.tolist() for array in order.locate(positions)), strict=True))


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 2**63), st.integers(1, 15), st.booleans(), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(
    values: list[int], seed: int, shuffle_shards: int, shuffle: bool, epoch: int
) -> None:
    order = EpochOrder(values, seed, shuffle_shards, shuffle)
    found = visits(order, np.arange(epoch * order.total, (epoch + 1) * order.total))
    every = [(epoch, shard, index) for shard, count in enumerate(values) for index in range(count)]
    assert sorted(found) == every
    if not shuffle:
        assert found == every


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 99), st.integers(1, 5), st.data())
def test_a_position_alone_decides(values: list[int], seed: int, shuffle_shards: int, data: st.DataObject) -> None:
    order = EpochOrder(values, seed, shuffle_shards)
    whole = visits(order, np.arange(3 * order.total))
    picked = data.draw(st.lists(st.integers(0, 3 * order.total - 1), max_size=20))
    fresh = pickle.loads(pickle.dumps(order))
    assert visits(fresh, picked) == [whole[position] for position in picked]


def test_epochs_and_seeds_differ() -> None:
    def sequence(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = EpochOrder([10] * 10, seed, 3)
        return [(s, i) for _, s, i in visits(order, np.arange(100 * epoch, 100 * epoch + 100))]

    sequences = [sequence(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(a != b for n, a in enumerate(sequences) for b in sequences[:n])


def test_a_window_holds_few_shards_and_mixes_them() -> None:
    order = EpochOrder([50] * 40, 0, 4)
    _, shards, _ = order.locate(np.arange(2000))
    for window in shards.reshape(10, 200):
        assert len(set(window.tolist())) == 4
        assert np.abs(np.diff(window)).astype(bool).mean() > 0.6  # neighbours mostly come from other shards


def test_a_large_set_is_not_materialised() -> None:
    order = EpochOrder([10_000] * 10_000, 0, 16)
    began = time.perf_counter()
    epochs, shards, indices = order.locate(np.arange(10**8 - 1000, 10**8 + 1000))
    assert time.perf_counter() - began < 5
    assert set(epochs.tolist()) == {0, 1}
    assert len(set(zip(epochs.tolist(), shards.tolist(), indices.tolist(), strict=True))) == 2000


def test_an_order_of_nothing_is_an_error() -> None:
    for values, shuffle_shards in (([], 1), ([0], 1), ([3], 0)):
        with pytest.raises(DataError, match="there is no order"):
            EpochOrder(values, 0, shuffle_shards)
