"""The scores of a task while it trains: when they are taken, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """The scoring of a task while it trains.

    ``score``: called on every rank, each on its own; what it returns joins the metrics. ``every``: updates from one
    call to the next, and after the last; None: never. ``lowest``: scores of which the lowest is the best. ``patience``:
    training ends when so many scores in a row were no better than the best before; None: it never does for that.
    """

    score: Callable[[], Mapping[str, float]]
    every: int | None
    lowest: frozenset[str] = frozenset()
    patience: int | None = None
