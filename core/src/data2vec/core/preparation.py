"""What a run reads: sample data where none is named, the shards of each modality, the files beside them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from data2vec.core.config import Experiment
from data2vec.core.data.assets import beside, keep, located
from data2vec.core.data.index import INDEX_NAME
from data2vec.core.data.pipeline import EvaluationData, TrainData
from data2vec.core.errors import ConfigError, Data2VecError

_HELD_OUT = 0.1  # of the training samples, where no validation shards are named


def write_sample_data(experiment: Experiment, folder: Path, console: Console) -> None:
    """Write the sample shards into ``folder``, unless they are there.

    Raises:
        ConfigError: the experiment has several modalities.
        DataError: the packages that the samples come from are not installed.
    """
    (name, modality), *others = experiment.modalities.items()
    if others:
        raise ConfigError(["data.train: the sample variant has one modality; name shards for several"])
    place = folder / name
    if not (place / INDEX_NAME).is_file():
        console.print(f"writing sample shards to {place}", markup=False, soft_wrap=True)
        modality.write_sample_shards(place)


def with_sample_data(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with the shards that :func:`write_sample_data` writes."""
    escaped = Path(glob.escape(str(folder / next(iter(experiment.modalities)))))
    names = {"train": str(escaped / "train-*.tar"), "validation": str(escaped / "validation-*.tar")}
    return experiment.replace(data=names)


def shard_specs(text: str, modalities: Sequence[str], key: str) -> dict[str, str]:
    """Shards of each modality: one specification, or with several modalities ``NAME=SPEC NAME=SPEC``.

    Raises:
        ConfigError: a modality has no shards.
    """
    if len(modalities) == 1:
        return {modalities[0]: text}
    pairs = dict(part.partition("=")[::2] for part in text.split())
    if set(pairs) != set(modalities):
        form = " ".join(f"{name}=SHARDS" for name in modalities)
        raise ConfigError([f"{key}={text!r}: this experiment has several modalities; write {key}='{form}'"])
    return pairs


def open_data(experiment: Experiment, cache: Path) -> tuple[dict[str, TrainData], dict[str, EvaluationData]]:
    """Training and evaluation data of each modality.

    Raises:
        DataError: shards are missing or broken.
    """
    data, names = experiment.data, list(experiment.modalities)
    assert data.train is not None
    train, validation = {}, {}
    named = shard_specs(data.validation, names, "data.validation") if data.validation else {}
    for name, spec in shard_specs(data.train, names, "data.train").items():
        modality = experiment.modalities[name]
        seed = experiment.train.seed
        opened = TrainData.open(spec, modality, data=data, seed=seed, cache=cache)
        if name in named:
            apart = EvaluationData.open(named[name], modality, data=data, seed=seed, cache=cache)
            # What is said of one of them is not said again of the other.
            validation[name] = replace(apart, shards=replace(apart.shards, remarks=opened.shards.remarks))
        else:
            opened, validation[name] = opened.hold_out(_HELD_OUT)
        train[name] = opened
    return train, validation


def with_assets(
    experiment: Experiment,
    train: dict[str, TrainData],
    validation: dict[str, EvaluationData],
    folder: Path,
    *,
    started: bool,
) -> Experiment:
    """Keep the files that lie beside the shards (a tokenizer) in the run's folder, and read them from there."""
    modalities = {}
    for name, modality in experiment.modalities.items():
        written = []
        try:
            for data in (train[name], validation[name]):
                files = beside(data.shards, modality.assets)
                written += keep(folder, files, started=started or data is validation[name])
            modalities[name] = located(modality, folder)
        except Data2VecError:
            for path in written:  # else the next command would take them for the run's own
                path.unlink(missing_ok=True)
            raise
        train[name] = replace(train[name], modality=modalities[name])
        validation[name] = replace(validation[name], modality=modalities[name])
    return experiment.replace(modalities=modalities)
