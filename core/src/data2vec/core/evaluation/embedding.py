"""A map of features in the plane, for looking at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FEWEST_FOR_TSNE = 30


@dataclass(frozen=True)
class Embedding:
    """``points``: (N, 2); ``labels``: (N,) int64, -1 where unknown; ``class_names`` by label, may be empty."""

    points: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    method: str = "t-SNE"


def embedding_map(
    features: Tensor,
    labels: Tensor,
    max_points: int = 2000,
    seed: int = 0,
    class_names: tuple[str, ...] = (),
) -> Embedding:
    """Project (N, D) features to the plane: PCA to 50 dimensions, then t-SNE; PCA alone below 30 points.

    At most ``max_points`` samples, drawn by ``seed``, are shown; their labels come along. The same arguments give
    the same map.
    """
    from sklearn.decomposition import PCA  # slow to import, and only the report needs it
    from sklearn.manifold import TSNE

    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(features), generator=generator)[:max_points].sort().values
    x = features[index].double().numpy()
    labels = labels[index]
    if len(x) < 3 or x.shape[1] < 2 or np.ptp(x, axis=0).max() == 0:
        points = np.zeros((len(x), 2))
        points[:, 0] = x[:, 0] if x.shape[1] == 1 else 0.0
        return Embedding(torch.from_numpy(points), labels, class_names, "first dimension")
    x = (x - x.mean(axis=0)) / max(float(x.std()), 1e-12)
    if len(x) < _FEWEST_FOR_TSNE:
        points = PCA(2, svd_solver="full").fit_transform(x)
        return Embedding(torch.from_numpy(points), labels, class_names, "PCA")
    reduced = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    tsne = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init="pca", max_iter=750, random_state=seed)
    points = tsne.fit_transform(reduced.astype(np.float32))
    return Embedding(torch.from_numpy(points.astype(np.float64)), labels, class_names)
