"""The checks that stop a run that has stopped learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data2vec.core.errors import TrainingError
from data2vec.core.task import Vital


class HealthCheck:
    """The decision, from every update's values, whether a run still learns; each modality is judged by itself.

    A spread counts as collapsed when it stays below its threshold for ``collapse_after`` updates of its modality.
    One that starts flat is judged once it has been healthy, or after warm-up.
    """

    def __init__(
        self, vitals: Sequence[Vital], *, collapse_after: int, warmup: int, modalities: Sequence[str] = ("",)
    ) -> None:
        """Judge nothing yet.

        Args:
            vitals: of the task, in the order in which data flows.
            collapse_after: updates in a row with a low spread that count as a collapse.
            warmup: updates of the learning rate's warm-up.
            modalities: names, of which errors give one where there are several.
        """
        self.vitals, self.collapse_after, self.warmup = tuple(vitals), collapse_after, warmup
        self.modalities = tuple(modalities)
        self._low: dict[str, tuple[int, int]] = {}  # by modality and signal: since which update, for how many
        self._was_healthy: set[str] = set()

    def check(self, update: int, values: Mapping[str, float], modality: str = "") -> None:
        """Look at one update.

        Args:
            update: its number.
            values: by the signals of ``vitals``; what is missing is not judged.
            modality: of its samples.

        Raises:
            TrainingError: a value is not finite, or a spread has collapsed.
        """
        given = [(vital, values[vital.signal]) for vital in self.vitals if vital.signal in values]
        where = f" of {modality}" if len(self.modalities) > 1 else ""
        for vital, value in given:
            if not math.isfinite(value):
                what = f"the loss{where}" if vital.component == "loss" else f"the {vital.component}'s output{where}"
                raise TrainingError(
                    f"update {update}: {what} is not finite ({vital.signal} is {value}; the first to fail was the "
                    f"{vital.component}). Try: {vital.advice}"
                )
        for vital, value in given:
            if vital.least is not None:
                self._judge(vital, vital.least, value, update, modality, where)

    def _judge(self, vital: Vital, least: float, value: float, update: int, modality: str, where: str) -> None:
        key = f"{modality}/{vital.signal}"
        if value >= least:
            self._was_healthy.add(key)
            self._low.pop(key, None)
            return
        if vital.starts_flat and key not in self._was_healthy and update < self.warmup:
            return
        since, before = self._low.get(key, (update, 0))
        self._low[key] = since, before + 1
        if before + 1 >= self.collapse_after:
            raise TrainingError(
                f"update {update}: the {vital.what}{where} have collapsed ({vital.signal} is {value:.2g}, below "
                f"{least:g} since update {since}; the first to fail was the {vital.component}). Try: {vital.advice}"
            )

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
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
