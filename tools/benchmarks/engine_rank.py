"""One rank of the engine benchmark; processes load this file by its place, so it imports core alone."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from data2vec.core.distributed.ranks import join
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.pretraining.masked import Masked
from data2vec.core.run.build import build_engine
from data2vec.core.settings.pretraining import Experiment

_WARM_UP = 3


def measure_engine(experiment: Experiment, prepared: Masked, steps: int) -> tuple[float, float]:
    """The median seconds of a step, and the peak GiB: of the GPU, or of this process where there is none."""
    ranks = join(experiment.train.device)
    torch.manual_seed(0)
    engine = build_engine(Data2Vec.build(experiment), experiment, ranks)
    engine.task.train()
    prepared = prepared.to(engine.device)
    cuda = engine.device.type == "cuda"
    seconds = []
    for number in range(_WARM_UP + steps):
        if cuda:
            torch.cuda.synchronize(engine.device)
        start = time.perf_counter()
        engine.accumulate(prepared, scale=1.0 / (prepared.count * ranks.world), update=number)
        engine.step(1e-6, number + 1)
        if cuda:
            torch.cuda.synchronize(engine.device)
        seconds.append(time.perf_counter() - start)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB; Linux counts KiB
    peak = torch.cuda.max_memory_allocated(engine.device) / 2**30 if cuda else resident
    return statistics.median(seconds[_WARM_UP:]), peak
