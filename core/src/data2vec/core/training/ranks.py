"""The processes that train together: who this one is, and the few numbers they exchange outside of gradients.

A launcher (DeepSpeed's, torchrun, SLURM) starts the same command once for each device and says in the environment
which rank each process is. Without one there is a single rank and nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from data2vec.core.errors import ConfigError, Data2VecError, PeerError, RankLostError

_joined: set[bool] = set()
_TIMEOUT = timedelta(minutes=30)  # rank 0 may write sample data, or evaluate, while the others wait
# What gloo and NCCL say when the process at the other end is gone.
_PEER_IS_GONE = ("onnection closed", "onnection reset", "Broken pipe", "Socket closed", "remote process exited", "EOF")


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that a launcher started: ``launched`` is false where none did."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """What the environment says: RANK and WORLD_SIZE (torchrun, DeepSpeed), or SLURM's variables inside ``srun``.

    Raises:
        ConfigError: a number that is none.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in environment for name in names[:2]):
        # SLURM_PROCID also stands in the shell that `salloc` opens; a step is what srun started.
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if not all(name in environment for name in (*names, "SLURM_STEP_ID")):
            return Place()
    values = [environment.get(name, "0") for name in names]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError([f"environment: {shown} is no rank among others; unset them, or use a launcher"])
    rank, world, local_rank = map(int, values)
    return Place(rank, world, local_rank, launched=True)


class Ranks:
    """This process among those that train together. One process alone needs no process group."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, in float64; every rank must call with as many values.

        Raises:
            RankLostError: another rank has ended.
        """
        return list(values) if self.world == 1 else self.add_up(torch.tensor(values, dtype=torch.float64)).tolist()

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add a tensor of host memory up over ranks, in place; every rank must call with the same shape.

        Raises:
            RankLostError: another rank has ended.
        """
        if self.world > 1:
            with peers_alive():
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum([0.0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that every rank must get through: where one fails, all fail, and only that one says why.

        Raises:
            Data2VecError: what the block raised here.
            PeerError: another rank failed in it.
        """
        failure: Data2VecError | None = None
        try:
            yield
        except (PeerError, RankLostError):
            raise
        except Data2VecError as error:
            failure = error
        self.agree(failure)

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """A part that fails on every rank or on none, because all decide by the same values: one of them says why.

        Raises:
            Data2VecError: what the block raised, on the first rank.
            PeerError: the same on the others.
        """
        try:
            yield
        except RankLostError:
            raise
        except Data2VecError as error:
            if self.first:
                raise
            raise PeerError(str(error)) from None

    def agree(self, failure: Data2VecError | None) -> None:
        """Fail on every rank where one has a failure.

        Raises:
            Data2VecError: this rank's failure, where no lower rank has one: it is said once.
            PeerError: another rank's.
        """
        if self.world == 1:
            if failure is not None:
                raise failure
            return
        failed = [float(rank == self.rank and failure is not None) for rank in range(self.world)]
        which = [rank for rank, flag in enumerate(self.sum(failed)) if flag]
        if not which:
            return
        if failure is not None and which[0] == self.rank:
            raise failure
        raise PeerError(f"rank {which[0]} failed; its message says why")


def join(device: str) -> Ranks:
    """Join the process group that the launcher's environment describes; without a launcher this rank is alone.

    Args:
        device: ``train.device``, on which a rank communicates.

    Raises:
        ConfigError: the environment lacks the address of rank 0, or another rank does not answer.
    """
    here = place()
    if here.world == 1:
        return Ranks()
    if dist.is_initialized():  # by the caller, as the tests do
        return Ranks(dist.get_rank(), dist.get_world_size())
    if "MASTER_ADDR" not in os.environ and "SLURM_LAUNCH_NODE_IPADDR" in os.environ:
        os.environ["MASTER_ADDR"] = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            ["environment: MASTER_ADDR is not set, so the ranks cannot find each other; set it to rank 0's host"]
        )
    on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if on_gpu:
        torch.cuda.set_device(here.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # else each rank takes every core
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or here.world)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=here.rank, world_size=here.world, timeout=_TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            [f"environment: rank {here.rank} of {here.world} cannot meet at {address} ({error})"]
        ) from None
    _joined.add(True)
    return Ranks(here.rank, here.world)


def leave() -> None:
    """Leave the process group that :func:`join` joined; one that was there before stays."""
    if _joined and dist.is_initialized():
        _joined.clear()
        dist.destroy_process_group()


@contextlib.contextmanager
def peers_alive() -> Iterator[None]:
    """What communicates: an error because another rank is gone becomes one of ours.

    Raises:
        RankLostError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, Data2VecError) or not any(sign in text for sign in _PEER_IS_GONE):
            raise
        raise RankLostError(
            "another rank has ended, so this one cannot go on; its own message or the launcher's says why "
            "(out of memory is common). The same command continues from the last checkpoint"
        ) from None
