"""Initial values of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STD = 0.02
_BOUND = 5.0


def truncated_normal_(tensor: Tensor, std: float = STD) -> Tensor:
    """Fill a tensor in place with normal values within five standard deviations, and return it.

    BEiT's and the authors' code bounds the values at -2 and 2, which is a hundred standard deviations: a normal
    distribution but for one value in 2^24, whose uniform draw is exactly -1 and which becomes -2. Five standard
    deviations keep the distribution (6e-7 of it lies beyond) and exclude that value.
    """
    with torch.no_grad():
        return nn.init.trunc_normal_(tensor, std=std, a=-_BOUND * std, b=_BOUND * std)


def initialise(module: nn.Module) -> None:
    """Give linear layers normal weights of standard deviation 0.02 and zero biases, as BERT, BEiT and the authors."""
    if isinstance(module, nn.Linear):
        truncated_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
