"""Metrics of a run, where they go, and the checks that stop a run that has stopped learning.

Values stay on the device until a log line is due, so that a GPU is not waited for at every update; the checks then
see every update and name the component that failed first.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from data2vec.core.config import TrainConfig
from data2vec.core.errors import TrainingError
from data2vec.core.training.ranks import Ranks

_ADVICE = {
    "extractor": "lower optim.lr, raise optim.warmup, or clip gradients (optim.clip=1.0)",
    "teacher": "raise teacher.decay_start and teacher.decay_end, lower optim.lr, or raise optim.warmup",
    "prediction": "lower optim.lr, raise optim.warmup, or mask less in longer or larger pieces",
    "loss": "lower optim.lr, raise optim.warmup, or clip gradients (optim.clip=1.0)",
}
_COMPONENTS = {  # in the order in which data flows: the first that fails is the cause
    "extractor_spread": "extractor",
    "target_spread": "teacher",
    "prediction_spread": "prediction",
    "loss": "loss",
}


class HealthCheck:
    """The decision, from every update's values, whether a run still learns; each modality is judged by itself.

    A spread counts as collapsed when it stays below its threshold for ``collapse_after`` updates of its modality.
    Predictions start without any spread, so they are judged once they have been healthy, or after warm-up.
    """

    def __init__(self, config: TrainConfig, warmup: int, modalities: Sequence[str] = ("",)) -> None:
        """Judge nothing yet.

        Args:
            config: thresholds.
            warmup: updates of the learning rate's warm-up.
            modalities: names, of which errors give one where there are several.
        """
        self.config = config
        self.warmup = warmup
        self.modalities = tuple(modalities)
        self._low: dict[str, tuple[int, int]] = {}  # by modality and signal: since which update, for how many
        self._was_healthy: set[str] = set()

    def check(self, update: int, values: Mapping[str, float], modality: str = "") -> None:
        """Look at one update.

        Args:
            update: its number.
            values: ``loss``, ``extractor_spread``, ``target_spread`` and ``prediction_spread``.
            modality: of its samples.

        Raises:
            TrainingError: a value is not finite, or targets or predictions have collapsed.
        """
        where = f" of {modality}" if len(self.modalities) > 1 else ""
        for key, component in _COMPONENTS.items():
            if key in values and not math.isfinite(values[key]):
                what = f"the loss{where}" if component == "loss" else f"the {component}'s output{where}"
                raise TrainingError(
                    f"update {update}: {what} is not finite ({key} is {values[key]}; the first to fail was the "
                    f"{component}). Try: {_ADVICE[component]}"
                )
        thresholds = {
            "target_spread": self.config.min_target_spread,
            "prediction_spread": self.config.min_prediction_spread,
        }
        for signal, threshold in thresholds.items():
            if signal not in values:
                continue
            key = f"{modality}/{signal}"
            if values[signal] >= threshold:
                self._was_healthy.add(key)
                self._low.pop(key, None)
                continue
            if signal == "prediction_spread" and key not in self._was_healthy and update < self.warmup:
                continue
            since, before = self._low.get(key, (update, 0))
            self._low[key] = since, before + 1
            if before + 1 >= self.config.collapse_after:
                component = _COMPONENTS[signal]
                what = "targets" if component == "teacher" else "predictions"
                raise TrainingError(
                    f"update {update}: the {what}{where} have collapsed ({signal} is {values[signal]:.2g}, below "
                    f"{threshold:g} since update {since}; the first to fail was the {component}). "
                    f"Try: {_ADVICE[component]}"
                )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"low": {key: list(value) for key, value in self._low.items()}, "was_healthy": sorted(self._was_healthy)}

    def load_state(self, state: Mapping[str, Any], update: int) -> None:
        """Go on from :meth:`state` after ``update``, or from what earlier versions kept for all modalities together."""
        if "low_since" in state:
            low = {old: (int(since), update - int(since) + 1) for old, since in state["low_since"].items()}
            self._low = {key: value for old, value in low.items() for key in self._keys(old)}
            self._was_healthy = {key for old in state["was_healthy"] for key in self._keys(old)}
            return
        self._low = {str(key): (int(since), int(count)) for key, (since, count) in state["low"].items()}
        self._was_healthy = {str(key) for key in state["was_healthy"]}

    def _keys(self, signal: str) -> list[str]:
        return [f"{modality}/{signal}" for modality in self.modalities]


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
        self._pending: list[tuple[int, str, dict[str, Tensor]]] = []
        self._checked: list[tuple[int, dict[str, float]]] = []
        self._samples = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def _open(self, folder: Path, start_update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        folder.mkdir(parents=True, exist_ok=True)
        history = [line for line in read_metrics(self.path) if line.get("update", 0) <= start_update]
        temporary = self.path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history))
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_update + 1)

    def add(
        self, update: int, values: Mapping[str, Tensor], *, samples: int, waited: float, modality: str = ""
    ) -> None:
        """Remember one update.

        Args:
            update: its number.
            values: scalars on the device, of which the sum over ranks is meant.
            samples: that all ranks saw.
            waited: seconds that this rank waited for data.
            modality: of its samples.
        """
        self._pending.append((update, modality, {key: value.detach() for key, value in values.items()}))
        self._samples += samples
        self._waited += waited

    @property
    def pending(self) -> bool:
        """Whether there are updates since the last :meth:`flush`."""
        return bool(self._pending or self._checked)

    def check(self) -> None:
        """Judge every update that has not been yet, by what all ranks' values add up to; waits for the device.

        Raises:
            TrainingError: see :class:`HealthCheck`.
        """
        if not self._pending:
            return
        stacked = torch.stack([value.float() for *_, values in self._pending for value in values.values()])
        sums = iter(self.ranks.sum(stacked.tolist()))  # waits for the device
        pending, self._pending = self._pending, []
        for update, modality, values in pending:  # of which every modality may have its own
            summed = {key: next(sums) for key in values}
            self.health.check(update, summed, modality)
            self._checked.append((update, summed))

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
