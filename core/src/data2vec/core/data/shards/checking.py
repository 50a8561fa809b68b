"""Reading shards that lie on disk: their index, and whether they are as it says and of use to their modality.

No input is decoded. That each sample has one is read off its headers, and whether its label is a class number is looked
up, for an index says nothing of either.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data2vec.core.batch import label_problem
from data2vec.core.data.shards.index import INDEX_NAME, ShardIndex, ShardInfo
from data2vec.core.data.shards.inputs import Inputs, check_share, unusable
from data2vec.core.data.shards.tar import TarSample, read, scan
from data2vec.core.data.shards.writer import Measure, measure_of, unmeasured
from data2vec.core.errors import ConfigError, DataError, SampleError, one_line
from data2vec.core.modality import Modality

_log = logging.getLogger(__name__)
_SHOWN = 10  # samples that are named
_LONGEST_LABEL = 1 << 10  # bytes that are read of a label

Progress = Callable[[int, int], None]  # (shards done, shards in all)


def _no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Inspected:
    """A shard: its entry in an index, and a line for each sample without an input and each label that is none."""

    info: ShardInfo
    problems: tuple[str, ...]
    labels: tuple[str, ...]
    labelled: int  # samples that have a label, of use or not


def describe(path: Path, measure: Measure = unmeasured) -> ShardInfo:
    """Count, hash and measure a shard that lies on disk.

    Raises:
        DataError: it cannot be read, or is no usable shard.
    """
    return inspect(path, None, measure).info


def inspect(path: Path, inputs: Inputs | None, measure: Measure = unmeasured) -> Inspected:
    """Count, hash, measure and check a shard that lies on disk.

    Args:
        path: of the shard.
        inputs: finds the input of a sample; None: whether it has one is not asked.
        measure: gives the length of a sample's members.

    Raises:
        DataError: it cannot be read, or is no usable shard.
    """
    samples = scan(path) if inputs is None else [inputs.present(sample) for sample in scan(path)]
    labels = []
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            lengths = [] if measure is unmeasured else [_length(file, sample, path, measure) for sample in samples]
            for sample in samples:
                problem = None if inputs is None else _label_problem(file, sample)
                if problem:
                    labels.append(one_line(f"{path}: {sample.key}: {problem}"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    known = () if None in lengths else tuple(length for length in lengths if length is not None)
    info = ShardInfo(path.name, len(samples), size, digest, known)
    return Inspected(info, tuple(unusable(str(path), samples)), tuple(labels), sum("cls" in s.members for s in samples))


def index_folder(
    folder: Path,
    modality: str,
    class_names: tuple[str, ...] | list[str] = (),
    progress: Progress = _no_progress,
    *,
    member: str | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> ShardIndex:
    """Write the index of a folder of shards that something else wrote.

    Args:
        folder: of the shards.
        modality: what they hold; of one that is not installed nobody can say what its inputs are.
        class_names: of the class numbers.
        progress: called as shards are read.
        member: see ``data.member``.
        warn: told in one line of samples without an input, and of labels that are no class numbers.

    Raises:
        DataError: there are no ``*.tar`` files, or one is no usable shard, or has no sample with an input. No index is
            written then.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: has no *.tar files")
    found = []
    (measure, unit), inputs = measure_of(modality), inputs_of(modality, member)
    for done, path in enumerate(paths):
        progress(done, len(paths))
        found.append(inspect(path, inputs, measure))
        reasons = [line.removeprefix(f"{path}: ") for line in found[-1].problems]
        check_share(str(path), found[-1].info.samples, reasons, most=1.0)
    progress(len(paths), len(paths))
    index = ShardIndex(modality, tuple(one.info for one in found), tuple(class_names), unit)
    problems = [line for one in found for line in one.problems]
    if problems:
        shown = "".join(f"\n  {line}" for line in problems[:_SHOWN])
        warn(f"{len(problems)} of {index.samples} samples cannot be used and will be skipped:{shown}")
    _tell_labels(found, warn)
    index.save(folder)
    return index


def verify(
    folder: Path,
    progress: Progress = _no_progress,
    *,
    member: str | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> list[str]:
    """Compare a folder of shards with its index, reading every byte.

    Args:
        folder: of the shards and their index.
        progress: called as shards are read.
        member: see ``data.member``.
        warn: told in one line of labels that are no class numbers.

    Returns:
        One line for each problem: a file that is missing, of another size, checksum or number of samples, damaged, or
        not in the index, and a sample that no reader will use. Empty where all is well.
    """
    try:
        index = ShardIndex.load(folder)
    except DataError as error:
        return [str(error)]
    problems: list[str] = []
    found: list[Inspected] = []
    inputs = inputs_of(index.modality, member)
    if inputs is None:
        warn(f"{folder}: holds {index.modality[:40]!r}, which is not installed: its samples are not looked into")
    for done, shard in enumerate(index.shards):
        progress(done, len(index.shards))
        path = folder / shard.name
        if not os.path.isfile(path):  # also where the index gives a longer name than a file can have
            problems.append(f"{path}: is missing")
            continue
        try:
            inspected = inspect(path, inputs)
        except DataError as error:
            problems.append(str(error))
            continue
        found.append(inspected)
        problems += [*_differences(path, inspected.info, shard), *inspected.problems]
    progress(len(index.shards), len(index.shards))
    _tell_labels(found, warn)
    listed = {shard.name for shard in index.shards}
    unlisted = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    problems += [f"{folder / name}: is not in {INDEX_NAME}" for name in unlisted]
    return problems


def inputs_of(modality: str, member: str | None = None) -> Inputs | None:
    """Find how a modality's inputs are told; None for one that is not installed."""
    try:
        return Inputs.of(Modality.by_name(modality), member)
    except ConfigError:
        return None


def _length(file: BinaryIO, sample: TarSample, path: Path, measure: Measure) -> int | None:
    if sample.problem is not None:
        return 0
    try:
        return measure(read(file.fileno(), sample, path.name).members)
    except SampleError:
        return 0


def _label_problem(file: BinaryIO, sample: TarSample) -> str | None:
    if "cls" not in sample.members:
        return None
    offset, size = sample.members["cls"]
    return label_problem(os.pread(file.fileno(), min(size, _LONGEST_LABEL), offset))


def _differences(path: Path, found: ShardInfo, shard: ShardInfo) -> list[str]:
    return [
        f"{path}: {name} is {getattr(found, name)}, {INDEX_NAME} says {getattr(shard, name)}"
        for name in ("samples", "bytes", "sha256")
        if getattr(found, name) != getattr(shard, name)
    ]


def _tell_labels(found: Sequence[Inspected], warn: Callable[[str], None]) -> None:
    lines = [line for one in found for line in one.labels]
    if lines:
        labelled = sum(one.labelled for one in found)
        warn(f"{len(lines)} of {labelled} labels count as unlabelled, the first: {lines[0]}")
