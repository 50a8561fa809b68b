"""The settings of a modality, and its class by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig


@dataclass(frozen=True)
class ModalitySettings(ABC):
    """The settings of one modality. Subclasses set ``name`` and add their fields."""

    name: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]  # shard members that hold the input, lower case

    _registry: ClassVar[dict[str, type[ModalitySettings]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            ModalitySettings._registry[cls.name] = cls

    @staticmethod
    def installed() -> list[str]:
        """List the modalities whose packages are installed, imported or not."""
        import data2vec

        return sorted(found.name for found in pkgutil.iter_modules(data2vec.__path__) if found.name != "core")

    @classmethod
    def by_name(cls, name: str) -> type[Self]:
        """Find the class of a modality, in the package ``data2vec.NAME`` unless it is already imported.

        Raises:
            ConfigError: no such modality is installed.
        """
        if name not in ModalitySettings._registry and name.isidentifier():
            try:
                importlib.import_module(f"data2vec.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"data2vec.{name}":
                    raise
        found = ModalitySettings._registry.get(name)
        if found is None or not issubclass(found, cls):
            raise ConfigError([f"{name}: no such modality is installed (no package data2vec.{name} defines it)"])
        return found

    @property
    @abstractmethod
    def predictor_config(self) -> PredictorConfig:
        """The head that predicts this modality's targets."""

    @property
    def has_cls_token(self) -> bool:
        """True where a prefix token stands for the whole sample, which ``loss.cls_weight`` needs."""
        return False

    def problems(self, transformer: TransformerConfig) -> list[str]:
        """List every setting that is wrong, one line each: ``vision.image_size=30: ...``."""
        return []
