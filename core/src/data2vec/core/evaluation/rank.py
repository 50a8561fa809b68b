"""The effective rank, the number of dimensions that a representation uses: a check on collapse that needs no labels.

Shapes: N samples, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(x: Tensor, *, max_samples: int = 10_000) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the normalised singular values of x.

    Between 1 and min(N, D); not changed by the scale of x nor by a rotation. As in the paper, x is not centred.
    Zero for an x of zeros. The singular values are the square roots of the eigenvalues of the smaller Gram matrix,
    in float64.

    Args:
        x: (N, D), N >= 1; of more than ``max_samples`` rows, evenly spaced ones are taken.
    """
    if len(x) > max_samples:
        x = x[torch.linspace(0, len(x) - 1, max_samples, device=x.device).long()]
    x = x.double()
    largest = x.abs().max()
    if not largest > 0:
        return 0.0
    x = x / largest  # so that no scale of x overflows or underflows when squared
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    # Below the rounding error of the Gram matrix an eigenvalue is noise, and its square root would not be small.
    noise = eigenvalues.max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    singular = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
    p = singular / singular.sum()
    return float(torch.special.entr(p).sum().exp())


def spread(x: Tensor) -> Tensor:
    """(D,) standard deviation of each dimension over the N samples."""
    return x.float().std(dim=0, correction=0)
