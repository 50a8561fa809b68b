"""Multi-head self-attention with an optional additive bias.

Shapes: N rows, T positions (prefix tokens included), D width, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.model.mask import gather_positions


class AttentionBias(nn.Module, ABC):
    """A bias on attention scores that depends on positions (relative position bias, ALiBi)."""

    @abstractmethod
    def forward(self, shape: tuple[int, ...], *, prefix: int) -> Tensor:
        """(1, H, P + T, P + T) for the whole grid ``shape`` of T positions after ``prefix`` extra tokens."""


def attention_mask(
    bias: Tensor | None, padding: Tensor | None, visible: Tensor | None, *, prefix: int, dtype: torch.dtype
) -> Tensor | None:
    """What scaled_dot_product_attention takes: the bias at the visible positions, minus infinity at padded keys.

    Args:
        bias: (1, H, P + T, P + T) or None.
        padding: (N, P + V) bool, true on padding, of the positions that are present, or None.
        visible: (N, V) the positions that are present, or None when all T are.
    """
    if bias is not None and visible is not None:
        extra = torch.arange(prefix, device=visible.device).expand(visible.shape[0], prefix)
        present = torch.cat([extra, visible + prefix], dim=1)
        rows = bias[0].permute(1, 2, 0)[present[:, :, None], present[:, None, :]]  # (N, V, V, H)
        bias = rows.permute(0, 3, 1, 2)
    if bias is not None:
        bias = bias.to(dtype)
    if padding is None:
        return bias
    if bias is None:
        return ~padding[:, None, None, :]
    return bias.masked_fill(padding[:, None, None, :], float("-inf"))


def present_padding(padding: Tensor | None, visible: Tensor | None, prefix: int) -> Tensor | None:
    """(N, P + V) bool: the padding of the positions that are present; prefix tokens never are padding."""
    if padding is None:
        return None
    if visible is not None:
        padding = gather_positions(padding, visible)
    return F.pad(padding, (prefix, 0), value=False)


class Attention(nn.Module):
    """Self-attention. A bias on the keys cannot change a softmax, so ``qkv`` simply has all three."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = attention_dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, D) to (N, T, D); ``mask`` as :func:`attention_mask` makes it."""
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if q.dtype is torch.bfloat16 and q.device.type == "cpu":
            # torch 2.9's bf16 backward of this on a CPU takes ten times as long as the fp32 one.
            q, k, v = q.float(), k.float(), v.float()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        rate = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        out: Tensor = self.dropout(self.proj(attended.transpose(1, 2).reshape(rows, length, width)))
        return out
