"""Toy runs that are stopped and continued: the same end, or one error where the settings do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data2vec.core.engines.torch import TorchEngine
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.prepare import open_data
from data2vec.core.testing import load_module
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Ending
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.trainer import Trainer

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))
no_hooks, shards, whole = toy.no_hooks, toy.shards, toy.whole
UPDATES, HOOKS, Silent, write_shards, settings, trained, learned, assert_same, command = (
    toy.UPDATES,
    toy.HOOKS,
    toy.Silent,
    toy.write_shards,
    toy.settings,
    toy.trained,
    toy.learned,
    toy.assert_same,
    toy.command,
)


@pytest.mark.parametrize(
    ("stops", "micro", "workers"),
    [((1,), None, 0), ((4,), None, 1), ((5,), 4, 0), ((2, 3), 4, 1), ((1, 2, 5), 2, 0)],
)
def test_a_continued_run_is_the_uninterrupted_one(
    shards: Path,
    tmp_path: Path,
    whole: Callable[[int | None], Path],
    stops: tuple[int, ...],
    micro: int | None,
    workers: int,
) -> None:
    experiment = settings(tmp_path, shards, micro_batch=micro).replace(data={"workers": workers})
    for stop in stops:
        trainer, ending = trained(experiment, stop)
        assert (trainer.progress.update, ending) == (stop, Ending.INTERRUPTED)
    assert trained(experiment)[1] is Ending.FINISHED
    assert_same(tmp_path, whole(micro))
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, UPDATES + 1))


def test_a_run_that_crashed_repeats_what_was_not_saved(
    shards: Path, tmp_path: Path, whole: Callable[[int | None], Path]
) -> None:
    experiment = settings(tmp_path, shards, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="crash"):
        trained(experiment, crash_after=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 5, "lo')  # cut off
    trained(experiment)
    assert_same(tmp_path, whole(None))


def test_nothing_is_lost_from_the_metrics_between_two_lines(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards, log_every=4, checkpoint_every=3)
    with pytest.raises(RuntimeError, match="crash"):
        trained(experiment, crash_after=5)
    trained(experiment)
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4, 6]


def test_accumulation_is_one_big_batch(shards: Path, tmp_path: Path) -> None:
    still = {"drop_path": 0.0, "dropout": 0.0, "layer_drop": 0.0}
    losses = []
    for micro in (8, 4, 1):
        folder = tmp_path / str(micro)
        experiment = settings(folder, shards, micro_batch=micro).replace(transformer=still)
        train, _ = open_data(experiment, folder)
        torch.manual_seed(0)
        model = Data2Vec.build(experiment)
        model.student.frontend("series").dropout.p = 0.0
        trainer = Trainer(experiment, TorchEngine(model, experiment), train, folder, configuration={}, display=Silent())
        assert trainer.share.passes == 8 // micro
        trainer.run()
        losses.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])
    assert len(losses[0]) == UPDATES
    for other in losses[1:]:  # samples hide 1 to 3 positions: a mean of means would differ by per cents
        assert other == pytest.approx(losses[0], rel=1e-5)
        assert other[0] == pytest.approx(losses[0][0], abs=1e-6)


def test_the_command_stopped_by_time_continues_to_the_same_end(
    shards: Path, tmp_path: Path, whole: Callable[[int | None], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = settings(tmp_path, shards)
    for update in (1, 2):
        assert command(experiment, "train.max_minutes=1e-9") == 0
        text = capsys.readouterr().out
        assert f"stopped (out of time) at update {update} of {UPDATES}" in text
        assert "The same command continues." in text
    assert command(experiment) == 0
    text = capsys.readouterr().out
    assert f"continuing from update 2 of {UPDATES}" in text
    assert (tmp_path / "report.html").is_file()
    tensors, lines, _ = learned(tmp_path)
    expected, expected_lines, _ = learned(whole(None))
    assert all(torch.equal(tensors[name], value) for name, value in expected.items() if name != "random:0/numpy")
    assert lines == expected_lines


def test_a_finished_run_is_evaluated_again_and_not_trained(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards)
    assert command(experiment) == 0
    before = learned(tmp_path)
    (tmp_path / "report.html").unlink()
    updates: list[int] = []
    HOOKS["mask"] = updates.append
    assert command(experiment) == 0
    assert updates == [0]  # the report's picture
    assert (tmp_path / "report.html").is_file()
    after = learned(tmp_path)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]


def test_resume_never_refuses_a_used_folder(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = settings(tmp_path / "run", shards)
    assert command(experiment, "train.resume=never", "train.max_minutes=1e-9") == 0
    assert "train.resume=auto continues" in capsys.readouterr().out
    before = learned(tmp_path / "run")[2]
    assert command(experiment, "train.resume=never") == 2
    assert "train.resume=never: " in capsys.readouterr().err
    assert learned(tmp_path / "run")[2] == before


def test_resume_from_a_named_checkpoint(shards: Path, tmp_path: Path, whole: Callable[[int | None], Path]) -> None:
    """Going back, in another folder and in the same one, ends where the straight run ends."""
    first, second = tmp_path / "first", tmp_path / "second"
    experiment = settings(first, shards, checkpoint_every=2, keep=9)
    trained(experiment)
    place = first / "checkpoints" / "update-000000002"
    state = place / "state.json"
    state.write_text(state.read_text().replace('"configuration": {}', '"configuration": {"yaml": ""}'))
    assert command(experiment, f"train.resume={place}") == 2  # another configuration: the defaults
    shutil.rmtree(first)

    assert command(experiment, "train.max_minutes=1e-9") == 0
    place = first / "checkpoints" / "update-000000001"
    for folder in (second, first):
        assert command(experiment, f"train.resume={place}", f"train.folder={folder}") == 0
        tensors = learned(folder)[0]
        assert all(torch.equal(tensors[k], v) for k, v in learned(whole(None))[0].items() if k != "random:0/numpy")
    assert command(experiment, f"train.resume={tmp_path}/nothing") == 2


def test_a_checkpoint_of_another_configuration_names_what_differs(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = settings(tmp_path, shards)
    assert command(experiment, "train.max_minutes=1e-9") == 0
    before = learned(tmp_path)[2]
    capsys.readouterr()
    assert command(experiment, "optim.lr=0.5", "transformer.width=32", "data.shuffle_shards=3") == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for part in ("optim.lr: 0.01 there, 0.5 now", "transformer.width: 16 there, 32 now", "data.shuffle_shards: 16"):
        assert part in error
    assert learned(tmp_path)[2] == before


def test_settings_that_do_not_change_the_result_may_change(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = settings(tmp_path / "run", shards)
    assert command(experiment, "train.max_minutes=1e-9") == 0
    moved = shutil.copytree(shards, tmp_path / "moved")
    free = (
        "train.micro_batch=4", "data.workers=1", "train.max_minutes=5", f"data.train={moved}/train-*.tar",
        f"data.validation={moved}/validation-*.tar", "train.log_every=3", "train.keep=1", "evaluation.tasks=[rank]",
    )  # fmt: skip
    assert command(experiment, *free) == 0
    assert "continuing from update 1" in capsys.readouterr().out
    assert learned(tmp_path / "run")[2]["update"] == UPDATES


def test_a_run_continues_to_another_end_where_that_is_asked_for(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = settings(tmp_path, shards)
    assert command(experiment) == 0
    before = read_metrics(tmp_path / "metrics.jsonl")
    capsys.readouterr()
    assert command(experiment, "train.updates=9") == 2
    error = capsys.readouterr().err
    assert "train.updates: 6 there, 9 now" in error
    assert "train.new_end=true continues it to another end" in error
    assert command(experiment, "train.updates=9", "train.new_end=true", "optim.lr=0.5") == 2  # nothing else may change
    assert "optim.lr: 0.01 there, 0.5 now" in capsys.readouterr().err
    assert command(experiment, "train.updates=9", "train.new_end=true", "train.max_minutes=1e-9") == 0
    shown = capsys.readouterr().out
    assert "the run ends at update 9 instead of 6; the learning rate" in shown
    assert "stopped (out of time) at update 7 of 9" in shown
    assert command(experiment, "train.updates=9") == 0  # from now on 9 is the run's own end
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[: len(before)] == before
    longer = experiment.replace(train={"updates": 9}).optim
    rates = {line["update"]: line["learning_rate"] for line in lines if line["update"] > 6}
    assert rates == {update: learning_rate(longer, update - 1, 9) for update in (7, 8, 9)}


def test_a_run_does_not_end_before_where_it_is(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = settings(tmp_path, shards)
    assert command(experiment) == 0
    assert command(experiment, "train.updates=5", "train.new_end=true") == 2
    error = capsys.readouterr().err
    assert "train.updates=5: " in error
    assert "has 6 already; choose a later end" in error


def test_evaluation_during_training_builds_no_other_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    original = Data2Vec.build.__func__

    def build(cls: type[Data2Vec], *arguments: object) -> Data2Vec:
        built.append(1)
        return original(cls, *arguments)

    monkeypatch.setattr(Data2Vec, "build", classmethod(build))
    assert command(settings(tmp_path, shards), "evaluation.every=2", "evaluation.tasks=[knn]") == 0
    scored = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "teacher_knn" in line]
    assert len(scored) == 3
    assert len(built) == 2  # the run's, and for the final table the untrained one


@pytest.mark.parametrize("part", ["another count", "fewer"])
def test_a_checkpoint_of_other_shards_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    experiment = settings(tmp_path / "run", shards)
    assert command(experiment, "train.max_minutes=1e-9") == 0
    if part == "fewer":
        spec = f"{shards}/train-00000[01].tar"
    else:
        spec = f"{write_shards(tmp_path / 'other', 'train', 61)}/train-*.tar"
    assert command(experiment, f"data.train={spec}") == 2
    error = capsys.readouterr().err
    assert "was made with other shards than" in error
    assert "Traceback" not in error
