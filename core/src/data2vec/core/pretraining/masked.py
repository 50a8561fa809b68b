"""Samples with their masks: what pretraining makes of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from data2vec.core.batch import Batch
from data2vec.core.modality import Masker, Modality
from data2vec.core.model.encoder import Extractor
from data2vec.core.model.mask import Mask


@dataclass(frozen=True)
class Masked:
    """B samples and M masks for each."""

    batch: Batch
    mask: Mask

    @classmethod
    def of(
        cls,
        batch: Batch,
        modality: Modality,
        masker: Masker,
        extractor: Extractor,
        *,
        visible_only: bool,
        seed: int,
        update: int,
    ) -> Self:
        """Make the masks of a batch on the CPU, and what the student reads where the input itself is masked.

        Args:
            batch: B samples of one modality.
            modality: its settings.
            masker: of the modality.
            extractor: of the modality; its grid has the positions that are hidden.
            visible_only: the student's encoder will see visible positions only.
            seed: of the run.
            update: with ``seed`` and the samples' numbers it decides every random choice.
        """
        shape, lengths = extractor.grid(batch.inputs, batch.lengths)
        maskable = modality.maskable(batch)
        special = {} if maskable is None else {"maskable": maskable}
        hidden = masker(batch.ids, shape, seed=seed, update=update, lengths=lengths, **special)
        padding = None if lengths is None else torch.arange(hidden.shape[-1]) >= lengths.unsqueeze(1)
        mask = Mask.of(hidden, visible_only=visible_only, padding=padding)
        read = modality.student_inputs(batch, hidden, seed=seed, update=update)
        return cls(batch if read is None else replace(batch, student_inputs=read), mask)

    @property
    def count(self) -> int:
        """Hidden positions over all rows."""
        return self.mask.count

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(self.batch.to(device), self.mask.to(device))
