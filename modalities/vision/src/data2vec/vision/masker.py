"""Masks over a grid of patches: BEiT's blocks (data2vec 1.0) and inverse blocks (data2vec 2.0).

Both maskers are pure functions of (seed, update, sample, number of the mask), so the same on every rank and device.
They are vectorised over samples and masks; the only Python loop is over the few blocks that make up one mask. A mask
is a set of bits in 64-bit words while it is made: adding a block and counting its new patches takes a few operations
on words. NumPy does this because its operations on small arrays start several times faster than torch's.

Shapes: B samples, M masks, R = B * M rows, h x w grid, T = h * w positions, A proposals, L = ceil(T / 64) words,
which come first: (L, R).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.model.random import sample_keys

_ATTEMPTS = 10  # proposals for each block, as in BEiT; after as many in vain, the mask is topped up at random
_AT_ONCE = 5  # proposals that are looked at together: fewer waste less, more need fewer steps
_STEPS = 8  # steps for which random numbers are drawn in one go
_UNIT = np.float32(2.0**-16)  # random numbers come in pieces of 16 bits

Words = NDArray[np.uint64]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class BlockMasker:
    """BEiT's block-wise masking (Bao et al. 2021, algorithm 1; data2vec 1.0).

    Blocks with an area uniform in [``min_block``, what remains to hide, at most ``max_block``], a log-uniform aspect
    (height / width) in [``min_aspect``, ``max_aspect``] and a uniform place are added while they bring between one
    and the remaining number of new patches; no block is as high or as wide as the grid. BEiT stops after ten
    proposals in vain, so its rows hide slightly different numbers; here the rest is then chosen at random, and every
    row hides exactly ``round(ratio * T)`` patches (at least 1, at most T - 1).
    """

    ratio: float = 0.6
    min_block: int = 16
    max_block: int | None = None
    min_aspect: float = 0.3
    max_aspect: float | None = None  # null: 1 / min_aspect
    masks: int = 1

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Boolean (B, M, T), true where hidden; see :class:`data2vec.core.modality.Masker`."""
        height, width = shape
        total = _positions(shape)
        hidden = block_hidden(self.ratio, total)
        keys = _mask_keys(ids, self.masks, seed=seed, update=update)
        mask = _unpack(self._add_blocks(keys, (height, width), hidden), total)
        short = np.flatnonzero(mask.sum(1) < hidden)
        if len(short):
            mask[short] = _exactly(mask[short], hidden, keys[short])
        return torch.from_numpy(mask).view(len(ids), self.masks, total).to(ids.device)

    def _add_blocks(self, keys: Words, shape: tuple[int, int], hidden: int) -> Words:
        """(L, R) masks made of blocks, each of ``hidden`` patches or, where no further block fitted, fewer."""
        bands, columns = _bands(*shape)
        result = np.empty((len(bands), len(keys)), dtype=np.uint64)
        rows = np.arange(len(keys))
        mask = np.zeros_like(result)  # this and the next two hold ``rows``, those that may still take blocks
        remaining = np.full(len(keys), hidden)
        failures = np.zeros(len(keys), dtype=np.int64)
        drawn = np.empty((len(keys), 0, 0, 4), dtype=np.uint16)
        step = 0
        while remaining.any():
            if np.count_nonzero(remaining) < 0.75 * len(rows):  # leave finished rows behind, but not at every step
                result[:, rows] = mask
                active = np.flatnonzero(remaining)
                rows, mask, remaining, failures = rows[active], mask[:, active], remaining[active], failures[active]
                drawn = drawn[active]
            if step % _STEPS == 0:
                bits = _random_bits(keys[rows], _STEPS * _AT_ONCE, first=step * _AT_ONCE)
                drawn = bits.view(np.uint16).reshape(len(rows), _STEPS, _AT_ONCE, 4)
            most = remaining if self.max_block is None else np.minimum(remaining, self.max_block)
            top, left, h, w = self.propose(drawn[:, step % _STEPS].transpose(2, 0, 1) * _UNIT, most, shape)
            boxes = bands.take(h * (shape[0] + 1) + top, axis=1)  # (L, R, A)
            boxes &= columns.take(w * (shape[1] + 1) + left, axis=1)
            new = np.bitwise_count(boxes & ~mask[:, :, None]).sum(0, dtype=np.int64)
            accepted = (new > 0) & (new <= most[:, None])
            first = accepted.argmax(1) + np.arange(0, accepted.size, _AT_ONCE)
            added = accepted.take(first)
            mask |= boxes.reshape(len(boxes), -1).take(first, axis=1) * added
            failures += _AT_ONCE
            failures *= ~added
            remaining -= new.take(first) * added
            remaining *= failures < _ATTEMPTS
            step += 1
        result[:, rows] = mask
        return result

    def propose(
        self, random: Floats, most: Integers, shape: tuple[int, int]
    ) -> tuple[Integers, Integers, Integers, Integers]:
        """Blocks (top, left, height, width), each (R, A), inside the grid.

        Blocks that would be as high or as wide as the grid, or more, come as just that; BEiT rejects them.

        Args:
            random: (4, R, A) uniform in [0, 1).
            most: (R,) largest area; where it is below ``min_block``, areas lie between the two.
            shape: (h, w) of the grid.
        """
        low = math.log(self.min_aspect)
        high = -low if self.max_aspect is None else math.log(self.max_aspect)
        side = np.exp(random[1] * np.float32(0.5 * (high - low)) + np.float32(0.5 * low))  # root of the aspect
        root = np.sqrt(self.min_block + random[0] * (most - self.min_block).astype(np.float32)[:, None])
        h = np.minimum(np.rint(root * side), shape[0])
        w = np.minimum(np.rint(root / side), shape[1])
        top = (random[2] * (shape[0] + 1 - h)).astype(np.int64)
        left = (random[3] * (shape[1] + 1 - w)).astype(np.int64)
        return top, left, h.astype(np.int64), w.astype(np.int64)


