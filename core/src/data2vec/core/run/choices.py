"""Variants of a recipe that single words of a command choose: ``task=sst2``, ``labels=10h``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import Recipe

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Choices(Generic[R]):
    """A recipe in several variants.

    ``options``: the values of each key, the first of them where the command names none. ``make``: makes the recipe of
    one value for each key.
    """

    options: Mapping[str, tuple[str, ...]]
    make: Callable[..., R]

    def default(self) -> R:
        """The recipe where nothing is chosen."""
        return self.make(**{key: values[0] for key, values in self.options.items()})

    def chosen(self, words: Sequence[str]) -> tuple[R, list[str]]:
        """The recipe that ``KEY=VALUE`` words choose, and the words that choose nothing.

        Raises:
            ConfigError: a value that a key does not have.
        """
        values = {key: known[0] for key, known in self.options.items()}
        rest, problems = [], []
        for word in words:
            key, _, value = word.partition("=")
            if key not in self.options:
                rest.append(word)
            elif value not in self.options[key]:
                problems.append(f"{word}: no such choice; there is {', '.join(self.options[key])}")
            else:
                values[key] = value
        if problems:
            raise ConfigError(problems)
        return self.make(**values), rest
