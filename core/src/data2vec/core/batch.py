"""Samples and batches, which move between a shard and the model.

Shapes: B samples of a batch; the rest depends on the modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One raw sample of a shard: the bytes of its members by extension (lower case, no dot)."""

    key: str
    shard: str
    id: int  # stable 63-bit number of (shard name, key): seeds its masks and augmentations
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Example:
    """One decoded sample: what the extractor reads, and its class number where the shard has one.

    ``position_labels``: (T,) int64 class of each position (frames), -1 where unknown; None where there are none.
    ``unused``: why an optional member could not be used, by its extension.
    """

    inputs: Tensor
    label: int | None = None
    position_labels: Tensor | None = None
    unused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Decoded samples of one modality.

    ``inputs``: (B, ...) as the modality's extractor expects. ``lengths``: (B,) valid input lengths where samples
    differ (waveform samples, tokens), else None. ``ids``: (B,) int64, one stable number per sample.
    ``labels``: (B,) int64, -1 where unknown. ``student_inputs``: what the student reads where that differs from
    the teacher's input before any mask is applied (text with replaced tokens). ``position_labels``: (B, T) int64
    classes of positions, -1 where unknown or padded, for probes of single positions.
    """

    modality: str
    inputs: Tensor
    ids: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    student_inputs: Tensor | None = None
    keys: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()  # what was skipped while this batch was read, one line each
    position_labels: Tensor | None = None
    unused: Mapping[str, str] = field(default_factory=dict)  # by extension: the first such member that is of no use

    # By extension, what was asked to be kept of the samples' members as they are; None where one is missing.
    annotations: Mapping[str, tuple[bytes | None, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def first(self, count: int) -> Self:
        """The first ``count`` samples."""
        return replace(self.rows(range(min(count, len(self)))), broken=(), unused={})

    def labelled(self) -> Self:
        """The samples with a label, padded no further than they need; all of them where none has one.

        Labels of positions and what the student reads are left out, because they are padded like the whole batch.
        """
        chosen = (self.labels >= 0).nonzero().flatten().tolist()
        if len(chosen) in (0, len(self)):
            return self
        part = replace(self, student_inputs=None, position_labels=None, broken=(), unused={}).rows(chosen)
        if part.lengths is None:
            return part
        return replace(part, inputs=part.inputs[:, : int(part.lengths.max())])

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device (asynchronous from pinned memory)."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Called by the loader when the device is a GPU."""
        return self._mapped(Tensor.pin_memory)

    def rows(self, rows: Sequence[int]) -> Self:
        """Those samples alone, of everything that is kept of each."""
        index = torch.tensor(rows, dtype=torch.int64)
        keys = tuple(self.keys[row] for row in rows) if self.keys else ()
        annotations = {name: tuple(values[row] for row in rows) for name, values in self.annotations.items()}
        return replace(self._mapped(lambda value: value[index]), keys=keys, annotations=annotations)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def decode_label(sample: Sample) -> int | None:
    """The class number in the member ``cls``; None where there is no such member, or :func:`label_problem` says why."""
    text = sample.members.get("cls")
    return None if text is None or label_problem(text) else int(text)


def label_problem(text: bytes) -> str | None:
    """Say why the content of a member ``cls`` is no class number; None where it is one.

    A class number is from 0 to 999,999,999, in ASCII digits. -1 stands for unknown, as elsewhere.
    """
    digits = text.strip()
    if digits.isdigit() and len(digits) <= 9:
        return None
    return f"its label {text[:20]!r} is no class number such as 7"


def stack(modality: str, samples: Sequence[Sample], examples: Sequence[Example]) -> Batch:
    """A batch of equally shaped examples."""
    return Batch(
        modality=modality,
        inputs=torch.stack([example.inputs for example in examples]),
        ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        labels=torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64),
        keys=tuple(f"{sample.shard}:{sample.key}" for sample in samples),
    )
