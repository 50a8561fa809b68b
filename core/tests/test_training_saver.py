"""Checkpoints written beside training: what is saved is what was there, and failures are heard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.checkpoints.saver import Saver
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.errors import CheckpointError


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_part

    def slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(0.5)
        write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write_part", slowly)
    saver = Saver(tmp_path, Ranks(), keep=2)
    weight, state = torch.ones(1000), {"progress": {"positions": {"toy": 4}}}
    started = time.monotonic()
    saver.start(1, {"model": {"weight": weight}}, state, {})
    assert time.monotonic() - started < 0.3
    weight.zero_()  # the next update, in place
    state["progress"]["positions"]["toy"] = 8
    assert checkpoint.latest(tmp_path) is None
    saver.finish()
    place = checkpoint.latest(tmp_path)
    assert place is not None
    saved = checkpoint.load(place)
    assert torch.equal(saved.tensors["model"]["weight"], torch.ones(1000))
    assert saved.state["progress"]["positions"]["toy"] == 4


def test_a_failure_is_known_at_once_and_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, Ranks(), keep=2)
    saver.start(1, {"model": {"weight": torch.ones(3)}}, {}, {})
    saver.finish()

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.start(2, {"model": {"weight": torch.ones(3)}}, {}, {})
    until = time.monotonic() + 10
    while saver.failed is None and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"No space left on device; the last good one is .*update-000000001"):
        saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "update-000000001"]


def test_the_best_stays(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Ranks(), keep=1)
    for update in range(1, 6):
        saver.start(update, {"model": {"weight": torch.full((3,), float(update))}}, {}, {}, best=update in (1, 3))
    saver.finish()
    assert sorted(path.name for path in tmp_path.glob("update-*")) == ["update-000000003", "update-000000005"]
    assert checkpoint.named(tmp_path, "best") == tmp_path / "update-000000003"


def test_pieces_of_several_ranks_are_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    writing = checkpoint.unfinished(tmp_path, "token")
    for rank in (1, 0):
        assert not checkpoint.parts_written(writing, 2)
        part = {"model": {"weight": Piece(whole.flatten()[7 * rank : 7 * rank + 7], 7 * rank, (3, 4))}}
        checkpoint.write_part(writing, part, {"rank": rank}, rank=rank, world=2)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.commit(writing, 5, {}, world=2, keep=1)
    place = checkpoint.latest(tmp_path)
    assert place is not None
    saved = checkpoint.load(place)
    assert torch.equal(saved.tensors["model"]["weight"], whole)
    assert [local["rank"] for local in saved.state["local"]] == [0, 1]
    (place / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        checkpoint.load(place)
