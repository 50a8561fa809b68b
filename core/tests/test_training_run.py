"""A toy modality trained, stopped, continued, interrupted and loaded: everything between ``main`` and the model."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimConfig,
    PredictorConfig,
    Switch,
    TargetsConfig,
    TeacherConfig,
    TrainConfig,
    TransformerConfig,
)
from data2vec.core.data.shards import ShardWriter
from data2vec.core.errors import CheckpointError, ConfigError, TrainingError
from data2vec.core.loading import load_run
from data2vec.core.modality import Decoder, Masker, Modality
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.encoder import Extractor, Frontend, Tokens
from data2vec.core.model.random import sample_keys, uniform
from data2vec.core.overrides import to_yaml
from data2vec.core.run import main, open_data
from data2vec.core.training import checkpoint, engine
from data2vec.core.training.engine import TorchEngine, parameter_groups
from data2vec.core.training.flops import matmul_rate, step_flops
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.trainer import Ending, Trainer, hide

LENGTH = 6
UPDATES = 6
HOOKS: dict[str, Callable[[int], None]] = {}  # what a test does at a point of the run: "mask", "evaluate", "write"


def reached(point: str, number: int = 0) -> None:
    if point in HOOKS:
        HOOKS[point](number)


@pytest.fixture(autouse=True)
def no_hooks() -> Iterator[None]:
    yield
    HOOKS.clear()


class Frames(Extractor):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        return Tokens(self.proj(inputs), (inputs.shape[1],))

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        return (inputs.shape[1],), None


class HalfMasker:
    """Hides half of the positions of each sample, or one, two or three of them."""

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        reached("mask", update)
        keys = sample_keys(ids, seed=seed, update=update)
        ranks = uniform(keys, LENGTH).argsort(1).argsort(1)
        return (ranks < 1 + (keys % 3).abs().unsqueeze(1)).unsqueeze(1)


@dataclass(frozen=True)
class SeriesDecoder:
    train: bool

    def __call__(self, sample: Sample, seed: int) -> Example:
        x = torch.from_numpy(np.frombuffer(sample.members["raw"], dtype=np.float32).copy()).view(LENGTH, 3)
        label = int(sample.members["cls"])
        return Example(x + 0.1 * torch.randn(x.shape) if self.train else x, label)


@dataclass(frozen=True)
class Series(Modality):
    name: ClassVar[str] = "series"
    extensions: ClassVar[tuple[str, ...]] = ("raw",)

    @property
    def predictor_config(self) -> PredictorConfig:
        return PredictorConfig()

    @property
    def uses_mask_token(self) -> bool:
        return True

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        width = transformer.width
        return Frontend(Frames(width), width=width, prefix_tokens=2, input_norm=nn.LayerNorm(width), dropout=0.1)

    def build_masker(self) -> Masker:
        return HalfMasker()

    def build_decoder(self, *, train: bool) -> Decoder:
        return SeriesDecoder(train)

    def write_sample_shards(self, folder: Path) -> None:
        reached("write")
        write_shards(folder, "train", 60)
        write_shards(folder, "validation", 30)

    def raw_features(self, batch: Batch) -> Tensor:
        reached("evaluate")
        return batch.inputs.flatten(1)


def write_shards(folder: Path, prefix: str, count: int, per_shard: int = 17) -> Path:
    generator = np.random.default_rng(3)
    with ShardWriter(folder, prefix, "series", samples_per_shard=per_shard) as writer:
        for i in range(count):
            x = generator.normal(size=(LENGTH, 3)) + i % 3
            writer.write(f"{i:04d}", {"raw": x.astype(np.float32).tobytes(), "cls": str(i % 3).encode()})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", 60)
    write_shards(folder, "validation", 30)
    return folder


def settings(folder: Path, shards: Path | None = None, **train: Any) -> Experiment:
    """A run in which everything that draws random numbers is switched on."""
    return Experiment(
        name="toy",
        modalities={"series": Series()},
        transformer=TransformerConfig(
            depth=3, width=16, heads=2, mlp_ratio=2.0, drop_path=0.3, layer_drop=0.2, dropout=0.1, layer_scale=0.5
        ),
        teacher=TeacherConfig(decay_start=0.9, decay_end=0.99, decay_updates=5),
        targets=TargetsConfig(top_k=2),
        optim=OptimConfig(lr=1e-2, warmup=3, clip=1.0),
        data=DataConfig(
            train=f"{shards}/train-*.tar" if shards else None,
            validation=f"{shards}/validation-*.tar" if shards else None,
            workers=0,
        ),
        train=TrainConfig(
            **{"updates": UPDATES, "batch": 8, "device": "cpu", "folder": str(folder), "log_every": 1, **train}
        ),
        evaluation=EvaluationConfig(tasks=("rank",)),
    )


class Silent:
    def update(self, line: Any, updates: int) -> None:
        pass


def trained(
    experiment: Experiment, stop_after: int | None = None, *, crash_after: int | None = None
) -> tuple[Trainer, Ending]:
    """Train from where the folder is, to the end or to an update."""
    folder = Path(str(experiment.train.folder))
    train, _ = open_data(experiment, folder / "cache")
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(experiment.train.seed)

    def stop() -> bool:
        if trainer.progress.update == crash_after:
            raise RuntimeError("crash")
        return trainer.progress.update == stop_after

    trainer = Trainer(
        experiment,
        TorchEngine(Data2Vec.build(experiment), experiment),
        train,
        folder,
        configuration={},
        display=Silent(),
        stop_requested=stop,
    )
    place = checkpoint.latest(trainer.checkpoints)
    if place is not None:
        torch.manual_seed(99)  # what a new process happens to have; restoring must undo it
        random.seed(99)
        np.random.seed(99)
        trainer.restore(checkpoint.load(place))
    return trainer, trainer.run()


MEASURED = ("samples_per_second", "data_wait", "seconds", "tflops", "mfu", "teacher_rank")


def learned(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Any]]:
    """What a run has come to: every saved tensor, the metrics without timings, and the generators' states."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    saved = checkpoint.load(place)
    tensors = {f"{part}:{name}": value for part, values in saved.tensors.items() for name, value in values.items()}
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]
    state = {key: saved.state[key] for key in ("local", "health", "update")}
    return tensors, lines, {**state, "positions": saved.state["progress"]["positions"]}


