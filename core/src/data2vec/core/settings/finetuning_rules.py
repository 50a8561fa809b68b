"""The values that settings of fine-tuning may have together."""

from __future__ import annotations

from collections.abc import Callable

from data2vec.core.settings.finetuning import Classification, FineTuning, Freeze, LabelKind, Recognition


def _keep_best(recipe: FineTuning) -> list[str]:
    key, scores = recipe.train.keep_best, recipe.scores
    found = []
    if key is not None and key not in scores:
        found.append(f"train.keep_best={key}: no score of this task; choose of {', '.join(scores)}")
    if key is not None and recipe.evaluation.every is None:
        found.append(f"train.keep_best={key}: needs evaluation.every, which measures it")
    if recipe.evaluation.patience is not None and key is None:
        found.append(f"evaluation.patience={recipe.evaluation.patience}: needs train.keep_best, which it watches")
    return found


def _beginning(recipe: FineTuning) -> list[str]:
    found = []
    if recipe.train.init_from is not None:
        found.append(f"train.init_from={recipe.train.init_from}: is for pretraining; name the run with start=")
    if len(recipe.modalities) != 1:
        names = ", ".join(recipe.modalities) or "none"
        found.append(f"modalities: fine-tuning has one modality, not {names}; leave the others out")
    return found


def _frozen(recipe: FineTuning) -> list[str]:
    layers, freeze, updates = recipe.freeze_layers, recipe.freeze, recipe.freeze_updates
    found = []
    if (freeze is Freeze.LAYERS) != (layers > 0):
        remedy = "choose how many" if not layers else "set freeze=layers, or freeze_layers=0"
        found.append(f"freeze_layers={layers}: with freeze={freeze}; {remedy}")
    if freeze is Freeze.ALL and updates:
        found.append(f"freeze_updates={updates}: freeze=all leaves nothing that could learn later; set one of them")
    if recipe.adapters.rank and freeze is not Freeze.NONE:
        found.append(f"adapters.rank={recipe.adapters.rank}: adapters leave the encoder as it is; set freeze=none")
    if updates and updates >= recipe.train.updates:
        found.append(
            f"freeze_updates={updates}: the encoder would never learn in train.updates={recipe.train.updates}; "
            "choose fewer, or freeze=all"
        )
    return found


def _labels(recipe: FineTuning) -> list[str]:
    if not isinstance(recipe, Classification):
        return []
    labels, found = recipe.labels, []
    one_class = labels.kind is LabelKind.CLASS
    if labels.smoothing and not one_class:
        found.append(f"labels.smoothing={labels.smoothing}: is for labels.kind=class; set it to 0")
    if recipe.mix.is_on and labels.kind is LabelKind.NUMBER:
        found.append(f"mix.mixup={recipe.mix.mixup}: numbers are not mixed; set mix.mixup=0 and mix.cutmix=0")
    if labels.kind is LabelKind.NUMBER:
        for key, value in (("classes", list(labels.classes)), ("weights", list(labels.weights))):
            if value:
                found.append(f"labels.{key}={value}: numbers have no classes; leave it out")
    if labels.balanced and (labels.weights or labels.kind is LabelKind.NUMBER):
        remedy = "leave labels.weights out" if labels.weights else "numbers have no classes"
        found.append(f"labels.balanced=true: {remedy}")
    if labels.classes and labels.weights and len(labels.classes) != len(labels.weights):
        found.append(
            f"labels.weights={list(labels.weights)}: {len(labels.weights)} weights for {len(labels.classes)} classes; "
            "give one for each"
        )
    repeated = {name for name in labels.classes if labels.classes.count(name) > 1}
    if repeated:
        found.append(f"labels.classes: {', '.join(sorted(repeated))} given more than once")
    return found


def _symbols(recipe: FineTuning) -> list[str]:
    if not isinstance(recipe, Recognition) or not recipe.letters.symbols:
        return []
    symbols, found = recipe.letters.symbols, []
    repeated = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
    if repeated:
        found.append(f"letters.symbols: {', '.join(repeated)} given more than once")
    if "|" not in symbols[1:]:
        found.append("letters.symbols: has no | after the blank, which stands between words; add it")
    return found


FINETUNING: tuple[tuple[tuple[str, ...], Callable[[FineTuning], list[str]]], ...] = (
    (("train.keep_best", "evaluation.every", "evaluation.patience"), _keep_best),
    (("train.init_from",), _beginning),
    (("freeze_layers", "freeze_updates", "train.updates"), _frozen),
    (("labels.smoothing", "labels.weights"), _labels),
    ((), _symbols),
)
"""Checks of several settings, each with the keys that must be sound in themselves."""
