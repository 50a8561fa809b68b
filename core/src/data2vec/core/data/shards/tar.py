"""Random access to the samples of a WebDataset shard.

A shard is an uncompressed tar file; consecutive members ``KEY.EXT`` with the same key are one sample. ``scan`` reads
the headers alone and notes where the bytes of each member lie; ``read`` fetches one sample. Nothing is extracted to
disk, and members that WebDataset would unpickle are never read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Self

from webdataset.tariterators import base_plus_ext

from data2vec.core.batch import Sample
from data2vec.core.errors import DataError, one_line

PICKLED = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})  # members that a careless reader would execute
_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                       tarfile.GNUTYPE_LONGLINK})  # fmt: skip
_LONGEST_EXTENDED = 1 << 14  # bytes: two paths of the longest that systems take, and attributes
_MOST_EXTENDED = 8  # before one member; each is read inside the one before
_MOST_PADDING = 1 << 20  # zero bytes behind the end mark: programs fill up the last record, of 10 KiB mostly
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class TarSample:
    """The place of one sample: for each extension (lower case) its byte offset in the file and its size.

    ``problem`` says why the sample cannot be used, None where it can.
    """

    key: str
    members: Mapping[str, tuple[int, int]]
    problem: str | None = None


def is_pickled(extension: str) -> bool:
    """Tell whether any part of an extension (``input.pth``, ``pyd.gz``) names a pickle format."""
    return not PICKLED.isdisjoint(extension.lower().split("."))


def scan(path: Path | str) -> list[TarSample]:
    """The samples of a shard in their order, from its headers alone.

    Raises:
        DataError: the file cannot be read, is compressed, is no tar file, is truncated or damaged, goes on behind its
            end mark, has no samples, or has one whose members lie apart.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe without a writer would never open
            raise DataError(f"{path}: is no regular file; remove it from the list")
        with open(path, "rb") as file:
            start = file.read(8)
            compression = next((name for magic, name in _COMPRESSION.items() if start.startswith(magic)), None)
            if compression:
                raise DataError(f"{path}: is compressed ({compression}); shards are read at random: decompress it")
            file.seek(0)
            with tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace", tarinfo=_Header
            ) as tar:
                samples = _group(_members(tar, path), path)
                _check_end(tar, path)
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no tar file, truncated or damaged ({error}); write or fetch it anew") from None
    except (OSError, OverflowError, ValueError, LookupError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not samples:
        raise DataError(f"{path}: holds no samples (members are named KEY.EXTENSION); remove it from the list")
    return samples


class _Header(tarfile.TarInfo):
    """A header of a file that anybody may have written: ``tarfile`` reads extended ones of any size and any depth."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and not 0 <= header.size <= _LONGEST_EXTENDED:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        depth = getattr(tarfile_, "depth", 0)
        if depth > _MOST_EXTENDED:
            raise tarfile.ReadError(f"more than {_MOST_EXTENDED} extended headers of one member")
        tarfile_.depth = depth + 1  # type: ignore[attr-defined]
        try:
            return super().fromtarfile(tarfile_)
        finally:
            tarfile_.depth = depth  # type: ignore[attr-defined]


def _members(tar: tarfile.TarFile, path: Path | str) -> list[tuple[str, str, int, int]]:
    """(key, extension, offset, size) of every member that WebDataset would take; links and folders are not."""
    found = []
    end = 0
    while (member := tar.next()) is not None:
        if member.size < 0 or (member.offset_data <= end and end > 0):
            raise DataError(f"{path}: is damaged at byte {member.offset}; fetch or write it anew")
        end = member.offset_data
        tar.members = []  # type: ignore[attr-defined]  # the list would grow by a kilobyte per member
        if not member.isreg() or member.issparse():
            continue
        key, extension = base_plus_ext(member.name)
        if key is None or member.name.startswith("__"):  # WebDataset's own metadata
            continue
        if member.offset_data + member.size > tar.offset:  # an extended header said so, where the next member begins
            raise DataError(f"{path}: is damaged at byte {member.offset}; fetch or write it anew")
        found.append((key, extension.lower(), member.offset_data, member.size))
    return found


def _check_end(tar: tarfile.TarFile, path: Path | str) -> None:
    """Check that the file ends with the end mark and the zeros that fill up a record.

    ``tarfile`` takes a damaged header, a file cut between two members, and a block of zeros for the end.
    """
    file, mark = tar.fileobj, tar.offset
    assert file is not None
    file.seek(mark)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"{path}: is truncated or damaged at byte {mark}; fetch or write it anew")
    position = mark + _BLOCK
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            raise DataError(
                f"{path}: goes on at byte {position + len(chunk) - len(rest)}, behind its end mark at byte {mark}, as "
                "archives do that were joined with cat: unpack it with `tar --ignore-zeros -xf` and pack the files "
                "anew, or list the archives one by one"
            )
        position += len(chunk)
        if position - mark > _MOST_PADDING:
            raise DataError(
                f"{path}: has nothing but zeros from byte {mark} on, as a download leaves that was cut short; "
                "fetch or write it anew"
            )


def _group(members: list[tuple[str, str, int, int]], path: Path | str) -> list[TarSample]:
    """The samples that members make: those with one key that follow each other."""
    samples: list[TarSample] = []
    last: dict[str, set[str]] = {}  # for each key the extensions of its sample
    for key, run in groupby(members, key=itemgetter(0)):
        parts: dict[str, tuple[int, int]] = {}
        refused: list[str] = []
        problem = None
        for _, extension, offset, size in run:
            if is_pickled(extension):
                refused.append(extension)
            elif extension in parts:
                problem = f"has two members .{extension}"
            parts.setdefault(extension, (offset, size))
        names = set(parts)
        if names.isdisjoint(last.setdefault(key, names)):  # else a sample of its own, under a key that is not unique
            what = one_line(f"{path}: {key}.{min(names)} lies apart from {key}.{min(last[key])}")
            raise DataError(
                f"{what}, so that one sample would be two; pack the files sorted by name "
                "(`tar --sort=name -cf SHARD.tar FOLDER`)"
            )
        for extension in refused:
            parts.pop(extension, None)
        if not parts:
            problem = f"has no usable member: .{', .'.join(refused)} could run code and is never read"
        samples.append(TarSample(key, parts, problem))
    return samples


def sample_id(shard: str, key: str) -> int:
    """A 63-bit number for a sample, the same wherever its shard lies."""
    name = f"{shard}/{key}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def read(file: int, sample: TarSample, shard: str) -> Sample:
    """Read the bytes of one sample from an open file descriptor.

    Args:
        file: descriptor of the shard; its own position is neither used nor moved, so processes may share it.
        sample: an entry of the shard's :func:`scan`.
        shard: the shard's file name.

    Raises:
        DataError: the file is shorter than it was when it was scanned.
    """
    members = {}
    for extension, (offset, size) in sample.members.items():
        data = os.pread(file, size, offset)
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.pread(file, size - len(data), offset + len(data))
            if not more:
                raise DataError(f"{shard}: ended inside {sample.key}.{extension}; was it replaced while it was read?")
            data += more
        members[extension] = data
    return Sample(key=sample.key, shard=shard, id=sample_id(shard, sample.key), members=members)
