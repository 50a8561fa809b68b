"""The engine as the training loop knows it: forward and backward, a step, and its state."""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.model.transformer import Transformer
from data2vec.core.settings.fields import Precision, Switch
from data2vec.core.task import Step, Task

_log = logging.getLogger(__name__)
Shares = Mapping[str, Tensor | Piece]
"""The share of some tensors that one rank saves: whole ones, and pieces of those that it shares with other ranks."""


class Engine(ABC):
    """One process's share of training a task.

    Every engine gives a parameter that an update does not use a gradient of zero, so that its moments and its weight
    decay go on: sharded optimisers cannot leave it out.

    ``bf16``, ``compiled``: how the task runs. ``sharded``: this rank holds the task in part; it computes only together
    with the others.
    """

    task: Task[Any]
    device: torch.device
    ranks: Ranks
    bf16: bool
    compiled: bool
    sharded: bool

    @abstractmethod
    def accumulate(self, prepared: Any, *, scale: float, update: int) -> Step:
        """Run a micro-batch forward and backward, and add the gradient of its summed loss times ``scale``.

        The gradients of all ranks add up in :meth:`step`.
        """

    @abstractmethod
    def step(self, rate: float, update: int) -> Tensor:
        """Clip, update the parameters, finish the task's step and clear the gradients.

        Args:
            rate: learning rate, times each group's ``lr_scale``.
            update: applied updates, this one included.

        Returns:
            The gradient norm, a scalar.
        """

    @abstractmethod
    def state(self) -> dict[str, Shares]:
        """This rank's share of ``model`` (as :meth:`Task.own_state`) and ``optimiser`` (PARAMETER/MOMENT)."""

    @abstractmethod
    def load_state(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        """Continue from the whole tensors of any engine.

        Raises:
            CheckpointError: a name or a shape does not fit this task, which is then unchanged.
        """


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` is bf16 on GPUs that have it and fp32 elsewhere."""
    if precision is Precision.AUTO:
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision is Precision.BF16


def recompute_blocks(task: nn.Module, on: bool) -> None:
    """Keep only the inputs of Transformer blocks between forward and backward pass, or all that they compute."""
    for module in task.modules():
        if isinstance(module, Transformer):
            module.activation_checkpointing = on


def compile_blocks(task: Task[Any], switch: Switch, device: torch.device) -> bool:
    """Compile each Transformer block in place where asked for and possible; says so in one line where it is not.

    ``auto`` compiles on a GPU. Blocks alone, because all of them share one compiled graph, which is ready in seconds.
    """
    if switch is Switch.OFF or (switch is Switch.AUTO and device.type != "cuda"):
        return False
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("gcc")
    if compiler is None:
        _log.warning("torch.compile needs a C++ compiler and none is installed: running without it")
        return False
    for block in task.blocks():
        block.compile()
    return True


def shared_out(tensors: Mapping[str, Tensor], rank: int, world: int) -> Shares:
    """Choose what one rank saves of tensors that all ranks hold: each tensor once, about equally many bytes each."""
    load = [0] * world
    mine: dict[str, Tensor | Piece] = {}
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        least = load.index(min(load))
        load[least] += value.numel() + 1
        if least == rank:
            mine[name] = value
    return mine
