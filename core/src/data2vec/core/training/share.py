"""The share that each rank has of a recipe's batch: it stays the same, whatever their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import TrainConfig


@dataclass(frozen=True)
class Share:
    """The part of an update that one rank does.

    ``passes``: forward passes. ``micro_batch``: samples of one; 0 where ``train.micro_length`` decides. ``taken``: how
    far the update moves the position in the data of all ranks (samples, or batches of like length). ``parts``: ranks
    that share one batch of like length.
    """

    passes: int
    micro_batch: int
    taken: int
    parts: int = 1

    @classmethod
    def of(cls, train: TrainConfig, world: int) -> Self:
        """The share of each of ``world`` ranks.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        if train.micro_batches is not None:
            return cls._of_lengths(train, train.micro_batches, world)
        if train.batch % world:
            raise ConfigError(
                [f"train.batch={train.batch}: cannot be shared equally by {world} ranks; choose a multiple of {world}"]
            )
        of_rank = train.batch // world
        micro = min(train.micro_batch or of_rank, of_rank)
        while of_rank % micro:  # 2048 on 3 * 2^k ranks: the next smaller that divides
            micro -= 1
        return cls(of_rank // micro, micro, train.batch)

    @classmethod
    def _of_lengths(cls, train: TrainConfig, batches: int, world: int) -> Self:
        if batches % world == 0:
            return cls(batches // world, 0, batches)
        if world % batches == 0:
            return cls(1, 0, batches, parts=world // batches)
        raise ConfigError(
            [f"train.batch_length={train.batch_length}: {batches} forward passes of train.micro_length="
             f"{train.micro_length} cannot be shared equally by {world} ranks; choose a divisor or a multiple of "
             f"{batches} ranks, or another train.micro_length"]
        )  # fmt: skip

    def describe(self, world: int) -> str:
        """One line on how the recipe's batch comes about."""
        size = f"{self.micro_batch:,} samples" if self.micro_batch else "one batch of like length"
        if self.parts > 1:
            size = f"a part of one batch of like length, {self.parts} ranks for each"
        passes = f"{self.passes} forward pass{'es' if self.passes > 1 else ''}"
        return f"{world} rank{'s' if world > 1 else ''}, each {passes} of {size} an update"
