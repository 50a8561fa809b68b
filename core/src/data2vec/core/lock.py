"""One writer for a folder: a second process is refused, or takes over from one that is gone.

The claim is a file in the folder (``filelock.SoftFileLease``), made exclusively, so it needs no lock service of a
network filesystem. A claim of a dead process of this host is known at once to be void, after ``kill -9`` too. Whether a
process of another host still lives, this one can only see from the file's time, which the holder renews: it watches for
``_LEASE_SECONDS`` by its own clock. A holder that finds its claim taken ends at once, without writing. A claim that
stays empty is of a process that was killed between making and filling it, which the library never takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from data2vec.core.errors import FolderInUseError

_log = logging.getLogger(__name__)
NAME = ".lock"
_UNKNOWN = "unknown"
_LEASE_SECONDS = 120.0  # the same for every contender
_AT_ONCE_SECONDS = 2.0
_EMPTY_SECONDS = 10.0  # a claim is filled within microseconds


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder, which is made if absent and removed again if it stays empty.

    Raises:
        FolderInUseError: another process is; the message names it.
        OSError: the folder cannot be made or written to.
    """
    path = folder / NAME
    before = _holder(path)
    claim = filelock.SoftFileLease(
        path, lease_duration=_LEASE_SECONDS, on_compromise=lambda _: _end(folder), thread_local=False
    )
    if not _acquired(claim, folder, _AT_ONCE_SECONDS):
        _watch(claim, path, folder)
    if before is not None:
        _log.info("%s: taken over from %s, which has ended without leaving it", folder, _shown(before))
    try:
        yield
    finally:
        claim.release()
        with contextlib.suppress(OSError):
            folder.rmdir()


def _acquired(claim: filelock.SoftFileLease, folder: Path, seconds: float) -> bool:
    """Tell whether the claim could be made within some time."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            claim.acquire(timeout=seconds)
        except FileNotFoundError:  # whoever had the folder has left it empty, and removed it
            continue
        except (filelock.Timeout, filelock.LeaseSettingsMismatch):
            return False
        return True


def _watch(claim: filelock.SoftFileLease, path: Path, folder: Path) -> None:
    """Take the claim of a process that was killed before it filled it, or of another host's if it is not renewed.

    Raises:
        FolderInUseError: it is, or it belongs to a living process of this host.
    """
    if _waited_until_filled(path) and _acquired(claim, folder, _AT_ONCE_SECONDS):
        return
    holder = _holder(path)
    this_host = _own_host()
    if holder is not None and holder[0] != this_host:
        _log.info("%s: in use by %s; watching for %.0f s whether it still runs", folder, _shown(holder), _LEASE_SECONDS)
        if _acquired(claim, folder, 1.25 * _LEASE_SECONDS):
            return
    raise FolderInUseError(
        f"{folder}: in use by {_shown(holder)}; wait for it or stop it, or choose another folder. If you are sure that "
        f"it has ended, remove {path}"
    )


def _waited_until_filled(path: Path) -> bool:
    """Wait while a claim is empty, and remove one that stays so; false where it was filled from the start.

    Contenders decide one after another, under a lock of the operating system on the very file that they judge: what
    one of them has removed and made anew, another does not remove.
    """
    waited = False
    with contextlib.suppress(OSError):  # gone, or a filesystem without such locks
        while path.stat().st_size == 0:
            waited = True
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                began = time.monotonic()
                while os.fstat(file.fileno()).st_size == 0 and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    if time.monotonic() - began >= _EMPTY_SECONDS:
                        path.unlink()
                        return True
                    time.sleep(_EMPTY_SECONDS / 50)
    return waited


def _holder(path: Path) -> tuple[str, str] | None:
    """The host and process that a claim names; None where there is no claim."""
    try:
        lines = path.read_text(errors="replace")[:1024].splitlines()
    except OSError:
        return None
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return fields.get("host", _UNKNOWN), fields.get("pid", _UNKNOWN)


def _own_host() -> str:
    from filelock._identity import host_name  # as the claim spells it, with the container's process namespace

    return host_name()


def _shown(holder: tuple[str, str] | None) -> str:
    if holder is None:
        return "another process"
    host, process = holder
    if process == _UNKNOWN:
        return "a process that has not written its name"
    return f"process {process} on host {host.partition('?')[0]}"


def _end(folder: Path) -> None:
    """End this process, whose claim is lost: whatever it writes now may be another's."""
    text = f"\nerror: {folder}: its file {NAME} is gone or another's (this process did not renew it in time): ending\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(2)
