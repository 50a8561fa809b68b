"""The positions that the student does not see, and the indices that follow from it.

Shapes: B samples, M masks of each sample, N = B * M rows (sample-major), T positions, V visible positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from data2vec.core.errors import TrainingError


@dataclass(frozen=True)
class Mask:
    """M masks for each of B samples, with the indices derived from them once, on the CPU, without a device sync.

    ``hidden``: (B, M, T) bool, true where hidden. ``positions``: (H,) int64, the hidden positions as indices into
    N * T. ``visible``: (N, V) int64, the valid positions of every row that are not hidden, in order, or None when the
    student sees all. ``filler``: (N, V) bool, true where a row with fewer visible positions than V is filled up with
    others, all different, which nothing may read; None where no row is.
    """

    hidden: Tensor
    positions: Tensor
    visible: Tensor | None
    filler: Tensor | None = None

    @classmethod
    def of(cls, hidden: Tensor, *, visible_only: bool, padding: Tensor | None = None) -> Self:
        """Derive the indices.

        Args:
            hidden: (B, M, T) bool.
            visible_only: the student's encoder will see visible positions only.
            padding: (B, T) bool, true on padding, of which nothing may be hidden.

        Raises:
            TrainingError: the mask hides padding, nothing of a row, or, with ``visible_only``, everything.
        """
        if hidden.dtype != torch.bool or hidden.ndim != 3:
            raise TrainingError(
                f"a mask must be boolean (samples, masks, positions), not {tuple(hidden.shape)} {hidden.dtype}"
            )
        if padding is not None and bool((hidden & padding.unsqueeze(1)).any()):
            raise TrainingError("the masker hid positions of padding")
        flat = hidden.flatten(0, 1)
        counts = flat.sum(1)
        if int(counts.min()) == 0:
            raise TrainingError("the masker hid no position of a sample; raise the mask ratio or use longer inputs")
        positions = flat.flatten().nonzero().squeeze(1)
        if not visible_only:
            return cls(hidden, positions, None)
        unseen = flat if padding is None else (hidden | padding.unsqueeze(1)).flatten(0, 1)
        seen = (~unseen).sum(1, keepdim=True)
        least, most = int(seen.min()), int(seen.max())
        if least == 0:
            raise TrainingError("the masker hid every position; lower the mask ratio or use longer inputs")
        if least == most:
            return cls(hidden, positions, (~unseen).nonzero()[:, 1].view(flat.shape[0], -1))
        order = unseen.to(torch.uint8).argsort(dim=1, stable=True)  # what is seen comes first, in order
        visible = order[:, :most].contiguous()
        return cls(hidden, positions, visible, torch.arange(most) >= seen)

    @property
    def masks(self) -> int:
        """M, the masks of each sample."""
        return self.hidden.shape[1]

    @property
    def count(self) -> int:
        """Hidden positions over all rows: what the loss is averaged over."""
        return self.positions.shape[0]

    def to(self, device: torch.device | str) -> Mask:
        visible = None if self.visible is None else self.visible.to(device, non_blocking=True)
        filler = None if self.filler is None else self.filler.to(device, non_blocking=True)
        hidden, positions = self.hidden.to(device, non_blocking=True), self.positions.to(device, non_blocking=True)
        return Mask(hidden, positions, visible, filler)


def gather_positions(x: Tensor, visible: Tensor) -> Tensor:
    """(N, V, ...) the visible positions of (B, T, ...) features, each sample repeated for its N / B rows."""
    rows, kept = visible.shape
    masks = rows // x.shape[0]
    index = visible.view(x.shape[0], masks * kept)
    taken = torch.gather(x, 1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    return taken.view(rows, kept, *x.shape[2:])


def scatter_positions(x: Tensor, visible: Tensor, filling: Tensor, filler: Tensor | None = None) -> Tensor:
    """(N, T, D): ``filling`` with the visible positions, but for fillers, replaced by ``x`` (N, V, D)."""
    index = visible.unsqueeze(-1).expand_as(x)
    x = x.to(filling.dtype)
    if filler is not None:
        x = torch.where(filler.unsqueeze(-1), filling.gather(1, index), x)
    return filling.scatter(1, index, x)
