"""Commands around fine-tuning: samples that pretrain first, choices of recipes, the launcher, comparisons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from data2vec.core import load_run
from data2vec.core.run.cli import main
from data2vec.core.settings.fields import Schedule
from data2vec.core.settings.finetuning import Classification, Freeze, LabelKind, Recognition, Weights
from data2vec.core.testing import load_module, load_script
from data2vec.core.training.monitor import read_metrics
from data2vec.vision import load_classifier

ROOT = Path(__file__).resolve().parents[1]
TINY = {"transformer": {"depth": 2, "width": 32, "heads": 2}}


def load(name: str) -> ModuleType:
    return load_script(ROOT / "experiments" / f"{name}.py")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load("vision_finetune")


def test_a_sample_pretrains_first(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = digits.before.replace(
        **TINY, targets={"top_k": 2}, train={"updates": 3, "batch": 16, "device": "cpu"}, optim={"warmup": 1},
        evaluation={"tasks": ("rank",), "max_samples": 50},
    )  # fmt: skip
    sample = digits.sample.replace(
        train={"updates": 4, "batch": 16, "device": "cpu"}, optim={"warmup": 1}, evaluation={"every": 2}
    )

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(digits.experiment, sample, argv=arguments, before=before)
        return int(ended.value.code or 0)

    assert run() == 0
    out = capsys.readouterr().out
    assert "vision_finetune_sample starts from vision_base_sample, which is trained first" in out
    assert out.index("trained first") < out.index("200 vision samples, 4 updates")
    tuned = load_run("runs/vision_finetune_sample", device="cpu")
    assert tuned.experiment.transformer.width == 32  # of the run it starts from
    assert run("train.folder=runs/second", "weights=teacher", "labels.count=null") == 0
    again = capsys.readouterr().out
    assert "trained first" not in again
    assert "4,000 vision samples" in again
    assert load_classifier("runs/second", device="cpu")([]) == []
    # From scratch the network is that of the run named.
    assert run("train.folder=runs/third", "weights=none") == 0
    assert load_run("runs/third", device="cpu").experiment.transformer.width == 32


def test_a_run_that_is_missing_is_named(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(digits.experiment, digits.sample, argv=["start=runs/other"], before=digits.before)
    assert ended.value.code == 2
    assert "runs/other: no run there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_published_recipes_of_images(digits: ModuleType) -> None:
    """Values of the released configurations, in FINETUNING's table of sources in the file's docstring."""
    recipes: dict[str, Classification] = digits.RECIPES
    assert list(recipes) == ["base", "large", "base_v2", "large_v2", "huge_v2"]
    table = {
        name: (
            one.train.batch, one.train.updates, one.optim.lr, one.layer_decay, one.transformer.drop_path,
            one.optim.weight_decay, one.optim.clip, one.mix.mixup, one.mix.cutmix, one.mix.chance,
        )
        for name, one in recipes.items()
    }  # fmt: skip
    assert table == {
        "base": (1024, 125_113, 4e-3, 0.65, 0.2, 0.0, None, 0.8, 1.0, 1.0),
        "large": (1024, 62_556, 5e-3, 0.65, 0.25, 0.05, None, 0.8, 1.0, 1.0),
        "base_v2": (512, 250_200, 1e-3, 0.65, 0.1, 0.05, None, 0.7, 1.0, 0.9),
        "large_v2": (512, 125_200, 5e-4, 0.75, 0.2, 0.05, 4.0, 0.7, 1.0, 0.9),
        "huge_v2": (512, 125_200, 5e-4, 0.75, 0.2, 0.05, 4.0, 0.7, 1.0, 0.9),
    }
    for one in recipes.values():
        assert (one.labels.smoothing, one.mix.switch, one.head.norm) == (0.1, 0.5, True)
        augment = one.modalities["vision"].augment
        assert (augment.auto_augment, augment.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert {name: one.optim.lr * one.optim.final_lr_ratio for name, one in recipes.items()} == pytest.approx(
        {"base": 1e-6, "large": 1e-6, "base_v2": 1e-6, "large_v2": 1e-7, "huge_v2": 1e-20}
    )
    assert recipes["huge_v2"].modalities["vision"].patch_size == 14


def test_the_published_recipes_of_speech() -> None:
    module = load("speech_ctc")
    made: dict[tuple[str, str], Recognition] = {
        (size, labels): module.recipe(labels, size)
        for size in ("base", "large")
        for labels in ("10m", "1h", "10h", "100h", "960h")
    }
    for (size, labels), one in made.items():
        assert one.optim.schedule is Schedule.TRI_STAGE
        assert (one.optim.warmup, one.optim.hold) == (one.train.updates // 10, one.train.updates * 4 // 10)
        assert one.optim.final_lr_ratio == 0.05
        assert one.transformer.layer_drop == (0.05 if labels == "10h" else 0.1)
        assert (one.freeze, one.final_dropout, len(one.letters.symbols)) == (Freeze.EXTRACTOR, 0.0, 32)
        assert one.freeze_updates == (0 if size == "base" and labels in ("100h", "960h") else 10_000)
        assert one.frame_masks.channel_length == 64
    assert made["base", "10h"].optim.lr == 5e-5
    assert made["large", "1h"].frame_masks.time == 0.75


def test_the_published_recipes_of_text() -> None:
    module = load("text_glue")
    made = {(task, method): module.recipe(task, method) for task in module.TASKS for method in ("1.0", "2.0")}
    assert len(made) == 16
    for (task, method), one in made.items():
        assert one.optim.schedule is Schedule.LINEAR
        assert (one.optim.weight_decay, one.optim.clip) == (0.1, None)
        assert one.transformer.dropout == one.transformer.attention_dropout == 0.1
        assert (one.labels.kind is LabelKind.NUMBER) == (task == "stsb")
        assert one.train.keep_best == {"stsb": "pearson", "cola": "matthews"}.get(task, "accuracy")
        if method == "2.0":
            assert one.optim.lr == (4e-5 if task == "stsb" else 2e-5)
    assert made["mnli", "1.0"].train.updates == 123_873


def test_choices_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("text_glue")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(module.experiment, module.sample, argv=arguments, before=module.before)
        except SystemExit as ended:
            code = int(ended.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    code, out, _ = run("--print-config", "task=stsb", "method=2.0", "data.train=x.tar", "optim.lr=1e-3")
    assert code == 0
    assert "name: text_stsb" in out
    assert "lr: 0.001" in out
    code, _, err = run("task=sst2")
    assert (code, err.count("error:")) == (2, 1)
    assert "data.train: not set; name the shards to train on" in err
    assert "task=sst3: no such choice; there is sst2, cola" in run("task=sst3")[2]
    code, out, _ = run("--help")
    assert "task=sst2|cola" in out
    assert "method=1.0|2.0" in out


@pytest.mark.slow
def test_a_comparison(tmp_path: Path) -> None:
    """Real commands of the tool, on a network of seconds."""
    experiment = tmp_path / "tiny_finetune.py"
    experiment.write_text(
        '"""Digits with a network of seconds, to compare."""\n'
        "from vision_finetune import before as base\n"
        "from vision_finetune import experiment, sample as one\n"
        "from data2vec.core import main\n"
        "before = base.replace(transformer={'depth': 2, 'width': 32, 'heads': 2}, targets={'top_k': 2},\n"
        "    train={'updates': 2, 'batch': 16}, optim={'warmup': 1}, evaluation={'tasks': ('rank',)})\n"
        "sample = one.replace(train={'updates': 3, 'batch': 16}, optim={'warmup': 1}, evaluation={'every': 3})\n"
        "if __name__ == '__main__':\n"
        "    main(experiment, sample, before=before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "experiments")}
    words = [sys.executable, str(ROOT / "tools" / "compare.py"), str(experiment), "--labels", "50", "--seeds", "1"]

    def run() -> str:
        done = subprocess.run(
            [*words, "--run", "runs/compare_tiny_finetune"], cwd=tmp_path, env=environment, capture_output=True,
            text=True, check=False, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run()
    content = json.loads((tmp_path / "runs" / "compare_tiny_finetune" / "comparison.json").read_text())
    assert [row["name"] for row in content["rows"]] == [
        "fine-tuned, student", "fine-tuned, teacher", "from scratch", "from scratch, 3 times as long",
        "linear classifier of the raw input", "small network",
    ]  # fmt: skip
    assert all(len(row["values"]["50 labels"]) == 1 for row in content["rows"])
    assert "small network" in out
    longer = tmp_path / "runs" / "compare_tiny_finetune" / "50-0-from-scratch-3-times-as-long"
    assert read_metrics(longer / "metrics.jsonl")[-1]["update"] == 9
    assert load_run(longer, device="cpu").experiment.weights is Weights.NONE  # type: ignore[attr-defined]
    assert run() == out  # nothing is trained twice


def test_comparisons_name_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_module("compare_tool", ROOT / "tools" / "compare.py")
    path = ROOT / "experiments" / "vision_finetune.py"
    assert tool.main([str(path), "--out", str(tmp_path), "--seeds", "1", "optim.lr=-1"]) == 2
    assert "optim.lr=-1.0: must be greater than 0" in capsys.readouterr().err
    for rows, message in (("student,teachr", "no 'teachr'; choose of student, teacher"), ("baselines", "name one of")):
        with pytest.raises(SystemExit):
            tool.main([str(path), "--rows", rows])
        assert message in capsys.readouterr().err
