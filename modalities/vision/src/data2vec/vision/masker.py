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
from itertools import chain, repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.model.random import sample_keys

_ATTEMPTS = 10  # proposals for each block, as in BEiT; after as many in vain, the mask is topped up at random
# Steps for which random numbers are drawn in one go, and proposals that each looks at together. Early blocks mostly
# fit at once; later many are in vain, and few rows are left, so that looking at more costs little.
_EARLY = 6, 3
_LATE = 4, 10
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
        bands, stride, offset = _bands(*shape)
        result = np.zeros((len(bands), len(keys)), dtype=np.uint64)
        rows = np.arange(len(keys))  # those that may still take blocks; the next three hold them alone
        free = np.full_like(result, ~np.uint64(0))
        remaining = np.full(len(keys), hidden)
        left = np.full(len(keys), _ATTEMPTS)  # proposals that may still be in vain
        first = 0  # number of the next proposal
        for steps, tries in chain([_EARLY], repeat(_LATE)):
            active = np.flatnonzero(remaining)
            if len(active) < len(rows):  # leave finished rows behind
                result[:, rows] = ~free
                rows, free, remaining, left = rows[active], free[:, active], remaining[active], left[active]
            if not len(rows):
                return result
            drawn = self.draw(_random_words(keys[rows], steps * tries, first=first))
            first += steps * tries
            numbers = np.arange(tries)[:, None]
            columns = np.arange(len(rows))
            for step in range(steps):
                most = remaining if self.max_block is None else np.minimum(remaining, self.max_block)
                corner, size = self.propose(drawn[:, step * tries : (step + 1) * tries], most, shape)
                size *= stride
                size += corner
                size += offset
                halves = bands.take(size, axis=1)  # (L, 2, A, R)
                new = halves[:, 0] & halves[:, 1]
                new &= free[:, None]
                gain = np.add.reduce(np.bitwise_count(new), 0, dtype=np.int64)
                accepted = (gain > 0) & (gain <= most) & (numbers < left)
                best = accepted.argmax(0)
                best *= len(rows)
                best += columns
                added = accepted.take(best)
                free ^= new.reshape(len(new), -1).take(best, axis=1) * added
                remaining -= gain.take(best) * added
                left -= tries
                left[added] = _ATTEMPTS
                remaining *= left > 0
        raise AssertionError("unreachable: every row ends after finitely many blocks")

    def draw(self, words: Words) -> Floats:
        """(5, N, R) what N proposals for each of R rows need, from (N, R) random words.

        Share of the range of areas, in [0, 1); root of the aspect and its inverse; vertical and horizontal place,
        each in [0, 1).
        """
        low = math.log(self.min_aspect)
        high = -low if self.max_aspect is None else math.log(self.max_aspect)
        drawn = np.empty((5, *words.shape), dtype=np.float32)
        pieces = words.view(np.uint16).reshape(*words.shape, 4)
        for target, piece in zip((0, 1, 3, 4), range(4), strict=True):
            np.multiply(pieces[..., piece], _UNIT, out=drawn[target])
        drawn[1] *= np.float32(0.5 * (high - low))
        drawn[1] += np.float32(0.5 * low)
        np.exp(drawn[1], out=drawn[1])
        np.reciprocal(drawn[1], out=drawn[2])
        return drawn

    def propose(self, drawn: Floats, most: Integers, shape: tuple[int, int]) -> tuple[Integers, Integers]:
        """Blocks inside the grid: (top, left) and (height, width), each (2, A, R).

        Blocks that would be as high or as wide as the grid, or more, come as just that; BEiT rejects them.

        Args:
            drawn: (5, A, R) from :meth:`draw`.
            most: (R,) largest area; where it is below ``min_block``, areas lie between the two.
            shape: (h, w) of the grid.
        """
        limit = np.array(shape, dtype=np.float32).reshape(2, 1, 1)
        root = drawn[0] * (most - self.min_block).astype(np.float32)
        root += np.float32(self.min_block)
        np.sqrt(root, out=root)
        size = drawn[1:3] * root
        np.rint(size, out=size)
        np.minimum(size, limit, out=size)
        corner = limit + np.float32(1) - size
        corner *= drawn[3:5]
        return corner.astype(np.int64), size.astype(np.int64)


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
        random = _random_words(keys, starts).view(np.uint32)[:, ::2]
        centre = (random * (total * 2.0**-32)).astype(np.int64)
        squares = _squares(height, width, self.block)
        words = squares[centre[0]]
        for index in range(1, starts):
            words |= squares[centre[index]]
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
    return _mix(keys[:, None] + _counters(masks)).reshape(-1)


def _random_words(keys: Words, count: int, *, first: int = 0) -> Words:
    """(count, R) random words: numbers ``first``, ``first`` + 1 ... of each key."""
    return _mix(_counters(count, first)[:, None] + keys)


@lru_cache(maxsize=64)
def _counters(count: int, first: int = 0) -> Words:
    """(count,) what tells apart the random words of one key."""
    counters = _mix(np.arange(first + 1, first + 1 + count, dtype=np.uint64))
    counters.flags.writeable = False
    return counters


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
def _bands(height: int, width: int) -> tuple[Words, Integers, Integers]:
    """The bits of rows and of columns of the grid, (L, ...); a block is the intersection of two bands.

    Returns also a stride and an offset, (2, 1, 1): the band of n rows (columns) from the k-th on stands at
    ``offset + n * stride + k``. Bands as large as the grid are empty: a block with one brings no new patch, so it is
    rejected.
    """

    def along(size: int) -> NDArray[np.bool_]:
        extent, start, place = np.ogrid[: size + 1, : size + 1, :size]
        return ((place >= start) & (place < start + extent) & (extent < size)).reshape(-1, size)

    rows = np.repeat(along(height), width, axis=-1)
    columns = np.tile(along(width), height)
    stride = np.array([height + 1, width + 1]).reshape(2, 1, 1)
    offset = np.array([0, len(rows)]).reshape(2, 1, 1)
    return np.ascontiguousarray(_pack(np.concatenate([rows, columns])).T), stride, offset


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
    words = _mix(~keys[:, None] + _counters(-(-total // 4)))
    bits = words.view(np.uint16)[:, :total]
    # Chosen positions score highest, chance decides among equals, and the position makes every score different.
    places = max(total - 1, 1).bit_length()
    dtype = np.int32 if places <= 14 else np.int64
    scores = np.left_shift(bits, places, dtype=dtype)
    scores += np.arange(total, dtype=dtype)
    scores += np.left_shift(chosen, places + 16, dtype=dtype)
    least = np.partition(scores, total - count, axis=1)[:, total - count]
    exact: NDArray[np.bool_] = scores >= least[:, None]
    return exact
