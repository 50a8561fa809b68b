"""The answer of a server, whatever its protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CHUNK = 1 << 20


class TroubleError(Exception):
    """Something that may be over when it is tried again."""


class RefusedError(Exception):
    """Something that stays as it is."""


class AbsentError(RefusedError):
    """There is no such file, or nobody says whether there is."""


@dataclass(frozen=True)
class Body:
    """A file from ``offset`` on.

    ``size``: of the whole file, None where the server does not say. ``version``: changes with the content; empty where
    the server does not say, so that a broken transfer begins anew. ``read``: the next bytes, none at the end.
    """

    offset: int
    size: int | None
    version: str
    read: Callable[[], bytes]
    close: Callable[[], None]
