"""What the training loop asks of whatever runs the model: forward and backward, a step, and its state."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment, OptimConfig, Precision, Switch
from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.model.data2vec import Data2Vec, Output
from data2vec.core.model.mask import Mask

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """One process's share of training."""

    model: Data2Vec
    device: torch.device
    rank: int
    world: int

    def forward_backward(self, batch: Batch, mask: Mask, *, count: int, update: int) -> Output:
        """Add the gradient of a micro-batch's summed loss divided by ``count``, the hidden positions of the update."""

    def step(self, learning_rate: float, update: int) -> Tensor:
        """Clip, update the student, move the teacher, clear the gradients; returns the gradient norm (a scalar)."""

    def optimiser_state(self) -> dict[str, Tensor]:
        """Everything the optimiser remembers, by parameter name."""

    def load_optimiser_state(self, state: dict[str, Tensor]) -> None: ...


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
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


class TorchEngine:
    """Plain PyTorch in one process: AdamW, autocast, gradient accumulation and clipping."""

    rank = 0
    world = 1

    def __init__(self, model: Data2Vec, experiment: Experiment) -> None:
        """Take the model to its device and make the optimiser.

        Raises:
            ConfigError: ``train.device`` is not usable here.
        """
        train = experiment.train
        self.device = choose_device(train.device)
        self.model = model.to(self.device)
        self.model.student.transformer.activation_checkpointing = train.activation_checkpointing
        self.bf16 = uses_bf16(train.precision, self.device)
        self.compiled = compile_blocks(self.model, train.compile, self.device)
        self.optimiser = build_optimiser(self.model, experiment.optim)
        self.clip = experiment.optim.clip
        self.seed = train.seed
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
        if self.clip is not None:
            norm = nn.utils.clip_grad_norm_(self._trained, self.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.model.update_teacher(update)
        return norm

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def optimiser_state(self) -> dict[str, Tensor]:
        """See :class:`Engine`; keys are PARAMETER/MOMENT."""
        names = self._names()
        return {
            f"{names[id(parameter)]}/{key}": value
            for parameter, state in self.optimiser.state.items()
            for key, value in state.items()
        }

    def load_optimiser_state(self, state: dict[str, Tensor]) -> None:
        """See :class:`Engine`.

        Raises:
            CheckpointError: a parameter that this model does not have, or a moment of another shape.
        """
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, moment = key.rpartition("/")
            if name not in parameters or (moment != "step" and value.shape != parameters[name].shape):
                raise CheckpointError(f"the optimiser state {key} fits no parameter of this model")
            parameter = parameters[name]
            # A copy: what was loaded may be a read-only view of the file.
            loaded.setdefault(parameter, {})[moment] = value.to(parameter.device, copy=True)
        self.optimiser.state.clear()
        self.optimiser.state.update(loaded)
