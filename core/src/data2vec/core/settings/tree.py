"""Settings as plain trees and as YAML, and nothing but data in either.

YAML here is the safe part of the core schema of YAML 1.2: ``on`` is a word, ``1e5`` is a number. Tags, anchors and
``${...}`` are refused before anything is built, so reading a configuration never executes or looks up anything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import yaml

from data2vec.core.errors import ConfigError
from data2vec.core.settings.declare import Free
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.schema import Setting, settings_in, settings_of_field

_MAX_DEPTH = 16
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the library is untyped
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what either YAML 1.1 or our loader would read as something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", _NULL, ["~", "n", "N", ""]),
        ("bool", _BOOL, list("tTfF")),
        ("int", _INT, list("-+0123456789")),
        ("float", _FLOAT, list("-+.0123456789")),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def plain(value: Any) -> Any:
    """Dataclasses as dicts, enums as their values, tuples as lists; every other value as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def sections(recipe: Recipe) -> dict[str, Any]:
    """The top level of a configuration: the fields as they are printed, with the modalities in place of ``modalities``.

    Raises:
        ConfigError: a modality has the name of a setting, or a name that no key can have.
    """
    problems = modality_name_problems(recipe)
    if problems:
        raise ConfigError(problems)
    top: dict[str, Any] = {}
    for name in recipe.order:
        value = getattr(recipe, name)
        top.update(value if name == "modalities" else {name: value})
    return top


def settings_of(recipe: Recipe) -> dict[str, Setting]:
    """List every setting by dotted key, in the order in which they are printed.

    Raises:
        ConfigError: as :func:`sections`.
    """
    found: dict[str, Setting] = {}
    fields = {field.name: field for field in dataclasses.fields(recipe)}
    for name, value in sections(recipe).items():
        if name == "kind":
            continue  # it is said, and not set
        if name in fields:
            found.update(settings_of_field(recipe, fields[name]))
        elif dataclasses.is_dataclass(value):
            found.update(settings_in(value, f"{name}."))
    return found


def freedom(recipe: Recipe, key: str) -> Free:
    """Tell whether a run may be continued with another value of a setting, or of an item of one."""
    settings = settings_of(recipe)
    while key and key not in settings:
        key = key.rpartition(".")[0]
    return settings[key].free if key else Free.NO


def modality_name_problems(recipe: Recipe) -> list[str]:
    """List what is wrong with the names under which the modalities stand, one line each."""
    fields = {"kind", *(field.name for field in dataclasses.fields(recipe))}
    problems = []
    for name in recipe.modalities:
        if name in fields:
            problems.append(f"modalities: {name!r} is the name of a setting; a modality needs another name")
        elif not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            problems.append(f"modalities: {name!r} is no name of a modality (lower-case letters, digits and _)")
    return problems


def tree(recipe: Recipe) -> dict[str, Any]:
    """Every setting as nested dicts of plain values; a modality's settings stand at the top under its name."""
    return {key: plain(value) for key, value in sections(recipe).items()}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted key, in order; an empty dict is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in ``a``, value in ``b``) of every setting that differs; None where one lacks the setting."""
    old, new = flatten(tree(a)), flatten(tree(b))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def dump(value: Any) -> str:
    """A plain value as YAML: block style for dicts, one line for lists and scalars."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("...\n")


def to_yaml(recipe: Recipe) -> str:
    """The complete configuration, every setting in a stable order; ``overrides.from_yaml`` reads it back."""
    return dump(tree(recipe))


def parse(text: str, source: str) -> Any:
    """Plain values from YAML text. ``source`` names the text in messages.

    Raises:
        ConfigError: not YAML, a key given twice, or a tag, an anchor or a ``${...}`` anywhere in it.
    """
    try:
        problems = _refused(text, source)
        if not problems:
            return yaml.load(text, Loader=_Loader)  # a SafeLoader, and no tag is left in the text
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{source}: not valid YAML: {_one_line(error)}"]) from error
    raise ConfigError(problems)


def _refused(text: str, source: str) -> list[str]:
    """Reads the events of a YAML text, which builds nothing."""
    problems: list[str] = []
    depth = documents = 0
    keys: list[set[str] | None] = []  # per open collection: keys seen (None for a list)
    key_is_next: list[bool] = []
    for event in yaml.parse(text, Loader=_Loader):
        where = f"{source}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            keys.pop()
            key_is_next.pop()
            continue
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            return [*problems, f"{where}: a second document; a configuration is one document"]
        if not isinstance(event, yaml.NodeEvent):
            continue
        if event.anchor is not None:
            return [*problems, f"{where}: anchors and aliases (& and *) are not allowed; write the value out"]
        if event.tag is not None:
            problems.append(f"{where}: the tag {event.tag!r} is not allowed; a configuration holds plain values only")
        if isinstance(event, yaml.ScalarEvent):
            if "${" in event.value:
                problems.append(f"{where}: {event.value!r}: ${{...}} is not supported; write the value out")
            if keys and keys[-1] is not None and key_is_next[-1]:
                if event.value in keys[-1]:
                    problems.append(f"{where}: the key {event.value!r} is given twice")
                keys[-1].add(event.value)
        elif keys and keys[-1] is not None and key_is_next[-1]:
            return [*problems, f"{where}: a key must be a single word"]
        if key_is_next:
            key_is_next[-1] = not key_is_next[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                return [*problems, f"{where}: more than {_MAX_DEPTH} levels deep"]
            keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            key_is_next.append(True)
    return problems


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    line = f" (line {mark.line + 1})" if mark is not None else ""
    return " ".join(str(problem).split()) + line