@dataclass(frozen=True)
class InverseBlockMasker:
    """data2vec 2.0's masking for images: choose square blocks to keep, hide the rest (paper 2, section 3.2).

    ``int(T * (1 - ratio + adjust) / block^2)`` centres are drawn uniformly, with replacement; the patches within
    their ``block`` x ``block`` squares, clipped at the edge, stay visible. Then patches are hidden or shown at random
    until every row shows exactly ``int(T * (1 - ratio))``. ``adjust`` makes up for overlaps and edges.
    """

    ratio: float = 0.8
    adjust: float = 0.07
    block: int = 3
    masks: int = 16

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Boolean (B, M, T), true where hidden; see :class:`data2vec.core.modality.Masker`."""
        height, width = shape
        total = _positions(shape)
        keys = _mask_keys(ids, self.masks, seed=seed, update=update)
        starts = self.starts(total)
        random = _random_bits(keys, starts, first=0).view(np.uint32)[:, ::2]
        centre = (random * (total * 2.0**-32)).astype(np.int64)
        squares = _squares(height, width, self.block)
        words = squares[centre[:, 0]]
        for index in range(1, starts):
            words |= squares[centre[:, index]]
        visible = _exactly(_unpack(words.T, total), total - inverse_block_hidden(self.ratio, total), keys)
        return torch.from_numpy(~visible).view(len(ids), self.masks, total).to(ids.device)

    def starts(self, total: int) -> int:
        """How many centres are drawn on a grid of ``total`` positions."""
        return max(1, int(total * (1 - self.ratio + self.adjust) / self.block**2))


def block_hidden(ratio: float, total: int) -> int:
    """Patches that block-wise masking hides of ``total``."""
    return min(max(round(ratio * total), 1), total - 1)


def inverse_block_hidden(ratio: float, total: int) -> int:
    """Patches that inverse block masking hides of ``total``: all but the whole part of ``(1 - ratio) * total``."""
    kept = int((1 - ratio) * total + 1e-6)  # 0.2 * 25 is 5, also where 1 - 0.8 is a little less than 0.2
    return total - min(max(kept, 1), total - 1)


def _positions(shape: tuple[int, ...]) -> int:
    total = math.prod(shape)
    if total < 2:
        raise ValueError(f"a grid of {shape} has {total} positions; a mask needs at least 2 (one hidden, one visible)")
    return total


def _mask_keys(ids: Tensor, masks: int, *, seed: int, update: int) -> Words:
    """(R,) one random key for each mask of each sample."""
    keys = sample_keys(ids.cpu(), seed=seed, update=update).numpy().view(np.uint64)
    return _mix(keys[:, None] + _mix(np.arange(1, masks + 1, dtype=np.uint64))).reshape(-1)


def _random_bits(keys: Words, count: int, *, first: int) -> Words:
    """(R, count) random words: numbers ``first``, ``first`` + 1 ... of each key."""
    return _mix(keys[:, None] + _mix(np.arange(first + 1, first + 1 + count, dtype=np.uint64)))


def _mix(x: Words) -> Words:
    """:func:`data2vec.core.model.random.mix`, in place and in one thread: small arrays gain nothing from more."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _pack(sets: NDArray[np.bool_]) -> Words:
    """(..., L) words from (..., T) booleans."""
    padding = [(0, 0)] * (sets.ndim - 1) + [(0, -sets.shape[-1] % 64)]
    return np.packbits(np.pad(sets, padding), axis=-1, bitorder="little").view(np.uint64)


