"""A run that is killed at any instant, on all ranks or on one, continues to what it would have been.

Each attempt is a command on fresh processes, without its evaluation, which is killed at a random instant of its life:
while it starts, trains, saves, or ends. A checkpoint is written after every update, so many instants are within a save.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch

from data2vec.core import testing
from data2vec.core.checkpoints import checkpoint
from data2vec.core.testing import load_module
from data2vec.core.training.monitor import read_metrics

UPDATES = 8
ENDS_WITHIN = 90.0  # s after another rank was killed, on a machine that has much else to do


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    settings: tuple[str, ...] = ("engine.kind=torch",)
    kills: int = 14  # 100 over all cases


ALL = (
    Case("vision", 1), Case("speech_v2", 1), Case("text", 1), Case("text_v2", 2), Case("speech", 2),
    Case("vision", 2, ("engine.zero_stage=0",), 6), Case("text", 2, ("engine.zero_stage=1",), 6),
    Case("vision_v2", 2, ("engine.zero_stage=2",), 6), Case("speech", 2, ("engine.zero_stage=2",), 6),
    Case("vision", 2, ("engine.zero_stage=3",), 6),
)  # fmt: skip
FEW = (
    Case("vision", 1, kills=5), Case("text_v2", 2, kills=4), Case("vision", 2, ("engine.zero_stage=3",), 3),
)  # fmt: skip
CASES = [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in ALL)]


def command(rank: int, world: int, store: str, log: str, here: str, name: str, arguments: tuple[str, ...]) -> None:
    """One rank of a run, as a launcher would start it; exits with the command's code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if world > 1:
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    scenarios = load_module("scenarios_of_kills", Path(here).with_name("scenarios.py"))
    from data2vec.core.run import cli

    cli._evaluate_and_report = lambda *parts: None  # the instants are to be those of training and saving
    shards, folder, *settings = arguments
    cli.main(scenarios.run_of(name, Path(shards), Path(folder)), argv=[f"train.updates={UPDATES}", *settings])


class Attempts:
    """Starts commands of a case and kills them."""

    def __init__(self, case: Case, shards: Path, place: Path) -> None:
        self.case, self.shards, self.place = case, shards, place
        self.number = 0
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")

    def start_server(self) -> None:
        """Start what the processes fork from, so that no command's time includes it."""
        process = self.context.Process(target=time.sleep, args=(0,))
        process.start()
        process.join(60)

    def start(self, folder: Path) -> list[ForkServerProcess]:
        self.number += 1
        store, log = self.place / f"store-{self.number}", self.place / f"log-{self.number}.txt"
        arguments = (str(self.shards), str(folder), *self.case.settings)
        processes = [
            self.context.Process(
                target=testing.call,
                args=(
                    "kills",
                    __file__,
                    command.__name__,
                    rank,
                    self.case.world,
                    str(store),
                    str(log),
                    __file__,
                    self.case.name,
                    arguments,
                ),
            )
            for rank in range(self.case.world)
        ]
        for process in processes:
            process.start()
        return processes

    def log(self) -> str:
        path = self.place / f"log-{self.number}.txt"
        return path.read_text() if path.exists() else ""  # killed before it could print anything

    def finish(self, folder: Path) -> float:
        """Run to the end; returns the seconds that it took."""
        began = time.monotonic()
        processes = self.start(folder)
        for process in processes:
            process.join(600)
        assert [process.exitcode for process in processes] == [0] * self.case.world, self.log()
        return time.monotonic() - began

    def kill(self, folder: Path, after: float, which: int | None) -> bool:
        """Kill all ranks, or one, after some seconds; whether any was still running."""
        processes = self.start(folder)
        time.sleep(after)
        chosen = processes if which is None else [processes[which]]
        hit = False
        for process in chosen:
            if process.exitcode is None:
                with suppress(ProcessLookupError):  # it has ended, and the server has not told its exit code yet
                    os.kill(process.pid or 0, signal.SIGKILL)
                    hit = True
        trained = "update 1/" in self.log()
        until = time.monotonic() + (ENDS_WITHIN if trained else 0.5)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        # A launcher kills the others, too; but a rank that trains notices by itself, one that is waited for does not.
        left = [process for process in processes if process.exitcode is None]
        for process in left:
            process.kill()
            process.join(60)
        if hit and which is not None and trained:
            assert not left, self.log()
            # After the last update the first rank evaluates alone, and the others end well once it is saved.
            finished = f"update {UPDATES}/" in self.log()
            assert finished or all(process.exitcode != 0 for process in processes), self.log()
        return hit


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.name}-{case.world}-{case.settings[0].rpartition('=')[2]}-{case.kills}"
)
def test_killed_at_random_instants(case: Case, tmp_path: Path) -> None:
    scenarios = load_module("scenarios_of_kills", Path(__file__).with_name("scenarios.py"))
    modality = case.name.partition("_")[0]
    scenarios.write_shards(tmp_path / "shards" / modality, modality)
    attempts = Attempts(case, tmp_path / "shards", tmp_path)
    whole = tmp_path / "whole"
    attempts.start_server()
    longest = attempts.finish(whole)
    expected = [line["loss"] for line in read_metrics(whole / "metrics.jsonl")]
    assert len(expected) == UPDATES
    chance = random.Random(f"{case}")
    kills, runs = 0, 0
    while kills < case.kills:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        for _ in range(chance.randint(4, 8)):
            which = chance.choice([None, chance.randrange(case.world)])
            kills += attempts.kill(folder, chance.uniform(0.0, 1.1 * longest), which)
            if kills == case.kills:
                break
        attempts.finish(folder)
        assert [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] == expected
        same_weights(folder, whole)
        left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
        assert left == []
    print(f"{kills} kills in {runs} runs, a whole command {longest:.1f} s", file=sys.stderr)


def same_weights(one: Path, other: Path) -> None:
    places = [checkpoint.latest(folder / "checkpoints") for folder in (one, other)]
    # A run that was killed after its last save and before it ended saves its last update again, beside the first time.
    assert all(place is not None and place.name.startswith(f"update-{UPDATES:09d}") for place in places)
    first, second = (checkpoint.load(place).tensors for place in places if place is not None)
    for kind in ("model", "optimiser"):
        assert set(first[kind]) == set(second[kind])
        assert [name for name in first[kind] if not torch.equal(first[kind][name], second[kind][name])] == []
