"""Every engine computes what one process computes: the same losses, the same student, the same teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data2vec.core import Data2Vec, Experiment
from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.engines.engine import Engine
from data2vec.core.run.build import build_engine
from data2vec.core.task import Moments
from data2vec.core.testing import load_module, run_distributed

scenarios = load_module("scenarios_of_engines", Path(__file__).with_name("scenarios.py"))

UPDATES = 20
NAMES = ("vision", "vision_v2", "speech", "speech_v2", "text", "text_v2", "alternating")
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    "zero0": {"kind": "deepspeed", "zero_stage": 0},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "bucket_size": 100_000},
    "zero3, small ones whole": {"kind": "deepspeed", "zero_stage": 3, "persistence_threshold": 200},
    "zero3, all whole": {"kind": "deepspeed", "zero_stage": 3, "persistence_threshold": 100_000},
    "zero1, offloaded": {"kind": "deepspeed", "zero_stage": 1, "offload_optimizer": True},
    "zero2, offloaded": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "zero3, offloaded": {
        "kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True,
        "bucket_size": 100_000,
    },
}  # fmt: skip


def with_engine(name: str, engine: str) -> Experiment:
    from data2vec.core.settings.fields import EngineKind

    settings = dict(ENGINES[engine])
    settings["kind"] = EngineKind(settings["kind"])
    experiment: Experiment = scenarios.scenario(name).replace(engine={"bucket_size": 1_000, **settings})
    return experiment


def train(experiment: Experiment, engine: Engine, updates: range, *, passes: int) -> list[list[float]]:
    """Losses, gradient norms and spreads of some updates; each rank takes its part of the samples, in ``passes``."""
    from data2vec.core.training.schedule import learning_rate

    rank, world = engine.ranks.rank, engine.ranks.world
    size = scenarios.SAMPLES // world // passes
    found = []
    engine.task.train()
    for update in updates:
        masked = []
        for number in range(passes):
            first = (number * world + rank) * size
            batch = scenarios.batch_of(experiment, update, slice(first, first + size))
            masked.append(engine.task.prepare(batch, seed=3, update=update))
        count = int(engine.ranks.sum([sum(part.count for part in masked)])[0])
        loss = 0.0
        moments: Moments | None = None
        for part in masked:
            step = engine.accumulate(part.to(engine.device), scale=1.0 / count, update=update)
            loss += float(step.total.detach()) / count
            new = step.moments["target_spread"]
            moments = new if moments is None else moments + new
        assert moments is not None
        pooled = Moments(*(engine.ranks.add_up(part) for part in (moments.count, moments.sum, moments.squares)))
        spread = float(pooled.spread())
        norm = float(engine.step(learning_rate(experiment.optim, update, UPDATES), update + 1))
        found.append([*engine.ranks.sum([loss]), norm, spread])
    return found


def plain(shares: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A rank's state as what a process can return: (values, start, shape) of pieces."""
    return {
        kind: {
            name: (value.values.clone(), value.start, list(value.shape)) if isinstance(value, Piece) else value.clone()
            for name, value in values.items()
        }
        for kind, values in shares.items()
    }


def whole(ranks: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Tensor]]:
    """The tensors of all ranks' shares; fails where one is missing, doubled or has a hole."""
    found: dict[str, dict[str, Tensor]] = {}
    for kind in ranks[0]:
        tensors = found.setdefault(kind, {})
        pieces: dict[str, list[Any]] = {}
        for shares in ranks:
            for name, value in shares[kind].items():
                if isinstance(value, Tensor):
                    assert name not in tensors
                    tensors[name] = value
                else:
                    pieces.setdefault(name, []).append(value)
        for name, parts in pieces.items():
            assert name not in tensors
            parts.sort(key=lambda part: part[1])
            ends = [part[1] + len(part[0]) for part in parts]
            assert [part[1] for part in parts] == [0, *ends[:-1]]
            tensors[name] = torch.cat([part[0] for part in parts]).view(parts[0][2])
    return found


def on_a_rank(names: list[str], engine_name: str, passes: int) -> dict[str, Any]:
    """What one of several ranks gets for each scenario."""
    import torch.distributed as dist

    results = {}
    for name in names:
        experiment = with_engine(name, engine_name)
        torch.manual_seed(0)
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        engine = build_engine(Data2Vec.build(experiment), experiment, ranks)
        values = train(experiment, engine, range(UPDATES), passes=passes)
        results[name] = {"values": values, "state": plain(engine.state())}
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[list[float]], dict[str, dict[str, Tensor]]]]:
    """The same updates in one process, all samples in one pass."""
    found = {}
    for name in NAMES:
        experiment = with_engine(name, "torch")
        torch.manual_seed(0)
        engine = build_engine(Data2Vec.build(experiment), experiment, Ranks())
        values = train(experiment, engine, range(UPDATES), passes=1)
        found[name] = values, whole([plain(engine.state())])
    return found


# All three modalities everywhere, 2.0 in most, each alone where gradients and parameters are cut most.
FEW, ZERO3 = ("speech_v2", "alternating"), ("vision", "vision_v2", "speech_v2", "text_v2", "alternating")
COMPARED = [
    ("torch", FEW), ("zero1", FEW), ("zero2", FEW), ("zero3", ("vision_v2", "alternating")),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("zero0", FEW), ("zero2", NAMES), ("zero3", ZERO3), ("zero3, small ones whole", NAMES[-1:]),
            ("zero3, all whole", NAMES[-1:]), ("zero1, offloaded", FEW), ("zero2, offloaded", FEW),
            ("zero3, offloaded", FEW),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "chosen"), COMPARED, ids=lambda part: part if isinstance(part, str) else len(part))
def test_two_ranks_are_one_process(engine: str, chosen: tuple[str, ...], alone: dict[str, Any]) -> None:
    passes = 1 if engine == "torch" else 2
    results = run_distributed(on_a_rank, 2, list(chosen), engine, passes)
    for name in chosen:
        expected, tensors = alone[name]
        for rank in results:
            worst = (torch.tensor(rank[name]["values"]) / torch.tensor(expected) - 1).abs().amax(dim=0)
            assert worst[0] < 1e-6, (name, worst)  # losses
            assert worst[1] < 1e-5, (name, worst)  # gradient norms
            assert worst[2] < 1e-5, (name, worst)  # spreads, of all ranks and passes
        got = whole([rank[name]["state"] for rank in results])
        assert got["model"].keys() == tensors["model"].keys()
        assert got["optimiser"].keys() == tensors["optimiser"].keys()
        for key, value in tensors["model"].items():
            torch.testing.assert_close(
                got["model"][key], value, atol=1e-6, rtol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
