"""What the fuzz test breaks things with: mutations of bytes, tar files, trees and texts, and a guard around each case.

Every case draws from a generator of its own, seeded by its target and number, so that one can be repeated alone.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from data2vec.core.errors import Data2VecError

SECONDS = 10.0  # of one case; each takes milliseconds
MEMORY = 1 << 30  # bytes by which one case may raise the peak of this process
BLOCK = tarfile.BLOCKSIZE
Rng = np.random.Generator


def generator(target: str, case: int) -> Rng:
    return np.random.default_rng([*target.encode(), case])


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


# What must not happen.


class TooSlow(BaseException):
    """No library swallows it."""


_EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "pty.spawn", "socket.connect", "os.startfile", "webbrowser.open")  # fmt: skip
_WRITES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.chmod": 1,
           "os.truncate": 1, "shutil.rmtree": 1}  # fmt: skip
_watching: list[Watch] = []


@dataclass
class Watch:
    """Records what this process executes, and what it writes outside of ``inside``."""

    inside: Path
    found: list[str] = field(default_factory=list)

    def saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EXECUTES:
            self.found.append(f"{event}{arguments!r}"[:300])
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                paths = (path,)
        elif event in _WRITES:
            paths = arguments[: _WRITES[event]]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.fsdecode(path))
                if not place.startswith((f"{self.inside}/", "/dev/", "/proc/")) and not place.endswith(".pyc"):
                    self.found.append(f"{event}: {place}"[:300])


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        watch = _watching[-1]
        _watching.clear()  # what the watch itself does is no event
        try:
            watch.saw(event, arguments)
        finally:
            _watching.append(watch)


sys.addaudithook(_audit)


@contextmanager
def watched(inside: Path) -> Iterator[Watch]:
    watch = Watch(inside.resolve())
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Outcome:
    """``value``: what the case gave; ``error``: the one clear error that it ended with."""

    value: Any = None
    error: Data2VecError | None = None


def guarded(run: Callable[[], Any], inside: Path, kinds: tuple[type[Data2VecError], ...]) -> Outcome:
    """Run one case: it ends in time with a value or with one of ``kinds``, executes nothing and writes only inside."""
    before = peak()
    previous = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where no signal is handled
    try:
        with watched(inside) as watch:
            try:
                outcome = Outcome(value=run())
            except kinds as error:
                outcome = Outcome(error=error)
    except TooSlow as error:
        raise AssertionError(f"took more than {SECONDS:g} s") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert not watch.found, watch.found
    assert peak() - before < MEMORY, f"took {(peak() - before) >> 20} MiB"
    if outcome.error is not None:
        check_message(str(outcome.error))
    return outcome


def check_message(message: str) -> None:
    """It names what is wrong in a few lines, and is not what a library printed about itself."""
    assert len(message.strip()) >= 20, repr(message)
    assert len(message) < 20_000, message[:500]
    assert "Traceback" not in message
    assert " object at 0x" not in message, message
    assert re.search(r"[:='/]|\w[._]\w", message), message


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
