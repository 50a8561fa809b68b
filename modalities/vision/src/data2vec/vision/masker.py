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
from itertools import count as count_up
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.hashing import GOLDEN, fold

_ATTEMPTS = 10  # proposals for each block, as in BEiT; after as many in vain, the mask is topped up at random
# At first most blocks fit, so every row looks at one proposal at a time, this often (less than ``_ATTEMPTS``). Later
# many proposals are in vain and few rows are left: then each looks at all its attempts in one step.
_SINGLE = 8
_STEPS = 3  # steps for which random numbers are drawn in one go
_STRATA = 64  # areas, and aspects, that a block's size is drawn from, at equal steps of their ranges

Words = NDArray[np.uint64]
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
        count = np.min_scalar_type(shape[0] * shape[1])  # operations on narrow numbers are fast
        remaining = np.full(len(keys), hidden, dtype=count)
        free = np.full((-(-shape[0] * shape[1] // 64), len(keys)), ~np.uint64(0))
        sizes = self._sizes(shape, shape[0] * shape[1])
        bands = _bands(shape[0], shape[1]), _bands(shape[1], shape[0], transposed=True)
        drawn = self.draw(_random_words(keys, _SINGLE))
        taken = np.ones((_SINGLE + 1, len(keys)), dtype=np.bool_)  # the last looks first, before them a sentinel
        for number in range(_SINGLE):
            new, gain, fits = self._look(drawn[:, number : number + 1], free, remaining, sizes, bands)
            added = taken[_SINGLE - 1 - number] = fits[0]
            free ^= new[:, 0] * added
            remaining -= gain[0] * added
        vain = taken.argmax(0)  # proposals in vain since the last block

        result = np.empty_like(free)
        rows = np.arange(len(keys))  # those that may still take blocks; ``free`` and ``remaining`` hold them alone
        allowed = np.arange(_ATTEMPTS)[:, None] < _ATTEMPTS - vain
        for step in count_up():
            if step % _STEPS == 0:
                active = np.flatnonzero(remaining)
                result[:, rows] = ~free  # and leave finished rows behind
                rows, free, remaining = rows[active], free[:, active], remaining[active]
                if not len(rows):
                    break
                words = _random_words(keys[rows], _STEPS * _ATTEMPTS, first=_SINGLE + step * _ATTEMPTS)
                drawn = self.draw(words).reshape(3, _STEPS, _ATTEMPTS, -1)
                columns = np.arange(len(rows))
            new, gain, fits = self._look(drawn[:, step % _STEPS], free, remaining, sizes, bands)
            if step == 0:
                fits &= allowed[:, rows]  # from here on, a row without a block in a step has had its ten proposals
            best = fits.argmax(0)
            best *= len(rows)
            best += columns
            added = fits.take(best)
            free ^= new.reshape(len(new), -1).take(best, axis=1) * added
            remaining -= gain.take(best)
            remaining *= added
        return result

    def _look(
        self,
        drawn: Integers,
        free: Words,
        remaining: NDArray[Any],
        sizes: _Sizes,
        bands: tuple[Words, Words],
    ) -> tuple[Words, NDArray[Any], NDArray[np.bool_]]:
        """Find each proposal's new patches (L, A, R), how many they are (A, R), and whether that is acceptable."""
        most = remaining
        if self.max_block is not None:
            most = np.minimum(remaining, min(self.max_block, np.iinfo(remaining.dtype).max))
        index = self._lines(drawn, most, sizes)
        new = bands[0].take(index[0], axis=1, mode="clip")
        new &= bands[1].take(index[1], axis=1, mode="clip")
        new &= free[:, None]
        gain = np.add.reduce(np.bitwise_count(new), 0, dtype=remaining.dtype)
        return new, gain, gain - remaining.dtype.type(1) < most  # 0 - 1 is the largest number, so 0 does not fit

    def draw(self, words: Words) -> Integers:
        """(3, N, R) what N proposals for each of R rows need, from (N, R) random words.

        The number of a size in [0, 4096), vertical and horizontal place in [0, 65536).
        """
        pieces = words.view(np.uint16).reshape(*words.shape, 4)
        drawn = np.empty((3, *words.shape), dtype=np.int64)
        np.bitwise_and(pieces[..., 0], _STRATA**2 - 1, out=drawn[0])
        drawn[1] = pieces[..., 1]
        drawn[2] = pieces[..., 2]
        return drawn

    def propose(
        self, drawn: Integers, most: NDArray[Any], shape: tuple[int, int]
    ) -> tuple[tuple[Integers, Integers], tuple[Integers, Integers]]:
        """Blocks inside the grid: (top, left) and (height, width), each (A, R).

        Blocks that would be as high or as wide as the grid, or more, come as just that; BEiT rejects them.

        Args:
            drawn: (3, A, R) from :meth:`draw`.
            most: (R,) largest area; where it is below ``min_block``, areas lie between the two.
            shape: (h, w) of the grid.
        """
        index = self._lines(drawn, most, self._sizes(shape, int(most.max())))
        h, top = np.divmod(index[0], shape[0] + 1)
        w, left = np.divmod(index[1], shape[1] + 1)
        return (top, left), (h, w)

    @staticmethod
    def _lines(drawn: Integers, most: NDArray[Any], sizes: _Sizes) -> Integers:
        """(2, A, R) the bands of rows and of columns, as :func:`_bands` numbers them, whose common part is a block."""
        kind = sizes.kinds.take(most * np.int64(_STRATA**2) + drawn[0])
        index: Integers = sizes.places.take(kind, axis=1)
        index *= drawn[1:]
        index >>= 16
        index += sizes.bands.take(kind, axis=1)
        return index

    def _sizes(self, shape: tuple[int, int], most: int) -> _Sizes:
        low = math.log(self.min_aspect)
        high = -low if self.max_aspect is None else math.log(self.max_aspect)
        return _sizes(shape[0], shape[1], most, self.min_block, low, high)


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
        """Count the centres that are drawn on a grid of ``total`` positions."""
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
    return _mix(_sample_keys(ids, seed=seed, update=update)[:, None] + _counters(masks)).reshape(-1)


def _sample_keys(ids: Tensor, *, seed: int, update: int) -> Words:
    """:func:`data2vec.core.hashing.sample_keys`, several times faster for a few samples."""
    keys = _mix(ids.cpu().numpy().view(np.uint64) + np.uint64(GOLDEN))
    keys ^= np.uint64(fold(seed, update, 0))
    return _mix(keys)


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
    """:func:`data2vec.core.hashing.mix`, in place and in one thread: small arrays gain nothing from more."""
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


@dataclass(frozen=True)
class _Sizes:
    """Heights and widths that blocks may have, numbered ``kind`` = height * (w + 1) + width.

    ``kinds``: the kind of each (largest area, number of a size). ``places``: (2, kinds) vertical and horizontal places
    of a kind. ``bands``: (2, kinds) its first band of rows and of columns, see :func:`_bands`.
    """

    kinds: NDArray[np.int32]
    places: Integers
    bands: Integers


@lru_cache(maxsize=16)
def _sizes(height: int, width: int, most: int, min_block: int, low: float, high: float) -> _Sizes:
    """All sizes that may be drawn where the largest area is 0 to ``most``; log aspects lie in [``low``, ``high``].

    A size's number gives one of ``_STRATA`` equal parts of the range of areas and one of as many of log aspects, and
    the size is that of their middles: the same distribution as drawing both, but for a share below 1 / ``_STRATA``.
    """
    share = (np.arange(_STRATA) + 0.5) / _STRATA
    root = np.sqrt(min_block + share * (np.arange(most + 1)[:, None] - min_block))[:, :, None]
    stretch = np.exp(0.5 * (low + share * (high - low)))
    h = np.minimum(np.rint(root * stretch), height).astype(np.int32)
    w = np.minimum(np.rint(root / stretch), width).astype(np.int32)
    heights, widths = np.divmod(np.arange((height + 1) * (width + 1)), width + 1)
    return _Sizes(
        kinds=(h * (width + 1) + w).reshape(-1),
        places=np.stack([height + 1 - heights, width + 1 - widths]),
        bands=np.stack([heights * (height + 1), widths * (width + 1)]),
    )


@lru_cache(maxsize=16)
def _bands(length: int, width: int, *, transposed: bool = False) -> Words:
    """(L, (length + 1)^2) the bits of bands of whole lines of a grid; a block is the intersection of two bands.

    ``n`` lines from the ``k``-th on are the words ``[:, n * (length + 1) + k]``. Bands as large as the grid are empty:
    a block with one brings no new patch, so it is rejected.

    Args:
        length: number of lines.
        width: positions of each.
        transposed: the lines are columns, not rows.
    """
    extent, start, place = np.ogrid[: length + 1, : length + 1, :length]
    lines = ((place >= start) & (place < start + extent) & (extent < length)).reshape(-1, length)
    patches = np.tile(lines, width) if transposed else np.repeat(lines, width, axis=-1)
    return np.ascontiguousarray(_pack(patches).T)


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
