"""What the fuzz tests break things with: mutations of bytes, trees and texts, and content that does something.

Every case draws from a generator of its own, seeded by its target and number, so that one can be repeated alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
