"""``index.json``: what a set of shards holds, so that shards are skipped, checked and counted without reading them.

    {"format": 1, "modality": "vision", "classes": ["cat", "dog"], "totals": {"samples": 2000, "bytes": 9000000},
     "shards": [{"name": "train-000000.tar", "samples": 1000, "bytes": 4500000, "sha256": "..."}, ...]}

It lies in the folder of its shards. It may come from the network, so everything in it is checked by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from data2vec.core.errors import DataError, one_line
from data2vec.core.files import read_file, write_atomically

FORMAT = 1
INDEX_NAME = "index.json"
_LEAST = 512  # bytes of a sample: the header of one member
_MOST = 1 << 40  # bytes of a shard, and length of a sample
T = TypeVar("T")


class ForeignIndexError(DataError):
    """A file ``index.json`` that another program wrote for itself."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name (no folder), number of samples, size in bytes, and SHA-256 of the file in hex.

    ``lengths``: the input length of each sample, 0 where it cannot be told; empty where samples do not differ.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShardIndex:
    """A set of shards. ``class_names`` names the class numbers of the samples' labels; empty where there are none.

    ``length_unit``: what the samples' lengths count; empty where they have none.
    """

    modality: str
    shards: tuple[ShardInfo, ...]
    class_names: tuple[str, ...] = ()
    length_unit: str = ""

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def length(self) -> int:
        """Input lengths of all samples together."""
        return sum(sum(shard.lengths) for shard in self.shards)

    def find(self, name: str) -> ShardInfo | None:
        """The entry of a shard by its file name."""
        return next((shard for shard in self.shards if shard.name == name), None)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``index.json`` of a folder.

        Raises:
            DataError: there is none, or it is not valid.
        """
        path = folder / INDEX_NAME
        try:
            content = read_file(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); `tools/shard.py index` writes it") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """The index in the bytes of an ``index.json``; ``source`` names it in errors.

        Raises:
            ForeignIndexError: another program's. DataError: not JSON, another format version, a wrong type, or a value
                that cannot be.
        """
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: is not JSON ({error}); `tools/shard.py index` writes it anew") from None
        table = _own(data, source)
        version = _typed(table.get("format"), int, source, "format")
        if version != FORMAT:
            raise DataError(f"{source}: format={version} is unknown, this version reads {FORMAT}: index the set anew")
        entries = _typed(table.get("shards"), list, source, "shards")
        shards = tuple(_shard(entry, source, f"shards[{i}]") for i, entry in enumerate(entries))
        names = _typed(table.get("classes", []), list, source, "classes")
        index = cls(
            modality=_typed(table.get("modality"), str, source, "modality"),
            shards=shards,
            class_names=tuple(_typed(name, str, source, f"classes[{i}]") for i, name in enumerate(names)),
            length_unit=_typed(table.get("length_unit", ""), str, source, "length_unit"),
        )
        if len({shard.name for shard in shards}) != len(shards):
            raise DataError(f"{source}: a shard is listed twice")
        totals = _typed(table.get("totals"), dict, source, "totals")
        for key, value in (("samples", index.samples), ("bytes", index.size), ("length", index.length)):
            if totals.get(key, 0) != value:
                raise DataError(f"{source}: totals.{key}={totals.get(key)!r}, but its shards add up to {value}")
        return index

    def save(self, folder: Path) -> None:
        """Write ``index.json`` atomically.

        Raises:
            DataError: it cannot be written.
        """
        totals = {"samples": self.samples, "bytes": self.size}
        table: dict[str, Any] = {"format": FORMAT, "modality": self.modality, "classes": list(self.class_names)}
        if self.length_unit:
            table["length_unit"], totals["length"] = self.length_unit, self.length
        head = json.dumps({**table, "totals": totals}, indent=1, ensure_ascii=False).removesuffix("\n}")
        entries = [{k: v for k, v in vars(shard).items() if k != "lengths" or v} for shard in self.shards]
        lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)  # a line for each shard
        content = f'{head},\n "shards": [\n  {lines}\n ]\n}}\n'
        try:
            write_atomically(folder / INDEX_NAME, content.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise DataError(f"{folder / INDEX_NAME}: cannot be written ({error.strerror})") from None


def prefixed(name: str, prefix: str) -> bool:
    """Tell whether a file name is that of a shard written under ``prefix`` (``PREFIX-000000.tar``)."""
    return re.fullmatch(re.escape(prefix) + r"-[0-9]{6,}\.tar", name) is not None


def add_to_index(folder: Path, new: ShardIndex, prefix: str) -> ShardIndex:
    """Put the shards of one prefix into the folder's index, which keeps those of other prefixes.

    Raises:
        DataError: the folder's index is of another modality or names other classes, or cannot be written.
    """
    kept: Iterable[ShardInfo] = ()
    if (folder / INDEX_NAME).exists():
        old = ShardIndex.load(folder)
        kept = [shard for shard in old.shards if not prefixed(shard.name, prefix)]
        if kept and (old.modality, old.class_names) != (new.modality, new.class_names):
            raise DataError(
                f"{folder / INDEX_NAME}: holds shards of {old.modality} with {len(old.class_names)} classes; shards of "
                f"{new.modality} with {len(new.class_names)} other classes need another folder"
            )
    index = replace(new, shards=tuple(sorted((*kept, *new.shards), key=lambda s: s.name)))
    index.save(folder)
    return index


def _own(data: object, source: str) -> dict[str, Any]:
    """The table of an index that this program wrote, or means to be one: it has two of the fields that all have."""
    if isinstance(data, dict) and sum(name in data for name in ("format", "modality", "totals")) >= 2:
        return data
    kind = f"an object with {', '.join(list(data)[:3]) or 'nothing in it'}" if isinstance(data, dict) else str(data)
    raise ForeignIndexError(
        one_line(f"{source}: is not an index of these tools but another program's ({kind[:80]})")
        + "; `tools/shard.py index FOLDER --modality NAME --force` replaces it"
    )


def _typed(value: object, kind: type[T], source: str, name: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{source}: {name}={str(value)[:80]!r} is no {kind.__name__}")
    return value


def _listed(table: dict[str, Any], source: str, name: str) -> list[Any]:
    return _typed(table.get("lengths", []), list, source, f"{name}.lengths")


def _shard(entry: object, source: str, name: str) -> ShardInfo:
    table = _typed(entry, dict, source, name)
    shard = ShardInfo(
        name=_typed(table.get("name"), str, source, f"{name}.name"),
        samples=_typed(table.get("samples"), int, source, f"{name}.samples"),
        bytes=_typed(table.get("bytes"), int, source, f"{name}.bytes"),
        sha256=_typed(table.get("sha256"), str, source, f"{name}.sha256"),
        lengths=tuple(_typed(n, int, source, f"{name}.lengths") for n in _listed(table, source, name)),
    )
    # A name with a folder in it could point anywhere on the disk of whoever reads the index.
    if not re.fullmatch(r"[^/\\\x00-\x1f]+\.tar", shard.name):
        raise DataError(f"{source}: {name}.name={shard.name[:80]!r} is not the plain name of a .tar file")
    if shard.samples < 1 or shard.bytes < 1:
        raise DataError(f"{source}: {name} ({shard.name}) has {shard.samples} samples and {shard.bytes} bytes")
    if (
        shard.samples > shard.bytes // _LEAST or shard.bytes > _MOST
    ):  # else numbers would grow beyond what fits in memory
        raise DataError(f"{source}: {name} ({shard.name}) cannot hold {shard.samples} samples in {shard.bytes} bytes")
    if shard.lengths and (len(shard.lengths) != shard.samples or min(shard.lengths) < 0):
        raise DataError(f"{source}: {name} ({shard.name}) has {len(shard.lengths)} lengths for {shard.samples} samples")
    if max(shard.lengths, default=0) > _MOST:
        raise DataError(f"{source}: {name} ({shard.name}) has a sample of length {max(shard.lengths)}")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise DataError(f"{source}: {name}.sha256={shard.sha256[:80]!r} is no SHA-256 (64 hexadecimal digits)")
    return shard
