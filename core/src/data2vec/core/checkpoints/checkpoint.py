"""Checkpoints: complete or absent, whatever happens while one is written, and the same for every engine and world size.

A checkpoint is a folder ``update-000001000`` of safetensors files and a ``state.json``. It is written under a temporary
name, flushed to disk and renamed; then the file ``latest`` is replaced to name it. Nothing in it is pickled.

Tensors stand under the names of parameters. With several ranks each writes its own files
(``model-00002-of-00008.safetensors``): whole tensors, or the pieces of sharded ones. Reading puts a tensor together
when it is asked for, so any engine on any number of ranks can continue from it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data2vec.core.checkpoints.pieces import Piece, SavedTensors, stored_form
from data2vec.core.errors import CheckpointError
from data2vec.core.files import flush, write_atomically

FORMAT = 2
_NAME = re.compile(r"update-(\d{9,})(-\d+)?")  # the second number where a run went back and reached an update again
_STATE = "state.json"
_PART = "part-{:05d}.json"
_BEYOND = 1 << 62  # more than any run counts


@dataclass(frozen=True)
class Checkpoint:
    """``tensors``: file name without ending to its tensors by name. ``state``: everything that is no tensor."""

    tensors: Mapping[str, Mapping[str, Tensor | Piece]]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Loaded:
    """An open checkpoint: ``tensors`` and ``state`` as in :class:`Checkpoint`, tensors whole and read when used."""

    tensors: Mapping[str, SavedTensors]
    state: Mapping[str, Any]


def save(folder: Path, update: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write the checkpoint of a single rank, point ``latest`` to it, and remove all but the newest ``keep``.

    Args:
        folder: of all checkpoints of the run; made if absent.
        update: applied updates.
        checkpoint: what to save.
        keep: how many stay.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    writing = unfinished(folder, str(os.getpid()))
    try:
        write_part(writing, checkpoint.tensors, {}, rank=0, world=1)
        return commit(writing, update, checkpoint.state, world=1, keep=keep)
    except CheckpointError as error:
        raise failure(folder, update, error, writing) from None


def unfinished(folder: Path, token: str) -> Path:
    """Name the folder in which the ranks write a checkpoint until it is complete.

    ``token`` is the same on all ranks, and new each time.
    """
    return folder / f".writing-{token}"


def write_part(
    writing: Path,
    tensors: Mapping[str, Mapping[str, Tensor | Piece]],
    local: Mapping[str, Any],
    *,
    rank: int,
    world: int,
) -> None:
    """Write what one rank holds, and flush it.

    Args:
        writing: see :func:`unfinished`; made if absent. Rank 0 removes what earlier attempts left beside it.
        tensors: as in :class:`Checkpoint`.
        local: what is no tensor and differs between ranks; ``state["local"][rank]`` of the checkpoint.
        rank: of ``world``.
        world: ranks that write.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        writing.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for stale in writing.parent.glob(".writing-*"):
                if stale != writing:
                    shutil.rmtree(stale, ignore_errors=True)
        writing.mkdir(exist_ok=True)
        sizes = {}
        for kind, values in tensors.items():
            path = writing / (
                f"{kind}.safetensors" if world == 1 else f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"
            )
            stored, metadata = stored_form(values)
            save_file(stored, path, metadata=metadata)
            flush(path)
            sizes[path.name] = path.stat().st_size
        # Rank 0 looks for the name, so it must not see half of it.
        part = json.dumps({"files": sizes, "local": dict(local)})
        write_atomically(writing / _PART.format(rank), part.encode())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(error)) from None


def parts_written(writing: Path, world: int) -> bool:
    """Tell whether every rank has finished :func:`write_part`."""
    return all((writing / _PART.format(rank)).is_file() for rank in range(world))


def commit(writing: Path, update: int, state: Mapping[str, Any], *, world: int, keep: int, best: bool = False) -> Path:
    """Make a checkpoint of what all ranks have written; called by one of them.

    Args:
        writing: see :func:`unfinished`.
        update: applied updates.
        state: what is no tensor and the same for all ranks.
        world: ranks that wrote.
        keep: how many checkpoints stay.
        best: it is the best so far and stays until there is a better one.

    Raises:
        CheckpointError: the disk refuses it.
    """
    folder = writing.parent
    try:
        sizes: dict[str, int] = {}
        local = []
        for rank in range(world):
            part = writing / _PART.format(rank)
            content = json.loads(part.read_text())
            sizes |= content["files"]
            local.append(content["local"])
            part.unlink()
        whole = {"format": FORMAT, "update": update, "world": world, "files": sizes, "local": local, **state}
        (writing / _STATE).write_text(json.dumps(whole, indent=1))
        flush(writing / _STATE)
        flush(writing)
        final = _unused(folder / f"update-{update:09d}")
        writing.rename(final)
        for pointer in ("latest", "best") if best else ("latest",):
            write_atomically(folder / pointer, f"{final.name}\n".encode())
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(str(error)) from None
    _prune(folder, final, keep)
    return final


