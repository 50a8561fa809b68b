"""Random numbers that are a pure function of what they are for.

A mask must not depend on the rank, the loader worker, the other samples of the batch, or on whether the run was
resumed, so it cannot come from a generator with a state. Each number here is a hash of its coordinates
(seed, update, sample, index): SplitMix64 (Steele, Lea and Flood 2014), which passes BigCrush, applied to a counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_ODD = 0xD1342543DE82EF95  # spreads the bits of small numbers
_ALL = (1 << 64) - 1


def _signed(number: int) -> int:
    """The int64 with the same bits as a number in [0, 2^64): torch has no arithmetic on unsigned ones."""
    return number - (1 << 64) if number >> 63 else number


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts signed numbers arithmetically


def mix(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser: int64 to int64, a bijection that scatters every bit."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _mixed(number: int) -> int:
    """:func:`mix` of a Python integer, taken modulo 2^64; the result is in [0, 2^64)."""
    number &= _ALL
    number = (number ^ (number >> 30)) * _MIX1 & _ALL
    number = (number ^ (number >> 27)) * _MIX2 & _ALL
    return number ^ (number >> 31)


def fold(*numbers: int) -> int:
    """A number in [0, 2^64) that depends on the lowest 64 bits of each of several, and on their order."""
    key = 0
    for number in numbers:
        key = _mixed((key ^ (number * _ODD + 1)) + GOLDEN)
    return key


def sample_keys(ids: Tensor, *, seed: int, update: int, stream: int = 0) -> Tensor:
    """(B,) int64: one key per sample for this seed, update and stream (use another stream for other choices)."""
    # Everything that the samples share is folded first, in plain integers: an operation on a small tensor is slower.
    return mix(mix(ids + _signed(GOLDEN)) ^ _signed(fold(seed, update, stream)))


def uniform(keys: Tensor, count: int) -> Tensor:
    """(..., count) float64 in [0, 1): ``count`` independent numbers for each key, from its 53 highest bits."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _signed(GOLDEN)
    bits = mix(keys.unsqueeze(-1) + counter)
    return _shift_right(bits, 11).double() * 2.0**-53


def derive(*numbers: int) -> int:
    """A 63-bit seed from several numbers, for generators that take one (data order, augmentation)."""
    return fold(*numbers) & (2**63 - 1)
