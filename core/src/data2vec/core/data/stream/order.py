"""The order in which the samples of a run are visited, as a function of one integer.

Position i of the endless stream lies in epoch i // total. Each epoch permutes the shards; consecutive groups of
``shuffle_shards`` of them form a window, and the samples of a window are permuted among themselves. So an epoch
visits every sample exactly once, whoever reads which positions, only a window's shards are open at a time, and the
state of the stream is its position. Permutations come from Philox, a counter-based generator (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3") whose raw output NumPy keeps the same over versions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data2vec.core.errors import DataError
from data2vec.core.hashing import derive

Integers = NDArray[np.int64]
_SHARDS, _WINDOW = 1, 2  # streams of random numbers

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values used last, made on demand; ``drop`` is told what is let go."""

    def __init__(self, capacity: int, make: Callable[[K], V], drop: Callable[[V], None] | None = None) -> None:
        self._capacity, self._make, self._drop = capacity, make, drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __getitem__(self, key: K) -> V:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = self._make(key)
        if len(self._values) > self._capacity:
            _, oldest = self._values.popitem(last=False)
            if self._drop:
                self._drop(oldest)
        return value


def permutation(count: int, *numbers: int) -> Integers:
    """(count,) a random order of 0 ... count - 1, decided by ``numbers`` (seed, epoch, ...)."""
    raw = np.random.Philox(key=derive(*numbers)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


class EpochOrder:
    """Maps positions of the endless stream to samples."""

    def __init__(self, counts: Sequence[int], seed: int, shuffle_shards: int, shuffle: bool = True) -> None:
        """State the samples of each shard.

        Args:
            counts: samples of each shard; shards with none are never visited.
            seed: decides every permutation.
            shuffle_shards: shards of a window.
            shuffle: false visits shards and samples in their order in every epoch.

        Raises:
            DataError: no samples, or ``shuffle_shards`` below 1.
        """
        self.counts: Integers = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        if self.total < 1 or shuffle_shards < 1:
            raise DataError(f"there is no order of {self.total} samples in windows of {shuffle_shards} shards")
        self.seed, self.shuffle_shards, self.shuffle = seed, shuffle_shards, shuffle
        self.open_shards = shuffle_shards
        self._forget()

    def locate(self, positions: ArrayLike) -> tuple[Integers, Integers, Integers]:
        """Epoch, shard and index in the shard of each position.

        Args:
            positions: (N,) integers from 0 up, in any order.
        """
        flat: Integers = np.asarray(positions, dtype=np.int64)
        epochs = flat // self.total
        shards, indices = np.empty_like(flat), np.empty_like(flat)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shards[here], indices[here] = self._locate_in_epoch(int(epoch), flat[here] - epoch * self.total)
        return epochs, shards, indices

    def _locate_in_epoch(self, epoch: int, offsets: Integers) -> tuple[Integers, Integers]:
        order, ends = self._epochs[epoch]
        if self.shuffle:
            offsets = offsets.copy()
            window_ends = ends[self.shuffle_shards - 1 :: self.shuffle_shards]
            windows = np.searchsorted(window_ends, offsets, side="right")  # past the last full window: the rest
            for window in np.unique(windows):
                here = np.flatnonzero(windows == window)
                start = int(window_ends[window - 1]) if window else 0
                offsets[here] = start + self._windows[epoch, int(window)][offsets[here] - start]
        slots = np.searchsorted(ends, offsets, side="right")
        shards = order[slots]
        return shards, offsets - ends[slots] + self.counts[shards]

    def _make_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """The shards in this epoch's order, and the number of samples up to and including each."""
        count = len(self.counts)
        order = permutation(count, self.seed, _SHARDS, epoch) if self.shuffle else np.arange(count, dtype=np.int64)
        return order, np.cumsum(self.counts[order])

    def _make_window(self, key: tuple[int, int]) -> Integers:
        epoch, window = key
        order, _ = self._epochs[epoch]
        shards = order[window * self.shuffle_shards : (window + 1) * self.shuffle_shards]
        return permutation(int(self.counts[shards].sum()), self.seed, _WINDOW, epoch, window)

    def _forget(self) -> None:
        self._epochs: Recent[int, tuple[Integers, Integers]] = Recent(2, self._make_epoch)
        self._windows: Recent[tuple[int, int], Integers] = Recent(4, self._make_window)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_epochs", "_windows")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()
