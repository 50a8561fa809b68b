"""A run continues with the settings that it was started with, but for those that may change."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError
from data2vec.core.run.resume import find_checkpoint, recorded_configuration
from data2vec.core.settings.declare import Free
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import Classification
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.settings.schema import hints
from data2vec.core.settings.tree import settings_of
from data2vec.core.testing import load_module

made = load_module("toy_settings", Path(__file__).with_name("toy_settings.py"))
BASE, Toy = made.BASE, made.Toy
TUNED = Classification(name="tuned", modalities={"toy_settings": Toy()})


def saved(folder: Path, recipe: Recipe, update: int = 3) -> Path:
    """A run's folder with a checkpoint of some settings."""
    state = {"configuration": recorded_configuration(recipe, to_yaml(recipe))}
    checkpoint.save(folder / "checkpoints", update, checkpoint.Checkpoint({}, state), keep=1)
    return folder


def changed(recipe: Recipe, key: str) -> Recipe:
    """The recipe with another value of one setting."""

    def inside(section: Any, names: list[str]) -> Any:
        name, *rest = names
        if rest:
            return replace(section, **{name: inside(getattr(section, name), rest)})
        return replace(section, **{name: other(getattr(section, name), hints(type(section))[name])})

    name, *rest = key.split(".")
    if name not in recipe.modalities:
        whole: Recipe = inside(recipe, [name, *rest])
        return whole
    return replace(recipe, modalities={**recipe.modalities, name: inside(recipe.modalities[name], rest)})


def other(value: Any, hint: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, Enum):
        return next(one for one in type(value) if one is not value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "key": 1}
    if isinstance(value, tuple):
        if value:
            return (*value, value[0])
        item = hint.__args__[0]
        return (item(1),) if item in (str, int, float) else (next(iter(item)),)
    assert value is None
    return "x" if "str" in str(hint) else 7


SETTINGS = [pytest.param(BASE, key, id=key) for key in settings_of(BASE)] + [
    pytest.param(TUNED, key, id=f"fine-tuning {key}") for key in settings_of(TUNED) if key not in settings_of(BASE)
]


@pytest.mark.parametrize(("recipe", "key"), SETTINGS)
def test_every_setting_is_kept_or_free(recipe: Recipe, key: str, tmp_path: Path) -> None:
    now = changed(recipe, key)
    now = replace(now, train=replace(now.train, resume="auto"))
    free = settings_of(recipe)[key].free
    saved(tmp_path, recipe)
    if free is Free.YES:
        assert find_checkpoint(now, tmp_path) is not None
        return
    with pytest.raises(CheckpointError, match=f"another configuration: {key}: .* there, .* now. ") as caught:
        find_checkpoint(now, tmp_path)
    assert ("train.new_end=true continues it" in str(caught.value)) is (free is Free.WITH_NEW_END)


@pytest.mark.parametrize(("key", "allowed"), [("train.updates", True), ("optim.hold", True), ("optim.lr", False)])
def test_another_end_is_possible_where_it_is_asked_for(key: str, allowed: bool, tmp_path: Path) -> None:
    now = changed(BASE, key)
    now = replace(now, train=replace(now.train, new_end=True))
    saved(tmp_path, BASE)
    if allowed:
        found = find_checkpoint(now, tmp_path)
        assert found is not None
        assert "train.new_end: the run ends at update" in found.notice
    else:
        with pytest.raises(CheckpointError, match=f"another configuration: {key}: "):
            find_checkpoint(now, tmp_path)


def test_a_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, BASE)
    with pytest.raises(
        CheckpointError, match=r"update-000000003 is of pretraining, not of classification; choose another"
    ):
        find_checkpoint(TUNED, tmp_path)


def test_a_checkpoint_that_records_no_task_is_of_pretraining(tmp_path: Path) -> None:
    state = {"configuration": {"yaml": to_yaml(BASE)}}
    checkpoint.save(tmp_path / "checkpoints", 3, checkpoint.Checkpoint({}, state), keep=1)
    assert find_checkpoint(BASE, tmp_path) is not None
    with pytest.raises(CheckpointError, match="is of pretraining, not of classification"):
        find_checkpoint(TUNED, tmp_path)
