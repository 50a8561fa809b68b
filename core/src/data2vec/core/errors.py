"""The exceptions a user can meet: each says what was wrong (the key or file and its value) and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST_LINE = 400


def one_line(text: object) -> str:
    """Text of any origin in one line that is safe to print, cut where it is long."""
    words = " ".join(str(text).split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return safe if len(safe) <= _LONGEST_LINE else f"{safe[:_LONGEST_LINE]}..."


class Data2VecError(Exception):
    """Base of every error that a user can cause and mend; commands print it without a traceback."""


class ConfigError(Data2VecError):
    """One or more settings are wrong; all of them are listed."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        heading = "1 setting is wrong:" if len(self.problems) == 1 else f"{len(self.problems)} settings are wrong:"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))


class DataError(Data2VecError):
    """A shard, an index or a list of shards cannot be used. Its text never shows what gives access to a server."""

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class SampleError(Data2VecError):
    """One sample cannot be used; the pipeline skips it, counts it and names it in the log."""


class CheckpointError(Data2VecError):
    """A checkpoint cannot be written, read, or does not belong to this configuration."""


class FolderInUseError(Data2VecError):
    """Another process writes to the folder."""


class TrainingError(Data2VecError):
    """Training stopped: non-finite loss, collapse, or data that ran dry."""


class PeerError(TrainingError):
    """Another rank failed and says why itself; this one only has to end."""


class RankLostError(TrainingError):
    """A process that trains with this one has ended, so that nothing can be exchanged any more."""


_USER = re.compile(r"(?<=://)[^/\s@'\"?]*@")
_QUERY = re.compile(r"(\b(?:http|https)://[^\s?'\"]*)\?[^\s'\"]*?(?=[:;,.)\]]*(?:[\s'\"]|$))")


def masked(text: str) -> str:
    """A text without the passwords and the signatures of the URLs in it."""
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))
