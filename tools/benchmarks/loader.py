"""The speed of the loader."""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.result import Result
from PIL import Image
from recipes import chosen_experiment
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.tar import read, scan
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.settings.overrides import validate
from data2vec.vision import AugmentConfig, Vision


def loader(arguments: argparse.Namespace) -> Result:
    """Time the loader with several numbers of workers against a plain loop over image files in one process."""
    chosen = chosen_experiment(arguments.experiment, sample=arguments.sample, overrides=[])
    validate(chosen)
    modality = chosen.modalities.get("vision")
    if not isinstance(modality, Vision):
        raise ConfigError([f"{chosen.name}: the loader benchmark reads images; choose a recipe of vision"])
    with tempfile.TemporaryDirectory(prefix="data2vec-benchmark-") as name:
        folder = Path(name)
        shards = arguments.shards or _made_shards(folder, arguments.images, max(64, modality.image_size * 2))
        data = TrainData.open(shards, modality, data=chosen.data, seed=0, cache=folder / "cache")
        files = _as_files(data, folder / "files", arguments.images)
        contestants: dict[str, Callable[[], Generator[Any]]] = {
            "plain loop": partial(_plain, files, modality, arguments.batch)
        }
        for workers in arguments.workers:
            config = chosen.replace(data={"workers": workers}).data
            opened = TrainData.open(shards, modality, data=config, seed=0, cache=folder / "cache")
            contestants[f"{workers} workers"] = partial(_ours, opened, arguments.batch)
        skip = max(arguments.workers)
        rates: dict[str, list[float]] = {key: [] for key in contestants}
        with _one_thread():
            for _ in range(arguments.rounds):
                for key, start in contestants.items():
                    rates[key].append(_rate(start(), skip, arguments.samples))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    rows = [
        {"loader": key, "samples_per_second": rate, "ratio": rate / medians["plain loop"]}
        for key, rate in medians.items()
    ]
    settings = {
        "experiment": chosen.name, "shards": arguments.shards or "made", "samples_of_set": data.total,
        "batch": arguments.batch, "samples": arguments.samples, "rounds": arguments.rounds,
    }  # fmt: skip
    what = arguments.shards or f"{data.total} made JPEG images"
    columns = {"loader": "loader", "samples_per_second": "samples/s", "ratio": "ratio"}
    title = f"{chosen.name}: {what}, {modality.image_size} x {modality.image_size} pixels, batch {arguments.batch}"
    notes = [
        "plain loop: one process opens image files with PIL and transforms them with torchvision; medians, in turns"
    ]
    return Result("loader", title, columns, rows, settings, notes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Loading gains nothing from torch's threads, and the plain loop would lose by them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ours(data: TrainData, batch: int) -> Generator[Batch]:
    yield from data.batches(0, batch)


def _rate(batches: Generator[Any], skip: int, samples: int) -> float:
    """Samples a second, after what the workers prepare while they start."""
    for _ in range(1 + skip):
        next(batches)
    done, start = 0, time.perf_counter()
    while done < samples:
        done += len(next(batches))
    seconds = time.perf_counter() - start
    batches.close()
    return done / seconds


def _made_shards(folder: Path, images: int, side: int) -> str:
    """Shards of smooth random JPEG images with some grain, 4 : 3."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "shards", "train", "vision", samples_per_shard=max(1, images // 4)) as writer:
        for number in range(images):
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC), dtype=np.float32)
            grain = generator.normal(0, 6, smooth.shape).astype(np.float32)
            file = io.BytesIO()
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
            writer.write(f"{number:06d}", {"jpg": file.getvalue()})
    return str(folder / "shards" / "train-*.tar")


def _as_files(data: TrainData, folder: Path, most: int) -> list[Path]:
    """The first images of the shards as single files, for the plain loop."""
    folder.mkdir()
    files: list[Path] = []
    for number in range(len(data.shards.shards)):
        with data.shards.held(number) as path, path.open("rb") as tar:
            for entry in scan(path)[: most - len(files)]:
                members = read(tar.fileno(), entry, path.name).members
                extension = next((e for e in Vision.extensions if e in members), None)
                if extension is not None:
                    files.append(folder / f"{len(files):06d}.{extension}")
                    files[-1].write_bytes(members[extension])
    if not files:
        raise DataError(f"{data.shards.spec}: holds no images")
    return files


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """The plain way: open a file with PIL, transform it with torchvision."""

    def __init__(self, files: Sequence[Path], modality: Vision) -> None:
        from torchvision.transforms import InterpolationMode, v2

        augment: AugmentConfig = modality.augment
        size, bicubic = modality.image_size, InterpolationMode.BICUBIC
        steps: list[Any] = [v2.Resize(size, interpolation=bicubic), v2.CenterCrop(size)]
        if augment.crop_scale is not None:
            steps = [v2.RandomResizedCrop(size, scale=augment.crop_scale, interpolation=bicubic)]
        if augment.translate:
            steps.append(v2.RandomCrop(size, padding=augment.translate))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.colour_jitter:
            jitter = augment.colour_jitter
            steps.append(v2.ColorJitter(jitter, jitter, jitter if modality.channels == 3 else 0.0))
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(modality.mean, modality.std)]
        self.files, self.mode, self.transform = files, "RGB" if modality.channels == 3 else "L", v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        transformed: Tensor = self.transform(Image.open(self.files[number]).convert(self.mode))
        return transformed


def _plain(files: Sequence[Path], modality: Vision, batch: int) -> Generator[Tensor]:
    """Batches without end from one process, in a new order every epoch."""
    dataset = ImageFiles(files, modality)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=2**31)
    yield from torch.utils.data.DataLoader(dataset, batch, sampler=endless)
