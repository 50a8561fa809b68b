"""The values that settings may have, alone and together. ``overrides.validate`` checks their types first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from data2vec.core.settings.fields import Recipe, Schedule
from data2vec.core.settings.finetuning import FineTuning
from data2vec.core.settings.finetuning_rules import FINETUNING
from data2vec.core.settings.pretraining import Experiment, PredictorConfig, PredictorKind, StudentSees
from data2vec.core.settings.registry import ModalitySettings
from data2vec.core.settings.schema import Setting, settings_in
from data2vec.core.settings.tree import dump, flatten, plain, settings_of, tree

R = TypeVar("R", bound=Recipe)

TASKS = ("knn", "linear", "rank", "positions")
"""The evaluations that ``evaluation.tasks`` may name."""


def show(key: str, value: Any) -> str:
    """``key=value`` as a user would write it."""
    return f"{key}={value if isinstance(value, (str, dict)) else dump(plain(value)).strip()}"


def problems(recipe: Recipe) -> list[str]:
    """List every value that cannot be used, one line each: ``key=value: what is wrong; what to choose``.

    The settings must have the right types already, and the modalities names that a key can have.
    """
    own = {key: one for key, one in settings_of(recipe).items() if key.partition(".")[0] not in recipe.modalities}
    found = _outside(own)
    found += [
        f"{show(key, value)}: must be a finite number"
        for key, value in flatten(tree(recipe)).items()
        if not _finite(value)
    ]
    wrong = {line.partition("=")[0] for line in found}
    found += _together(recipe, wrong, _SHARED)
    if isinstance(recipe, Experiment):
        found += _together(recipe, wrong, _PRETRAINING)
        found += _evaluation(recipe)
    if isinstance(recipe, FineTuning):
        found += _together(recipe, wrong, FINETUNING)
    for name, modality in recipe.modalities.items():
        if modality.name != name:
            found.append(f"modalities: {name!r} holds the settings of {modality.name!r}")
            continue
        if isinstance(recipe, Experiment):
            found += _student(recipe, name, modality)
        if not wrong.intersection(_SHAPE):
            found += modality.problems(recipe.transformer)
    if not recipe.modalities:
        found.append("modalities: none; an experiment needs at least one")
    return found


def checked(section: Any, prefix: str, *together: tuple[tuple[str, ...], Callable[[], list[str]]]) -> list[str]:
    """List what is wrong with the settings of a modality, one line each.

    Args:
        section: a dataclass; its settings, and those of dataclasses in it, are checked by the rules beside them.
        prefix: of their keys (``vision.``).
        together: checks of several settings, each with the beginnings of the keys that must be sound for it.
    """
    found = _outside(dict(settings_in(section, prefix)))
    wrong = [line.partition("=")[0].removeprefix(prefix) for line in found]
    for keys, check in together:
        if not any(key.startswith(keys) for key in wrong):
            found += check()
    return found


def predictor_problems(name: str, predictor: PredictorConfig, width: int, *, dimensions: int, why: str) -> list[str]:
    """List what is wrong with a modality's predictor.

    Args:
        name: of the modality.
        predictor: its settings.
        width: of the Transformer.
        dimensions: of the grid of positions.
        why: says so ("images have two dimensions").
    """
    fits, other = PredictorKind.CONV1D, PredictorKind.CONV2D
    if dimensions == 2:
        fits, other = other, fits
    if predictor.kind is other:
        return [f"{name}.predictor.kind={other}: {why}; choose {fits}, linear or mlp"]
    if predictor.kind is not fits:
        return []
    widths = {"transformer.width": width, f"{name}.predictor.width": predictor.width or width}
    return [
        f"{name}.predictor.groups={predictor.groups}: does not divide {key}={value}; choose a common divisor"
        for key, value in widths.items()
        if value % predictor.groups and (predictor.width is not None or key == "transformer.width")
    ]


def _outside(settings: Mapping[str, Setting]) -> list[str]:
    return [
        f"{show(key, one.value)}: {one.rule.text}"
        for key, one in settings.items()
        if one.rule is not None and one.value is not None and not one.rule.allows(one.value)
    ]


def _together(
    recipe: R, wrong: AbstractSet[str], checks: Sequence[tuple[tuple[str, ...], Callable[[R], list[str]]]]
) -> list[str]:
    """Check settings against each other where each of them is sound."""
    return [line for keys, check in checks if wrong.isdisjoint(keys) for line in check(recipe)]


def _student(experiment: Experiment, name: str, modality: ModalitySettings) -> list[str]:
    """Check what a modality must have for the way the student sees and for the objective."""
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


def _finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


_SHAPE = ("transformer.depth", "transformer.width", "transformer.heads")


def _member(recipe: Recipe) -> list[str]:
    member = recipe.data.member
    known = [name for one in recipe.modalities.values() for name in one.extensions]
    if member is None or member.rpartition(".")[2] in known:
        return []
    return [f"data.member={member}: ends in none of {', '.join(known)}, which hold the input"]


def _width(recipe: Recipe) -> list[str]:
    width, heads = recipe.transformer.width, recipe.transformer.heads
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


def _schedule(recipe: Recipe) -> list[str]:
    optim, updates = recipe.optim, recipe.train.updates
    if optim.hold and optim.schedule is not Schedule.TRI_STAGE:
        return [f"optim.hold={optim.hold}: only optim.schedule=tri_stage holds the rate; set optim.hold=0"]
    if optim.warmup + optim.hold > updates:
        return [
            f"optim.warmup={optim.warmup} and optim.hold={optim.hold}: together longer than train.updates={updates}; "
            "shorten them or train longer"
        ]
    return []


def _micro_batch(recipe: Recipe) -> list[str]:
    batch, micro = recipe.train.batch, recipe.train.micro_batch
    if micro is None or batch % micro == 0:
        return []
    return [f"train.micro_batch={micro}: does not divide train.batch={batch}; choose a divisor"]


def _lengths(recipe: Recipe) -> list[str]:
    train = recipe.train
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


def _engine(recipe: Recipe) -> list[str]:
    engine = recipe.engine
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
    return found


def _keep_best(experiment: Experiment) -> list[str]:
    key = experiment.train.keep_best
    if key is None or experiment.evaluation.every is not None:
        return []
    return [f"train.keep_best={key}: needs evaluation.every, which measures it"]


# Rules about several settings, with the keys that must be sound in themselves.
_SHARED: tuple[tuple[tuple[str, ...], Callable[[Recipe], list[str]]], ...] = (
    (("transformer.width", "transformer.heads"), _width),
    (("optim.warmup", "optim.hold", "train.updates"), _schedule),
    (("train.batch", "train.micro_batch"), _micro_batch),
    (("train.batch_length", "train.micro_length"), _lengths),
    (("engine.zero_stage",), _engine),
    (("data.member",), _member),
)
_PRETRAINING: tuple[tuple[tuple[str, ...], Callable[[Experiment], list[str]]], ...] = (
    (("targets.top_k", "transformer.depth"), _top_k),
    (("teacher.decay_start", "teacher.decay_end"), _decay),
    (("train.keep_best",), _keep_best),
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
