"""Pretrained runs, labelled shards and recipes of fine-tuning that take seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.run.cli import main
from data2vec.core.settings.finetuning import Classification, HeadConfig, LetterConfig, Pool, Recognition, ScoreConfig
from data2vec.core.testing import load_module

scenarios = load_module("scenarios_of_finetuning", Path(__file__).with_name("scenarios.py"))
UPDATES = 8
SAID = ("go", "stop now", "yes", "left on")


def ended(recipe: Any, *arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as found:
        main(recipe, argv=list(arguments))
    return int(found.value.code or 0)


def labelled(name: str, number: int) -> dict[str, bytes]:
    """A sample with every kind of label; the grey level of an image is its class."""
    label = number % 3
    members = scenarios.members_of(name, number, shift=2.0 * (label - 1))
    if name == "text":
        members["txt"] = b"abc"[label : label + 1] * 3 + members["txt"]
    else:
        members["txt"] = SAID[number % len(SAID)].encode()
    return {
        **members, "cls": str(label).encode(), "number": f"{label / 2}".encode(), "classes": b"0 2" if label else b"1",
    }  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Pretrained runs and shards of every modality, in one folder."""

    folder: Path

    def start(self, name: str) -> str:
        return str(self.folder / f"pretrained_{name}")

    def shards(self, name: str, prefix: str = "train") -> str:
        return str(self.folder / "shards" / name / f"{prefix}-*.tar")


def pretrained(folder: Path) -> Place:
    """Pretrain in every modality, for a moment."""
    place = Place(folder)
    for name in ("vision", "speech", "text"):
        for prefix, count in (("train", 30), ("validation", 12)):
            with ShardWriter(place.folder / "shards" / name, prefix, name, samples_per_shard=10) as writer:
                for number in range(count):
                    writer.write(f"{prefix}{number:03d}", labelled(name, number + (0 if prefix == "train" else 100)))
        recipe = scenarios.run_of(name, place.folder, Path(place.start(name)))
        code = ended(
            recipe, f"data.train={place.shards(name)}", f"data.validation={place.shards(name, 'validation')}",
            "train.updates=3", "optim.warmup=1",
        )  # fmt: skip
        assert code == 0
    return place


def recipe_of(place: Place, name: str, folder: Path, **changes: Any) -> Classification:
    network = scenarios.scenario(name)
    audio = {"speech": {"audio": {"max_length": None}}} if name == "speech" else {}
    recipe = Classification(
        name=f"tuned_{name}",
        modalities=network.replace(**audio).modalities,
        start=place.start(name),
        layer_decay=0.8,
        head=HeadConfig(pool=Pool.FIRST if name == "text" else Pool.MEAN, hidden=name == "text"),
        evaluation=ScoreConfig(every=4, batch=5),
    ).replace(
        data={"train": place.shards(name), "validation": place.shards(name, "validation"), "workers": 0},
        optim={"lr": 0.01, "warmup": 0, "clip": 1.0},
        train={
            "folder": str(folder), "updates": UPDATES, "batch": 6, "log_every": 1, "checkpoint_every": 1, "keep": 9,
            "device": "cpu", "keep_best": "accuracy",
        },
    )  # fmt: skip
    return recipe.replace(**changes)


def letters_of(place: Place, folder: Path, **changes: Any) -> Recognition:
    tuned = recipe_of(place, "speech", folder)
    shared = {name: getattr(tuned, name) for name in ("modalities", "start", "transformer", "optim", "data", "train")}
    recipe = Recognition(name="heard", **shared, evaluation=tuned.evaluation)
    return recipe.replace(
        letters=LetterConfig(), train={"keep_best": "wer"}, frame_masks={"time_length": 2, "channel_length": 4}
    ).replace(**changes)
