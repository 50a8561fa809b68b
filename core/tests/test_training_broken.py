"""A run too short for its broken samples to be judged on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.testing import load_module

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))


@pytest.fixture
def half_broken(tmp_path: Path) -> Path:
    folder = toy.write_shards(tmp_path / "shards", "validation", 30)
    with ShardWriter(folder, "train", "series") as writer:
        for number in range(400):
            writer.write(f"{number:04d}", {"raw": bytes(72 if number % 2 else 3), "cls": b"1"})
    return folder


def test_half_the_samples_are_broken(half_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The end is not saved, so the same command fails again; what is saved before it can be continued."""
    run = toy.settings(tmp_path / "run", half_broken, updates=3, checkpoint_every=2)
    for _ in range(2):
        assert toy.command(run) == 2
        error = capsys.readouterr().err
        assert "samples are broken, more than data.max_broken=0.01 allows; the last: " in error
        assert "mend the shards, or raise data.max_broken" in error
        place = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert place is not None
        assert place.name == "update-000000002"
