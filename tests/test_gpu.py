"""What one CUDA device computes: the CPU's values, in every engine, compiled or not, and after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data2vec.core import Data2Vec, Experiment
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.run.build import build_engine
from data2vec.core.settings.fields import EngineKind, Precision, Switch
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.monitor import read_metrics

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
engines = load_module("engines_for_gpu", HERE / "test_engines.py")
many_ranks = load_module("many_ranks_for_gpu", HERE / "test_many_ranks.py")
scenarios = load_module("scenarios_for_gpu", HERE / "scenarios.py")

DEVICE = "cuda"
UPDATES = 10
ENGINES: dict[str, dict[str, Any]] = {
    **{name: settings for name, settings in engines.ENGINES.items() if name != "torch"},
    "zero2, offloaded": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "zero3, offloaded": {
        "kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    exact_fp32()
    yield
    torch.set_float32_matmul_precision("highest")


def exact_fp32() -> None:
    """Without TF32, which convolutions use unasked."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def on(device: str, name: str, **train: Any) -> Experiment:
    settings = {"device": device, "precision": Precision.FP32, "compile": Switch.OFF, **train}
    experiment: Experiment = scenarios.scenario(name).replace(train=settings)
    return experiment


def values(experiment: Experiment, passes: int = 1) -> torch.Tensor:
    """(updates, 3) losses, gradient norms and spreads of one process."""
    torch.manual_seed(0)
    engine = build_engine(Data2Vec.build(experiment), experiment, Ranks())
    return torch.tensor(engines.train(experiment, engine, range(UPDATES), passes=passes))


@pytest.mark.parametrize("name", engines.NAMES)
def test_a_gpu_computes_what_the_cpu_does(name: str) -> None:
    torch.testing.assert_close(values(on(DEVICE, name)), values(on("cpu", name)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["vision", "vision_v2", "speech_v2", "text"])
def test_compiled_blocks_compute_the_same(name: str) -> None:
    compiled = values(on(DEVICE, name, compile=Switch.ON), passes=2)
    torch.testing.assert_close(compiled, values(on(DEVICE, name), passes=2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["vision_v2", "speech", "text_v2"])
def test_bf16_is_near_fp32(name: str) -> None:
    coarse, fine = values(on(DEVICE, name, precision=Precision.BF16)), values(on(DEVICE, name))
    assert coarse.isfinite().all()
    torch.testing.assert_close(coarse[:, 0], fine[:, 0], rtol=0.05, atol=0.01)


def engine_of(engine: str, name: str, **train: Any) -> Experiment:
    settings = {"bucket_size": 1_000, **ENGINES[engine]}
    return on(DEVICE, name, **train).replace(engine={**settings, "kind": EngineKind(settings["kind"])})


def on_a_rank(engine: str, names: list[str], compiled: bool) -> list[list[list[float]]]:
    exact_fp32()
    switch = Switch.ON if compiled else Switch.OFF
    return [values(engine_of(engine, name, compile=switch), passes=2).tolist() for name in names]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_computes_the_same(engine: str) -> None:
    names = ["vision", "speech_v2", "alternating"]
    (found,) = run_distributed(on_a_rank, 1, engine, names, False, timeout=300.0)
    for name, got in zip(names, found, strict=True):
        torch.testing.assert_close(torch.tensor(got), values(on(DEVICE, name), passes=2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_compiled_engines_compute_the_same(engine: str) -> None:
    """Stage 3 is not compiled, and says so."""
    ((found,),) = run_distributed(on_a_rank, 1, engine, ["vision_v2"], True, timeout=300.0)
    torch.testing.assert_close(torch.tensor(found), values(on(DEVICE, "vision_v2"), passes=2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", *ENGINES])
def test_an_interrupted_run_goes_on(engine: str, tmp_path: Path) -> None:
    scenarios.write_shards(tmp_path / "shards" / "vision", "vision")
    settings = dict(ENGINES.get(engine, {"kind": "torch"}))
    settings["kind"] = EngineKind(settings["kind"])
    changes = {"train": {"device": DEVICE, "precision": Precision.FP32}}
    for folder, stops in (("whole", (many_ranks.UPDATES,)), ("parts", (5, many_ranks.UPDATES))):
        for stop in stops:
            arguments = ("vision", str(tmp_path / "shards"), str(tmp_path / folder), stop, settings, changes)
            run_distributed(many_ranks.train_until, 1, *arguments, timeout=300.0)
    whole, parts = (
        [line["loss"] for line in read_metrics(tmp_path / folder / "metrics.jsonl")] for folder in ("whole", "parts")
    )
    assert len(whole) == many_ranks.UPDATES
    assert parts == pytest.approx(whole, rel=1e-3)
