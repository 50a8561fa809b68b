"""Helpers for the test suites of this workspace: golden values of the authors' implementation, several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes


@dataclass(frozen=True)
class Golden:
    """``values``: every array by its key. ``meta``: the configuration of the authors' model."""

    values: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The values whose key begins with ``prefix/``, without it."""
        start = f"{prefix}/"
        return {key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)}


def load_golden(path: Path) -> Golden:
    """Read a file of golden values (an ``.npz`` without objects)."""
    with np.load(path, allow_pickle=False) as arrays:
        values = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files if key != "meta"}
        return Golden(values, json.loads(str(arrays["meta"])))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def run_distributed(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` in ``world`` new processes of this machine, joined over gloo (and NCCL, for GPUs).

    Args:
        function: defined at the top level of a module, which may be a test file. It returns None, tensors, numbers,
            strings, or lists, tuples and dicts of those.
        world: number of processes; each sees ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` in its environment.
        args: what pickles and is importable: tensors, plain values, the settings' dataclasses.
        timeout: seconds after which all processes are killed.

    Returns:
        What each rank returned, by rank.

    Raises:
        RuntimeError: a rank raised; the message holds the traceback of the one that did so first.
        TimeoutError: they did not finish in time.
    """
    source = sys.modules[function.__module__].__file__
    assert source is not None
    with tempfile.TemporaryDirectory() as folder:
        call = (function.__module__, source, function.__qualname__)
        # Ranks fork from one server that has run nothing: as clean as new processes. What it imports first
        # (multiprocessing.set_forkserver_preload) is paid once.
        context = start_processes(
            _run_rank,
            (world, folder, call, args, dict(os.environ), timeout),
            nprocs=world,
            join=False,
            start_method="forkserver",
        )
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(max(deadline - time.monotonic(), 0.0)):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__qualname__} on {world} ranks did not finish in {timeout:g} s")
        except ProcessException as error:
            reports = sorted(Path(folder).glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
            # The others may have failed because their peer was gone.
            raise RuntimeError(reports[0].read_text() if reports else str(error)) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [torch.load(Path(folder, f"rank-{rank}.pt"), weights_only=True) for rank in range(world)]


def _run_rank(
    rank: int,
    world: int,
    folder: str,
    call: tuple[str, str, str],
    args: tuple[Any, ...],
    environment: dict[str, str],
    timeout: float,
) -> None:
    module, source, qualname = call
    os.environ.update(environment)  # the caller's as it is now; the server has what it was when the server began
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if sys.platform == "linux":  # gloo would otherwise look up the host's name, which need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    function = getattr(load_module(module, Path(source)), qualname)
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        torch.save(function(*args), Path(folder, f"rank-{rank}.pt"))
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def call(module: str, source: str, function: str, *args: Any) -> None:
    """Call a function of a module by its place: what a process can start with where the module is on no import path."""
    getattr(load_module(module, Path(source)), function)(*args)


def load_module(name: str, source: Path) -> ModuleType:
    """A module by its place: a test file, and what stands beside it, is on no import path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def load_script(source: Path) -> ModuleType:
    """An experiment or a tool by its place, with its folder on the path while it is loaded, as when it is run."""
    sys.path.insert(0, str(source.parent))
    try:
        return load_module(f"{source.stem}_as_a_script", source)
    finally:
        sys.path.remove(str(source.parent))
