"""The cost of an update under each engine: bytes that a rank sends, and seconds.

The bytes are those of ring algorithms over what the engines exchange (a test counts it on two ranks): sums of gradients
and parameters in fp32, whatever the precision. Nothing is taken to overlap, because the engines exchange when backward
or the step waits for it. The factors of DeepSpeed are measured on one H100 with ViT-B; they are not known for other
sizes or for several GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from planning.memory import FP32, TORCH, live
from planning.trace import Trace

from data2vec.core.settings.fields import EngineConfig

# Milliseconds of a step over those of plain torch, both compiled but for stage 3, which is refused compilation.
OVERHEAD = {TORCH: 1.0, 0: 1.08, 1: 1.09, 2: 1.09, 3: 3.1}
# Bytes that an update reads and writes for each element: AdamW of trained ones (four read, three written), their norm
# and clipping (two read, one written), and the teacher's average (two read, one written).
_ADAMW, _CLIP, _AVERAGE = 28, 12, 12
MEMORY_RATE = 2.97e12  # bytes a second of a device copy, measured on an H100


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends (and receives) in an update: sums of gradients, and gathering of parameters."""

    reduced: float
    gathered: float

    @property
    def total(self) -> float:
        return self.reduced + self.gathered


def volume(trace: Trace, stage: int, world: int, engine: EngineConfig, passes: int) -> Volume:
    """Count what is exchanged in an update of ``passes`` forward passes on each rank.

    Stage 2 and 3 exchange gradients in every pass, because no rank has room for all of them; the others once. Stages 1
    and 2 sum gradients on every rank and keep a part; stage 3 scatters them. Stage 3 gathers student and teacher in
    every pass, and once more in backward what it could not keep.
    """
    share = (world - 1) / world
    size = FP32 * trace.trained * share
    if stage in (TORCH, 0):
        return Volume(2 * size, 0.0)
    if stage == 1:
        return Volume(2 * size, size)
    if stage == 2:
        return Volume(2 * size * passes, size)
    again = FP32 * (trace.trained - live(engine, trace.trained)) * share
    return Volume(size * passes, (size + FP32 * trace.frozen * share + again) * passes)


def update_bytes(trace: Trace, stage: int, world: int) -> float:
    """Bytes of device memory that clipping, AdamW and the teacher's average touch on one rank."""
    optimiser = (_ADAMW + _CLIP) * trace.trained / (world if stage in (1, 2, 3) else 1)
    return optimiser + _AVERAGE * trace.frozen / (world if stage == 3 else 1)


@dataclass(frozen=True)
class Rate:
    """The rate of one GPU: seconds of a sample's forward and backward in plain torch, and of an update.

    ``source``: one line that says where that is from. ``samples``: of the pass that was measured, None for a
    prediction.
    """

    per_sample: float
    update: float
    source: str
    samples: float | None = None

    @property
    def measured(self) -> bool:
        return self.samples is not None


@dataclass(frozen=True)
class Time:
    """Seconds of an update, by what they go into."""

    passes: float
    update: float
    exchange: float

    @property
    def total(self) -> float:
        return self.passes + self.update + self.exchange


def step_time(
    trace: Trace, stage: int, world: int, *, rate: Rate, sent: Volume, bandwidth: float, samples: float, passes: int
) -> Time:
    """Seconds of an update; ``bandwidth``: bytes a second, ``samples``: of one of a rank's ``passes``."""
    alone = update_bytes(trace, TORCH, 1)
    return Time(
        passes=passes * samples * rate.per_sample * OVERHEAD[stage],
        update=rate.update * update_bytes(trace, stage, world) / alone,
        exchange=sent.total / bandwidth,
    )
