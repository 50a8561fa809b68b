"""Fine-tuning as a user runs it: from a pretrained run to labels, in every modality, continued, and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from data2vec.core import load_run
from data2vec.core.checkpoints import checkpoint
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.run.session import Session
from data2vec.core.run.starting import with_network_of_start
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import (
    Classification,
    FineTuning,
    LabelConfig,
    LabelKind,
)
from data2vec.core.settings.overrides import apply_overrides, validate
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.interruption import Interruption
from data2vec.core.training.monitor import read_metrics
from data2vec.speech import load_classifier as load_clip_classifier
from data2vec.speech import load_recogniser
from data2vec.text import load_text_classifier
from data2vec.vision import load_classifier

tuned = load_module("tuned_of_runs", Path(__file__).with_name("tuned.py"))
ended, labelled, recipe_of, letters_of = tuned.ended, tuned.labelled, tuned.recipe_of, tuned.letters_of
Place = Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return tuned.pretrained(tmp_path_factory.mktemp("finetuning"))


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
    assert features is None or features.x.shape == (2, 16, tuned.scenarios.WIDTH)


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
    assert result["symbols"] == ["<blank>", "|", *sorted(set("".join(tuned.SAID)) - {" "})]
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
