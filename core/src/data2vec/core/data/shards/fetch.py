"""Shards over http(s), kept in a folder of the local disk.

Every process of a machine (ranks and their loader workers) may ask for the same shard; a lock file lets the first
fetch it while the others wait. A file appears under its name when it is complete. The folder's size is bounded; what
was used longest ago goes first, which does no harm to processes that still have it open.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import BinaryIO, Protocol

from data2vec.core.data.shards.index import INDEX_NAME, ShardInfo
from data2vec.core.errors import DataError
from data2vec.core.files import commit, temporary_name

_CHUNK = 1 << 20
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers after which it is worth asking again
_ABSENT = frozenset({403, 404, 410})
_INDEX_LIMIT = 256 << 20


class _Response(Protocol):
    status: int
    headers: HTTPMessage

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


def _opener() -> urllib.request.OpenerDirector:
    """urllib without the handlers for file:, ftp: and data:, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def url_name(url: str) -> str:
    """The file name at the end of a URL's path."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]


def index_url(url: str) -> str:
    """Where the index of a shard's folder is; a query (an access token) is kept."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(path=f"{parts.path.rsplit('/', 1)[0]}/{INDEX_NAME}").geturl()


@dataclass(frozen=True)
class ShardCache:
    """Local copies of remote shards.

    ``folder``: where they lie. ``max_bytes``: largest sum of their sizes; None leaves a tenth of the space there is
    for them. ``timeout``: seconds without an answer before a try is given up. ``retries``: tries after the first,
    each after twice the ``pause`` (seconds) of the one before.
    """

    folder: Path
    max_bytes: int | None = None
    timeout: float = 60.0
    retries: int = 3
    pause: float = 1.0

    def text(self, url: str) -> bytes | None:
        """A small file, or None where the server has none.

        Raises:
            DataError: the server cannot be reached or answers with an error.
        """
        for attempt in range(self.retries + 1):
            self._wait(attempt)
            try:
                response = self._open(url, {})
                try:
                    return response.read(_INDEX_LIMIT)
                finally:
                    response.close()
            except urllib.error.HTTPError as error:
                if error.code in _ABSENT:
                    return None
                problem = self._refusal(url, error)
            except (OSError, HTTPException, ValueError) as error:
                problem = _reason(error)
        raise self._given_up(url, problem)

    def fetch(self, url: str, info: ShardInfo | None = None) -> Path:
        """The local copy of a shard, fetched if there is none.

        Args:
            url: where it is.
            info: its entry in the index, if there is one: size and checksum are compared with it.

        Raises:
            DataError: it cannot be fetched, or is not what the index says.
        """
        digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", url_name(url).removesuffix(".tar"))[-100:]
        path = self.folder / f"{digest}-{name}.tar"
        try:
            if not self._touch(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._locked(self.folder / f".{digest}.lock"):
                    if not self._touch(path):
                        self._download(url, path, info)
        except OSError as error:
            raise DataError(f"{path}: the shard of {url} cannot be kept there ({error.strerror or error})") from None
        return path

    @staticmethod
    def _touch(path: Path) -> bool:
        """Note that a shard is used now; false where it is not here."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @staticmethod
    @contextmanager
    def _locked(path: Path) -> Iterator[None]:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
            yield

    def _download(self, url: str, path: Path, info: ShardInfo | None) -> None:
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                self._transfer(url, file)
                file.flush()
                os.fsync(file.fileno())
            self._check(url, temporary, info)
            commit(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._evict(path)

    def _transfer(self, url: str, file: BinaryIO) -> None:
        """Write the whole body to ``file``; after a broken connection go on where it broke, if the server can."""
        validator: str | None = None
        for attempt in range(self.retries + 1):
            self._wait(attempt)
            done = file.tell()
            resume = {"Range": f"bytes={done}-", "If-Range": validator} if done and validator else {}
            try:
                response = self._open(url, resume)
                try:
                    if response.status != HTTPStatus.PARTIAL_CONTENT:
                        file.seek(0)
                        file.truncate()
                    etag = response.headers.get("ETag", "")
                    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
                    missing = _copy(response, file)
                finally:
                    response.close()
                if not missing:
                    return
                problem = f"the connection ended {missing} bytes early"
            except urllib.error.HTTPError as error:
                problem = self._refusal(url, error)
            except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException, ValueError) as error:
                problem = _reason(error)
        raise self._given_up(url, problem)

    def _open(self, url: str, headers: dict[str, str]) -> _Response:
        request = urllib.request.Request(url, headers={"User-Agent": "data2vec", **headers})
        response: _Response = _opener().open(request, timeout=self.timeout)
        return response

    def _refusal(self, url: str, error: urllib.error.HTTPError) -> str:
        problem = f"the server answers {error.code} {error.reason}"
        error.close()
        if error.code not in _PASSING:
            raise DataError(f"{url}: {problem}; check the address and the access rights") from None
        return problem

    def _given_up(self, url: str, problem: str) -> DataError:
        return DataError(f"{url}: cannot be fetched, {self.retries + 1} tries: {problem}")

    def _wait(self, attempt: int) -> None:
        if attempt:
            time.sleep(self.pause * 2 ** (attempt - 1))

    @staticmethod
    def _check(url: str, path: Path, info: ShardInfo | None) -> None:
        if info is None:
            return
        size = path.stat().st_size
        if size != info.bytes:
            raise DataError(f"{url}: has {size} bytes, its {INDEX_NAME} says {info.bytes}; index the set anew")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                raise DataError(f"{url}: is not the file its {INDEX_NAME} describes (SHA-256); index the set anew")

    def _evict(self, keep: Path) -> None:
        """Remove what was used longest ago until the rest fits; never what was just fetched."""
        files = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            files.append((status.st_mtime, status.st_size, path))
        used = sum(size for _, size, _ in files)
        limit = self.max_bytes
        if limit is None:
            limit = (used + shutil.disk_usage(self.folder).free) * 9 // 10
        for _, size, path in sorted(files):
            if used <= limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                used -= size


def _copy(response: _Response, file: BinaryIO) -> int:
    """Copy a body; returns how many of the announced bytes are missing."""
    length = response.headers.get("Content-Length")
    copied = 0
    while chunk := _receive(response):
        file.write(chunk)
        copied += len(chunk)
    return int(length) - copied if length is not None and length.isdigit() else 0


def _receive(response: _Response) -> bytes:
    try:
        return response.read(_CHUNK)
    except OSError as error:  # told apart from a disk that is full
        raise ConnectionError(str(error) or type(error).__name__) from None


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__
