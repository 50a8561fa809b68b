"""A trained engine with its checkpoints, which the fuzz test of checkpoints mutates."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.data.dataset import TrainData
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.run.build import build_engine, build_task
from data2vec.core.run.kinds import kind_of
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.testing import load_module
from data2vec.core.training.trainer import Trainer

material = load_module("fuzz_material", Path(__file__).with_name("material.py"))
Place, check_batch, scenarios = material.Place, material.check_batch, material.scenarios


class Quiet:
    def update(self, line: Mapping[str, float], updates: int) -> None:
        pass


class Trained:
    """A run in a folder with checkpoints of its third update: whole, and in the pieces of two ranks."""

    def __init__(self, place: Place, shards: Mapping[str, bytes]) -> None:
        self.place = place
        self.experiment = scenarios.scenario("vision").replace(data={"workers": 0})
        ((self.name, self.modality),) = self.experiment.modalities.items()
        (place.folder / "data").mkdir()
        path = place.folder / "data" / "train-000000.tar"
        path.write_bytes(shards[self.name])
        place.before = place._others()
        self.data = TrainData.open(str(path), self.modality, data=self.experiment.data, seed=0, cache=place.run)
        self.engine = build_engine(
            build_task(self.experiment, kind_of(self.experiment), Ranks()), self.experiment, Ranks()
        )
        self.masker = self.modality.build_masker()
        self.batch: Batch = scenarios.batch_of(self.experiment, 0, slice(0, 4))
        self.step(1)  # AdamW makes its state
        self.start = self.copied()
        self.step(2)
        self.step(3)
        self.trainer = self.new_trainer()
        self.files = {kind: self.saved(kind) for kind in ("whole", "pieces")}
        self.reset()

    def new_trainer(self) -> Trainer:
        return Trainer(
            self.experiment, self.engine, {self.name: self.data}, self.place.run,
            configuration={"yaml": to_yaml(self.experiment)}, display=Quiet(),
        )  # fmt: skip

    def step(self, update: int) -> None:
        masked = self.engine.task.prepare(self.batch, seed=0, update=update)
        self.engine.accumulate(masked, scale=1.0 / masked.count, update=update)
        assert self.engine.step(1e-3, update).isfinite()

    def copied(self) -> dict[str, dict[str, Tensor]]:
        state = self.engine.state()
        return {k: {n: v.clone() for n, v in values.items() if isinstance(v, Tensor)} for k, values in state.items()}

    def reset(self) -> None:
        self.engine.load_state(self.start["model"], self.start["optimiser"])

    def is_as_it_was(self) -> bool:
        now = self.copied()
        return all(
            now[kind].keys() == values.keys() and all(torch.equal(now[kind][n], v) for n, v in values.items())
            for kind, values in self.start.items()
        )

    def saved(self, kind: str) -> dict[str, bytes]:
        """The files of a checkpoint by name."""
        folder = self.place.run / kind
        tensors, generators = checkpoint.random_state(torch.device("cpu"))
        parts = {**self.copied(), "random": {f"0/{name}": value for name, value in tensors.items()}}
        state = {
            "progress": {"positions": {self.name: 12}, "seconds": 1.5, "best": None},
            "health": self.trainer.health.state(),
            "data": {self.name: self.data.fingerprint},
            "configuration": {"yaml": to_yaml(self.experiment)},
        }
        world = 1 if kind == "whole" else 2
        writing = checkpoint.unfinished(folder, "fuzz")
        for rank in range(world):
            mine = parts if world == 1 else {k: halved(values, rank) for k, values in parts.items()}
            checkpoint.write_part(writing, mine, {"random": generators}, rank=rank, world=world)
        written = checkpoint.commit(writing, 3, state, world=world, keep=1)
        return {path.name: path.read_bytes() for path in written.iterdir()}


def halved(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor | Piece]:
    mine: dict[str, Tensor | Piece] = {}
    for number, (name, value) in enumerate(values.items()):
        if value.numel() < 4:
            mine |= {name: value} if number % 2 == rank else {}
            continue
        middle = value.numel() // 2
        part = slice(0, middle) if rank == 0 else slice(middle, None)
        mine[name] = Piece(value.flatten()[part].clone(), part.start, tuple(value.shape))
    return mine


def continues(trained: Trained, trainer: Trainer) -> bool:
    """Do what the next update and the next checkpoint do with what was restored."""
    progress = trainer.progress
    assert progress.update >= 0
    check_batch(next(trained.data.batches(progress.positions[trained.name], 2)))
    masked = trained.engine.task.prepare(trained.batch, seed=0, update=progress.update)
    trained.engine.accumulate(masked, scale=1.0 / masked.count, update=progress.update)
    trained.engine.step(1e-3, progress.update + 1)
    json.dumps([trainer.health.state(), progress.positions, progress.seconds, progress.best])
    random.gauss(0, 1)
    np.random.randn(3)
    torch.randn(3)
    return True
