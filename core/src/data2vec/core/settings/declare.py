"""The declaration of a setting: its default, its range, and what becomes of it in runs that follow.

    lr: float = setting(5e-4, POSITIVE)
    keep: int = setting(2, at_least(1), Free.YES)

A setting that any value of its type suits, and that decides what is computed, is a plain default.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

T = TypeVar("T")

_DECLARED = "data2vec"  # the key of our own in a field's metadata


class Free(IntEnum):
    """Tell whether a run may be continued with another value than it was started with."""

    NO = 0  # it decides what is computed
    WITH_NEW_END = 1  # with train.new_end=true
    YES = 2


@dataclass(frozen=True)
class Rule:
    """A range of values, and what to say of a value outside; null is in every range."""

    allows: Callable[[Any], bool]
    text: str


def at_least(low: int) -> Rule:
    """Make the rule for numbers of ``low`` or more."""
    return Rule(lambda value: value >= low, f"must be {low} or more")


def matching(pattern: str, text: str) -> Rule:
    """Make the rule for texts that a pattern describes as a whole."""
    compiled = re.compile(pattern)
    return Rule(lambda value: compiled.fullmatch(value) is not None, text)


def each(rule: Rule) -> Rule:
    """Make the rule for lists whose items all keep to ``rule``."""
    return Rule(lambda values: all(map(rule.allows, values)), f"each {rule.text}")


POSITIVE = Rule(lambda value: value > 0, "must be greater than 0")
NOT_NEGATIVE = at_least(0)
RATE = Rule(lambda value: 0 <= value < 1, "must be from 0 to below 1")
SHARE = Rule(lambda value: 0 <= value <= 1, "must be from 0 to 1")
INSIDE = Rule(lambda value: 0 < value < 1, "must be above 0 and below 1")
PART = Rule(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
TEXT = Rule(lambda value: bool(value.strip()), "must not be empty")
FOLDER_NAME = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    "must be usable as a folder's name: letters, digits, '-', '_' and '.', at most 100, not beginning with a sign",
)
DEVICE = matching(r"auto|[a-z]+(:[0-9]+)?", "must be auto, cpu, cuda or cuda:N")
MEMBER = matching(
    r"[^\s/.A-Z]+(\.[^\s/.A-Z]+)*",
    "must be a member's name after the key and its dot, in lower case, such as input.jpg",
)


@dataclass(frozen=True)
class Declared:
    """The things that stand beside a field: its rule, its freedom, and whether fine-tuning chooses it anew.

    ``anew``: it says how a network is trained, or on which inputs, and not what the network is. ``inherited``: it is
    chosen anew only where the user does so on the command line.
    """

    rule: Rule | None = None
    free: Free = Free.NO
    anew: bool = False
    inherited: bool = False


def setting(
    default: T, rule: Rule | None = None, free: Free = Free.NO, *, anew: bool = False, inherited: bool = False
) -> T:
    """Declare a setting: a field of a dataclass with its default; see :class:`Declared`."""
    field: Any = dataclasses.field(default=default, metadata={_DECLARED: Declared(rule, free, anew, inherited)})
    return field  # type: ignore[no-any-return]  # as dataclasses.field does, for the type of the attribute


def section(kind: Callable[[], T], free: Free = Free.NO, *, anew: bool = False) -> T:
    """Declare a group of settings with their defaults; what stands beside it is said of all of them."""
    field: Any = dataclasses.field(default_factory=kind, metadata={_DECLARED: Declared(None, free, anew)})
    return field  # type: ignore[no-any-return]


def declared(field: dataclasses.Field[Any]) -> Declared:
    """Find what stands beside a field of a dataclass."""
    found: Declared = field.metadata.get(_DECLARED, Declared())
    return found
