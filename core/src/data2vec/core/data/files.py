"""Writing files so that a crash or a full disk never leaves half a file under its final name."""

from __future__ import annotations

import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written before it is renamed: hidden, in the same folder, not matched by ``*.tar``."""
    return path.with_name(f".{path.name}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Give a finished and flushed temporary file its final name, and make the rename itself durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file; the old content stays until the new one is on disk.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        commit(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
