"""Mutations of tar files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data2vec.core.testing import load_module

mutations = load_module("fuzz_mutations", Path(__file__).with_name("mutations.py"))
Rng = np.random.Generator
pick = mutations.pick
BLOCK = tarfile.BLOCKSIZE


def blocks(rng: Rng, data: bytes) -> bytes:
    """Blocks twice, in another place, missing, or empty."""
    parts = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    for _ in range(int(rng.integers(1, 4))):
        if len(parts) < 2:
            break
        first, second = rng.integers(len(parts), size=2).tolist()
        match int(rng.integers(4)):
            case 0:
                parts.insert(first, parts[second])
            case 1:
                parts[first], parts[second] = parts[second], parts[first]
            case 2:
                del parts[first]
            case _:
                parts[first] = bytes(len(parts[first]))
    return b"".join(parts)


_FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
           "linkname": (157, 100), "magic": (257, 8), "devmajor": (329, 8), "prefix": (345, 155), "sparse": (386, 100),
           "extended": (482, 13)}  # fmt: skip
_SIZES = (b"00000000000\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" + b"\0" * 11,
          b"-0000000001\0",
          b"\x80\0\0\0\0\0\0\xff\0\0\0\0", b"zzz", b"00000001000\0",
          b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\0")  # fmt: skip
_TYPES = [bytes([code]) for code in b"0\x001234567SLKgxXDMNVAZ\xff"]


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + f"{sum(blank):06o}\0 ".encode() + header[156:]


def headers(rng: Rng, data: bytes, evil: Any) -> bytes:
    """One field of a header is another, and the checksum right again."""
    starts = [start for start in range(0, len(data) - BLOCK + 1, BLOCK) if data[start + 257 : start + 262] == b"ustar"]
    if not starts:
        return mutations.flip(rng, data)
    start = pick(rng, starts)
    header = bytearray(data[start : start + BLOCK])
    for _ in range(int(rng.integers(1, 3))):
        name = pick(rng, (*_FIELDS, "size", "type", "name"))
        place, length = _FIELDS[name]
        match name:
            case "size":
                new = pick(rng, _SIZES)
            case "type":
                new = pick(rng, _TYPES)
            case "name" | "linkname" | "prefix":
                new = evil.names(rng, pick(rng, ("png", "cls", "txt"))).encode("utf-8", "surrogatepass")
            case _:
                new = rng.bytes(length)
        header[place : place + length] = new[:length].ljust(length, b"\0")
    return data[:start] + with_checksum(bytes(header)) + data[start + BLOCK :]


def raw_member(kind: bytes, content: bytes, size: int | None = None, name: str = "././@LongLink") -> bytes:
    """A member as no library writes it."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = kind
    if size is not None:
        header[124:136] = (
            b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + (256**11 + size).to_bytes(11, "big")
        )
    return with_checksum(bytes(header)) + content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")


_RECORDS = ("path=../../evil.png", "path=/tmp/evil.png", "path=", "size=-1", "size=1e3", "size=99999999999999999999",
            "size=0", "hdrcharset=BINARY", "linkpath=/etc/passwd", "GNU.sparse.major=1", "GNU.sparse.minor=0",
            "GNU.sparse.map=0,1,2", "GNU.sparse.map=x", "GNU.sparse.size=-5", "GNU.sparse.offset=x",
            "GNU.sparse.numbytes=1", "GNU.sparse.realsize=99999999999999", "GNU.sparse.name=../x.png", "mtime=nan",
            "uid=x", "comment=" + "9" * 900)  # fmt: skip


def record(text: str) -> bytes:
    length = len(text) + 3
    while len(f"{length} {text}\n") != length:
        length += 1
    return f"{length} {text}\n".encode()


def extended(rng: Rng, data: bytes) -> bytes:
    """Headers that describe the member after them, or all that follow."""
    match int(rng.integers(6)):
        case 0:
            new = raw_member(pick(rng, (b"x", b"g", b"X")), b"".join(
                record(pick(rng, _RECORDS)) for _ in range(int(rng.integers(1, 5)))
            ))  # fmt: skip
        case 1:
            new = raw_member(pick(rng, (b"L", b"K")), b"../../" * int(rng.integers(1, 200)) + b"evil.png\0")
        case 2:
            new = raw_member(pick(rng, (b"L", b"K", b"x")), b"a.png\0") * int(rng.integers(1, 1500))
        case 3:
            new = raw_member(pick(rng, (b"L", b"x", b"g", b"S")), b"0", pick(rng, (-1, -512, 2**40, 2**62, 0)))
        case 4:
            new = raw_member(pick(rng, (b"x", b"g")), b"1" * int(rng.integers(100, 100_000)))
        case _:
            new = raw_member(pick(rng, _TYPES), rng.bytes(int(rng.integers(600))))
    place = int(rng.integers(len(data) // BLOCK + 1)) * BLOCK
    return data[:place] + new + data[place:]


def members(rng: Rng, data: bytes, evil: Any) -> bytes:
    """The tar written anew, with other names, contents or kinds of some members."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(info, tar.extractfile(info).read()) for info in tar.getmembers() if info.isreg()]  # type: ignore[union-attr]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=pick(rng, (0, 1, 2)), errors="surrogateescape") as tar:
        for info, content in found:
            if rng.random() < 0.3:
                extension = info.name.rpartition(".")[2]
                match int(rng.integers(4)):
                    case 0:
                        info.name = evil.names(rng, extension)
                    case 1:
                        content = evil.contents(rng)
                    case 2:
                        content = pick(rng, mutations.BYTES)(rng, content)
                    case _:
                        info.type = pick(rng, _TYPES)
                        info.linkname = evil.names(rng, extension)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except (ValueError, OSError):  # a name that this format cannot hold
                info.name, info.linkname = f"other.{len(content)}", ""
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# What other programs and habits make of a set, mistakes rather than damage.


def contents_of(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar.getmembers() if info.isreg()]  # type: ignore[union-attr]


def packed(contents: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def second_archive(rng: Rng, data: bytes) -> bytes:
    """Another archive, or a part of one, behind the end mark, whose zeros are all there or not."""
    end = len(data.rstrip(b"\0"))
    end += -end % BLOCK
    second = pick(rng, (data, packed(contents_of(data)[:1]), data[:BLOCK], b"\1", bytes(3 << 20)))
    return data[:end] + bytes(BLOCK * int(rng.integers(1, 24))) + second


def dotted(rng: Rng, data: bytes) -> bytes:
    """Names with a dot more: frames of a clip under one key, or members with two endings."""
    stem = pick(rng, ("clip.", "a/clip.", "", "v1.0/"))
    middle = pick(rng, ("", ".input", ".0", "." * 3))
    found = []
    for name, content in contents_of(data):
        key, _, extension = name.partition(".")
        found.append((f"{stem}{key}{middle}.{extension}", content))
        if rng.random() < 0.2:
            found.append((f"{stem}{key}.target.{extension}", content))
    return packed(found)


def apart(rng: Rng, data: bytes) -> bytes:
    """Members in another order: by their endings, or any."""
    found = contents_of(data)
    if rng.random() < 0.5:
        return packed(sorted(found, key=lambda one: one[0].partition(".")[2]))
    return packed([found[number] for number in rng.permutation(len(found))])


HABITS = (second_archive, dotted, apart)
