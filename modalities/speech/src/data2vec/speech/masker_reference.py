"""The two span masking rules written plainly, one clip and one span at a time, for tests to compare with.

The masker that training uses is in :mod:`data2vec.speech.masker`; it draws from the same distributions.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def span_mask_reference(
    frames: int, generator: random.Random, *, ratio: float = 0.65, length: int = 10, min_spans: int = 1
) -> NDArray[np.bool_]:
    """(frames,) bool, true where hidden: :class:`data2vec.speech.masker.SpanMasker`, not exact."""
    count = max(int(ratio * frames / length + generator.random()), min_spans)
    choices = frames - length if frames - length > count else min(count + 1, frames)
    mask = np.zeros(frames, dtype=bool)
    for start in generator.sample(range(choices), min(count, choices)):
        for frame in range(start, min(start + length, frames)):
            mask[frame] = True
    if mask.all():
        mask[generator.randrange(frames)] = False
    return mask


def exact_span_mask_reference(
    frames: int, generator: random.Random, *, ratio: float = 0.5, length: int = 5, adjust: float = 0.05
) -> NDArray[np.bool_]:
    """(frames,) bool, true where hidden: :class:`data2vec.speech.masker.SpanMasker`, exact."""
    mask = np.zeros(frames, dtype=bool)
    for _ in range(max(int((ratio + adjust) * frames / length), 1)):
        first = generator.randrange(frames) - length // 2
        for frame in range(max(first, 0), min(first + length, frames)):
            mask[frame] = True
    wanted = min(max(int(ratio * frames + 1e-6), 1), frames - 1)
    surplus = int(mask.sum()) - wanted
    for frame in generator.sample(np.flatnonzero(mask == (surplus > 0)).tolist(), abs(surplus)):
        mask[frame] = surplus < 0
    return mask
