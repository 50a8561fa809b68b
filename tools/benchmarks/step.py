"""The speed of a recipe's training step."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.result import Result, Row
from recipes import chosen_experiment, micro_batch

from data2vec.core.batch import Batch
from data2vec.core.distributed.device import choose_device
from data2vec.core.engines.engine import uses_bf16
from data2vec.core.engines.torch import TorchEngine
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.pretraining.masked import Masked
from data2vec.core.settings.fields import Precision, Switch
from data2vec.core.settings.overrides import validate
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.training.flops import matmul_rate, step_flops

_CPU_BATCH = 4  # of models as wide as base and wider, when no batch is asked for
_WIDE = 512
_GIB = 2.0**30


@dataclass
class Variant:
    """One way to run a recipe's step, its input and masks on the device, and the seconds that its steps took."""

    name: str
    engine: TorchEngine
    prepared: Masked
    peak_gib: float = 0.0
    forward_backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def run(self) -> tuple[float, float]:
        """One update; returns the seconds of forward and backward, and of clipping, optimiser and teacher."""
        engine, number = self.engine, len(self.update)
        _wait(engine.device)
        start = _mark(engine.device)
        engine.accumulate(self.prepared, scale=1.0 / self.prepared.count, update=number)
        middle = _mark(engine.device)
        engine.step(1e-6, number + 1)  # a small rate: noise shall not drive the weights anywhere
        end = _mark(engine.device)
        _wait(engine.device)
        return _between(start, middle), _between(middle, end)

    def measure(self) -> None:
        """Run once and remember how long it took."""
        forward_backward, update = self.run()
        self.forward_backward.append(forward_backward)
        self.update.append(update)

    def row(self, flops: float, limit: float, samples: int) -> Row:
        """The medians; ``flops`` of a sample's step, ``limit`` the device's rate."""
        parts = statistics.median(self.forward_backward), statistics.median(self.update)
        seconds = statistics.median(map(sum, zip(self.forward_backward, self.update, strict=True)))
        rate = flops * samples / seconds
        return {
            "variant": self.name, "samples_per_second": samples / seconds, "step_ms": 1e3 * seconds,
            "forward_backward_ms": 1e3 * parts[0], "update_ms": 1e3 * parts[1],
            "tflops": rate / 1e12, "mfu": rate / limit, "peak_gib": self.peak_gib,
        }  # fmt: skip


def step(arguments: argparse.Namespace) -> Result:
    """Time the training step of a recipe, eager and, where asked for and possible, compiled."""
    chosen = sized(
        chosen_experiment(arguments.experiment, sample=arguments.sample, overrides=arguments.overrides), arguments
    )
    name, modality = next(iter(chosen.modalities.items()))
    device = choose_device(chosen.train.device)
    samples = chosen.train.batch
    drawn = modality.exhibit.random_input(samples)
    batch = Batch(name, drawn.inputs.to(device), torch.arange(samples), torch.full((samples,), -1))
    bf16 = uses_bf16(chosen.train.precision, device)
    switches = {Switch.OFF: [Switch.OFF], Switch.ON: [Switch.OFF, Switch.ON]}
    wanted = switches.get(chosen.train.compile, [Switch.OFF, Switch.ON] if device.type == "cuda" else [Switch.OFF])
    limit = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    variants: list[Variant] = []
    flops = 0.0
    for switch in wanted:
        variant, flops = _variant(chosen, switch, batch, device)
        if not variants or variant.engine.compiled:  # without a compiler there is nothing to compare
            variants.append(variant)
    for _ in range(arguments.steps):
        for variant in variants:
            variant.measure()
    rows = [variant.row(flops, limit, samples) for variant in variants]
    for row in rows:
        row["units_per_second"] = row["samples_per_second"] * drawn.per_sample
        row["ratio"] = row["samples_per_second"] / rows[0]["samples_per_second"]
    parameters = sum(p.numel() for p in next(iter(variants[0].engine.task.encoders().values())).parameters())
    settings = {
        "experiment": chosen.name, "parameters": parameters, "batch": samples, "device": str(device),
        "precision": "bf16" if bf16 else "fp32", "steps": arguments.steps, "gflop_per_sample": flops / 1e9,
        "matmul_tflops": limit / 1e12, "overrides": list(arguments.overrides),
    }  # fmt: skip
    columns = {
        "variant": "step", "units_per_second": f"{drawn.unit}/s", "step_ms": "ms/step",
        "forward_backward_ms": "forward +\nbackward ms", "update_ms": "optimiser +\nteacher ms", "tflops": "TFLOP/s",
        "mfu": "MFU", "peak_gib": "peak GiB", "ratio": "ratio",
    }  # fmt: skip
    notes = [
        f"random input and masks already on the device; median of {arguments.steps} steps",
        f"{flops / 1e9:.4g} GFLOP a sample; MFU against {limit / 1e12:.3g} TFLOP/s of a large matrix product",
    ]
    if arguments.batch is None and device.type == "cpu" and samples == _CPU_BATCH:
        notes.append("the batch is small because this is a CPU; --batch changes it")
    if device.type == "cpu":
        notes.append("peak GiB is that of the whole process so far")
    title = f"{chosen.name}: {parameters / 1e6:.1f} M parameters, batch {samples}, {settings['precision']} on {device}"
    return Result("step", title, columns, rows, settings, notes)


def _variant(chosen: Experiment, switch: Switch, batch: Batch, device: torch.device) -> tuple[Variant, float]:
    """A warmed-up engine, and the floating-point operations of a sample's step."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Data2Vec.build(chosen).to(device)
    few = model.prepare(batch.first(2).to("cpu"), seed=0, update=0)
    flops = step_flops(model, few.to(device)) / len(few)
    engine = TorchEngine(model, chosen.replace(train={"compile": switch, "device": str(device)}))
    prepared = model.prepare(batch.to("cpu"), seed=0, update=0)
    variant = Variant("compiled" if engine.compiled else "eager", engine, prepared.to(device))
    model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(5 if cuda else 2):
        variant.run()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB; Linux counts KiB
    variant.peak_gib = (torch.cuda.max_memory_allocated(device) - before) / _GIB if cuda else resident
    return variant, flops


def sized(chosen: Experiment, arguments: argparse.Namespace) -> Experiment:
    """The experiment with the device, precision and batch that are measured."""
    batch = arguments.batch or micro_batch(chosen)
    device = choose_device(arguments.device)
    if arguments.batch is None and device.type == "cpu" and chosen.transformer.width >= _WIDE:
        batch = min(batch, _CPU_BATCH)
    train = {
        "device": arguments.device, "precision": Precision(arguments.precision), "compile": Switch(arguments.compile),
        "batch": batch, "micro_batch": None, "batch_length": None, "micro_length": None,
    }  # fmt: skip
    chosen = chosen.replace(train=train)
    validate(chosen)
    return chosen


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU in its own queue, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds."""
    seconds: float = end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
    return seconds
