"""The recipes for two CPU cores: each pretrains, and what it learnt is fine-tuned, by the commands of its docstring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.run.load import load_run
from data2vec.core.testing import load_module, load_script

ROOT = Path(__file__).resolve().parents[1]
tuned = load_module("tuned_of_small_recipes", Path(__file__).with_name("tuned.py"))
PARTS = "speech.audio.min_length=1000 train.batch_length=16000 train.micro_length=8000"
OWN = {
    "images_32": ("vision", "transformer.depth=2 targets.top_k=2 train.batch=6"),
    "spoken_words": ("speech", PARTS),
    "reviews": ("text", "train.batch=6"),
}
BRIEF = ("transformer.width=24", "transformer.heads=2", "optim.warmup=1", "train.updates=3", "data.workers=0")


@pytest.mark.parametrize("name", OWN)
def test_a_small_recipe(name: str, tmp_path: Path) -> None:
    modality, settings = OWN[name]
    for prefix, count in (("train", 24), ("validation", 9)):
        with ShardWriter(tmp_path / "shards", prefix, modality, samples_per_shard=10) as writer:
            for number in range(count):
                writer.write(f"{prefix}{number:02d}", tuned.labelled(modality, number + len(prefix)))
    data = tuple(f"data.{prefix}={tmp_path}/shards/{prefix}-*.tar" for prefix in ("train", "validation"))
    words = [word for word in settings.split() if word.startswith(("transformer", "speech"))]

    def run(script: str, folder: str, *arguments: str) -> Path:
        experiment = load_script(ROOT / "experiments" / "small" / f"{script}.py").experiment
        assert tuned.ended(experiment, *data, *BRIEF, f"train.folder={tmp_path / folder}", *arguments) == 0
        return tmp_path / folder

    start = run(name, "pretrained", *settings.split())
    folder = run(
        f"{name}_finetune",
        "tuned",
        *words,
        f"start={start}",
        "labels.count=12",
        "train.batch=6",
        "evaluation.every=3",
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["train_samples"] == 12
    tuned_one, pretrained_one = (load_run(path, device="cpu") for path in (folder, start))
    assert tuned_one.experiment.start == str(start)
    assert tuned_one.experiment.transformer.width == pretrained_one.experiment.transformer.width == 24
