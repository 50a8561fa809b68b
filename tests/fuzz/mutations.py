"""What the fuzz tests break things with: mutations of bytes, tar files, trees, texts and safetensors files.

Every case draws from a generator of its own, seeded by its target and number, so that one can be repeated alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = tarfile.BLOCKSIZE
Rng = np.random.Generator


def generator(target: str, case: int) -> Rng:
    return np.random.default_rng([*target.encode(), case])


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


# Mutations of bytes.


def flip(rng: Rng, data: bytes) -> bytes:
    found = bytearray(data)
    for place in rng.integers(len(found), size=int(rng.integers(1, 20))) if found else ():
        found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def overwrite(rng: Rng, data: bytes) -> bytes:
    start = int(rng.integers(len(data) + 1))
    new = rng.bytes(int(rng.integers(1, 64)))
    return data[:start] + new + data[start + len(new) :]


def truncate(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def extend(rng: Rng, data: bytes) -> bytes:
    return data + pick(rng, (rng.bytes(700), bytes(int(rng.integers(2000))), data))


def splice(rng: Rng, data: bytes) -> bytes:
    """A part twice, or not at all."""
    start, end = sorted(rng.integers(len(data) + 1, size=2).tolist())
    return pick(rng, (data[:end] + data[start:], data[:start] + data[end:]))


BYTES = (flip, overwrite, truncate, extend, splice)


@dataclass
class Evil:
    """Content that does something where a reader executes it: it makes the file ``sentinel``."""

    sentinel: Path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (self.command,)

    @property
    def command(self) -> str:
        return f"touch {self.sentinel}"

    def pickled(self) -> bytes:
        return pickle.dumps(self)

    def npy(self) -> bytes:
        file = io.BytesIO()
        np.save(file, np.array([self], dtype=object), allow_pickle=True)
        return file.getvalue()

    def contents(self, rng: Rng) -> bytes:
        """Something else than the format that is expected."""
        return pick(rng, (
            b"", b"\0", rng.bytes(300), self.pickled(), self.npy(), b"PK\3\4" + rng.bytes(60),
            b"\x1f\x8b\x08" + rng.bytes(60),
            b"#!/bin/sh\n" + self.command.encode(), b"<html>not found</html>", b"\x7fELF" + rng.bytes(60),
            b"\x89PNG\r\n\x1a\n" + rng.bytes(60), b"fLaC" + rng.bytes(60), b"RIFF\xff\xff\xff\xffWAVE" + rng.bytes(60),
            b"D2VT\1\2\0\0\xff\xff\xff\xff", b"99999999999999999999", b"-1", "\u0663".encode(), b"\xff\xfe7",
            b"9" * 5000,
        ))  # fmt: skip

    def names(self, rng: Rng, extension: str) -> str:
        """Names that would leave a folder, or that a careless reader would execute or unpickle."""
        return pick(rng, (
            f"../../out.{extension}", f"{self.sentinel}.{extension}", f"/etc/out.{extension}",
            f"a/../../../b.{extension}",
            f"..{extension}", ".", "..", "", f".{extension}", f"__k__.{extension}", f"pipe:{self.command}.{extension}",
            f"0.{extension}", "0.pyd", "0.pickle", "0.input.pth", "0.PKL", f"0.{extension}.pt",
            f"a\nb\x1b[31m.{extension}",
            f"{'long' * 80}/{'x' * 90}.{extension}", f"\ud800\udcff.{extension}", f"é.{extension}", f"CON.{extension}",
            f"0.{extension.upper()}", f"0.{extension}.{extension}", f"a\0b.{extension}",
        ))  # fmt: skip


# Mutations of tar files.


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


def headers(rng: Rng, data: bytes, evil: Evil) -> bytes:
    """One field of a header is another, and the checksum right again."""
    starts = [start for start in range(0, len(data) - BLOCK + 1, BLOCK) if data[start + 257 : start + 262] == b"ustar"]
    if not starts:
        return flip(rng, data)
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


def members(rng: Rng, data: bytes, evil: Evil) -> bytes:
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
                        content = pick(rng, BYTES)(rng, content)
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


# Mutations of trees (JSON, YAML) and of text.

_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e-300, 0.5, float("nan"), float("inf"))
_TEXTS = ("", " ", "..", "../../evil.tar", "/etc/passwd", "a/b.tar", "a\\b.tar", "\0", "\n", "\ud800", "é", "x" * 5000,
          "${HOME}", "${oc.env:HOME}", "~", "null", "NaN", "pipe:true", "{0..9}", "%s%n", "1e999", "__class__",
          "???")  # fmt: skip


def nested(rng: Rng) -> Any:
    value: Any = []
    for _ in range(int(rng.integers(1, 100))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def any_value(rng: Rng) -> Any:
    match int(rng.integers(5)):
        case 0 | 1:
            return pick(rng, _NUMBERS)
        case 2 | 3:
            return pick(rng, _TEXTS)
        case _:
            return pick(rng, (None, True, False, [], {}, [[]], {"": 0}, [1, "a"], [0] * 1000, nested(rng)))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(*path, key) for key, _ in items] + [place for key, value in items for place in places(value, (*path, key))]


def change(rng: Rng, tree: Any) -> Any:
    """A copy of a tree of plain values with one place changed, missing, added or twice."""
    tree = json.loads(json.dumps(tree))
    found = places(tree)
    if not found:
        return any_value(rng)
    *path, last = pick(rng, found)
    parent = tree
    for key in path:
        parent = parent[key]
    match int(rng.integers(8)):
        case 0:
            del parent[last]
        case 1 if isinstance(parent, dict):
            parent[str(pick(rng, _TEXTS))] = any_value(rng)
        case 1:
            parent.append(parent[last])
        case 2 if isinstance(parent[last], int):
            parent[last] += int(rng.integers(-2, 3))
        case 3:
            other = tree
            for key in pick(rng, found):
                other = other[key]
            parent[last] = json.loads(json.dumps(other))
        case _:
            parent[last] = any_value(rng)
    return tree


INDEX_TOKENS = ("NaN", "-1", "1e999", "null", "true", "[" * 50_000, '{"a":' * 50_000, "9" * 5_000,
                "9" * 4_200, '"..\\u0000"',
                '"../../a.tar"', "\ufeff", "//", '"\\ud800.tar"', ",", "}", "{}",
                "[]", '"/etc/a.tar"', "0x10")  # fmt: skip

YAML_TOKENS = (
    '!!python/object/apply:os.system ["touch SENTINEL"]', "!!python/name:os.system", "!!python/module:os",
    "!include /etc/passwd",
    "!!binary aGVsbG8=", "!!set {a}", "!!timestamp 2001-01-01", "&a [1]", "*a", "<<: *a", "${oc.env:HOME}", "${name}",
    "$(touch SENTINEL)",
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! tag:a,2000:\n",
    "? [a]\n: b\n", "[" * 3000,
    "{a: " * 3000, "- " * 3000, "\t", "\0", "\x1b", "\ud800", "\ufeff", "'", '"\\ud800"', '"\\x00"', "null", "~",
    "on", "1e5", "1e400",
    "-1", "0", ".nan", "-.inf", "9" * 5000, "0x10", "0o17", "1_000", "12:30:45", "2001-01-01", "[1, [2, [3]]]",
    "{a: 1}", "|\n  x", ">-\n x",
    "pipe:touch SENTINEL", "../../x", "???", "core: {}\n", "testing: {}\n", "os: {}\n", "vision: {}\n",
    "text: null\n", "modalities: {}\n",
    "__class__: 1\n", "1: 2\n", "null: 3\n", "x.y: 1\n", "vision.mask: 1\n", "1000000000", "18446744073709551616",
)  # fmt: skip


def text_mutation(rng: Rng, text: str, tokens: Sequence[str]) -> str:
    """Lines and characters missing, twice or in another place, and tokens that mean something."""
    for _ in range(int(rng.integers(1, 4))):
        lines = text.split("\n")
        first, second = rng.integers(len(lines), size=2).tolist()
        place = int(rng.integers(len(text) + 1))
        match int(rng.integers(6)):
            case 0:
                del lines[first]
                text = "\n".join(lines)
            case 1:
                lines.insert(first, lines[second])
                text = "\n".join(lines)
            case 2:
                text = text[:place] + pick(rng, tokens) + text[place:]
            case 3:
                name, colon, _ = lines[first].partition(":")
                lines[first] = f"{name}{colon} {pick(rng, tokens)}"
                text = "\n".join(lines)
            case 4:
                text = text[:place] + chr(int(rng.integers(1, 0x300))) + text[place + 1 :]
            case _:
                text = text[: int(rng.integers(len(text) + 1))] if rng.random() < 0.3 else pick(rng, tokens) + text
    return text


# Mutations of safetensors files.


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(header: Any, payload: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def safetensors(rng: Rng, data: bytes, evil: Evil) -> bytes:
    """The file with another header, another content, or as another format."""
    header, payload = unpack(data)
    names = [name for name in header if name != "__metadata__"]
    match int(rng.integers(10)):
        case 0:
            return pick(rng, BYTES)(rng, data)
        case 1:
            return evil.contents(rng)
        case 2:
            return pack(header, payload, pick(rng, (0, 1, 2**31, 2**63, len(data), len(data) * 2)))
        case 3:
            return pack(change(rng, header), payload)
        case 4:
            shapes = json.loads(header.get("__metadata__", {}).get("shapes", "{}"))
            header["__metadata__"] = {"shapes": json.dumps(change(rng, shapes or {names[0]: [1]}))}
        case 5:
            header["__metadata__"] = {"shapes": pick(rng, (
                "", "[]", "null", "{", '{"a": NaN}', '{"a": [Infinity]}', '{"a": [1e999]}',
                '{"a": [-1, -1]}', "[" * 5000,
                json.dumps({names[0]: [2**70, 0]}), json.dumps({names[0].partition("@")[0]: [-1, -1]}),
            ))}  # fmt: skip
        case 6:
            name = pick(rng, names)
            stem, _, start = name.partition("@")
            number = int(start or 0) + int(rng.integers(-3, 4))
            new = pick(rng, (f"{stem}@{number}", f"{stem}@", f"{stem}@-1", f"{stem}@{10**30}", f"{stem}@x",
                             f"@{number}",
                             f"{stem}@0@0", f"{stem}@ {number}", f"{stem}@{number:_}", stem, "../../evil",
                             ""))  # fmt: skip
            header[new] = header.pop(name)
        case 7:
            header[pick(rng, names)]["dtype"] = pick(rng, ("F32", "I32", "U32", "F64", "BF16", "BOOL", "F8_E4M3", "X"))
        case 8:
            first, second = pick(rng, names), pick(rng, names)
            header[first], header[second] = header[second], header[first]
        case _:
            header.pop(pick(rng, names))
    return pack(header, payload)
