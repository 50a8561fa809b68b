"""Write shards in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from data2vec.core.data.shards.index import ShardInfo
from data2vec.core.data.shards.source import Item
from data2vec.core.data.shards.writer import ShardFile, measure_of
from data2vec.core.errors import DataError, SampleError
from data2vec.core.files import temporary_name


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    path: Path
    modality: str
    items: Sequence[Item]
    encode: Callable[[Any], Any]


@dataclass(frozen=True)
class Written:
    """A finished shard (None: every item was unusable), a line for each file or document that was left out, and how
    many were not.
    """

    shard: ShardInfo | None
    skipped: tuple[str, ...]
    written: int


_stopping: Event | None = None


def _start_worker(stopping: Event) -> None:
    global _stopping
    _stopping = stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells workers to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_shard(task: ShardTask) -> Written:
    """Write one shard; runs in a worker."""
    shard = ShardFile(task.path, measure_of(task.modality)[0])
    skipped: list[str] = []
    written = 0
    try:
        for item in task.items:
            if _stopping is not None and _stopping.is_set():
                raise DataError("interrupted")
            try:
                encoded = task.encode(item)
                one = isinstance(encoded, Mapping)
                for key, members in [(item.key, encoded)] if one else encoded.samples:
                    shard.write(key, members)
                skipped += () if one else encoded.skipped
                written += 1 if one else encoded.documents
            except SampleError as error:
                skipped.append(str(error))
        if shard.samples:
            return Written(shard.finish(), tuple(skipped), written)
        shard.discard()
        return Written(None, tuple(skipped), written)
    except BaseException:
        shard.discard()
        raise


def write_all(tasks: Sequence[ShardTask], workers: int) -> Generator[tuple[str, Written], None, None]:
    """Write shards in parallel; yields each as it is finished. Stops all workers before an error goes on."""
    if not tasks:
        return
    stopping = multiprocessing.Event()
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_start_worker, initargs=(stopping,)) as pool:
        try:
            futures: dict[Future[Written], str] = {pool.submit(_write_shard, t): t.path.name for t in tasks}
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    yield futures.pop(future), future.result()
        except BrokenProcessPool:
            for task in tasks:
                temporary_name(task.path).unlink(missing_ok=True)
            raise DataError("a worker died: most often memory ran out; lower --workers and start again") from None
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
