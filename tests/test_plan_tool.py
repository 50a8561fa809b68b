"""tools/plan.py: its memory and exchange against what two ranks allocate and send, its arithmetic, its command."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data2vec.core import Data2Vec, Experiment
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.run.build import build_engine
from data2vec.core.settings.fields import EngineConfig, EngineKind, Precision, TrainConfig
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.testing import load_module, run_distributed
from data2vec.core.training.flops import step_flops

TOOL = Path(__file__).parents[1] / "tools" / "plan.py"
BUCKET = 50_000
PASSES = 2
scenarios = load_module("scenarios_of_plans", Path(__file__).with_name("scenarios.py"))


def experiment_of(name: str) -> Experiment:
    """Some 500,000 parameters, so that no constant of DeepSpeed's decides."""
    shape = {"width": 144, "heads": 4, "depth": 2, "layer_drop": 0.0}
    small: Experiment = scenarios.scenario(name).replace(transformer=shape, engine={"bucket_size": BUCKET})
    return small


@pytest.fixture(scope="module")
def tool() -> Any:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(TOOL.parent)  # as when the file is run
    module: Any = load_module("plan_tool_under_test", TOOL)
    traced, trace = {}, module.trace

    def once(experiment: Experiment) -> Any:
        """Tracing takes a second, and neither batch nor engine changes what it finds."""
        train = TrainConfig(precision=experiment.train.precision)
        key = to_yaml(replace(experiment, train=train, engine=EngineConfig()))
        if key not in traced:
            traced[key] = trace(experiment)
        return traced[key]

    module.trace = once
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "planning")]:
        del sys.modules[name]
    del sys.modules["plan_tool_under_test"]
    patch.undo()


def part(name: str) -> ModuleType:
    return importlib.import_module(f"planning.{name}")


def live() -> dict[int, Any]:
    """Every storage of a tensor that is alive."""
    gc.collect()
    found: dict[int, Any] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            gradient = thing.grad if thing.is_leaf else None
            for tensor in (thing, gradient):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage
    found.pop(0, None)
    return found


def counted(sent: Counter[str]) -> None:
    """Make torch's collectives count the bytes of what they sum, gather and scatter, whole."""
    import torch.distributed as dist

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if tensors[0].dtype is torch.float32:  # statistics are float64
                sent[name] += max(tensor.nbytes for tensor in tensors)
            return original(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, counting(name, getattr(dist, name)))


def on_a_rank(name: str, engines: list[tuple[str, int]]) -> list[dict[str, int]]:
    """Bytes after backward and after a step, and bytes exchanged in an update, with each engine."""
    import torch.distributed as dist

    sent: Counter[str] = Counter()
    counted(sent)
    results = []
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    for kind, stage in engines:
        before = live()  # which stay alive, so that no new storage takes their place
        experiment = experiment_of(name).replace(engine={"kind": EngineKind(kind), "zero_stage": stage})
        torch.manual_seed(0)
        engine: Any = build_engine(Data2Vec.build(experiment), experiment, ranks)
        engine.task.train()
        found: dict[str, int] = {}
        for update in range(2):
            sent.clear()
            for number in range(PASSES):
                first = 2 * number + ranks.rank
                batch = scenarios.batch_of(experiment, update, slice(first, first + 1))
                prepared = engine.task.prepare(batch, seed=3, update=update)
                engine.accumulate(prepared, scale=0.25 / prepared.count, update=update)
            if hasattr(engine, "_engine"):
                engine._engine.module.given = None  # the loss, and the graph it holds
            del batch, prepared
            found["backward"] = sum(s.nbytes() for key, s in live().items() if key not in before)
            engine.step(1e-3, update + 1)
        found["step"] = sum(s.nbytes() for key, s in live().items() if key not in before)
        results.append(found | dict(sent))
        del engine
    return results


def test_two_ranks_allocate_and_send_what_is_planned(tool: ModuleType) -> None:
    name = "vision"
    engines = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
    results = run_distributed(on_a_rank, 2, name, engines)
    trace, engine = part("trace").trace(experiment_of(name)), experiment_of(name).engine
    assert trace.trained > 400_000
    for stage, *ranks in zip(part("memory").STAGES, *results, strict=True):
        account = part("memory").memory(trace, stage, 2, engine=engine, passes=PASSES)
        measured = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        assert measured["step"] == pytest.approx(account.lasting, rel=0.01), stage
        # Stage 1 packs gradients in the step, and holds its bucket since the first backward.
        bucket = account.buckets if stage == 1 else account.lasting_buckets
        held = account.student + account.teacher + account.optimiser + account.gradients + bucket
        assert measured["backward"] == pytest.approx(held, rel=0.02), stage
        # Of rings of two, a rank sends all of what is summed, and half of what is gathered or scattered.
        sent = part("cost").volume(trace, stage, 2, engine, PASSES)
        scattered, summed = measured.get("reduce_scatter_tensor", 0) / 2, measured.get("all_reduce", 0)
        assert summed + scattered == pytest.approx(sent.reduced, rel=0.01), stage
        assert measured.get("all_gather_into_tensor", 0) / 2 == pytest.approx(sent.gathered, rel=0.01), stage


