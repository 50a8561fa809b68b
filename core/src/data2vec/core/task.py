"""The task that is trained: the one interface between a kind of training and the loop, the engines and the checkpoints.

Pretraining is a task; classification, CTC and others are tasks as well. The loop takes a batch from the data, lets the
task prepare it, and gives it to the engine, which runs the task's forward and backward pass and its optimiser step.

Shapes: R rows of values, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Encoder
from data2vec.core.settings.fields import OptimConfig

Move = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]
"""Moves tensors (first) towards others (second) by a share of their distance, in place."""


class Prepared(Protocol):
    """The inputs of a task's forward pass, made of a batch."""

    @property
    def count(self) -> int:
        """The number of things that the loss is summed over: hidden positions, samples, tokens."""

    def __len__(self) -> int:
        """Samples."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device, asynchronously from pinned memory."""


P = TypeVar("P", bound=Prepared)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of rows: from them follows the spread of rows that several ranks or passes hold.

    ``count``: () float64. ``sum``, ``squares``: (C,) float64.
    """

    count: Tensor
    sum: Tensor
    squares: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, rows: Tensor) -> Self:
        """The moments of (R, C) rows."""
        rows = rows.detach().double()
        return cls(rows.new_tensor(rows.shape[0]), rows.sum(0), rows.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.squares + other.squares)

    def spread(self) -> Tensor:
        """Standard deviation over rows, averaged over channels; zero is a collapse."""
        variance = (self.squares - self.sum.square() / self.count) / (self.count - 1).clamp(min=1)
        return torch.sqrt(variance.clamp(min=0) + 1e-6).mean().float()


@dataclass(frozen=True)
class Step:
    """The result of one forward pass, of this rank's samples.

    ``total``: the loss summed over ``count``, with its gradient. ``losses``: the detached means of its parts.
    ``moments``: of the signals whose spread the task's :meth:`Task.vitals` judge.
    """

    total: Tensor
    count: int
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean."""
        return self.total / self.count


@dataclass(frozen=True)
class Group:
    """Parameters that the optimiser treats alike: their weight decay, and a factor of the learning rate.

    ``starts``: updates for which they stay as they are.
    """

    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    lr_scale: float = 1.0
    starts: int = 0


@dataclass(frozen=True)
class Vital:
    """A value of every update that tells whether the run still learns.

    ``signal``: its key in the metrics. ``component``: what it is a value of, in the order in which data flows.
    ``advice``: what to try when it fails. ``least``: the spread below which it has collapsed; None for a value that
    only has to be finite. ``what``: the name of what collapses. ``starts_flat``: it may be low until warm-up ends.
    """

    signal: str
    component: str
    advice: str
    least: float | None = None
    what: str = ""
    starts_flat: bool = False


LOSS = Vital("loss", "loss", "lower optim.lr, raise optim.warmup, or clip gradients (optim.clip=1.0)")


class Task(nn.Module, ABC, Generic[P]):
    """A model with its objective.

    Every rank has the same task, and calls each of its methods with samples of its own.
    """

    @abstractmethod
    def prepare(self, batch: Batch, *, seed: int, update: int) -> P:
        """Make the inputs of the forward pass, on the CPU (masks, mixed samples, targets).

        Every random choice follows from the samples' numbers, ``seed`` and ``update``: it depends neither on the rank
        nor on whether the run was resumed.
        """

    @abstractmethod
    def forward(self, prepared: P, *, seed: int = 0, update: int = 0) -> Step:
        """Compute the loss, without a collective operation.

        Args:
            prepared: on the task's device.
            seed: of the run; with ``update`` it decides what all ranks choose alike, such as which blocks are skipped.
            update: number of the optimiser's next update.
        """

    def groups(self, optim: OptimConfig) -> list[Group]:
        """Trained parameters in the optimiser's groups; by default biases, norms and other vectors do not decay."""
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                vector = parameter.squeeze().ndim < 2 or name.endswith(".prefix")
                (kept if vector else decayed).append(parameter)
        groups = [Group(tuple(decayed), optim.weight_decay), Group(tuple(kept), 0.0)]
        return [group for group in groups if group.parameters]

    def followers(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, follower, followed) of every parameter that :meth:`after_step` moves towards another.

        A sharded engine keeps both in the same places, so that it moves shards and exchanges nothing.
        """
        return []

    def after_step(self, update: int, move: Move) -> None:
        """Finish an applied update: let the followers follow, with the engine's way to move tensors."""

    def known(self, update: int) -> dict[str, float]:
        """Values of the log line that follow from the number of applied updates."""
        return {}

    def inspect(self, prepared: P) -> dict[str, float]:
        """Values of some log lines that take a forward pass of their own; called on every rank."""
        return {}

    def blocks(self) -> Iterable[nn.Module]:
        """The modules that are compiled one by one; several of them share a graph."""
        return ()

    def encoders(self) -> Mapping[str, Encoder]:
        """The encoders whose features can be asked for, the preferred one first."""
        return {}

    def vitals(self) -> Sequence[Vital]:
        """List what the run is judged by, in the order in which data flows: the first that fails is the cause."""
        return (LOSS,)

    def own_state(self) -> dict[str, Tensor]:
        """The state that a checkpoint holds, each tensor once."""
        return self.state_dict()

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo :meth:`own_state`, in place.

        Raises:
            CheckpointError: names or shapes that do not fit; the task is then unchanged.
        """
        check_state(state, {name: value.shape for name, value in self.own_state().items()})
        self.load_state_dict(dict(state), strict=False)

    def start_from(self, state: Mapping[str, Tensor]) -> list[str]:
        """Begin with the weights of another task's :meth:`own_state`; returns a line on each thing made to fit.

        Raises:
            CheckpointError: names or shapes that do not fit; the task is then unchanged.
        """
        self.load_own_state(state)
        return []


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Check that a state has the names and shapes of a task's.

    Raises:
        CheckpointError: it has not; the first problems are named.
    """
    problems = [f"it has no {name}" for name in sorted(shapes.keys() - state.keys())]
    problems += [f"{name} has no place here" for name in sorted(state.keys() - shapes.keys())]
    for name in sorted(state.keys() & shapes.keys()):
        shape = tuple(state[name].shape)
        if shape != tuple(shapes[name]):
            problems.append(f"{name} is {shape} there and {tuple(shapes[name])} here")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError("the saved weights do not fit this model: " + "; ".join(problems[:5]) + more)


def lerp(followers: Sequence[Tensor], followed: Sequence[Tensor], share: float) -> None:
    """Move tensors that this rank holds whole, in one multi-tensor operation."""
    torch._foreach_lerp_(list(followers), [value.detach() for value in followed], share)
