"""tools/evaluate.py on a run with made images: bright squares in one of two places are the classes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from data2vec.core import Data2Vec, Experiment
from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.settings.fields import DataConfig, TransformerConfig
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.settings.pretraining import TargetsConfig
from data2vec.core.testing import load_module
from data2vec.vision import MaskConfig, Vision

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("evaluate_tool", ROOT / "tools" / "evaluate.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, and its shards of 60 training and 20 validation images."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("validation", 20)):
        with ShardWriter(folder / "shards", prefix, "vision", class_names=("left", "right")) as writer:
            for number in range(count):
                pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                pixels[4:12, 2 + 6 * (number % 2) : 8 + 6 * (number % 2)] += 150
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                label = str(number % 2).encode()
                writer.write(f"{prefix}{number:03d}", {"png": content.getvalue(), "cls": label})
    experiment = Experiment(
        name="squares",
        modalities={"vision": Vision(image_size=16, patch_size=4, mask=MaskConfig(min_block=2))},
        transformer=TransformerConfig(depth=2, width=16, heads=2),
        targets=TargetsConfig(top_k=2),
        data=DataConfig(
            train=str(folder / "shards" / "train-*.tar"),
            validation=str(folder / "shards" / "validation-*.tar"),
            workers=0,
        ),
    )
    model = Data2Vec.build(experiment)
    place = folder / "run"
    place.mkdir()
    (place / "config.yaml").write_text(to_yaml(experiment))
    checkpoint.save(place / "checkpoints", 7, checkpoint.Checkpoint({"model": model.own_state()}, {}), keep=1)
    return place


def test_the_table_has_every_encoder_and_task(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    assert tool.main([str(run), "--tasks", "knn,linear,rank", "--device", "cpu", "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert [row["name"] for row in table["rows"]] == ["teacher", "student", "random encoder", "raw pixels"]
    assert (table["update"], table["train_samples"], table["test_samples"]) == (7, 60, 20)
    pixels = table["rows"][3]
    assert pixels["dims"] == 3 * 16 * 16
    assert pixels["knn"] == 1.0  # two places of a bright square are easy for pixels
    assert 1.0 <= pixels["rank"] <= 20.0
    # An untrained model's teacher is its student.
    assert table["rows"][0]["knn"] == table["rows"][1]["knn"]
    assert "raw pixels" in capsys.readouterr().out


def test_other_data_layers_and_a_single_task(tool: ModuleType, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    shards = str(run.parent / "shards" / "train-*.tar")
    arguments = ["--tasks", "rank", "--data", shards, "--layers", "last", "--device", "cpu", "--json", str(out)]
    place = next((run / "checkpoints").glob("update-*"))
    assert tool.main([str(place), *arguments]) == 0
    table = json.loads(out.read_text())
    assert table["train_samples"] == 48  # a fifth is held out to judge by
    assert all(row["knn"] is None and row["rank"] is not None for row in table["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "knn,accuracy"], "accuracy"),
        (["--data", "absent-*.tar"], "absent"),
        (["--layers", "9"], "evaluation.layers=9"),
        (["--modality", "speech"], "speech"),
    ],
)
def test_wrong_arguments_are_one_clear_error(
    tool: ModuleType, run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(run), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_no_run_is_one_clear_error(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path / "nothing")]) == 2
    assert "no run there" in capsys.readouterr().err


def test_the_readmes_example_runs(run: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "load_encoder" in block)
    code = code.replace("runs/vision_base_sample", str(run))
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    for name in ("digit.png", "other.png"):
        Image.effect_noise((20, 20), 50).save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(tuple(features.shape))"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16)"


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:experiments|tools|docs|tests)/\w+\.(?:py|md|png)", text))
    named |= {f"experiments/{name}" for name in re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)}
    assert len(named) >= 10
    assert not sorted(name for name in named if not (ROOT / name).is_file())
