"""Overrides and configuration files: OmegaConf checks types here and nowhere else; the rest of the code sees values.

Every problem of a command line or a file is collected and reported in one :class:`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec.core.errors import ConfigError
from data2vec.core.files import read_file
from data2vec.core.modality import Modality
from data2vec.core.settings import rules
from data2vec.core.settings.fields import Experiment
from data2vec.core.settings.tree import differences, flatten, load, plain, sections, to_yaml, tree

__all__ = ["apply_overrides", "differences", "flatten", "from_yaml", "to_yaml", "tree", "validate"]


def apply_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with settings changed by dotlists such as ``optim.lr=1e-4`` or ``optim.betas=[0.9,0.95]``.

    Text needs no quotes (``data.train=train-{0000..0999}.tar``), whole numbers may be written ``1e5``, and ``null``
    switches an optional setting off. Values are checked alone; :func:`validate` checks them together.

    Raises:
        ConfigError: every unknown key, ill-typed value and malformed or repeated override.
    """
    hints = _leaf_hints(sections(experiment))
    problems: list[str] = []
    values: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"{override}: not of the form key=value")
        elif key not in hints:
            problems.append(f"{override}: {_unknown(key, hints)}")
        elif "${" in text:
            problems.append(f"{override}: ${{...}} is not supported; write the value out")
        else:
            values.append((key, _read(text, hints[key])))
    counts = Counter(override.partition("=")[0].strip() for override in overrides if "=" in override)
    problems += [f"{key}: given {count} times" for key, count in counts.items() if count > 1 and key in hints]
    return _merged(experiment, values, problems)


def from_yaml(source: str | Path) -> Experiment:
    """An experiment from the text of a configuration, or from a file where ``source`` is a path.

    Settings that are left out keep their defaults. Keys of the top level that are no field of :class:`Experiment`
    name modalities. Only plain values are accepted: nothing in the text is executed or looked up.

    Raises:
        ConfigError: the file cannot be read, is not plain YAML, or holds unknown or ill-typed settings.
    """
    name = str(source) if isinstance(source, Path) else "configuration"
    if isinstance(source, Path):
        try:
            source = read_file(source).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{name}: cannot be read ({error})"]) from error
    content = load(source, name)
    if not isinstance(content, dict):
        raise ConfigError([f"{name}: expected settings (key: value), found {type(content).__name__}"])
    experiment, problems = _with_modalities(content)
    hints = _leaf_hints(sections(experiment))
    top = {key.partition(".")[0] for key in hints}
    values: list[tuple[str, Any]] = []
    for key, value in _leaves(content, hints):
        if key in hints:
            values.append((key, value))
        elif key.partition(".")[0] in top:
            problems.append(f"{rules.show(key, value)}: {_unknown(key, hints)}")
    return _merged(experiment, values, problems)


def validate(experiment: Experiment) -> None:
    """Check every setting alone and together with the others, and let every modality check its own.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    problems = _type_problems(experiment) or rules.problems(experiment)
    if problems:
        raise ConfigError(problems)


def _with_modalities(content: Mapping[str, Any]) -> tuple[Experiment, list[str]]:
    """A default experiment with the modalities that a configuration names, and what is wrong with those names."""
    fields = [field.name for field in dataclasses.fields(Experiment) if field.name != "modalities"]
    modalities: dict[str, Any] = {}
    problems: list[str] = []
    for key in content:
        if key in fields:
            continue
        if key == "modalities":
            problems.append("modalities: a modality's settings stand at the top level under its name")
            continue
        try:
            modalities[str(key)] = Modality.by_name(str(key))()
        except ConfigError as error:
            near = difflib.get_close_matches(str(key), fields, n=1)
            problems += [f"{key}: no such setting; did you mean {near[0]}?"] if near else error.problems
    return Experiment(modalities=modalities), problems


def _leaf_hints(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The declared type of every setting by dotted key."""
    hints: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        declared = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            item, key = getattr(value, field.name), f"{prefix}{field.name}"
            if dataclasses.is_dataclass(item):
                walk(item, f"{key}.")
            else:
                hints[key] = declared[field.name]

    declared = typing.get_type_hints(Experiment)
    for key, value in nested.items():
        if dataclasses.is_dataclass(value):
            walk(value, f"{key}.")
        else:
            hints[key] = declared[key]
    return hints


