"""The memory of a rank under each engine, term by term, from the sizes of a model's tensors.

Everything that lasts is fp32: autocast makes what is bf16. The terms are what the engines of this repository and
DeepSpeed 0.19 allocate, with the settings that ``data2vec.core.engines.zero`` gives; a test compares them with what
two ranks hold. P: trained elements, F: the teacher's own, N: ranks, B: ``engine.bucket_size``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planning.trace import Trace

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import EngineConfig

FP32 = 4
TORCH = -1  # plain torch, among the stages
STAGES = (TORCH, 0, 1, 2, 3)
_ALIGNMENT = 2  # elements to which stages 1 and 2 align each rank's partition
_ALLREDUCE = 500_000_000  # elements that stage 0 flattens at once
_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    ``student``: trained parameters and buffers, predictors included. ``teacher``: what it does not share.
    ``optimiser``: AdamW's moments, and from stage 1 on the copy of this rank's part that it updates. ``gradients``:
    when backward ends. ``gathered``: parameters of stage 3 that stand whole. ``buckets``: where gradients are packed
    for their reduction, during backward. ``activations``: of one forward pass. ``at_step``: what a step adds once
    activations are gone. ``host``: what offloading moves to the host.
    """

    student: int
    teacher: int
    optimiser: int
    gradients: int
    gathered: int
    buckets: int
    activations: int
    at_step: int
    lasting_gradients: int = 0
    lasting_buckets: int = 0
    host: int = 0

    @property
    def lasting(self) -> int:
        """The bytes that stay allocated between two updates."""
        return self.student + self.teacher + self.optimiser + self.lasting_gradients + self.lasting_buckets

    @property
    def peak(self) -> int:
        """The most at once: backward at its beginning, or the step. Gradients count whole from the beginning."""
        always = self.student + self.teacher + self.optimiser + self.gradients
        return always + max(self.buckets + self.gathered + self.activations, self.lasting_buckets + self.at_step)


def memory(
    trace: Trace, stage: int, world: int, *, engine: EngineConfig, activations: float = 0.0, passes: int = 1
) -> Memory:
    """The account of one rank of ``world``; ``activations``: bytes of a forward pass, ``passes`` of them an update."""
    if stage in (TORCH, 0):
        return _replicated(trace, stage, world, engine.bucket_size, int(activations))
    if stage == 3:
        return _sharded(trace, world, engine, int(activations))
    return _partitioned(trace, stage, world, engine, int(activations), passes)


def _replicated(trace: Trace, stage: int, world: int, bucket: int, activations: int) -> Memory:
    """Count everything on every rank; gradients are copied together to be summed."""
    size = trace.trained
    packed = min(size, _ALLREDUCE if stage == 0 else bucket + _largest(trace))
    return Memory(
        student=FP32 * size + trace.student_buffers,
        teacher=FP32 * trace.frozen + trace.teacher_buffers,
        optimiser=FP32 * 2 * size,
        gradients=FP32 * size,
        gathered=0,
        buckets=0,
        activations=activations,
        at_step=FP32 * packed if world > 1 or stage == 0 else 0,
    )


def _partitioned(trace: Trace, stage: int, world: int, engine: EngineConfig, activations: int, passes: int) -> Memory:
    """Stages 1 and 2: parameters whole, each group's flat; a rank owns 1 / N of each for the optimiser."""
    bucket, size = engine.bucket_size, trace.trained
    flat = [_up(sum(group), _ALIGNMENT * world) for group in trace.groups]
    part = sum(length // world for length in flat)
    # Stage 2 keeps whole every parameter of which a part is this rank's.
    gradients = FP32 * (size if stage == 1 else max(_owned(trace.groups, world)))
    # The bucket has its size whatever is in it; the part of it that is reduced is copied once more.
    reducing = FP32 * (bucket + min(bucket, size))
    optimiser = FP32 * 3 * part
    at_step = FP32 * part + (reducing + FP32 * part if stage == 1 else 0)
    host = 0
    if engine.offload_optimizer:
        host, optimiser = optimiser + FP32 * 2 * part, FP32 * _largest(trace)
        gradients, at_step = (gradients if stage == 1 else 0), 0
    # A pass's gradients stand beside those of the passes before until they have been added.
    again = gradients if passes > 1 else 0
    return Memory(
        student=FP32 * sum(flat) + trace.student_buffers,
        teacher=FP32 * trace.frozen + trace.teacher_buffers,
        optimiser=optimiser,
        gradients=gradients,
        gathered=0,
        buckets=reducing + again if stage == 2 else FP32 * bucket,
        activations=activations,
        at_step=at_step,
        host=host,
    )


def _sharded(trace: Trace, world: int, engine: EngineConfig, activations: int) -> Memory:
    """Stage 3: 1 / N of every parameter, the teacher's included; what is in use is gathered."""
    trained = [size for group in trace.groups for size in group]
    part, teacher = (sum(_up(size, world) // world for size in sizes) for sizes in (trained, trace.teacher))
    whole = [size for size in (*trained, *trace.teacher) if size <= engine.persistence_threshold]
    bucket = min(engine.bucket_size, trace.trained)
    student, mine, optimiser, gradients = FP32 * part, FP32 * teacher, FP32 * 3 * part, FP32 * part
    host = 0
    if engine.offload_optimizer:
        host, optimiser = optimiser + FP32 * 2 * part, 0
        gradients = 0
    if engine.offload_parameters:
        host, student, mine = host + student + mine, 0, 0
    return Memory(
        student=student + trace.student_buffers + FP32 * sum(whole),
        teacher=mine + trace.teacher_buffers,
        optimiser=optimiser,
        gradients=gradients,
        gathered=FP32 * live(engine, trace.trained),
        buckets=FP32 * (engine.bucket_size + bucket),
        activations=activations,
        at_step=FP32 * part,
        lasting_gradients=gradients,
        lasting_buckets=FP32 * engine.bucket_size,
        host=host,
    )


def live(engine: EngineConfig, size: int) -> int:
    """Elements that stage 3 holds gathered: what backward uses again within so many elements is not given back.

    With DeepSpeed's defaults that is the whole student of every recipe.

    Raises:
        ConfigError: a limit that is no number.
    """
    zero = engine.deepspeed.get("zero_optimization", {})
    limit = size
    for key in ("max_live_parameters", "max_reuse_distance"):
        value = zero.get(f"stage3_{key}", zero.get(key, _LIVE)) if isinstance(zero, dict) else _LIVE
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError([f"engine.deepspeed: stage3_{key}={value!r} is no number of elements; give one, as 2e8"])
        limit = min(limit, int(value))
    return limit


def _owned(groups: Sequence[Sequence[int]], world: int) -> list[int]:
    """Elements of the parameters that each rank's parts touch, whole."""
    owned = [0] * world
    for group in groups:
        part = _up(sum(group), _ALIGNMENT * world) // world
        start = 0
        for size in group:
            for rank in range(start // part, (start + size - 1) // part + 1):
                owned[rank] += size
            start += size
    return owned


def _largest(trace: Trace) -> int:
    return max(size for group in trace.groups for size in group)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
