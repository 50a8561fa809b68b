"""The teacher: an exponential moving average of the student (paper 1, section 3.2).

Its parameters are the fp32 master copy; a mixed-precision forward pass casts them as it does the student's, so no
second copy has to be kept in step. What it shares with the student is referenced, not copied.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from data2vec.core.model.encoder import Collect, Encoded, Encoder, Tokens, evaluating
from data2vec.core.settings.pretraining import TeacherConfig, TeacherShares
from data2vec.core.task import Move, lerp


def decay(config: TeacherConfig, update: int) -> float:
    """tau after ``update`` updates: linear from ``decay_start`` to ``decay_end``, then constant."""
    if update >= config.decay_updates:
        return config.decay_end
    return config.decay_start + (config.decay_end - config.decay_start) * update / config.decay_updates


class Teacher(nn.Module):
    """A frozen copy of the student's encoder that follows it slowly.

    Args:
        student: the encoder to follow. Its shared parts become parts of the teacher as they are.
        config: decay and what is shared.
    """

    def __init__(self, student: Encoder, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        shared = self._shared_parts(student, config.shares)
        self.encoder: Encoder = copy.deepcopy(student, {id(part): part for part in shared})
        ids = {id(module) for part in shared if isinstance(part, nn.Module) for module in part.modules()}
        # By name, so that a deep copy of the whole model still knows them.
        self._shared = {name for name, module in self.named_modules() if id(module) in ids}
        theirs = dict(student.named_parameters())
        self._names = [name for name, value in self.encoder.named_parameters() if value is not theirs[name]]
        own = dict(self.encoder.named_parameters())
        for name in self._names:
            own[name].requires_grad_(False)
        self.train(False)

    @staticmethod
    def _shared_parts(student: Encoder, shares: TeacherShares) -> list[Any]:
        parts: list[Any] = []
        for name in student.frontends:
            frontend = student.frontend(name)
            if shares is not TeacherShares.NOTHING:
                parts.append(frontend.extractor)
            if shares in (TeacherShares.POSITIONS, TeacherShares.FRONTEND):
                parts.append(frontend.positions)
            if shares is TeacherShares.FRONTEND:
                parts += [frontend.prefix, frontend.input_norm, frontend.blocks]
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> Self:
        """The teacher never trains: its own modules stay in evaluation mode, shared ones follow the student."""
        for name, module in self.named_modules():
            if name not in self._shared:
                module.training = False
        return self

    def averaged(self, student: Encoder) -> list[tuple[str, Tensor, Tensor]]:
        """(name, teacher's, student's) of every parameter that is averaged."""
        own, theirs = dict(self.encoder.named_parameters()), dict(student.named_parameters())
        return [(name, own[name], theirs[name]) for name in self._names]

    def _buffers_of(self, student: Encoder) -> list[tuple[Tensor, Tensor]]:
        """(teacher's, student's) of every buffer that is not shared: constants follow the student as they are."""
        theirs = dict(student.named_buffers())
        return [(value, theirs[name]) for name, value in self.encoder.named_buffers() if value is not theirs[name]]

    @torch.no_grad()
    def update(self, student: Encoder, update: int, move: Move = lerp) -> None:
        """Move towards the student: Delta <- tau Delta + (1 - tau) theta, in one multi-tensor operation.

        Args:
            student: which the teacher follows.
            update: applied updates, which decide tau.
            move: the engine's way to move tensors.
        """
        pairs = self.averaged(student)
        self.copy_buffers(student)
        move([mine for _, mine, _ in pairs], [theirs for _, _, theirs in pairs], 1.0 - decay(self.config, update))

    def copy_buffers(self, student: Encoder) -> None:
        """Take the student's buffers as they are."""
        copied = self._buffers_of(student)
        if copied:
            torch._foreach_copy_([mine for mine, _ in copied], [theirs for _, theirs in copied])

    @torch.no_grad()
    def restart(self, student: Encoder) -> None:
        """Become a copy of the student, as at the beginning of training."""
        self.copy_buffers(student)
        for _, mine, theirs in self.averaged(student):
            mine.copy_(theirs)

    def _shared_modules(self) -> list[nn.Module]:
        """List what the student trains: in evaluation mode while the teacher uses it."""
        return [module for name, module in self.named_modules() if name in self._shared]

    @torch.no_grad()
    def extract(self, modality: str, inputs: Tensor, lengths: Tensor | None) -> Tokens:
        """Extract, as :meth:`data2vec.core.model.encoder.Encoder.extract`, in evaluation mode."""
        with evaluating(self._shared_modules()):
            return self.encoder.extract(modality, inputs, lengths)

    @torch.no_grad()
    def encode(self, modality: str, tokens: Tokens, *, collect: Collect | None = None) -> Encoded:
        """Encode, as :meth:`data2vec.core.model.encoder.Encoder.encode`, in evaluation mode."""
        with evaluating(self._shared_modules()):
            return self.encoder.encode(modality, tokens, collect=collect)
