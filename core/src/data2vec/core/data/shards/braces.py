"""Brace lists as bash writes them (``train-{0000..0999}.tar``), and nothing else of a shell.

A few characters can stand for more names than fit in memory, so the number of names is bounded while they are made.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence

MOST_NAMES = 1_000_000
_MOST_CHARACTERS = 1 << 28  # of all names together
_MOST_DEPTH = 32
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_NUMBERS = re.compile(r"(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.-?([0-9]{1,18}))?")
_LETTER_RANGE = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?([0-9]{1,18}))?")


def expand(pattern: str) -> list[str]:
    r"""The names that a brace list stands for, in bash's order: ``{08..10}``, ``{a..e..2}``, ``{x,y{1,2}}``.

    Braces around neither a range nor a list stay. ``\`` takes the meaning from the character after it.

    Raises:
        ValueError: braces that do not match, more than ``MOST_NAMES`` names, or too many levels.
    """
    return [re.sub(r"\\(.)", r"\1", name) for name in _names(pattern, 0)]


def _names(pattern: str, depth: int) -> list[str]:
    if depth > _MOST_DEPTH:
        raise ValueError(f"braces are more than {_MOST_DEPTH} levels deep")
    names = [""]
    for part, in_braces in _parts(pattern):
        options = _options(part, depth) if in_braces else [part]
        longest = max(map(len, names)) + max(map(len, options))
        if len(names) * len(options) > MOST_NAMES or len(names) * len(options) * longest > _MOST_CHARACTERS:
            raise ValueError(f"it stands for too many names; at most {MOST_NAMES:,} can be used")
        names = [name + option for name in names for option in options]
    return names


def _parts(pattern: str) -> Iterator[tuple[str, bool]]:
    """Text outside of braces, and what is inside of the outermost ones."""
    start = depth = 0
    for place, character in _unescaped(pattern):
        if character == "{":
            if depth == 0:
                yield pattern[start:place], False
                start = place + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                yield pattern[start:place], True
                start = place + 1
    if depth:
        raise ValueError("its braces do not match")
    yield pattern[start:], False


def _options(text: str, depth: int) -> list[str]:
    """List what one pair of braces stands for."""
    if match := _NUMBERS.fullmatch(text):
        first, last, step = match.groups()
        padded = any(number.lstrip("-").startswith("0") and number not in ("0", "-0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in _range(int(first), int(last), int(step or 1))]
    if match := _LETTER_RANGE.fullmatch(text):
        first, last, step = match.groups()
        return [_LETTERS[n] for n in _range(_LETTERS.index(first), _LETTERS.index(last), int(step or 1))]
    commas = list(_commas(text))
    if not commas:
        return [f"{{{name}}}" for name in _names(text, depth + 1)]
    bounds = zip([0, *(comma + 1 for comma in commas)], [*commas, len(text)], strict=True)
    options: list[str] = []
    for start, end in bounds:
        options += _names(text[start:end], depth + 1)
        if len(options) > MOST_NAMES:
            raise ValueError(f"it stands for too many names; at most {MOST_NAMES:,} can be used")
    return options


def _range(first: int, last: int, step: int) -> Sequence[int]:
    """Both ends included, up or down."""
    step = step or 1
    if abs(last - first) // step >= MOST_NAMES:
        raise ValueError(f"it stands for too many names; at most {MOST_NAMES:,} can be used")
    return range(first, last + 1, step) if first < last else range(first, last - 1, -step)


def _commas(text: str) -> Iterator[int]:
    depth = 0
    for place, character in _unescaped(text):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            yield place


def _unescaped(text: str) -> Iterator[tuple[int, str]]:
    place = 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        else:
            yield place, text[place]
        place += 1
