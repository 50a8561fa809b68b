"""Metrics of a run and where they go.

Values stay on the device until a log line is due, so that a GPU is not waited for at every update; the checks then
see every update and name the component that failed first.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from data2vec.core.distributed.ranks import Ranks
from data2vec.core.errors import TrainingError
from data2vec.core.files import write_atomically
from data2vec.core.task import Moments
from data2vec.core.training.health import HealthCheck


@dataclass(frozen=True)
class _Update:
    """The report of an update on this rank: scalars, and moments of signals."""

    number: int
    modality: str
    values: dict[str, Tensor]
    moments: dict[str, Moments]

    def packed(self) -> Tensor:
        """(n,) float64, everything of which the sum over ranks is meant."""
        scalars = [value.double().reshape(1) for value in self.values.values()]
        parts = [part for m in self.moments.values() for part in (m.count.reshape(1), m.sum, m.squares)]
        return torch.cat([*scalars, *parts])

    def unpacked(self, sums: Tensor) -> tuple[dict[str, float], Tensor]:
        """The values and spreads in what :meth:`packed` has become by adding up the ranks, and what follows it."""
        count = len(self.values)
        values = dict(zip(self.values, sums[:count].tolist(), strict=True))
        rest = sums[count:]
        for key, own in self.moments.items():
            width = own.sum.numel()
            added, first, second, rest = rest.tensor_split((1, 1 + width, 1 + 2 * width))
            values[key] = float(Moments(added.squeeze(0), first, second).spread())
        return values, rest


class Monitor:
    """Collects what updates report and writes ``metrics.jsonl`` and TensorBoard files into the run's folder."""

    def __init__(self, folder: Path, health: HealthCheck, *, start_update: int = 0, ranks: Ranks | None = None) -> None:
        """Open the files; lines of ``metrics.jsonl`` after ``start_update`` are what a cut-off run wrote: drop them.

        Only the first of ``ranks`` writes; all check what their values add up to.
        """
        self.path = folder / "metrics.jsonl"
        self.health = health
        self.ranks = ranks or Ranks()
        self._file: TextIO | None = None
        self._board: Any = None
        if self.ranks.first:
            self._open(folder, start_update)
        self._pending: list[_Update] = []
        self._checked: list[tuple[int, dict[str, float]]] = []
        self._samples = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def _open(self, folder: Path, start_update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        folder.mkdir(parents=True, exist_ok=True)
        history = [line for line in read_metrics(self.path) if line.get("update", 0) <= start_update]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in history).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_update + 1)

    def add(
        self,
        update: int,
        values: Mapping[str, Tensor],
        moments: Mapping[str, Moments],
        *,
        samples: int,
        waited: float,
        modality: str = "",
    ) -> None:
        """Remember one update.

        Args:
            update: its number.
            values: scalars on the device, of which the sum over ranks is meant.
            moments: of this rank's rows, by signal; the metrics get the spread over the rows of all ranks.
            samples: that all ranks saw.
            waited: seconds that this rank waited for data.
            modality: of its samples.
        """
        detached = {key: value.detach() for key, value in values.items()}
        self._pending.append(_Update(update, modality, detached, dict(moments)))
        self._samples += samples
        self._waited += waited

    @property
    def pending(self) -> bool:
        """True where there are updates since the last :meth:`flush`."""
        return bool(self._pending or self._checked)

    def check(self) -> None:
        """Judge every update that has not been yet, by what all ranks' values add up to; waits for the device.

        Raises:
            TrainingError: see :class:`HealthCheck`.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        own = torch.cat([update.packed() for update in pending]).cpu()  # waits for the device
        rest = self.ranks.add_up(own)
        for update in pending:  # of which every modality may have its own
            values, rest = update.unpacked(rest)
            self.health.check(update.number, values, update.modality)
            self._checked.append((update.number, values))

    def flush(self, **known: float) -> dict[str, float]:
        """Check, write the means of all updates since the last call and ``known``, return that line.

        Raises:
            TrainingError: see :class:`HealthCheck`.
        """
        self.check()
        by_key: dict[str, list[float]] = {}
        for _, values in self._checked:
            for key, value in values.items():
                by_key.setdefault(key, []).append(value)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        line = {
            "update": self._checked[-1][0],
            **{key: sum(values) / len(values) for key, values in by_key.items()},
        }
        self._checked.clear()
        line |= {"samples_per_second": self._samples / seconds, "data_wait": self._waited / seconds, **known}
        if "flops_per_sample" in line:
            line["tflops"] = line.pop("flops_per_sample") * line["samples_per_second"] / 1e12
            line["mfu"] = line["tflops"] * 1e12 / line.pop("peak_flops")
        self._samples, self._waited, self._since = 0, 0.0, time.perf_counter()
        self.write(line)
        return line

    def write(self, line: Mapping[str, float]) -> None:
        """Write one line of values as it is; ``update`` is its step.

        Raises:
            TrainingError: the disk refuses it.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(dict(line)) + "\n")
            self._file.flush()
            for key, value in line.items():
                if key != "update":
                    self._board.add_scalar(key, value, int(line["update"]))
        except OSError as error:
            raise TrainingError(
                f"{self.path}: cannot be written ({error}); free space or repair the disk, then run the same command "
                "to continue"
            ) from None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is no training (evaluation, saving), so that it does not count as slow training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def close(self) -> None:
        """Close the files; what the disk refuses here, it refused in :meth:`write`, which said so."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("update"), int):
            lines.append(line)
    return lines
