"""The training loop.

An update of modality m takes the next ``train.batch`` samples of m from its endless, seeded stream, in micro-batches;
the loss is averaged over all that the task counts in the update, so accumulation changes nothing. With several
modalities updates take turns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch

from data2vec.core.batch import Batch
from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.saver import Saver
from data2vec.core.data.dataset import BrokenCounter, TrainData
from data2vec.core.engines.engine import Engine
from data2vec.core.errors import Data2VecError, RankLostError, TrainingError
from data2vec.core.settings.fields import Experiment
from data2vec.core.task import Moments
from data2vec.core.training.clock import Clock
from data2vec.core.training.health import HealthCheck
from data2vec.core.training.monitor import Monitor
from data2vec.core.training.progress import Progress, Snapshot, restored
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.share import Share

_CHECK_EVERY = 10  # updates after which their values are looked at, however rare log lines are
_INSPECT_EVERY = 10  # log lines from one inspection to the next


class Ending(StrEnum):
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    OUT_OF_TIME = "out of time"


class Display(Protocol):
    """A view of the progress for a person."""

    def update(self, line: Mapping[str, float], updates: int) -> None: ...


class Trainer:
    """Training of a task in a folder, from wherever it is to ``train.updates``.

    Args:
        experiment: the settings.
        engine: runs the task, here and on the other ranks.
        data: training data of each modality.
        folder: the run's, the same on all ranks.
        configuration: what a checkpoint records of the experiment, as plain values.
        display: shows progress.
        measured: ``flops_per_sample`` and ``peak_flops``, where TFLOP/s and MFU are to be shown.
        evaluate: called every ``evaluation.every`` updates; what it returns joins the metrics.
        stop_requested: asked after each update.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: Engine,
        data: Mapping[str, TrainData],
        folder: Path,
        *,
        configuration: Mapping[str, Any],
        display: Display,
        measured: Mapping[str, float] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        train = experiment.train
        self.experiment, self.train, self.engine, self.data, self.folder = experiment, train, engine, dict(data), folder
        self.configuration, self.display, self.evaluate = configuration, display, evaluate
        self.measured, self.stop_requested = dict(measured or {}), stop_requested
        self.ranks = engine.ranks
        self.share = Share.of(train, self.ranks.world)
        self.progress = Progress(positions=dict.fromkeys(data, 0))
        self.health = HealthCheck(
            engine.task.vitals(), collapse_after=train.collapse_after, warmup=experiment.optim.warmup,
            modalities=list(data),
        )  # fmt: skip
        self.broken = {name: BrokenCounter(experiment.data.max_broken, d.total) for name, d in self.data.items()}
        self.saver = Saver(folder / "checkpoints", self.ranks, train.keep)
        for d in self.data.values():
            d.require(1 if train.micro_length else train.batch)

    @property
    def checkpoints(self) -> Path:
        return self.saver.folder

    def restore(self, saved: checkpoint.Loaded) -> None:
        """Continue from a checkpoint; see :func:`data2vec.core.training.progress.restored`."""
        self.progress = restored(saved, self.engine, self.health, self.data, self.train.seed)

    def run(self) -> Ending:
        """Train until the last update, an interruption, or ``train.max_minutes``; always saves before it returns.

        Raises:
            TrainingError: the loss is not finite, or a signal of the task has collapsed.
            CheckpointError: the disk refused a checkpoint.
            DataError: shards became unreadable, or too many samples are broken.
        """
        with self._opened():
            while self.ending is None:
                stepped = self._update(self._modality())
                if stepped:
                    self._decide_on_the_end()
                best = stepped and self._evaluate()
                saving = self.ending is not None or best or self.save_is_due or self._due(self.train.checkpoint_every)
                self._log(saving)
                if saving:
                    self._save(best=best)
            self.saver.finish()
        return self.ending

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Files, streams and the clock of a run; whatever ends it, the checkpoint that is being written comes first."""
        self.monitor = Monitor(self.folder, self.health, start_update=self.progress.update, ranks=self.ranks)
        self.clock = Clock(self.train, self.progress.seconds)
        self.streams = {name: self._stream(name) for name in self.data}
        self.ending = Ending.FINISHED if self.progress.update >= self.train.updates else None
        self.save_is_due, self._lines = False, 0
        self.engine.task.train()
        try:
            yield
        except RankLostError:
            raise
        except Data2VecError as error:  # of every rank, so that all wait for the checkpoint that is being written
            with contextlib.suppress(Data2VecError):
                self.saver.finish()
            raise (self._with_advice(error) if isinstance(error, TrainingError) else error) from None
        finally:
            self.saver.abandon()
            self.monitor.close()
            for stream in self.streams.values():
                stream.close()

    def _modality(self) -> str:
        """Whose turn the next update is."""
        return list(self.data)[self.progress.update % len(self.data)]

    def _update(self, name: str) -> bool:
        """Apply one update; false where the run is to stop and its data has stopped already."""
        engine, update, started = self.engine, self.progress.update, time.perf_counter()
        batches: list[Batch] = []
        prepared: list[Any] = []
        failure: Data2VecError | None = None
        try:
            batches = [next(self.streams[name]) for _ in range(self.share.passes)]
            waited = time.perf_counter() - started
            for batch in batches:
                self.broken[name].name(batch)
                prepared.append(engine.task.prepare(batch, seed=self.train.seed, update=update))
        except Data2VecError as error:
            failure = error
        own = (sum(part.count for part in prepared), sum(map(len, prepared)), sum(len(b.broken) for b in batches))
        count, samples, broken, failed, stopping = map(
            int, self.ranks.sum([*own, failure is not None, self.stop_requested()])
        )
        if failed:
            if stopping:  # the signal has reached the loader's workers first
                self.ending = Ending.INTERRUPTED
                return False
            self.ranks.agree(failure)
        with self.ranks.alike():
            self.broken[name].judge(samples + broken, broken)
        values: dict[str, torch.Tensor] = {}
        moments: dict[str, Moments] = {}
        for part in prepared:
            step = engine.accumulate(part.to(engine.device), scale=1.0 / count, update=update)
            new = {"loss": step.total.detach() / count}
            new |= {f"loss_{key}": loss * (step.count / count) for key, loss in step.losses.items()}
            values = {key: values[key] + value if values else value for key, value in new.items()}
            moments = {key: moments[key] + m if moments else m for key, m in step.moments.items()}
        rate = learning_rate(self.experiment.optim, update, self.train.updates)
        values["gradient_norm"] = engine.step(rate, update + 1) / self.ranks.world
        self.progress.update += 1
        self.progress.positions[name] += self.share.taken
        self.progress.seconds = self.clock.seconds()
        self.monitor.add(update + 1, values, moments, samples=samples, waited=waited, modality=name)
        self._last = prepared[-1]
        return True

    def _decide_on_the_end(self) -> None:
        """See whether this update is the last for now, and whether a save is due by the clock; alike on all ranks.

        Raises:
            CheckpointError: the checkpoint that is being written in the background could not be.
            DataError: too many samples of the whole run are broken; few had to be enough until now.
        """
        first, last = self.ranks.first, self.progress.update == self.train.updates
        stop, is_up, due, failed = self.ranks.sum(
            (self.stop_requested(), first and self.clock.is_up, first and self.clock.save_is_due,
             self.saver.failed is not None)
        )  # fmt: skip
        if failed:
            self.ranks.agree(self.saver.failed)
        if last:
            with self.ranks.alike():
                for counter in self.broken.values():
                    counter.finish()
        self.save_is_due = bool(due)
        self.ending = Ending.INTERRUPTED if stop else Ending.FINISHED if last else Ending.OUT_OF_TIME if is_up else None

    def _evaluate(self) -> bool:
        """Evaluate where that is due; returns whether ``train.keep_best`` is higher than ever."""
        last = self.progress.update == self.train.updates
        if not self.evaluate or not (last or self._due(self.experiment.evaluation.every)):
            return False
        try:
            with self.ranks.together(), self.monitor.paused():
                scores = self.evaluate()
                best = self._is_best(scores)
                self.monitor.write({"update": self.progress.update, **scores})
        except RankLostError:
            raise
        except Data2VecError:  # of a shard that evaluation has to wait for, where the run is to stop
            if not any(self.ranks.sum([self.stop_requested()])):
                raise
            self.ending = Ending.INTERRUPTED
            return False
        return best

    def _log(self, saving: bool) -> None:
        """Write a log line where one is due, also before a save: no update is saved that has not passed the checks."""
        update, updates = self.progress.update, self.train.updates
        if self.monitor.pending and (saving or self._due(self.train.log_every)):
            known = {
                "learning_rate": learning_rate(self.experiment.optim, update - 1, updates),
                **self.engine.task.known(update), "seconds": self.progress.seconds, **self.measured,
            }  # fmt: skip
            if self.engine.device.type == "cuda":
                known["memory_gib"] = torch.cuda.max_memory_allocated(self.engine.device) / 2**30
            if self._lines % _INSPECT_EVERY == 0 or self.ending is not None:
                known |= self.engine.task.inspect(self._last.to(self.engine.device))
            with self.ranks.together():
                self.display.update(self.monitor.flush(**known), updates)
            self._lines += 1
        elif update % _CHECK_EVERY == 0:
            with self.ranks.alike():
                self.monitor.check()

    def _save(self, *, best: bool = False) -> None:
        """Save everything that the next update depends on, in the background."""
        with self.monitor.paused():
            now = Snapshot.of(self.progress, self.engine, self.health, self.data, self.configuration)
            self.saver.start(self.progress.update, now.files, now.state, now.local, best=best)
        self.clock.saved()

    def _with_advice(self, error: TrainingError) -> TrainingError:
        """The error with what can be continued from."""
        good = checkpoint.latest(self.checkpoints)
        advice = f"The last good checkpoint is {good}." if good else "No checkpoint had been saved."
        return type(error)(f"{error}. {advice}")

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.update % (every or 1) == 0

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        """Compare ``train.keep_best`` with what it was.

        Raises:
            TrainingError: no such score.
        """
        key = self.train.keep_best
        if key is None:
            return False
        if key not in scores:
            raise TrainingError(f"train.keep_best={key}: evaluation gives no such value; choose of {', '.join(scores)}")
        best = self.progress.best is None or scores[key] > self.progress.best
        self.progress.best = scores[key] if best else self.progress.best
        return best

    def _stream(self, name: str) -> Any:
        ranks, data, start = self.ranks, self.data[name], self.progress.positions[name]
        pin, micro_length = self.engine.device.type == "cuda", self.train.micro_length
        if micro_length:
            return data.length_batches(
                start, micro_length, ranks.rank, ranks.world, parts=self.share.parts, pin_memory=pin
            )
        return data.batches(start, self.share.micro_batch, ranks.rank, ranks.world, pin_memory=pin)
