"""Files written so that a crash or a full disk never leaves half of one under its final name, and read to an end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_file(path: Path) -> bytes:
    """The content of a small file. A pipe or a device, which may never end, is refused.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path.read_bytes()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def temporary_name(path: Path) -> Path:
    """Name the file that becomes ``path`` once it is written: hidden, in the same folder, not matched by ``*.tar``."""
    return path.with_name(f".{path.name}.tmp")


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a finished and flushed temporary file its final name, and make the rename itself durable."""
    os.replace(temporary, path)
    flush(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Name a temporary file for the body to write; then it takes the place of ``path``, whole and on disk.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and the temporary file is gone.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file; the old content stays until the new one is on disk.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
