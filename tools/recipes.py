"""Experiments by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data2vec.core.errors import ConfigError
from data2vec.core.settings.overrides import apply_overrides
from data2vec.core.settings.pretraining import Experiment

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def chosen_experiment(name: str, *, sample: bool, overrides: Sequence[str]) -> Experiment:
    """The experiment of a file, or its sample variant, with settings changed.

    Raises:
        ConfigError: no such file, or settings that do not exist.
    """
    module = load_experiment(name)
    chosen = getattr(module, "sample" if sample else "experiment", None)
    if not isinstance(chosen, Experiment):
        raise ConfigError([f"{name}: defines no {'sample' if sample else 'experiment'} of pretraining"])
    return apply_overrides(chosen, overrides)


def load_experiment(name: str) -> Any:
    """The module of ``experiments/NAME.py``, or of the file that the user names.

    Raises:
        ConfigError: no such file.
    """
    path = Path(name) if name.endswith(".py") else EXPERIMENTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        known = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.py")))
        raise ConfigError([f"{name}: no such experiment; choose one of {known}, or the path of a file NAME.py"])
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as when the file is run: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def micro_batch(experiment: Experiment) -> int:
    """Count the samples of one forward pass of a recipe, of random input where they differ in length."""
    train = experiment.train
    if train.micro_length is None:
        return train.micro_batch or train.batch
    modality = next(iter(experiment.modalities.values()))
    length: int = modality.exhibit.random_input(1).inputs.shape[1]
    return max(1, train.micro_length // length)
