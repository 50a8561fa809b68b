"""The files of a user as a modality's command of ``tools/shard.py`` gives them to be written into shards.

The command of ``data2vec.NAME`` is its module ``sharding``: ``add_arguments(parser)`` declares the command's arguments
and returns a function from them to a :class:`Source`. Further commands stand in its ``COMMANDS``, by names that begin
with ``NAME-``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Item(Protocol):
    """One file that becomes a sample, or a part of a corpus that becomes several."""

    @property
    def key(self) -> str: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """The samples of a user's files.

    ``encode`` turns an item into the members of a sample, or into an object with several ``samples`` (key, members), a
    line in ``skipped`` for each document that was left out, and the number of the ``documents`` that were not. It must
    be picklable.
    """

    modality: str
    items: Sequence[Item]
    class_names: tuple[str, ...]
    encode: Callable[[Any], Any]
    settings: str  # what else decides the shards' bytes
    samples: int | None = None  # that the items make, about, where it is not one each
    beside: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # files that belong beside the shards
    scratch: Path | None = None  # a folder that is not needed once the set is finished
    unit: str = "files"  # what is skipped
    files: int | None = None  # whose content the items hold, where an item is not a file
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that were found and are in no item, by kind


def positive(text: str) -> int:
    """A whole number above 0 on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
