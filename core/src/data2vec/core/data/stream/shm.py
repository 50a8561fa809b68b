"""Shared memory, in which loader workers hand over their batches: what to say when it is too small.

On Linux it is the file system ``/dev/shm``, of 64 MiB in a container unless its maker asks for more. Where it is full,
torch raises an error in a worker, or the system kills the worker with a bus error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

FOLDER = "/dev/shm"
# What torch says when it cannot write, or cannot reserve, the file of a shared tensor.
_SIGNS = ("unable to write to file </torch_", "unable to resize file </torch_", "unable to allocate shared memory",
          "unable to mmap", "unable to stretch file </torch_", "No space left on device")  # fmt: skip
_SIGNALS = {int(number): number.name for number in signal.Signals}
_MIB = 1 << 20


@dataclass(frozen=True)
class Room:
    """Bytes of the file system for shared memory: in all, and free."""

    total: int
    free: int

    @classmethod
    def now(cls) -> Self | None:
        """As it is; None where a system has no such folder."""
        try:
            status = os.statvfs(FOLDER)
        except OSError:
            return None
        return cls(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


def is_full(error: BaseException) -> bool:
    """Tell whether torch failed to put a tensor into shared memory."""
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS)


def too_small(room: Room | None, batch: int, waiting: int) -> str:
    """Say what is wrong and what to do.

    Args:
        room: of the shared memory.
        batch: bytes of a batch, 0 where none has been made.
        waiting: batches that all workers keep ready.
    """
    size = f" ({_mib(room.total)}, {_mib(room.free)} of it free now)" if room is not None else ""
    need = f"; {waiting} batches of {_mib(batch)} wait in it at a time, {_mib(batch * waiting)} in all" if batch else ""
    return (
        f"the shared memory {FOLDER}{size} is too small for the batches of the loader's workers{need}: give the "
        "container more (docker run --shm-size=8g; Kubernetes: a volume emptyDir with medium Memory there), lower "
        "data.workers or the batch, or set data.workers=0, which needs none"
    )


def cause_of_death(exit_codes: Iterable[int | None], room: Room | None, batch: int, waiting: int) -> str:
    """Say why workers are gone, by their exit codes: negative where a signal ended them, None where they live."""
    codes = {code for code in exit_codes if code}
    named = ", ".join(sorted(_SIGNALS.get(-code, f"exit code {code}") for code in codes)) or "no exit code"
    if -signal.SIGBUS in codes:
        return f"a loader worker died ({named}): most often {too_small(room, batch, waiting)}"
    return f"a loader worker died ({named}): most often memory ran out; lower data.workers"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB" if size < 100 * _MIB else f"{size / _MIB:,.0f} MiB"
