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
from collections.abc import Container, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from typing import Any, TypeVar, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec.core.errors import ConfigError
from data2vec.core.files import read_file
from data2vec.core.settings import rules
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import Classification, Recognition
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.settings.registry import ModalitySettings
from data2vec.core.settings.schema import hints
from data2vec.core.settings.tree import differences, flatten, parse, plain, sections, settings_of, to_yaml, tree

__all__ = ["apply_overrides", "differences", "flatten", "from_yaml", "to_yaml", "tree", "validate"]

R = TypeVar("R", bound=Recipe)
KINDS: dict[str, type[Recipe]] = {kind.kind: kind for kind in (Experiment, Classification, Recognition)}
"""The recipes of each kind of training."""


def apply_overrides(recipe: R, overrides: Sequence[str]) -> R:
    """Change settings of a recipe by dotlists such as ``optim.lr=1e-4`` or ``optim.betas=[0.9,0.95]``.

    Text needs no quotes (``data.train=train-{0000..0999}.tar``), whole numbers may be written ``1e5``, and ``null``
    switches an optional setting off. Values are checked alone; :func:`validate` checks them together.

    Raises:
        ConfigError: every unknown key, ill-typed value and malformed or repeated override.
    """
    known = settings_of(recipe)
    problems: list[str] = []
    values: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"{override}: not of the form key=value")
        elif key not in known:
            problems.append(f"{override}: {_unknown(key, known)}")
        elif "${" in text:
            problems.append(f"{override}: ${{...}} is not supported; write the value out")
        else:
            values.append((key, _read(text, known[key].hint)))
    counts = Counter(override.partition("=")[0].strip() for override in overrides if "=" in override)
    problems += [f"{key}: given {count} times" for key, count in counts.items() if count > 1 and key in known]
    return _merged(recipe, values, problems)


@overload
def from_yaml(source: str | Path) -> Experiment: ...


@overload
def from_yaml(source: str | Path, kind: type[R]) -> R: ...


@overload
def from_yaml(source: str | Path, kind: None) -> Recipe: ...


def from_yaml(source: str | Path, kind: type[Recipe] | None = Experiment) -> Recipe:
    """Read a recipe from the text of a configuration, or from a file where ``source`` is a path.

    Args:
        source: see above.
        kind: the recipe that is expected; None: whichever the configuration says it is, pretraining if it says nothing.

    Settings that are left out keep their defaults. Keys of the top level that are no field of ``kind`` name
    modalities. Only plain values are accepted: nothing in the text is executed or looked up.

    Raises:
        ConfigError: the file cannot be read, is not plain YAML, or holds unknown or ill-typed settings.
    """
    name = str(source) if isinstance(source, Path) else "configuration"
    if isinstance(source, Path):
        try:
            source = read_file(source).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{name}: cannot be read ({error})"]) from error
    content = parse(source, name)
    if not isinstance(content, dict):
        raise ConfigError([f"{name}: expected settings (key: value), found {type(content).__name__}"])
    kind = _kind(content.pop("kind", Experiment.kind), name, kind)
    recipe, problems = _with_modalities(content, kind)
    known = settings_of(recipe)
    top = {key.partition(".")[0] for key in known}
    values: list[tuple[str, Any]] = []
    for key, value in _leaves(content, known):
        if key in known:
            values.append((key, value))
        elif key.partition(".")[0] in top:
            problems.append(f"{rules.show(key, value)}: {_unknown(key, known)}")
    return _merged(recipe, values, problems)


def validate(recipe: Recipe) -> None:
    """Check every setting alone and together with the others, and let every modality check its own.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    problems = _normalised(recipe)[1] or rules.problems(recipe)
    if problems:
        raise ConfigError(problems)


def _kind(said: Any, source: str, wanted: type[Recipe] | None) -> type[Recipe]:
    """Find the recipe of a kind of training that a configuration names.

    Raises:
        ConfigError: there is none, or it is not the wanted one.
    """
    found = KINDS.get(said) if isinstance(said, str) else None
    if found is None:
        raise ConfigError([f"{rules.show('kind', said)}: no such kind of training; choose {' or '.join(KINDS)}"])
    if wanted is not None and found is not wanted:
        raise ConfigError([f"{source}: the settings of {said}, not of {wanted.kind}; name another run"])
    return found


def _with_modalities(content: Mapping[str, Any], kind: type[R]) -> tuple[R, list[str]]:
    """Make a default recipe with the modalities that a configuration names, and what is wrong with those names."""
    fields = [name for name in kind.order if name not in ("modalities", "kind")]
    modalities: dict[str, Any] = {}
    problems: list[str] = []
    for key in content:
        if key in fields:
            continue
        if key == "modalities":
            problems.append("modalities: a modality's settings stand at the top level under its name")
            continue
        try:
            modalities[str(key)] = ModalitySettings.by_name(str(key))()
        except ConfigError as error:
            near = difflib.get_close_matches(str(key), fields, n=1)
            problems += [f"{key}: no such setting; did you mean {near[0]}?"] if near else error.problems
    return kind(modalities=modalities), problems


def _leaves(nested: Mapping[str, Any], known: Container[str], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Flatten like ``flatten``, but a dict that is the value of one setting stays whole."""
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from _leaves(value, known, f"{key}.")
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
        value = parse(text, "value")
    except ConfigError:
        return text
    return text if is_text and not isinstance(value, str) else value


