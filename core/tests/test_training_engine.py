"""The engine of one process: decay, clipping, schedule, devices, what stops a run, and its arithmetic."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data2vec.core.batch import Batch
from data2vec.core.checkpoints import checkpoint
from data2vec.core.distributed.device import choose_device
from data2vec.core.engines import engine
from data2vec.core.engines.optimiser import build_optimiser, set_rate
from data2vec.core.engines.torch import TorchEngine
from data2vec.core.errors import ConfigError, TrainingError
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.prepare import open_data
from data2vec.core.settings.fields import OptimConfig, Switch
from data2vec.core.task import Group, Step, Task
from data2vec.core.testing import load_module
from data2vec.core.training.flops import matmul_rate, step_flops
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Ending
from data2vec.core.training.schedule import learning_rate
from data2vec.core.training.trainer import Trainer

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))
no_hooks, shards = toy.no_hooks, toy.shards
LENGTH, UPDATES, HOOKS, Silent, settings, trained, tiny, some_batch = (
    toy.LENGTH,
    toy.UPDATES,
    toy.HOOKS,
    toy.Silent,
    toy.settings,
    toy.trained,
    toy.tiny,
    toy.some_batch,
)


def test_what_is_decayed() -> None:
    _, model = tiny()
    groups = {group.weight_decay: group.parameters for group in model.groups(OptimConfig(weight_decay=0.3))}
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


def test_clipping_bounds_the_gradient() -> None:
    norms = []
    for clip in (None, 1e-3):
        experiment, model = tiny()
        one = TorchEngine(model, experiment.replace(optim={"clip": clip}))
        prepared = model.prepare(some_batch(), seed=0, update=0)
        one.accumulate(prepared, scale=1.0 / prepared.count, update=0)
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
            choose_device(name)


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


def test_a_run_with_rare_log_lines_stops_in_time(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards, updates=200, log_every=200, checkpoint_every=1000)
    train, _ = open_data(experiment, tmp_path)
    model = Data2Vec.build(experiment)
    trainer = Trainer(experiment, TorchEngine(model, experiment), train, tmp_path, configuration={}, display=Silent())

    def spoil(update: int) -> None:
        if update == 33:
            model.student.transformer.blocks[0].feed_forward.fc1.weight.data.fill_(float("nan"))

    HOOKS["mask"] = spoil
    with pytest.raises(TrainingError, match=r"update 34: .* is not finite"):
        trainer.run()
    assert trainer.progress.update <= 34 + 50


# Arithmetic


def test_step_flops_are_those_counted_by_hand() -> None:
    depth, width, hidden, batch = 3, 32, 64, 4
    _, model = tiny(depth=depth, width=width, drop_path=0.0, layer_drop=0.0)
    some = model.prepare(some_batch(batch), seed=0, update=0)
    rows = batch * (LENGTH + 2)
    block = 2 * rows * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * batch * (LENGTH + 2) ** 2 * width
    extract = 2 * batch * LENGTH * 3 * width
    predict = 2 * some.count * width * width
    # Backward is twice forward, but for the input, whose gradient nobody needs, and for attention, whose scores are
    # computed again. The teacher only goes forward.
    by_hand = depth * (4 * block + (1 + 2.5 + 1) * attention) + 3 * predict + 2 * extract
    assert step_flops(model, some) == pytest.approx(by_hand, rel=0.01)


def test_measuring_leaves_gradients_and_generators_alone() -> None:
    _, model = tiny()
    some = model.prepare(some_batch(), seed=0, update=0)
    first = next(p for p in model.parameters() if p.requires_grad)
    gradient = torch.ones_like(first)
    first.grad = gradient
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert step_flops(model, some) > 0
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
    assert first.grad is gradient
    assert torch.equal(gradient, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Late(Task[Any]):
    """Two weights, of which one begins to learn after two updates."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def prepare(self, batch: Batch, *, seed: int, update: int) -> Any:
        raise AssertionError

    def forward(self, prepared: Any, *, seed: int = 0, update: int = 0) -> Step:
        raise AssertionError

    def groups(self, optim: OptimConfig) -> list[Group]:
        return [Group((self.early,), 0.1), Group((self.late,), 0.1, 0.5, starts=2)]


def test_a_group_may_start_later() -> None:
    """Until then nothing moves it, neither its gradient nor its weight decay; its rate is a share of the others'."""
    task = Late()
    optimiser = build_optimiser(task, OptimConfig(lr=0.01, eps=1e-12))
    for update in (1, 2, 3):
        task.early.grad, task.late.grad = torch.ones(3), torch.ones(3)
        set_rate(optimiser.param_groups, 0.01, update)
        before = task.early.detach().clone(), task.late.detach().clone()
        optimiser.step()
        after = task.early.detach(), task.late.detach()
        moved = [float((was - now).abs().max()) for was, now in zip(before, after, strict=True)]
        assert moved[0] == pytest.approx(0.011, rel=0.02)
        assert moved[1] == (0 if update <= 2 else pytest.approx(0.0055, rel=0.02))
