"""Labels, transcripts and settings that cannot work: one clear error each, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.settings.finetuning import LabelKind, LetterConfig
from data2vec.core.testing import load_module

tuned = load_module("tuned_of_bad_input", Path(__file__).with_name("tuned.py"))
ended, labelled, recipe_of, letters_of = tuned.ended, tuned.labelled, tuned.recipe_of, tuned.letters_of
Place = Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return tuned.pretrained(tmp_path_factory.mktemp("finetuning"))


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no run": ({"start": "runs/none"}, [], "no run there"),
    "an unknown start": ({"start": None}, ["start="], "must not be empty"),
    "what the network fixes": ({}, ["transformer.depth=5"], "the network is that of start="),
    "a score of another task": ({}, ["train.keep_best=pearson"], "no score of this task; choose of accuracy"),
    "patience without a score": ({"train": {"keep_best": None}}, ["evaluation.patience=2"], "needs train.keep_best"),
    "too few labels": ({}, ["labels.count=2"], "fewer than the 3 classes"),
    "too many labels": ({}, ["labels.count=31"], "there are 30 labelled samples"),
    "too few names": ({}, ["labels.classes=[a,b]"], "has class 2, but there are names for 2 classes"),
    "weights for others": ({}, ["labels.weights=[1,2]"], "2 weights for 3 classes"),
    "a mixture of numbers": (
        {"labels": {"kind": LabelKind.NUMBER}, "train": {"keep_best": "pearson"}}, ["mix.mixup=0.5"],
        "numbers are not mixed",
    ),
    "more layers than there are": ({}, ["freeze=layers", "freeze_layers=9"], "there are 3 blocks"),
    "frozen for ever": ({}, ["freeze_updates=8"], "the encoder would never learn"),
    "adapters of what is frozen": ({}, ["adapters.rank=2", "freeze=all"], "set freeze=none"),
    "init_from": ({}, ["train.init_from=runs/x"], "name the run with start="),
    "unknown augmentation": ({}, ["vision.augment.auto_augment=rand-q9"], "vision.augment.auto_augment=rand-q9"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_settings(case: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, arguments, message = BAD[case]
    assert ended(recipe_of(place, "vision", tmp_path, **changes), *arguments) == 2
    found = capsys.readouterr()
    assert found.err.count("error:") == 1
    assert message in found.err
    assert "Traceback" not in found.out + found.err
    assert not (tmp_path / "checkpoints").exists()


def shards_of(folder: Path, name: str, change: Callable[[int, dict[str, bytes]], dict[str, bytes]]) -> str:
    with ShardWriter(folder, "train", name, samples_per_shard=10) as writer:
        for number in range(12):
            writer.write(f"bad{number:03d}", change(number, labelled(name, number)))
    return str(folder / "train-*.tar")


def without(member: str) -> Callable[[int, dict[str, bytes]], dict[str, bytes]]:
    return lambda _, members: {key: value for key, value in members.items() if key != member}


def with_all(member: str, value: bytes) -> Callable[[int, dict[str, bytes]], dict[str, bytes]]:
    return lambda _, members: {**members, member: value}


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("train", without("cls"), "none of its 12 samples has a label (member cls)"),
        ("train", with_all("cls", b"1"), "has one class only (1)"),
        ("validation", with_all("cls", b"7"), "12 samples are of class '7', of which training"),
        ("train", with_all("cls", b"cat"), "are no class number such as 7, as b'cat'"),
    ],
)
def test_bad_labels(
    which: str, change: Any, message: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = shards_of(tmp_path / "bad", "vision", change)
    assert ended(recipe_of(place, "vision", tmp_path / "run"), f"data.{which}={bad}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_labels_that_are_no_numbers(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = shards_of(tmp_path / "bad", "vision", with_all("number", b"good"))
    recipe = recipe_of(place, "vision", tmp_path / "run", labels={"kind": LabelKind.NUMBER})
    assert ended(recipe, f"data.train={bad}", "train.keep_best=pearson") == 2
    assert "12 of 12 labels (member number) are no number such as 2.5, as b'good'" in capsys.readouterr().err


def test_a_run_of_another_modality(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(recipe_of(place, "vision", tmp_path), f"start={place.start('speech')}") == 2
    assert "has no such modality, only speech" in capsys.readouterr().err


def test_a_head_of_another_size(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(recipe_of(place, "vision", tmp_path), "train.max_minutes=1e-9") == 0
    capsys.readouterr()
    assert ended(recipe_of(place, "vision", tmp_path), "labels.classes=[a,b,c,d]") == 2
    assert "labels.classes has 4 classes, and the run that is continued was trained for 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (without("txt"), [], "no transcripts to learn from (member txt) in its 12 clips: 12 have no transcript"),
        (with_all("txt", b"  "), [], "12 have an empty transcript"),
        (with_all("txt", b"GO"), ["letters.symbols=[_,'|',a,b]"], "transcripts have letters outside letters.symbols"),
        (with_all("txt", b"go"), ["letters.minutes=60"], "transcribed; choose at most that"),
        (with_all("txt", b"go"), ["speech.audio.max_length=4000"], "crops clips, but not what is said in them"),
    ],
)
def test_bad_transcripts(
    change: Any, arguments: list[str], message: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = shards_of(tmp_path / "bad", "speech", change)
    assert ended(letters_of(place, tmp_path / "run"), f"data.train={bad}", *arguments) == 2
    assert message in capsys.readouterr().err


def test_letters_outside_are_counted_and_named(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    symbols = ("_", "|", *"gostpnwyel")  # neither f nor r
    assert ended(letters_of(place, tmp_path, letters=LetterConfig(symbols=symbols), train={"updates": 1})) == 0
    assert "transcripts have letters outside letters.symbols: 'f' (7)" in caplog.text
