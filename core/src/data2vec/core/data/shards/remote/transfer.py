"""Getting a file whole: tries, limits on time and size, and comparison with what the index says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data2vec.core.data.shards.index import INDEX_NAME, ShardInfo
from data2vec.core.data.shards.remote.address import HTTP, protocol
from data2vec.core.data.shards.remote.body import AbsentError, Body, RefusedError, TroubleError
from data2vec.core.data.shards.remote.http import open_http
from data2vec.core.data.shards.remote.objects import open_object
from data2vec.core.data.shards.remote.patience import Helper, Patience, TooLongError
from data2vec.core.data.shards.remote.store import RoomTakenError, Writing
from data2vec.core.data.shards.tar import scan
from data2vec.core.errors import DataError, masked

_log = logging.getLogger(__name__)
_SMALL = 256 << 20  # bytes of an index or a tokenizer
_GRACE = 30.0  # seconds above the timeout for a call that makes several requests
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The limits of a fetch.

    ``idle``: seconds without an answer before a try is given up. ``seconds``: for one file, all tries together.
    ``largest``: bytes of a shard that no index describes. ``retries``: tries after the first, each after twice the
    ``pause`` (seconds) of the one before.
    """

    idle: float = 60.0
    seconds: float = 1800.0
    largest: int = 32 * 10**9
    retries: int = 3
    pause: float = 1.0


class _WrongError(Exception):
    """A file came whole and is not the one that was asked for."""


def get_small(url: str, limits: Limits, parse: Callable[[bytes], T]) -> T | None:
    """Fetch a small file and parse it; None where the server has none.

    Raises:
        DataError: it cannot be fetched, or ``parse`` refuses what is fetched time and again.
    """
    content = bytearray()

    def take(body: Body, read: Callable[[], bytes]) -> T:
        content.clear()
        if body.size is not None and body.size > _SMALL:
            raise _WrongError(f"has {body.size} bytes, at most {_SMALL} are read")
        while chunk := read():
            content.extend(chunk)
            if len(content) > _SMALL:
                raise _WrongError(f"has more than {_SMALL} bytes")
        _whole(body, len(content))
        try:
            return parse(bytes(content))
        except DataError as error:
            reason = str(error).removeprefix(masked(f"{url}: "))  # which the error of the fetch names
            raise _WrongError(f"{reason}{_page(bytes(content[:512]))}") from None

    try:
        return _tried(url, limits, take, Patience(limits.seconds), lambda: 0)
    except AbsentError:
        return None


def get_shard(url: str, info: ShardInfo | None, writing: Writing, limits: Limits, patience: Patience) -> None:
    """Write a shard to the disk, whole and compared with its entry in the index if there is one.

    Raises:
        DataError: it cannot be fetched, there is no room for it, or it is not what the index says.
    """
    started = time.monotonic()
    _log.info("fetching %s%s", masked(url), f" ({info.bytes / 1e6:.1f} MB)" if info else "")
    limit = info.bytes if info else limits.largest

    def take(body: Body, read: Callable[[], bytes]) -> str:
        if body.offset != writing.done:
            writing.restart()
        if body.size is not None and (body.size > limit or (info and body.size != info.bytes)):
            raise _WrongError(_other_size(str(body.size), info, limit))
        writing.expect(info.bytes if info else body.size)
        while chunk := read():
            if writing.done + len(chunk) > limit:
                raise _WrongError(_other_size(f"more than {limit}", info, limit))
            writing.write(chunk)
        _whole(body, writing.done)
        return _checked(url, info, writing)

    try:
        sha256 = _tried(url, limits, take, patience, lambda: writing.done, writing.restart)
    except AbsentError as error:
        raise DataError(f"{url}: {error}; check the address and the access rights") from None
    writing.finish(sha256)
    seconds = time.monotonic() - started
    _log.info("fetched %s: %.1f MB in %.1f s", masked(url), writing.done / 1e6, seconds)


def _tried(
    url: str,
    limits: Limits,
    take: Callable[[Body, Callable[[], bytes]], T],
    patience: Patience,
    done: Callable[[], int],
    restart: Callable[[], None] = lambda: None,
) -> T:
    """Let ``take`` read a file; after a broken connection it goes on where it broke, if the server can."""
    version, wrong, problem = "", 0, ""
    opened = open_http if protocol(url) in HTTP else open_object
    try:
        for attempt in range(limits.retries + 1):
            wait(attempt, limits, patience)
            helper, body = Helper(), None
            try:
                offset = done() if version else 0
                body = helper.call(
                    lambda: opened(url, offset, version, limits.idle),  # noqa: B023
                    limits.idle + _GRACE,
                    patience,
                )
                version = body.version
                read = body.read
                return take(body, lambda: helper.call(read, limits.idle + _GRACE, patience))  # noqa: B023
            except (TroubleError, TimeoutError) as error:
                problem = str(error)
            except RoomTakenError:
                restart()
                version, problem = "", "the disk is full while other shards are fetched"
            except _WrongError as error:
                restart()
                version, problem, wrong = "", str(error), wrong + 1
                if wrong > 1:
                    break
            finally:
                helper.end(body.close if body else None)
    except TooLongError:
        raise DataError(
            f"{url}: cannot be fetched within data.fetch_minutes={limits.seconds / 60:g}"
            f"{f' (the last try: {problem})' if problem else ''}; check the connection, or raise it"
        ) from None
    except AbsentError:
        raise
    except RefusedError as error:
        raise DataError(f"{url}: {error}; check the address and the access rights") from None
    if wrong > 1:
        raise DataError(f"{url}: {problem}")
    raise DataError(f"{url}: cannot be fetched, {attempt + 1} tries: {problem}")


def wait(attempt: int, limits: Limits, patience: Patience) -> None:
    """Wait before a try, longer each time."""
    if attempt:
        patience.pause(limits.pause * 2 ** (attempt - 1))


def _whole(body: Body, done: int) -> None:
    if body.size is not None and done != body.size:
        raise TroubleError(f"the connection ended {body.size - done} bytes early")


def _other_size(size: str, info: ShardInfo | None, limit: int) -> str:
    if info is None:
        return f"has {size} bytes, data.fetch_gb={limit / 1e9:g} allows {limit}; raise it, or write smaller shards"
    return (
        f"has {size} bytes, its {INDEX_NAME} says {info.bytes}; if the shard was replaced, index the set anew "
        "(tools/shard.py index)"
    )


def _checked(url: str, info: ShardInfo | None, writing: Writing) -> str:
    """The SHA-256 of what was fetched, if that is what was asked for."""
    with writing.path.open("rb") as file:
        page = _page(file.read(512))
    if info is not None and writing.done != info.bytes:
        raise _WrongError(_other_size(str(writing.done), info, info.bytes) + page)
    sha256 = writing.sha256()
    if info is not None and sha256 != info.sha256:
        raise _WrongError(
            f"has SHA-256 {sha256}, its {INDEX_NAME} says {info.sha256}; if the shard was replaced, index the set anew "
            f"(tools/shard.py index){page}"
        )
    if info is None:
        try:
            scan(writing.path)
        except DataError as error:
            raise _WrongError(str(error).removeprefix(f"{writing.path}: ") + page) from None
    return sha256


def _page(start: bytes) -> str:
    """A remark where a web page came instead of a file."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "; what came is a web page: does the network, or the server, ask you to log in?"
    return ""
