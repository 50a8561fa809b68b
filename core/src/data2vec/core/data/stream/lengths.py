"""Batches of samples of like length under a budget, as a function of one integer.

Padding wastes least when a batch holds samples of one length. The shards are dealt once, by the seed, into windows of
``shuffle_shards``; the samples of a window are sorted by length and cut into batches that hold at most ``budget``
with their padding. So there are equally many batches in every epoch, and the state of the stream is the number of
batches taken. An epoch permutes the windows and the batches of each; it visits every sample exactly once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from data2vec.core.data.stream.order import EpochOrder, Integers, permutation
from data2vec.core.errors import DataError

_log = logging.getLogger(__name__)
_WINDOWS, _TIES = 21, 22  # streams of random numbers


class LengthBatches:
    """Maps numbers of the endless stream of batches to the samples of each."""

    def __init__(
        self,
        lengths: Sequence[Integers],
        budget: int,
        seed: int,
        shuffle_shards: int,
        length_range: tuple[int, int | None] = (1, None),
    ) -> None:
        """Cut all samples into batches.

        Args:
            lengths: for each shard the input length of its samples, 0 where it is not known.
            budget: the longest sample's length times the number of samples is at most this.
            seed: decides every permutation.
            shuffle_shards: shards of a window.
            length_range: samples below the first are left out; longer ones than the second are cropped to it.

        Raises:
            DataError: no sample is left, or a single one is above the budget.
        """
        shortest, longest = length_range
        self.open_shards = shuffle_shards
        self.part, self.parts = 0, 1
        self._members: list[list[Integers]] = []  # (2, n) shard and index of the samples, for each window and batch
        dealt = permutation(len(lengths), seed, _WINDOWS)
        kept = total = 0
        for window, first in enumerate(range(0, len(dealt), shuffle_shards)):
            shards = dealt[first : first + shuffle_shards]
            places = np.stack([
                np.concatenate([np.full(len(lengths[shard]), shard, dtype=np.int64) for shard in shards]),
                np.concatenate([np.arange(len(lengths[shard]), dtype=np.int64) for shard in shards]),
            ])  # fmt: skip
            sizes = np.concatenate([lengths[shard] for shard in shards])
            total += len(sizes)
            usable = np.flatnonzero(sizes >= max(shortest, 1))
            kept += len(usable)
            if not len(usable):
                continue
            cut = sizes[usable] if longest is None else np.minimum(sizes[usable], longest)
            ties = permutation(len(usable), seed, _TIES, window)
            order = np.lexsort((ties, cut))
            self._members.append([places[:, usable[part]] for part in _parts(cut[order], order, budget)])
        if not self._members:
            raise DataError(f"none of {total} samples is as long as the {shortest} that training uses")
        if kept < total:
            _log.info(
                "%d of %d samples are shorter than %d, or of unknown length, and left out",
                total - kept,
                total,
                shortest,
            )
        self._order = EpochOrder([len(window) for window in self._members], seed, shuffle_shards=1)

    def share(self, part: int, parts: int) -> Self:
        """The same batches, of which only every ``parts``-th sample from ``part`` on is here: several ranks share one.

        Raises:
            DataError: a batch has fewer samples than that.
        """
        smallest = min(members.shape[1] for window in self._members for members in window)
        if smallest < parts:
            raise DataError(
                f"the smallest batch under train.micro_length has {smallest} samples, too few for {parts} ranks; "
                "use fewer ranks, or a smaller train.micro_length"
            )
        shared = copy.copy(self)
        shared.part, shared.parts = part, parts
        return shared

    @property
    def total(self) -> int:
        """Batches of one epoch."""
        return self._order.total

    def locate(self, positions: ArrayLike) -> tuple[Integers, Integers, Integers]:
        """Epoch, shard and index in the shard of every sample of the batches with these numbers."""
        epochs, windows, batches = self._order.locate(positions)
        members = [
            self._members[w][b][:, self.part :: self.parts]
            for w, b in zip(windows.tolist(), batches.tolist(), strict=True)
        ]
        repeated = np.repeat(epochs, [part.shape[1] for part in members])
        shards, indices = np.concatenate(members, axis=1)
        return repeated, shards, indices


def _parts(lengths: Integers, order: Integers, budget: int) -> list[Integers]:
    """Cut ``order``, by which ``lengths`` rise, into runs whose longest length times their number is in the budget."""
    if int(lengths[-1]) > budget:
        raise DataError(
            f"a sample of length {int(lengths[-1])} is longer than train.micro_length={budget}: "
            "raise it, or let the modality crop samples to less"
        )
    parts = []
    first = 0
    for end, length in enumerate(lengths.tolist()):
        if (end + 1 - first) * length > budget:
            parts.append(order[first:end])
            first = end
    return [*parts, order[first:]]
