"""Batches: nothing lost or doubled for any ranks, workers and resume points; broken samples; bad sets."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.data.dataset import BrokenCounter, EvaluationData, TrainData, spaced
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.data.stream import shm
from data2vec.core.errors import DataError, SampleError
from data2vec.core.modality import Masker, Modality
from data2vec.core.settings.fields import DataConfig, TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig


@dataclass(frozen=True)
class NumberDecoder:
    """Reads ``num``; some contents stand for the ways in which a decoder fails."""

    train: bool

    def __call__(self, sample: Sample, seed: int) -> Example:
        content = sample.members["num"]
        if content == b"broken":
            raise SampleError("is broken")
        if content == b"strange":
            raise OSError("cannot identify\nimage \x1b[31m")
        if content == b"memory":
            raise MemoryError
        if content == b"bus":
            os.kill(os.getpid(), signal.SIGBUS)
        noise = [seed % 1000, random.randrange(1000), int(np.random.randint(1000)), int(torch.randint(1000, ()))]
        return Example(torch.tensor([int(content), *(noise if self.train else [])]), int(content) % 3)


@dataclass(frozen=True)
class Numbers(Modality):
    name: ClassVar[str] = "numbers"
    extensions: ClassVar[tuple[str, ...]] = ("num",)

    @property
    def predictor_config(self) -> PredictorConfig:
        return PredictorConfig()

    @property
    def uses_mask_token(self) -> bool:
        return True

    def build_frontend(self, transformer: TransformerConfig) -> torch.nn.Module:
        return torch.nn.Identity()

    def build_masker(self) -> Masker:
        raise NotImplementedError

    def build_decoder(self, *, train: bool) -> NumberDecoder:
        return NumberDecoder(train)


def write(folder: Path, contents: list[bytes], per_shard: int = 7) -> Path:
    with ShardWriter(folder, "train", "numbers", samples_per_shard=per_shard, class_names=("a", "b", "c")) as writer:
        for i, content in enumerate(contents):
            writer.write(f"{i:04d}", {"num": content})
    return folder


def open_train(folder: Path, workers: int = 0, seed: int = 0, **settings: object) -> TrainData:
    config = DataConfig(workers=workers, shuffle_shards=3, **settings)
    return TrainData.open(str(folder), Numbers(), data=config, seed=seed, cache=folder / "cache")


def numbers(batches: list[Batch]) -> list[int]:
    return [int(n) for batch in batches for n in batch.inputs[:, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("numbers"), [str(i).encode() for i in range(60)])


@settings(max_examples=12, deadline=None)
@given(world=st.integers(1, 5), micro=st.integers(1, 6), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_ranks_share_every_epoch(folder: Path, world: int, micro: int, seed: int, epochs: int) -> None:
    data = open_train(folder, seed=seed)
    steps = -(-60 * epochs // (world * micro))
    ranks = [list(islice(data.batches(0, micro, rank, world), steps)) for rank in range(world)]
    stream = numbers([ranks[rank][step] for step in range(steps) for rank in range(world)])
    for epoch in range(epochs):
        assert sorted(stream[60 * epoch : 60 * epoch + 60]) == list(range(60))


@pytest.fixture(scope="module")
def whole(folder: Path) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in islice(open_train(folder).batches(0, 30), 8)])


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 200), micro=st.integers(1, 9))
def test_a_resumed_stream_is_the_rest(folder: Path, whole: torch.Tensor, start: int, micro: int) -> None:
    rest = torch.cat([batch.inputs for batch in islice(open_train(folder).batches(start, micro), 3)])
    assert torch.equal(whole[start : start + 3 * micro], rest)  # augmentation included


def test_workers_do_not_change_a_batch(folder: Path) -> None:
    streams = [list(islice(open_train(folder, workers).batches(5, 8), 12)) for workers in (0, 1, 2)]
    for batches in streams[1:]:
        for one, other in zip(streams[0], batches, strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.ids, other.ids)
            assert one.keys == other.keys


def test_augmentation_differs_between_epochs_and_seeds(folder: Path) -> None:
    def noise(seed: int, epoch: int) -> dict[int, tuple[int, ...]]:
        batches = islice(open_train(folder, seed=seed).batches(60 * epoch, 60), 1)
        return {row[0]: tuple(row[1:]) for batch in batches for row in batch.inputs.tolist()}

    base = noise(0, 0)
    for other in (noise(0, 1), noise(1, 0)):
        same = sum(base[n][column] == other[n][column] for n in base for column in range(4))
        assert same < 10  # of 240, each 1 in 1000 by chance
    assert base == noise(0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_process_are_untouched(folder: Path, workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for state in (random.seed, np.random.seed, torch.manual_seed):
        state(3)
    expected = draw()
    for state in (random.seed, np.random.seed, torch.manual_seed):
        state(3)
    list(islice(open_train(folder, workers).batches(0, 8), 3))
    assert draw() == expected


def test_a_dataset_can_be_sent_to_another_process(folder: Path) -> None:
    dataset = open_train(folder)._dataset(train=True)
    first = dataset[np.arange(4)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[np.arange(4)].inputs, first.inputs)


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 70), limit=st.none() | st.integers(1, 80))
def test_evaluation_takes_each_sample_once_in_order(folder: Path, batch: int, limit: int | None) -> None:
    data = open_train(folder).for_evaluation()
    batches = list(data.evaluation_batches(batch, limit))
    found = numbers(batches)
    assert found == sorted(set(found))
    assert len(found) == min(60, limit or 60)
    assert all(len(part) == batch for part in batches[:-1])
    assert found == numbers(list(data.evaluation_batches(7, limit)))


@given(st.integers(1, 10**9), st.integers(1, 500))
def test_spread_is_increasing_and_even(total: int, count: int) -> None:
    count = min(count, total)
    found = spaced(total, count)
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < total
    assert (np.arange(count) * total // count <= found).all()


@pytest.mark.parametrize(("samples", "per_shard"), [(100, 100), (100, 7), (400, 2)])  # by sample, and by whole shards
def test_held_out_samples_are_never_trained_on(tmp_path: Path, samples: int, per_shard: int) -> None:
    folder = write(tmp_path, [str(i).encode() for i in range(samples)], per_shard)
    train, held = open_train(folder).hold_out(0.1)
    assert isinstance(held, EvaluationData)
    seen = numbers(list(islice(train.batches(0, train.total), 2)))
    evaluated = numbers(list(held.evaluation_batches(16)))
    assert 0.05 * samples <= len(evaluated) <= 0.15 * samples
    assert Counter([*seen, *evaluated, *evaluated]) == Counter([*range(samples)] * 2)
    again = open_train(folder, seed=9).hold_out(0.1)[1]
    assert evaluated == numbers(list(again.evaluation_batches(16)))
    assert train.fingerprint != open_train(folder).fingerprint


def test_holding_out_everything_or_nothing_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, [b"1"])
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match=r"name data.validation"):
            open_train(folder).hold_out(share)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_skipped_and_named(tmp_path: Path, workers: int) -> None:
    contents = [str(i).encode() for i in range(30)]
    contents[4], contents[9] = b"broken", b"strange"
    write(tmp_path, contents)
    batches = list(islice(open_train(tmp_path, workers).batches(0, 10), 3))
    assert sorted(numbers(batches)) == sorted(set(range(30)) - {4, 9})
    lines = sorted(line for batch in batches for line in batch.broken)
    assert lines[0] == f"{tmp_path}/train-000000.tar: 0004: is broken"
    assert lines[1] == f"{tmp_path}/train-000001.tar: 0009: OSError: cannot identify image \\x1b[31m"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_broken_samples_stops_training_with_reasons(tmp_path: Path, workers: int) -> None:
    write(tmp_path, [b"broken"] * 20)
    with pytest.raises(DataError, match=r"all 8 samples of a batch are broken, the first:\n  - .*: is broken") as error:
        next(open_train(tmp_path, workers).batches(0, 8))
    assert "Traceback" not in str(error.value)
    with pytest.raises(DataError, match="are broken"):
        list(open_train(tmp_path, workers).for_evaluation().evaluation_batches(8))


def test_evaluation_goes_on_after_a_batch_of_broken_samples(tmp_path: Path) -> None:
    write(tmp_path, [b"broken", b"broken", b"2", b"3"])
    (batch,) = open_train(tmp_path).for_evaluation().evaluation_batches(2)
    assert numbers([batch]) == [2, 3]
    assert len(batch.broken) == 2


def test_broken_share_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    def batch(good: int, broken: int) -> Batch:
        nothing = torch.zeros(good, dtype=torch.int64)
        return Batch("numbers", nothing, nothing, nothing, broken=("x: y: z",) * broken)

    counter = BrokenCounter(0.05, total=10_000)
    counter.add(batch(90, 9))  # too few seen to judge
    with pytest.raises(DataError, match=r"10 of 110 samples are broken, more than data.max_broken=0.05"):
        counter.add(batch(10, 1))
    with pytest.raises(DataError, match="2 of 20"):  # an epoch of 20 samples
        BrokenCounter(0.05, total=20).add(batch(18, 2))
    counter = BrokenCounter(0.05, total=10_000)
    counter.finish()  # of nothing
    counter.add(batch(5, 5))
    with pytest.raises(DataError, match="5 of 10 samples are broken"):  # nothing more will come
        counter.finish()
    counter = BrokenCounter(0.05, total=10_000)
    counter.add(batch(38, 2))
    counter.finish()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        counter = BrokenCounter(0.5, total=10_000)
        counter.add(batch(1000, 250))
    assert len(caplog.records) == 22  # the first 20, the 100th and the 200th
    assert caplog.records[0].message == "broken sample 1 skipped: x: y: z"


def test_too_few_samples_are_named(folder: Path) -> None:
    data = open_train(folder)
    with pytest.raises(DataError, match=r"has 60 samples, one update needs train\.batch=128: lower train\.batch"):
        data.require(128)
    with pytest.raises(DataError, match="60 samples"):
        data.batches(0, 31, 0, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_without_traceback(tmp_path: Path, workers: int) -> None:
    write(tmp_path, [b"1", b"memory"])
    with pytest.raises(DataError, match=r"^out of memory while decoding"):
        next(open_train(tmp_path, workers).batches(0, 2))
    shard = tmp_path / "train-000000.tar"
    data = open_train(tmp_path, workers)
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"0001.num", b"0000.num", 1))  # now damaged: a header checksum is wrong
    with pytest.raises(DataError, match=r"^[^\n]*train-000000\.tar: is truncated or damaged[^\n]*$"):
        next(data.batches(0, 2))
    shard.unlink()
    with pytest.raises(DataError, match=r"^[^\n]*train-000000\.tar: cannot be read[^\n]*$"):
        next(data.batches(0, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_are_none_are_said_once(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    with ShardWriter(tmp_path, "train", "numbers") as writer:
        for i in range(20):
            writer.write(f"{i:04d}", {"num": str(i).encode(), "cls": b"cat" if i % 2 else b"1"})
    data = open_train(tmp_path, workers)
    with caplog.at_level(logging.WARNING):
        for batch in [*islice(data.batches(0, 5), 4), *data.for_evaluation().evaluation_batches(5)]:
            assert len(batch) == 5
            assert not batch.broken
    (record,) = caplog.records
    assert record.message == data.shards.remarks["cls"]
    said = r"its label b'cat' is no class number such as 7; it counts as unlabelled, as others like it do"
    assert re.fullmatch(rf"{tmp_path}/train-000000\.tar: 00\d\d: {said}", record.message)


def test_broken_samples_of_an_evaluation_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [b"0", b"broken", b"2", b"broken", b"4"])
    data = open_train(tmp_path).for_evaluation()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sum(map(len, data.counted(data.evaluation_batches(2)))) == 3
    (record,) = caplog.records
    assert record.message == (
        f"2 of 5 samples are broken and not evaluated, as {tmp_path}/train-000000.tar: 0001: is broken"
    )


def test_a_bus_error_names_the_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system does to a worker that writes where /dev/shm has no room."""
    monkeypatch.setattr(shm.Room, "now", classmethod(lambda cls: cls(64 << 20, 3 << 20)))
    write(tmp_path, [b"1", b"bus"])
    with pytest.raises(
        DataError, match=r"^a loader worker died \(SIGBUS\): .*/dev/shm \(64\.0 MiB, 3\.0 MiB of it free"
    ):
        next(open_train(tmp_path, 1).batches(0, 2))


