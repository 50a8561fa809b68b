"""Seconds of training, and what falls due by them."""

from __future__ import annotations

import time

from data2vec.core.settings.fields import TrainConfig


class Clock:
    """The time that a run has taken, over all its commands and in this one."""

    def __init__(self, train: TrainConfig, before: float) -> None:
        """Begin now; ``before``: seconds that the run has taken already."""
        self.train, self._before = train, before
        self._started = self._saved = time.monotonic()

    def seconds(self) -> float:
        """All that the run has taken."""
        return self._before + time.monotonic() - self._started

    def saved(self) -> None:
        """Note that a checkpoint was written now."""
        self._saved = time.monotonic()

    @property
    def is_up(self) -> bool:
        """True when ``train.max_minutes`` have passed."""
        limit = self.train.max_minutes
        return limit is not None and time.monotonic() - self._started >= 60.0 * limit

    @property
    def save_is_due(self) -> bool:
        """True when ``train.checkpoint_minutes`` have passed since the last save."""
        limit = self.train.checkpoint_minutes
        return limit is not None and time.monotonic() - self._saved >= 60.0 * limit
