"""Checkpoints: complete or absent, whatever happens while one is written.

A checkpoint is a folder ``update-000001000`` of safetensors files and a ``state.json``. It is written under a
temporary name, flushed to disk and renamed; then the file ``latest`` is replaced to name it. Nothing in it is pickled.
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
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data2vec.core.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"update-(\d{9,})(-\d+)?")  # the second number where a run went back and reached an update again
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """``tensors``: file name without ending to its tensors. ``state``: everything that is no tensor."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(folder: Path, update: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, point ``latest`` to it, and remove all but the newest ``keep``.

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
    final = _unused(folder / f"update-{update:09d}")
    temporary = folder / f".writing-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        sizes = {}
        for name, tensors in checkpoint.tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
            sizes[path.name] = path.stat().st_size
        state = {"format": FORMAT, "update": update, "files": sizes, **checkpoint.state}
        (temporary / _STATE).write_text(json.dumps(state, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        temporary.rename(final)
        _replace_text(folder / "latest", final.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _unfinished(folder / "latest").unlink(missing_ok=True)
        previous = latest(folder) if folder.is_dir() else None
        kept = f"the last good one is {previous}" if previous else "there is no earlier one"
        raise CheckpointError(
            f"could not write the checkpoint of update {update} to {folder}: {error}; {kept}. "
            "Free space or repair the disk, then run the same command to continue"
        ) from None
    _prune(folder, final, keep)
    return final


def _unused(path: Path) -> Path:
    """The path, or with the first free number: a checkpoint is never removed before its successor is in place."""
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` checkpoints that were written last, and others of the newest one's update."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path != newest]
    update = newest.name.split("-")[1]
    same = [path for path in found if path.name.split("-")[1] == update]
    others = sorted((path for path in found if path not in same), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in same + others[: max(len(others) - keep + 1, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    try:
        name = (folder / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if _NAME.fullmatch(name) and (folder / name / _STATE).is_file():
        return folder / name
    if not folder.is_dir():
        return None
    # A crash between the two renames leaves a complete folder that `latest` does not name yet.
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).is_file()]
    return max(complete, default=None)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated, or of another format.
    """
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error}); name another or start over") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{folder / _STATE}: not a checkpoint of format {FORMAT}; it may be of another version")
    tensors = {}
    for name, size in state["files"].items():
        path = folder / str(name)
        if "/" in str(name) or not str(name).endswith(".safetensors") or not path.is_file():
            raise CheckpointError(f"{folder}: its file {name!r} is missing; choose an earlier checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, should have {size}; choose an earlier one")
        try:
            tensors[path.stem] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); choose an earlier checkpoint") from None
    return Checkpoint(tensors, state)


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
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random states cannot be restored ({error})") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _replace_text(path: Path, text: str) -> None:
    temporary = _unfinished(path)
    temporary.write_text(text)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)
