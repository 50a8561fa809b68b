"""One update: the next ``train.batch`` samples of a modality, from its endless, seeded stream through task and engine.

They come in micro-batches; the loss is averaged over all that the task counts in the update, on all ranks, so that
neither accumulation nor the number of ranks changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import BrokenCounter, TrainData
from data2vec.core.engines.engine import Engine
from data2vec.core.errors import Data2VecError
from data2vec.core.settings.fields import Recipe
from data2vec.core.task import Moments
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.share import Share


@dataclass
class Applied:
    """An applied update.

    ``samples``: of all ranks. ``waited``: seconds that this rank waited for its data. ``values``: means over this
    rank's part, by name. ``moments``: of this rank's rows, by the task's signals.
    """

    samples: int
    waited: float
    values: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)


@dataclass
class _Gathered:
    """The micro-batches of this rank, or why there are none. ``broken``: samples that were left out of them."""

    parts: list[Any] = field(default_factory=list)
    broken: int = 0
    waited: float = 0.0
    failure: Data2VecError | None = None


class Updater:
    """The updates of a run.

    Args:
        recipe: the settings.
        engine: runs the task.
        data: training data of each modality.
        share: what this rank does of an update.
        stop_requested: whether the run is to stop.

    Raises:
        DataError: there is too little data for one update.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        data: Mapping[str, TrainData],
        share: Share,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.recipe, self.engine, self.data, self.share = recipe, engine, data, share
        self.stop_requested, self.ranks = stop_requested, engine.ranks
        self._broken = {name: BrokenCounter(recipe.data.max_broken, d.total) for name, d in data.items()}
        self._streams: dict[str, Any] = {}
        for d in data.values():
            d.require(1 if recipe.train.micro_length else recipe.train.batch)

    def open(self, positions: Mapping[str, int]) -> None:
        """Begin to read each modality's samples at a position."""
        self._streams = {name: self._stream(name, position) for name, position in positions.items()}

    def close(self) -> None:
        """Stop reading."""
        for stream in self._streams.values():
            stream.close()

    def apply(self, name: str, update: int) -> Applied | None:
        """Apply an update with the next samples of a modality; None where its data has stopped because the run is to.

        Raises:
            DataError: shards became unreadable, or too many samples are broken.
        """
        gathered = self._gather(name, update)
        parts = gathered.parts
        own = (sum(part.count for part in parts), sum(map(len, parts)), gathered.broken)
        count, samples, broken, failed, stopping = map(
            int, self.ranks.sum([*own, gathered.failure is not None, self.stop_requested()])
        )
        if failed and stopping:  # the signal has reached the loader's workers first
            return None
        if failed:
            self.ranks.agree(gathered.failure)
        with self.ranks.alike():
            self._broken[name].judge(samples + broken, broken)
        applied = Applied(samples, gathered.waited)
        for part in parts:
            self._accumulate(part, count, update, applied)
        rate = learning_rate(self.recipe.optim, update, self.recipe.train.updates)
        applied.values["gradient_norm"] = self.engine.step(rate, update + 1) / self.ranks.world
        self._last = parts[-1]
        return applied

    def known(self, update: int, *, inspect: bool) -> dict[str, float]:
        """Values of a log line that no mean is taken of.

        Args:
            update: the number of applied updates.
            inspect: whether to add what takes a forward pass of its own (:meth:`Task.inspect`).
        """
        engine, recipe = self.engine, self.recipe
        values = {"learning_rate": learning_rate(recipe.optim, update - 1, recipe.train.updates)}
        values |= engine.task.known(update)
        if engine.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(engine.device) / 2**30
        return values | engine.task.inspect(self._last.to(engine.device)) if inspect else values

    def judge_all(self) -> None:
        """Judge the broken samples of the whole run, of which few had to be enough until now.

        Raises:
            DataError: there are too many.
        """
        with self.ranks.alike():
            for counter in self._broken.values():
                counter.finish()

    def _gather(self, name: str, update: int) -> _Gathered:
        gathered, started = _Gathered(), time.perf_counter()
        try:
            batches: list[Batch] = [next(self._streams[name]) for _ in range(self.share.passes)]
            gathered.waited = time.perf_counter() - started
            for batch in batches:
                self._broken[name].name(batch)
                gathered.broken += len(batch.broken)
                part = self.engine.task.prepare(batch, seed=self.recipe.train.seed, update=update)
                gathered.parts.append(part)
        except Data2VecError as error:
            gathered.failure = error
        return gathered

    def _accumulate(self, part: Any, count: int, update: int, applied: Applied) -> None:
        step = self.engine.accumulate(part.to(self.engine.device), scale=1.0 / count, update=update)
        new = {"loss": step.total.detach() / count}
        new |= {f"loss_{key}": loss * (step.count / count) for key, loss in step.losses.items()}
        values, moments = applied.values, applied.moments
        applied.values = {key: values[key] + value if values else value for key, value in new.items()}
        applied.moments = {key: moments[key] + m if moments else m for key, m in step.moments.items()}

    def _stream(self, name: str, start: int) -> Iterator[Batch]:
        ranks, data, share, pin = self.ranks, self.data[name], self.share, self.engine.device.type == "cuda"
        length = self.recipe.train.micro_length
        if length:
            return data.length_batches(start, length, ranks.rank, ranks.world, parts=share.parts, pin_memory=pin)
        return data.batches(start, share.micro_batch, ranks.rank, ranks.world, pin_memory=pin)