def assert_same(one: Path, other: Path) -> None:
    (tensors, lines, state), (tensors_2, lines_2, state_2) = learned(one), learned(other)
    assert tensors.keys() == tensors_2.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, tensors_2[name])]
    assert not different
    assert lines == lines_2
    assert state == state_2


def command(experiment: Experiment, *overrides: str, sample: Experiment | None = None) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(experiment, sample, argv=overrides)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Path]:
    """Folders of uninterrupted runs by micro-batch."""
    folders: dict[int | None, Path] = {}

    def folder(micro: int | None) -> Path:
        if micro not in folders:
            folders[micro] = tmp_path_factory.mktemp("whole")
            assert trained(settings(folders[micro], shards, micro_batch=micro))[1] is Ending.FINISHED
        return folders[micro]

    return folder


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
    assert all(torch.equal(tensors[name], value) for name, value in expected.items() if name != "random:numpy")
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
        assert all(torch.equal(tensors[k], v) for k, v in learned(whole(None))[0].items() if k != "random:numpy")
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


# Ctrl-C and SIGTERM


class Exited(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    return codes


def at(update: int, *signals: int) -> Callable[[int], None]:
    def hook(number: int) -> None:
        if number == update:
            for one in signals:
                signal.raise_signal(one)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    shards: Path,
    tmp_path: Path,
    whole: Callable[[int | None], Path],
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    experiment = settings(tmp_path, shards)
    HOOKS["mask"] = at(3, number)  # while update 4 is made
    assert command(experiment) == 130
    text = capfd.readouterr()
    assert "stopping after this update and saving; once more to exit at once" in text.err
    assert f"stopped (interrupted) at update 4 of {UPDATES}" in text.out
    assert "Traceback" not in text.err + text.out
    assert learned(tmp_path)[2]["update"] == 4
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    HOOKS.clear()
    assert command(experiment) == 0
    tensors = learned(tmp_path)[0]
    assert all(torch.equal(tensors[k], v) for k, v in learned(whole(None))[0].items() if k != "random:numpy")


def test_a_second_signal_exits_at_once(shards: Path, tmp_path: Path, exit_codes: list[int]) -> None:
    HOOKS["mask"] = at(3, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(Exited):
        main(settings(tmp_path, shards, checkpoint_every=2), argv=[])
    assert exit_codes == [130]
    assert learned(tmp_path)[2]["update"] == 2  # what had been saved is there


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_second_signal_while_saving_leaves_the_last_checkpoint(
    shards: Path, tmp_path: Path, exit_codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save_file

    def interrupted(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        if HOOKS:
            os.kill(os.getpid(), signal.SIGINT)
            raise SystemExit  # the thread that writes goes with the process

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    experiment = settings(tmp_path, shards)
    assert command(experiment, "train.max_minutes=1e-9") == 0
    HOOKS["mask"] = at(3, signal.SIGINT)
    with pytest.raises(Exited):
        main(experiment, argv=[])
    assert exit_codes == [130]
    assert learned(tmp_path)[2]["update"] == 1
    HOOKS.clear()
    assert command(experiment) == 0


def test_a_signal_during_the_last_update_ends_before_evaluation(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    HOOKS["mask"] = at(UPDATES - 1, signal.SIGINT)
    HOOKS["evaluate"] = lambda _: pytest.fail("evaluated")
    assert command(settings(tmp_path, shards)) == 130
    assert learned(tmp_path)[2]["update"] == UPDATES


def test_a_signal_during_evaluation_ends_soon(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], exit_codes: list[int]
) -> None:
    experiment = settings(tmp_path, shards)
    HOOKS["evaluate"] = at(0, signal.SIGINT)
    assert command(experiment) == 130
    text = capfd.readouterr()
    assert "interrupted; the trained model is saved in" in text.out
    assert "Traceback" not in text.err + text.out
    assert not (tmp_path / "report.html").exists()
    HOOKS["evaluate"] = at(0, signal.SIGTERM, signal.SIGTERM)
    assert command(experiment) == 130  # the first raises before the second can be sent
    assert exit_codes == []
    HOOKS.clear()
    assert command(experiment) == 0


def test_a_signal_before_training_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment = settings(tmp_path / "run")
    HOOKS["write"] = at(0, signal.SIGINT)
    assert command(experiment, sample=experiment) == 130
    text = capfd.readouterr()
    assert "interrupted before training began" in text.out
    assert "Traceback" not in text.err + text.out
    assert not (tmp_path / "run").exists()
    HOOKS.clear()
    assert command(experiment, sample=experiment) == 0


# The engine


def tiny(**transformer: Any) -> tuple[Experiment, Data2Vec]:
    torch.manual_seed(0)
    experiment = settings(Path("unused")).replace(transformer=transformer)
    return experiment, Data2Vec.build(experiment)


def some_batch(count: int = 4) -> Batch:
    inputs = torch.randn(count, LENGTH, 3, generator=torch.Generator().manual_seed(2))
    return Batch("series", inputs, torch.arange(count), torch.full((count,), -1))


def test_what_is_decayed() -> None:
    _, model = tiny()
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.3)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in groups[rate]} for rate in (0.3, 0.0))
    assert all(name.endswith("weight") for name in decayed)
    assert {
        "mask_tokens.series", "student.frontends.series.prefix", "student.transformer.norm.weight",
        "student.transformer.blocks.0.scale1", "student.transformer.blocks.2.norm1.weight",
        "student.transformer.blocks.1.feed_forward.fc1.bias",
    } <= kept  # fmt: skip
    assert {"student.transformer.blocks.0.feed_forward.fc1.weight", "predictors.series.layers.0.weight"} <= decayed
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | kept == trained_names
    assert not decayed & kept
    assert not any(name.startswith("teacher") for name in trained_names)
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.3)] == [0.0]


