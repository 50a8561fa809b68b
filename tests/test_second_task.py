"""Another task than pretraining goes through the same trainer, engines and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data2vec.core import Experiment
from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.build import build_engine
from data2vec.core.settings.fields import EngineKind
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Ending
from data2vec.core.training.trainer import Trainer

HERE = Path(__file__).parent
scenarios = load_module("scenarios_of_second_task", HERE / "scenarios.py")
classification = load_module("classification", HERE / "classification.py")
UPDATES = 12


class Silent:
    def update(self, line: Any, updates: int) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise on one of three grey levels, which is the class."""
    folder = tmp_path_factory.mktemp("labelled")
    with ShardWriter(folder, "train", "vision", samples_per_shard=9) as writer:
        for number in range(36):
            level = number % 3
            members = scenarios.members_of("vision", number, shift=2.0 * (level - 1))
            writer.write(f"sample{number:03d}", {**members, "cls": str(level).encode()})
    return folder


def settings(shards: str, folder: str, **engine: Any) -> Experiment:
    experiment: Experiment = scenarios.scenario("vision").replace(
        data={"train": f"{shards}/train-*.tar", "workers": 0},
        optim={"lr": 0.02, "weight_decay": 0.0, "warmup": 0, "clip": 1.0},
        train={"folder": folder, "updates": UPDATES, "batch": 8, "log_every": 1, "micro_batch": 2},
        transformer={"layer_drop": 0.0},
        engine=engine,
    )
    return experiment


def train(experiment: Experiment, ranks: Ranks, stop_after: int | None = None) -> tuple[Trainer, Ending]:
    """Train from where the folder is, to the end or to an update."""
    folder = Path(str(experiment.train.folder))
    modality = experiment.modalities["vision"]
    data = TrainData.open(str(experiment.data.train), modality, data=experiment.data, seed=0, cache=folder)
    torch.manual_seed(0)
    backbone = Data2Vec.build(experiment).student.single("vision")
    engine = build_engine(classification.Classification(backbone, 3), experiment, ranks)
    trainer = Trainer(
        experiment, engine, {"vision": data}, folder, configuration={}, display=Silent(),
        stop_requested=lambda: trainer.progress.update == stop_after,
    )  # fmt: skip
    place = checkpoint.latest(trainer.checkpoints)
    if place is not None:
        trainer.restore(checkpoint.load(place))
    return trainer, trainer.run()


def learned(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a run, and its last weights and moments."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    tensors = checkpoint.load(place).tensors
    weights = {f"{kind}:{name}": tensors[kind][name] for kind in ("model", "optimiser") for name in tensors[kind]}
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")], weights


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(settings(str(shards), str(folder)), Ranks())[1] is Ending.FINISHED
    return folder


def test_it_learns(whole: Path) -> None:
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert max(line["loss_accuracy"] for line in lines) == 1.0
    assert "teacher_decay" not in lines[-1]


def test_it_continues_bit_for_bit(shards: Path, whole: Path, tmp_path: Path) -> None:
    experiment = settings(str(shards), str(tmp_path))
    for stop in (3, 8):
        assert train(experiment, Ranks(), stop)[1] is Ending.INTERRUPTED
    assert train(experiment, Ranks())[1] is Ending.FINISHED
    (losses, weights), (expected, expected_weights) = learned(tmp_path), learned(whole)
    assert losses == expected
    assert weights.keys() == expected_weights.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, expected_weights[name])] == []


def test_each_layer_has_its_own_rate(shards: Path, tmp_path: Path) -> None:
    """The first step of Adam moves every weight by its learning rate."""
    experiment = settings(str(shards), str(tmp_path)).replace(train={"updates": 1}, optim={"clip": None, "eps": 1e-12})
    torch.manual_seed(0)
    backbone = Data2Vec.build(experiment).student.single("vision")
    before = classification.Classification(backbone, 3).state_dict()
    before = {name: value.clone() for name, value in before.items()}
    train(experiment, Ranks())
    after = {name.removeprefix("model:"): value for name, value in learned(tmp_path)[1].items()}
    depth, rate = experiment.transformer.depth, experiment.optim.lr
    for name, above in (
        ("head.weight", 0), (f"backbone.encoder.transformer.blocks.{depth - 1}.feed_forward.fc1.weight", 1),
        ("backbone.encoder.transformer.blocks.0.feed_forward.fc1.weight", depth),
        ("backbone.encoder.frontends.vision.extractor.embed.proj.weight", depth + 1),
    ):  # fmt: skip
        moved = float((after[name] - before[name]).abs().max())
        assert moved == pytest.approx(rate * classification.DECAY**above, rel=1e-3), name


def on_a_rank(shards: str, folder: str, engine: dict[str, Any]) -> None:
    train(settings(shards, folder, **engine), Ranks(dist.get_rank(), dist.get_world_size()))


@pytest.mark.parametrize("engine", ["torch", 0, 2, 3])
def test_two_ranks_are_one_process(engine: str | int, shards: Path, whole: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"kind": EngineKind.TORCH}
    if engine != "torch":
        chosen = {"kind": EngineKind.DEEPSPEED, "zero_stage": engine, "bucket_size": 1_000}
    run_distributed(on_a_rank, 2, str(shards), str(tmp_path), chosen)
    (losses, weights), (expected, expected_weights) = learned(tmp_path), learned(whole)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        if name.startswith("model:"):
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-4, atol=1e-5)