@pytest.mark.parametrize("name", ["vision_v2", "speech", "text", "text_v2"])
def test_the_trace_is_what_a_step_computes_and_keeps(tool: ModuleType, name: str) -> None:
    """In fp32, where a CPU keeps the same but for attention."""
    experiment = experiment_of(name).replace(train={"precision": Precision.FP32})
    traced = part("trace").trace(experiment)
    key, modality = next(iter(experiment.modalities.items()))
    inputs = modality.exhibit.random_input(3).inputs
    from data2vec.core.batch import Batch

    batch = Batch(key, inputs, torch.arange(3), torch.full((3,), -1))
    model = Data2Vec.build(experiment)
    prepared = model.prepare(batch, seed=0, update=0)
    assert traced.flops == pytest.approx(step_flops(model, prepared) / 3, rel=0.05)
    assert traced.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert traced.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        total = model(prepared).total
    assert traced.whole.of(3) == pytest.approx(sum(kept.values()), rel=0.1)
    assert traced.checkpointed.of(3) < traced.whole.of(3)
    del total


def test_bf16_keeps_less_and_copies_weights(tool: ModuleType) -> None:
    experiment = experiment_of("text")
    trace = part("trace").trace
    lower = trace(experiment.replace(train={"precision": Precision.BF16}))
    full = trace(experiment.replace(train={"precision": Precision.FP32}))
    assert 0.5 * full.whole.per_sample < lower.whole.per_sample < 0.8 * full.whole.per_sample
    blocks = 2 * 12 * 144**2
    assert lower.whole.fixed - full.whole.fixed > 2 * blocks  # bytes
    assert lower.flops == full.flops