def test_clipping_bounds_the_gradient() -> None:
    norms = []
    for clip in (None, 1e-3):
        experiment, model = tiny()
        one = TorchEngine(model, experiment.replace(optim={"clip": clip}))
        batch = some_batch()
        mask = hide(model, Series(), HalfMasker(), batch, seed=0, update=0)[1]
        one.forward_backward(batch, mask, count=mask.count, update=0)
        seen: list[float] = []
        step = one.optimiser.step

        def watched(step: Any = step, model: Data2Vec = model, seen: list[float] = seen) -> None:
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.cat(gradients).norm()))
            step()

        one.optimiser.step = watched  # type: ignore[method-assign, assignment]
        norms.append((float(one.step(1e-3, 1)), *seen))
        assert all(p.grad is None for p in model.parameters())
    (reported, unclipped), (reported_2, clipped) = norms
    assert reported == pytest.approx(unclipped, rel=1e-5)
    assert reported_2 == pytest.approx(reported, rel=1e-5)  # what is reported is the norm before clipping
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert unclipped > 10 * clipped


def test_the_learning_rate_of_every_update_is_the_schedule(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards)
    used: list[float] = []
    train, _ = open_data(experiment, tmp_path)
    one = TorchEngine(Data2Vec.build(experiment), experiment)
    hook = one.optimiser.register_step_pre_hook(lambda optimiser, *_: used.append(optimiser.param_groups[-1]["lr"]))
    Trainer(experiment, one, train, tmp_path, configuration={}, display=Silent()).run()
    hook.remove()
    expected = [learning_rate(experiment.optim, update, UPDATES) for update in range(UPDATES)]
    assert used == expected
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")] == expected


