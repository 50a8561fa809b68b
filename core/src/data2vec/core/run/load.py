"""A finished (or running) run as a model that gives features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.pieces import SavedTensors
from data2vec.core.data.shards.beside import located
from data2vec.core.distributed.device import choose_device
from data2vec.core.errors import CheckpointError
from data2vec.core.modality import Modality
from data2vec.core.model.encoder import Features
from data2vec.core.run.folder import CONFIGURATION
from data2vec.core.run.kinds import kind_of
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import FineTuning
from data2vec.core.settings.overrides import from_yaml, validate
from data2vec.core.task import Task

M = TypeVar("M", bound=Modality)


@dataclass(frozen=True)
class LoadedRun:
    """A run's settings and its model with the weights of a checkpoint, in evaluation mode."""

    folder: Path
    experiment: Recipe
    model: Task[Any]
    update: int
    device: torch.device

    def settings_of(self, kind: type[M]) -> M:
        """Settings of one of its modalities.

        Raises:
            CheckpointError: the run has no such modality.
        """
        modalities = self.experiment.modalities
        found = modalities.get(kind.name)
        if not isinstance(found, kind):
            raise CheckpointError(f"{self.folder}: this run has no {kind.name}, only {', '.join(modalities)}")
        return found

    def features(
        self,
        inputs: Tensor,
        *,
        lengths: Tensor | None = None,
        modality: str | None = None,
        layers: str | int = "top_k",
        of: str = "",
    ) -> Features:
        """Representations of prepared inputs.

        Args:
            inputs: (B, ...) as the modality's extractor reads them.
            lengths: (B,) valid lengths where inputs are padded.
            modality: needed when the model has several.
            layers: see :meth:`data2vec.core.model.encoder.Encoder.features`.
            of: which of the task's encoders; empty: the preferred one. Pretraining has ``teacher`` and ``student``.

        Raises:
            ValueError: no such layer or encoder.
        """
        name = modality or next(iter(self.experiment.modalities))
        encoders = self.model.encoders()
        of = of or next(iter(encoders), "")
        if of not in encoders:
            raise ValueError(f"of={of!r}: choose {' or '.join(encoders)}")
        on = self.device
        return encoders[of].features(name, inputs.to(on), None if lengths is None else lengths.to(on), layers=layers)


def load_run(run: str | Path, *, device: str = "auto") -> LoadedRun:
    """Read a run's folder, or one of its checkpoints.

    Args:
        run: ``runs/NAME`` (its newest checkpoint; of fine-tuning the best) or ``runs/NAME/checkpoints/update-...``.
        device: ``auto``, ``cpu``, ``cuda`` ...

    Raises:
        CheckpointError: there is no complete checkpoint, or it does not fit its configuration.
        ConfigError: the configuration is not valid.
    """
    path = Path(run)
    folder = folder_of(path)
    experiment = configuration_of(folder)
    checkpoints = folder / "checkpoints"
    best = checkpoint.named(checkpoints, "best") if isinstance(experiment, FineTuning) else None
    saved = path if folder != path else best or checkpoint.latest(checkpoints)
    if saved is None:
        raise CheckpointError(f"{folder}: this run has saved no checkpoint yet; train it first")
    validate(experiment)
    experiment = experiment.replace(
        modalities={name: located(modality, folder) for name, modality in experiment.modalities.items()}
    )
    loaded = checkpoint.load(saved)
    if "model" not in loaded.tensors:
        raise CheckpointError(f"{saved}: holds no model; choose another checkpoint")
    model = _build(experiment, loaded.tensors["model"], folder / CONFIGURATION)
    model.load_own_state(loaded.tensors["model"])
    target = choose_device(device)
    return LoadedRun(folder, experiment, model.to(target).eval(), loaded.state["update"], target)


def folder_of(run: Path) -> Path:
    """The folder of a run, of which ``run`` may be a checkpoint."""
    return run.parent.parent if (run / "state.json").is_file() else run


def configuration_of(folder: Path) -> Recipe:
    """The settings of a run, as it keeps them.

    Raises:
        CheckpointError: there is no run.
        ConfigError: they cannot be read.
    """
    if not (folder / CONFIGURATION).is_file():
        raise CheckpointError(f"{folder}: no run there (it has no {CONFIGURATION}); name a folder such as runs/NAME")
    return from_yaml(folder / CONFIGURATION, None)


def _build(experiment: Recipe, weights: SavedTensors, source: Path) -> Task[Any]:
    """A model for some saved weights; settings that are none of theirs may ask for more than the memory there is.

    Raises:
        CheckpointError: it would be larger than the weights, or cannot be built here.
    """
    depth, width = experiment.transformer.depth, experiment.transformer.width
    if 4 * depth * width**2 > sum(math.prod(weights.shape(name)) for name in weights):  # attention alone
        raise CheckpointError(
            f"{source}: transformer.depth={depth} and transformer.width={width} are more than the saved weights have; "
            "give the run the configuration that it was trained with"
        )
    try:
        with torch.random.fork_rng():
            return kind_of(experiment).build(experiment)
    except (RuntimeError, MemoryError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: no model can be built of these settings here ({reason})") from None
