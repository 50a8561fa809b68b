"""The folder in which fetched shards are kept: what in it is ours, who uses it, and how much room there is.

All of it lies in one folder of its own below the one that a user names. For each shard there is

    STEM.tar    its content, incomplete while it is fetched
    STEM.json   the record: what was written, how long it is, and whether it is complete
    STEM.lock   held by whoever fetches the shard (alone) or opens it (shared)

and for all of them ``room.lock``, held while room is counted, and ``growing.lock``, held by the one fetch whose size
nobody knows.

A file is ours where a record says so and it still is as it was written: inode, size and time. Nothing else is ever
removed or overwritten, whatever its name; a shard whose name is taken gets another. A record holds numbers alone, so
that none leads to a file elsewhere. Locks end with their process: an incomplete shard that nobody holds was left
behind by one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from data2vec.core.data.shards.remote.record import (
    Record,
    create,
    digest,
    read_record,
    status_of,
    try_lock,
    write_record,
    write_some,
)
from data2vec.core.errors import DataError

_log = logging.getLogger(__name__)

FOLDER = "data2vec-cache-v1"
_MARKER = "THIS-IS-A-CACHE.txt"
_MARKER_TEXT = b"""Shards that data2vec has fetched. It removes what it has written here itself when room is needed.
The whole folder may be deleted while no run uses it.
"""
_SLOTS = 100  # names that are tried for one shard where others' files have the first ones
_POLL = 0.05  # seconds between looks at a lock that another process holds
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
Pause = Callable[[float], None]  # waits so many seconds, or raises where waiting has to end


class RoomTakenError(Exception):
    """The disk is full of shards that others are fetching."""


class Store:
    """The folder. ``max_bytes``: largest sum of the shards in it; None leaves a tenth of the room for others."""

    def __init__(self, parent: Path, max_bytes: int | None) -> None:
        """Make the folder, unless it is there.

        Raises:
            DataError: something else has its name.
            OSError: it cannot be made.
        """
        self.path = parent / FOLDER
        self.max_bytes = max_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(self.path).st_mode):
            raise DataError(f"{self.path}: is a link, which is not followed; remove it, or choose another data.cache")
        marker = self.path / _MARKER
        if not os.path.lexists(marker):  # of two processes that begin at once each may write it
            if set(os.listdir(self.path)) - {_MARKER} and not os.path.lexists(marker):
                raise DataError(
                    f"{self.path}: holds files and no {_MARKER}, so it is not a cache; choose another data.cache"
                )
            with suppress(FileExistsError):
                os.close(create(marker, _MARKER_TEXT))

    def stem(self, key: str, name: str) -> str:
        """Name a shard's files: ``key`` tells it from others, ``name`` is for people."""
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', name.removesuffix('.tar'))[-80:]}"

    @contextmanager
    def locked(self, stem: str, pause: Pause, *, shared: bool) -> Iterator[None]:
        """Hold a shard's lock: nobody else fetches or removes it meanwhile."""
        with self._held(stem, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, pause):
            yield

    def find(self, stem: str, sha256: str | None) -> Path | None:
        """A shard that is here, as its record says; whoever asks holds its lock."""
        for name in _names(stem):
            record = self._read(name)
            if record is None and not self._is_taken(name):
                return None
            path = self.path / f"{name}.tar"
            if record is None or not record.complete or sha256 not in (None, record.sha256):
                continue
            if record.is_ours(status_of(path)):
                self._use(name)
                return path
        return None

    def repair(self, stem: str, sha256: str | None) -> Path | None:
        """Look at a shard's files again: take over what still has its content, remove what is incomplete.

        Whoever asks holds the shard's lock alone.
        """
        for name in _names(stem):
            record = self._read(name)
            if record is None:
                if not self._is_taken(name):
                    return None
                continue
            path = self.path / f"{name}.tar"
            if record.complete and sha256 in (None, record.sha256):
                status, found = digest(path)
                if found == record.sha256 and status is not None:  # touched, or copied with the whole folder
                    self.record(name, Record(status.st_ino, status.st_size, status.st_mtime_ns, found))
                    return path
            self._remove(name, record)
        return None

    def begin(self, stem: str, pause: Pause) -> Writing:
        """Start a shard's file; whoever asks holds its lock alone and has called :meth:`repair`."""
        for name in _names(stem):
            if not self._is_taken(name):
                with suppress(FileExistsError):
                    return Writing(self, name, self._started(name), pause)
        raise DataError(f"{self.path}: has {_SLOTS} files of others called {stem}; remove them")

    def _started(self, name: str) -> int:
        number = self.relieved(lambda: create(self.path / f"{name}.tar"))
        try:
            self.relieved(lambda: os.close(create(self.path / f"{name}.json")))
            self.record(name, Record(os.fstat(number).st_ino, 0))
        except BaseException:
            os.close(number)
            (self.path / f"{name}.tar").unlink(missing_ok=True)
            raise
        return number

    def relieved(self, write: Callable[[], T]) -> T:
        """Write something; where the disk is full, remove the shards used longest ago until there is room.

        Raises:
            DataError: none is left. RoomTakenError: others are being fetched.
        """
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                reason = error.strerror
            with self._folder_locked():
                survey = self._survey()
                if any(self._evict(name) for _, name, _ in survey.whole):
                    continue
            if survey.fetching > 1 or survey.whole:  # one of them is this one
                raise RoomTakenError
            raise DataError(
                f"{self.path}: the disk is full ({reason}) and holds no other fetched shard that could make room; "
                "free some room, or set data.cache to a larger disk"
            )

    def room(self) -> int:
        """Bytes that shards may take, those that are here included."""
        with self._folder_locked():
            return self._room(self._survey().here)

    def _room(self, here: int) -> int:
        there = here + shutil.disk_usage(self.path).free
        return there * 9 // 10 if self.max_bytes is None else min(self.max_bytes, there)

    def set_aside(self, name: str, record: Record, need: int, wish: int = 0) -> int:
        """Note that a shard will take ``need`` bytes, and make room; up to ``wish`` bytes where there is room anyway.

        Returns:
            How many, or 0 while other processes' fetches have the room.

        Raises:
            DataError: it never fits.
        """
        with self._folder_locked():
            others = self._survey(name)
            own = status_of(self.path / f"{name}.tar")
            limit = self._room(others.here + (own.st_size if own else 0))
            used = others.used
            for _, other, size in others.whole:
                if used + need <= limit:
                    break
                if self._evict(other):
                    used -= size
            if used + need <= limit:
                granted = max(need, min(wish, limit - used))
                self.record(name, replace(record, bytes=granted))
                return granted
            if need <= limit:  # what has the rest is being fetched or opened, and can be removed later
                return 0
        bound = f"data.cache_gb={self.max_bytes / 1e9:g}" if self.max_bytes == limit else f"{limit} bytes of free room"
        raise DataError(
            f"{self.path}: a shard of {need} bytes does not fit into {bound}; raise data.cache_gb, free room, or set "
            "data.cache to a larger disk"
        )

    def growing(self, pause: Pause) -> AbstractContextManager[None]:
        """Hold the lock of the fetch that takes room as it goes on."""
        return self._held("growing", fcntl.LOCK_EX, pause)

    @contextmanager
    def _held(self, name: str, mode: int, pause: Pause) -> Iterator[None]:
        while (held := try_lock(self.path / f"{name}.lock", mode)) is None:
            pause(_POLL)
        try:
            yield
        finally:
            os.close(held)

    def _folder_locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the room; nobody does so for long."""
        return self._held("room", fcntl.LOCK_EX, time.sleep)

    def _survey(self, own: str = "") -> _Survey:
        """Add up what the shards of others than ``own`` take; what killed processes left is removed."""
        whole, used, here, fetching = [], 0, 0, 0
        for entry in sorted(entry.name for entry in os.scandir(self.path) if entry.name.endswith(".json")):
            name = entry.removesuffix(".json")
            record = None if name == own else self._read(name)
            status = status_of(self.path / f"{name}.tar")
            if record is None:
                continue
            if not record.complete and self._alone(name, self._remove_left):
                continue
            if status is None or not record.is_ours(status):
                continue
            here += status.st_size
            used += max(status.st_size, record.bytes)
            fetching += not record.complete
            if record.complete:
                with suppress(FileNotFoundError):
                    whole.append((os.stat(self.path / entry).st_mtime_ns, name, status.st_size))
        return _Survey(sorted(whole), used, here, fetching)

    def _evict(self, name: str) -> bool:
        """Remove a complete shard, unless somebody is about to open it."""
        return self._alone(name, lambda name: self._remove(name, self._read(name)))

    def _remove_left(self, name: str) -> None:
        record = self._read(name)
        if record is not None and not record.complete:  # else it was finished meanwhile
            self._remove(name, record)

    def _alone(self, name: str, action: Callable[[str], None]) -> bool:
        """Act on a shard if nobody holds its lock."""
        held = try_lock(self.path / f"{name.partition('~')[0]}.lock", fcntl.LOCK_EX)
        if held is None:
            return False
        try:
            action(name)
        finally:
            os.close(held)
        return True

    def _remove(self, name: str, record: Record | None) -> None:
        """Remove a shard's file, if it is ours, and its record."""
        if record is None:
            return
        path = self.path / f"{name}.tar"
        status = status_of(path)
        if record.is_ours(status):
            path.unlink(missing_ok=True)
        elif status is not None:
            _log.warning("%s: is not as it was fetched, so it is left alone and fetched again; remove it", path)
        (self.path / f"{name}.json").unlink(missing_ok=True)

    def _is_taken(self, name: str) -> bool:
        return any(os.path.lexists(self.path / f"{name}{ending}") for ending in (".tar", ".json"))

    def _use(self, name: str) -> None:
        """Note that a shard is used now."""
        with suppress(FileNotFoundError):
            os.utime(self.path / f"{name}.json")

    def _read(self, name: str) -> Record | None:
        return read_record(self.path / f"{name}.json")

    def record(self, name: str, record: Record) -> None:
        """Fill in a record that is there."""
        write_record(self.path / f"{name}.json", record)


