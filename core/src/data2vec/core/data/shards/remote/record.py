"""Records of what was fetched, and the calls that follow no link and touch no file that is there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

_SIZE = 256  # bytes of a record, filled up with spaces


@dataclass(frozen=True)
class Record:
    """A shard as written. ``bytes``: its size, or the room kept for it; ``sha256``: empty while it is fetched."""

    inode: int
    bytes: int
    mtime_ns: int = 0
    sha256: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.sha256)

    def is_ours(self, status: os.stat_result | None) -> bool:
        """Tell whether a file is the one that was written: inodes are used again, so a complete one is as it was."""
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_ino != self.inode:
            return False
        return not self.complete or (status.st_size, status.st_mtime_ns) == (self.bytes, self.mtime_ns)


def read_record(path: Path) -> Record | None:
    """A record; None where there is none, or something else has its name."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return None
        content = file.read(_SIZE + 1)
    try:
        record = Record(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = (record.inode, record.bytes, record.mtime_ns)
    if not all(type(value) is int and 0 <= value < 1 << 64 for value in numbers):
        return None
    return record if isinstance(record.sha256, str) and re.fullmatch("([0-9a-f]{64})?", record.sha256) else None


def write_record(path: Path, record: Record) -> None:
    """Fill in a record that is there, in one write of constant length: it is never half of one."""
    number = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.pwrite(number, json.dumps(asdict(record)).encode().ljust(_SIZE), 0)
    finally:
        os.close(number)


def create(path: Path, content: bytes = b"") -> int:
    """Open a new file; an existing one, or a link, is left alone."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    os.write(number, content)
    return number


def write_some(number: int, data: memoryview) -> int:
    """Write as much as goes at once; returns how much."""
    return os.write(number, data)


def try_lock(path: Path, mode: int) -> int | None:
    """A descriptor that holds a lock, or None while somebody else does."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        fcntl.flock(number, mode | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        os.close(number)
        return None
    except BaseException:
        os.close(number)
        raise
    return number


def status_of(path: Path) -> os.stat_result | None:
    """A file's status; that of a link itself; None where there is nothing."""
    try:
        return os.lstat(path)
    except OSError:
        return None


def digest(path: Path) -> tuple[os.stat_result | None, str]:
    """A regular file's status and SHA-256; a link or a pipe has none."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None, ""
    with open(number, "rb") as file:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            return None, ""
        return status, hashlib.file_digest(file, "sha256").hexdigest()
