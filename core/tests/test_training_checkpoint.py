"""Checkpoints: whole or absent at every moment, whatever fails while one is written."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.checkpoint import Checkpoint, latest, load, save
from data2vec.core.errors import CheckpointError

CPU = torch.device("cpu")


def content(value: float, size: int = 5) -> Checkpoint:
    return Checkpoint(
        {"model": {"weight": torch.full((size,), value)}, "optimiser": {"weight/step": torch.tensor(value)}},
        {"value": value},
    )


def value_of(place: Path | None) -> float:
    """What a whole checkpoint holds."""
    assert place is not None
    loaded = load(place)
    value = float(loaded.state["value"])
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((5,), value))
    assert float(loaded.tensors["optimiser"]["weight/step"]) == value
    return value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Crash(BaseException):
    """The process dies: nothing that handles errors runs."""


STEPS: tuple[tuple[Any, str], ...] = (
    (checkpoint, "save_file"), (os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"),
    (Path, "write_text"),
)  # fmt: skip


def failing(patch: pytest.MonkeyPatch, number: int, error: BaseException, *, removal: bool) -> Callable[[], int]:
    """Make the ``number``-th step of writing fail, half of it done; returns a counter of the steps so far."""
    done = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                if function is write_text:
                    function(args[0], args[1][: len(args[1]) // 2])
                raise error
            return function(*args, **kwargs)

        return step

    write_text = Path.write_text
    for owner, name in (*STEPS, *(((shutil, "rmtree"),) if removal else ())):
        patch.setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: done


@pytest.mark.parametrize("again", [False, True])  # the next update, or the same one after going back
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, keep: int, again: bool) -> None:
    update = 2 if again else 3
    crashes = 0
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save(folder, 1, content(1.0), keep=keep)
        save(folder, 2, content(2.0), keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, number, Crash(), removal=True)
            try:
                save(folder, update, content(3.0), keep=keep)
            except Crash:
                crashes += 1
                finished = False
            else:
                finished = True
        assert value_of(latest(folder)) in ((3.0,) if finished else (2.0, 3.0))
        save(folder, 4, content(4.0), keep=1)  # the next save clears what the crash left
        assert value_of(latest(folder)) == 4.0
        assert names(folder) == ["latest", "update-000000004"]
        if finished:
            break
    assert crashes >= 10


def test_a_crash_of_the_first_save_leaves_nothing_or_a_whole_checkpoint(tmp_path: Path) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            count = failing(patch, number, Crash(), removal=True)
            try:
                save(folder, 1, content(1.0), keep=1)
            except Crash:
                assert count() == number
            else:
                break
        place = latest(folder)
        assert place is None or value_of(place) == 1.0
    assert number >= 8


def test_a_full_disk_at_any_step_is_one_error(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    errors = 0
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save(folder, 1, content(1.0), keep=2)
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, number, full, removal=False)
            try:
                place = save(folder, 2, content(2.0), keep=2)
            except CheckpointError as error:
                errors += 1
                message = str(error)
            else:
                assert value_of(place) == 2.0
                break
        assert "could not write the checkpoint of update 2" in message
        assert "No space left on device" in message
        assert f"the last good one is {latest(folder)}" in message
        assert value_of(folder / "update-000000001") == 1.0
        # Nothing half-written: whatever stands there is whole.
        left = [path for path in folder.iterdir() if path.name != "latest"]
        assert all(value_of(path) in (1.0, 2.0) for path in left)
    assert errors >= 8


def test_a_full_disk_at_the_first_save_says_that_there_is_no_other(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, 3, OSError(errno.ENOSPC, "No space left on device"), removal=False)
        with pytest.raises(CheckpointError, match="there is no earlier one"):
            save(tmp_path / "new", 1, content(1.0), keep=2)
    assert names(tmp_path / "new") == []


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """The same with a real error of the operating system, from below the weights' writer."""
    save(tmp_path, 1, content(1.0), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*the last good one is .*update-000000001"):
            save(tmp_path, 2, content(2.0, size=1_000_000), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert value_of(latest(tmp_path)) == 1.0
    assert names(tmp_path) == ["latest", "update-000000001"]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for update in range(1, 6):
        save(tmp_path, update, content(float(update)), keep=2)
        assert value_of(latest(tmp_path)) == update
    assert names(tmp_path) == ["latest", "update-000000004", "update-000000005"]
    save(tmp_path, 5, content(7.0), keep=2)
    assert len(names(tmp_path)) == 3
    assert value_of(latest(tmp_path)) == 7.0


def test_a_run_that_went_back_keeps_its_new_checkpoints(tmp_path: Path) -> None:
    for update in (2, 4, 6):
        save(tmp_path, update, content(float(update)), keep=3)
    for update in (3, 4):  # continued from update 2
        save(tmp_path, update, content(10.0 + update), keep=2)
        assert value_of(latest(tmp_path)) == 10.0 + update
    kept = {value_of(path) for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {13.0, 14.0}


@pytest.mark.parametrize("text", [b"", b"update-000000009\n", b"../../etc\n", b"\xff\xfe", b"update-1\n"])
def test_a_pointer_that_names_nothing_is_passed_over(tmp_path: Path, text: bytes) -> None:
    for update in (1, 2):
        save(tmp_path, update, content(float(update)), keep=2)
    (tmp_path / "latest").write_bytes(text)
    assert value_of(latest(tmp_path)) == 2.0
    (tmp_path / "latest").unlink()
    assert value_of(latest(tmp_path)) == 2.0
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    place = save(tmp_path, 1, content(1.0), keep=1)
    path = place / name
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as error:
            load(place)
        assert str(path) in str(error.value) or str(place) in str(error.value)
        assert name in str(error.value) or name == "state.json"
    path.unlink()
    with pytest.raises(CheckpointError, match=name if name != "state.json" else "not a readable checkpoint"):
        load(place)


def test_damaged_weights_of_the_right_size_are_named(tmp_path: Path) -> None:
    place = save(tmp_path, 1, content(1.0), keep=1)
    path = place / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load(place)


@pytest.mark.parametrize(
    "state",
    [
        [], 3, {}, {"format": 99, "files": {}}, {"format": 1}, {"format": 1, "files": {"../model.safetensors": 3}},
        {"format": 1, "files": {"model.pt": 3}},
    ],
)  # fmt: skip
def test_other_states_are_refused(tmp_path: Path, state: Any) -> None:
    place = save(tmp_path, 1, content(1.0), keep=1)
    (place / "model.pt").write_bytes(b"abc")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (place / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError):
        load(place)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    tensors, generators = checkpoint.random_state(CPU)
    place = save(tmp_path, 1, Checkpoint({"random": tensors}, {"random": generators}), keep=1)
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}
    for path in place.iterdir():
        assert path.read_bytes()[:2] not in (b"\x80\x04", b"\x80\x02", b"PK")
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source.replace("Nothing in it is pickled", "")
    assert "torch.load" not in source


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))

    random.gauss(0, 1)  # leaves a second number behind
    np.random.standard_normal()
    tensors, generators = checkpoint.random_state(CPU)
    place = save(tmp_path, 1, Checkpoint({"random": tensors}, {"random": generators}), keep=1)
    expected = [draw() for _ in range(3)]
    loaded = load(place)
    checkpoint.restore_random_state(loaded.tensors["random"], loaded.state["random"], CPU)
    assert [draw() for _ in range(3)] == expected
    with pytest.raises(CheckpointError, match="random states"):
        checkpoint.restore_random_state({}, loaded.state["random"], CPU)
