"""A rank that is killed while the others are inside an exchange: they end, and one of them says why."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data2vec.core import testing
from data2vec.core.testing import load_module

scenarios = load_module("scenarios_of_lost_ranks", Path(__file__).with_name("scenarios.py"))
_STATISTICS = "data2vec.core.training.monitor:Monitor.check"
_SAVING = "data2vec.core.checkpoints.saver:Saver.finish"
_TORCH, _ZERO = "data2vec.core.engines.torch:TorchEngine", "data2vec.core.engines.zero:DeepSpeedEngine"


def zero(stage: int) -> tuple[str, ...]:
    return ("engine.kind=deepspeed", f"engine.zero_stage={stage}")


def command(rank: int, world: int, store: str, log: str, here: str, dies_at: str, arguments: tuple[str, ...]) -> None:
    """One rank of a run; the last one kills itself when it gets to a function for the seventh time."""
    import torch.distributed as dist

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if rank == world - 1:
        die_at(dies_at)
    from data2vec.core.run.cli import main

    shards, folder, *settings = arguments
    load = load_module("scenarios_of_lost_ranks", Path(here).with_name("scenarios.py"))
    main(load.run_of("text", Path(shards), Path(folder)), argv=["train.updates=40", "optim.warmup=1", *settings])


def die_at(name: str) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), []

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(owner, last, called)


@pytest.mark.parametrize(
    ("world", "dies_at", "settings"),
    [
        (2, _STATISTICS, ("engine.kind=torch",)),
        (3, f"{_TORCH}._sum_gradients", ("engine.kind=torch", "train.batch=6")),
        (2, _SAVING, ("engine.kind=torch",)),
        (2, f"{_ZERO}.step", zero(0)),
        (2, f"{_ZERO}.accumulate", zero(3)),
        pytest.param(2, _STATISTICS, zero(2), marks=pytest.mark.slow),
        pytest.param(2, f"{_ZERO}.step", zero(2), marks=pytest.mark.slow),
        pytest.param(2, _STATISTICS, zero(3), marks=pytest.mark.slow),
        pytest.param(2, f"{_ZERO}.step", zero(3), marks=pytest.mark.slow),
        pytest.param(2, _SAVING, zero(3), marks=pytest.mark.slow),
    ],
)
def test_the_others_end_with_one_message(tmp_path: Path, world: int, dies_at: str, settings: tuple[str, ...]) -> None:
    scenarios.write_shards(tmp_path / "shards" / "text", "text")
    log = tmp_path / "log.txt"
    arguments = (str(tmp_path / "shards"), str(tmp_path / "run"), *settings)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(
            target=testing.call,
            args=("lost", __file__, command.__name__, rank, world, str(tmp_path / "store"), str(log), __file__,
                  dies_at, arguments),
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    left = [process for process in processes if process.exitcode is None]
    for process in left:
        process.kill()
        process.join(60)
    text = log.read_text()
    assert not left, text
    assert [process.exitcode for process in processes] == [2] * (world - 1) + [-signal.SIGKILL], text
    assert text.count("error:") == 1, text
    assert "another rank has ended, so this one cannot go on" in text
    assert "Traceback" not in text, text
