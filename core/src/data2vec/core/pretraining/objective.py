"""The regression objective.

Shapes: H hidden positions (over all samples and masks), D channels.
"""

from __future__ import annotations

import math

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