def run(tool: ModuleType, folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "plan.json"
    assert tool.main([*arguments, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_vision_large_on_64_gpus(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    found = run(tool, tmp_path, "experiments/vision_large.py", "--gpus", "64", "--memory", "80")
    size = found["parameters"]["trained"]
    assert 300e6 < size < 310e6
    assert found["share"] | {"passes": 1, "micro_batch": 32} == found["share"]  # 2,048 samples on 64 ranks
    engines = {row["engine"]: row for row in found["engines"]}
    assert engines["ZeRO 0"]["memory"]["optimiser"] == 8 * size
    assert engines["ZeRO 3"]["memory"]["student"] == pytest.approx(4 * size / 64, rel=0.02)
    assert engines["ZeRO 1"]["sent"]["total"] == pytest.approx(12 * size * 63 / 64)
    assert found["rate"]["measured"] is False
    assert found["recommended"] == "ZeRO 0"  # everything fits
    assert found["command"] == (
        "uv run deepspeed --hostfile HOSTS --num_nodes 8 --num_gpus 8 tools/launch.py experiments/vision_large.py "
        "data.train=SHARDS engine.zero_stage=0"
    )
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "three times as long at stage 3" in " ".join(printed.split())
    assert "--num_nodes 8 --num_gpus 8 tools/launch.py experiments/vision_large.py" in printed


def test_one_gpu_is_for_plain_torch(tool: ModuleType, tmp_path: Path) -> None:
    found = run(tool, tmp_path, "vision_base", "optim.lr=1e-3", "--gpus", "1", "--memory", "80")
    assert found["recommended"] == "torch"
    assert found["command"] == "uv run experiments/vision_base.py optim.lr=1e-3 data.train=SHARDS"


@pytest.mark.parametrize(
    ("memory", "recommended", "changes"),
    [
        ("9", "ZeRO 1", []),  # replicated optimiser states do not fit
        ("7.5", "ZeRO 2", []),
        ("6", "ZeRO 2", ["train.micro_batch=8"]),
        ("4.3", "ZeRO 2", ["train.activation_checkpointing=true"]),
        ("3", "ZeRO 3", ["train.activation_checkpointing=true"]),
        ("1", None, []),
    ],
)
def test_less_memory_takes_more_sharding(
    tool: ModuleType, tmp_path: Path, memory: str, recommended: str | None, changes: list[str]
) -> None:
    found = run(tool, tmp_path, "vision_large", "train.micro_batch=16", "--gpus", "64", "--memory", memory)
    assert (found["recommended"], found["changes"]) == (recommended, changes)


def test_stage_3_when_nothing_else_fits(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    huge = ["transformer.width=4096", "transformer.depth=48", "transformer.heads=32"]
    limit = "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: 2e8, stage3_max_reuse_distance: 2e8}}"
    found = run(tool, tmp_path, "vision_large", *huge, limit, "--gpus", "64", "--memory", "80")
    assert found["recommended"] == "ZeRO 3"
    assert found["engines"][-1]["memory"]["gathered"] == 4 * 2e8
    assert f" '{limit}' " in found["command"]
    assert "nothing less fits" in capsys.readouterr().out


def test_what_is_offloaded_decides_too(tool: ModuleType, tmp_path: Path) -> None:
    base = ["vision_base", "--gpus", "4", "--memory", "80"]
    found = run(tool, tmp_path, *base, "engine.offload_optimizer=true")
    assert found["recommended"] == "ZeRO 1"  # stage 0 cannot
    assert found["engines"][2]["memory"]["host"] > 12 * found["parameters"]["trained"] / 4
    offloaded = ("engine.offload_parameters=true", "engine.zero_stage=3")
    assert run(tool, tmp_path, *base, *offloaded)["recommended"] == "ZeRO 3"


def test_a_measured_step(tool: ModuleType, tmp_path: Path) -> None:
    base = ["vision_base", "--gpus", "8", "--memory", "80"]
    flops = run(tool, tmp_path, *base)["flops_per_sample"]
    content = {
        "settings": {"experiment": "vision_base", "batch": 128, "device": "cuda:0", "gflop_per_sample": flops / 1e9},
        "rows": [
            {"variant": name, "samples_per_second": 128e3 / (ms + 10), "forward_backward_ms": ms, "update_ms": 10}
            for name, ms in (("eager", 70), ("compiled", 50))
        ],
    }
    file = tmp_path / "step.json"
    file.write_text(json.dumps(content))
    found = run(tool, tmp_path, *base, "--step", str(file))
    assert found["rate"]["measured"]
    torch_row = found["engines"][0]["seconds"]
    assert torch_row["passes"] == pytest.approx(2 * 0.050)  # 256 samples of a rank
    assert torch_row["update"] == pytest.approx(0.010)
    assert found["engines"][1]["seconds"]["passes"] == pytest.approx(1.08 * 2 * 0.050)
    assert found["engines"][2]["seconds"]["update"] < 0.010  # sharded
    found = run(tool, tmp_path, *base, "--step-ms", "60", "--bandwidth", "100")
    seconds, sent = found["engines"][0]["seconds"], found["engines"][0]["sent"]["total"]
    assert seconds["passes"] == pytest.approx(2 * (0.060 - seconds["update"]))
    assert seconds["exchange"] == pytest.approx(sent / 100e9)


def test_the_sample_variant(tool: ModuleType, tmp_path: Path) -> None:
    found = run(tool, tmp_path, "vision_base", "--sample", "--gpus", "2", "--memory", "8")
    assert found["experiment"] == "vision_base_sample"
    assert found["command"].endswith("experiments/vision_base.py --sample engine.zero_stage=0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_recipe", "--gpus", "8", "--memory", "80"], "no_such_recipe: no such experiment"),
        (["vision_base", "optim.lrate=1", "--gpus", "8", "--memory", "80"], "optim.lrate"),
        (["vision_base", "--gpus", "3", "--memory", "80"], "train.batch=2048"),
        (["vision_base", "--gpus", "12", "--memory", "80"], "--gpus 12"),
        (["speech_large", "--gpus", "512", "--memory", "80"], "--gpus 512"),
        (["vision_base", "--gpus", "8", "--memory", "80", "--step", "none.json"], "--step none.json"),
        (["vision_base", "--gpus", "8", "--memory", "80", "--mfu", "2"], "--mfu 2"),
        (
            [
                "vision_base",
                "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: few}}",
                "--gpus",
                "8",
                "--memory",
                "80",
            ],
            "stage3_max_live_parameters='few'",
        ),
    ],
)
def test_bad_input_is_one_error(tool: ModuleType, arguments: list[str], words: str, capsys: Any) -> None:
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experiment": "vision_large"}, "measured vision_large"),
        ({"gflop_per_sample": 1.0}, "GFLOP a sample"),
        ({"device": "cpu"}, "on a CPU"),
        ({"batch": 0}, "cannot be"),
        ({"batch": "many"}, "not a result"),
    ],
)
def test_a_measurement_of_something_else(
    tool: ModuleType, tmp_path: Path, settings: dict[str, Any], words: str, capsys: Any
) -> None:
    good = {"experiment": "vision_base", "batch": 128, "device": "cuda:0", "gflop_per_sample": 141.0}
    row = {"variant": "eager", "samples_per_second": 1.0, "forward_backward_ms": 1.0, "update_ms": 1.0}
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"settings": good | settings, "rows": [row]}))
    assert tool.main(["vision_base", "--gpus", "8", "--memory", "80", "--step", str(file)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["vision_base"], ["--gpus", "8", "--memory", "80"], ["vision_base", "--gpus", "0", "--memory", "80"],
        ["vision_base", "--gpus", "8", "--memory", "nan"],
        ["vision_base", "--gpus", "8", "--memory", "80", "--nothing"],
        ["vision_base", "--gpus", "8", "--memory", "80", "--step", "a", "--step-ms", "1"],
    ],
)  # fmt: skip
def test_unknown_arguments(tool: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments)


def test_help(tool: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert "usage: plan.py" in capsys.readouterr().out
