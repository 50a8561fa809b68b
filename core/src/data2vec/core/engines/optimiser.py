"""AdamW over a task's groups, and its state by the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data2vec.core.errors import CheckpointError
from data2vec.core.settings.fields import OptimConfig
from data2vec.core.task import Task

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def build_optimiser(task: Task[Any], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the task's groups."""
    groups = [
        {
            "params": list(group.parameters),
            "weight_decay": group.weight_decay,
            "lr_scale": group.lr_scale,
            "starts": group.starts,
        }
        for group in task.groups(config)
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_rate(groups: Iterable[dict[str, Any]], rate: float, update: int) -> None:
    """Give each of an optimiser's groups its learning rate for an update, counted from 1."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"] if update > group["starts"] else 0.0


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
