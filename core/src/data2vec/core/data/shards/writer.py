"""Writing sets of shards.

Shards are WebDataset tar files written by WebDataset's own writer, with nothing in them that depends on the time,
the machine or the user: the same samples give the same bytes. A file gets its final name when it is complete and on
disk; the index is written last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from data2vec.core.data.shards.index import ShardIndex, ShardInfo, add_to_index, prefixed
from data2vec.core.data.shards.tar import is_pickled
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.files import replace_durably, temporary_name
from data2vec.core.modality import Modality

__all__ = ["ShardFile", "ShardIndex", "ShardInfo", "ShardWriter", "measure_of"]

Measure = Callable[[Mapping[str, bytes]], int | None]  # the input length of a sample's members


def measure_of(modality: str) -> tuple[Measure, str]:
    """Find how a modality's samples are measured, and the unit; for one that is not installed, not at all."""
    try:
        kind = Modality.by_name(modality)
    except ConfigError:
        return unmeasured, ""
    return kind.length_of, kind.length_unit


def unmeasured(members: Mapping[str, bytes]) -> int | None:
    """The measure of samples that do not differ."""
    return None


class _HashedFile:
    """A file that is only appended to; its SHA-256 is at hand when it is complete."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.discarded = False

    def write(self, data: bytes) -> int:
        if self.discarded:  # the tar writer flushes its buffer when it is closed
            return len(data)
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


class ShardFile:
    """One shard that is being written. It appears under its name in :meth:`finish`, whole, or not at all."""

    def __init__(self, path: Path, measure: Measure = unmeasured) -> None:
        """Start a shard; what an interrupted run left of it is replaced. ``measure`` gives the samples' lengths.

        Raises:
            DataError: the folder cannot be written to.
        """
        self.path = path
        self.samples = 0
        self._measure = measure
        self._lengths: list[int] = []
        self._keys: set[str] = set()
        self._temporary = temporary_name(path)
        try:
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        self._hashed = _HashedFile(self._file)
        self._tar = TarWriter(self._hashed, user="root", group="root", mode=0o644, encoder=False, mtime=0)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._hashed.size

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample.

        Args:
            key: unique in the shard; may contain folders, but no dot in its last part.
            members: bytes by extension (lower case, no leading dot).

        Raises:
            DataError: a key or extension that would not read back, or the disk is full.
            SampleError: its length cannot be told; it is not written.
        """
        problem = _key_problem(key, members) or ("the shard has it already" if key in self._keys else None)
        if problem:
            raise DataError(f"{self.path}: sample {key!r}: {problem}")
        length = self._measure(members)
        try:
            self._tar.write({"__key__": key, **members})
        except OSError as error:
            raise _write_error(self.path, error) from None
        if length is not None:
            self._lengths.append(length)
        self._keys.add(key)
        self.samples += 1

    def finish(self) -> ShardInfo:
        """Complete the file, flush it to disk and give it its name.

        Raises:
            DataError: the disk is full; nothing appears under the shard's name.
        """
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            replace_durably(self._temporary, self.path)
        except OSError as error:
            raise _write_error(self.path, error) from None
        digest = self._hashed.sha256.hexdigest()
        return ShardInfo(self.path.name, self.samples, self._hashed.size, digest, tuple(self._lengths))

    def discard(self) -> None:
        """Remove what was written."""
        self._hashed.discarded = True
        self._tar.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into as many shards as they need, ``PREFIX-000000.tar`` and on, and adds them to the index.

        with ShardWriter(folder, "train", "vision", class_names=["cat", "dog"]) as writer:
            writer.write("0001", {"png": image, "cls": b"0"})

    Several prefixes may share a folder and its index. When the body fails, the shards of this writer are removed and
    the index is as it was.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        modality: str,
        *,
        samples_per_shard: int = 10_000,
        bytes_per_shard: int = 512 * 1024**2,
        class_names: tuple[str, ...] | list[str] = (),
        overwrite: bool = False,
    ) -> None:
        """Create the folder where it does not exist.

        Raises:
            DataError: the folder has shards of this prefix and ``overwrite`` is off, or cannot be written to.
        """
        if not prefix or "/" in prefix or samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError(
                f"shards need a prefix without '/' and limits above 0, not prefix={prefix!r}, "
                f"samples_per_shard={samples_per_shard}, bytes_per_shard={bytes_per_shard}"
            )
        self.folder, self.prefix, self.modality = folder, prefix, modality
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self.class_names = tuple(class_names)
        self._measure, self._unit = measure_of(modality)
        self.index: ShardIndex | None = None  # of the whole folder, once the writer is closed
        self._shards: list[ShardInfo] = []
        self._current: ShardFile | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            old = [path for path in folder.iterdir() if prefixed(path.name, prefix)]
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a folder of shards ({error.strerror})") from None
        if old and not overwrite:
            raise DataError(f"{folder}: has {len(old)} shards {prefix}-*.tar already; name another folder or overwrite")
        for path in old:
            path.unlink()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; see :meth:`ShardFile.write`."""
        if self._current is None:
            self._current = ShardFile(self.folder / f"{self.prefix}-{len(self._shards):06d}.tar", self._measure)
        self._current.write(key, members)
        if self._current.samples >= self.samples_per_shard or self._current.size >= self.bytes_per_shard:
            self._finish_shard()

    def close(self) -> ShardIndex:
        """Finish the last shard and write the index.

        Raises:
            DataError: no sample was written, or the disk is full.
        """
        if self._current is not None:
            self._finish_shard()
        if not self._shards:
            raise DataError(f"{self.folder}: no sample was written to {self.prefix}-*.tar")
        new = ShardIndex(self.modality, tuple(self._shards), self.class_names, self._unit)
        self.index = add_to_index(self.folder, new, self.prefix)
        return self.index

    def discard(self) -> None:
        """Remove every shard this writer wrote."""
        if self._current is not None:
            self._current.discard()
            self._current = None
        for shard in self._shards:
            (self.folder / shard.name).unlink(missing_ok=True)
        self._shards = []

    def _finish_shard(self) -> None:
        assert self._current is not None
        self._shards.append(self._current.finish())
        self._current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise


def _key_problem(key: str, members: Mapping[str, bytes]) -> str | None:
    """Say why a sample would not read back as it was written; None where it would."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in key):
        return "a key has no control characters"
    if key.startswith("__") or any(part in ("", ".", "..") for part in key.split("/")):
        return "a key is a relative path that does not begin with '__'"
    if not members:
        return "it has no members"
    for extension in members:
        if is_pickled(extension):
            return f".{extension} could run code when it is read; store arrays as .npy or tensors as .safetensors"
        if not extension.isascii() or extension != extension.lower() or not extension.isprintable():
            return f"extension {extension!r} is not in lower case ASCII"
        if (
            extension == ""
            or extension.startswith(("_", "."))
            or base_plus_ext(f"{key}.{extension}") != (key, extension)
        ):
            return f"{key}.{extension} does not split into this key and extension (no dot in the key's last part)"
    return None


def _write_error(path: Path, error: OSError) -> DataError:
    advice = "; free some space and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return DataError(f"{path}: cannot be written ({error.strerror or error}){advice}")
