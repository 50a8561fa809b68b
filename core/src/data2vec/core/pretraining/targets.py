"""The targets that the student regresses: the normalised mean of the teacher's top layers (paper 1, section 3.3).

Shapes: B samples, T positions, D channels, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec.core.settings.pretraining import TargetNorm

_EPS = 1e-5  # of torch's layer, instance and batch norm, which the authors use


def _standardised(x: Tensor, dims: tuple[int, ...], valid: Tensor | None) -> Tensor:
    """Zero mean and unit (biased) variance over ``dims``, padded positions left out of the statistics."""
    if valid is None:
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    else:
        weight = valid.unsqueeze(-1).to(x.dtype)
        count = weight.sum(dims, keepdim=True)
        mean = (x * weight).sum(dims, keepdim=True) / count
        variance = ((x - mean).square() * weight).sum(dims, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + _EPS)


def normalise(x: Tensor, norm: TargetNorm, padding: Tensor | None = None) -> Tensor:
    """(B, T, D) float32, normalised without learned parameters; instance and batch norm skip ``padding`` (B, T)."""
    x = x.float()
    valid = None if padding is None else ~padding
    match norm:
        case TargetNorm.NONE:
            return x
        case TargetNorm.LAYER:
            return F.layer_norm(x, x.shape[-1:], eps=_EPS)
        case TargetNorm.INSTANCE:  # over positions, each channel of each sample
            return _standardised(x, (1,), valid)
        case TargetNorm.BATCH:
            return _standardised(x, (0, 1), valid)


def make_targets(
    layers: Sequence[Tensor], *, layer_norm: TargetNorm, mean_norm: TargetNorm, padding: Tensor | None = None
) -> Tensor:
    """(B, T, D) float32: the mean over K normalised layers, itself normalised.

    Args:
        layers: K tensors (B, T, D), without prefix tokens.
        layer_norm: how each layer is normalised.
        mean_norm: how their mean is normalised.
        padding: (B, T) bool, true on padding.
    """
    total = normalise(layers[0], layer_norm, padding)
    for layer in layers[1:]:
        total = total + normalise(layer, layer_norm, padding)
    return normalise(total / len(layers), mean_norm, padding)
