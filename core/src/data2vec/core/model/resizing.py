"""Weights of a model for inputs of another size: what depends on the size is made to fit, by the part it belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Resizable(ABC):
    """A module with state whose shape follows from the size of inputs, such as a table of positions."""

    @abstractmethod
    def resized(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """A value of another shape, made to fit this module, and a few words on what was done.

        Args:
            name: of the value in this module's state.
            value: the same part of a module for inputs of another size.

        Returns:
            None where it is not of such a module.
        """


def resize(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """A module's state with what is :class:`Resizable` made to fit, and a line for each; the rest is as it was.

    Args:
        module: whose shapes are wanted.
        state: by names that begin with ``prefix``; others are left alone.
        prefix: of the module in ``state``, with a dot at its end.
    """
    fitted, lines = dict(state), []
    parts = [(path, part) for path, part in module.named_modules() if isinstance(part, Resizable)]
    for key, own in module.state_dict(prefix=prefix).items():
        if key not in state or state[key].shape == own.shape:
            continue
        for path, part in parts:
            begins = f"{prefix}{path}."
            made = part.resized(key.removeprefix(begins), state[key]) if key.startswith(begins) else None
            if made is not None:
                fitted[key], line = made
                lines.append(line)
                break
    return fitted, lines