def _unpack(words: Words, total: int) -> NDArray[np.bool_]:
    """(R, T) booleans from (L, R) words."""
    octets = np.ascontiguousarray(words.T).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=total, bitorder="little").view(np.bool_)


@lru_cache(maxsize=8)
def _bands(height: int, width: int) -> tuple[Words, Words]:
    """The bits of rows and of columns of the grid; a block is the intersection of two.

    ``h`` rows from ``top`` are the words ``[:, h * (height + 1) + top]`` of the first, (L, (height + 1)^2), ``w``
    columns from ``left`` the words ``[:, w * (width + 1) + left]`` of the second. Bands as large as the grid are
    empty: a block with one brings no new patch, so it is rejected.
    """

    def along(size: int) -> NDArray[np.bool_]:
        extent, start, place = np.ogrid[: size + 1, : size + 1, :size]
        return ((place >= start) & (place < start + extent) & (extent < size)).reshape(-1, size)

    rows = np.repeat(along(height), width, axis=-1)
    columns = np.tile(along(width), height)
    return np.ascontiguousarray(_pack(rows).T), np.ascontiguousarray(_pack(columns).T)


@lru_cache(maxsize=8)
def _squares(height: int, width: int, block: int) -> Words:
    """(T, L) the bits of the square around each position, clipped at the edge."""

    def along(size: int) -> NDArray[np.bool_]:
        centre, place = np.ogrid[:size, :size]
        first = centre - block // 2
        return (place >= first) & (place < first + block)

    squares = along(height)[:, None, :, None] & along(width)[None, :, None, :]
    return _pack(squares.reshape(height * width, height * width))


def _exactly(chosen: NDArray[np.bool_], count: int, keys: Words) -> NDArray[np.bool_]:
    """(R, T): add to or remove from each row's chosen positions at random until there are ``count``."""
    total = chosen.shape[1]
    bits = _random_bits(~keys, -(-total // 4), first=0).view(np.uint16)[:, :total]
    # Chosen positions score highest, chance decides among equals, and the position makes every score different.
    places = max(total - 1, 1).bit_length()
    dtype = np.int32 if places <= 14 else np.int64
    scores = np.left_shift(bits, places, dtype=dtype)
    scores += np.arange(total, dtype=dtype)
    scores += np.left_shift(chosen, places + 16, dtype=dtype)
    least = np.partition(scores, total - count, axis=1)[:, total - count]
    exact: NDArray[np.bool_] = scores >= least[:, None]
    return exact
