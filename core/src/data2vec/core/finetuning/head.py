"""From the features of a sample to its logits.

Shapes: B samples, T positions, D width, C logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data2vec.core.model.encoder import Encoded, mean_over_valid
from data2vec.core.settings.finetuning import HeadConfig, Pool

_EPS = 1e-6  # of the norm before the head, in BEiT and in the released code of 2.0


class Head(nn.Module):
    """Pool, normalise, and project; with a hidden layer it is RoBERTa's classification head.

    Args:
        width: D.
        outputs: C.
        config: the settings.
    """

    def __init__(self, width: int, outputs: int, config: HeadConfig) -> None:
        super().__init__()
        self.pool = config.pool
        self.norm: nn.Module = nn.LayerNorm(width, eps=_EPS) if config.norm else nn.Identity()
        self.hidden = nn.Linear(width, width) if config.hidden else None
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.projection.weight, std=config.init_std)
        nn.init.zeros_(self.projection.bias)

    def forward(self, encoded: Encoded, padding: Tensor | None) -> Tensor:
        """(B, C) logits; ``padding``: (B, T) or None."""
        pooled = encoded.x[:, 0] if self.pool is Pool.FIRST else mean_over_valid(encoded.positions, padding)
        x = self.norm(pooled)
        if self.hidden is not None:
            x = torch.tanh(self.hidden(self.dropout(x)))
        logits: Tensor = self.projection(self.dropout(x))
        return logits
