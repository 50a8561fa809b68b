"""Batches for training and evaluation.

    data = TrainData.open("shards/train-*.tar", modality, data=config.data, seed=0, cache=folder)
    for batch in data.batches(position, micro_batch=64, rank=rank, world=world): ...

The samples of update u, accumulation step a and rank r are those at positions ((u * accumulation + a) * world + r) *
micro_batch and following, so a run is resumed by its position alone, whatever the number of loader workers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Self

import numpy as np

from data2vec.core.batch import Batch
from data2vec.core.data.shards.inputs import Inputs
from data2vec.core.data.shards.opened import Progress, ShardSet, open_shards
from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.remote.transfer import Limits
from data2vec.core.data.stream.lengths import LengthBatches
from data2vec.core.data.stream.order import EpochOrder, Integers, permutation
from data2vec.core.data.stream.reading import SampleReader, ShardDataset
from data2vec.core.data.stream.workers import evaluation_batches, training_batches
from data2vec.core.errors import DataError
from data2vec.core.modality import Modality
from data2vec.core.settings.fields import DataConfig

_log = logging.getLogger(__name__)
_HELD_OUT_SHARDS = 8  # fewer shards than this could hold too few classes to stand for the whole
_HELD_OUT, _SUBSET = 11, 12  # streams of random numbers; fixed, so that runs with other seeds evaluate the same samples


@dataclass(frozen=True, eq=False)
class ShardData:
    """Samples of a set of shards: all of them, or a chosen part of each."""

    shards: ShardSet
    modality: Modality
    config: DataConfig
    seed: int
    chosen: tuple[Integers | None, ...]  # for each shard the numbers of its samples that belong here, None for all
    keep: tuple[str, ...] = ()  # members that batches hold as they are

    @classmethod
    def open(
        cls,
        spec: str,
        modality: Modality,
        *,
        data: DataConfig,
        seed: int,
        cache: Path,
        progress: Progress | None = None,
    ) -> Self:
        """Find and check the shards, before anything is trained.

        Args:
            spec: a folder, path, glob, brace list or URL, or several joined by ``::``.
            modality: decodes the samples.
            data: workers, shuffling and the share of broken samples that is accepted.
            seed: of the order and the augmentation.
            cache: folder for fetched shards, unless ``data.cache`` names one.
            progress: called with (done, total) as shards without an index are counted.

        Raises:
            DataError: a shard is missing, truncated, empty, or of another modality, or too many samples have no input.
        """
        kept = _cache(data, cache)
        shards = open_shards(
            spec,
            modality.name,
            kept,
            *([progress] if progress else []),
            inputs=Inputs.of(modality, data.member),
            max_broken=data.max_broken,
        )
        return cls(shards, modality, data, seed, (None,) * len(shards.shards))

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard that belong here."""
        return tuple(n if part is None else len(part) for n, part in zip(self.shards.counts, self.chosen, strict=True))

    @property
    def total(self) -> int:
        """Samples of one epoch, broken ones included."""
        return sum(self.counts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class numbers; empty where the shards have none."""
        return self.shards.class_names

    @property
    def fingerprint(self) -> str:
        """Changes with the shards and the chosen part: a saved position belongs to data with the same fingerprint."""
        digest = hashlib.sha256(self.shards.fingerprint.encode())
        for part in self.chosen:
            digest.update(b"all" if part is None else part.astype("<i8").tobytes())
        return digest.hexdigest()

    def _dataset(self, order: EpochOrder | LengthBatches | None = None, *, train: bool) -> ShardDataset:
        order = order or EpochOrder(self.counts, self.seed, self.config.shuffle_shards, shuffle=train)
        return ShardDataset(self.shards, self.chosen, order, self.modality, self.seed, train=train, keep=self.keep)

    def _numbers(self) -> list[Integers]:
        """For each shard the numbers of its samples that belong here."""
        counts = zip(self.shards.counts, self.chosen, strict=True)
        return [np.arange(total, dtype=np.int64) if part is None else part for total, part in counts]

    def annotations(self, *members: str) -> list[list[Mapping[str, bytes]]]:
        """For each shard what its samples that belong here have of some members, read without the rest.

        Raises:
            DataError: a shard cannot be read.
        """
        reader = SampleReader(self.shards, open_tables=1)
        return [
            [reader.annotations(shard, number, members) for number in numbers.tolist()]
            for shard, numbers in enumerate(self._numbers())
        ]

    def chosen_of(self, wanted: Sequence[Sequence[bool]]) -> Self:
        """Those samples alone for which ``wanted`` (for each shard, for each of its samples here) is true."""
        kept = tuple(own[np.asarray(w, dtype=bool)] for own, w in zip(self._numbers(), wanted, strict=True))
        return replace(self, chosen=kept)

    def lengths(self) -> list[Integers]:
        """For each shard the input length of its samples that belong here.

        Raises:
            DataError: a shard's index does not say.
        """
        found = []
        for shard, part in zip(self.shards.shards, self.chosen, strict=True):
            if shard.info is None or not shard.info.lengths:
                raise DataError(
                    f"{shard.location}: no index gives the lengths of its samples, which train.micro_length needs; "
                    f"write it with `tools/shard.py index FOLDER --modality {self.modality.name}`"
                )
            lengths = np.asarray(shard.info.lengths, dtype=np.int64)
            found.append(lengths if part is None else lengths[part])
        return found


@dataclass(frozen=True, eq=False)
class TrainData(ShardData):
    """An endless, shuffled, resumable stream of augmented samples."""

    def require(self, batch: int, name: str = "train.batch") -> None:
        """Check that one update does not need more samples than there are.

        Raises:
            DataError: it does.
        """
        if self.total < batch:
            raise DataError(
                f"{self.shards.spec} has {self.total} samples, one update needs {name}={batch}: "
                f"lower {name} to at most {self.total}, or add data"
            )

    def batches(
        self, start_position: int, micro_batch: int, rank: int = 0, world: int = 1, *, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """This rank's batches from a position on, without end.

        Broken samples are missing from their batch and named in ``Batch.broken``.

        Args:
            start_position: samples that all ranks together have taken before.
            micro_batch: samples of one batch of one rank.
            rank: of ``world``.
            world: ranks that read together; each takes every ``world``-th micro-batch.
            pin_memory: page-locked tensors, for a GPU.

        Raises:
            DataError: fewer samples than one step of all ranks needs; on reading, a shard that became unreadable, a
                batch in which every sample is broken, or a worker that died.
        """
        self.require(micro_batch * world, "micro_batch * ranks")
        dataset = self._dataset(train=True)
        positions = (
            np.arange(first, first + micro_batch, dtype=np.int64)
            for first in count(start_position + rank * micro_batch, world * micro_batch)
        )
        return training_batches(dataset, positions, self.config.workers, pin_memory)

    def length_batches(
        self,
        start_batch: int,
        micro_length: int,
        rank: int = 0,
        world: int = 1,
        *,
        parts: int = 1,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """This rank's batches of samples of like length from a batch on, without end.

        Args:
            start_batch: batches that all ranks together have taken before.
            micro_length: input lengths of one batch, padding included.
            rank: of ``world``; each takes every ``world``-th batch.
            world: see ``rank``.
            parts: so many ranks share each batch instead; divides ``world``.
            pin_memory: page-locked tensors, for a GPU.

        Raises:
            DataError: as :meth:`batches`; also a shard without lengths, or a sample longer than ``micro_length``.
        """
        order = LengthBatches(
            self.lengths(), micro_length, self.seed, self.config.shuffle_shards, self.modality.length_range
        )
        if parts > 1:
            order = order.share(rank % parts, parts)
        batches = count(start_batch + rank // parts, world // parts)
        numbers = (np.array([number], dtype=np.int64) for number in batches)
        return training_batches(self._dataset(order, train=True), numbers, self.config.workers, pin_memory)

    def hold_out(self, share: float) -> tuple[Self, EvaluationData]:
        """Split off samples for evaluation; the split depends on the shards alone, not on the seed.

        Whole shards are held out where that gives enough of them, else a part of every shard.

        Args:
            share: of the samples, in (0, 1).

        Raises:
            DataError: one side would have no samples.
        """
        names = [_number(shard.name) for shard in self.shards.shards]
        whole = round(share * len(names))
        held: list[Integers]
        if whole >= _HELD_OUT_SHARDS:
            out = set(np.argsort(names)[:whole].tolist())
            every = (np.arange(n, dtype=np.int64) for n in self.counts)
            held = [numbers if i in out else numbers[:0] for i, numbers in enumerate(every)]
        else:
            held = [np.sort(permutation(n, _HELD_OUT, name)[: _share(n, share, name)])
                    for n, name in zip(self.counts, names, strict=True)]  # fmt: skip
        own = self._numbers()
        kept = tuple(np.delete(numbers, h) for numbers, h in zip(own, held, strict=True))
        split = tuple(numbers[h] for numbers, h in zip(own, held, strict=True))
        train = replace(self, chosen=kept)
        evaluation = EvaluationData(self.shards, self.modality, self.config, self.seed, split, self.keep)
        if not train.total or not evaluation.total:
            raise DataError(
                f"{self.shards.spec}: {self.total} samples leave {train.total} for training and {evaluation.total} for "
                f"evaluation when {share:g} of them is held out; name data.validation"
            )
        return train, evaluation

    def for_evaluation(self) -> EvaluationData:
        """The same samples, in their order and without augmentation."""
        return EvaluationData(self.shards, self.modality, self.config, self.seed, self.chosen, self.keep)


@dataclass(frozen=True, eq=False)
class EvaluationData(ShardData):
    """A finite set of samples in their order, without augmentation."""

    def evaluation_batches(
        self, batch: int, max_samples: int | None = None, *, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """Every sample once, or ``max_samples`` of them spread over the whole set, always the same ones.

        The last batch may be smaller; so is one with broken samples, which ``Batch.broken`` names.

        Raises:
            DataError: a shard became unreadable, a worker died, or every sample is broken.
        """
        total = self.total
        if total < 1 or batch < 1:
            raise DataError(f"{self.shards.spec}: {total} samples cannot be evaluated in batches of {batch}")
        wanted = total if max_samples is None else min(max(1, max_samples), total)
        positions = spaced(total, wanted)
        parts = (positions[first : first + batch] for first in range(0, wanted, batch))
        workers = min(self.config.workers, -(-wanted // batch))
        return evaluation_batches(self._dataset(train=False), parts, workers, pin_memory)

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of this set; when they have been read, how many samples were broken is said, once for the set."""
        seen = broken = 0
        example = ""
        try:
            for batch in batches:
                seen += len(batch) + len(batch.broken)
                broken += len(batch.broken)
                example = example or next(iter(batch.broken), "")
                yield batch
        finally:
            if broken:
                kind = f"broken {self.shards.spec}"
                self.shards.remark(kind, f"{broken} of {seen} samples are broken and not evaluated, as {example}")


class BrokenCounter:
    """Names broken samples in the log and stops a run that has too many."""

    def __init__(self, max_share: float, total: int) -> None:
        """Accept a share of broken samples.

        Args:
            max_share: ``data.max_broken``.
            total: samples of an epoch; the share is judged after 100 samples, or an epoch where that is shorter.
        """
        self.max_share = max_share
        self.seen = 0
        self.broken = 0
        self._judged_after = min(100, total)
        self._named = 0
        self._last = ""

    def add(self, batch: Batch) -> None:
        """Name and count a batch of a single rank.

        Raises:
            DataError: see :meth:`judge`.
        """
        self.name(batch)
        self.judge(len(batch) + len(batch.broken), len(batch.broken))

    def name(self, batch: Batch) -> None:
        """Log a batch's broken samples: this rank's first 20, then every 100th."""
        for line in batch.broken:
            self._named += 1
            self._last = line
            if self._named <= 20 or self._named % 100 == 0:
                _log.warning("broken sample %d skipped: %s", self._named, line)

    def judge(self, seen: int, broken: int) -> None:
        """Count samples of all ranks, broken ones included in ``seen``.

        Raises:
            DataError: the share of broken samples is above ``max_share``.
        """
        self.seen += seen
        self.broken += broken
        if broken and self.seen >= self._judged_after:
            self.finish()

    def finish(self) -> None:
        """Judge what was counted, however little it is: nothing more will come.

        Raises:
            DataError: the share of broken samples is above ``max_share``.
        """
        if self.broken > self.max_share * self.seen:
            last = f"; the last: {self._last}" if self._last else ""
            raise DataError(
                f"{self.broken} of {self.seen} samples are broken, more than data.max_broken={self.max_share:g} "
                f"allows{last}; mend the shards, or raise data.max_broken"
            )


def _cache(data: DataConfig, folder: Path) -> ShardCache:
    return ShardCache(
        Path(data.cache).expanduser() if data.cache else folder,
        None if data.cache_gb is None else int(data.cache_gb * 10**9),
        Limits(seconds=60 * data.fetch_minutes, largest=int(data.fetch_gb * 10**9)),
    )


def spaced(total: int, count: int) -> Integers:
    """(count,) increasing numbers below ``total``, one at random from each of ``count`` equal parts."""
    edges = np.arange(count + 1, dtype=np.int64) * total // count
    raw = np.random.Philox(key=_SUBSET).random_raw(count)
    return edges[:-1] + (raw % np.diff(edges).astype(np.uint64)).astype(np.int64)


def _share(samples: int, share: float, name: int) -> int:
    """``share`` of the samples of a shard, rounded up or down at random so that many small shards add up to it."""
    exact = samples * share
    return int(exact) + ((name % 1_000_003) / 1_000_003 < exact % 1)


def _number(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
