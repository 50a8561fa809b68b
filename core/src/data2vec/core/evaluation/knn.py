"""k-nearest-neighbour classification by cosine similarity.

Each of the k most similar training samples i votes for its class with weight ``exp(s_i / temperature)``, s_i the
cosine similarity; the class with the largest sum wins (Wu et al. 2018, arXiv 1805.01978, section 3.4; the
temperature 0.07 and k = 20 are those of DINO, Caron et al. 2021).

Shapes: Q queries, N training samples, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data2vec.core.errors import DataError
from data2vec.core.evaluation.features import Pooled

TEMPERATURE = 0.07


def nearest(queries: Tensor, bank: Tensor, k: int, *, max_cells: int = 1 << 25) -> tuple[Tensor, Tensor]:
    """The k rows of ``bank`` with the largest inner product for each query.

    Works in tiles of at most ``max_cells`` products, so memory does not grow with Q or N.

    Args:
        queries: (Q, D). bank: (N, D), N >= k.

    Returns:
        (Q, k) products, largest first, and (Q, k) int64 row numbers.
    """
    rows = min(len(queries), 1024)
    columns = max(k, max_cells // max(rows, 1))
    values, indices = [], []
    for query in queries.split(max(rows, 1)):
        best = query.new_full((len(query), 0), 0.0)
        best_index = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(bank), columns):
            tile = bank[start : start + columns]
            top, index = (query @ tile.T).topk(min(k, len(tile)), dim=1)
            best = torch.cat([best, top], dim=1)
            best_index = torch.cat([best_index, index + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            best_index = best_index.gather(1, order)
        values.append(best)
        indices.append(best_index)
    return torch.cat(values), torch.cat(indices)


def knn_predict(
    train: Pooled,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(Q,) int64 predicted labels.

    Args:
        train: labelled features.
        queries: (Q, D).
        k: neighbours; all training samples where there are fewer.

    Raises:
        DataError: no training sample, or one without a label.
    """
    if not len(train):
        raise DataError("kNN: there is no labelled training sample")
    if bool((train.labels < 0).any()):
        raise DataError("kNN: every training sample needs a label")
    classes, targets = train.labels.to(device).unique(return_inverse=True)
    bank = functional.normalize(train.x.to(device), dim=1)
    similarity, index = nearest(functional.normalize(queries.to(device), dim=1), bank, min(k, len(train)))
    # Relative to the best neighbour, which changes no winner; in float64, where the order of a sum hardly matters.
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    predicted = []
    for votes, neighbours in zip(weight.split(4096), index.split(4096), strict=True):
        score = votes.new_zeros(len(votes), len(classes)).scatter_add_(1, targets[neighbours], votes)
        predicted.append(classes[score.argmax(dim=1)])
    return torch.cat(predicted).cpu()


def knn_accuracy(train: Pooled, test: Pooled, *, k: int = 20, device: torch.device | str = "cpu") -> float:
    """Share of ``test`` whose label the vote gives, 0 to 1.

    Raises:
        DataError: no labelled training or test sample.
    """
    if not len(test):
        raise DataError("kNN: there is no labelled test sample")
    return float((knn_predict(train, test.x, k=k, device=device) == test.labels).double().mean())
