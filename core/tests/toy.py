"""A toy modality, runs that train it, and what they have come to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.engines.torch import TorchEngine
from data2vec.core.exhibit import Exhibit
from data2vec.core.hashing import sample_keys, uniform
from data2vec.core.modality import Decoder, Masker, Modality
from data2vec.core.model.encoder import Extractor, Frontend, Tokens
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.cli import main
from data2vec.core.run.prepare import open_data
from data2vec.core.settings.fields import DataConfig, OptimConfig, TrainConfig, TransformerConfig
from data2vec.core.settings.pretraining import (
    EvaluationConfig,
    Experiment,
    PredictorConfig,
    TargetsConfig,
    TeacherConfig,
)
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Ending
from data2vec.core.training.trainer import Trainer

LENGTH = 6
UPDATES = 6
HOOKS: dict[str, Callable[[int], None]] = {}  # what a test does at a point of the run: "mask", "evaluate", "write"


def reached(point: str, number: int = 0) -> None:
    if point in HOOKS:
        HOOKS[point](number)


@pytest.fixture(autouse=True)
def no_hooks() -> Iterator[None]:
    yield
    HOOKS.clear()


class Frames(Extractor):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        return Tokens(self.proj(inputs), (inputs.shape[1],))

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        return (inputs.shape[1],), None


class HalfMasker:
    """Hides half of the positions of each sample, or one, two or three of them."""

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        reached("mask", update)
        keys = sample_keys(ids, seed=seed, update=update)
        ranks = uniform(keys, LENGTH).argsort(1).argsort(1)
        return (ranks < 1 + (keys % 3).abs().unsqueeze(1)).unsqueeze(1)


@dataclass(frozen=True)
class SeriesDecoder:
    train: bool

    def __call__(self, sample: Sample, seed: int) -> Example:
        x = torch.from_numpy(np.frombuffer(sample.members["raw"], dtype=np.float32).copy()).view(LENGTH, 3)
        label = int(sample.members["cls"])
        return Example(x + 0.1 * torch.randn(x.shape) if self.train else x, label)


class SeriesExhibit(Exhibit):
    def write_sample_shards(self, folder: Path) -> None:
        reached("write")
        write_shards(folder, "train", 60)
        write_shards(folder, "validation", 30)

    def raw_features(self, batch: Batch) -> Tensor:
        reached("evaluate")
        return batch.inputs.flatten(1)


@dataclass(frozen=True)
class Series(Modality):
    name: ClassVar[str] = "series"
    extensions: ClassVar[tuple[str, ...]] = ("raw",)

    @property
    def predictor_config(self) -> PredictorConfig:
        return PredictorConfig()

    @property
    def uses_mask_token(self) -> bool:
        return True

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        width = transformer.width
        return Frontend(Frames(width), width=width, prefix_tokens=2, input_norm=nn.LayerNorm(width), dropout=0.1)

    def build_masker(self) -> Masker:
        return HalfMasker()

    def build_decoder(self, *, train: bool) -> Decoder:
        return SeriesDecoder(train)

    @property
    def exhibit(self) -> Exhibit:
        return SeriesExhibit()


def write_shards(folder: Path, prefix: str, count: int, per_shard: int = 17) -> Path:
    generator = np.random.default_rng(3)
    with ShardWriter(folder, prefix, "series", samples_per_shard=per_shard) as writer:
        for i in range(count):
            x = generator.normal(size=(LENGTH, 3)) + i % 3
            writer.write(f"{i:04d}", {"raw": x.astype(np.float32).tobytes(), "cls": str(i % 3).encode()})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", 60)
    write_shards(folder, "validation", 30)
    return folder


def settings(folder: Path, shards: Path | None = None, **train: Any) -> Experiment:
    """A run in which everything that draws random numbers is switched on."""
    return Experiment(
        name="toy",
        modalities={"series": Series()},
        transformer=TransformerConfig(
            depth=3, width=16, heads=2, mlp_ratio=2.0, drop_path=0.3, layer_drop=0.2, dropout=0.1, layer_scale=0.5
        ),
        teacher=TeacherConfig(decay_start=0.9, decay_end=0.99, decay_updates=5),
        targets=TargetsConfig(top_k=2),
        optim=OptimConfig(lr=1e-2, warmup=3, clip=1.0),
        data=DataConfig(
            train=f"{shards}/train-*.tar" if shards else None,
            validation=f"{shards}/validation-*.tar" if shards else None,
            workers=0,
        ),
        train=TrainConfig(
            **{"updates": UPDATES, "batch": 8, "device": "cpu", "folder": str(folder), "log_every": 1, **train}
        ),
        evaluation=EvaluationConfig(tasks=("rank",)),
    )


class Silent:
    def update(self, line: Any, updates: int) -> None:
        pass


def trained(
    experiment: Experiment, stop_after: int | None = None, *, crash_after: int | None = None
) -> tuple[Trainer, Ending]:
    """Train from where the folder is, to the end or to an update."""
    folder = Path(str(experiment.train.folder))
    train, _ = open_data(experiment, folder / "cache")
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(experiment.train.seed)

    def stop() -> bool:
        if trainer.progress.update == crash_after:
            raise RuntimeError("crash")
        return trainer.progress.update == stop_after

    trainer = Trainer(
        experiment,
        TorchEngine(Data2Vec.build(experiment), experiment),
        train,
        folder,
        configuration={},
        display=Silent(),
        stop_requested=stop,
    )
    place = checkpoint.latest(trainer.checkpoints)
    if place is not None:
        torch.manual_seed(99)  # what a new process happens to have; restoring must undo it
        random.seed(99)
        np.random.seed(99)
        trainer.restore(checkpoint.load(place))
    return trainer, trainer.run()


MEASURED = ("samples_per_second", "data_wait", "seconds", "tflops", "mfu", "teacher_rank")


def learned(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Any]]:
    """What a run has come to: every saved tensor, the metrics without timings, and the generators' states."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    saved = checkpoint.load(place)
    tensors = {f"{part}:{name}": value for part, values in saved.tensors.items() for name, value in values.items()}
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]
    state = {key: saved.state[key] for key in ("local", "health", "update")}
    return tensors, lines, {**state, "positions": saved.state["progress"]["positions"]}


def assert_same(one: Path, other: Path) -> None:
    (tensors, lines, state), (tensors_2, lines_2, state_2) = learned(one), learned(other)
    assert tensors.keys() == tensors_2.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, tensors_2[name])]
    assert not different
    assert lines == lines_2
    assert state == state_2


def command(experiment: Experiment, *overrides: str, sample: Experiment | None = None) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(experiment, sample, argv=overrides)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Path]:
    """Folders of uninterrupted runs by micro-batch."""
    folders: dict[int | None, Path] = {}

    def folder(micro: int | None) -> Path:
        if micro not in folders:
            folders[micro] = tmp_path_factory.mktemp("whole")
            assert trained(settings(folders[micro], shards, micro_batch=micro))[1] is Ending.FINISHED
        return folders[micro]

    return folder


def tiny(**transformer: Any) -> tuple[Experiment, Data2Vec]:
    torch.manual_seed(0)
    experiment = settings(Path("unused")).replace(transformer=transformer)
    return experiment, Data2Vec.build(experiment)


def some_batch(count: int = 4) -> Batch:
    inputs = torch.randn(count, LENGTH, 3, generator=torch.Generator().manual_seed(2))
    return Batch("series", inputs, torch.arange(count), torch.full((count,), -1))
