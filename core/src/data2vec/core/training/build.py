"""From an experiment to a model and the engine that runs it on this rank."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace

import torch

from data2vec.core.config import EngineKind, Experiment
from data2vec.core.data.pipeline import TrainData
from data2vec.core.errors import DataError
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.random import derive
from data2vec.core.training.engine import Engine, TorchEngine, choose_device, uses_bf16
from data2vec.core.training.flops import matmul_rate, step_flops
from data2vec.core.training.launchers import place
from data2vec.core.training.ranks import Ranks
from data2vec.core.training.trainer import hide


def build_model(experiment: Experiment, ranks: Ranks) -> Data2Vec:
    """The same model on every rank, and generators that differ between them."""
    seed = experiment.train.seed
    torch.manual_seed(seed)
    model = Data2Vec.build(experiment)
    if ranks.rank > 0:
        torch.manual_seed(derive(seed, ranks.rank))
    return model


def build_engine(model: Data2Vec, experiment: Experiment, ranks: Ranks) -> Engine:
    """The engine that ``engine.kind`` asks for.

    Raises:
        ConfigError: it is not installed, or refuses the settings.
    """
    kind = experiment.engine.kind
    if kind is EngineKind.AUTO:
        installed = importlib.util.find_spec("deepspeed") is not None
        kind = EngineKind.DEEPSPEED if place().launched and installed else EngineKind.TORCH
    if kind is EngineKind.TORCH:
        return TorchEngine(model, experiment, ranks)
    from data2vec.core.training.zero import DeepSpeedEngine  # slow to import

    return DeepSpeedEngine(model, experiment, ranks)


def measure(experiment: Experiment, model: Data2Vec, train: Mapping[str, TrainData]) -> dict[str, float]:
    """Arithmetic of a sample's step and the device's rate, for TFLOP/s and MFU; nothing where no sample is to be had.

    What is wrong with the data is for training to say, which sees all of it.
    """
    name, data = next(iter(train.items()))
    modality = experiment.modalities[name]
    two = replace(data, config=replace(data.config, workers=0)).for_evaluation().evaluation_batches(2, 2)
    try:
        batch = next(two)
    except (DataError, StopIteration):
        return {}
    device = choose_device(experiment.train.device)
    # What is to be sharded may not fit whole.
    whole = torch.device("cpu") if experiment.engine.zero_stage == 3 and place().launched else device
    batch, mask = hide(model, modality, modality.build_masker(), batch, seed=0, update=0)
    flops = step_flops(model.to(whole), batch.to(whole), mask.to(whole)) / len(batch)
    dtype = torch.bfloat16 if uses_bf16(experiment.train.precision, device) else torch.float32
    return {"flops_per_sample": flops, "peak_flops": matmul_rate(device, dtype) * place().world}
