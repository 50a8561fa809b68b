"""Whole commands on two ranks that must stop: both end with exit code 2, and exactly one of them says why."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.run.cli import main
from data2vec.core.testing import load_module, run_distributed

scenarios = load_module("scenarios_of_failing_ranks", Path(__file__).with_name("scenarios.py"))

ENGINES = {
    "torch": ("engine.kind=torch",),
    "zero2": ("engine.kind=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine.kind=deepspeed", "engine.zero_stage=3"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in ("vision", "text"):
        scenarios.write_shards(folder / name, name)
    return folder


def command(name: str, shards: str, folder: str, *overrides: str) -> tuple[int, str]:
    """The exit code of a whole run on this rank, and what it printed as an error."""
    errors = io.StringIO()
    experiment = scenarios.run_of(name, Path(shards), Path(folder))
    with contextlib.redirect_stderr(errors):
        try:
            main(experiment, argv=["train.updates=8", "optim.warmup=1", *overrides])
        except SystemExit as ended:
            return int(ended.code or 0), errors.getvalue()
    return -1, errors.getvalue()


def said(ended: list[Any], speaker: int = 0) -> str:
    """The message of two commands that failed, of which only ``speaker`` says anything."""
    assert [code for code, _ in ended] == [2, 2], ended
    assert ended[1 - speaker][1] == ""
    message: str = ended[speaker][1]
    assert message.count("error:") == 1
    return message


def saved(folder: Path) -> str | None:
    place = checkpoint.latest(folder / "checkpoints")
    return place.name if place else None


def test_a_setting_that_does_not_suit_two_ranks(shards: Path, tmp_path: Path) -> None:
    overrides = ("train.batch=3", "train.micro_batch=null")
    ended = run_distributed(command, 2, "vision", str(shards), str(tmp_path), *overrides)
    assert "train.batch=3: cannot be shared equally by 2 ranks" in said(ended)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite(shards: Path, tmp_path: Path, engine: str) -> None:
    overrides = ("optim.lr=1e30", *ENGINES[engine])
    message = said(run_distributed(command, 2, "vision", str(shards), str(tmp_path), *overrides))
    assert "is not finite" in message
    assert "the first to fail was the " in message
    assert "lower optim.lr" in message.partition("Try: ")[2]
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / (saved(tmp_path) or '')}." in message


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("what", "component"), [("target", "teacher"), ("prediction", "prediction")])
def test_a_collapse(shards: Path, tmp_path: Path, engine: str, what: str, component: str) -> None:
    """Normalised targets and what regresses them never have a spread of 5, so every update counts as collapsed."""
    overrides = (f"train.min_{what}_spread=5", "train.collapse_after=3", *ENGINES[engine])
    message = said(run_distributed(command, 2, "text", str(shards), str(tmp_path), *overrides))
    assert f"update 3: the {what}s have collapsed ({what}_spread is " in message
    assert f"below 5 since update 1; the first to fail was the {component})" in message
    assert "Try: " in message
    assert saved(tmp_path) == "update-000000002"


def test_too_few_samples_for_one_update(shards: Path, tmp_path: Path) -> None:
    ended = run_distributed(command, 2, "vision", str(shards), str(tmp_path), "train.batch=64")
    assert "has 37 samples, one update needs train.batch=64: lower train.batch to at most 37, or add data" in said(
        ended
    )
    assert saved(tmp_path) is None


def run_dry(shards: str, folder: str) -> tuple[int, str]:
    """A whole run whose shards are emptied on the disk, by rank 0, once it has taken two batches."""
    from data2vec.core.data import dataset

    whole = dataset.training_batches

    def batches(*arguments: Any) -> Any:
        for number, batch in enumerate(whole(*arguments)):
            if number == 2 and os.environ["RANK"] == "0":
                for path in Path(shards, "text").glob("*.tar"):
                    os.truncate(path, 0)
            yield batch

    dataset.training_batches = batches
    return command("text", shards, folder)


def test_data_that_runs_dry(tmp_path: Path) -> None:
    scenarios.write_shards(tmp_path / "shards" / "text", "text")
    ended = run_distributed(run_dry, 2, str(tmp_path / "shards"), str(tmp_path / "run"))
    messages = [message for _, message in ended if message]
    assert len(messages) == 1
    assert "train-00000" in said(ended, speaker=[message for _, message in ended].index(messages[0]))
    assert saved(tmp_path / "run") in ("update-000000002", "update-000000003")


@pytest.mark.parametrize(
    ("samples", "every"), [(20, 5), (400, 8)]
)  # of an epoch; of more than the run sees: at its end
def test_too_many_broken_samples(tmp_path: Path, samples: int, every: int) -> None:
    with ShardWriter(tmp_path / "shards" / "text", "train", "text", samples_per_shard=100) as writer:
        for number in range(samples):
            text = b"some words of a document" if number % every else b"\xff\xfe"
            writer.write(f"{number:03d}", {"txt": text})
    arguments = ("text", str(tmp_path / "shards"), str(tmp_path / "run"), "data.max_broken=0.05")
    ended = run_distributed(command, 2, *arguments)
    assert [code for code, _ in ended] == [2, 2]
    message = "".join(message for _, message in ended)  # each rank also names its own broken samples
    assert message.count("error:") == 1
    assert "samples are broken, more than data.max_broken=0.05 allows" in message
    assert "mend the shards, or raise data.max_broken" in message
    assert saved(tmp_path / "run") != "update-000000008"


def broken_on_one_rank(shards: str, folder: str) -> tuple[int, str]:
    """A whole run whose data ends on rank 1, while rank 0 still waits for that rank's part of the last checkpoint."""
    import time

    from data2vec.core.checkpoints import saver
    from data2vec.core.data import dataset
    from data2vec.core.errors import DataError

    whole, write_part = dataset.training_batches, checkpoint.write_part

    def write_slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(0.3 if os.environ["RANK"] == "1" else 0.0)
        write_part(*arguments, **named)

    saver._POLL_SECONDS = 1.5
    checkpoint.write_part = write_slowly

    def batches(*arguments: Any) -> Any:
        for number, batch in enumerate(whole(*arguments)):
            if number == 2 and os.environ["RANK"] == "1":
                raise DataError("train-0.tar: the disk is gone")
            yield batch

    dataset.training_batches = batches
    return command("text", shards, folder)


def test_data_that_fails_on_one_rank_ends_all(shards: Path, tmp_path: Path) -> None:
    ended = run_distributed(broken_on_one_rank, 2, str(shards), str(tmp_path))
    assert "rank 1: train-0.tar: the disk is gone" in said(ended, speaker=1)
    assert saved(tmp_path) == "update-000000002"


def refused_on_rank_0(shards: str, folder: str) -> tuple[int, str]:
    """A whole run whose metrics the disk refuses from the third line on; only rank 0 writes them."""
    from data2vec.core.errors import TrainingError
    from data2vec.core.training.monitor import Monitor

    write = Monitor.write

    def refuse(self: Monitor, line: Any) -> None:
        if self._file is not None and line["update"] == 3:
            raise TrainingError("metrics.jsonl: cannot be written")
        write(self, line)

    Monitor.write = refuse  # type: ignore[method-assign]
    return command("text", shards, folder)


def test_metrics_that_rank_0_cannot_write_end_all(shards: Path, tmp_path: Path) -> None:
    ended = run_distributed(refused_on_rank_0, 2, str(shards), str(tmp_path))
    assert "metrics.jsonl: cannot be written" in said(ended)
    assert saved(tmp_path) == "update-000000002"