def failure(folder: Path, update: int, error: CheckpointError, writing: Path) -> CheckpointError:
    """Make the error of an attempt that failed, and remove what it left."""
    shutil.rmtree(writing, ignore_errors=True)
    previous = latest(folder) if folder.is_dir() else None
    kept = f"the last good one is {previous}" if previous else "there is no earlier one"
    return CheckpointError(
        f"could not write the checkpoint of update {update} to {folder}: {error}; {kept}. "
        "Free space or repair the disk, then run the same command to continue"
    )


def _unused(path: Path) -> Path:
    """The path, or with the first free number: a checkpoint is never removed before its successor is in place."""
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the best, the ``keep`` that were written last, and others of the newest one's update."""
    best = named(folder, "best")
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path not in (newest, best)]
    update = newest.name.split("-")[1]
    same = [path for path in found if path.name.split("-")[1] == update]
    others = sorted((path for path in found if path not in same), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in same + others[: max(len(others) - keep + 1, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def named(folder: Path, pointer: str) -> Path | None:
    """The complete checkpoint that the file ``latest`` or ``best`` names, or None."""
    try:
        name = (folder / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if _NAME.fullmatch(name) and (folder / name / _STATE).is_file() else None


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    pointed = named(folder, "latest")
    if pointed is not None or not folder.is_dir():
        return pointed
    # A crash between the two renames leaves a complete folder that `latest` does not name yet.
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).is_file()]
    return max(complete, default=None)


def load(folder: Path) -> Loaded:
    """Open a checkpoint; its tensors are read when they are asked for.

    Raises:
        CheckpointError: a file is missing, truncated, or of another format.
    """
    try:
        if not (folder / _STATE).is_file():  # a pipe without a writer would never open
            raise OSError(f"it has no file {_STATE}")
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error}); name another or start over") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{folder / _STATE}: not a checkpoint of format {FORMAT}; it may be of another version")
    try:
        whole_number(state.get("update"), "update")
        world = whole_number(state.get("world"), "world")
        if not isinstance(local := state.get("local"), list) or len(local) != world:
            raise ValueError(f"local is not the states of {world} ranks")
        if not isinstance(state.get("configuration", {}), dict):
            raise ValueError("configuration holds no settings")
    except ValueError as error:
        raise CheckpointError(f"{folder / _STATE}: {error}; choose an earlier checkpoint") from None
    files: dict[str, list[Path]] = {}
    for name, size in state["files"].items():
        path = folder / str(name)
        match = re.fullmatch(r"([a-z_]+)(-\d{5}-of-\d{5})?\.safetensors", str(name))
        if match is None or not path.is_file():
            raise CheckpointError(f"{folder}: its file {name!r} is missing; choose an earlier checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, should have {size}; choose an earlier one")
        files.setdefault(match[1], []).append(path)
    return Loaded({kind: SavedTensors(paths) for kind, paths in files.items()}, state)


def whole_number(value: object, name: str) -> int:
    """A number of updates, samples or ranks in a state.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _BEYOND:
        raise ValueError(f"{name}={str(value)[:80]} is no whole number from 0 up")
    return value


@overload
def number(value: object, name: str) -> float: ...
@overload
def number(value: object, name: str, *, optional: Literal[True]) -> float | None: ...
def number(value: object, name: str, *, optional: bool = False) -> float | None:
    """A finite number in a state, or None where that is ``optional``.

    Raises:
        ValueError: it is none.
    """
    if value is None and optional:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _BEYOND:
        raise ValueError(f"{name}={str(value)[:80]} is no number")
    return float(value)


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators of this process: torch's as tensors, Python's and numpy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return tensors, {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> None:
    """Undo :func:`random_state`."""
    try:
        torch.set_rng_state(tensors["torch"])
        if device.type == "cuda" and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"], device)
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, position, has_gauss, cached = state["numpy"]
        if gauss is not None:
            number(gauss, "python")
        if whole_number(position, "numpy") > 624:  # numpy would read beyond the end of its numbers
            raise ValueError(f"numpy={position} is no place among 624 numbers")
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's random states cannot be restored ({error})") from None
