"""Fine-tuning as a user runs it: from a pretrained run to labels, in every modality, continued, and from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from data2vec.core import load_run
from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.run.cli import main
from data2vec.core.run.session import Session
from data2vec.core.run.starting import with_network_of_start
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import (
    Classification,
    FineTuning,
    HeadConfig,
    LabelConfig,
    LabelKind,
    LetterConfig,
    Pool,
    Recognition,
    ScoreConfig,
)
from data2vec.core.settings.overrides import apply_overrides, validate
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.interruption import Interruption
from data2vec.core.training.monitor import read_metrics
from data2vec.speech import load_classifier as load_clip_classifier
from data2vec.speech import load_recogniser
from data2vec.text import load_text_classifier
from data2vec.vision import load_classifier

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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("finetuning"))
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


@pytest.mark.parametrize("name", ["vision", "speech", "text"])
def test_classes(name: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(recipe_of(place, name, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "12 validation samples" in out
    lines = read_metrics(tmp_path / "metrics.jsonl")
    scored = [line for line in lines if "accuracy" in line]
    assert [line["update"] for line in scored] == [4, 8]
    assert {"accuracy", "macro_f1", "matthews", "validation_loss"} <= scored[0].keys()
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["scores"]["accuracy"] == max(line["accuracy"] for line in scored)  # of the best weights
    assert result["classes"] == ["0", "1", "2"]
    page = (tmp_path / "report.html").read_text()
    assert "Confusions" in page
    assert "Mistakes" in page or result["scores"]["accuracy"] == 1.0
    run = load_run(tmp_path, device="cpu")
    assert run.update == result["update"]
    assert isinstance(run.experiment, Classification)
    features = run.features(torch.randn(2, 3, 16, 16)) if name == "vision" else None
    assert features is None or features.x.shape == (2, 16, scenarios.WIDTH)


def test_images_from_python(place: Place, tmp_path: Path) -> None:
    assert ended(recipe_of(place, "vision", tmp_path)) == 0
    model = load_classifier(tmp_path, device="cpu")
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(labelled("vision", number)["png"])
    several = model(files)
    one = model(str(files[1]))
    assert isinstance(several, list)
    assert not isinstance(one, list)
    assert one.label == several[1].label
    assert one.probability == pytest.approx(several[1].probability, rel=1e-5)
    assert one.probability == max(one.probabilities.values())
    assert sum(one.probabilities.values()) == pytest.approx(1.0)
    assert list(one.probabilities) == ["0", "1", "2"]
    assert model([]) == []


def test_clips_and_texts_from_python(place: Place, tmp_path: Path) -> None:
    for name in ("speech", "text"):
        assert ended(recipe_of(place, name, tmp_path / name)) == 0
    heard = load_clip_classifier(tmp_path / "speech", device="cpu")
    clips = [torch.randn(2_000), torch.randn(3_000)]
    both = heard(clips)
    alone = heard(clips[1])
    assert isinstance(both, list)
    assert not isinstance(alone, list)
    assert alone.probability == pytest.approx(both[1].probability, rel=1e-4)
    read = load_text_classifier(tmp_path / "text", device="cpu")
    named = read(["a text", ("one", "and another")])
    assert isinstance(named, list)
    assert [len(one.probabilities) for one in named] == [3, 3]


def test_letters(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(letters_of(place, tmp_path)) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["symbols"] == ["<blank>", "|", *sorted(set("".join(SAID)) - {" "})]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "wer" in line]
    assert min(line["wer"] for line in lines) == result["scores"]["wer"]  # the lowest is the best
    assert "The worst transcripts" in (tmp_path / "report.html").read_text()
    recogniser = load_recogniser(tmp_path, device="cpu")
    clips = [torch.randn(2_000), torch.randn(4_000)]
    both, alone = recogniser(clips), recogniser(clips[1])
    assert isinstance(both, list)
    assert alone == both[1]
    assert not isinstance(alone, list)
    assert alone.text == " ".join(word.text for word in alone.words)
    assert all(0 <= word.start < word.end <= 0.3 for word in alone.words)


@pytest.mark.parametrize("kind", ["classification", "recognition"])
def test_a_run_goes_on_bit_for_bit(kind: str, place: Place, tmp_path: Path) -> None:
    def recipe(folder: Path) -> FineTuning:
        if kind == "recognition":
            return letters_of(place, folder, transformer={"dropout": 0.1, "layer_drop": 0.3})
        return recipe_of(
            place, "vision", folder, transformer={"dropout": 0.1, "drop_path": 0.2},
            vision={"augment": {"erase": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}},
            mix={"mixup": 0.8, "cutmix": 1.0}, labels={"smoothing": 0.1},
        )  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ended(recipe(whole)) == 0
    assert ended(recipe(parts), "train.max_minutes=1e-9") == 0  # one update
    newest = checkpoint.latest(parts / "checkpoints")
    assert newest is not None
    assert newest.name == "update-000000001"
    assert ended(recipe(parts)) == 0
    assert losses(parts) == losses(whole)
    assert [name for name, value in weights(parts).items() if not torch.equal(value, weights(whole)[name])] == []


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    tensors = checkpoint.load(newest).tensors["model"]
    return {name: tensors[name] for name in tensors}


def test_adapters_learn_and_are_loaded(place: Place, tmp_path: Path) -> None:
    assert ended(recipe_of(place, "vision", tmp_path), "adapters.rank=2") == 0
    before, after = load_run(place.start("vision"), device="cpu").model.state_dict(), weights(tmp_path)
    name = "transformer.blocks.0.attention.qkv"
    assert torch.equal(after[f"backbone.encoder.{name}.base_layer.weight"], before[f"student.{name}.weight"])
    assert after[f"backbone.encoder.{name}.lora_B.default.weight"].any()  # begins at zero
    assert load_classifier(tmp_path, device="cpu")([]) == []


def test_patience_ends_a_run(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still = recipe_of(place, "vision", tmp_path, optim={"lr": 1e-12}, evaluation={"every": 1, "patience": 2})
    assert ended(still) == 0
    assert "stopped at update 3: accuracy is no longer better" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert ended(still) == 0  # evaluates and reports again
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl") if "accuracy" in line] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_other_labels(kind: str, place: Place, tmp_path: Path) -> None:
    score = {"classes": "mean_average_precision", "number": "pearson"}[kind]
    chosen = LabelKind(kind)
    recipe = recipe_of(
        place, "vision", tmp_path, labels=LabelConfig(kind=chosen), train={"keep_best": score, "updates": 30}
    )
    assert ended(recipe) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["scores"][score] > 0.8
    named = load_classifier(tmp_path, device="cpu")
    path = tmp_path / "x.png"
    path.write_bytes(labelled("vision", 2)["png"])
    found = named(path)
    assert not isinstance(found, list)
    assert (found.value is None) == (kind == "classes")


def test_other_sizes_than_pretrained(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(recipe_of(place, "vision", tmp_path), "vision.image_size=24") == 0
    assert "vision: " in capsys.readouterr().out  # what was made to fit
    run = load_run(tmp_path, device="cpu")
    assert run.experiment.modalities["vision"].image_size == 24
    # Where the command does not say, the size is that of pretraining, whatever the recipe has.
    recipe = recipe_of(place, "vision", tmp_path / "same", vision={"image_size": 224})
    assert ended(recipe, "train.updates=1") == 0
    assert load_run(tmp_path / "same", device="cpu").experiment.modalities["vision"].image_size == 16


@pytest.mark.parametrize("engine", ["engine.kind=torch", "engine.zero_stage=2", "engine.zero_stage=3"])
def test_two_ranks_are_one_process(engine: str, place: Place, tmp_path: Path) -> None:
    def recipe(folder: Path) -> Classification:
        return recipe_of(place, "vision", folder, train={"micro_batch": 3}, freeze_updates=2)

    assert ended(recipe(tmp_path / "one")) == 0
    kind = [] if engine == "engine.kind=torch" else ["engine.kind=deepspeed", "engine.bucket_size=1000"]
    run_distributed(on_a_rank, 2, [engine, *kind], recipe(tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-4)


def on_a_rank(arguments: list[str], recipe: Recipe) -> None:
    """One rank's part of a command that several were started for."""
    chosen = with_network_of_start(apply_overrides(recipe, arguments), arguments)
    validate(chosen)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    with Interruption(launched=False) as interruption:
        assert Session(chosen, ranks, interruption, Console(quiet=True), is_sample=False).run() == 0


Change = Callable[[Place, Path], Any]
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
    assert jiwer.wer(["a"], ["a"]) == 0