def test_compile_without_a_compiler_warns_once_and_runs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    experiment = settings(tmp_path, shards, compile=Switch.ON, updates=3)
    with caplog.at_level(logging.WARNING):
        assert trained(experiment)[1] is Ending.FINISHED
    assert [r.message for r in caplog.records if "compile" in r.message] == [
        "torch.compile needs a C++ compiler and none is installed: running without it"
    ]


def test_a_device_that_is_not_there_is_one_error() -> None:
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ConfigError, match=rf"train\.device={name}: not usable here .*choose auto or cpu"):
            engine.choose_device(name)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards, log_every=100, checkpoint_every=2)
    train, _ = open_data(experiment, tmp_path)
    model = Data2Vec.build(experiment)
    trainer = Trainer(experiment, TorchEngine(model, experiment), train, tmp_path, configuration={}, display=Silent())

    def spoil(update: int) -> None:
        if update == 3:  # the teacher alone: the run's own state at the next save would be useless
            model.teacher.encoder.transformer.blocks[2].feed_forward.fc2.bias.data.fill_(float("nan"))

    HOOKS["mask"] = spoil
    place = f"{tmp_path}/checkpoints/update-000000002"
    with pytest.raises(TrainingError, match="first to fail was the teacher") as error:
        trainer.run()
    assert f"The last good checkpoint is {place}." in str(error.value)
    saved = checkpoint.load(Path(place))
    assert all(value.isfinite().all() for value in saved.tensors["model"].values())
    assert checkpoint.latest(tmp_path / "checkpoints") == Path(place)


# Arithmetic


def test_step_flops_are_those_counted_by_hand() -> None:
    depth, width, hidden, batch = 3, 32, 64, 4
    _, model = tiny(depth=depth, width=width, drop_path=0.0, layer_drop=0.0)
    some = some_batch(batch)
    mask = hide(model, Series(), HalfMasker(), some, seed=0, update=0)[1]
    rows = batch * (LENGTH + 2)
    block = 2 * rows * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * batch * (LENGTH + 2) ** 2 * width
    extract = 2 * batch * LENGTH * 3 * width
    predict = 2 * mask.count * width * width
    # Backward is twice forward, but for the input, whose gradient nobody needs, and for attention, whose scores are
    # computed again. The teacher only goes forward.
    by_hand = depth * (4 * block + (1 + 2.5 + 1) * attention) + 3 * predict + 2 * extract
    assert step_flops(model, some, mask) == pytest.approx(by_hand, rel=0.01)


def test_measuring_leaves_gradients_and_generators_alone() -> None:
    _, model = tiny()
    some = some_batch()
    mask = hide(model, Series(), HalfMasker(), some, seed=0, update=0)[1]
    first = next(p for p in model.parameters() if p.requires_grad)
    gradient = torch.ones_like(first)
    first.grad = gradient
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert step_flops(model, some, mask) > 0
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
    assert first.grad is gradient
    assert torch.equal(gradient, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# Loading


def test_a_loaded_run_gives_the_features_of_the_trained_model(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards, checkpoint_every=4)
    trainer, _ = trained(experiment)
    (tmp_path / "config.yaml").write_text(to_yaml(experiment))
    batch = some_batch()
    state = torch.get_rng_state()
    loaded = load_run(tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.update, loaded.experiment) == (UPDATES, experiment)
    for layers in ("top_k", "last", 1):
        for of in ("teacher", "student"):
            expected = trainer.engine.model.features(batch, layers=layers, of=of)
            found = loaded.features(batch.inputs, layers=layers, of=of)
            assert torch.equal(found.x, expected.x)
            assert found.shape == (LENGTH,)
    assert not loaded.model.training
    earlier = load_run(tmp_path / "checkpoints" / "update-000000004", device="cpu")
    assert earlier.update == 4
    assert not torch.equal(earlier.features(batch.inputs).x, loaded.features(batch.inputs).x)


def test_what_cannot_be_loaded_says_why(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no run there \(it has no config.yaml\)"):
        load_run(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("name: toy\n")
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        load_run(tmp_path)
    experiment = settings(tmp_path, shards, updates=3)
    trained(experiment)
    with pytest.raises(ConfigError, match="modalities: none"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(experiment.replace(transformer={"mlp_ratio": 1.0})))
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_run(tmp_path)
