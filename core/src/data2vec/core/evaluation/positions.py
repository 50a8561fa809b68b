"""Probes of single positions: what each frame's feature says of the class at that frame.

Shapes: B samples of a batch, T positions, D width, N positions in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.errors import DataError
from data2vec.core.evaluation.features import Pooled

PER_SAMPLE = 16  # positions taken of each sample: neighbours are alike, so more samples say more than more positions

Encode = Callable[[Batch], Tensor]


@torch.inference_mode()
def position_features(
    encoders: Mapping[str, Encode],
    batches: Iterable[Batch],
    *,
    max_positions: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Pooled] | None:
    """Pooled of labelled positions, of each sample ``PER_SAMPLE`` at random (the same for every encoder).

    Args:
        encoders: functions from a batch to (B, T, D), by name.
        batches: reading stops once ``max_positions`` have been taken.
        max_positions: N at most.
        seed: of the choice.
        device: where the encoders run.

    Returns:
        By encoder; None where no sample has a labelled position.

    Raises:
        DataError: an encoder gives another number of positions than there are labels.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels: list[Tensor] = []
    taken = 0
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        if batch.position_labels is None or not bool((batch.position_labels >= 0).any()):
            continue
        chosen = _choose(batch.position_labels.cpu(), generator)[: max_positions - taken]
        moved = batch.to(device)
        for name, encode in encoders.items():
            x = encode(moved)
            if x.shape[:2] != batch.position_labels.shape:
                raise DataError(
                    f"evaluation: {name} gives {tuple(x.shape[:2])} (samples, positions), but the labels of positions "
                    f"are {tuple(batch.position_labels.shape)}; the shards were labelled for another grid"
                )
            parts[name].append(x.float()[chosen[:, 0], chosen[:, 1]].cpu())
        labels.append(batch.position_labels.cpu()[chosen[:, 0], chosen[:, 1]])
        taken += len(chosen)
        if taken >= max_positions:
            break
    if not taken:
        return None
    with torch.inference_mode(False):  # the probe differentiates functions of these tensors
        together = torch.cat(labels)
        return {name: Pooled(torch.cat(chunks), together) for name, chunks in parts.items()}


def _choose(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 2) sample and position of up to ``PER_SAMPLE`` labelled positions of each row of (B, T) labels."""
    scores = torch.rand(labels.shape, generator=generator).masked_fill(labels < 0, -1.0)
    best = scores.topk(min(PER_SAMPLE, labels.shape[1]), dim=1)
    rows = torch.arange(len(labels)).unsqueeze(1).expand_as(best.indices)
    return torch.stack([rows, best.indices], dim=-1)[best.values >= 0]
