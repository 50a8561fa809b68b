"""Local copies of remote shards, shared by all processes of a machine (ranks and their loader workers)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data2vec.core.data.shards.index import ShardInfo
from data2vec.core.data.shards.remote.address import url_name
from data2vec.core.data.shards.remote.patience import Patience, TooLongError
from data2vec.core.data.shards.remote.store import Store
from data2vec.core.data.shards.remote.transfer import Limits, get_shard, get_small
from data2vec.core.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class ShardCache:
    """Fetched shards, in a folder of their own below ``folder``.

    ``max_bytes``: largest sum of their sizes; None leaves a tenth of the room there is for others. What was used
    longest ago goes first, which does no harm to processes that have it open.
    """

    folder: Path
    max_bytes: int | None = None
    limits: Limits = field(default_factory=Limits)

    def small(self, url: str, parse: Callable[[bytes], T]) -> T | None:
        """Fetch a small file and parse it; None where the server has none. Nothing is kept of it.

        Raises:
            DataError: the server cannot be reached, or ``parse`` refuses what it sends time and again.
        """
        return get_small(url, self.limits, parse)

    @contextmanager
    def hold(self, url: str, info: ShardInfo | None = None) -> Iterator[Path]:
        """The local copy of a shard, fetched if there is none; it stays until the context ends.

        Args:
            url: where it is.
            info: its entry in the index, if there is one: size and checksum are compared with it, on arrival and, where
                the copy is not as it was written, again.

        Raises:
            DataError: it cannot be fetched or kept, or is not what the index says.
        """
        key, sha256 = (info.sha256, info.sha256) if info else (url, None)  # a shard is one wherever it lies
        waiting = Patience()
        try:
            store = Store(self.folder, self.max_bytes)
            stem = store.stem(key, url_name(url))
        except OSError as error:
            raise self._not_kept(url, error) from None
        with store.locked(stem, waiting.pause, shared=True):
            path = store.find(stem, sha256)
            if path is not None:
                yield path
                return
        with store.locked(stem, waiting.pause, shared=False):
            try:
                path = store.find(stem, sha256) or store.repair(stem, sha256) or self._fetch(store, stem, url, info)
            except OSError as error:
                raise self._not_kept(url, error) from None
            yield path

    def room(self) -> int:
        """Bytes that fetched shards may take at once, those that are here included.

        Raises:
            DataError: there can be none in this folder.
        """
        try:
            return Store(self.folder, self.max_bytes).room()
        except OSError as error:
            raise DataError(f"{self.folder}: no shards can be kept there ({error.strerror or error})") from None

    def fetch(self, url: str, info: ShardInfo | None = None) -> Path:
        """As :meth:`hold`, but another process may remove the copy at any time."""
        with self.hold(url, info) as path:
            return path

    def _fetch(self, store: Store, stem: str, url: str, info: ShardInfo | None) -> Path:
        patience = Patience(self.limits.seconds)
        writing = store.begin(stem, patience.pause)
        complete = False
        try:
            get_shard(url, info, writing, self.limits, patience)
            complete = True
        except TooLongError:
            raise DataError(f"{url}: no room for it within data.fetch_minutes={self.limits.seconds / 60:g}") from None
        finally:
            writing.close(keep=complete)
        return writing.path

    def _not_kept(self, url: str, error: OSError) -> DataError:
        return DataError(f"{self.folder}: the shard of {url} cannot be kept there ({error.strerror or error})")
