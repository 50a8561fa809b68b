"""Settings that cannot work, those that a run may change when it goes on, and the recipes that share them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.errors import ConfigError
from data2vec.core.settings.declare import Free
from data2vec.core.settings.fields import OptimConfig, Recipe
from data2vec.core.settings.finetuning import Classification
from data2vec.core.settings.network import with_network_of
from data2vec.core.settings.overrides import apply_overrides, from_yaml, to_yaml, validate
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.settings.tree import freedom, settings_of
from data2vec.core.testing import load_module

made = load_module("toy_settings", Path(__file__).with_name("toy_settings.py"))
BASE, Toy, override = made.BASE, made.Toy, made.override
FREE = {
    "name", "data.train", "data.validation", "data.workers", "data.max_broken", "data.cache", "data.cache_gb",
    "data.fetch_minutes", "data.fetch_gb", "train.micro_batch", "train.device", "train.compile",
    "train.activation_checkpointing", "train.folder", "train.resume", "train.new_end", "train.init_from",
    "train.max_minutes", "train.log_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.keep",
    "train.keep_best", "train.min_target_spread", "train.min_prediction_spread", "train.collapse_after",
}  # fmt: skip


def test_what_a_run_may_change_when_it_goes_on() -> None:
    """What decides what is computed must not be changed; what only says how and where may."""
    settings = settings_of(BASE)
    free = {key for key, one in settings.items() if one.free is Free.YES}
    assert free - {key for key in free if key.startswith(("engine.", "evaluation."))} == FREE
    assert all(settings[key].free is Free.YES for key in settings if key.startswith(("engine.", "evaluation.")))
    with_new_end = {key for key, one in settings.items() if one.free is Free.WITH_NEW_END}
    assert with_new_end == {"train.updates", "optim.hold"}
    assert freedom(BASE, "engine.deepspeed.communication_data_type") is Free.YES  # an item of a setting
    assert freedom(BASE, "toy_settings.mask.ratio") is Free.NO


def test_fine_tuning_is_a_recipe() -> None:
    """The functions that read, change, check and write an experiment do so with any recipe."""
    base = Classification(name="tuned", modalities={"toy_settings": Toy()})
    changed = apply_overrides(base, ["layer_decay=0.65", "start=runs/base", "optim.lr=1e-4", "toy_settings.flip=true"])
    assert (changed.layer_decay, changed.start, changed.optim.lr) == (0.65, "runs/base", 1e-4)
    validate(changed)
    assert from_yaml(to_yaml(changed), Classification) == changed
    with pytest.raises(ConfigError, match=r"layer_decay=1\.5: must be above 0 and at most 1"):
        validate(apply_overrides(base, ["layer_decay=1.5"]))
    with pytest.raises(ConfigError, match=r"teacher\.decay_start=0\.9: no such setting"):
        apply_overrides(base, ["teacher.decay_start=0.9"])
    with pytest.raises(ConfigError, match=r"transformer\.width=100: transformer\.heads=12 does not divide it"):
        validate(apply_overrides(base, ["transformer.width=100"]))


@pytest.mark.parametrize("kind", [Experiment, Classification])
def test_every_field_is_printed(kind: type[Recipe]) -> None:
    said = {"kind"} if kind is Classification else set()  # a configuration that does not say is pretraining's
    assert sorted(kind.order) == sorted(said | {field.name for field in dataclasses.fields(kind)})


def test_a_configuration_says_its_kind() -> None:
    tuned = Classification(name="tuned", modalities={"toy_settings": Toy()})
    text = to_yaml(tuned)
    assert text.startswith("kind: classification\n")
    assert from_yaml(text, None) == tuned
    assert from_yaml(to_yaml(BASE), None) == BASE
    with pytest.raises(ConfigError, match="the settings of classification, not of pretraining"):
        from_yaml(text)
    for wrong in ("guessing", "[1]", "null"):
        with pytest.raises(ConfigError, match="no such kind of training; choose pretraining or classification"):
            from_yaml(text.replace("kind: classification", f"kind: {wrong}"), None)
    with pytest.raises(ConfigError, match="kind=pretraining: no such setting"):
        apply_overrides(tuned, ["kind=pretraining"])


def test_the_network_of_another_recipe() -> None:
    """What the network is comes from there; how it is trained stays."""
    start = BASE.replace(transformer={"depth": 3, "width": 48, "heads": 4, "drop_path": 0.3, "norm_order": "post"})
    tuned = Classification(name="tuned", modalities={"toy_settings": Toy()}, layer_decay=0.65)
    tuned = tuned.replace(transformer={"depth": 6, "drop_path": 0.1, "dropout": 0.2})
    found = with_network_of(tuned, start)
    anew = {"drop_path": 0.1, "layer_drop": 0.0, "dropout": 0.2, "attention_dropout": 0.0, "activation_dropout": 0.0}
    assert found.transformer == dataclasses.replace(start.transformer, **anew)
    assert found.modalities == start.modalities
    assert dataclasses.replace(found, transformer=tuned.transformer, modalities=tuned.modalities) == tuned
    with pytest.raises(ConfigError, match="speech: base has no such modality, only toy_settings"):
        with_network_of(tuned.replace(modalities={"speech": Toy()}), start.replace(name="base"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["targets.top_k=8", "transformer.depth=4"], "targets.top_k=8: larger than transformer.depth=4; choose 1 to 4"),
        (["transformer.width=100"], "transformer.width=100: transformer.heads=12 does not divide it"),
        (["train.micro_batch=1000"], "train.micro_batch=1000: does not divide train.batch=2048"),
        (["train.micro_batch=0"], "train.micro_batch=0: must be 1 or more"),
        (["train.batch=-1"], "train.batch=-1: must be 1 or more"),
        (
            ["optim.schedule=tri_stage", "optim.warmup=300000", "optim.hold=300000"],
            "optim.warmup=300000 and optim.hold",
        ),
        (["optim.hold=5"], "optim.hold=5: only optim.schedule=tri_stage"),
        (["teacher.decay_end=0.9"], "teacher.decay_start=0.999: larger than teacher.decay_end=0.9"),
        (["teacher.decay_end=1.5"], "teacher.decay_end=1.5: must be from 0 to 1"),
        (["transformer.drop_path=1"], "transformer.drop_path=1.0: must be from 0 to below 1"),
        (["optim.betas=[0.9,1]"], "optim.betas=[0.9, 1.0]: each must be from 0 to below 1"),
        (["optim.lr=0"], "optim.lr=0.0: must be greater than 0"),
        (["evaluation.tasks=[knn,guess]"], "evaluation.tasks: 'guess' is no task; choose from knn, linear, rank"),
        (["evaluation.tasks=[knn,knn]"], "evaluation.tasks: 'knn' is given 2 times"),
        (["evaluation.layers=13"], "evaluation.layers=13: choose top_k, last, all, extractor or a layer from 1 to 12"),
        (["train.keep=0"], "train.keep=0: must be 1 or more"),
        (["train.device=gpu 0"], "train.device=gpu 0: must be auto"),
        (["name=../../etc"], "name=../../etc: must be usable as a folder's name"),
        (["name=."], "name=.: must be usable as a folder's name"),
        (["name="], "name=: must be usable as a folder's name"),
        (["data.train="], "data.train=: must not be empty"),
        (["toy_settings.maximum=1000"], "toy_settings.maximum=1000: larger than transformer.width"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_problem(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override(*overrides))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_validation_reports_everything_together() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override("targets.top_k=20", "train.batch=0", "toy_settings.maximum=1000", "name=/"))
    assert {problem.partition("=")[0] for problem in caught.value.problems} == {
        "targets.top_k",
        "train.batch",
        "toy_settings.maximum",
        "name",
    }


def test_modalities_are_checked() -> None:
    for modalities, message in (
        ({}, "needs at least one"),
        ({"optim": Toy()}, "'optim' is the name of a setting"),
        ({"other": Toy()}, "'other' holds the settings of 'toy_settings'"),
        ({"toy_settings": 3}, "holds int, not a modality's settings"),
        ({"no name": Toy()}, "is no name of a modality"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(Experiment(modalities=modalities))


def test_a_modality_with_the_name_of_a_setting_is_not_written() -> None:
    with pytest.raises(ConfigError, match="'optim' is the name of a setting"):
        to_yaml(Experiment(modalities={"optim": Toy()}))


def test_settings_built_in_python_are_checked_too() -> None:
    wrong: Any = [
        ({"optim": OptimConfig(lr="1e-4")}, "optim.lr=1e-4: expected a number"),  # type: ignore[arg-type]
        ({"optim": OptimConfig(lr=float("nan"))}, "optim.lr="),
        ({"transformer": {"depth": 3}}, "transformer: expected TransformerConfig, found dict"),
        ({"modalities": {"toy_settings": Toy(mask={})}}, "toy_settings.mask={}: expected ToyMask"),  # type: ignore[arg-type]
        ({"modalities": {"toy_settings": Toy(layers=((1, float("inf")),))}}, "toy_settings.layers="),
        ({"name": "${oc.env:HOME}"}, r"name=\$\{oc.env:HOME\}: \$\{...\} is not supported"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            validate(dataclasses.replace(BASE, **changes))
