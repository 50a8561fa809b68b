"""Batches made by the workers of torch's loader."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from data2vec.core.batch import Batch
from data2vec.core.data.order import Integers
from data2vec.core.data.reading import ShardDataset, Unreadable
from data2vec.core.errors import DataError

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
    """Batches in the order of ``positions``, made by workers."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # the sampler yields whole batches of positions
        sampler=positions,
        num_workers=workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without a batch size it gets what the dataset returns
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=_PREFETCH if workers else None,
        generator=torch.Generator(),  # else starting the workers would draw from the process's own
    )
    batches = iter(loader)
    while True:
        try:
            result = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader worker died ({str(error).splitlines()[0]}): most often memory ran out; lower data.workers"
            ) from None
        yield result


def _unchanged(batch: Batch | Unreadable) -> Batch | Unreadable:
    return batch


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)
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
