"""Progress for a person: a live bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = (  # metrics, their names and digits
    ("loss", "loss", 3),
    ("target_spread", "targets", 2),
    ("prediction_spread", "predictions", 2),
    ("loss_accuracy", "training accuracy", 3),
    ("accuracy", "accuracy", 3),
    ("mean_average_precision", "precision", 3),
    ("pearson", "correlation", 3),
    ("wer", "WER", 3),
)


class Display(Protocol):
    """A view of the progress for a person."""

    def update(self, line: Mapping[str, float], updates: int) -> None:
        """Show a line of metrics of a run that is to have ``updates``."""


class ConsoleDisplay:
    """The newest metrics line, while training runs."""

    def __init__(self, console: Console, *, done: int = 0) -> None:
        self.console = console
        self._done = done
        self._last = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, line: Mapping[str, float], updates: int) -> None:
        """Show a line of metrics."""
        shown = [f"{name} {line[key]:.{digits}f}" for key, name, digits in _SHOWN if key in line]
        values = "  ".join([*shown, f"{line['samples_per_second']:.0f} samples/s"])
        update = int(line["update"])
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=updates, completed=self._done, values="")
            self._bar.update(self._task, completed=update, values=values)
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES or update == updates:
            self._last = time.monotonic()
            self.console.print(f"update {update}/{updates}  {values}", highlight=False, soft_wrap=True)
