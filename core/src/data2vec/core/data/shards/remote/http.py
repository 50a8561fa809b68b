"""Files over http(s).

urllib and not fsspec's http: a transfer has to be taken up only where the server confirms that the file is the same
(``If-Range``) and sends the part that was asked for, encodings have to be refused, and every receive has to end.
fsspec decodes bodies, hides statuses and headers, reads ranges without a validator, and needs aiohttp.
"""

from __future__ import annotations

import base64
import re
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage
from typing import Protocol

from data2vec.core.data.shards.remote.body import CHUNK, AbsentError, Body, RefusedError, TroubleError

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers after which it is worth asking again
_ABSENT = frozenset({403, 404, 410})


class _Response(Protocol):
    status: int
    reason: str
    headers: HTTPMessage

    def read1(self, size: int, /) -> bytes: ...
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


def open_http(url: str, offset: int, version: str, timeout: float) -> Body:
    """A file, from ``offset`` on if it still is the ``version`` of which so much was read, else from its beginning.

    Raises:
        TroubleError: another try may succeed. RefusedError: none will.
    """
    try:
        response: _Response = _opener().open(_request(url, offset, version), timeout=timeout)
    except urllib.error.HTTPError as error:
        problem = f"the server answers {error.code} {error.reason}"
        error.close()
        kind = TroubleError if error.code in _PASSING else AbsentError if error.code in _ABSENT else RefusedError
        raise kind(problem) from None
    except (OSError, HTTPException, ValueError) as error:
        raise TroubleError(_reason(error)) from None
    try:
        begin, size = _extent(response, offset)
    except BaseException:
        response.close()
        raise
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    return Body(begin, size, validator, lambda: _receive(response), response.close)


def _request(url: str, offset: int, version: str) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    user, found, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(
        parts._replace(netloc=host, fragment="").geturl(),
        headers={"User-Agent": "data2vec", "Accept-Encoding": "identity"},
    )
    if found:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if offset and version:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", version)
    return request


def _extent(response: _Response, asked: int) -> tuple[int, int | None]:
    """Read where a body begins, and the size of the whole file."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise TroubleError(f"the server sends an encoded body ({encoding[:40]}); let it send the file as it is")
    length = response.headers.get("Content-Length")
    rest = int(length) if length is not None and re.fullmatch("[0-9]{1,18}", length.strip()) else None
    if response.status == HTTPStatus.OK:
        return 0, rest
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        raise TroubleError(f"the server answers {response.status} {response.reason} instead of the file")
    stated = response.headers.get("Content-Range", "")
    part = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", stated.strip())
    if not asked or part is None or int(part[1]) != asked:
        raise TroubleError(
            f"the server sends another part of the file ({stated[:60] or 'it does not say which'}) than byte {asked} on"
        )
    return asked, int(part[2]) + 1 if part[3] == "*" else int(part[3])


def _receive(response: _Response) -> bytes:
    try:
        return response.read1(CHUNK)  # what one receive gives: ``read`` would wait for all of it
    except (OSError, HTTPException, ValueError) as error:
        raise TroubleError(_reason(error)) from None


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__