def test_a_worker_that_dies_does_not_interrupt_what_else_runs(folder: Path) -> None:
    before = set(multiprocessing.active_children())
    batches = open_train(folder, 1).batches(0, 2)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(int(worker.pid or 0), signal.SIGKILL)
    worker.join(60)  # where torch would raise an error of its own, as in the middle of an update
    with pytest.raises(DataError, match=r"^a loader worker died \(SIGKILL\): most often memory ran out"):
        list(islice(batches, 60))


@pytest.mark.parametrize("free", [8, None])
def test_a_batch_for_which_shared_memory_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    """Found before it is written, or by torch when it is."""

    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)")

    room = None if free is None else shm.Room(64 << 20, free)
    monkeypatch.setattr(shm.Room, "now", classmethod(lambda cls: room))
    if free is None:
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    write(tmp_path, [b"1", b"2"])
    with pytest.raises(DataError) as error:
        next(open_train(tmp_path, 1).batches(0, 2))
    message = str(error.value)
    assert message.startswith("the shared memory /dev/shm")
    assert ("(64.0 MiB, 0.0 MiB of it free now)" in message) == (free is not None)
    assert "4 batches of 0.0 MiB wait in it at a time" in message
    assert "docker run --shm-size=8g" in message
    assert "data.workers=0" in message
    assert len(next(open_train(tmp_path, 0).batches(0, 2))) == 2


def test_too_little_shared_memory_is_said_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shm.Room, "now", classmethod(lambda cls: cls(300, 300)))  # bytes: room for two batches
    write(tmp_path, [b"1", b"2"])
    with caplog.at_level(logging.WARNING):
        assert len(list(islice(open_train(tmp_path, 1).batches(0, 2), 3))) == 3
    (record,) = caplog.records
    assert "/dev/shm" in record.message


def test_what_is_said_of_shared_memory() -> None:
    said = shm.cause_of_death([None, -signal.SIGBUS], shm.Room(64 << 20, 1 << 20), 154 << 20, 8)
    assert "8 batches of 154 MiB wait in it at a time, 1,232 MiB in all" in said
    assert shm.cause_of_death([-signal.SIGKILL], None, 0, 8) == (
        "a loader worker died (SIGKILL): most often memory ran out; lower data.workers"
    )
    assert "no exit code" in shm.cause_of_death([None], None, 0, 8)


def test_a_recount_that_differs_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [b"1", b"2"])
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace('"samples": 2', '"samples": 3'))
    with pytest.raises(DataError, match="has 2 samples, not the 3 that were counted"):
        next(open_train(tmp_path).batches(0, 3))
