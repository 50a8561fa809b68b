"""The regression objective and the statistics that show a collapse.

Shapes: H hidden positions (over all samples and masks), D channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def regression_loss(prediction: Tensor, target: Tensor, *, beta: float, scale: float | None) -> Tensor:
    """(H,) float32: smooth L1 (paper 1, equation 3) or, for ``beta`` 0, squared error, summed over channels.

    Args:
        prediction: (H, D).
        target: (H, D).
        beta: where smooth L1 turns from squared to absolute error.
        scale: factor of the loss; None for 1 / sqrt(D), which keeps the gradient's size independent of the width.
    """
    prediction, target = prediction.float(), target.float()
    if beta == 0.0:
        loss = F.mse_loss(prediction, target, reduction="none")
    else:
        loss = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    return loss.sum(-1) * (1.0 / math.sqrt(prediction.shape[-1]) if scale is None else scale)


_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextlib.contextmanager
def on_this_rank_alone() -> Iterator[None]:
    """Where one rank runs a model that the others do not: statistics are then of its own rows."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """Standard deviation over rows, averaged over channels, of (R, D) rows of **all** ranks: zero is a collapse."""
    x = x.detach().double()
    sums = torch.cat([x.new_tensor([x.shape[0]]), x.sum(0), x.square().sum(0)])
    if dist.is_available() and dist.is_initialized() and not _alone.get():
        dist.all_reduce(sums)
    count = sums[0]
    first, second = sums[1:].chunk(2)
    variance = (second - first.square() / count) / (count - 1).clamp(min=1)
    return torch.sqrt(variance.clamp(min=0) + 1e-6).mean().float()
