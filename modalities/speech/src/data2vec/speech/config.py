"""The settings of speech and the parts they describe.

Defaults are data2vec 1.0's for LibriSpeech (Baevski et al. 2022, arXiv 2202.03555, section 4.2, "paper 1"); "paper 2"
is data2vec 2.0 (arXiv 2212.07525).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from torch import nn

from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.exhibit import Exhibit
from data2vec.core.modality import Decoder, Masker, Modality
from data2vec.core.model.attention import Alibi
from data2vec.core.model.encoder import Frontend
from data2vec.core.model.transformer import build_blocks
from data2vec.core.settings.declare import NOT_NEGATIVE, RATE, Rule, at_least, setting
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig
from data2vec.core.settings.rules import checked, predictor_problems
from data2vec.speech.extractor import MEL_PHASES, Geometry, PositionConvolutions, SpeechExtractor, position_kernel
from data2vec.speech.loader import EXTENSIONS, AudioConfig, AudioDecoder, collate_audio, length_of
from data2vec.speech.masker import SpanMasker

_OF_EACH = Rule(lambda values: min(values, default=0) >= 1, "give one number of 1 or more for each convolution")
_FEWEST_FRAMES = 2  # of a clip: one to hide and one to show
_SHORTEST_FILTER = 16  # samples of a filter on the mel scale: one period of 1 kHz


class MaskKind(StrEnum):
    """``span``: spans that start at random (1.0). ``exact_span``: spans, then exactly a share hidden (2.0)."""

    SPAN = "span"
    EXACT_SPAN = "exact_span"


@dataclass(frozen=True)
class MaskConfig:
    """The part of a clip that the student does not see: see :class:`data2vec.speech.masker.SpanMasker`.

    ``ratio``: for ``span`` the length of all spans together, overlaps counted twice, as a share of the frames (a start
    at each frame with probability 0.065, times 10, hides about 49 %); for ``exact_span`` the share that is hidden.
    ``min_spans`` belongs to ``span``, ``adjust`` to ``exact_span``.
    """

    kind: MaskKind = MaskKind.SPAN
    ratio: float = 0.65
    length: int = setting(10, at_least(1))  # frames of a span
    masks: int = setting(1, at_least(1))  # different masks of each clip in one update
    min_spans: int = setting(1, at_least(1))
    adjust: float = setting(0.05, NOT_NEGATIVE)  # added to ratio where spans are counted, because they overlap

    def build(self) -> Masker:
        """Build the masker."""
        if self.kind is MaskKind.EXACT_SPAN:
            return SpanMasker(self.ratio, self.length, self.masks, exact=True, adjust=self.adjust)
        return SpanMasker(self.ratio, self.length, self.masks, min_spans=self.min_spans)

    def problems(self) -> list[str]:
        """List what does not go together, one line each."""
        if self.kind is MaskKind.EXACT_SPAN and not 0 < self.ratio < 1:
            return [f"speech.mask.ratio={self.ratio}: must be above 0 and below 1"]
        if self.kind is MaskKind.SPAN and not 0 < self.ratio < self.length:  # at most one start for each frame
            return [
                f"speech.mask.ratio={self.ratio}: must be above 0 and below speech.mask.length={self.length}; "
                "0.65 hides about 49 %"
            ]
        return []


@dataclass(frozen=True)
class PositionsConfig:
    """Position convolutions (paper 1, section 4.2): ``depth`` layers, each with a kernel of ``width // depth``.

    The kernel is at least 3; ``depth`` 0 leaves them out.
    """

    width: int = setting(95, at_least(1))
    depth: int = setting(5, NOT_NEGATIVE)
    groups: int = setting(16, at_least(1))


@dataclass(frozen=True)
class Speech(Modality):
    """Clips of mono audio at 16 kHz, turned into frames by convolutions over the waveform."""

    name: ClassVar[str] = "speech"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    length_unit: ClassVar[str] = "samples at 16 kHz"
    units_of_second: ClassVar[int] = 16_000
    crop_key: ClassVar[str] = "audio.max_length"

    channels: tuple[int, ...] = setting((512,) * 7, _OF_EACH)  # of each convolution over the waveform
    kernels: tuple[int, ...] = setting((10, 3, 3, 3, 3, 2, 2), _OF_EACH)
    # Their product is the hop: 320 samples, 20 ms.
    strides: tuple[int, ...] = setting((5, 2, 2, 2, 2, 2, 2), _OF_EACH)
    mel: bool = False  # the first convolution starts from filters on the mel scale, not from random ones
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    alibi: bool = False  # attention bias by distance (2.0)
    alibi_learned_scale: bool = True  # each head learns a factor of its slope
    # Transformer blocks of this modality alone, before the shared ones.
    blocks: int = setting(0, NOT_NEGATIVE)
    input_norm: bool = True  # layer norm before the first block (post-norm Transformers)
    dropout: float = setting(0.1, RATE, anew=True)  # after the input norm
    mask: MaskConfig = field(default_factory=MaskConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)

    @property
    def geometry(self) -> Geometry:
        """Hop, receptive field and number of frames of the convolutions."""
        return Geometry(self.kernels, self.strides)

    @property
    def shortest(self) -> int:
        """Samples of the shortest clip that can be used: one with a frame to hide and another to show."""
        return self.geometry.receptive_field + (_FEWEST_FRAMES - 1) * self.geometry.hop

    @property
    def predictor_config(self) -> PredictorConfig:
        return self.predictor

    @property
    def uses_mask_token(self) -> bool:
        return True

    @property
    def length_range(self) -> tuple[int, int | None]:
        return max(self.audio.min_length, self.shortest), self.audio.max_length

    @staticmethod
    def length_of(members: Mapping[str, bytes]) -> int | None:
        return length_of(members)

    def problems(self, transformer: TransformerConfig) -> list[str]:
        layers = ("channels", "kernels", "strides")
        return checked(
            self, "speech.", (layers, self._convolution_problems),
            ((*layers, "audio."), lambda: [] if self._convolution_problems() else self._audio_problems()),
            (("mask.",), self.mask.problems),
            (("positions.depth", "positions.groups"), lambda: self._position_problems(transformer)),
            (("predictor.",), lambda: self._predictor_problems(transformer)),
        )  # fmt: skip

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        width, positions = transformer.width, self.positions
        convolutions = None
        if positions.depth:
            convolutions = PositionConvolutions(
                width,
                kernel=position_kernel(positions.width, positions.depth),
                depth=positions.depth,
                groups=positions.groups,
            )
        return Frontend(
            SpeechExtractor(self.channels, self.kernels, self.strides, width=width, mel=self.mel),
            width=width,
            positions=convolutions,
            bias=Alibi(transformer.heads, learned_scale=self.alibi_learned_scale) if self.alibi else None,
            input_norm=nn.LayerNorm(width, eps=transformer.norm_eps) if self.input_norm else None,
            dropout=self.dropout,
            blocks=build_blocks(transformer, self.blocks),
        )

    def build_masker(self) -> Masker:
        return self.mask.build()

    def build_span_masker(self, ratio: float, length: int) -> Masker:
        return SpanMasker(ratio, length, min_spans=0)

    def build_decoder(self, *, train: bool) -> Decoder:
        geometry = self.geometry
        return AudioDecoder(self.audio, train, self.shortest, hop=geometry.hop, receptive=geometry.receptive_field)

    def collate(self, samples: Sequence[Sample], examples: Sequence[Example]) -> Batch:
        geometry = self.geometry
        return collate_audio(self.name, samples, examples, hop=geometry.hop, receptive=geometry.receptive_field)

    @property
    def exhibit(self) -> Exhibit:
        from data2vec.speech.exhibit import SpeechExhibit  # drawing is not needed to train

        return SpeechExhibit(self)

    def _convolution_problems(self) -> list[str]:
        layers = {"channels": self.channels, "kernels": self.kernels, "strides": self.strides}
        if len({len(values) for values in layers.values()}) > 1:
            counts = ", ".join(f"{len(values)} {key}" for key, values in layers.items())
            return [f"speech.channels={list(self.channels)}: {counts}; give as many of each, one per convolution"]
        if self.mel and (self.channels[0] % MEL_PHASES or self.kernels[0] < _SHORTEST_FILTER):
            return [
                f"speech.mel=true: speech.channels begins with {self.channels[0]} and speech.kernels with "
                f"{self.kernels[0]}; choose a multiple of {MEL_PHASES} filters, of {_SHORTEST_FILTER} samples or more"
            ]
        return []

    def _audio_problems(self) -> list[str]:
        found, audio = [], self.audio
        least = max(audio.min_length, self.shortest)
        if audio.min_length < self.shortest:
            found.append(
                f"speech.audio.min_length={audio.min_length}: shorter than {_FEWEST_FRAMES} frames; "
                f"choose {self.shortest} or more"
            )
        if audio.max_length is not None and audio.max_length < least:
            found.append(
                f"speech.audio.max_length={audio.max_length}: below the shortest clip of {least} samples; "
                f"choose {least} or more, or null"
            )
        return found

    def _position_problems(self, transformer: TransformerConfig) -> list[str]:
        groups, width = self.positions.groups, transformer.width
        if not self.positions.depth or width % groups == 0:
            return []
        return [f"speech.positions.groups={groups}: does not divide transformer.width={width}; choose a divisor"]

    def _predictor_problems(self, transformer: TransformerConfig) -> list[str]:
        why = "speech has one dimension"
        return predictor_problems("speech", self.predictor, transformer.width, dimensions=1, why=why)
