"""Multi-head self-attention with an optional additive bias.

Shapes: N rows, T positions (prefix tokens included), D width, H heads.
"""

from __future__ import annotations

import math
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


def alibi_slopes(heads: int) -> list[float]:
    """A slope for each head: 2^(-8 h / H) for H a power of two (Press et al. 2022, "Train short, test long").

    For other numbers, as there: the slopes of the next lower power of two, then every other one of the next higher.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(heads - power)]


class Alibi(AttentionBias):
    """Symmetric ALiBi: minus the distance of two positions times a slope for each head (data2vec 2.0, speech).

    Args:
        heads: H.
        learned_scale: each head learns a factor of its slope, 1 at first and never below 0 in effect.
    """

    slopes: Tensor

    def __init__(self, heads: int, *, learned_scale: bool = False) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)), persistent=False)
        self.scale = nn.Parameter(torch.ones(heads)) if learned_scale else None

    def forward(self, shape: tuple[int, ...], *, prefix: int) -> Tensor:
        """See :class:`AttentionBias`; extra tokens before the sequence are at no distance from anything."""
        (length,) = shape
        places = torch.arange(length, device=self.slopes.device)
        distance = (places[:, None] - places[None, :]).abs().to(self.slopes.dtype)
        slopes = self.slopes if self.scale is None else self.slopes * self.scale.clamp(min=0)
        return F.pad(-slopes[:, None, None] * distance, (prefix, 0, prefix, 0)).unsqueeze(0)


def attention_mask(
    bias: Tensor | None, padding: Tensor | None, visible: Tensor | None, *, prefix: int, dtype: torch.dtype
) -> Tensor | None:
    """Make the mask of scaled_dot_product_attention: the bias at the visible positions, minus infinity at padded keys.

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


def present_padding(
    padding: Tensor | None, visible: Tensor | None, prefix: int, filler: Tensor | None = None
) -> Tensor | None:
    """(N, P + V) bool: which of the present positions are padding or fillers; prefix tokens never are."""
    if padding is not None and visible is not None:
        padding = gather_positions(padding, visible)
    if filler is not None:
        padding = filler if padding is None else padding | filler
    return None if padding is None else F.pad(padding, (prefix, 0), value=False)


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
