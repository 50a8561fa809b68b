"""Which values settings may have, alone and together. ``overrides.validate`` checks their types first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from data2vec.core.modality import Modality
from data2vec.core.settings.fields import Experiment, PredictorKind, Schedule, StudentSees
from data2vec.core.settings.tree import dump, flatten, modality_name_problems, plain

TASKS = ("knn", "linear", "rank", "positions")
"""The evaluations that ``evaluation.tasks`` may name."""


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value >= low), f"must be {low} or more"


_positive = (lambda value: value > 0), "must be greater than 0"
_not_negative = (lambda value: value >= 0), "must be 0 or more"
_rate = (lambda value: 0 <= value < 1), "must be from 0 to below 1"
_share = (lambda value: 0 <= value <= 1), "must be from 0 to 1"
_text = (lambda value: bool(value.strip())), "must not be empty"

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICE = re.compile(r"auto|[a-z]+(:[0-9]+)?")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda value: _FOLDER_NAME.fullmatch(value) is not None,
        "must be usable as a folder's name: letters, digits, '-', '_' and '.', at most 100, not beginning with a sign",
    ),
    "transformer.depth": _at_least(1),
    "transformer.width": _at_least(1),
    "transformer.heads": _at_least(1),
    "transformer.mlp_ratio": _positive,
    "transformer.norm_eps": _positive,
    "transformer.layer_scale": _positive,
    "transformer.drop_path": _rate,
    "transformer.layer_drop": _rate,
    "transformer.dropout": _rate,
    "transformer.attention_dropout": _rate,
    "transformer.activation_dropout": _rate,
    "teacher.decay_start": _share,
    "teacher.decay_end": _share,
    "teacher.decay_updates": _at_least(0),
    "targets.top_k": _at_least(1),
    "loss.beta": _not_negative,
    "loss.scale": _positive,
    "loss.cls_weight": _not_negative,
    "optim.lr": _positive,
    "optim.betas": ((lambda value: all(0 <= beta < 1 for beta in value)), "each must be from 0 to below 1"),
    "optim.eps": _positive,
    "optim.weight_decay": _not_negative,
    "optim.clip": _positive,
    "optim.warmup": _at_least(0),
    "optim.hold": _at_least(0),
    "optim.start_lr_ratio": _share,
    "optim.final_lr_ratio": _share,
    "data.train": _text,
    "data.validation": _text,
    "data.workers": _at_least(0),
    "data.shuffle_shards": _at_least(1),
    "data.max_broken": _share,
    "data.cache": _text,
    "data.cache_gb": _positive,
    "data.fetch_minutes": _positive,
    "data.fetch_gb": _positive,
    "data.member": (
        lambda value: re.fullmatch(r"[^\s/.A-Z]+(\.[^\s/.A-Z]+)*", value) is not None,
        "must be a member's name after the key and its dot, in lower case, such as input.jpg",
    ),
    "train.updates": _at_least(1),
    "train.batch": _at_least(1),
    "train.micro_batch": _at_least(1),
    "train.batch_length": _at_least(1),
    "train.micro_length": _at_least(1),
    "train.seed": ((lambda value: 0 <= value < 2**63), "must be from 0 to below 2^63"),
    "train.device": (lambda value: _DEVICE.fullmatch(value) is not None, "must be auto, cpu, cuda or cuda:N"),
    "train.folder": _text,
    "train.resume": _text,
    "train.max_minutes": _positive,
    "train.log_every": _at_least(1),
    "train.checkpoint_every": _at_least(1),
    "train.checkpoint_minutes": _positive,
    "train.keep": _at_least(1),
    "train.min_target_spread": _not_negative,
    "train.min_prediction_spread": _not_negative,
    "train.collapse_after": _at_least(1),
    "train.keep_best": _text,
    "engine.zero_stage": ((lambda value: value in (0, 1, 2, 3)), "must be 0, 1, 2 or 3"),
    "engine.bucket_size": _at_least(1),
    "engine.persistence_threshold": _at_least(0),
    "engine.join_minutes": _positive,
    "evaluation.neighbours": _at_least(1),
    "evaluation.few_labels": _at_least(1),
    "evaluation.max_samples": _at_least(1),
    "evaluation.max_positions": _at_least(1),
    "evaluation.batch": _at_least(1),
    "evaluation.every": _at_least(1),
}


def show(key: str, value: Any) -> str:
    """``key=value`` as a user would write it."""
    return f"{key}={value if isinstance(value, (str, dict)) else dump(plain(value)).strip()}"


def problems(experiment: Experiment) -> list[str]:
    """Every value that cannot be used, one line each: ``key=value: what is wrong; what to choose``.

    The settings must have the right types already.
    """
    found = modality_name_problems(experiment)
    found += _single_values(experiment)
    wrong = {line.partition("=")[0] for line in found}
    for keys, check in _TOGETHER:
        if not wrong.intersection(keys):  # a rule about several settings needs each to be sound
            found += check(experiment)
    found += _evaluation(experiment)
    for name, modality in experiment.modalities.items():
        if not isinstance(modality, Modality):
            found.append(f"modalities: {name!r} holds {type(modality).__name__}, not a modality's settings")
        elif modality.name != name:
            found.append(f"modalities: {name!r} holds the settings of {modality.name!r}")
        else:
            found += _student(experiment, name, modality)
            if not wrong.intersection(_SHAPE):
                found += modality.problems(experiment.transformer)
    if not experiment.modalities:
        found.append("modalities: none; an experiment needs at least one")
    return found


def _student(experiment: Experiment, name: str, modality: Modality) -> list[str]:
    """What a modality must have for the way the student sees and the objective."""
    found = []
    kind = modality.predictor_config.kind
    if experiment.student_sees is StudentSees.VISIBLE and kind not in (PredictorKind.CONV1D, PredictorKind.CONV2D):
        found.append(
            f"{name}.predictor.kind={kind}: a student that sees visible positions only has nothing at the hidden ones; "
            "choose conv1d or conv2d, or student_sees=all"
        )
    weight = experiment.loss.cls_weight
    if weight > 0 and not modality.has_cls_token:
        found.append(f"loss.cls_weight={weight}: {name} has no CLS token; give it one, or set loss.cls_weight=0")
    return found


def _single_values(experiment: Experiment) -> list[str]:
    found = []
    values = {key: plain(getattr(experiment, key)) for key in vars(experiment) if key != "modalities"}
    for key, value in flatten(values).items():
        rule = _RULES.get(key)
        if value is not None and rule is not None and not rule[0](value):
            found.append(f"{show(key, value)}: {rule[1]}")
    modalities = {name: plain(value) for name, value in experiment.modalities.items()}
    for key, value in flatten({**values, **modalities}).items():
        if not _finite(value):
            found.append(f"{show(key, value)}: must be a finite number")
    return found


def _finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


_SHAPE = ("transformer.depth", "transformer.width", "transformer.heads")


def _member(experiment: Experiment) -> list[str]:
    member = experiment.data.member
    known = [name for one in experiment.modalities.values() if isinstance(one, Modality) for name in one.extensions]
    if member is None or member.rpartition(".")[2] in known:
        return []
    return [f"data.member={member}: ends in none of {', '.join(known)}, which hold the input"]


def _width(experiment: Experiment) -> list[str]:
    width, heads = experiment.transformer.width, experiment.transformer.heads
    if width % heads == 0:
        return []
    return [f"transformer.width={width}: transformer.heads={heads} does not divide it; choose a multiple of {heads}"]


def _top_k(experiment: Experiment) -> list[str]:
    top_k, depth = experiment.targets.top_k, experiment.transformer.depth
    if top_k <= depth:
        return []
    return [f"targets.top_k={top_k}: larger than transformer.depth={depth}; choose 1 to {depth}"]


def _decay(experiment: Experiment) -> list[str]:
    start, end = experiment.teacher.decay_start, experiment.teacher.decay_end
    if start <= end:
        return []
    return [f"teacher.decay_start={start}: larger than teacher.decay_end={end}; the decay may only rise"]


def _schedule(experiment: Experiment) -> list[str]:
    optim, updates = experiment.optim, experiment.train.updates
    if optim.hold and optim.schedule is not Schedule.TRI_STAGE:
        return [f"optim.hold={optim.hold}: only optim.schedule=tri_stage holds the rate; set optim.hold=0"]
    if optim.warmup + optim.hold > updates:
        return [
            f"optim.warmup={optim.warmup} and optim.hold={optim.hold}: together longer than train.updates={updates}; "
            "shorten them or train longer"
        ]
    return []


def _micro_batch(experiment: Experiment) -> list[str]:
    batch, micro = experiment.train.batch, experiment.train.micro_batch
    if micro is None or batch % micro == 0:
        return []
    return [f"train.micro_batch={micro}: does not divide train.batch={batch}; choose a divisor"]


def _lengths(experiment: Experiment) -> list[str]:
    train = experiment.train
    if train.batch_length is not None and train.micro_length is None:
        return [f"train.batch_length={train.batch_length}: needs train.micro_length; set it, or use train.batch"]
    if train.micro_length is not None and train.micro_batch is not None:
        return [
            f"train.micro_batch={train.micro_batch}: train.micro_length={train.micro_length} decides how many samples "
            "go into a forward pass; set one of them to null"
        ]
    if train.micro_length is not None and (train.batch_length or train.micro_length) < train.micro_length:
        return [
            f"train.micro_length={train.micro_length}: larger than train.batch_length={train.batch_length}; "
            "choose at most that"
        ]
    return []


_OURS = "the training loop decides it; "
# What engine.deepspeed may not change, by dotted key, and why.
_NOT_DEEPSPEEDS = {
    "train_batch_size": _OURS + "set train.batch",
    "train_micro_batch_size_per_gpu": _OURS + "set train.micro_batch",
    "gradient_accumulation_steps": _OURS + "set train.micro_batch",
    "managed_gradient_accumulation": _OURS + "set train.micro_batch",
    "gradient_clipping": "set optim.clip",
    "optimizer": "set optim.*",
    "scheduler": "set optim.schedule",
    "fp16": "the teacher averages fp32 parameters; train.precision=bf16 computes in bf16 all the same",
    "bf16": "the teacher averages fp32 parameters; train.precision=bf16 computes in bf16 all the same",
    "amp": "set train.precision",
    "torch_autocast": "it rounds the gradients that ranks exchange; set train.precision=bf16",
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.zero_hpz_partition_size": "the forward pass would read copies without the average",
    "zero_optimization.zero_quantized_weights": "rounded weights would hide the average from the forward pass",
    "zero_optimization.zero_quantized_nontrainable_weights": "it rounds the teacher, which moves by less",
    "zero_optimization.mics_shard_size": "its groups hold copies of the teacher that its average does not reach",
    "zero_optimization.offload_param": "set engine.offload_parameters",
    "zero_optimization.offload_optimizer": "set engine.offload_optimizer",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear function for the whole process",
    "compile": "set train.compile",
}


def _engine(experiment: Experiment) -> list[str]:
    engine = experiment.engine
    found = [
        f"engine.deepspeed: {key} cannot be set there; {reason}"
        for key, reason in _NOT_DEEPSPEEDS.items()
        if any(given == key or given.startswith(f"{key}.") for given in flatten(plain(engine.deepspeed)))
    ]
    if engine.offload_parameters and engine.zero_stage != 3:
        found.append(
            f"engine.offload_parameters=true: engine.zero_stage={engine.zero_stage} keeps them whole; choose 3"
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        found.append("engine.offload_optimizer=true: needs engine.zero_stage=1, 2 or 3")
    if experiment.train.keep_best is not None and experiment.evaluation.every is None:
        found.append(f"train.keep_best={experiment.train.keep_best}: needs evaluation.every, which measures it")
    return found


_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[Experiment], list[str]]], ...] = (
    (("transformer.width", "transformer.heads"), _width),
    (("targets.top_k", "transformer.depth"), _top_k),
    (("teacher.decay_start", "teacher.decay_end"), _decay),
    (("optim.warmup", "optim.hold", "train.updates"), _schedule),
    (("train.batch", "train.micro_batch"), _micro_batch),
    (("train.batch_length", "train.micro_length"), _lengths),
    (("engine.zero_stage",), _engine),
    (("data.member",), _member),
)


def _evaluation(experiment: Experiment) -> list[str]:
    found = []
    tasks, layers, depth = experiment.evaluation.tasks, experiment.evaluation.layers, experiment.transformer.depth
    for task in dict.fromkeys(tasks):
        if task not in TASKS:
            found.append(f"evaluation.tasks: {task!r} is no task; choose from {', '.join(TASKS)}")
        elif tasks.count(task) > 1:
            found.append(f"evaluation.tasks: {task!r} is given {tasks.count(task)} times")
    is_number = layers.isascii() and layers.isdecimal()
    if layers not in ("top_k", "last", "all", "extractor") and not (
        is_number and 1 <= int(layers[:9]) <= max(depth, 1)
    ):
        found.append(f"evaluation.layers={layers}: choose top_k, last, all, extractor or a layer from 1 to {depth}")
    return found
