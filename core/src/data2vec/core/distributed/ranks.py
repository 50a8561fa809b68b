"""The processes that train together: who this one is, and the few numbers they exchange outside of gradients.

A launcher starts the same command once for each device (:mod:`data2vec.core.distributed.launchers`). Without one there
is a single rank and nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data2vec.core.distributed.launchers import host_of_rank_0, local_world, place
from data2vec.core.distributed.meeting import Meeting
from data2vec.core.errors import ConfigError, Data2VecError, PeerError, RankLostError

_joined: set[bool] = set()
_TIMEOUT = timedelta(minutes=30)  # rank 0 may write sample data, or evaluate, while the others wait
# What gloo and NCCL say when the process at the other end is gone.
_PEER_IS_GONE = (
    "onnection closed", "onnection reset", "Broken pipe", "Socket closed", "remote process exited", "gloo/transport",
)  # fmt: skip


class Ranks:
    """This process among those that train together. One process alone needs no process group."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """True on the rank that writes what is written once."""
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


def join(device: str, minutes: float = 5.0) -> Ranks:
    """Join the process group that the launcher's environment describes; without a launcher this rank is alone.

    Args:
        device: ``train.device``, on which a rank communicates.
        minutes: ``engine.join_minutes``, how long the ranks wait for each other.

    Raises:
        ConfigError: the environment lacks the address of rank 0, or another rank does not come.
        PeerError: another rank says why they cannot meet.
        RankLostError: rank 0 has ended meanwhile.
    """
    here = place()
    if here.world == 1:
        return Ranks()
    if dist.is_initialized():  # by the caller, as the tests do
        return Ranks(dist.get_rank(), dist.get_world_size())
    names = {"RANK": here.rank, "WORLD_SIZE": here.world, "LOCAL_RANK": here.local_rank, "MASTER_PORT": 29500}
    on_this_host = local_world() or here.world
    os.environ["MASTER_ADDR"] = host_of_rank_0()
    for name, value in names.items():  # whatever the launcher calls them, DeepSpeed looks for these
        os.environ.setdefault(name, str(value))
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ConfigError([f"environment: MASTER_PORT={port}: is no port; set a number from 1 to 65535"])
    on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if on_gpu:
        torch.cuda.set_device(here.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # else each rank takes every core
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_host))
    meeting = Meeting(here, os.environ["MASTER_ADDR"], int(port), minutes)
    store = meeting.store()
    store.set_timeout(_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        meeting.connect(
            lambda: dist.init_process_group(
                backend, store=store, rank=here.rank, world_size=here.world, timeout=_TIMEOUT
            )
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            [f"environment: rank {here.rank} of {here.world} cannot connect to the others ({error})"]
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
    """Guard what communicates, at any depth: an error because another rank is gone becomes one of ours.

    Raises:
        RankLostError: another rank has ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Data2VecError) or not _is_of_communication(error):
            raise
        first = (str(error).splitlines() or [""])[0][:200]
        raise RankLostError(
            "another rank has ended, so this one cannot go on; its own message or the launcher's says why "
            f"(out of memory is common). The same command continues from the last checkpoint. (Seen here: {first})"
        ) from None


def _is_of_communication(error: RuntimeError) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _PEER_IS_GONE):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = Path(frame.tb_frame.f_code.co_filename) if frame is not None else Path()
    return place.parent.parts[-2:] in (("torch", "distributed"), ("deepspeed", "comm"))


def first_to_tell() -> bool:
    """Tell whether no other rank has told yet that one is lost; true also where that cannot be known."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return int(store.add("data2vec/lost", 1)) == 1
    except (RuntimeError, ValueError):
        return True
