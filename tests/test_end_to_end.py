"""The experiments as a user runs them: help, settings, a whole sample run, Ctrl-C, and what a run's folder holds."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data2vec.core.run.choices import Choices
from data2vec.core.run.load import load_run
from data2vec.core.settings.overrides import from_yaml, tree, validate
from data2vec.core.settings.tree import flatten
from data2vec.core.testing import load_script
from data2vec.core.training.monitor import read_metrics

ROOT = Path(__file__).resolve().parents[1]
_ALL = (ROOT / "experiments").rglob("*.py")
EXPERIMENTS = sorted(path.relative_to(ROOT / "experiments").with_suffix("").as_posix() for path in _ALL)
TINY = (
    "transformer.depth=2", "transformer.width=32", "transformer.heads=2", "targets.top_k=2", "train.updates=6",
    "train.batch=16", "optim.warmup=1", "evaluation.max_samples=300", "evaluation.few_labels=50", "train.device=cpu",
)  # fmt: skip


def load(name: str) -> ModuleType:
    return load_script(ROOT / "experiments" / f"{name}.py")


@pytest.fixture(scope="module")
def vision_base() -> ModuleType:
    return load("vision_base")


def command(module: ModuleType, *arguments: str) -> int:
    """The exit code; printing the settings returns without one."""
    try:
        module.main(module.experiment, getattr(module, "sample", None), argv=arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_print_config_is_complete_and_reads_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(name)
    assert command(module, "--print-config") == 0
    text = capsys.readouterr().out
    experiment = from_yaml(text, None)
    published = module.experiment
    assert experiment == (published.default() if isinstance(published, Choices) else published)
    validate(experiment)
    keys = set(flatten(tree(experiment)))
    for section in dataclasses.fields(experiment):
        value = getattr(experiment, section.name)
        if dataclasses.is_dataclass(value):
            assert {f"{section.name}.{field.name}" for field in dataclasses.fields(value)} <= keys
    for modality, value in experiment.modalities.items():
        for field in dataclasses.fields(value):
            assert any(re.match(rf"{modality}\.{field.name}(\.|$)", key) for key in keys)
    printed = set(flatten(tree(from_yaml(text, None))))
    assert printed == keys
    assert all(re.search(rf"^ *{re.escape(key.rpartition('.')[2])}:", text, re.MULTILINE) for key in keys)


def test_print_config_shows_overrides_and_each_variant(
    vision_base: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    published, sample = vision_base.experiment, vision_base.sample
    assert command(vision_base, "--print-config", "data.train=x-{0000..0009}.tar", "optim.lr=3e-4") == 0
    expected = published.replace(data={"train": "x-{0000..0009}.tar"}, optim={"lr": 3e-4})
    assert from_yaml(capsys.readouterr().out) == expected
    assert command(vision_base, "--sample", "--print-config") == 0
    assert from_yaml(capsys.readouterr().out) == sample
    assert command(vision_base, "--print-config", "optim.lrr=3e-4") == 2
    printed = capsys.readouterr()
    assert "did you mean optim.lr?" in printed.err
    assert printed.out.strip() == ""


def test_help(vision_base: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(vision_base, "--help") == 0
    text = capsys.readouterr().out
    for part in ("KEY=VALUE", "--print-config", "--sample", "data.train=", "train.resume=auto|never|CHECKPOINT"):
        assert part in text


class Finished:
    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out


@pytest.fixture(scope="module")
def finished(vision_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One sample run with every task, in a folder whose name would be markup to a careless printer."""
    folder = tmp_path_factory.mktemp("runs") / "a [bold]run[/]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / "experiments" / "vision_base.py")])
        lines: list[str] = []
        write = sys.stdout.write
        patch.setattr(sys.stdout, "write", lambda text: (lines.append(text), write(text))[1])
        assert command(vision_base, *TINY, f"train.folder={folder}") == 0
    return Finished(folder, "".join(lines))


def test_the_first_line_says_what_runs(finished: Finished) -> None:
    first = finished.out.splitlines()[0]
    assert first.startswith("This is the sample variant of vision_base.py")
    assert "The published recipe: uv run experiments/vision_base.py data.train='SHARDS/train-{0000..0999}.tar'" in first


def test_the_folder_of_a_run_is_complete(finished: Finished, vision_base: ModuleType) -> None:
    folder = finished.folder
    assert f"report: {folder}/report.html" in finished.out
    assert f"run folder: {folder}" in finished.out
    found = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "report.html", "report.json", "data"} == found
    experiment = from_yaml(folder / "config.yaml")
    assert experiment.transformer.width == 32
    assert experiment.train.updates == 6
    (line,) = read_metrics(folder / "metrics.jsonl")
    assert {
        "update", "loss", "target_spread", "prediction_spread", "extractor_spread", "gradient_norm", "learning_rate",
        "teacher_decay", "teacher_rank", "samples_per_second", "tflops", "mfu", "data_wait", "seconds",
    } <= line.keys()  # fmt: skip
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    (place,) = (folder / "checkpoints").glob("update-*")
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}


def test_the_report_stands_alone(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"""url\(\s*["']?\s*(https?:)?//|@import""", page, re.IGNORECASE)
    assert "data:image/" in page
    table: dict[str, Any] = json.loads((finished.folder / "report.json").read_text())
    text = json.dumps(table)
    for row in ("teacher", "student", "random encoder", "raw pixels"):
        assert row in text
        assert row in page


def test_a_finished_run_gives_features(finished: Finished) -> None:
    run = load_run(finished.folder, device="cpu")
    images = torch.zeros(2, 1, 28, 28)
    features = run.features(images)
    assert features.x.shape == (2, 16, 32)
    assert features.shape == (4, 4)
    assert torch.equal(features.x, load_run(finished.folder, device="cpu").features(images).x)


def test_an_interrupted_process_saves_and_the_same_command_continues(
    tmp_path: Path,
    finished: Finished,
    vision_base: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole process group gets the signal, as from a scheduler; loader workers must not mind."""
    shards = glob.escape(str(finished.folder / "data" / "vision"))
    arguments = (
        "--sample", *(one for one in TINY if not one.startswith("train.updates")), "train.updates=100000",
        "data.workers=1", "train.log_every=1", f"data.train={shards}/train-*.tar",
        f"data.validation={shards}/validation-*.tar", f"train.folder={tmp_path}",
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "vision_base.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "metrics.jsonl")) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(60)
    assert process.returncode == 130
    assert "stopping after this update and saving" in err
    assert "Traceback" not in out + err
    found = re.search(r"stopped \(interrupted\) at update (\d+) of 100000; saved in", out)
    assert found is not None
    update = int(found[1])
    assert load_run(tmp_path, device="cpu").update == update
    capsys.readouterr()
    assert command(vision_base, *arguments, "train.max_minutes=1e-9") == 0
    text = capsys.readouterr().out
    assert f"continuing from update {update} of 100000" in text
    assert f"stopped (out of time) at update {update + 1}" in text
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, update + 2))
