"""Mutated shards, indexes and lists of shards: a counted skip or one clear error, and nothing else happens."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.checking import index_folder, verify
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.errors import DataError
from data2vec.core.testing import load_module

HERE = Path(__file__).parent
guard = load_module("fuzz_guard", HERE / "guard.py")
mutations = load_module("fuzz_mutations", HERE / "mutations.py")
tars = load_module("fuzz_tars", HERE / "tars.py")
material = load_module("fuzz_material", HERE / "material.py")

Rng = np.random.Generator
Place = material.Place
pick, read_all, experiment_of, put, fuzz = (
    material.pick, material.read_all, material.experiment_of, material.put, material.fuzz
)  # fmt: skip
MODALITIES, SAMPLES, BLOCK = material.MODALITIES, material.SAMPLES, tars.BLOCK


def mutate_shard(rng: Rng, data: bytes, evil: Any) -> bytes:
    valid = data
    for _ in range(int(rng.choice((1, 1, 1, 2, 3)))):
        match int(rng.integers(8)):
            case 0:
                data = pick(rng, mutations.BYTES)(rng, data)
            case 1:
                data = tars.blocks(rng, data)
            case 2 | 3:
                data = tars.headers(rng, data, evil)
            case 4:
                data = tars.extended(rng, data)
            case 5 | 6 if data is valid:  # the library that writes them anew can loop for ever on others
                data = tars.members(rng, data, evil)
            case 7 if data is valid and rng.random() < 0.5:
                data = pick(rng, tars.HABITS)(rng, data)
            case _:
                data = pick(rng, (gzip.compress(data), evil.contents(rng), mutations.flip(rng, data)))
    return data


def test_shards(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    def case(rng: Rng) -> Any:
        place.fresh()
        modality = pick(rng, MODALITIES)
        mutated = mutate_shard(rng, shards[modality], place.evil)
        good, bad = place.shards / "train-000000.tar", place.shards / "train-000001.tar"
        good.write_bytes(shards[modality])
        way = int(rng.integers(4))
        if way == 0:  # the index is of what was there before
            bad.write_bytes(shards[modality])
            index_folder(place.shards, modality)
        put(rng, bad, mutated, place.evil)
        accepts = rng.random() < 0.8  # any number of samples that their headers show to be of no use

        def run() -> tuple[int, int]:
            if way == 1:
                index_folder(place.shards, modality)
                assert all(map(str.isprintable, verify(place.shards)))
            spec = bad if way == 3 else place.shards
            experiment = experiment_of(modality).replace(data={"max_broken": (0.01, 1.0)[accepts]})
            return read_all(str(spec), experiment, place.run)

        return guard.guarded(run, place.run, (DataError,))

    outcomes = fuzz(request, "shards", place, case)
    if len(outcomes) >= 100:  # mutations go neither all too far nor nowhere
        read = [outcome.value for outcome in outcomes if outcome.value]
        assert 0.15 < len(read) / len(outcomes) < 0.9
        assert sum(broken > 0 for _, broken in read) > len(outcomes) // 20


def test_habits(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    """What is no damage but a mistake: refused, or every key is read or counted as broken."""

    def case(rng: Rng) -> Any:
        place.fresh()
        modality, habit = pick(rng, MODALITIES), pick(rng, tars.HABITS)
        path = place.shards / "train-000000.tar"
        path.write_bytes(habit(rng, shards[modality]))
        names = [name for name, _ in tars.contents_of(path.read_bytes())]
        keys = {"/".join([*folders, last.partition(".")[0]]) for *folders, last in (name.split("/") for name in names)}

        def run() -> tuple[int, int]:
            return read_all(str(path), experiment_of(modality).replace(data={"max_broken": 1.0}), place.run)

        outcome = guard.guarded(run, place.run, (DataError,))
        if outcome.error is None:
            assert habit is not tars.second_archive
            assert sum(outcome.value) == len(keys)
        with contextlib.suppress(DataError):
            index_folder(place.shards, modality)
            assert outcome.error is None
            assert len([line for line in verify(place.shards) if "could be its" in line]) <= outcome.value[1]
        return outcome

    outcomes = fuzz(request, "habits", place, case)
    assert any(outcome.error for outcome in outcomes)
    assert any(outcome.value for outcome in outcomes)


# Indexes.


FOREIGN = (
    {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "train-000000.tar", "nsamples": 6}]},
    {"shards": ["train-000000.tar"], "format": "mds", "version": 2}, {}, [], None, "index", {"modality": "vision"},
)  # fmt: skip


def test_indexes(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    texts = {}
    for modality in MODALITIES:
        place.fresh()
        for number in range(2):
            (place.shards / f"train-{number:06d}.tar").write_bytes(shards[modality])
        index_folder(place.shards, modality, ["one", "two", "three"])
        texts[modality] = (place.shards / "index.json").read_text()

    def case(rng: Rng) -> Any:
        place.fresh()
        modality = pick(rng, MODALITIES)
        text = texts[modality]
        if rng.random() < 0.1:  # another program's
            changed = json.dumps(pick(rng, FOREIGN) if rng.random() < 0.5 else mutations.any_value(rng)).encode()
        elif rng.random() < 0.4:
            changed = text_of(rng, text)
        else:
            content = json.loads(text)
            for _ in range(int(rng.choice((1, 1, 2, 3)))):
                content = mutations.change(rng, content)
            if rng.random() < 0.7 and isinstance(content, dict):
                agree(content)
            changed = json.dumps(content).encode()
        for number in range(2):
            (place.shards / f"train-{number:06d}.tar").write_bytes(shards[modality])
        put(rng, place.shards / "index.json", changed, place.evil)

        def run() -> Any:
            experiment = experiment_of(modality)
            verify(place.shards)
            found = read_all(str(place.shards), experiment, place.run)
            data = TrainData.open(
                str(place.shards), experiment.modalities[modality], data=experiment.data, seed=0, cache=place.run
            )
            for part in data.hold_out(0.3):
                assert part.total
            if modality == "speech":
                next(data.length_batches(0, 9_000))
            return found

        def parse() -> Any:
            index = ShardIndex.parse(changed, "index.json")
            assert index.samples * 512 <= index.size
            return index

        guard.guarded(parse, place.run, (DataError,))
        return guard.guarded(run, place.run, (DataError,))

    outcomes = fuzz(request, "indexes", place, case)
    assert any(outcome.value for outcome in outcomes) or len(outcomes) < 100


def text_of(rng: Rng, text: str) -> bytes:
    if rng.random() < 0.5:
        return pick(rng, mutations.BYTES)(rng, text.encode())  # type: ignore[no-any-return]
    return mutations.text_mutation(rng, text, mutations.INDEX_TOKENS).encode("utf-8", "surrogatepass")


def agree(content: dict[str, Any]) -> None:
    """Make the totals those of the shards, so that more than their check is reached."""
    with contextlib.suppress(TypeError, KeyError, AttributeError, OverflowError):
        content["totals"] = {
            "samples": sum(entry["samples"] for entry in content["shards"]),
            "bytes": sum(entry["bytes"] for entry in content["shards"]),
            "length": sum(sum(entry.get("lengths", ())) for entry in content["shards"]),
        }


# What data.train may say.

SPEC_PARTS = (
    "pipe:touch SENTINEL", "pipe: touch SENTINEL", "s3://bucket/a.tar", "file:///etc/passwd", "file:a.tar",
    "ssh://host/a.tar",
    "gs://b/a", "ftp://host/a", "data:,x", "http://", "http://[", "http://[::1", "http://127.0.0.1:1/a.tar",
    "http://127.0.0.1:x/a.tar",
    "http://127.0.0.1:99999/a.tar", "http://a b/c.tar", "http://127.0.0.1:1/\n.tar", "https://\0/a",
    "http://127.0.0.1:1", "http:///a.tar",
    "http://\udcff/a.tar", "http://127.0.0.1:1/{0..2}.tar", "http://é\u2100.x/a", "hdfs:a", "SHARDS",
    "SHARDS/train-000000.tar",
    "{0..99999999}", "{0..99999999999999999999}", "{1..9}" * 12, "{a,b}" * 40, "{" * 5000, "{" * 5000 + "}" * 5000,
    "{a,{b,{c,{d,e}}}}",
    "{{0..9999}{0..9999},x}", "{00000000000000000000000000..9999999}", "{" + "9" * 5000 + "..1}", "{a..Z}",
    "{1..3..0}", "{1..3..-1}",
    "{,}", "{}", "${WDS_A}", "${HOME}", "$(touch SENTINEL)", "`touch SENTINEL`", "; touch SENTINEL",
    "| touch SENTINEL", "~", "~nobody/a",
    "~root/*", "*", "?", "[a-", "[!]", "**/*.tar", "SHARDS/*.tar", "SHARDS/*.{tar,json}", "../..", "/", "/dev/null",
    "/dev/zero", "/proc/self/mem",
    "\0", "\n", "\ud800", "\udcff", "x" * 5000, "a/" * 3000, "::", " ", "", "[::]", "\\", "{a\\,b}", "%00",
    "SHARDS/fifo", "SHARDS/loop.tar",
)  # fmt: skip


def test_lists_of_shards(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    parts = [part.replace("SENTINEL", str(place.evil.sentinel)) for part in SPEC_PARTS]
    parts = [part.replace("SHARDS", str(place.shards)) for part in parts]
    (place.shards / "train-000000.tar").write_bytes(shards["text"])
    os.mkfifo(place.shards / "fifo")
    (place.shards / "loop.tar").symlink_to("loop.tar")
    experiment = experiment_of("text")

    def case(rng: Rng) -> Any:
        count = int(rng.choice((1, 1, 1, 2, 3)))
        spec = pick(rng, ("", "::", "/", "")).join(pick(rng, parts) for _ in range(count))
        if rng.random() < 0.2:
            spec = mutations.text_mutation(rng, spec, parts)
        return guard.guarded(lambda: read_all(spec, experiment, place.run), place.run, (DataError,))

    for spec in parts:
        outcome = guard.guarded(lambda spec=spec: read_all(spec, experiment, place.run), place.run, (DataError,))
        assert outcome.error or spec.startswith(str(place.shards)), spec
    fuzz(request, "lists", place, case)


# What was found, each case alone.


FOUND_SHARDS: dict[str, Callable[[bytes], bytes]] = {
    "a header inside a header, 2,000 times": lambda data: tars.raw_member(b"L", b"a.png\0") * 2_000 + data,
    "digits that a pattern reads again and again": lambda data: tars.raw_member(b"x", b"1" * 400_000) + data,
    "an extended header of a negative size": lambda data: tars.raw_member(b"x", b"", -512) + data,
    "an extended header of a tebibyte": lambda data: tars.raw_member(b"g", b"", 2**40) + data,
    "a size that reaches behind the next header": lambda data: (
        tars.raw_member(b"x", tars.record("GNU.sparse.realsize=99999999999999")) + data
    ),
    "a map of holes that goes on behind the end": lambda data: tars.with_checksum(
        tars.raw_member(b"S", b"")[:482] + b"\1" + bytes(29)
    ),
}


@pytest.mark.parametrize("name", FOUND_SHARDS)
def test_found_shards(place: Place, shards: Mapping[str, bytes], name: str) -> None:
    path = place.shards / "a.tar"
    path.write_bytes(FOUND_SHARDS[name](shards["vision"]))
    read = lambda: read_all(str(path), experiment_of("vision"), place.run)  # noqa: E731
    outcome = guard.guarded(read, place.run, (DataError,))
    assert str(path) in str(outcome.error)


@pytest.mark.parametrize("name", ["a.tar", "index.json"])
def test_a_pipe_among_the_shards(place: Place, shards: Mapping[str, bytes], name: str) -> None:
    (place.shards / "b.tar").write_bytes(shards["vision"])
    os.mkfifo(place.shards / name)
    read = lambda: read_all(str(place.shards), experiment_of("vision"), place.run)  # noqa: E731
    outcome = guard.guarded(read, place.run, (DataError,))
    error = str(outcome.error)
    assert error.startswith(f"{place.shards / name}: ")
    assert "is no regular file" in error


def test_broken_samples_at_the_end_are_counted(place: Place, shards: Mapping[str, bytes]) -> None:
    """The last batch has no sample that can be used."""
    data = bytearray(shards["vision"])
    for number in range(4, SAMPLES):
        start = data.index(f"{number:04d}.".encode())
        data[start + BLOCK : start + BLOCK + 8] = bytes(8)
    path = place.shards / "a.tar"
    path.write_bytes(data)
    assert read_all(str(path), experiment_of("vision"), place.run) == (4, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samples": 10**15}, "cannot hold 1000000000000000 samples"),
        ({"samples": 10**15, "bytes": 10**18}, "cannot hold"),
        ({"lengths": [10**30] * SAMPLES}, "has a sample of length 1000"),
    ],
)
def test_found_indexes(place: Place, shards: Mapping[str, bytes], change: dict[str, Any], expected: str) -> None:
    (place.shards / "a.tar").write_bytes(shards["speech"])
    index_folder(place.shards, "speech")
    content = json.loads((place.shards / "index.json").read_text())
    content["shards"][0] |= change
    agree(content)
    with pytest.raises(DataError, match=expected):
        ShardIndex.parse(json.dumps(content).encode(), "index.json")
