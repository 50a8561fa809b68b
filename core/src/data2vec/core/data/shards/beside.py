"""Files that lie beside the shards and that a run keeps a copy of (:attr:`data2vec.core.modality.Modality.assets`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from data2vec.core.data.shards.opened import ShardSet
from data2vec.core.data.shards.remote.address import is_url, sibling
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.files import read_file, write_atomically
from data2vec.core.modality import Modality


def beside(shards: ShardSet, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of these names that lie in the folders of the shards.

    Raises:
        DataError: two folders hold different ones, or one cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in names:
        for place in sorted({_place(shard.location, name) for shard in shards.shards}):
            content = _read(shards, place)
            if content is not None and found.setdefault(name, content) != content:
                raise DataError(f"{place}: differs from that of the other shards of {shards.spec!r}")
    return found


def _place(location: str, name: str) -> str:
    return sibling(location, name) if is_url(location) else os.path.join(os.path.dirname(location), name)


def _read(shards: ShardSet, location: str) -> bytes | None:
    if is_url(location):
        return shards.cache.small(location, bytes)
    try:
        return read_file(Path(location))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{location}: cannot be read ({error.strerror})") from None


def keep(folder: Path, files: Mapping[str, bytes], *, started: bool) -> list[Path]:
    """Copy files into a run's folder; returns those that were not there before.

    Args:
        folder: the run's.
        files: contents by name.
        started: the run has a checkpoint, so that what it keeps must not change.

    Raises:
        DataError: the run keeps another file of that name, or the folder cannot be written to.
    """
    written = []
    for name, content in files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == content:
            continue
        if started:
            require_same(folder, files)
        is_new = not path.is_file()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        written += [path] if is_new else []
    return written


def kept_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of these names that a run keeps.

    Raises:
        DataError: one cannot be read.
    """
    try:
        return {name: read_file(folder / name) for name in names if (folder / name).is_file()}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def require_same(folder: Path, files: Mapping[str, bytes]) -> None:
    """Check that files beside some shards are those which a run was trained with.

    Raises:
        DataError: one differs from the run's.
    """
    for name, content in files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() != content:
            raise DataError(
                f"{path}: differs from the {name} beside the shards, so their numbers mean something else to this run; "
                "give shards that were made with the run's file, or start a new run"
            )


def located(modality: Modality, folder: Path) -> Modality:
    """A modality that reads its files from a run's folder.

    Raises:
        ConfigError: they do not fit its settings.
    """
    placed: Modality = modality.located(folder)
    problems = placed.asset_problems()
    if problems:
        raise ConfigError(problems)
    return placed
