"""The data that a run reads: sample data where none is named, the shards of each modality, the files beside them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.data.shards.beside import beside, keep, kept_files, located
from data2vec.core.data.shards.index import INDEX_NAME
from data2vec.core.errors import ConfigError, Data2VecError
from data2vec.core.settings.fields import Recipe

_log = logging.getLogger(__name__)
_HELD_OUT = 0.1  # of the training samples, where no validation shards are named


def write_sample_data(recipe: Recipe, folder: Path, console: Console) -> None:
    """Write the sample shards into ``folder``, unless they are there.

    Raises:
        ConfigError: the experiment has several modalities.
        DataError: the packages that the samples come from are not installed.
    """
    (name, modality), *others = recipe.modalities.items()
    if others:
        raise ConfigError(["data.train: the sample variant has one modality; name shards for several"])
    place = folder / name
    if not (place / INDEX_NAME).is_file():
        console.print(f"writing sample shards to {place}", markup=False, soft_wrap=True)
        which = () if recipe.data.sample is None else (recipe.data.sample,)
        modality.exhibit.write_sample_shards(place, *which)


def with_sample_data(recipe: Recipe, folder: Path) -> Recipe:
    """The experiment with the shards that :func:`write_sample_data` writes."""
    escaped = Path(glob.escape(str(folder / next(iter(recipe.modalities)))))
    names = {"train": str(escaped / "train-*.tar"), "validation": str(escaped / "validation-*.tar")}
    return recipe.replace(data=names)


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


def open_data(recipe: Recipe, cache: Path) -> tuple[dict[str, TrainData], dict[str, EvaluationData]]:
    """Training and evaluation data of each modality.

    Raises:
        DataError: shards are missing or broken.
    """
    data, names = recipe.data, list(recipe.modalities)
    assert data.train is not None
    train, validation = {}, {}
    named = shard_specs(data.validation, names, "data.validation") if data.validation else {}
    for name, spec in shard_specs(data.train, names, "data.train").items():
        modality = recipe.modalities[name]
        seed = recipe.train.seed
        opened = TrainData.open(spec, modality, data=data, seed=seed, cache=cache)
        if name in named:
            apart = EvaluationData.open(named[name], modality, data=data, seed=seed, cache=cache)
            # What is said of one of them is not said again of the other.
            validation[name] = replace(apart, shards=replace(apart.shards, remarks=opened.shards.remarks))
        else:
            opened, validation[name] = opened.hold_out(_HELD_OUT)
        train[name] = opened
    return train, validation


def warn_of_small_cache(train: Mapping[str, TrainData]) -> None:
    """Say when the shards that are read at once do not fit into the cache: they are fetched again and again then.

    Raises:
        DataError: shards are fetched, and none can be kept.
    """

    def needed(shards: int) -> tuple[int, int]:
        sizes = [size for data in train.values() for size in data.shards.working_set(shards)]
        return len(sizes), sum(sizes)

    first = next(iter(train.values()))
    window, cache = first.config.shuffle_shards, first.shards.cache
    count, size = needed(window)
    if not count or size <= (room := cache.room()):
        return
    bounded = room == cache.max_bytes
    fitting = max((shards for shards in range(window) if needed(shards)[1] <= room), default=0)
    need = _rounded_up(size)
    advice = (
        f"raise data.cache_gb to at least {need}" if bounded else "free room there, or set data.cache to another disk"
    )
    if fitting:
        advice += f", or lower data.shuffle_shards to {fitting}"
    limit = "null" if cache.max_bytes is None else f"{cache.max_bytes / 1e9:g}"
    has = "" if bounded else f" has room for {room / 1e9:.3g} GB in {cache.folder}, which"
    _log.warning(
        "data.cache_gb=%s%s is less than the %s GB of the %d shards that are read at once "
        "(data.shuffle_shards=%d), so that the same ones are fetched again and again; %s",
        limit, has, need, count, window, advice,
    )  # fmt: skip


def _rounded_up(size: int) -> str:
    """Bytes as GB in three digits that are enough for them."""
    digit = 10 ** max(0, len(str(size)) - 3)
    return f"{-(-size // digit) * digit / 10**9:g}"


def with_assets(
    recipe: Recipe,
    train: dict[str, TrainData],
    validation: dict[str, EvaluationData],
    folder: Path,
    *,
    started: bool,
    source: Path | None = None,
) -> Recipe:
    """Keep the files that lie beside the shards (a tokenizer) in the run's folder, and read them from there.

    ``source``: the folder of the run that this one starts from, whose files come first.
    """
    modalities = {}
    for name, modality in recipe.modalities.items():
        written = []
        try:
            theirs = {} if source is None else kept_files(source, modality.assets)
            written += keep(folder, theirs, started=started)
            for data in (train[name], validation[name]):
                files = beside(data.shards, modality.assets)
                written += keep(folder, files, started=started or bool(theirs) or data is validation[name])
            modalities[name] = located(modality, folder)
        except Data2VecError:
            for path in written:  # else the next command would take them for the run's own
                path.unlink(missing_ok=True)
            raise
        train[name] = replace(train[name], modality=modalities[name])
        validation[name] = replace(validation[name], modality=modalities[name])
    return recipe.replace(modalities=modalities)