def _leaves(nested: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Like ``flatten``, but a dict that is the value of one setting stays whole."""
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in hints:
            yield from _leaves(value, hints, f"{key}.")
        else:
            yield key, value


def _read(text: str, hint: Any) -> Any:
    """The value that a user wrote on the command line for a setting of type ``hint``."""
    kind, optional = _split(hint)
    is_text = kind is str or (isinstance(kind, type) and issubclass(kind, Enum))
    if is_text and text[:1] not in ("'", '"'):  # braces, colons, '#' and words such as 'on' stay as they are
        return None if optional and text in ("null", "~") else text
    if not text.strip():
        return text
    try:
        value = load(text, "value")
    except ConfigError:
        return text
    return text if is_text and not isinstance(value, str) else value


def _merged(experiment: Experiment, values: Iterable[tuple[str, Any]], problems: list[str]) -> Experiment:
    """The experiment with typed values in place; raises all ``problems`` together with those of the values."""
    top = sections(experiment)
    hints = _leaf_hints(top)
    broken = _type_problems(experiment)
    if broken:
        raise ConfigError([*problems, *broken])
    config = _structured(top)
    for key, value in values:
        try:
            OmegaConf.update(config, key, _prepared(value, hints[key]))
        except (OmegaConfBaseException, ValueError, OverflowError):
            problems.append(f"{rules.show(key, value)}: expected {_expected(hints[key])}")
    if problems:
        raise ConfigError(problems)
    merged = vars(OmegaConf.to_object(config))
    modalities = {name: merged.pop(name) for name in experiment.modalities}
    return dataclasses.replace(experiment, modalities=modalities, **merged)


def _structured(top: Mapping[str, Any]) -> DictConfig:
    """A typed OmegaConf configuration of the top level, writable although the dataclasses are frozen."""
    declared = typing.get_type_hints(Experiment)
    fields = [(key, type(value) if dataclasses.is_dataclass(value) else declared[key]) for key, value in top.items()]
    config: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Settings", fields)(**top))
    OmegaConf.set_readonly(config, False)
    for group in {key[:dot] for key in _leaf_hints(top) for dot, letter in enumerate(key) if letter == "."}:
        OmegaConf.set_readonly(OmegaConf.select(config, group), False)
    return config


def _type_problems(experiment: Experiment) -> list[str]:
    """Settings of an experiment built in Python whose values are not of the declared type."""
    try:
        top = sections(experiment)
    except ConfigError as error:
        return error.problems
    declared = typing.get_type_hints(Experiment)
    problems = [
        f"{key}: expected {declared[key].__name__}, found {type(value).__name__}"
        for key, value in top.items()
        if dataclasses.is_dataclass(declared.get(key)) and not isinstance(value, declared[key])
    ]
    problems += [
        f"modalities: {name!r} holds {type(value).__name__}, not a modality's settings"
        for name, value in experiment.modalities.items()
        if not isinstance(value, Modality)
    ]
    if problems:
        return problems
    for key, hint in _leaf_hints(top).items():
        value: Any = top
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if _looks_up(value):
            problems.append(f"{rules.show(key, value)}: ${{...}} is not supported; write the value out")
        elif not _fits(value, hint):
            problems.append(f"{rules.show(key, value)}: expected {_expected(hint)}")
    return problems


def _looks_up(value: Any) -> bool:
    """Whether OmegaConf would look something up for a value, or for an item of it."""
    if isinstance(value, (list, tuple)):
        return any(map(_looks_up, value))
    return isinstance(value, str) and "${" in value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value survives OmegaConf's check unchanged; text must not merely look like a number."""
    kind, optional = _split(hint)
    if type(value) is kind or (value is None and optional):
        return True
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])
    try:
        kept: Any = OmegaConf.to_object(OmegaConf.structured(holder(value)))
    except OmegaConfBaseException:
        return False
    return bool(plain(kept.value) == plain(value))


def _split(hint: Any) -> tuple[Any, bool]:
    """The type without ``None``, and whether ``None`` was part of it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        optional = len(members) < len(typing.get_args(hint))
        return (members[0] if len(members) == 1 else typing.Union[tuple(members)]), optional  # noqa: UP007
    return hint, False


def _prepared(value: Any, hint: Any) -> Any:
    """What OmegaConf is to check, after conversions that it does not make; ``ValueError`` where none is possible."""
    kind, _ = _split(hint)
    if value == "???" and isinstance(value, str):
        raise ValueError  # OmegaConf's mark of a missing value
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        items = typing.get_args(kind)
        each = [items[0]] * len(value) if items[1:] == (...,) else items
        if len(each) != len(value):
            raise ValueError
        return [_prepared(item, item_hint) for item, item_hint in zip(value, each, strict=True)]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, (str, int, float)) and not math.isfinite(float(value)):
        raise ValueError
    if kind is bool and not isinstance(value, bool) and value not in ("true", "false", "on", "off", "yes", "no", None):
        raise ValueError
    if kind is str and isinstance(value, (bool, float)):
        raise ValueError  # the text that was written is lost: 1e5 and 100000.0 are the same number
    if isinstance(kind, type) and issubclass(kind, Enum) and value is not None:
        return kind(value)
    return value


def _expected(hint: Any) -> str:
    kind, optional = _split(hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(kind, type) and issubclass(kind, Enum):
        text = "one of " + ", ".join(str(member.value) for member in kind)
    elif typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[1:] == (...,):
            text = f"a list, each {_expected(items[0])}"
        else:
            text = f"a list of {len(items)}: {', '.join(map(_expected, items))}"
    else:
        text = names.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{text} or null" if optional else text


def _unknown(key: str, hints: Mapping[str, Any]) -> str:
    """What to say about a key that does not exist: the nearest that does."""
    inside = [name for name in hints if name.startswith(f"{key}.")]
    if inside:
        return f"a group of settings; set one of them, such as {inside[0]}"
    last = key.rpartition(".")[2]
    near = [name for name in hints if name.endswith(f".{key}")]
    near += difflib.get_close_matches(key, hints, n=1)
    near += [name for name in hints if name.rpartition(".")[2] == last]
    return f"no such setting; did you mean {near[0]}?" if near else "no such setting; --print-config lists them all"
