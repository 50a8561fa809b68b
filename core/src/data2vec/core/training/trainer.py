"""The training loop.

An update of modality m takes the next ``train.batch`` samples of m from its endless, seeded stream, in micro-batches;
the loss is averaged over all hidden positions of the update, so accumulation changes nothing. With several
modalities updates take turns.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment, StudentSees
from data2vec.core.data.pipeline import BrokenCounter, TrainData
from data2vec.core.errors import CheckpointError, Data2VecError, RankLostError, TrainingError
from data2vec.core.evaluation.rank import effective_rank
from data2vec.core.modality import Masker, Modality
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.mask import Mask
from data2vec.core.model.random import derive
from data2vec.core.model.teacher import decay
from data2vec.core.training import checkpoint
from data2vec.core.training.clock import Clock
from data2vec.core.training.engine import Engine, Shares
from data2vec.core.training.monitor import HealthCheck, Monitor
from data2vec.core.training.saver import Saver
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.share import Share

_log = logging.getLogger(__name__)
_CHECK_EVERY = 10  # updates after which their values are looked at, however rare log lines are
_RANK_EVERY = 10  # log lines from one effective rank to the next
_RANK_SAMPLES = 64


class Ending(StrEnum):
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    OUT_OF_TIME = "out of time"


class Display(Protocol):
    """Shows progress to a person."""

    def update(self, line: Mapping[str, float], updates: int) -> None: ...


def hide(
    model: Data2Vec, modality: Modality, masker: Masker, batch: Batch, *, seed: int, update: int
) -> tuple[Batch, Mask]:
    """The masks of a batch on the CPU, with what the model derives from them, and the batch as the student reads it."""
    shape, lengths = model.student.frontend(batch.modality).extractor.grid(batch.inputs, batch.lengths)
    maskable = modality.maskable(batch)
    special = {} if maskable is None else {"maskable": maskable}
    hidden = masker(batch.ids, shape, seed=seed, update=update, lengths=lengths, **special)
    padding = None
    if lengths is not None:
        padding = torch.arange(hidden.shape[-1]) >= lengths.unsqueeze(1)
    mask = Mask.of(hidden, visible_only=model.student_sees is StudentSees.VISIBLE, padding=padding)
    read = modality.student_inputs(batch, hidden, seed=seed, update=update)
    return (batch if read is None else replace(batch, student_inputs=read)), mask


Updated = tuple[dict[str, Tensor], int, float]  # values of which the sum over ranks is meant, samples, seconds waited


@dataclass
class Progress:
    """Where a run is: applied updates, samples taken of each modality, seconds so far, highest ``keep_best`` score."""

    update: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    best: float | None = None


class Trainer:
    """Trains a model in a folder, from wherever it is to ``train.updates``.

    Args:
        experiment: the settings.
        engine: runs the model, here and on the other ranks.
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
        self.experiment, self.engine, self.data, self.folder = experiment, engine, dict(data), folder
        self.configuration, self.display, self.evaluate = configuration, display, evaluate
        self.measured, self.stop_requested = dict(measured or {}), stop_requested
        self.ranks = engine.ranks
        self.share = Share.of(experiment.train, self.ranks.world)
        self.maskers = {name: modality.build_masker() for name, modality in experiment.modalities.items()}
        self.progress = Progress(positions=dict.fromkeys(data, 0))
        self.health = HealthCheck(experiment.train, experiment.optim.warmup, list(data))
        self.broken = {name: BrokenCounter(experiment.data.max_broken, d.total) for name, d in self.data.items()}
        self.saver = Saver(folder / "checkpoints", self.ranks, experiment.train.keep)
        for d in self.data.values():
            d.require(1 if experiment.train.micro_length else experiment.train.batch)

    @property
    def checkpoints(self) -> Path:
        return self.saver.folder

    def run(self) -> Ending:
        """Train until the last update, an interruption, or ``train.max_minutes``; always saves before it returns.

        Raises:
            TrainingError: the loss is not finite, or targets or predictions have collapsed.
            CheckpointError: the disk refused a checkpoint.
            DataError: shards became unreadable, or too many samples are broken.
        """
        train, progress = self.experiment.train, self.progress
        monitor = Monitor(self.folder, self.health, start_update=progress.update, ranks=self.ranks)
        streams = {name: self._stream(name) for name in self.data}
        clock = Clock(train, progress.seconds)
        lines, ending = 0, Ending.FINISHED
        self.engine.model.train()
        try:
            while progress.update < train.updates and ending is Ending.FINISHED:
                name = list(self.data)[progress.update % len(self.data)]
                updated = self._update(name, streams[name])
                if updated is None:
                    ending = Ending.INTERRUPTED
                else:
                    values, samples, waited = updated
                    monitor.add(progress.update, values, samples=samples, waited=waited, modality=name)
                    progress.seconds = clock.seconds()
                last = progress.update == train.updates
                if last:
                    self._judge_broken()
                best = False
                if updated is not None and self.evaluate and (last or self._due(self.experiment.evaluation.every)):
                    best = self._evaluated(self.evaluate, monitor)
                if updated is not None:
                    ending, due = self._ending(clock)
                stopping = last or ending is not Ending.FINISHED
                saving = stopping or best or due or self._due(train.checkpoint_every)
                # Also before a save: no update is saved that has not passed the health check.
                if monitor.pending and (saving or progress.update % train.log_every == 0):
                    known = self._known()
                    if lines % _RANK_EVERY == 0 or stopping:
                        known["teacher_rank"] = self._teacher_rank(self._last_batch)
                    with self.ranks.together():
                        self.display.update(monitor.flush(**known), train.updates)
                    lines += 1
                elif progress.update % _CHECK_EVERY == 0:
                    with self.ranks.alike():
                        monitor.check()
                if saving:
                    with monitor.paused():
                        self.save(best=best)
                    clock.saved()
            self.saver.finish()
        except RankLostError:
            raise
        except Data2VecError as error:  # of every rank, so that all wait for the checkpoint that is being written
            with contextlib.suppress(Data2VecError):
                self.saver.finish()
            raise (self._with_advice(error) if isinstance(error, TrainingError) else error) from None
        finally:
            self.saver.abandon()
            monitor.close()
            for stream in streams.values():
                stream.close()
        return ending

    def _update(self, name: str, stream: Iterator[Batch]) -> Updated | None:
        """One optimiser update; None where the run is to stop and its data has stopped already."""
        train, progress, engine = self.experiment.train, self.progress, self.engine
        start = time.perf_counter()
        masked: list[tuple[Batch, Mask]] = []
        failure: Data2VecError | None = None
        try:
            batches = [next(stream) for _ in range(self.share.passes)]
            waited = time.perf_counter() - start
            for batch in batches:
                self.broken[name].name(batch)
                masked.append(self._hide(batch, seed=train.seed, update=progress.update))
        except Data2VecError as error:
            failure = error
        own = [sum(values) for values in zip(*((m.count, len(b), len(b.broken)) for b, m in masked), strict=True)]
        count, samples, broken, failed, stopping = map(
            int, self.ranks.sum([*(own or (0, 0, 0)), failure is not None, self.stop_requested()])
        )
        if failed:
            if stopping:  # the signal has reached the loader's workers first
                return None
            self.ranks.agree(failure)
        with self.ranks.alike():
            self.broken[name].judge(samples + broken, broken)
        values: dict[str, Tensor] = {}
        for batch, mask in masked:
            output = engine.forward_backward(
                batch.to(engine.device), mask.to(engine.device), count=count, update=progress.update
            )
            part = {"loss": output.total.detach() / count}
            part |= {f"loss_{key}": loss * (mask.count / count) for key, loss in output.losses.items()}
            # Statistics are of all ranks already.
            passes = self.ranks.world * self.share.passes
            part |= {key: value / passes for key, value in output.statistics.items()}
            values = {key: values[key] + value if values else value for key, value in part.items()}
        rate = learning_rate(self.experiment.optim, progress.update, train.updates)
        values["gradient_norm"] = engine.step(rate, progress.update + 1) / self.ranks.world
        progress.update += 1
        progress.positions[name] += self.share.taken
        self._last_batch = batches[-1]
        return values, samples, waited

    def _judge_broken(self) -> None:
        """Judge the broken samples of the whole run, before its end is saved: few had to be enough until now.

        Raises:
            DataError: too many are.
        """
        with self.ranks.alike():
            for counter in self.broken.values():
                counter.finish()

    def _ending(self, clock: Clock) -> tuple[Ending, bool]:
        """Whether this update is the last for now, and whether a checkpoint is due by the clock; alike on all ranks.

        Raises:
            CheckpointError: the checkpoint that is being written in the background could not be.
        """
        first, last = self.ranks.first, self.progress.update == self.experiment.train.updates
        here = self.saver.failed is not None
        stop, is_up, due, failed = self.ranks.sum(
            (self.stop_requested(), first and clock.is_up, first and clock.save_is_due, here)
        )
        if failed:
            self.ranks.agree(self.saver.failed)
        if stop:
            return Ending.INTERRUPTED, bool(due)
        return (Ending.OUT_OF_TIME if is_up and not last else Ending.FINISHED), bool(due)

    def _with_advice(self, error: TrainingError) -> TrainingError:
        """The error with what can be continued from."""
        good = checkpoint.latest(self.checkpoints)
        advice = f"The last good checkpoint is {good}." if good else "No checkpoint had been saved."
        return type(error)(f"{error}. {advice}")

    def _hide(self, batch: Batch, *, seed: int, update: int) -> tuple[Batch, Mask]:
        name = batch.modality
        modality, masker = self.experiment.modalities[name], self.maskers[name]
        return hide(self.engine.model, modality, masker, batch, seed=seed, update=update)

    def _known(self) -> dict[str, float]:
        update, updates = self.progress.update, self.experiment.train.updates
        known = {
            "learning_rate": learning_rate(self.experiment.optim, update - 1, updates),
            "teacher_decay": decay(self.experiment.teacher, update),
            "seconds": self.progress.seconds,
            **self.measured,
        }
        if self.engine.device.type == "cuda":
            known["memory_gib"] = torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        return known

    def _teacher_rank(self, batch: Batch) -> float:
        """Effective rank of the teacher's position vectors of a few samples."""
        few = batch.first(_RANK_SAMPLES).to(self.engine.device)
        features = self.engine.model.features(few).x.flatten(0, 1)
        return float(effective_rank(features[torch.randperm(len(features), generator=torch.Generator())[:1024]].cpu()))

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.update % (every or 1) == 0

    def _evaluated(self, evaluate: Callable[[], Mapping[str, float]], monitor: Monitor) -> bool:
        """Note the scores of this update; returns whether they are the best.

        There are none where the run is to stop: a shard that evaluation has to wait for is given up.
        """
        try:
            with self.ranks.together(), monitor.paused():
                scores = evaluate()
                best = self._is_best(scores)
                monitor.write({"update": self.progress.update, **scores})
        except RankLostError:
            raise
        except Data2VecError:
            if not any(self.ranks.sum([self.stop_requested()])):
                raise
            return False
        return best

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether ``train.keep_best`` is higher than ever.

        Raises:
            TrainingError: no such score.
        """
        key = self.experiment.train.keep_best
        if key is None:
            return False
        if key not in scores:
            raise TrainingError(f"train.keep_best={key}: evaluation gives no such value; choose of {', '.join(scores)}")
        best = self.progress.best is None or scores[key] > self.progress.best
        self.progress.best = scores[key] if best else self.progress.best
        return best

    def _stream(self, name: str) -> Any:
        ranks, data, start = self.ranks, self.data[name], self.progress.positions[name]
        pin, micro_length = self.engine.device.type == "cuda", self.experiment.train.micro_length
        if micro_length:
            return data.length_batches(
                start, micro_length, ranks.rank, ranks.world, parts=self.share.parts, pin_memory=pin
            )
        return data.batches(start, self.share.micro_batch, ranks.rank, ranks.world, pin_memory=pin)

    def save(self, *, best: bool = False) -> None:
        """Save everything that the next update depends on, in the background."""
        engine, progress, rank = self.engine, self.progress, self.ranks.rank
        tensors, generators = checkpoint.random_state(engine.device)
        state = {
            "progress": {"positions": progress.positions, "seconds": progress.seconds, "best": progress.best},
            "health": self.health.state(),
            "data": {name: data.fingerprint for name, data in self.data.items()},
            "configuration": self.configuration,
        }
        files: dict[str, Shares] = {
            **engine.state(),
            "random": {f"{rank}/{name}": value for name, value in tensors.items()},
        }
        self.saver.start(progress.update, files, state, {"random": generators}, best=best)

    def restore(self, saved: checkpoint.Loaded) -> None:
        """Continue from a checkpoint, which any engine on any number of ranks may have written.

        Raises:
            CheckpointError: it belongs to other data or another model.
        """
        state, rank = saved.state, self.ranks.rank
        try:
            for name, data in self.data.items():
                if state["data"].get(name) != data.fingerprint:
                    raise CheckpointError(
                        f"the checkpoint of update {state['update']} was made with other shards than "
                        f"{data.shards.spec!r} (their names, order or counts differ): give the same data.train, "
                        "or another train.folder"
                    )
            self.health.load_state(state["health"], int(state["update"]))
            self.progress = Progress(
                state["update"],
                {name: checkpoint.whole_number(state["progress"]["positions"][name], name) for name in self.data},
                checkpoint.number(state["progress"]["seconds"], "seconds"),
                checkpoint.number(state["progress"]["best"], "best", optional=True),
            )
            if state["world"] == self.ranks.world:
                own = {name.removeprefix(f"{rank}/"): value for name, value in saved.tensors["random"].items()
                       if name.startswith(f"{rank}/")}  # fmt: skip
                checkpoint.restore_random_state(own, state["local"][rank]["random"], self.engine.device)
            else:  # there is no state for each of these ranks; dropout and noise differ, masks and order do not
                torch.manual_seed(derive(self.experiment.train.seed, self.progress.update, rank))
            self.engine.load_state(
                saved.tensors["model"], saved.tensors["optimiser"]
            )  # last: what fails changes nothing
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            lacking = f"the checkpoint of update {state['update']} lacks or garbles part of its state"
            raise CheckpointError(f"{lacking}: {error}; choose an earlier one") from None
