"""Fine-tuning for letters: CTC on the frames of speech (Graves et al. 2006, as wav2vec 2.0 uses it).

Shapes: B clips, T frames, D width, C symbols, S symbols of the longest transcript.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.finetuning.finetuned import FineTuned, Learning
from data2vec.core.finetuning.transcripts import BLANK, MEMBER, Letters, letter_targets
from data2vec.core.hashing import derive
from data2vec.core.modality import Masker
from data2vec.core.model.encoder import Backbone, Tokens
from data2vec.core.settings.finetuning import Recognition as Settings
from data2vec.core.task import Step

_CHANNELS = 23  # stream of random numbers


@dataclass(frozen=True)
class Transcribed:
    """Clips with their transcripts and masks.

    ``inputs``: (B, L). ``lengths``: (B,) or None. ``targets``: (B, S) int64. ``target_lengths``: (B,). ``hidden``:
    (B, T) bool, frames that the mask token replaces; ``silent``: (B, D) bool, channels that become 0; None for none.
    """

    inputs: Tensor
    targets: Tensor
    target_lengths: Tensor
    lengths: Tensor | None = None
    hidden: Tensor | None = None
    silent: Tensor | None = None

    @property
    def count(self) -> int:
        """Clips."""
        return len(self)

    def __len__(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


class RecognitionTask(FineTuned[Transcribed]):
    """An encoder with a projection of each frame onto letters.

    Args:
        backbone: the encoder.
        letters: symbols; the first is the blank.
        learning: which parts learn.
        final_dropout: before the projection.
        time: makes the masks of frames; None: no frame is hidden.
        channels: makes the masks of channels; None: no channel is silent.
    """

    def __init__(
        self,
        backbone: Backbone,
        letters: Letters,
        learning: Learning | None = None,
        *,
        final_dropout: float = 0.0,
        time: Masker | None = None,
        channels: Masker | None = None,
    ) -> None:
        super().__init__(backbone, learning)
        self.letters = letters
        self.time, self.channels = time, channels
        self.final_dropout = nn.Dropout(final_dropout)
        # Zero where pretraining has none to take over (2.0).
        self.mask_token = nn.Parameter(torch.zeros(backbone.width)) if time is not None else None
        self.projection = nn.Linear(backbone.width, len(letters))
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    @classmethod
    def build(cls, recipe: Settings) -> Self:
        """A freshly initialised model of settled letters; draws from torch's global generator."""
        ((_, modality),) = recipe.modalities.items()
        masks = recipe.frame_masks
        return cls(
            cls.build_backbone(recipe), Letters(recipe.letters.symbols, recipe.letters.case), Learning.of(recipe),
            final_dropout=recipe.final_dropout,
            time=modality.build_span_masker(masks.time, masks.time_length) if masks.time else None,
            channels=modality.build_span_masker(masks.channels, masks.channel_length) if masks.channels else None,
        )  # fmt: skip

    def start_from(self, state: Any) -> list[str]:
        """Take the encoder, and the mask token where pretraining has one."""
        lines = super().start_from(state)
        name = f"mask_tokens.{self.backbone.modality}"
        if self.mask_token is not None and name in state:
            with torch.no_grad():
                self.mask_token.copy_(state[name])
        return lines

    def prepare(self, batch: Batch, *, seed: int, update: int) -> Transcribed:
        """Read the transcripts of a batch and draw its masks, on the CPU."""
        targets, sizes = letter_targets(batch.annotations.get(MEMBER, (None,) * len(batch)), self.letters)
        prepared = Transcribed(batch.inputs, targets, sizes, batch.lengths)
        if not self.training:
            return prepared
        extractor = self.backbone.encoder.frontend(self.backbone.modality).extractor
        shape, frames = extractor.grid(batch.inputs, batch.lengths)
        hidden = silent = None
        if self.time is not None:
            hidden = self.time(batch.ids, shape, seed=seed, update=update, lengths=frames)[:, 0]
        if self.channels is not None:
            other = derive(seed, _CHANNELS)
            silent = self.channels(batch.ids, (self.backbone.width,), seed=other, update=update)[:, 0]
        return replace(prepared, hidden=hidden, silent=silent)

    def forward(self, prepared: Transcribed, *, seed: int = 0, update: int = 0) -> Step:
        """The CTC loss, summed over clips.

        A transcript that needs more frames than its clip has cannot be aligned: it adds nothing to the loss, and
        ``too_long`` is the share of such clips.
        """
        logits, frames = self.logits(prepared, seed=seed, update=update)
        losses = self.losses(logits, frames, prepared)
        too_long = (required_frames(prepared.targets, prepared.target_lengths) > frames).float().mean()
        return Step(losses.sum(), len(prepared), {"too_long": too_long})

    def logits(self, prepared: Transcribed, *, seed: int = 0, update: int = 0) -> tuple[Tensor, Tensor]:
        """(B, T, C) float32 logits of each frame, and (B,) the frames that each clip has."""
        encoder, name = self.backbone.encoder, self.backbone.modality
        with self.encoding(update):
            tokens = encoder.extract(name, prepared.inputs, prepared.lengths)
            x = tokens.x
            if prepared.hidden is not None and self.mask_token is not None:
                x = torch.where(prepared.hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
            if prepared.silent is not None:
                x = x.masked_fill(prepared.silent.unsqueeze(1), 0.0)
            masked = Tokens(x, tokens.shape, tokens.padding)
            encoded = encoder.encode(name, masked, dropped=self.dropped(seed, update))
        logits = self.projection(self.final_dropout(encoded.positions)).float()
        total = logits.new_full((len(prepared),), logits.shape[1], dtype=torch.int64)
        return logits, total if tokens.padding is None else (~tokens.padding).sum(1)

    @staticmethod
    def losses(logits: Tensor, frames: Tensor, prepared: Transcribed) -> Tensor:
        """(B,) the loss of each clip, 0 where its transcript is too long."""
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), prepared.targets, frames, prepared.target_lengths, blank=BLANK,
            reduction="none", zero_infinity=True,
        )  # fmt: skip


def required_frames(targets: Tensor, lengths: Tensor) -> Tensor:
    """(B,) the fewest frames that an alignment of each transcript takes: a blank stands between equal letters."""
    if targets.shape[1] < 2:
        return lengths
    places = torch.arange(1, targets.shape[1], device=targets.device)
    equal = (targets[:, 1:] == targets[:, :-1]) & (places < lengths.unsqueeze(1))
    return lengths + equal.sum(1)