def _merged(recipe: R, values: Iterable[tuple[str, Any]], problems: list[str]) -> R:
    """Put typed values in place; raises all ``problems`` together with those of the values."""
    changes, broken = _normalised(recipe)
    if broken:
        raise ConfigError([*problems, *broken])
    known = settings_of(recipe)
    for key, value in values:
        hint = known[key].hint
        try:
            changes[key] = _through_omegaconf(hint, known[key].value, _prepared(value, hint))
        except (OmegaConfBaseException, ValueError, OverflowError):
            problems.append(f"{rules.show(key, value)}: expected {_expected(hint)}")
    if problems:
        raise ConfigError(problems)
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *groups, last = key.split(".")
        reduce(lambda inside, group: inside.setdefault(group, {}), groups, nested)[last] = value
    return recipe.replace(**nested)


def _normalised(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The values that OmegaConf gives another form (1 for a number is 1.0), and those of another type than declared."""
    try:
        top = sections(recipe)
    except ConfigError as error:
        return {}, error.problems
    declared = hints(type(recipe))
    problems = [
        f"{key}: expected {declared[key].__name__}, found {type(value).__name__}"
        for key, value in top.items()
        if dataclasses.is_dataclass(declared.get(key)) and not isinstance(value, declared[key])
    ]
    problems += [
        f"modalities: {name!r} holds {type(value).__name__}, not a modality's settings"
        for name, value in recipe.modalities.items()
        if not isinstance(value, ModalitySettings)
    ]
    if problems:
        return {}, problems
    changes: dict[str, Any] = {}
    for key, one in settings_of(recipe).items():
        kind, optional = _split(one.hint)
        if _looks_up(one.value):
            problems.append(f"{rules.show(key, one.value)}: ${{...}} is not supported; write the value out")
        elif type(one.value) is not kind and not (one.value is None and optional):
            try:
                changes[key] = _through_omegaconf(one.hint, one.value)
                fits = plain(changes[key]) == plain(one.value)  # text must not merely look like a number
            except OmegaConfBaseException:
                fits = False
            if not fits:
                problems.append(f"{rules.show(key, one.value)}: expected {_expected(one.hint)}")
    return changes, problems


def _through_omegaconf(hint: Any, value: Any, *update: Any) -> Any:
    """A value, changed to another or with items of a dict changed, as OmegaConf keeps it in a field of type ``hint``.

    Raises:
        OmegaConfBaseException: it is not of that type.
    """
    config: DictConfig = OmegaConf.structured(_holder(hint)(value))
    for new in update:
        OmegaConf.update(config, "value", new)
    kept: Any = OmegaConf.to_object(config)
    return kept.value


@cache
def _holder(hint: Any) -> Any:
    return dataclasses.make_dataclass("Holder", [("value", hint)])


def _looks_up(value: Any) -> bool:
    """Tell whether OmegaConf would look something up for a value, or for an item of it."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return any(map(_looks_up, value))
    return isinstance(value, str) and "${" in value


def _split(hint: Any) -> tuple[Any, bool]:
    """The type without ``None``, and whether ``None`` was part of it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        optional = len(members) < len(typing.get_args(hint))
        return (members[0] if len(members) == 1 else typing.Union[tuple(members)]), optional  # noqa: UP007
    return hint, False


def _prepared(value: Any, hint: Any) -> Any:
    """Make the conversions that OmegaConf does not make; ``ValueError`` where none is possible."""
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


def _unknown(key: str, known: Iterable[str]) -> str:
    """Say of a key that does not exist which is the nearest that does."""
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"a group of settings; set one of them, such as {inside[0]}"
    last = key.rpartition(".")[2]
    near = [name for name in known if name.endswith(f".{key}")]
    near += difflib.get_close_matches(key, list(known), n=1)
    near += [name for name in known if name.rpartition(".")[2] == last]
    return f"no such setting; did you mean {near[0]}?" if near else "no such setting; --print-config lists them all"
