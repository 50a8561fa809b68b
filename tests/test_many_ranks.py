"""Runs of several ranks: engines and numbers of ranks may change between two parts of a run, and ranks may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data2vec.core import Data2Vec
from data2vec.core.checkpoints import checkpoint
from data2vec.core.distributed.ranks import join
from data2vec.core.run.build import build_engine
from data2vec.core.run.cli import main
from data2vec.core.run.prepare import open_data
from data2vec.core.settings.fields import EngineKind
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.trainer import Trainer

scenarios = load_module("scenarios_of_many_ranks", Path(__file__).with_name("scenarios.py"))

UPDATES = 12  # three epochs and a bit of 36 samples, 4 an update


class Silent:
    def update(self, line: Any, updates: int) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in ("vision", "speech", "text"):
        scenarios.write_shards(folder / name, name)
    return folder


def train_until(name: str, shards: str, folder: str, stop: int, engine: dict[str, Any], changes: dict[str, Any]) -> int:
    """Continue the run in ``folder`` up to an update, on as many ranks as there are; returns where it begins."""
    experiment = scenarios.run_of(name, Path(shards), Path(folder))
    experiment = experiment.replace(engine={"bucket_size": 1_000, **engine}, train={"updates": UPDATES})
    experiment = experiment.replace(**changes)
    ranks = join(experiment.train.device)
    torch.manual_seed(0)
    train, _ = open_data(experiment, Path(folder) / "cache")
    trainer = Trainer(
        experiment,
        build_engine(Data2Vec.build(experiment), experiment, ranks),
        train,
        Path(folder),
        configuration={},
        display=Silent(),
        stop_requested=lambda: trainer.progress.update >= stop,
    )
    place = checkpoint.latest(trainer.checkpoints)
    if place is not None:
        trainer.restore(checkpoint.load(place))
    begun = trainer.progress.update
    trainer.run()
    return begun


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    return dict(checkpoint.load(place).tensors["model"])


TORCH: dict[str, Any] = {"kind": EngineKind.TORCH}
ZERO: list[dict[str, Any]] = [{"kind": EngineKind.DEEPSPEED, "zero_stage": stage} for stage in range(4)]
# World size, engine and the update at which the part ends.
PARTS = [
    (2, ZERO[3], 3),
    (1, TORCH, 5),
    (4, ZERO[1], 7),
    (2, ZERO[2], 8),
    (2, {**ZERO[2], "offload_optimizer": True}, 9),
    (1, {**ZERO[3], "offload_optimizer": True, "offload_parameters": True}, 10),
    (2, ZERO[0], 11),
    (2, TORCH, 12),
]


def test_ranks_and_engines_may_change(shards: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_until("speech", str(shards), str(whole), UPDATES, TORCH, {})
    begun = 0
    for world, engine, stop in PARTS:
        begins = run_distributed(train_until, world, "speech", str(shards), str(parts), stop, engine, {})
        assert set(begins) == {begun}
        begun = stop
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    expected, got = weights(whole), weights(parts)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] - value).abs().max() < 1e-6, key


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_of_two_ranks_continues_bit_for_bit(shards: Path, tmp_path: Path, stage: int) -> None:
    """With dropout, so that the random states of each rank count."""
    name, changes = "speech" if stage == 1 else "text_v2", {"transformer": {"dropout": 0.1}}
    for folder, stops in (("whole", (UPDATES,)), ("parts", (5, UPDATES))):
        for stop in stops:
            place = str(tmp_path / folder)
            run_distributed(train_until, 2, name, str(shards), place, stop, ZERO[stage], changes)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [key for key, value in expected.items() if not torch.equal(got[key], value)] == []


def command(name: str, shards: str, folder: str, *overrides: str) -> tuple[int, str]:
    """The exit code of a whole run on this rank, and what it printed as an error."""
    import contextlib
    import io

    errors = io.StringIO()
    experiment = scenarios.run_of(name, Path(shards), Path(folder))
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        try:
            main(experiment, argv=["train.updates=4", "optim.warmup=1", *overrides])
        except SystemExit as ended:
            return int(ended.code or 0), errors.getvalue()
    return -1, errors.getvalue()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_trains_evaluates_and_reports(shards: Path, tmp_path: Path, stage: int) -> None:
    arguments = (f"engine.zero_stage={stage}", "evaluation.every=2", "train.keep_best=teacher_rank", "train.keep=1")
    ended = run_distributed(command, 2, "vision", str(shards), str(tmp_path), *arguments)
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "report.html").is_file()
    scores = {
        line["update"]: line["teacher_rank"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if "student_rank" in line
    }
    best = max(scores, key=lambda update: (scores[update], -update))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("update-*"))
    assert kept == sorted({f"update-{best:09d}", "update-000000004"})


def shards_of_a_teacher(stage: int) -> dict[str, Any]:
    """Elements of the teacher's own parameters that this rank holds, all of them, and calls that exchange anything."""
    from unittest import mock

    import torch.distributed as dist

    experiment = scenarios.scenario("vision_v2")
    experiment = experiment.replace(engine={"kind": EngineKind.DEEPSPEED, "zero_stage": stage})
    torch.manual_seed(0)
    engine: Any = build_engine(Data2Vec.build(experiment), experiment, join("cpu"))
    pairs = engine.task.followers()
    here = sum((mine.ds_tensor if stage == 3 else mine).numel() for _, mine, _ in pairs)
    names = (
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast", "reduce",
        "reduce_scatter_tensor", "send", "recv", "barrier",
    )  # fmt: skip
    calls: list[str] = []
    with mock.patch.multiple(dist, **{name: lambda *a, name=name, **k: calls.append(name) for name in names}):
        engine.task.after_step(1, engine.move)
    before = [(mine.ds_tensor if stage == 3 else mine).clone() for _, mine, _ in pairs]
    with torch.no_grad():
        for _, _, theirs in pairs:
            (theirs.ds_tensor if stage == 3 else theirs).add_(1.0)
    engine.task.after_step(1, engine.move)
    moved = [
        float(((mine.ds_tensor if stage == 3 else mine) - old).abs().max())
        for (_, mine, _), old in zip(pairs, before, strict=True)
    ]
    whole = sum(getattr(mine, "ds_numel", mine.numel()) for _, mine, _ in pairs)
    return {"here": here, "whole": whole, "calls": calls, "moved": min(moved), "parameters": len(pairs)}


def test_the_teacher_is_sharded_and_its_update_moves_no_bytes() -> None:
    for rank in run_distributed(shards_of_a_teacher, 2, 3):
        assert rank["calls"] == []
        assert rank["moved"] > 0.0
        assert rank["whole"] / 2 <= rank["here"] <= rank["whole"] / 2 + rank["parameters"]
    for rank in run_distributed(shards_of_a_teacher, 2, 2):
        assert rank["here"] == rank["whole"]
