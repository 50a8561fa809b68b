"""The rate at which one GPU runs a recipe: from a measurement, or predicted from its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planning.cost import MEMORY_RATE, Rate, update_bytes
from planning.memory import TORCH
from planning.trace import Trace

from data2vec.core.errors import ConfigError
from data2vec.core.settings.pretraining import Experiment

_SAME = 0.25  # of two counts of the same arithmetic: one may skip blocks (layer drop)


def predicted(trace: Trace, *, tflops: float, mfu: float, checkpointing: bool) -> Rate:
    """From floating-point operations at a share ``mfu`` of what the GPU can do."""
    return Rate(
        _work(trace, checkpointing) / (tflops * 1e12 * mfu),
        _update(trace),
        f"predicted, not measured: {_work(trace, checkpointing) / 1e9:,.0f} GFLOP a sample at {mfu:.0%} of "
        f"{tflops:g} TFLOP/s (--mfu, --tflops); --step or --step-ms give a measurement",
    )


def given(trace: Trace, milliseconds: float, samples: float, experiment: Experiment, checkpointing: bool) -> Rate:
    """From the time of a step of the recipe's micro-batch on one GPU, its update included."""
    update = min(_update(trace), milliseconds / 2e3)
    return Rate(
        (milliseconds / 1e3 - update) / samples * _more(trace, experiment, checkpointing),
        update,
        f"measured: {milliseconds:g} ms for a step of {samples:.4g} samples on one GPU (--step-ms), of which "
        f"{1e3 * update:.3g} ms are taken to be the update",
        samples,
    )


def from_file(file: Path, trace: Trace, experiment: Experiment, *, checkpointing: bool) -> Rate:
    """From what ``tools/benchmark.py step EXPERIMENT --json FILE`` wrote: its fastest variant.

    Raises:
        ConfigError: the file is none, is of another experiment or another model, or was measured on a CPU.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        settings, rows = content["settings"], content["rows"]
        row = max(rows, key=lambda row: row["samples_per_second"])
        name, samples, device = str(settings["experiment"]), float(settings["batch"]), str(settings["device"])
        passes, update = float(row["forward_backward_ms"]) / 1e3, float(row["update_ms"]) / 1e3
        gflop, variant = float(settings["gflop_per_sample"]), str(row["variant"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            [f"--step {file}: not a result of tools/benchmark.py step --json ({reason}); measure it again"]
        ) from None
    if name != experiment.name:
        raise ConfigError([f"--step {file}: measured {name}, not {experiment.name}; measure the same experiment"])
    if samples <= 0 or passes <= 0 or update < 0 or gflop <= 0:
        raise ConfigError([f"--step {file}: holds times or sizes that cannot be; measure it again"])
    if abs(gflop * 1e9 / trace.flops - 1) > _SAME:
        raise ConfigError(
            [
                f"--step {file}: {gflop:,.1f} GFLOP a sample there, {trace.flops / 1e9:,.1f} with these settings; "
                "measure with the same ones"
            ]
        )
    if device == "cpu":
        raise ConfigError([f"--step {file}: was measured on a CPU; measure on the GPU that is planned for"])
    source = f"measured: {file}, {variant}, {samples:g} samples in {1e3 * (passes + update):.3g} ms on {device}"
    return Rate(passes / samples * _more(trace, experiment, checkpointing), update, source, samples)


def _more(trace: Trace, experiment: Experiment, checkpointing: bool) -> float:
    """Add what a plan's checkpointing adds to what was measured with the recipe's own setting."""
    return _work(trace, checkpointing) / _work(trace, experiment.train.activation_checkpointing)


def _work(trace: Trace, checkpointing: bool) -> float:
    return trace.flops + (trace.recomputed if checkpointing else 0.0)


def _update(trace: Trace) -> float:
    return update_bytes(trace, TORCH, 1) / MEMORY_RATE
