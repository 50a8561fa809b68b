"""Batches made by the workers of torch's loader."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data2vec.core.batch import Batch
from data2vec.core.data.shards.remote.patience import Flag, stop_when
from data2vec.core.data.stream import shm
from data2vec.core.data.stream.order import Integers
from data2vec.core.data.stream.reading import ShardDataset, Unreadable
from data2vec.core.errors import DataError

_log = logging.getLogger(__name__)
_PREFETCH = 4  # batches each worker keeps ready


def training_batches(
    dataset: ShardDataset, positions: Iterable[Integers], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Batches in the order of ``positions``, without end where those have none.

    Raises:
        DataError: a shard became unreadable, a worker died, or every sample of a batch is broken.
    """
    for result in _load(dataset, positions, workers, pin_memory):
        if isinstance(result, Unreadable):
            raise DataError(result.message)
        yield result


def evaluation_batches(
    dataset: ShardDataset, positions: Iterable[Integers], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Batches in the order of ``positions``; only where every sample of all of them is broken that is an error.

    Raises:
        DataError: a shard became unreadable, a worker died, or every sample is broken.
    """
    last: Batch | None = None  # kept back: broken samples of batches that had no others are named in a neighbour
    waiting: tuple[str, ...] = ()
    unreadable: Unreadable | None = None
    for result in _load(dataset, positions, workers, pin_memory):
        if isinstance(result, Batch):
            if last is not None:
                yield last
            last, waiting = replace(result, broken=(*waiting, *result.broken)), ()
        elif not result.broken:
            raise DataError(result.message)
        elif last is not None:
            last = replace(last, broken=(*last.broken, *result.broken))
        else:
            waiting, unreadable = (*waiting, *result.broken), result
    if last is not None:
        yield last
    elif unreadable is not None:
        raise DataError(unreadable.message)


def _load(
    dataset: ShardDataset, positions: Iterable[Integers], workers: int, pin_memory: bool
) -> Iterator[Batch | Unreadable]:
    """Batches in the order of ``positions``, made by workers; optional members of no use are said once."""
    closed = Flag()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # the sampler yields whole batches of positions
        sampler=positions,
        num_workers=workers,
        collate_fn=_handed_over,  # type: ignore[arg-type]  # without a batch size it gets what the dataset returns
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_start_worker, closed, os.getpid()),
        prefetch_factor=_PREFETCH if workers else None,
        generator=torch.Generator(),  # else starting the workers would draw from the process's own
    )
    batches = _started(loader)
    try:
        yield from _received(dataset, batches, workers)
    finally:
        closed.set()  # else torch would wait for workers that fetch a shard


def _received(dataset: ShardDataset, batches: Iterator[Any], workers: int) -> Iterator[Batch | Unreadable]:
    """Receive what workers hand over, with what is to be said of it."""
    size, waiting = 0, workers * _PREFETCH
    while True:
        try:
            result = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            codes = [worker.exitcode for worker in getattr(batches, "_workers", ())]
            raise DataError(shm.cause_of_death(codes, shm.Room.now(), size, waiting)) from None
        if workers and not size and isinstance(result, Batch):
            size = _size(result)
            room = shm.Room.now()
            if room is not None and size * waiting > room.total:
                _log.warning("%s", shm.too_small(room, size, waiting))
        for member, line in result.unused.items() if isinstance(result, Batch) else ():
            dataset.reader.shards.remark(member, f"{line}; it counts as unlabelled, as others like it do")
        yield result


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, whose workers may die without a word until the next batch is asked for.

    torch sets a handler that raises an error wherever the main process happens to be, in the middle of an update.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def _handed_over(result: Batch | Unreadable) -> Batch | Unreadable:
    """The result, in a worker with its tensors in shared memory.

    Otherwise a thread of the queue would put them there, whose errors nobody hears: training would wait for ever.
    """
    worker = get_worker_info()
    if worker is None or isinstance(result, Unreadable):
        return result
    size, room = _size(result), shm.Room.now()
    full = shm.too_small(room, size, worker.num_workers * _PREFETCH)
    if room is not None and size > room.free:
        return Unreadable(full)
    try:
        for tensor in _tensors(result):
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        if not shm.is_full(error):
            raise
        return Unreadable(full)
    return result


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def _size(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


def _start_worker(closed: Flag, parent: int, number: int) -> None:
    torch.set_num_threads(1)
    stop_when(closed.is_set)
    stop_when(lambda: os.getppid() != parent)  # killed, so that nobody waits for the batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    signal.signal(signal.SIGTERM, _ignore_once())


def _ignore_once() -> Callable[[int, FrameType | None], None]:
    """Schedulers send SIGTERM to all processes; workers are needed until the main one has saved and ends them."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return handle
