"""The tokens that the student does not see, and what it reads in their place.

Everything here is a pure function of (seed, update, sample, number of the mask), the same on every rank. A token's
random number follows from its place, so neither the other samples of a batch nor the padding behind a sample matter;
how many tokens are hidden follows from how many may be hidden in that sample. Special tokens are never hidden, unlike
in the authors' code, where the first and last token of a block may be.

Shapes: B samples, M masks, R = B * M rows, T positions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec.core.hashing import GOLDEN, mix, sample_keys, uniform

_STEP = GOLDEN - (1 << 64)  # the same bits as a signed number
_REPLACE = 20  # stream of random numbers
_LAST = (1 << 63) - 1  # the largest number, and all bits but the sign's
_SIGN = -(1 << 63)


@dataclass(frozen=True)
class TokenMasker:
    """Single tokens, chosen uniformly: ``round(ratio * n)`` of the n that may be hidden, at least one.

    BERT and data2vec 1.0 hide 15 % (Devlin et al. 2019; paper 1, section 4.4), data2vec 2.0 48 % under 8 masks.
    """

    ratio: float = 0.15
    masks: int = 1

    def __call__(
        self,
        ids: Tensor,
        shape: tuple[int, ...],
        *,
        seed: int,
        update: int,
        lengths: Tensor | None = None,
        maskable: Tensor | None = None,
    ) -> Tensor:
        """Boolean (B, M, T), true where hidden; see :class:`data2vec.core.modality.Masker`.

        Args:
            ids: (B,) int64 sample numbers.
            shape: (T,).
            seed: of the run.
            update: number of the update.
            lengths: (B,) valid tokens, None where all are.
            maskable: (B, T) bool, what may be hidden; None for all valid tokens but the first and the last, which are
                ``<s>`` and ``</s>``. A sample without any such token gets masks that hide nothing.
        """
        allowed = _allowed(ids, shape, lengths, maskable, self.masks)
        scores = _scores(ids, shape[0], self.masks, seed=seed, update=update)
        hidden = _lowest(scores, allowed, tokens_hidden(self.ratio, allowed.sum(1)))
        return hidden.view(len(ids), self.masks, -1)


@dataclass(frozen=True)
class SpanMasker:
    """Spans of ``length`` tokens, as many as the authors draw for this ratio, 35 % in their configuration of 1.0.

    ``round((ratio + adjust) * n / length)`` of the n tokens that may be hidden, at least one, begin a span. Spans may
    overlap and end with the sample, so that fewer than ``ratio`` are hidden: 31 % for 35 % in spans of 4. How many
    exactly is left to chance in the authors' code; here tokens are hidden or shown at random until every row hides
    :func:`spans_hidden`, the mean.
    """

    ratio: float = 0.35
    length: int = 4
    adjust: float = 0.0
    masks: int = 1

    def __call__(
        self,
        ids: Tensor,
        shape: tuple[int, ...],
        *,
        seed: int,
        update: int,
        lengths: Tensor | None = None,
        maskable: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`TokenMasker.__call__`."""
        allowed = _allowed(ids, shape, lengths, maskable, self.masks)
        scores = _scores(ids, shape[0], self.masks, seed=seed, update=update)
        count = allowed.sum(1)
        starts = _lowest(scores, allowed, span_starts(self.ratio + self.adjust, self.length, count))
        before = starts.long().cumsum(1)
        covered = before - torch.nn.functional.pad(before, (self.length, 0))[:, : shape[0]] > 0
        chance = mix(scores)
        scores = torch.where(covered, chance | _SIGN, chance & _LAST)  # covered tokens first, then others, at random
        hidden = _lowest(scores, allowed, spans_hidden(self.ratio + self.adjust, self.length, count))
        return hidden.view(len(ids), self.masks, -1)


def tokens_hidden(ratio: float, count: Tensor) -> Tensor:
    """(R,) how many of ``count`` (R,) tokens are hidden one by one."""
    return torch.minimum((ratio * count.double()).round().long().clamp(min=1), count)


