"""From positions of the order to decoded batches; this is what runs in loader workers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from data2vec.core.batch import Batch, Example, Sample, label_problem
from data2vec.core.data.shards.opened import ShardSet
from data2vec.core.data.shards.tar import TarSample, read, scan
from data2vec.core.data.stream.lengths import LengthBatches
from data2vec.core.data.stream.order import EpochOrder, Integers, Recent
from data2vec.core.errors import Data2VecError, DataError, SampleError, masked, one_line
from data2vec.core.hashing import derive
from data2vec.core.modality import Modality

_OPEN_FILES = 64  # a process may have 1,024 on most machines
_SHOWN = 3  # broken samples named in an error


@dataclass(frozen=True)
class Unreadable:
    """The result of a worker that could not make a batch; exceptions would arrive with a traceback as text.

    ``broken`` is set where the only reason is that every sample of the batch is broken.
    """

    message: str
    broken: tuple[str, ...] = ()


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch (CPU) as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU): augmentation libraries draw from all three."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generator too


class SampleReader:
    """Random access to the samples of a set of shards. Each process opens its own files."""

    def __init__(self, shards: ShardSet, open_tables: int) -> None:
        """Nothing is opened yet; ``open_tables`` is how many shards' tables of offsets are kept in memory."""
        self.shards = shards
        self.open_tables = open_tables
        self._forget()

    def table(self, shard: int) -> list[TarSample]:
        """The samples of a shard.

        Raises:
            DataError: the shard cannot be read, or is not the one that was counted.
        """
        return self._tables[shard]

    def read(self, shard: int, index: int) -> Sample:
        """One sample.

        Raises:
            SampleError: it has no member that may be read, or no input.
            DataError: the shard cannot be read.
        """
        entry = self._tables[shard][index]
        if entry.problem is not None:
            raise SampleError(entry.problem)
        return read(self._files[shard].number, entry, self.shards.shards[shard].name)

    def annotations(self, shard: int, index: int, members: Sequence[str]) -> Mapping[str, bytes]:
        """Read those of one sample's members that it has, and nothing else of it.

        Raises:
            DataError: the shard cannot be read.
        """
        entry = self._tables[shard][index]
        wanted = {name: entry.members[name] for name in members if name in entry.members}
        if entry.problem is not None or not wanted:
            return {}
        return read(self._files[shard].number, TarSample(entry.key, wanted), self.shards.shards[shard].name).members

    def _scan(self, shard: int) -> list[TarSample]:
        with self.shards.held(shard) as path:
            table = scan(path)
        expected = self.shards.shards[shard].samples
        if len(table) != expected:
            location = self.shards.shards[shard].location
            raise DataError(
                f"{location}: has {len(table)} samples, not the {expected} that were counted; "
                "index the set again (tools/shard.py index)"
            )
        inputs = self.shards.inputs
        return table if inputs is None else [inputs.present(sample) for sample in table]

    def _open(self, shard: int) -> _File:
        return _File(self.shards, shard)

    def _forget(self) -> None:
        self._tables: Recent[int, list[TarSample]] = Recent(self.open_tables, self._scan)
        self._files: Recent[int, _File] = Recent(min(_OPEN_FILES, self.open_tables), self._open)

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "open_tables": self.open_tables}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()


class _File:
    """An open file descriptor that is closed with its last reference."""

    number = -1

    def __init__(self, shards: ShardSet, shard: int) -> None:
        with shards.held(shard) as path:
            try:
                self.number = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{path}: cannot be opened ({error.strerror})") from None

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardDataset(Dataset[Batch | Unreadable]):
    """Map-style over lists of positions: the positions of a batch give its samples, whoever asks."""

    def __init__(
        self,
        shards: ShardSet,
        chosen: Sequence[Integers | None],
        order: EpochOrder | LengthBatches,
        modality: Modality,
        seed: int,
        *,
        train: bool,
        keep: Sequence[str] = (),
    ) -> None:
        """Open nothing yet.

        Args:
            shards: what is read.
            chosen: for each shard the numbers of the samples that belong to this dataset, None for all.
            order: over the chosen samples; positions are its samples, or its batches.
            modality: decodes and collates.
            seed: with the epoch and the sample's number decides its augmentation.
            train: decode with augmentation.
            keep: members that batches hold as they are.
        """
        self.keep = tuple(keep)
        self.chosen, self.order, self.seed = chosen, order, seed
        self.modality = modality
        self.decoder = modality.build_decoder(train=train)
        self.reader = SampleReader(shards, open_tables=order.open_shards + 4)

    def __getitem__(self, positions: Integers) -> Batch | Unreadable:
        """Read, decode and collate the samples at these positions; broken ones are left out and named."""
        try:
            with preserved_generators():
                return self._batch(positions)
        except Data2VecError as error:
            return Unreadable(str(error))
        except MemoryError:
            return Unreadable("out of memory while decoding samples; lower data.workers or the batch")

    def _batch(self, positions: Integers) -> Batch | Unreadable:
        samples: list[Sample] = []
        examples: list[Example] = []
        broken: list[str] = []
        unused: dict[str, str] = {}
        for epoch, shard, index in zip(*(array.tolist() for array in self.order.locate(positions)), strict=True):
            subset = self.chosen[shard]
            number = index if subset is None else int(subset[index])
            try:
                sample = self.reader.read(shard, number)
                seed = derive(self.seed, epoch, sample.id)
                seed_generators(seed)
                example = self.decoder(sample, seed)
            except (MemoryError, DataError):
                raise
            except Exception as error:  # image libraries raise nearly everything on damaged files
                broken.append(self._describe(shard, number, error))
            else:
                samples.append(sample)
                examples.append(example)
                for member, reason in _unused(sample, example).items():
                    unused.setdefault(member, self._describe(shard, number, reason))
        if not samples:
            reasons = "\n".join(f"  - {line}" for line in broken[:_SHOWN])
            return Unreadable(f"all {len(broken)} samples of a batch are broken, the first:\n{reasons}", tuple(broken))
        try:
            batch = self.modality.collate(samples, examples)
        except (RuntimeError, ValueError) as error:
            first = f"{samples[0].shard}:{samples[0].key}"
            raise DataError(f"samples of one batch do not fit together, from {first} on: {one_line(error)}") from None
        kept = {member: tuple(sample.members.get(member) for sample in samples) for member in self.keep}
        return replace(batch, broken=(*batch.broken, *broken), unused=unused, annotations=kept)

    def _describe(self, shard: int, number: int, reason: str | Exception) -> str:
        """``file: key: reason``, in one line that is safe to print."""
        if isinstance(reason, Exception) and not isinstance(reason, SampleError):
            reason = f"{type(reason).__name__}: {reason}"
        location = masked(self.reader.shards.shards[shard].location)
        return one_line(f"{location}: {self.reader.table(shard)[number].key}: {reason}")


def _unused(sample: Sample, example: Example) -> Mapping[str, str]:
    """Say why optional members of a sample are of no use, by extension."""
    problem = label_problem(sample.members.get("cls", b"0"))
    return example.unused if problem is None else {"cls": problem, **example.unused}
