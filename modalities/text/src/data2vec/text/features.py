"""The plainest representation of a text: which tokens it has, in no order.

Shapes: B texts, L tokens, V vocabulary, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.hashing import mix

MOST = 4096
"""Features at most: a probe of more would not fit into memory."""

_KEY = 0x5DEECE66D  # of the hash of the token ids; fixed, so that runs compare


def bag_of_tokens(batch: Batch, vocabulary: int) -> Tensor:
    """(B, F) log(1 + count) of the valid tokens of every text, scaled to length 1; F = min(V, 4096).

    Of a larger vocabulary the ids are thrown into 4,096 bins by a hash, those of a bin counted together (the hashing
    trick, Weinberger et al. 2009, without signs).

    Args:
        batch: ``inputs`` (B, L) int64 ids; ``lengths`` (B,) valid tokens, None where all are.
        vocabulary: V; every valid id is below it.

    Raises:
        ValueError: an id at or above ``vocabulary``.
    """
    ids = batch.inputs
    b, length = ids.shape
    valid = torch.ones_like(ids, dtype=torch.bool)
    if batch.lengths is not None:
        valid = torch.arange(length, device=ids.device) < batch.lengths.to(ids.device)[:, None]
    ids = ids.masked_fill(~valid, 0)
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocabulary}")
    width = min(vocabulary, MOST)
    bins = ids if vocabulary <= MOST else mix(ids + _KEY).remainder(width)
    counts = torch.zeros(b, width, device=ids.device).scatter_add_(1, bins, valid.float())
    return torch.nn.functional.normalize(counts.log1p(), dim=1)
