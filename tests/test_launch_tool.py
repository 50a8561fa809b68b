"""The launcher's command on CPU ranks, as a user types it, and what a launcher's environment says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from data2vec.core.config import TrainConfig
from data2vec.core.errors import ConfigError
from data2vec.core.loading import load_run
from data2vec.core.testing import load_module
from data2vec.core.training import checkpoint
from data2vec.core.training.ranks import Place, place
from data2vec.core.training.share import Share

ROOT = Path(__file__).resolve().parents[1]
scenarios = load_module("scenarios_of_launch", Path(__file__).with_name("scenarios.py"))
TINY = (
    "vision.image_size=16", "vision.patch_size=4", "transformer.depth=2", "transformer.width=16", "transformer.heads=2",
    "targets.top_k=2", "optim.warmup=1", "train.batch=4", "train.log_every=1", "evaluation.tasks=[rank]",
    "data.workers=0", "train.min_target_spread=0", "train.min_prediction_spread=0",
)  # fmt: skip


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """``deepspeed --num_gpus 2 tools/launch.py`` on CPU ranks, without a compiler on the path."""
    bare = folder / "bin"
    bare.mkdir(exist_ok=True)
    shell = shutil.which("bash")
    assert shell is not None
    if not (bare / "bash").exists():
        (bare / "bash").symlink_to(shell)
    scripts = Path(sys.executable).parent
    return subprocess.Popen(
        [str(scripts / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", free_port(),
         str(ROOT / "tools" / "launch.py"), *arguments],
        cwd=folder, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": f"{scripts}:{bare}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = scenarios.write_shards(tmp_path_factory.mktemp("shards"), "vision")
    return folder


def test_the_default_experiment_is_stopped_through_the_launcher(shards: Path, tmp_path: Path) -> None:
    arguments = ("--sample", f"data.train={shards}", "vision.channels=3", "vision.mean=[0.5,0.5,0.5]",
                 "vision.std=[0.3,0.3,0.3]", f"train.folder={tmp_path / 'run'}", *TINY)  # fmt: skip
    process = launch(tmp_path, *arguments, "train.updates=100000", "train.checkpoint_every=5")
    until = time.monotonic() + 120
    while checkpoint.latest(tmp_path / "run" / "checkpoints") is None and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does; the launcher sends its ranks SIGTERM as well
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "This is the sample variant of vision_base.py" in output
    assert "2 ranks, each 1 forward pass of 2 samples an update" in output
    assert "stopped (interrupted) at update" in output
    reached = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert reached is not None


def test_a_run_of_its_own_ends_well_and_its_weights_are_written(shards: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        '"""An experiment of a user."""\n'
        "import importlib.util, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from vision_base import sample\n"
        "experiment = sample.replace(name='mine', vision={'channels': 3, 'mean': (0.5,) * 3, 'std': (0.3,) * 3})\n"
    )
    process = launch(tmp_path, str(own), f"data.train={shards}", "train.updates=3", "engine.zero_stage=2", *TINY)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "mine"
    assert (run / "report.html").is_file()
    convert = tool("convert")
    assert convert.main(["consolidate", str(run)]) == 0
    model = load_run(run, device="cpu").model
    teacher = load_file(run / "weights" / "teacher.safetensors")
    assert teacher.keys() == model.teacher.encoder.state_dict().keys()
    for name, value in model.teacher.encoder.state_dict().items():
        assert bool((teacher[name] == value).all())
    assert convert.main(["consolidate", str(tmp_path / "nothing")]) == 2


def tool(name: str) -> ModuleType:
    return load_module(f"{name}_under_test", ROOT / "tools" / f"{name}.py")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1, launched=True)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, Place()),  # a shell of salloc
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            Place(5, 16, 1, launched=True),
        ),
    ],
)
def test_who_a_process_is(environment: dict[str, str], expected: Place) -> None:
    assert place(environment) == expected


def test_an_environment_that_makes_no_sense_is_one_error() -> None:
    with pytest.raises(ConfigError, match="RANK=8, WORLD_SIZE=8"):
        place({"RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ConfigError, match="RANK=x"):
        place({"RANK": "x", "WORLD_SIZE": "8"})


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16, 32, 64])
def test_the_recipes_batch_is_kept(world: int) -> None:
    share = Share.of(TrainConfig(batch=2048 * 3, micro_batch=128), world)
    assert share.passes * share.micro_batch * world == share.taken == 2048 * 3
    assert share.micro_batch <= 128
    lengths = Share.of(TrainConfig(batch_length=64 * 100, micro_length=400), 64)  # 16 batches
    assert (lengths.passes, lengths.parts, lengths.taken) == (1, 4, 16)


def test_a_batch_that_cannot_be_shared_is_one_error() -> None:
    with pytest.raises(ConfigError, match="cannot be shared equally by 3 ranks"):
        Share.of(TrainConfig(batch=2048), 3)
    with pytest.raises(ConfigError, match="choose a divisor or a multiple of 16 ranks"):
        Share.of(TrainConfig(batch_length=1600, micro_length=100), 24)
