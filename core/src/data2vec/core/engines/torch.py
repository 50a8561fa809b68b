"""The engine without a library: AdamW, autocast, accumulation and clipping of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data2vec.core.distributed.device import choose_device
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.engines.engine import Engine, Shares, compile_blocks, recompute_blocks, shared_out, uses_bf16
from data2vec.core.engines.optimiser import adamw_state, build_optimiser, check_moments, load_adamw_state, set_rate
from data2vec.core.settings.fields import Recipe
from data2vec.core.task import Step, Task, lerp


class TorchEngine(Engine):
    """Plain PyTorch: AdamW, autocast, accumulation and clipping; gradients are summed over ranks before a step."""

    sharded = False

    def __init__(self, task: Task[Any], recipe: Recipe, ranks: Ranks | None = None) -> None:
        """Take the task to its device and make the optimiser.

        Raises:
            ConfigError: ``train.device`` is not usable here.
        """
        train = recipe.train
        self.ranks = ranks or Ranks()
        self.device = choose_device(train.device)
        self.task = task.to(self.device)
        recompute_blocks(self.task, train.activation_checkpointing)
        self.bf16 = uses_bf16(train.precision, self.device)
        self.compiled = compile_blocks(self.task, train.compile, self.device)
        self.optimiser = build_optimiser(self.task, recipe.optim)
        self.clip = recipe.optim.clip
        self.seed = train.seed
        self.bucket_size = recipe.engine.bucket_size
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
        set_rate(self.optimiser.param_groups, rate, update)
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
