"""Valid shards to begin with, where the cases run, and what runs them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data2vec.core import Experiment
from data2vec.core.batch import Batch
from data2vec.core.data.dataset import TrainData
from data2vec.core.errors import DataError
from data2vec.core.testing import load_module

HERE = Path(__file__).parent
guard = load_module("fuzz_guard", HERE / "guard.py")
mutations = load_module("fuzz_mutations", HERE / "mutations.py")
scenarios = load_module("fuzz_scenarios", HERE.parent / "scenarios.py")

MODALITIES = ("vision", "speech", "text")
SAMPLES = 6
Rng = np.random.Generator
pick = mutations.pick


def image(rng: Rng, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(file, format=kind)
    return file.getvalue()


def clip(rng: Rng, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, rng.normal(size=int(rng.integers(1_500, 4_500))).clip(-4, 4) / 5, 16_000, format=kind)
    return file.getvalue()


def tokens(rng: Rng) -> bytes:
    from data2vec.text.loader import pack_ids

    return pack_ids([0, *rng.integers(5, 260, int(rng.integers(8, 20))).tolist(), 2], 261)


def sample(rng: Rng, modality: str, number: int) -> dict[str, bytes]:
    label = {"cls": str(number % 3).encode()}
    odd = number % 2
    if modality == "vision":
        return {"jpg": image(rng, "JPEG"), **label} if odd else {"png": image(rng, "PNG"), **label}
    if modality == "speech":
        return {"wav": clip(rng, "WAV"), **label} if odd else {"flac": clip(rng, "FLAC"), "frames": b"0 1\n800 2\n"}
    return {"txt": f"document {number} has words".encode(), **label} if odd else {"tokens": tokens(rng), **label}


def shard(modality: str) -> bytes:
    """A tar file as other programs write it."""

    rng, out = mutations.generator(modality, 0), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(SAMPLES):
            for extension, content in sample(rng, modality, number).items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def experiment_of(modality: str) -> Experiment:
    experiment: Experiment = scenarios.scenario(modality)
    return experiment.replace(data={"workers": 0}, train={"batch": 4})


class Place:
    """Where the cases run: ``run`` is the only folder that they may write to, ``sentinel`` what evil content makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "outer" / "run"
        self.shards = self.run / "shards"
        self.evil = mutations.Evil(folder / "sentinel")
        (folder / "beside.txt").write_text("untouched")
        self.fresh()
        self.before = self._others()

    def fresh(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.shards.mkdir(parents=True)

    def _others(self) -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
            if not path.is_relative_to(self.run)
        }

    def check(self) -> None:
        assert self._others() == self.before


def put(rng: Rng, place: Path, data: bytes, evil: Any) -> None:
    """Write a file, or now and then something that is none."""
    place.unlink(missing_ok=True)
    match int(rng.integers(60)):
        case 0:
            place.symlink_to(place)
        case 1:
            place.symlink_to(pick(rng, ("/dev/zero", "/dev/null", "/etc/passwd", "/", "gone", evil.sentinel)))
        case 2:
            place.mkdir()
        case 3:
            os.mkfifo(place)
        case _:
            place.write_bytes(data)


def fuzz(request: pytest.FixtureRequest, target: str, place: Place, case: Callable[[Rng], Any]) -> list[Any]:
    """Run the cases; all that went wrong is reported together. Returns the outcomes."""
    first, count = request.config.getoption("--fuzz-first"), request.config.getoption("--fuzz-cases")
    outcomes, failures = [], {}
    for number in range(first, first + count):
        try:
            outcomes.append(case(mutations.generator(target, number)))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            text = "".join(traceback.format_exception(error, chain=False)[-8:])
            failures.setdefault(kind, []).append((number, text))
        if number % 50 == 0 or number == first + count - 1:
            place.check()
    report = "\n".join(f"cases {[n for n, _ in found][:8]}: {kind}\n{found[0][1]}" for kind, found in failures.items())
    assert not failures, f"{target}: {sum(map(len, failures.values()))} of {count} cases\n{report}"
    return outcomes


def read_all(spec: str, experiment: Experiment, folder: Path) -> tuple[int, int]:
    """Samples that are read and skipped by an evaluation, after a batch of training."""
    ((_, modality),) = experiment.modalities.items()
    data = TrainData.open(spec, modality, data=experiment.data, seed=0, cache=folder / "cache")
    batches = list(data.for_evaluation().evaluation_batches(4))
    read, broken = sum(map(len, batches)), sum(len(batch.broken) for batch in batches)
    assert read + broken == data.total
    for batch in batches:
        check_batch(batch)
    with contextlib.suppress(DataError):  # both are broken
        check_batch(next(data.batches(0, 2)))
    return read, broken


def check_batch(batch: Batch) -> None:
    assert torch.isfinite(batch.inputs.float()).all()
    assert len(batch.ids) == len(batch.labels) == len(batch) > 0
    for line in batch.broken:
        guard.check_message(line)
        assert line.isprintable()
