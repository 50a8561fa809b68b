"""The engines side by side: plain torch and DeepSpeed's ZeRO stages on the same recipe."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from benchmarks.engine_rank import measure_engine
from benchmarks.result import Result, Row
from benchmarks.step import sized
from recipes import chosen_experiment

from data2vec.core.batch import Batch
from data2vec.core.distributed.device import choose_device
from data2vec.core.errors import ConfigError
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.settings.fields import EngineKind
from data2vec.core.testing import run_distributed

_ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": EngineKind.TORCH},
    **{f"zero{stage}": {"kind": EngineKind.DEEPSPEED, "zero_stage": stage} for stage in range(4)},
    "zero2-offload": {"kind": EngineKind.DEEPSPEED, "zero_stage": 2, "offload_optimizer": True},
    "zero3-offload": {
        "kind": EngineKind.DEEPSPEED,
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
ENGINES = tuple(_ENGINES)


def engine(arguments: argparse.Namespace) -> Result:
    """Compare step time and peak memory of the engines on one recipe, each in processes of its own."""
    chosen = sized(
        chosen_experiment(arguments.experiment, sample=arguments.sample, overrides=arguments.overrides), arguments
    )
    name, modality = next(iter(chosen.modalities.items()))
    device = choose_device(chosen.train.device)
    if device.type == "cuda" and arguments.ranks > torch.cuda.device_count():
        raise ConfigError([f"--ranks {arguments.ranks}: there are {torch.cuda.device_count()} GPUs here"])
    samples = chosen.train.batch
    drawn = modality.exhibit.random_input(samples)
    with torch.random.fork_rng():
        model = Data2Vec.build(chosen)
    plain = Batch(name, drawn.inputs, torch.arange(samples), torch.full((samples,), -1))
    prepared = model.prepare(plain, seed=0, update=0)
    parameters = sum(p.numel() for p in model.student.parameters())
    found: dict[str, list[tuple[float, float]]] = {which: [] for which in arguments.engines}
    for _ in range(arguments.rounds):  # in turns: other work on the machine slows all alike
        for which in arguments.engines:
            experiment = chosen.replace(engine=_ENGINES[which])
            ranks = run_distributed(
                measure_engine, arguments.ranks, experiment, prepared, arguments.steps, timeout=3600.0
            )
            found[which].append((max(seconds for seconds, _ in ranks), max(peak for _, peak in ranks)))
    rows: list[Row] = []
    for which, rounds in found.items():
        seconds = statistics.median(seconds for seconds, _ in rounds)
        rows.append({
            "engine": which, "step_ms": 1e3 * seconds, "samples_per_second": samples * arguments.ranks / seconds,
            "peak_gib": max(peak for _, peak in rounds),
            "ratio": statistics.median(mine / first for (mine, _), (first, _) in
                                       zip(rounds, next(iter(found.values())), strict=True)),
        })  # fmt: skip
    columns = {
        "engine": "engine", "step_ms": "ms/step", "samples_per_second": "samples/s", "peak_gib": "peak GiB a rank",
        "ratio": f"time over {arguments.engines[0]}",
    }  # fmt: skip
    settings = {
        "experiment": chosen.name, "parameters": parameters, "batch": samples, "ranks": arguments.ranks,
        "device": str(device), "steps": arguments.steps, "rounds": arguments.rounds,
        "overrides": list(arguments.overrides),
    }  # fmt: skip
    title = (
        f"{chosen.name}: {parameters / 1e6:.1f} M parameters, {arguments.ranks} ranks of {samples} samples on {device}"
    )
    notes = [f"random input; median of {arguments.steps} steps in {arguments.rounds} rounds, the slowest rank counts"]
    if device.type == "cpu":
        notes.append("peak GiB is that of the whole process")
    return Result("engine", title, columns, rows, settings, notes)
