"""From an experiment to a task and the engine that runs it on this rank."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from data2vec.core.data.dataset import TrainData
from data2vec.core.distributed.device import choose_device
from data2vec.core.distributed.launchers import place
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.engines.engine import Engine, uses_bf16
from data2vec.core.engines.torch import TorchEngine
from data2vec.core.errors import DataError
from data2vec.core.hashing import derive
from data2vec.core.run.kind import Kind
from data2vec.core.settings.fields import EngineKind, Recipe
from data2vec.core.task import Task
from data2vec.core.training.flops import matmul_rate, step_flops


def build_task(recipe: Recipe, kind: Kind, ranks: Ranks) -> Task[Any]:
    """Build the same task on every rank, and leave them with generators that differ."""
    seed = recipe.train.seed
    torch.manual_seed(seed)
    task = kind.build(recipe)
    if ranks.rank > 0:
        torch.manual_seed(derive(seed, ranks.rank))
    return task


def build_engine(task: Task[Any], recipe: Recipe, ranks: Ranks) -> Engine:
    """The engine that ``engine.kind`` asks for.

    Raises:
        ConfigError: it is not installed, or refuses the settings.
    """
    kind = recipe.engine.kind
    if kind is EngineKind.AUTO:
        installed = importlib.util.find_spec("deepspeed") is not None
        kind = EngineKind.DEEPSPEED if place().launched and installed else EngineKind.TORCH
    if kind is EngineKind.TORCH:
        return TorchEngine(task, recipe, ranks)
    from data2vec.core.engines.zero import DeepSpeedEngine  # slow to import

    return DeepSpeedEngine(task, recipe, ranks)


def measure(recipe: Recipe, task: Task[Any], train: Mapping[str, TrainData]) -> dict[str, float]:
    """Arithmetic of a sample's step and the device's rate, for TFLOP/s and MFU; nothing where no sample is to be had.

    What is wrong with the data is for training to say, which sees all of it.
    """
    data = next(iter(train.values()))
    two = replace(data, config=replace(data.config, workers=0)).for_evaluation().evaluation_batches(2, 2)
    try:
        batch = next(two)
    except (DataError, StopIteration):
        return {}
    device = choose_device(recipe.train.device)
    # What is to be sharded may not fit whole.
    whole = torch.device("cpu") if recipe.engine.zero_stage == 3 and place().launched else device
    flops = step_flops(task.to(whole), task.prepare(batch, seed=0, update=0).to(whole)) / len(batch)
    dtype = torch.bfloat16 if uses_bf16(recipe.train.precision, device) else torch.float32
    return {"flops_per_sample": flops, "peak_flops": matmul_rate(device, dtype) * place().world}