@dataclass(frozen=True)
class _Survey:
    """Complete shards as (last use, name, size), the one used longest ago first.

    ``used``: bytes that shards take or have set aside. ``here``: bytes on disk. ``fetching``: incomplete shards.
    """

    whole: list[tuple[int, str, int]]
    used: int
    here: int
    fetching: int


class Writing:
    """A shard's file while it is fetched, with room set aside for it."""

    def __init__(self, store: Store, name: str, number: int, pause: Pause) -> None:
        self._store, self._name, self._number, self._pause = store, name, number, pause
        self._record = Record(os.fstat(number).st_ino, 0)
        self._growing: ExitStack | None = None
        self.path = store.path / f"{name}.tar"
        self.done = 0

    def expect(self, size: int | None) -> None:
        """Set room aside for so many bytes in all; None: for what comes, as it comes.

        What takes room bit by bit holds some while it waits for more. Two such fetches could wait for each other, so
        there is one at a time, and those of known size wait before they hold any.
        """
        if size is not None:
            self._reserve(size)
        elif self._growing is None:
            self._record = replace(self._record, bytes=self.done)  # an earlier try may have set more aside
            self._store.record(self._name, self._record)
            held = ExitStack()
            held.enter_context(self._store.growing(self._pause))
            self._growing = held

    def _reserve(self, size: int, wish: int = 0) -> None:
        """Set room aside; waits while other processes' fetches have it."""
        if size <= self._record.bytes:
            return
        while not (granted := self._store.set_aside(self._name, self._record, size, wish)):
            self._pause(_POLL)
        self._record = replace(self._record, bytes=granted)

    def write(self, data: bytes) -> None:
        """Append, removing other shards where the disk is full."""
        if self.done + len(data) > self._record.bytes:  # nobody said how long it is
            self._reserve(self.done + len(data), wish=2 * self.done)
        rest = memoryview(data)
        while rest:
            written = self._store.relieved(lambda rest=rest: write_some(self._number, rest))  # type: ignore[misc]
            self.done += written
            rest = rest[written:]

    def restart(self) -> None:
        """Begin anew."""
        os.ftruncate(self._number, 0)
        os.lseek(self._number, 0, os.SEEK_SET)
        self.done = 0

    def sha256(self) -> str:
        """Of what has been written."""
        return digest(self.path)[1]

    def finish(self, sha256: str) -> None:
        """Make it a shard that others find."""
        self._store.relieved(lambda: os.fsync(self._number))
        status = os.fstat(self._number)
        self._store.record(self._name, Record(status.st_ino, status.st_size, status.st_mtime_ns, sha256))

    def close(self, *, keep: bool) -> None:
        """End writing; what is incomplete is removed."""
        os.close(self._number)
        if self._growing is not None:
            self._growing.close()
        if not keep:
            self._store._remove(self._name, self._record)


def _names(stem: str) -> Iterator[str]:
    """List what a shard may be called: other names where others' files have the first."""
    yield stem
    yield from (f"{stem}~{number}" for number in range(1, _SLOTS))
