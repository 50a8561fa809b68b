"""Masks of spans over the frames of speech, as in wav2vec 2.0 (data2vec 1.0) and with exact counts (data2vec 2.0).

Each number is a hash of (seed, update, clip, mask, place), so a clip's masks depend neither on the other clips of the
batch nor on the padding: a padded clip gets exactly the masks it would get alone. There is no Python loop.

Shapes: B clips, M masks of each, R = B * M rows, T frames of the longest clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec.core.hashing import mix, sample_keys, uniform

_PLACES, _ROUNDING, _REPAIR = 0, 1, 2  # streams of random numbers


@dataclass(frozen=True)
class SpanMasker:
    """Spans of ``length`` frames.

    Not ``exact`` (1.0): ``ratio * T / length`` spans, rounded up or down at random, at least ``min_spans``, whose
    first frames are drawn without replacement. Spans overlap: 0.65 (a start at each frame with probability 0.065, and
    a length of 10) hides about 49 %. As in the authors' code the last span begins ``length + 1`` frames before the
    end, so that long clips never hide their last frame. Clips too short for that draw among the first frames.

    ``exact`` (2.0): ``(ratio + adjust) * T / length`` spans, whose middle frames are drawn with replacement; then
    frames are hidden or shown at random until ``ratio * T`` (rounded down) are hidden. Every row of a clip, and of
    clips of equal length, so hides equally many.

    At least one frame of every row is hidden and one is shown.
    """

    ratio: float = 0.65
    length: int = 10
    masks: int = 1
    min_spans: int = 1
    exact: bool = False
    adjust: float = 0.0

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Boolean (B, M, T), true where hidden; see :class:`data2vec.core.modality.Masker`.

        Raises:
            ValueError: a clip of fewer than two frames, of which none could be hidden and one shown.
        """
        (total,) = shape
        sizes = torch.full_like(ids, total) if lengths is None else lengths.to(ids)
        if int(sizes.min()) < 2:
            raise ValueError(f"a clip of {int(sizes.min())} frames cannot be masked: one must be hidden and one shown")
        sizes = sizes.repeat_interleave(self.masks)[:, None]  # (R, 1)
        keys = [self._row_keys(ids, seed=seed, update=update, stream=s) for s in (_PLACES, _ROUNDING, _REPAIR)]
        valid = torch.arange(total, device=ids.device) < sizes
        repair = uniform(keys[_REPAIR], total)
        if self.exact:
            hidden = self._centred(keys[_PLACES], sizes, total) & valid
            hidden = _exactly(hidden, self.hidden(sizes), repair, valid)
        else:
            hidden = self._started(keys, sizes, valid) & valid
            hidden = _exactly(hidden, hidden.sum(1, keepdim=True).minimum(sizes - 1), repair, valid)
        return hidden.view(len(ids), self.masks, total)

    def hidden(self, sizes: Tensor) -> Tensor:
        """Frames that each mask hides of clips of ``sizes`` frames; for ``exact``."""
        wanted = (self.ratio * sizes.double() + 1e-6).long()  # 0.3 * 10 is 3, although a little less in binary
        return wanted.clamp(min=1).minimum(sizes - 1)

    def _row_keys(self, ids: Tensor, *, seed: int, update: int, stream: int) -> Tensor:
        keys = sample_keys(ids, seed=seed, update=update, stream=stream)
        return mix(keys[:, None] + torch.arange(1, self.masks + 1, device=ids.device)).flatten()

    def _started(self, keys: list[Tensor], sizes: Tensor, valid: Tensor) -> Tensor:
        """(R, T): spans from first frames that differ."""
        total = valid.shape[1]
        wanted = self.ratio / self.length * sizes.double() + uniform(keys[_ROUNDING], 1)
        count = wanted.long().clamp(min=self.min_spans)
        choices = torch.where(sizes - self.length > count, sizes - self.length, count + 1).minimum(sizes)
        places = torch.arange(total, device=sizes.device)
        scores = uniform(keys[_PLACES], total).masked_fill(places >= choices, 2.0)
        starts = _ranks(scores) < count.minimum(choices)
        return _spread(starts, before=0, behind=self.length - 1)

    def _centred(self, keys: Tensor, sizes: Tensor, total: int) -> Tensor:
        """(R, T): spans around middle frames, which may coincide."""
        counts = ((self.ratio + self.adjust) / self.length * sizes.double()).long().clamp(min=1)
        most = int(counts.max())
        places = (uniform(keys, most) * sizes).long()
        # The numbers beyond a row's own count fall on an extra last frame that is cut off.
        places = places.where(torch.arange(most, device=keys.device) < counts, total)
        centres = torch.zeros(len(keys), total + 1, dtype=torch.bool, device=keys.device)
        centres = centres.scatter_(1, places, True)[:, :total]
        before = self.length // 2
        return _spread(centres, before=before, behind=self.length - 1 - before)


def _spread(places: Tensor, *, before: int, behind: int) -> Tensor:
    """(R, T) bool: true from ``before`` frames before a true place to ``behind`` frames behind it."""
    total = places.shape[1]
    sums = torch.nn.functional.pad(places.cumsum(1), (1, 0))  # (R, T + 1), number of true places before each frame
    frames = torch.arange(total, device=places.device)
    return sums[:, (frames + before + 1).clamp(max=total)] > sums[:, (frames - behind).clamp(min=0)]


def _ranks(scores: Tensor) -> Tensor:
    """(R, T) int64: 0 for the smallest of each row; among equals the first comes first."""
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _exactly(hidden: Tensor, count: Tensor, chance: Tensor, valid: Tensor) -> Tensor:
    """(R, T): hide or show frames of each row at random until ``count`` (R, 1) are hidden.

    ``chance``: (R, T) in [0, 1). ``valid``: (R, T), of which the others are never hidden.
    """
    if bool((hidden.sum(1, keepdim=True) == count).all()):
        return hidden
    scores = chance.where(hidden, chance + 1.0).masked_fill(~valid, 3.0)
    return _ranks(scores) < count
