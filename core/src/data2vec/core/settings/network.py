"""The network of one recipe under the training of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

from data2vec.core.errors import ConfigError
from data2vec.core.settings.declare import declared
from data2vec.core.settings.fields import Recipe

R = TypeVar("R", bound=Recipe)


def with_network_of(recipe: R, start: Recipe, named: Collection[str] = ()) -> R:
    """Take ``transformer`` and the modalities' settings from another recipe, but for those that are chosen anew.

    Args:
        recipe: says how the network is trained (dropout, augmentation, size of its inputs).
        start: says what the network is.
        named: keys that the user has set.

    Raises:
        ConfigError: ``start`` has no such modality.
    """
    missing = [name for name in recipe.modalities if name not in start.modalities]
    if missing:
        known = ", ".join(start.modalities)
        raise ConfigError([f"{name}: {start.name} has no such modality, only {known}" for name in missing])
    modalities = {
        name: _merged(own, start.modalities[name], f"{name}.", named) for name, own in recipe.modalities.items()
    }
    transformer = _merged(recipe.transformer, start.transformer, "transformer.", named)
    return recipe.replace(transformer=transformer, modalities=modalities)


def _merged(own: Any, other: Any, prefix: str, named: Collection[str]) -> Any:
    """A section with what it declares to be chosen anew, and everything else of another one."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(other):
        mine, theirs = getattr(own, field.name), getattr(other, field.name)
        said, key = declared(field), f"{prefix}{field.name}"
        if said.anew and (key in named or not said.inherited):
            changes[field.name] = mine
        elif dataclasses.is_dataclass(theirs):
            changes[field.name] = _merged(mine, theirs, f"{key}.", named)
    return dataclasses.replace(other, **changes)
