"""The rank of a process, as the program that started it says in the environment.

One row for each launcher. The names are documented by: PyTorch ("torchrun", environment variables), Open MPI
("Environment variables set for MPI applications"), MVAPICH2 (user guide), MPICH's Hydra and the Intel MPI Library
(PMI_*, MPI_LOCALRANKID, MPI_LOCALNRANKS), HPE Cray PMI (PMI_LOCAL_RANK, PALS_LOCAL_RANKID), IBM's jsrun (JSM_*), Flux
(flux-environment) and SLURM (srun, output environment variables).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from data2vec.core.errors import ConfigError

_NO_TASKS = 0xFFFFFFF0  # SLURM numbers what is no step of tasks (a batch script, salloc's shell) from here up


@dataclass(frozen=True)
class Place:
    """The place of a process among those that a launcher started: ``launched`` is false where none did."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False


@dataclass(frozen=True)
class Launcher:
    """The variables of a launcher; of several names for one thing the first that is set counts.

    Args:
        name: what a user calls it.
        rank: present in every process that it starts.
        world: number of processes.
        local_rank: number of the process on its host.
        local_world: processes on this host.
        hosts: number of hosts, where it says this instead.
        generic: its names may stand in an environment for other reasons, so the rank alone says nothing.
        step: a number of the step, without which (or with a special one) the rank is that of a shell.
        nodes: a list of hosts that begins with rank 0's.
    """

    name: str
    rank: str
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...] = ()
    hosts: str | None = None
    generic: bool = False
    step: str | None = None
    nodes: str | None = None


LAUNCHERS = (
    # The first row counts where several do: who runs torchrun inside of srun or mpirun means torchrun's ranks.
    Launcher(
        "torchrun or DeepSpeed", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        generic=True,
    ),
    # MPI before SLURM, which starts one task a host for mpirun.
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "MVAPICH2", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    Launcher(
        "MPICH, Intel MPI or Cray MPICH", "PMI_RANK", ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
    Launcher("Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",), hosts="FLUX_JOB_NNODES"),
    Launcher(
        "SLURM's srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",),
        hosts="SLURM_STEP_NUM_NODES", step="SLURM_STEP_ID", nodes="SLURM_STEP_NODELIST",
    ),
)  # fmt: skip
# These say which rank a process is and not of how many: PMIx, Cray's PALS and ALPS, IBM's POE.
_UNSIZED = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "MP_CHILD")


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Find where this process stands.

    Raises:
        ConfigError: a number that is none, or a launcher that does not say enough.
    """
    launcher = _launcher(environment)
    if launcher is None:
        unsized = next((name for name in _UNSIZED if name in environment), None)
        if unsized is not None:
            raise _refused(f"{unsized}={environment[unsized]}, but not how many ranks there are")
        return Place()
    names = [_set(environment, names) for names in ((launcher.rank,), launcher.world, launcher.local_rank)]
    if None in names and not launcher.generic:
        asked = (launcher.rank, launcher.world[0], launcher.local_rank[0])
        lacking = next(name for name, found in zip(asked, names, strict=True) if found is None)
        raise _refused(f"{launcher.rank}={environment[launcher.rank]} ({launcher.name}), but not {lacking}")
    values = [environment[name] if name else "0" for name in names]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True) if name)
        raise ConfigError([f"environment: {shown} is no rank among others; unset them, or use a launcher"])
    rank, world, local_rank = map(int, values)
    return Place(rank, world, local_rank, launched=True)


def local_world(environment: Mapping[str, str] = os.environ) -> int | None:
    """The ranks of this host, as far as the launcher says it."""
    launcher = _launcher(environment)
    if launcher is None:
        return 1
    name = _set(environment, launcher.local_world)
    if name is not None and environment[name].isdecimal():
        return int(environment[name])
    hosts = environment.get(launcher.hosts, "") if launcher.hosts else ""
    if hosts.isdecimal() and int(hosts):
        return -(-place(environment).world // int(hosts))
    return None


def host_of_rank_0(environment: Mapping[str, str] = os.environ) -> str:
    """Find where the ranks meet: MASTER_ADDR, or what follows from the launcher's variables.

    Raises:
        ConfigError: nothing says it.
    """
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if local_world(environment) == place(environment).world:
        return "127.0.0.1"
    launcher = _launcher(environment)
    if launcher is not None and launcher.nodes and environment.get(launcher.nodes):
        return _first_host(environment[launcher.nodes])
    raise ConfigError(
        [
            "environment: MASTER_ADDR is not set, so the ranks cannot find each other; set it to rank 0's host on all "
            f"of them ({launcher.name if launcher else 'the launcher'} does not say which that is; `mpirun -x "
            "MASTER_ADDR=HOST`, `mpiexec -genv MASTER_ADDR HOST`)"
        ]
    )


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    for launcher in LAUNCHERS:
        if launcher.rank not in environment or (launcher.generic and not _set(environment, launcher.world)):
            continue
        step = environment.get(launcher.step, "") if launcher.step else "0"
        if step.isdecimal() and int(step) < _NO_TASKS:
            return launcher
    return None


def _set(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in environment), None)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: ``node[007-012,20],other`` begins with ``node007``."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _refused(what: str) -> ConfigError:
    return ConfigError(
        [
            f"environment: the launcher says {what}. Start the ranks with torchrun, deepspeed, srun or Open MPI's "
            "mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR for each; RANK=0 WORLD_SIZE=1 is one process"
        ]
    )
