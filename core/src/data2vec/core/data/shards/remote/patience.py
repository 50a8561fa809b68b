"""Waiting that ends: at a time limit, when the program ends, or when a call that may hang does."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from data2vec.core.errors import DataError

_POLL = 0.1  # seconds between looks at whether the program ends
T = TypeVar("T")

_ends: list[Callable[[], bool]] = []


class FetchStoppedError(DataError):
    """The program ends while a shard is fetched."""


class TooLongError(Exception):
    """The time for one shard is over."""


class Flag:
    """A switch that a process shares with those it starts. It has no lock, so signal handlers may set it."""

    def __init__(self) -> None:
        self._value = RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        self._value.value = True

    def is_set(self) -> bool:
        return bool(self._value.value)


def stop_when(ended: Callable[[], bool]) -> None:
    """Let the fetches of this process, and of those it forks from now on, end as soon as ``ended`` is true."""
    _ends.append(ended)


@contextmanager
def stopped_by(ended: Callable[[], bool]) -> Iterator[None]:
    """As :func:`stop_when`, for as long as the context lasts."""
    stop_when(ended)
    try:
        yield
    finally:
        _ends.remove(ended)


class Patience:
    """The time that there is for one file."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the limit.

        Raises:
            TooLongError: none. FetchStoppedError: the program ends.
        """
        if any(ended() for ended in _ends):
            raise FetchStoppedError("a shard was being fetched when the program was told to end")
        left = self._end - time.monotonic()
        if left <= 0:
            raise TooLongError
        return left

    def pause(self, seconds: float) -> None:
        """Wait, unless there is no time for it."""
        until = time.monotonic() + seconds
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, _POLL, self.left()))
        self.left()


class Helper:
    """A thread for calls that may never return, as name look-ups and servers that send a byte a minute."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (function := self._asked.get()) is not None:
            try:
                answer = True, function()
            except BaseException as error:
                answer = False, error
            self._answers.put(answer)

    def call(self, function: Callable[[], T], idle: float, patience: Patience) -> T:
        """Wait for what a call returns or raises; after an error of waiting, the helper is of no further use.

        Raises:
            TimeoutError: it takes longer than ``idle`` seconds.
        """
        self._asked.put(function)
        until = time.monotonic() + idle
        while True:
            try:
                succeeded, value = self._answers.get(timeout=min(_POLL, patience.left()))
            except Empty:
                if time.monotonic() > until:
                    raise TimeoutError(f"no answer for {idle:g} s") from None
            else:
                if succeeded:
                    result: T = value
                    return result
                raise value

    def end(self, last: Callable[[], Any] | None = None) -> None:
        """Let the thread end after the call it is in, and one more; nobody waits for it."""
        if last is not None:
            self._asked.put(last)
        self._asked.put(None)
