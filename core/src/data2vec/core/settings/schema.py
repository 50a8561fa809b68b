"""The settings inside a dataclass: a walk over its fields and those of the dataclasses in it."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from data2vec.core.errors import ConfigError
from data2vec.core.settings.declare import Free, Rule, declared


@dataclass(frozen=True)
class Setting:
    """One setting as it is declared, and its value."""

    value: Any
    hint: Any
    rule: Rule | None
    free: Free


def settings_in(section: Any, prefix: str = "", free: Free = Free.NO) -> Iterator[tuple[str, Setting]]:
    """Yield every setting of a dataclass by dotted key, in order; ``free`` holds for all of them."""
    for field in dataclasses.fields(section):
        yield from settings_of_field(section, field, prefix, free)


def settings_of_field(
    section: Any, field: dataclasses.Field[Any], prefix: str = "", free: Free = Free.NO
) -> Iterator[tuple[str, Setting]]:
    """Yield the setting that a field is, or all of the dataclass that it holds."""
    value, said = getattr(section, field.name), declared(field)
    free = max(free, said.free)
    if dataclasses.is_dataclass(value):
        yield from settings_in(value, f"{prefix}{field.name}.", free)
    else:
        yield f"{prefix}{field.name}", Setting(value, hints(type(section))[field.name], said.rule, free)


def hints(kind: type[Any]) -> Mapping[str, Any]:
    """The declared types of a dataclass's fields."""
    return _hints(cast(Hashable, kind))


@functools.cache
def _hints(kind: Hashable) -> Mapping[str, Any]:
    return MappingProxyType(typing.get_type_hints(kind))


def replaced(value: Any, change: Any, path: str = "") -> Any:
    """Put a change in place of a value; a dict changes only the named fields of a dataclass.

    Raises:
        ConfigError: a name that is no field.
    """
    if not (dataclasses.is_dataclass(value) and isinstance(change, dict)):
        return change
    names = {f.name for f in dataclasses.fields(value)}
    unknown = [key for key in change if key not in names]
    if unknown:
        raise ConfigError([f"{path + '.' if path else ''}{key}: no such setting" for key in unknown])
    nested = {key: replaced(getattr(value, key), new, f"{path}.{key}" if path else key) for key, new in change.items()}
    return dataclasses.replace(value, **nested)  # type: ignore[type-var]
