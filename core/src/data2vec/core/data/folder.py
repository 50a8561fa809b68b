"""People's folders on their way into shards: every file that is found is used, or counted with what it is."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data2vec.core.errors import DataError

HIDDEN, SPECIAL, LOOP, PLAIN = "hidden", "no regular file", "link back to a folder above", "without an ending"


@dataclass(frozen=True)
class Listing:
    """The files of a folder at any depth: each is in ``paths`` or counted in ``left_out``.

    ``paths``: those that were asked for, in the order of their parts. ``left_out``: how many of the others there are,
    by ending in lower case with its dot (``.gif``), or by what they are (``hidden``).
    """

    paths: tuple[Path, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All files that were found."""
        return len(self.paths) + sum(self.left_out.values())


def list_files(folder: Path, wanted: Callable[[str], bool]) -> Listing:
    """Find files at any depth; links to files and folders are followed, hidden ones are left out.

    Args:
        folder: where to look.
        wanted: whether a file of this name (in lower case) is asked for.

    Raises:
        DataError: a folder cannot be read.
    """
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for path, hidden in _walk(folder, (), False):
        name = path.name.lower()
        kind = HIDDEN if hidden else _kind(path)
        if kind is None and wanted(name):
            paths.append(path)
        else:
            left_out[kind or os.path.splitext(name)[1] or PLAIN] += 1
    return Listing(tuple(sorted(paths, key=lambda path: path.relative_to(folder).parts)), dict(left_out))


def count_left_out(left_out: Mapping[str, int]) -> str:
    """Describe what was left out, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def unique_key(parts: tuple[str, ...], taken: set[str]) -> str:
    """A sample's key from the parts of a file's relative path; it joins ``taken``.

    It has no dots and nothing else that a tar file or WebDataset reads in a way of its own.
    """
    stem = (*parts[:-1], os.path.splitext(parts[-1])[0])
    base = "/".join(re.sub(r"[^\w-]", "_", part) for part in stem)
    if base.startswith("__"):
        base = f"x{base}"
    key, number = base, 2
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    taken.add(key)
    return key


def _walk(folder: Path, above: tuple[tuple[int, int], ...], hidden: bool) -> Iterator[tuple[Path, bool]]:
    """Every entry that is no folder, and whether it or a folder above it is hidden; a loop of links is one entry."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    here = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        below = hidden or entry.name.startswith(".")
        path = Path(folder, entry.name)
        if path.is_dir() and not _is_above(path, here):
            yield from _walk(path, here, below)
        else:
            yield path, below


def _is_above(path: Path, above: tuple[tuple[int, int], ...]) -> bool:
    status = path.stat()
    return (status.st_dev, status.st_ino) in above


def _kind(path: Path) -> str | None:
    """Tell what an entry is that cannot be a sample; a link without a target is for whoever reads it to name."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return LOOP
    return None if stat.S_ISREG(mode) else SPECIAL