def span_starts(ratio: float, length: int, count: Tensor) -> Tensor:
    """(R,) how many of ``count`` (R,) tokens begin a span."""
    return tokens_hidden(ratio / length, count)


def spans_hidden(ratio: float, length: int, count: Tensor) -> Tensor:
    """(R,) how many of ``count`` (R,) tokens lie, on average, in spans that begin at distinct tokens.

    Token i is in none with probability C(n - w, k) / C(n, k) for k spans and the w = min(i + 1, length) tokens whose
    spans would reach it. Rounded; at least one token.
    """
    n, k = count.double(), span_starts(ratio, length, count).double()
    clear = torch.ones_like(n)  # that none of w tokens begins a span
    total = torch.zeros_like(n)
    for reached in range(length):
        clear = clear * ((n - k - reached) / (n - reached).clamp(min=1)).clamp(min=0)
        # The w-th token from the start has w that reach it; the last w stands for all tokens further on.
        tokens = (n > reached).double() if reached < length - 1 else (n - reached).clamp(min=0)
        total = total + tokens * (1 - clear)
    return torch.minimum(total.round().long().clamp(min=1), count)


def corrupt(
    tokens: Tensor,
    hidden: Tensor,
    ids: Tensor,
    *,
    seed: int,
    update: int,
    mask: int,
    vocabulary: int,
    specials: Collection[int],
    random_share: float = 0.1,
    kept_share: float = 0.1,
) -> Tensor:
    """(B, T) what the student reads: most hidden tokens become ``mask``, some a random token, some stay (BERT).

    Args:
        tokens: (B, T) int64.
        hidden: (B, T) bool.
        ids: (B,) int64 sample numbers.
        seed: of the run.
        update: number of the update.
        mask: the token that says that one is hidden.
        vocabulary: number of tokens.
        specials: tokens that no random replacement is.
        random_share: of the hidden tokens, each for itself, become another.
        kept_share: of the hidden tokens stay as they are.
    """
    keys = sample_keys(ids.to(tokens.device), seed=seed, update=update, stream=_REPLACE)
    choice, what = uniform(torch.stack([keys, mix(keys)]), tokens.shape[1])
    excluded = sorted(token for token in set(specials) if 0 <= token < vocabulary)
    random = (what * (vocabulary - len(excluded))).long()
    for special in excluded:  # from the lowest on, so that each makes room for itself
        random += random >= special
    replaced = torch.where(choice < random_share, random, mask)
    return torch.where(hidden & (choice < 1 - kept_share), replaced, tokens)


def _allowed(
    ids: Tensor, shape: tuple[int, ...], lengths: Tensor | None, maskable: Tensor | None, masks: int
) -> Tensor:
    """(R, T) bool, what may be hidden."""
    place = torch.arange(shape[0], device=ids.device)
    end = torch.full_like(ids, shape[0]) if lengths is None else lengths.to(ids)
    if maskable is None:
        allowed = (place > 0) & (place < end.unsqueeze(1) - 1)
    else:
        allowed = maskable.to(ids.device) & (place < end.unsqueeze(1))
    return allowed.repeat_interleave(masks, 0)


def _scores(ids: Tensor, length: int, masks: int, *, seed: int, update: int) -> Tensor:
    """(R, T) int64 random numbers, all different in a row, for each mask of each sample and each place."""
    keys = sample_keys(ids, seed=seed, update=update).unsqueeze(1)
    keys = mix(keys + mix(torch.arange(1, masks + 1, device=ids.device))).view(-1, 1)
    return mix(keys + torch.arange(1, length + 1, device=ids.device) * _STEP)


def _lowest(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """(R, T) bool, in each row exactly ``count`` (R,) of the allowed places, those with the lowest scores."""
    scores = scores.clamp(max=_LAST - 1).masked_fill(~allowed, _LAST)  # so that what is not allowed comes last
    order = scores.argsort(dim=1, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < count.unsqueeze(1)
    return torch.zeros_like(allowed).scatter(1, order, first)
