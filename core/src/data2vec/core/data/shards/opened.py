"""An opened list of shards: where each lies and how many samples it has, checked before training starts."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data2vec.core.data.shards.index import INDEX_NAME, ForeignIndexError, ShardIndex, ShardInfo
from data2vec.core.data.shards.inputs import Inputs, check_share, unusable
from data2vec.core.data.shards.locate import resolve
from data2vec.core.data.shards.remote.address import is_url, sibling, url_name
from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.remote.patience import stopped_by
from data2vec.core.data.shards.tar import scan
from data2vec.core.errors import DataError

_log = logging.getLogger(__name__)
_THREADS = 8  # shards without an index that are fetched and counted at a time

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (shards counted, shards to count)


@dataclass(frozen=True)
class Shard:
    """One shard: a local path or URL, its file name, its samples (broken ones included), its entry in an index.

    ``size``: bytes.
    """

    location: str
    name: str
    samples: int
    info: ShardInfo | None
    size: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of one ``data.train`` or ``data.validation``, in the order in which they are named.

    ``inputs``: finds the input of a sample; None: members stay as they are. ``remarks``: what is said once of these
    shards, by kind.
    """

    spec: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    cache: ShardCache
    inputs: Inputs | None = None
    remarks: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes when a shard's name, place in the order or number of samples does."""
        text = "\n".join(f"{shard.name} {shard.samples}" for shard in self.shards)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def working_set(self, shards: int) -> list[int]:
        """Sizes of the ``shards`` largest, of those that are fetched."""
        return sorted(shard.size for shard in self.shards if is_url(shard.location))[-shards:]

    def remark(self, kind: str, line: str) -> None:
        """Log a line, unless one of its kind has been."""
        if kind not in self.remarks:
            self.remarks[kind] = line
            _log.warning("%s", line)

    @contextmanager
    def held(self, number: int) -> Iterator[Path]:
        """The file of a shard, fetched if it is remote and not here; it stays until the context ends.

        Raises:
            DataError: it cannot be fetched.
        """
        shard = self.shards[number]
        with _held(shard.location, shard.info, self.cache) as path:
            yield path


def _no_progress(done: int, total: int) -> None:
    pass


def open_shards(
    spec: str,
    modality: str,
    cache: ShardCache,
    progress: Progress = _no_progress,
    *,
    inputs: Inputs | None = None,
    max_broken: float = 1.0,
) -> ShardSet:
    """Find the shards of ``spec`` and count their samples, from the index where there is one.

    Args:
        spec: see :func:`data2vec.core.data.shards.locate.resolve`.
        modality: what the shards must hold, where an index says what they hold.
        cache: where fetched shards are kept.
        progress: called as shards without an index are counted.
        inputs: finds the input of each sample; None: nobody asks for one.
        max_broken: share of the samples without an input that is accepted, of shards without an index.

    Raises:
        DataError: a shard is missing, truncated, empty or of another modality, too many samples have no input, or
            indexes disagree.
    """
    locations = resolve(spec)
    indexes = _indexes(locations, cache)
    for place, index in indexes.items():
        if index.modality != modality:
            raise DataError(f"{place}: holds {index.modality}, but {spec!r} is read as {modality}")
    names = {index.class_names for index in indexes.values()}
    if len(names) > 1:
        places = ", ".join(sorted(indexes))
        raise DataError(f"{spec!r}: its folders number different classes ({places}); shard them together")

    listed = {(place, info.name): info for place, index in indexes.items() for info in index.shards}
    found = [(location, _name(location), listed.get((_place(location), _name(location)))) for location in locations]
    for location, _, info in found:
        if info is not None and not is_url(location):
            _check_size(location, info)

    unknown = [location for location, _, info in found if info is None]
    counted: dict[str, tuple[int, None, int]] = {}  # as a shard is described
    problems: list[str] = []

    def count(location: str) -> tuple[tuple[int, None, int], list[str]]:
        with _held(location, None, cache) as path:
            samples, size = scan(path), path.stat().st_size
        return (len(samples), None, size), [] if inputs is None else unusable(location, map(inputs.present, samples))

    if unknown:
        for done, (location, (described, lines)) in enumerate(zip(unknown, _in_threads(count, unknown), strict=True)):
            counted[location] = described
            problems += lines
            progress(done + 1, len(unknown))
        check_share(repr(spec), sum(samples for samples, *_ in counted.values()), problems, max_broken)
    shards = (
        Shard(location, name, info.samples, info, info.bytes) if info else Shard(location, name, *counted[location])
        for location, name, info in found
    )
    return ShardSet(spec, tuple(shards), next(iter(names), ()), cache, inputs)


@contextmanager
def _held(location: str, info: ShardInfo | None, cache: ShardCache) -> Iterator[Path]:
    if is_url(location):
        with cache.hold(location, info) as path:
            yield path
    else:
        yield Path(location)


def _in_threads(function: Callable[[str], T], values: list[str]) -> Iterator[T]:
    """As ``map``; where an error or Ctrl-C ends it, what is being fetched ends too."""
    ended = threading.Event()

    def one(value: str) -> T:
        # Here and not around the pool, which does not wait for a thread that Ctrl-C met while it was being started.
        with stopped_by(ended.is_set):
            return function(value)

    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(one, values)
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def _name(location: str) -> str:
    return url_name(location) if is_url(location) else os.path.basename(location)


def _place(location: str) -> str:
    """The path or URL of the index that would list a shard."""
    return sibling(location, INDEX_NAME) if is_url(location) else os.path.join(os.path.dirname(location), INDEX_NAME)


def _indexes(locations: Iterable[str], cache: ShardCache) -> dict[str, ShardIndex]:
    """The indexes there are, by their path or URL. Shards beside one of another program are counted instead."""
    indexes = {}
    for location in {_place(location): location for location in locations}.values():
        place = _place(location)
        try:
            if is_url(location):
                index = cache.small(place, lambda content: _parse(content, place))  # noqa: B023
                if isinstance(index, ForeignIndexError):
                    raise index
                if index is not None:
                    indexes[place] = index
            elif os.path.exists(place):
                indexes[place] = ShardIndex.load(Path(place).parent)
        except ForeignIndexError as error:
            _log.warning("%s; the shards beside it are counted instead", error)
    return indexes


def _parse(content: bytes, place: str) -> ShardIndex | ForeignIndexError:
    try:
        return ShardIndex.parse(content, place)
    except ForeignIndexError as error:  # which stays one, however often it is fetched
        return error


def _check_size(location: str, info: ShardInfo) -> None:
    try:
        size = os.stat(location).st_size
    except OSError as error:  # a link to nothing
        raise DataError(f"{location}: cannot be read ({error.strerror}); remove it, or fetch it anew") from None
    if size != info.bytes:
        how = "is truncated" if size < info.bytes else "was replaced"
        raise DataError(
            f"{location}: has {size} bytes, its {INDEX_NAME} says {info.bytes}: the file {how}; "
            "write or fetch it anew, or index the folder again (tools/shard.py index)"
        )
