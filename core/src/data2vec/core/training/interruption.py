"""Ctrl-C and SIGTERM: save and stop cleanly, and at once when asked twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from data2vec.core.data.shards.remote.patience import Flag, stopped_by

EXIT_INTERRUPTED = 130  # what shells give a program that Ctrl-C ended
_SAME_REQUEST = 5.0  # s


class Interruption:
    """The effect of Ctrl-C and SIGTERM while a run is active.

    The first one asks the training loop to save and stop; before and after training, where there is nothing to save,
    it raises ``KeyboardInterrupt``. Shards that are being fetched, here or by the loader's workers, are given up. The
    second one exits at once, whatever the program does.

    A launcher passes a Ctrl-C on to its processes, which have seen it already: what comes within five seconds of the
    first signal counts as the same.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self._requested = Flag()
        self._fetches = contextlib.ExitStack()
        self._launched = launched
        self._first = 0.0
        self._training = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True when a first signal has come."""
        return self._requested.is_set()

    def __enter__(self) -> Self:
        self._fetches.enter_context(stopped_by(self._requested.is_set))
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._fetches.close()

    @contextlib.contextmanager
    def during_training(self) -> Iterator[None]:
        """The part in which the first signal is a request that the loop looks at."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if self._launched and time.monotonic() - self._first < _SAME_REQUEST:
                return
            _say("\nexiting at once\n" + ("\x1b[?25h" if sys.stderr.isatty() else ""))  # the bar hides the cursor
            os._exit(EXIT_INTERRUPTED)
        self._requested.set()
        self._first = time.monotonic()
        if not self._training:
            raise KeyboardInterrupt
        _say("\nstopping after this update and saving; once more to exit at once\n")


def _say(text: str) -> None:
    """Write from a signal handler, where the buffers of ``print`` may be in use already."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
