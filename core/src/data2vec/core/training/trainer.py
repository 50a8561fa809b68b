"""The training loop.

An update of modality m takes the next ``train.batch`` samples of m from its endless, seeded stream, in micro-batches;
the loss is averaged over all hidden positions of the update, so accumulation changes nothing. With several
modalities updates take turns.
"""

from __future__ import annotations

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
from data2vec.core.errors import CheckpointError, ConfigError, TrainingError
from data2vec.core.evaluation.rank import effective_rank
from data2vec.core.modality import Masker, Modality
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.mask import Mask
from data2vec.core.model.teacher import decay
from data2vec.core.training import checkpoint
from data2vec.core.training.engine import Engine
from data2vec.core.training.flops import matmul_rate, step_flops
from data2vec.core.training.monitor import HealthCheck, Monitor
from data2vec.core.training.schedule import learning_rate

_log = logging.getLogger(__name__)
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


@dataclass
class Progress:
    """Where a run is: applied updates, samples taken of each modality, and seconds of training so far."""

    update: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Trainer:
    """Trains a model in a folder, from wherever it is to ``train.updates``.

    Args:
        experiment: the settings.
        engine: runs the model.
        data: training data of each modality.
        folder: the run's.
        configuration: what a checkpoint records of the experiment, as plain values.
        display: shows progress.
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
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.experiment, self.engine, self.data, self.folder = experiment, engine, dict(data), folder
        self.configuration, self.display, self.evaluate = configuration, display, evaluate
        self.stop_requested = stop_requested
        train = experiment.train
        self.micro_batch = train.micro_batch or train.batch // engine.world
        # What one update takes of a stream, whose positions count samples, or batches of like length.
        self.taken = train.micro_batches or train.batch
        self.accumulation = self.taken // (engine.world * (1 if train.micro_length else self.micro_batch))
        if train.micro_length and self.taken % engine.world:
            raise ConfigError(
                [f"train.batch_length={train.batch_length}: {self.taken} forward passes of train.micro_length="
                 f"{train.micro_length} cannot be shared by {engine.world} ranks; choose a multiple of both"]
            )  # fmt: skip
        self.maskers = {name: modality.build_masker() for name, modality in experiment.modalities.items()}
        self.progress = Progress(positions=dict.fromkeys(data, 0))
        self.health = HealthCheck(train, experiment.optim.warmup)
        self.broken = {name: BrokenCounter(experiment.data.max_broken, d.total) for name, d in self.data.items()}
        for d in self.data.values():
            d.require(1 if train.micro_length else train.batch)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> Ending:
        """Train until the last update, an interruption, or ``train.max_minutes``; always saves before it returns.

        Raises:
            TrainingError: the loss is not finite, or targets or predictions have collapsed.
            CheckpointError: the disk refused a checkpoint.
            DataError: shards became unreadable, or too many samples are broken.
        """
        train, progress = self.experiment.train, self.progress
        monitor = Monitor(self.folder, self.health, start_update=progress.update)
        streams = {name: self._stream(name) for name in self.data}
        measured: dict[str, float] = {}
        started = last_save = time.monotonic()
        before = progress.seconds
        lines, ending = 0, Ending.FINISHED
        self.engine.model.train()
        try:
            while progress.update < train.updates:
                name = list(self.data)[progress.update % len(self.data)]
                if not measured and self.engine.rank == 0:
                    batch, streams[name] = _peek(streams[name])
                    measured = self._measure(batch)
                    monitor.pause()
                values, samples, waited = self._update(name, streams[name])
                progress.seconds = before + time.monotonic() - started
                monitor.add(progress.update, values, samples=samples, waited=waited)

                last = progress.update == train.updates
                if self.stop_requested():
                    ending = Ending.INTERRUPTED
                elif train.max_minutes and not last and time.monotonic() - started >= 60.0 * train.max_minutes:
                    ending = Ending.OUT_OF_TIME
                stopping = last or ending is not Ending.FINISHED
                minutes = train.checkpoint_minutes
                saving = (
                    stopping
                    or self._due(train.checkpoint_every)
                    or (minutes is not None and time.monotonic() - last_save >= 60.0 * minutes)
                )
                # Also before a save: no update is saved that has not passed the health check.
                if saving or progress.update % train.log_every == 0:
                    known = self._known(measured)
                    if lines % _RANK_EVERY == 0 or stopping:
                        known["teacher_rank"] = self._teacher_rank(self._last_batch)
                    self.display.update(monitor.flush(**known), train.updates)
                    lines += 1
                if self.evaluate and (last or self._due(self.experiment.evaluation.every)):
                    monitor.write({"update": progress.update, **self.evaluate()})
                    monitor.pause()
                if saving:
                    self.save(monitor)
                    last_save = time.monotonic()
                    monitor.pause()
                if ending is not Ending.FINISHED:
                    break
        except TrainingError as error:
            good = checkpoint.latest(self.checkpoints)
            advice = f"The last good checkpoint is {good}." if good else "No checkpoint had been saved."
            raise TrainingError(f"{error}. {advice}") from None
        finally:
            monitor.close()
            for stream in streams.values():
                stream.close()
        return ending

    def _update(self, name: str, stream: Iterator[Batch]) -> tuple[dict[str, Tensor], int, float]:
        """One optimiser update; returns its values, the samples it saw and the seconds it waited for data."""
        train, progress, engine = self.experiment.train, self.progress, self.engine
        start = time.perf_counter()
        batches = [next(stream) for _ in range(self.accumulation)]
        waited = time.perf_counter() - start
        masked = []
        for batch in batches:
            self.broken[name].add(batch)
            masked.append(self._hide(batch, seed=train.seed, update=progress.update))
        count = sum(mask.count for _, mask in masked)
        total = torch.zeros((), device=engine.device)
        statistics: list[dict[str, Tensor]] = []
        for batch, mask in masked:
            moved = batch.to(engine.device)
            output = engine.forward_backward(moved, mask.to(engine.device), count=count, update=progress.update)
            total += output.total.detach()
            statistics.append({**output.statistics, **{f"loss_{k}": v for k, v in output.losses.items()}})
        rate = learning_rate(self.experiment.optim, progress.update, train.updates)
        norm = engine.step(rate, progress.update + 1)
        progress.update += 1
        progress.positions[name] += self.taken
        self._last_batch = batches[-1]
        means = {key: torch.stack([s[key] for s in statistics]).mean() for key in statistics[0]}
        values = {"loss": total / count, **means, "gradient_norm": norm}
        return values, sum(len(batch) for batch in batches) * engine.world, waited

    def _hide(self, batch: Batch, *, seed: int, update: int) -> tuple[Batch, Mask]:
        name = batch.modality
        modality, masker = self.experiment.modalities[name], self.maskers[name]
        return hide(self.engine.model, modality, masker, batch, seed=seed, update=update)

    def _known(self, measured: Mapping[str, float]) -> dict[str, float]:
        update, updates = self.progress.update, self.experiment.train.updates
        known = {
            "learning_rate": learning_rate(self.experiment.optim, update - 1, updates),
            "teacher_decay": decay(self.experiment.teacher, update),
            "seconds": self.progress.seconds,
            **measured,
        }
        if self.engine.device.type == "cuda":
            known["memory_gib"] = torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        return known

    def _measure(self, batch: Batch) -> dict[str, float]:
        """Arithmetic of a sample's step and the device's rate, for TFLOP/s and MFU."""
        engine = self.engine
        few, mask = self._hide(batch.first(2), seed=0, update=0)
        bf16 = getattr(engine, "bf16", False)
        return {
            "flops_per_sample": step_flops(engine.model, few.to(engine.device), mask.to(engine.device)) / len(few),
            "peak_flops": matmul_rate(engine.device, torch.bfloat16 if bf16 else torch.float32) * engine.world,
        }

    def _teacher_rank(self, batch: Batch) -> float:
        """Effective rank of the teacher's position vectors of a few samples."""
        few = batch.first(_RANK_SAMPLES).to(self.engine.device)
        features = self.engine.model.features(few).x.flatten(0, 1)
        return float(effective_rank(features[torch.randperm(len(features), generator=torch.Generator())[:1024]].cpu()))

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.update % (every or 1) == 0

    def _stream(self, name: str) -> Any:
        engine, data, start = self.engine, self.data[name], self.progress.positions[name]
        pin, micro_length = engine.device.type == "cuda", self.experiment.train.micro_length
        if micro_length:
            return data.length_batches(start, micro_length, engine.rank, engine.world, pin_memory=pin)
        return data.batches(start, self.micro_batch, engine.rank, engine.world, pin_memory=pin)

    def save(self, monitor: Monitor) -> Path:
        """Save everything that the next update depends on."""
        engine, progress = self.engine, self.progress
        tensors, generators = checkpoint.random_state(engine.device)
        state = {
            "progress": {"positions": progress.positions, "seconds": progress.seconds},
            "random": generators,
            "health": monitor.health.state(),
            "data": {name: data.fingerprint for name, data in self.data.items()},
            "configuration": self.configuration,
        }
        files = {"model": engine.model.own_state(), "optimiser": engine.optimiser_state(), "random": tensors}
        keep = self.experiment.train.keep
        return checkpoint.save(self.checkpoints, progress.update, checkpoint.Checkpoint(files, state), keep=keep)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it belongs to other data or another model.
        """
        state, engine = saved.state, self.engine
        try:
            for name, data in self.data.items():
                if state["data"].get(name) != data.fingerprint:
                    raise CheckpointError(
                        f"the checkpoint of update {state['update']} was made with other shards than "
                        f"{data.shards.spec!r} (their names, order or counts differ): give the same data.train, "
                        "or another train.folder"
                    )
            engine.model.load_own_state(saved.tensors["model"])
            engine.load_optimiser_state(dict(saved.tensors["optimiser"]))
            checkpoint.restore_random_state(saved.tensors["random"], state["random"], engine.device)
            self.health.load_state(state["health"])
            positions = {str(name): int(value) for name, value in state["progress"]["positions"].items()}
            self.progress = Progress(int(state["update"]), positions, float(state["progress"]["seconds"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint lacks or garbles {error}; choose an earlier one") from None


def _peek(stream: Any) -> tuple[Batch, Any]:
    """The next batch, and a stream that still begins with it."""
    first = next(stream)

    def again() -> Iterator[Batch]:
        try:
            yield first
            yield from stream
        finally:
            stream.close()

    return first, again()
