"""The interface between core and a modality: its settings and the parts they describe.

A modality package defines a frozen dataclass that derives from :class:`Modality`, holds its settings, and builds
its parts. Core never asks which modality it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import Tensor

from data2vec.core.batch import Batch, Example, Sample, stack
from data2vec.core.errors import ConfigError
from data2vec.core.exhibit import Exhibit
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.finetuning import MixConfig
from data2vec.core.settings.registry import ModalitySettings

if TYPE_CHECKING:
    from data2vec.core.model.encoder import Frontend


class Masker(Protocol):
    """Makes M masks for each sample; a pure function of its arguments, the same on every rank and after a resume."""

    def __call__(
        self, ids: Tensor, shape: tuple[int, ...], *, seed: int, update: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Boolean (B, M, T), true where hidden.

        How many positions a row hides depends on its own sample alone; rows of samples of equal length hide as many.
        A masker of a modality that defines :meth:`Modality.maskable` takes its result as the keyword ``maskable``.

        Args:
            ids: (B,) int64 sample numbers; with ``seed`` and ``update`` they alone decide a sample's masks.
            shape: the grid of positions, (T,) or (H, W); T is their product.
            lengths: (B,) valid positions of each sample where padded, else None.
        """


class Decoder(Protocol):
    """Turns a raw sample into what the extractor reads. Runs in loader workers, so it must be picklable."""

    def __call__(self, sample: Sample, seed: int) -> Example:
        """Decode (and, for training, augment); every random choice derives from ``seed``.

        Raises:
            SampleError: the sample cannot be used; the pipeline skips and counts it.
        """


class Mixer(Protocol):
    """Mixes the samples of a training batch, and their labels in the same shares."""

    def __call__(
        self, inputs: Tensor, targets: Tensor, ids: Tensor, *, seed: int, update: int
    ) -> tuple[Tensor, Tensor]:
        """Mix (B, ...) inputs and (B, C) targets; every random choice follows from ``ids``, ``seed``, ``update``."""


@dataclass(frozen=True)
class Modality(ModalitySettings):
    """Settings and parts of one modality. Subclasses set ``name`` and ``extensions`` and add their fields."""

    length_unit: ClassVar[str] = ""  # what input lengths count, where samples differ ("tokens")
    units_of_second: ClassVar[int] = 1  # how many of these a second has
    crop_key: ClassVar[str] = ""  # the setting of the length that inputs are cropped to, where there is one
    assets: ClassVar[tuple[str, ...]] = ()  # files beside the shards that a run keeps (a tokenizer)

    @property
    @abstractmethod
    def uses_mask_token(self) -> bool:
        """True where a learned vector replaces masked positions (1.0); false where the input itself is masked."""

    @abstractmethod
    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        """Extractor, positions, prefix tokens, attention bias and modality blocks."""

    @abstractmethod
    def build_masker(self) -> Masker: ...

    @abstractmethod
    def build_decoder(self, *, train: bool) -> Decoder:
        """With augmentation for training, without for evaluation."""

    def build_mixer(self, mix: MixConfig) -> Mixer:
        """Build what mixes training samples for classification.

        Raises:
            ConfigError: samples of this modality are not mixed.
        """
        raise ConfigError([f"mix.mixup={mix.mixup}: {self.name} is not mixed; set mix.mixup=0 and mix.cutmix=0"])

    def build_span_masker(self, ratio: float, length: int) -> Masker:
        """Build the masker of fine-tuning: spans that start at random and may overlap, one mask for each sample.

        Raises:
            ConfigError: nothing of this modality is masked so.
        """
        raise ConfigError([f"frame_masks.time={ratio}: {self.name} has no frames; fine-tune it for classes"])

    def maskable(self, batch: Batch) -> Tensor | None:
        """(B, T) bool, the positions that may be hidden, where the input decides that (no special tokens)."""
        return None

    def student_inputs(self, batch: Batch, hidden: Tensor, *, seed: int, update: int) -> Tensor | None:
        """Make what the student reads instead of ``batch.inputs``, where the input itself is masked; else None.

        Args:
            batch: B samples.
            hidden: (B, M, T) bool.
            seed, update: with the samples' numbers they decide every random choice.
        """
        return None

    @staticmethod
    def length_of(members: Mapping[str, bytes]) -> int | None:
        """The input length of a sample, from the headers of its members; None where samples do not differ.

        Raises:
            SampleError: it cannot be told.
        """
        return None

    @property
    def length_range(self) -> tuple[int, int | None]:
        """The shortest input that training uses, and the length that inputs are cropped to (None: they are not)."""
        return 1, None

    def located(self, folder: Path) -> Self:
        """These settings with the files of ``assets`` read from ``folder``."""
        return self

    def asset_problems(self) -> list[str]:
        """Every file of ``assets`` that does not fit the settings, one line each."""
        return []

    def collate(self, samples: Sequence[Sample], examples: Sequence[Example]) -> Batch:
        """A batch of decoded samples; the default stacks equally shaped inputs."""
        return stack(self.name, samples, examples)

    @property
    def exhibit(self) -> Exhibit:
        """The things that this modality shows of itself: baselines, pictures, samples."""
        return Exhibit()
