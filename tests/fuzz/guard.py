"""The guard around each case: it ends in time with a value or one clear error, and nothing else happens."""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from data2vec.core.errors import Data2VecError

SECONDS = 10.0  # of one case; each takes milliseconds
MEMORY = 1 << 30  # bytes by which one case may raise the peak of this process


class TooSlow(BaseException):
    """No library swallows it."""


_EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "pty.spawn", "socket.connect", "os.startfile", "webbrowser.open")  # fmt: skip
_WRITES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.chmod": 1,
           "os.truncate": 1, "shutil.rmtree": 1}  # fmt: skip
_watching: list[Watch] = []


@dataclass
class Watch:
    """Records what this process executes, and what it writes outside of ``inside``."""

    inside: Path
    found: list[str] = field(default_factory=list)

    def saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EXECUTES:
            self.found.append(f"{event}{arguments!r}"[:300])
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                paths = (path,)
        elif event in _WRITES:
            paths = arguments[: _WRITES[event]]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.fsdecode(path))
                if not place.startswith((f"{self.inside}/", "/dev/", "/proc/")) and not place.endswith(".pyc"):
                    self.found.append(f"{event}: {place}"[:300])


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        watch = _watching[-1]
        _watching.clear()  # what the watch itself does is no event
        try:
            watch.saw(event, arguments)
        finally:
            _watching.append(watch)


sys.addaudithook(_audit)


@contextmanager
def watched(inside: Path) -> Iterator[Watch]:
    watch = Watch(inside.resolve())
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Outcome:
    """``value``: what the case gave; ``error``: the one clear error that it ended with."""

    value: Any = None
    error: Data2VecError | None = None


def guarded(run: Callable[[], Any], inside: Path, kinds: tuple[type[Data2VecError], ...]) -> Outcome:
    """Run one case: it ends in time with a value or with one of ``kinds``, executes nothing and writes only inside."""
    before = peak()
    previous = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where no signal is handled
    try:
        with watched(inside) as watch:
            try:
                outcome = Outcome(value=run())
            except kinds as error:
                outcome = Outcome(error=error)
    except TooSlow as error:
        raise AssertionError(f"took more than {SECONDS:g} s") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert not watch.found, watch.found
    assert peak() - before < MEMORY, f"took {(peak() - before) >> 20} MiB"
    if outcome.error is not None:
        check_message(str(outcome.error))
    return outcome


def check_message(message: str) -> None:
    """It names what is wrong in a few lines, and is not what a library printed about itself."""
    assert len(message.strip()) >= 20, repr(message)
    assert len(message) < 20_000, message[:500]
    assert "Traceback" not in message
    assert " object at 0x" not in message, message
    assert re.search(r"[:='/]|\w[._]\w", message), message
