"""A modality with every kind of setting, and an experiment with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from data2vec.core.modality import Masker, Modality
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.overrides import apply_overrides
from data2vec.core.settings.pretraining import Experiment, PredictorConfig


class Kind(StrEnum):
    BLOCK = "block"
    INVERSE = "inverse_block"


@dataclass(frozen=True)
class ToyMask:
    kind: Kind = Kind.BLOCK
    ratio: float = 0.6
    spans: tuple[int, ...] = (4, 8)


@dataclass(frozen=True)
class Toy(Modality):
    """A modality with every kind of setting that one may have."""

    name: ClassVar[str] = "toy_settings"
    extensions: ClassVar[tuple[str, ...]] = ("toy",)

    mask: ToyMask = field(default_factory=ToyMask)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    layers: tuple[tuple[int, float], ...] = ((3, 0.5),)
    kinds: tuple[Kind, ...] = ()
    label: str = "none"
    maximum: int | None = None
    flip: bool = False

    @property
    def predictor_config(self) -> PredictorConfig:
        return self.predictor

    @property
    def uses_mask_token(self) -> bool:
        return True

    def problems(self, transformer: TransformerConfig) -> list[str]:
        too_large = self.maximum is not None and self.maximum > transformer.width
        return [f"{self.name}.maximum={self.maximum}: larger than transformer.width"] if too_large else []

    def build_frontend(self, transformer: TransformerConfig) -> Any:
        raise AssertionError("settings are handled without building anything")

    def build_masker(self) -> Masker:
        raise AssertionError("settings are handled without building anything")

    def build_decoder(self, *, train: bool) -> Any:
        raise AssertionError("settings are handled without building anything")


BASE = Experiment(name="base", modalities={"toy_settings": Toy()})


def override(*overrides: str) -> Experiment:
    return apply_overrides(BASE, overrides)


def toy(experiment: Experiment) -> Toy:
    settings_ = experiment.modalities["toy_settings"]
    assert isinstance(settings_, Toy)
    return settings_
