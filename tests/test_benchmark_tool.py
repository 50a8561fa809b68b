"""tools/benchmark.py: every command on tiny settings. Times are never judged, only that the figures fit together."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "benchmark.py"
EXPERIMENTS = ", ".join(sorted(file.stem for file in TOOL.parents[1].glob("experiments/*.py")))
TINY = [
    "transformer.depth=2", "transformer.width=32", "transformer.heads=2", "targets.top_k=2",
    "vision.image_size=28", "vision.mask.min_block=2",
]  # fmt: skip
TINY_TRANSFORMER = ["transformer.depth=1", "transformer.width=32", "transformer.heads=2", "targets.top_k=1"]


@pytest.fixture(scope="module")
def tool() -> Any:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(TOOL.parent)  # as when the file is run
    spec = importlib.util.spec_from_file_location("benchmark_tool_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    patch.undo()


def run(tool: ModuleType, folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "result.json"
    assert tool.main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["command"] == arguments[0]
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["torch"].startswith("2.")
    return result


def test_step(tool: ModuleType, tmp_path: Path, capsys) -> None:
    command = ["step", "vision_base", "--sample", "--device", "cpu", "--batch", "3", "--steps", "2", *TINY]
    result = run(tool, tmp_path, *command)
    settings, (row,) = result["settings"], result["rows"]
    assert (settings["batch"], settings["device"], settings["precision"]) == (3, "cpu", "fp32")
    assert settings["overrides"] == TINY
    assert settings["parameters"] > 2 * 12 * 32**2  # two blocks and more
    assert row["variant"] == "eager"
    assert row["ratio"] == 1
    assert row["samples_per_second"] == pytest.approx(3 / (row["step_ms"] / 1e3))
    assert row["forward_backward_ms"] + row["update_ms"] == pytest.approx(row["step_ms"])  # of two steps: the mean
    assert row["tflops"] == pytest.approx(settings["gflop_per_sample"] / 1e3 * row["samples_per_second"])
    assert row["mfu"] == pytest.approx(row["tflops"] / settings["matmul_tflops"])
    # Student forward and backward (three times a forward), teacher forward: 4 x 2 x parameters of blocks x positions.
    assert settings["gflop_per_sample"] > 4 * 2 * (2 * 12 * 32**2) * 17 / 1e9 * 0.9
    printed = capsys.readouterr().out
    assert "MFU" in printed
    assert "images/s" in printed
    assert row["units_per_second"] == row["samples_per_second"]  # a sample is an image


@pytest.mark.parametrize(
    ("experiment", "overrides", "unit", "per_sample"),
    [
        # 24 tokens, of the bytes that stand for text where there is no tokenizer
        ("text_base", ["text.vocabulary=300", "text.block=24"], "tokens", 24),
        # a clip is as long as the recipe crops to, here half a second
        ("speech_base", ["speech.audio.max_length=8000", "speech.positions.depth=1"], "audio s", 0.5),
    ],
)
def test_a_step_of_text_and_of_speech(
    tool: ModuleType, tmp_path: Path, experiment: str, overrides: list[str], unit: str, per_sample: float, capsys
) -> None:
    command = ["step", experiment, "--sample", "--device", "cpu", "--batch", "3", "--steps", "2"]
    result = run(tool, tmp_path, *command, *TINY_TRANSFORMER, *overrides)
    settings, (row,) = result["settings"], result["rows"]
    assert (settings["experiment"], settings["batch"]) == (f"{experiment}_sample", 3)
    assert settings["parameters"] > 12 * 32**2  # a block and more
    assert row["samples_per_second"] == pytest.approx(3 / (row["step_ms"] / 1e3))
    assert row["units_per_second"] == pytest.approx(per_sample * row["samples_per_second"])
    assert settings["gflop_per_sample"] > 4 * 2 * (12 * 32**2) * 24 / 1e9 * 0.9  # both have 24 positions
    printed = capsys.readouterr().out
    assert f"{unit}/s" in printed
    assert f"{experiment}_sample: " in printed


@pytest.mark.parametrize(
    ("command", "batch"), [(["vision_base"], 4), (["vision_base", "--sample"], 128), (["--batch", "7"], 7)]
)
def test_the_batch_of_a_step(tool: ModuleType, command: list[str], batch: int) -> None:
    arguments = tool._arguments(["step", *command, "--device", "cpu"])
    step = sys.modules["benchmarks.step"]
    chosen = step.chosen_experiment(arguments.experiment, sample=arguments.sample, overrides=arguments.overrides)
    assert step.sized(chosen, arguments).train.batch == batch


def test_settings_may_stand_among_the_options(tool: ModuleType) -> None:
    arguments = tool._arguments(["step", "train.seed=1", "--batch", "2", "optim.lr=1e-3"])
    assert (arguments.experiment, arguments.overrides) == ("vision_base", ["train.seed=1", "optim.lr=1e-3"])


def test_an_experiment_that_imports_its_neighbour(tool: ModuleType) -> None:
    chosen = sys.modules["recipes"].chosen_experiment("vision_base_v2", sample=False, overrides=[])
    assert chosen.name == "vision_base_v2"
    assert str(TOOL.parents[1] / "experiments") not in sys.path


def test_a_users_own_experiment_file(tool: ModuleType, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("from data2vec.core import Experiment\nexperiment = Experiment(name='mine')\n")
    recipe = sys.modules["recipes"]
    assert recipe.chosen_experiment(str(own), sample=False, overrides=["train.seed=5"]).train.seed == 5
    assert tool.main(["step", str(own), "--sample"]) == 2  # it defines no sample


def test_masks(tool: ModuleType, tmp_path: Path) -> None:
    result = run(tool, tmp_path, "masks", "--batch", "2", "--grid", "6", "--masks", "1", "2", "--rounds", "1")
    assert [(row["masker"], row["masks"]) for row in result["rows"]] == [
        ("block", 1), ("block", 2), ("inverse_block", 1), ("inverse_block", 2),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["vectorised_ms"] > 0
        assert row["ratio"] == pytest.approx(row["loop_ms"] / row["vectorised_ms"])


def test_loader(tool: ModuleType, tmp_path: Path) -> None:
    tiny = ["--sample", "--workers", "0", "1", "--batch", "4", "--samples", "8", "--images", "12", "--rounds", "1"]
    result = run(tool, tmp_path, "loader", *tiny)
    assert [row["loader"] for row in result["rows"]] == ["plain loop", "0 workers", "1 workers"]
    assert result["settings"]["samples_of_set"] == 12
    plain = result["rows"][0]["samples_per_second"]
    for row in result["rows"]:
        assert row["samples_per_second"] > 0
        assert row["ratio"] == pytest.approx(row["samples_per_second"] / plain)


def test_loader_of_given_shards(tool: ModuleType, tmp_path: Path) -> None:
    spec = sys.modules["benchmarks.loader"]._made_shards(tmp_path, 8, 24)
    tiny = ["--sample", "--workers", "0", "--batch", "4", "--samples", "8", "--rounds", "1"]
    result = run(tool, tmp_path, "loader", spec, *tiny)
    assert result["settings"]["shards"] == spec
    assert result["settings"]["samples_of_set"] == 8


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["step", "no_such_recipe"], f"no_such_recipe: no such experiment; choose one of {EXPERIMENTS}, or"),
        (["step", "vision_base", "optim.lrate=1"], "optim.lrate"),
        (["step", "vision_base", "--device", "nowhere"], "train.device=nowhere"),
        (["loader", "no-such-*.tar"], "no-such-*.tar"),
    ],
)
def test_bad_input_is_one_error(tool: ModuleType, command: list[str], words: str, capsys) -> None:
    assert tool.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [["masks", "extra=1"], ["step", "--nothing"], []])
def test_unknown_arguments(tool: ModuleType, command: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(command)


@pytest.mark.parametrize("command", [[], ["step"], ["masks"], ["loader"]])
def test_every_command_has_help(tool: ModuleType, command: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main([*command, "--help"])
    assert "usage: benchmark.py" in capsys.readouterr().out
