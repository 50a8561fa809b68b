"""The launcher's command on CPU ranks, as a user types it, and what a launcher's environment says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from data2vec.core.checkpoints import checkpoint
from data2vec.core.distributed.launchers import Place, host_of_rank_0, place
from data2vec.core.errors import ConfigError
from data2vec.core.run.load import load_run
from data2vec.core.settings.fields import TrainConfig
from data2vec.core.testing import load_module
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


@contextmanager
def launched(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``deepspeed --num_gpus 2 tools/launch.py`` on CPU ranks, without a compiler on the path; none outlives a test."""
    bare = folder / "bin"
    bare.mkdir(exist_ok=True)
    shell = shutil.which("bash")
    assert shell is not None
    if not (bare / "bash").exists():
        (bare / "bash").symlink_to(shell)
    scripts = Path(sys.executable).parent
    process = subprocess.Popen(
        [str(scripts / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", free_port(),
         str(ROOT / "tools" / "launch.py"), *arguments],
        cwd=folder, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": f"{scripts}:{bare}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = scenarios.write_shards(tmp_path_factory.mktemp("shards"), "vision")
    return folder


def test_the_default_experiment_is_stopped_through_the_launcher(shards: Path, tmp_path: Path) -> None:
    arguments = ("--sample", f"data.train={shards}", "vision.channels=3", "vision.mean=[0.5,0.5,0.5]",
                 "vision.std=[0.3,0.3,0.3]", f"train.folder={tmp_path / 'run'}", *TINY)  # fmt: skip
    with launched(tmp_path, *arguments, "train.updates=100000", "train.checkpoint_every=5") as process:
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
    arguments = (str(own), f"data.train={shards}", "train.updates=3", "engine.zero_stage=2", *TINY)
    with launched(tmp_path, *arguments) as process:
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
        ("", Place()),
        ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1", Place(3, 8, 1, launched=True)),
        ("RANK=3", Place()),  # anyone's variable
        ("RANK=0 WORLD_SIZE=1 PMI_RANK=3 PMI_SIZE=4", Place(0, 1, 0, launched=True)),  # said on purpose
        (
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 PMIX_RANK=3 SLURM_PROCID=0 "
            "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0",
            Place(3, 8, 1, launched=True),
        ),
        ("MV2_COMM_WORLD_RANK=3 MV2_COMM_WORLD_SIZE=8 MV2_COMM_WORLD_LOCAL_RANK=1", Place(3, 8, 1, launched=True)),
        ("JSM_NAMESPACE_RANK=3 JSM_NAMESPACE_SIZE=8 JSM_NAMESPACE_LOCAL_RANK=1", Place(3, 8, 1, launched=True)),
        ("PMI_RANK=3 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4", Place(3, 8, 1, launched=True)),
        ("PMI_RANK=3 PMI_SIZE=8 PMI_LOCAL_RANK=1 PALS_RANKID=3", Place(3, 8, 1, launched=True)),
        ("FLUX_TASK_RANK=3 FLUX_JOB_SIZE=8 FLUX_TASK_LOCAL_ID=1", Place(3, 8, 1, launched=True)),
        ("SLURM_PROCID=0 SLURM_NTASKS=16 SLURM_LOCALID=0", Place()),  # a shell of salloc
        ("SLURM_PROCID=0 SLURM_NTASKS=16 SLURM_LOCALID=0 SLURM_STEP_ID=4294967290", Place()),  # as SLURM 20.11 opens it
        (
            "SLURM_PROCID=0 SLURM_NTASKS=16 SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1",
            Place(launched=True),
        ),  # srun --pty
        ("SLURM_PROCID=5 SLURM_NTASKS=16 SLURM_LOCALID=1 SLURM_STEP_ID=0 PMIX_RANK=5", Place(5, 16, 1, launched=True)),
    ],
)
def test_who_a_process_is(environment: str, expected: Place) -> None:
    assert place(variables(environment)) == expected


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


@pytest.mark.parametrize(
    ("environment", "lacking"),
    [
        ("PMIX_RANK=1 PMIX_NAMESPACE=job", "PMIX_RANK=1, but not how many"),
        ("PMI_RANK=1 MPI_LOCALRANKID=1", "PMI_RANK=1 .*, but not PMI_SIZE"),
        ("PMI_RANK=1 PMI_SIZE=2", "PMI_RANK=1 .*, but not MPI_LOCALRANKID"),
        ("ALPS_APP_PE=1", "ALPS_APP_PE=1, but not how many"),
    ],
)
def test_a_launcher_that_says_too_little_is_refused(environment: str, lacking: str) -> None:
    with pytest.raises(ConfigError, match=f"{lacking}.*Start the ranks with torchrun"):
        place(variables(environment))


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=here", "here"),
        ("PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=4", "127.0.0.1"),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 "
         "SLURM_STEP_NODELIST=node[007-012,20],other", "node007"),
    ],
)  # fmt: skip
def test_where_rank_0_is(environment: str, host: str) -> None:
    assert host_of_rank_0(variables(environment)) == host


def test_an_address_that_nobody_says_is_one_error() -> None:
    environment = "PMI_RANK=0 PMI_SIZE=8 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=4"
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        host_of_rank_0(variables(environment))


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
