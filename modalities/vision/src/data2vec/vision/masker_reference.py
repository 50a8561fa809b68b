"""The two masking rules written plainly, one sample and one patch at a time, for tests and benchmarks to compare with.

The maskers that training uses are in :mod:`data2vec.vision.masker`; they draw from the same distributions.
"""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray


def block_mask_reference(
    shape: tuple[int, int],
    generator: random.Random,
    *,
    hidden: int,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
) -> NDArray[np.bool_]:
    """(h, w) bool with exactly ``hidden`` patches true: see :class:`data2vec.vision.masker.BlockMasker`."""
    height, width = shape
    mask = np.zeros(shape, dtype=bool)
    log_aspects = math.log(min_aspect), math.log(max_aspect if max_aspect is not None else 1 / min_aspect)
    remaining = hidden
    attempts = 0
    while remaining > 0 and attempts < 10:
        attempts += 1
        most = remaining if max_block is None else min(remaining, max_block)
        area = generator.uniform(min_block, most)
        aspect = math.exp(generator.uniform(*log_aspects))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = generator.randint(0, height - h), generator.randint(0, width - w)
        new = h * w - int(mask[top : top + h, left : left + w].sum())
        if 0 < new <= most:
            for y in range(top, top + h):
                for x in range(left, left + w):
                    mask[y, x] = True
            remaining -= new
            attempts = 0
    _choose(mask, hidden, generator)
    return mask


def inverse_block_mask_reference(
    shape: tuple[int, int],
    generator: random.Random,
    *,
    visible: int,
    ratio: float = 0.8,
    adjust: float = 0.07,
    block: int = 3,
) -> NDArray[np.bool_]:
    """(h, w) bool, true where hidden, ``visible`` false: see :class:`data2vec.vision.masker.InverseBlockMasker`."""
    height, width = shape
    shown = np.zeros(shape, dtype=bool)
    for _ in range(max(1, int(height * width * (1 - ratio + adjust) / block**2))):
        top = generator.randrange(height) - block // 2
        left = generator.randrange(width) - block // 2
        for y in range(max(top, 0), min(top + block, height)):
            for x in range(max(left, 0), min(left + block, width)):
                shown[y, x] = True
    _choose(shown, visible, generator)
    return ~shown


def _choose(mask: NDArray[np.bool_], count: int, generator: random.Random) -> None:
    """Set or clear patches of ``mask`` at random, in place, until ``count`` are set."""
    surplus = int(mask.sum()) - count
    candidates = [tuple(place) for place in np.argwhere(mask == (surplus > 0))]
    for place in generator.sample(candidates, abs(surplus)):
        mask[place] = surplus < 0
