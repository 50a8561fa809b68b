"""The Transformer that student and teacher share in shape, for every modality.

Shapes: N rows, T positions (prefix tokens included), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data2vec.core.hashing import sample_keys, uniform
from data2vec.core.model.attention import Attention
from data2vec.core.model.initialisation import initialise
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig


class DropPath(nn.Module):
    """Stochastic depth for each row (Huang et al. 2016): the branch is dropped at ``rate``, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, *, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.activation_dropout = nn.Dropout(activation_dropout)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.fc2(self.activation_dropout(self.activation(self.fc1(x)))))
        return out


class Block(nn.Module):
    """One Transformer block, pre- or post-norm, with optional layer scale (Touvron et al. 2021)."""

    def __init__(self, config: TransformerConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = config.norm_order is NormOrder.PRE
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = Attention(
            width, config.heads, dropout=config.dropout, attention_dropout=config.attention_dropout
        )
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.feed_forward = FeedForward(
            width,
            int(width * config.mlp_ratio),
            dropout=config.dropout,
            activation_dropout=config.activation_dropout,
        )
        self.drop_path = DropPath(drop_path)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((width,), scale))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The block's output and its feed-forward sub-layer's output before the residual, both (N, T, D)."""
        if self.pre_norm:
            x = x + self.drop_path(self._scaled(self.attention(self.norm1(x), mask), self.scale1))
            forward = self.drop_path(self._scaled(self.feed_forward(self.norm2(x)), self.scale2))
            return x + forward, forward
        x = self.norm1(x + self.drop_path(self._scaled(self.attention(x, mask), self.scale1)))
        forward = self._scaled(self.feed_forward(x), self.scale2)
        return self.norm2(x + self.drop_path(forward)), forward

    @staticmethod
    def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
        return x if scale is None else x * scale


def build_blocks(config: TransformerConfig, depth: int, drop_path: Sequence[float] | None = None) -> nn.ModuleList:
    """``depth`` initialised blocks; ``drop_path`` gives each one's rate, None for zero everywhere."""
    rates = drop_path if drop_path is not None else [0.0] * depth
    blocks = nn.ModuleList(Block(config, rate) for rate in rates)
    blocks.apply(initialise)
    return blocks


def dropped_layers(rate: float, depth: int, *, seed: int, update: int) -> list[bool]:
    """Draw the blocks that layer drop skips in this update: alike on every rank, so that collectives stay aligned."""
    if rate == 0.0:
        return [False] * depth
    draws = uniform(sample_keys(torch.zeros(1, dtype=torch.int64), seed=seed, update=update, stream=1), depth)[0]
    return [bool(draw < rate) for draw in draws]


class Transformer(nn.Module):
    """A stack of blocks; pre-norm stacks end in a layer norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        rates = torch.linspace(0.0, config.drop_path, config.depth).tolist()
        self.blocks = build_blocks(config, config.depth, rates)
        pre = config.norm_order is NormOrder.PRE
        self.norm: nn.Module = nn.LayerNorm(config.width, eps=config.norm_eps) if pre else nn.Identity()
        self.activation_checkpointing = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        collect: LayerOutput | None = None,
        top_k: int | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks.

        Args:
            x: (N, T, D).
            mask: as :func:`data2vec.core.model.attention.attention_mask` makes it.
            collect: which output of each block to return; None for no layer outputs.
            top_k: collect the last ``top_k`` blocks only; None for all.
            dropped: for each block whether layer drop skips it; None for none.

        Returns:
            The (normalised) last output, and the collected outputs from the lowest to the highest block.
        """
        layers: list[Tensor] = []
        first = 0 if top_k is None else len(self.blocks) - top_k
        for index, block in enumerate(self.blocks):
            if dropped is not None and dropped[index]:
                continue
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, forward = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x, forward = block(x, mask)
            if collect is not None and index >= first:
                layers.append(forward if collect is LayerOutput.FEED_FORWARD else x)
        return self.norm(x), layers
