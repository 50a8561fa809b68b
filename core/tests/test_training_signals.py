"""Ctrl-C and SIGTERM at every stage of a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data2vec.core.run import main
from data2vec.core.testing import load_module
from data2vec.core.training import checkpoint

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))
no_hooks, shards, whole = toy.no_hooks, toy.shards, toy.whole
UPDATES, HOOKS, settings, trained, learned, command = (
    toy.UPDATES,
    toy.HOOKS,
    toy.settings,
    toy.trained,
    toy.learned,
    toy.command,
)


class Exited(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    return codes


def at(update: int, *signals: int) -> Callable[[int], None]:
    def hook(number: int) -> None:
        if number == update:
            for one in signals:
                signal.raise_signal(one)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    shards: Path,
    tmp_path: Path,
    whole: Callable[[int | None], Path],
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    experiment = settings(tmp_path, shards)
    HOOKS["mask"] = at(3, number)  # while update 4 is made
    assert command(experiment) == 130
    text = capfd.readouterr()
    assert "stopping after this update and saving; once more to exit at once" in text.err
    assert f"stopped (interrupted) at update 4 of {UPDATES}" in text.out
    assert "Traceback" not in text.err + text.out
    assert learned(tmp_path)[2]["update"] == 4
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    HOOKS.clear()
    assert command(experiment) == 0
    tensors = learned(tmp_path)[0]
    different = [
        k for k, v in learned(whole(None))[0].items() if k != "random:0/numpy" and not torch.equal(tensors[k], v)
    ]
    assert different == []


def test_a_second_signal_exits_at_once(shards: Path, tmp_path: Path, exit_codes: list[int]) -> None:
    HOOKS["mask"] = at(3, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(Exited):
        main(settings(tmp_path, shards, checkpoint_every=2), argv=[])
    assert exit_codes == [130]
    assert learned(tmp_path)[2]["update"] == 2  # what had been saved is there


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_second_signal_while_saving_leaves_the_last_checkpoint(
    shards: Path, tmp_path: Path, exit_codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save_file

    def interrupted(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        if HOOKS:
            os.kill(os.getpid(), signal.SIGINT)
            raise SystemExit  # the thread that writes goes with the process

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    experiment = settings(tmp_path, shards)
    assert command(experiment, "train.max_minutes=1e-9") == 0
    HOOKS["mask"] = at(3, signal.SIGINT)
    with pytest.raises(Exited):
        main(experiment, argv=[])
    assert exit_codes == [130]
    assert learned(tmp_path)[2]["update"] == 1
    HOOKS.clear()
    assert command(experiment) == 0


def test_a_signal_during_the_last_update_ends_before_evaluation(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    HOOKS["mask"] = at(UPDATES - 1, signal.SIGINT)
    HOOKS["evaluate"] = lambda _: pytest.fail("evaluated")
    assert command(settings(tmp_path, shards)) == 130
    assert learned(tmp_path)[2]["update"] == UPDATES


def test_a_signal_during_evaluation_ends_soon(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], exit_codes: list[int]
) -> None:
    experiment = settings(tmp_path, shards)
    HOOKS["evaluate"] = at(0, signal.SIGINT)
    assert command(experiment) == 130
    text = capfd.readouterr()
    assert "interrupted; the trained model is saved in" in text.out
    assert "Traceback" not in text.err + text.out
    assert not (tmp_path / "report.html").exists()
    HOOKS["evaluate"] = at(0, signal.SIGTERM, signal.SIGTERM)
    assert command(experiment) == 130  # the first raises before the second can be sent
    assert exit_codes == []
    HOOKS.clear()
    assert command(experiment) == 0


def test_a_signal_before_training_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment = settings(tmp_path / "run")
    HOOKS["write"] = at(0, signal.SIGINT)
    assert command(experiment, sample=experiment) == 130
    text = capfd.readouterr()
    assert "interrupted before training began" in text.out
    assert "Traceback" not in text.err + text.out
    assert not (tmp_path / "run").exists()
    HOOKS.clear()
    assert command(experiment, sample=experiment) == 0
