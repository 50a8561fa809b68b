"""What the training loop asks of whatever runs the model: forward and backward, a step, and its state."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment, OptimConfig, Precision, Switch
from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.model.data2vec import Data2Vec, Output
from data2vec.core.model.mask import Mask
from data2vec.core.training.launchers import place
from data2vec.core.training.pieces import Piece
from data2vec.core.training.ranks import Ranks

_log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
Shares = Mapping[str, Tensor | Piece]
"""What one rank saves of some tensors: whole ones, and pieces of those that it shares with other ranks."""


class Engine(Protocol):
    """One process's share of training.

    Every engine gives a parameter that an update does not use a gradient of zero, so that its moments and its weight
    decay go on: sharded optimisers cannot leave it out.
    """

    model: Data2Vec
    device: torch.device
    ranks: Ranks
    bf16: bool
    compiled: bool
    sharded: bool  # this rank holds the model in part: it computes only together with the others

    def forward_backward(self, batch: Batch, mask: Mask, *, count: int, update: int) -> Output:
        """Add the gradient of a micro-batch's summed loss divided by ``count``, the hidden positions of the update."""

    def step(self, learning_rate: float, update: int) -> Tensor:
        """Clip, update the student, move the teacher, clear the gradients; returns the gradient norm (a scalar)."""

    def state(self) -> dict[str, Shares]:
        """This rank's share of ``model`` (as :meth:`Data2Vec.own_state`) and ``optimiser`` (PARAMETER/MOMENT)."""

    def load_state(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        """Continue from the whole tensors of any engine.

        Raises:
            CheckpointError: a name or a shape does not fit this model, which is then unchanged.
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters in two groups: biases, norms and other vectors are not decayed."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.squeeze().ndim < 2 or name.endswith(".prefix")
            (kept if vector else decayed).append(parameter)
    groups = [(decayed, weight_decay), (kept, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def build_optimiser(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def compile_blocks(model: Data2Vec, switch: Switch, device: torch.device) -> bool:
    """Compile each Transformer block in place where asked for and possible; says so in one line where it is not.

    ``auto`` compiles on a GPU. Blocks alone, because all of them share one compiled graph, which is ready in seconds.
    """
    if switch is Switch.OFF or (switch is Switch.AUTO and device.type != "cuda"):
        return False
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("gcc")
    if compiler is None:
        _log.warning("torch.compile needs a C++ compiler and none is installed: running without it")
        return False
    stacks: Iterable[nn.ModuleList] = (
        stack
        for encoder in (model.student, model.teacher.encoder)
        for stack in (encoder.transformer.blocks, *(encoder.frontend(name).blocks for name in encoder.frontends))
    )
    for block in {id(block): block for stack in stacks for block in stack}.values():
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


class TorchEngine:
    """Plain PyTorch: AdamW, autocast, accumulation and clipping; gradients are summed over ranks before a step."""

    sharded = False

    def __init__(self, model: Data2Vec, experiment: Experiment, ranks: Ranks | None = None) -> None:
        """Take the model to its device and make the optimiser.

        Raises:
            ConfigError: ``train.device`` is not usable here.
        """
        train = experiment.train
        self.ranks = ranks or Ranks()
        self.device = choose_device(train.device)
        self.model = model.to(self.device)
        self.model.student.transformer.activation_checkpointing = train.activation_checkpointing
        self.bf16 = uses_bf16(train.precision, self.device)
        self.compiled = compile_blocks(self.model, train.compile, self.device)
        self.optimiser = build_optimiser(self.model, experiment.optim)
        self.clip = experiment.optim.clip
        self.seed = train.seed
        self.bucket_size = experiment.engine.bucket_size
        self._trained = [p for group in self.optimiser.param_groups for p in group["params"]]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 matrix products where the precision asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def forward_backward(self, batch: Batch, mask: Mask, *, count: int, update: int) -> Output:
        """See :class:`Engine`."""
        with self.autocast():
            output: Output = self.model(batch, mask, seed=self.seed, update=update)
        (output.total / count).backward()
        return output

    def step(self, learning_rate: float, update: int) -> Tensor:
        """See :class:`Engine`."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
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
        self.model.update_teacher(update)
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
            "model": shared_out(self.model.own_state(), rank, world),
            "optimiser": shared_out(adamw_state(self.optimiser, self.model), rank, world),
        }

    def load_state(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        trained = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}
        for _ in check_moments(optimiser, trained):
            pass  # before anything is changed
        self.model.load_own_state(model)
        load_adamw_state(self.optimiser, self.model, optimiser)
