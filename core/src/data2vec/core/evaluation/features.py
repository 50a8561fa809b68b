"""Frozen features of labelled samples, pooled to one vector each.

Shapes: B samples of a batch, T positions, D width, N samples in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.errors import DataError

Output = Tensor | tuple[Tensor, Tensor | None]
FeatureFunction = Callable[[Batch], Output]
"""Maps a batch to (B, T, D) or (B, D), or to a pair of (B, T, D) and its padding mask (B, T), true on padding."""


@dataclass(frozen=True)
class Pooled:
    """One vector per sample. ``x``: (N, D) float32 on the CPU; ``labels``: (N,) int64, -1 where unknown."""

    x: Tensor
    labels: Tensor
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, index: Tensor) -> Self:
        """The samples at ``index`` (n,) int64, in that order."""
        keys = tuple(self.keys[i] for i in index.tolist()) if self.keys else ()
        return type(self)(self.x[index], self.labels[index], keys)

    def labelled(self) -> Self:
        """Only the samples whose label is known."""
        return self.take(torch.nonzero(self.labels >= 0).flatten())


def pool(x: Tensor, padding: Tensor | None = None) -> Tensor:
    """Mean over valid positions: (B, T, D) to (B, D) float32; (B, D) passes through.

    Args:
        padding: (B, T) boolean, true on padding; a sample that is all padding gets zeros.
    """
    x = x.float()
    if x.dim() == 2:
        return x
    if x.dim() != 3:
        raise ValueError(f"features must be (B, T, D) or (B, D), got {tuple(x.shape)}")
    if padding is None:
        return x.mean(dim=1)
    valid = ~padding.to(x.device).unsqueeze(-1)
    # masked_fill, not a product: what stands on padding may be infinite.
    return x.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


@torch.inference_mode()
def extract_all(
    encoders: Mapping[str, FeatureFunction],
    batches: Iterable[Batch],
    *,
    max_samples: int,
    device: torch.device | str = "cpu",
) -> dict[str, Pooled]:
    """Pool the outputs of several encoders in one pass over the data, so that each sample is decoded once.

    Of a batch in which some samples have labels, the others are left out: no probe could use them.

    Args:
        encoders: encoders by name; the caller has put them in evaluation mode on ``device``.
        batches: batches on any device; reading stops once ``max_samples`` samples have been seen.

    Raises:
        DataError: no sample came, or an encoder gave values that are not finite.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels: list[Tensor] = []
    keys: list[str] = []
    seen = 0
    for batch in map(Batch.labelled, batches):
        take = min(len(batch), max_samples - seen)
        moved = batch.to(device)
        for name, encode in encoders.items():
            encoded = encode(moved)
            x, padding = encoded if isinstance(encoded, tuple) else (encoded, None)
            parts[name].append(pool(x, padding)[:take].cpu())
        labels.append(batch.labels[:take].cpu())
        keys.extend(batch.keys[:take])
        seen += take
        if seen >= max_samples:
            break
    if not seen:
        raise DataError("evaluation: there are no samples to take features of; check data.train and data.validation")
    # Outside inference mode: the probes differentiate functions of these tensors.
    with torch.inference_mode(False):
        together = torch.cat(labels)
        features = {
            name: Pooled(torch.cat(chunks), together, tuple(keys) if len(keys) == seen else ())
            for name, chunks in parts.items()
        }
    for name, one in features.items():
        broken = int((~one.x.isfinite()).any(dim=1).sum())
        if broken:
            raise DataError(f"evaluation: {broken} of {seen} feature vectors of {name} are not finite")
    return features


def extract(
    encode: FeatureFunction, batches: Iterable[Batch], *, max_samples: int, device: torch.device | str = "cpu"
) -> Pooled:
    """Pooled of one encoder; see :func:`extract_all`."""
    return extract_all({"features": encode}, batches, max_samples=max_samples, device=device)["features"]
