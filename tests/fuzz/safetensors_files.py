"""Mutations of safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data2vec.core.testing import load_module

mutations = load_module("fuzz_mutations", Path(__file__).with_name("mutations.py"))
Rng = np.random.Generator
pick = mutations.pick


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(header: Any, payload: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def safetensors(rng: Rng, data: bytes, evil: Any) -> bytes:
    """The file with another header, another content, or as another format."""
    header, payload = unpack(data)
    names = [name for name in header if name != "__metadata__"]
    match int(rng.integers(10)):
        case 0:
            return pick(rng, mutations.BYTES)(rng, data)
        case 1:
            return evil.contents(rng)
        case 2:
            return pack(header, payload, pick(rng, (0, 1, 2**31, 2**63, len(data), len(data) * 2)))
        case 3:
            return pack(mutations.change(rng, header), payload)
        case 4:
            shapes = json.loads(header.get("__metadata__", {}).get("shapes", "{}"))
            header["__metadata__"] = {"shapes": json.dumps(mutations.change(rng, shapes or {names[0]: [1]}))}
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
