"""What the training loop asks of whatever runs the model: forward and backward, a step, and its state."""

from __future__ import annotations

import contextlib
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.distributed.launchers import place
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.model.transformer import Transformer
from data2vec.core.settings.fields import Experiment, OptimConfig, Precision, Switch
from data2vec.core.task import Step, Task, lerp

_log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
Shares = Mapping[str, Tensor | Piece]
"""What one rank saves of some tensors: whole ones, and pieces of those that it shares with other ranks."""


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


def choose_device(name: str) -> torch.device:
    """``auto`` is this rank's GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    local_rank = place().local_rank
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError([f"train.device={name}: not usable here ({first}); choose auto or cpu"]) from None
    return device


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` is bf16 on GPUs that have it and fp32 elsewhere."""
    if precision is Precision.AUTO:
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision is Precision.BF16


def build_optimiser(task: Task[Any], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the task's groups."""
    groups = [
        {"params": list(group.parameters), "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
        for group in task.groups(config)
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Give each of an optimiser's groups its learning rate."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]


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
    """What one rank saves of tensors that all ranks hold: each tensor once, about equally many bytes each."""
    load = [0] * world
    mine: dict[str, Tensor | Piece] = {}
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        least = load.index(min(load))
        load[least] += value.numel() + 1
        if least == rank:
            mine[name] = value
    return mine


def check_moments(state: Mapping[str, Tensor], parameters: Mapping[str, torch.Size]) -> Iterator[tuple[str, str, str]]:
    """(key, parameter, moment) of an optimiser's saved state.

    Raises:
        CheckpointError: a parameter that is not trained here, a moment of another shape, or some moments without the
            others.
    """
    for key in state:
        name, _, moment = key.rpartition("/")
        value = state[key]
        shape = torch.Size() if moment == "step" else parameters.get(name)
        if name not in parameters or value.shape != shape or not value.is_floating_point():
            raise CheckpointError(f"the optimiser state {key} fits no parameter of this model")
        if any(f"{name}/{other}" not in state for other in MOMENTS) or moment not in MOMENTS:
            raise CheckpointError(
                f"the optimiser state of {name} is not {', '.join(MOMENTS)}; choose another checkpoint"
            )
        yield key, name, moment


def adamw_state(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """PARAMETER/MOMENT of an optimiser that holds the model's own parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }


def load_adamw_state(optimiser: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Undo :func:`adamw_state`.

    Raises:
        CheckpointError: see :func:`check_moments`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for key, name, moment in check_moments(state, {name: p.shape for name, p in parameters.items()}):
        parameter = parameters[name]
        # A copy: what was loaded may be a read-only view of the file.
        loaded.setdefault(parameter, {})[moment] = state[key].to(parameter.device, torch.float32, copy=True)
    optimiser.state.clear()
    optimiser.state.update(loaded)


class TorchEngine(Engine):
    """Plain PyTorch: AdamW, autocast, accumulation and clipping; gradients are summed over ranks before a step."""

    sharded = False

    def __init__(self, task: Task[Any], experiment: Experiment, ranks: Ranks | None = None) -> None:
        """Take the task to its device and make the optimiser.

        Raises:
            ConfigError: ``train.device`` is not usable here.
        """
        train = experiment.train
        self.ranks = ranks or Ranks()
        self.device = choose_device(train.device)
        self.task = task.to(self.device)
        recompute_blocks(self.task, train.activation_checkpointing)
        self.bf16 = uses_bf16(train.precision, self.device)
        self.compiled = compile_blocks(self.task, train.compile, self.device)
        self.optimiser = build_optimiser(self.task, experiment.optim)
        self.clip = experiment.optim.clip
        self.seed = train.seed
        self.bucket_size = experiment.engine.bucket_size
        self._trained = [p for group in self.optimiser.param_groups for p in group["params"]]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 matrix products where the precision asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def accumulate(self, prepared: Any, *, scale: float, update: int) -> Step:
        """See :class:`Engine`."""
        with self.autocast():
            step: Step = self.task(prepared, seed=self.seed, update=update)
        (step.total * scale).backward()
        return step

    def step(self, rate: float, update: int) -> Tensor:
        """See :class:`Engine`."""
        set_rate(self.optimiser.param_groups, rate)
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._sum_gradients()
        if self.clip is not None:
            norm = nn.utils.clip_grad_norm_(self._trained, self.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.task.after_step(update, lerp)
        return norm

    def _sum_gradients(self) -> None:
        if self.ranks.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in (*self._trained, None):
            if bucket and (parameter is None or size >= self.bucket_size):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat)
                parts = flat.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(
                    bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)]
                )
                bucket, size = [], 0
            if parameter is not None and parameter.grad is not None:
                bucket.append(parameter.grad)
                size += parameter.numel()

    def state(self) -> dict[str, Shares]:
        """See :class:`Engine`."""
        rank, world = self.ranks.rank, self.ranks.world
        return {
            "model": shared_out(self.task.own_state(), rank, world),
            "optimiser": shared_out(adamw_state(self.optimiser, self.task), rank, world),
        }

    def load_state(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        trained = {name: p.shape for name, p in self.task.named_parameters() if p.requires_grad}
        for _ in check_moments(optimiser, trained):
            pass  # before anything is changed
        self.task.load_own_state(model)
        load_adamw_state(self.optimiser, self.task, optimiser)
