"""Tensors in safetensors files: whole, or in pieces that several ranks wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data2vec.core.errors import CheckpointError

_PIECE = "@"  # between a tensor's name and where in it a piece begins
_SHAPES = "shapes"  # in the header of a file with pieces: JSON of the shapes of the whole tensors


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: the elements ``start`` and following of the flattened whole of ``shape``."""

    values: Tensor
    start: int
    shape: tuple[int, ...]


def stored_form(values: Mapping[str, Tensor | Piece]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a file under the names that they have there, and what its header says of pieces."""
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in values.items():
        if isinstance(value, Piece):
            stored[f"{name}{_PIECE}{value.start}"] = value.values.detach().cpu().contiguous()
            shapes[name] = list(value.shape)
        else:
            stored[name] = value.detach().cpu().contiguous()
    return stored, ({_SHAPES: json.dumps(shapes)} if shapes else None)


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name; what is stored in pieces is put together when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the files' headers.

        Raises:
            CheckpointError: a file is no safetensors file, or a tensor is incomplete.
        """
        self._files: list[Any] = []
        self._paths: list[Path] = []
        self._whole: dict[str, int] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # (start, elements, file)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                self._read_header(path)
            except (
                OSError,
                SafetensorError,
                ValueError,
                TypeError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); choose an earlier checkpoint") from None
        for name, pieces in self._pieces.items():
            place = 0
            for start, elements, number in sorted(pieces):
                if start != place:
                    raise CheckpointError(f"{self._paths[number]}: {name} has no elements {place} to {start}")
                place += elements
            if name not in self._shapes or place != math.prod(self._shapes[name]) or name in self._whole:
                raise CheckpointError(f"{self._paths[pieces[0][2]]}: the pieces of {name} do not make the whole")

    def _read_header(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        number = len(self._files)
        self._files.append(file)
        self._paths.append(path)
        for name, shape in json.loads((file.metadata() or {}).get(_SHAPES, "{}")).items():
            self._shapes[str(name)] = tuple(int(size) for size in shape)
            if min(self._shapes[name], default=0) < 0:
                raise ValueError(f"{name} has the shape {shape}")
        for key in file.keys():  # noqa: SIM118  # no mapping, only its method
            shape = tuple(file.get_slice(key).get_shape())
            name, mark, start = key.rpartition(_PIECE)
            if mark:
                self._pieces.setdefault(name, []).append((int(start), math.prod(shape), number))
            elif key in self._whole:
                raise ValueError(f"it holds {key}, and so does {self._paths[self._whole[key]].name}")
            else:
                self._whole[key] = number
                self._shapes[key] = shape

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from self._pieces

    def __len__(self) -> int:
        return len(self._whole) + len(self._pieces)

    def __contains__(self, name: object) -> bool:
        return name in self._whole or name in self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's, without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        number = self._whole.get(name, 0)
        try:
            if name in self._whole:
                whole: Tensor = self._files[number].get_tensor(name)
                return whole
            parts = []
            for start, _, number in sorted(self._pieces[name]):
                parts.append(self._files[number].get_tensor(f"{name}{_PIECE}{start}"))
            return torch.cat(parts).view(self._shapes[name])
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self._paths[number]}: cannot be read ({error})") from None
