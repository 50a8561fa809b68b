"""The two masking rules and the replacement written plainly, one sample and one token at a time, for tests.

What training uses is in :mod:`data2vec.text.masker`; it draws from the same distributions.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence


def token_mask_reference(maskable: Sequence[bool], generator: random.Random, *, hidden: int) -> list[bool]:
    """True at ``hidden`` of the maskable tokens: see :class:`data2vec.text.masker.TokenMasker`."""
    chosen = set(generator.sample([place for place, allowed in enumerate(maskable) if allowed], hidden))
    return [place in chosen for place in range(len(maskable))]


def span_mask_reference(
    maskable: Sequence[bool], generator: random.Random, *, starts: int, length: int, hidden: int
) -> list[bool]:
    """True at ``hidden`` tokens, most of them in spans: see :class:`data2vec.text.masker.SpanMasker`."""
    allowed = [place for place, may in enumerate(maskable) if may]
    chosen = set()
    for start in generator.sample(allowed, starts):
        for place in range(start, min(start + length, len(maskable))):
            if maskable[place]:
                chosen.add(place)
    while len(chosen) > hidden:
        chosen.remove(generator.choice(sorted(chosen)))
    while len(chosen) < hidden:
        chosen.add(generator.choice([place for place in allowed if place not in chosen]))
    return [place in chosen for place in range(len(maskable))]


def corrupt_reference(
    tokens: Sequence[int],
    hidden: Sequence[bool],
    generator: random.Random,
    *,
    mask: int,
    vocabulary: int,
    specials: Collection[int],
    random_share: float = 0.1,
    kept_share: float = 0.1,
) -> list[int]:
    """The tokens that the student reads: see :func:`data2vec.text.masker.corrupt`."""
    ordinary = [token for token in range(vocabulary) if token not in specials]
    read = []
    for token, is_hidden in zip(tokens, hidden, strict=True):
        chance = generator.random()
        if not is_hidden or chance < kept_share:
            read.append(token)
        elif chance < kept_share + random_share:
            read.append(generator.choice(ordinary))
        else:
            read.append(mask)
    return read
