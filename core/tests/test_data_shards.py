"""Sets of shards: writing, the index, verification."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.data.shards import checking
from data2vec.core.data.shards import writer as writer_module
from data2vec.core.data.shards.checking import index_folder, verify
from data2vec.core.data.shards.index import INDEX_NAME, ShardIndex
from data2vec.core.data.shards.writer import ShardFile, ShardWriter
from data2vec.core.errors import DataError, SampleError


def write_set(folder: Path, prefix: str = "train", samples: int = 10, **settings: object) -> ShardIndex:
    with ShardWriter(folder, prefix, "toy", samples_per_shard=4, **settings) as writer:
        for i in range(samples):
            writer.write(f"{i:03d}", {"txt": str(i).encode()})
    assert writer.index is not None
    return writer.index


def test_index_counts_what_was_written(tmp_path: Path) -> None:
    index = write_set(tmp_path, class_names=("a", "b"))
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("train-000000.tar", 4), ("train-000001.tar", 4), ("train-000002.tar", 2),
    ]  # fmt: skip
    assert index == ShardIndex.load(tmp_path)
    assert (index.samples, index.class_names) == (10, ("a", "b"))
    assert verify(tmp_path) == []
    assert index_folder(tmp_path, "toy", ("a", "b")) == index


def test_lengths_of_samples_are_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(members: Mapping[str, bytes]) -> int:
        if not members["txt"].isdigit():
            raise SampleError("no number")
        return int(members["txt"])

    for module in (writer_module, checking):
        monkeypatch.setattr(module, "measure_of", lambda modality: (measure, "units"))
    index = write_set(tmp_path)
    assert [shard.lengths for shard in index.shards] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert (index.length, index.length_unit) == (45, "units")
    assert ShardIndex.load(tmp_path) == index
    assert verify(tmp_path) == []
    assert index_folder(tmp_path, "toy") == index
    with (
        pytest.raises(SampleError, match="no number"),
        ShardWriter(tmp_path / "other", "train", "toy") as writer,
    ):
        writer.write("0", {"txt": b"x"})
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    content["shards"][0]["lengths"] = [0, 6]
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match="2 lengths for 4 samples"):
        ShardIndex.load(tmp_path)


def test_prefixes_share_an_index(tmp_path: Path) -> None:
    write_set(tmp_path, "train", 5)
    index = write_set(tmp_path, "validation", 3)
    assert [shard.name for shard in index.shards] == ["train-000000.tar", "train-000001.tar", "validation-000000.tar"]
    assert verify(tmp_path) == []
    with pytest.raises(DataError, match=r"2 shards train-.* already"):
        write_set(tmp_path, "train", 5)
    assert write_set(tmp_path, "train", 1, overwrite=True).samples == 4
    assert verify(tmp_path) == []
    with pytest.raises(DataError, match="need another folder"):
        write_set(tmp_path, "more", 1, class_names=("x",))
    assert not list(tmp_path.glob("more-*"))


def test_bytes_per_shard_starts_a_new_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "a", "toy", bytes_per_shard=20_000) as writer:
        for i in range(6):
            writer.write(str(i), {"bin": bytes(9_000)})
    assert [shard.samples for shard in ShardIndex.load(tmp_path).shards] == [3, 3]


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: ShardWriter) -> None:
        writer.write("0", {"txt": b""})
        writer.write("1", {"txt": b""})
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, "a", "toy", samples_per_shard=1) as writer:
        fail(writer)
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample was written"), ShardWriter(tmp_path, "a", "toy"):
        pass


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be written .*free some space"):
        write_set(tmp_path, samples=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "extension"),
    [("a.b", "jpg"), ("../a", "jpg"), ("/a", "jpg"), ("__a", "jpg"), ("", "jpg"), ("a\nb", "jpg"), ("a\x00", "jpg"),
     ("a", "JPG"), ("a", ""), ("a", "_x"), ("a", "b/c"), ("a", "pyd"), ("a", "input.pth"), ("a", "pickle")],
)  # fmt: skip
def test_what_would_not_read_back_is_refused(tmp_path: Path, key: str, extension: str) -> None:
    shard = ShardFile(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: sample"):
        shard.write(key, {extension: b""})
    shard.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_written_once(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "a.tar")
    shard.write("a", {"jpg": b""})
    with pytest.raises(DataError, match="has it already"):
        shard.write("a", {"png": b""})
    shard.discard()


def test_verify_names_every_kind_of_damage(tmp_path: Path) -> None:
    write_set(tmp_path, samples=20)
    flipped, cut, gone, kept = (tmp_path / f"train-{i:06d}.tar" for i in range(4))
    content = bytearray(flipped.read_bytes())
    content[512] ^= 1
    flipped.write_bytes(content)
    os.truncate(cut, 1500)
    gone.unlink()
    (tmp_path / "other.tar").write_bytes(kept.read_bytes())
    problems = verify(tmp_path)
    assert len(problems) == 4
    for path, words in [(flipped, "sha256 is"), (cut, "truncated"), (gone, "is missing"), ("other.tar", "is not in")]:
        assert sum(str(path) in line and words in line for line in problems) == 1


def valid_table() -> dict:
    shard = {"name": "a.tar", "samples": 1, "bytes": 1024, "sha256": "0" * 64}
    return {"format": 1, "modality": "toy", "classes": [], "totals": {"samples": 1, "bytes": 1024}, "shards": [shard]}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "format=2 is unknown"), ({"format": True}, "format='True' is no int"), ({"modality": 3}, "no str"),
     ({"shards": {}}, "shards='{}' is no list"), ({"classes": [1]}, r"classes\[0\]"), ({"totals": None}, "no dict"),
     ({"totals": {"samples": 9, "bytes": 1024}}, "totals.samples=9"), ({"shards": [3]}, r"shards\[0\]='3' is no dict")],
)  # fmt: skip
def test_bad_index_is_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"here: .*{message}"):
        ShardIndex.parse(json.dumps({**valid_table(), **change}).encode(), "here")


@pytest.mark.parametrize(
    "change",
    [{"name": "../a.tar"}, {"name": "/etc/a.tar"}, {"name": ".."}, {"name": "b/a.tar"}, {"name": "a\\b.tar"},
     {"samples": -1}, {"samples": 0}, {"bytes": -5}, {"samples": 1.5}, {"sha256": "xyz"}, {"name": None}],
)  # fmt: skip
def test_bad_entry_is_refused(change: dict) -> None:
    table = valid_table()
    table["shards"][0].update(change)
    with pytest.raises(DataError, match=r"here: shards\[0\]"):
        ShardIndex.parse(json.dumps(table).encode(), "here")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(valid_table())), inner),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*valid_table(), "name", "samples", "bytes", "sha256"]), json_values)
def test_any_json_is_an_index_or_one_error(name: str, value: object) -> None:
    table = valid_table()
    (table if name in table else table["shards"][0])[name] = value
    try:
        index = ShardIndex.parse(json.dumps(table).encode(), "here")
    except DataError as error:
        message = str(error)
    else:
        message = "here: "
        assert index.samples == sum(shard.samples for shard in index.shards)
    assert message.startswith("here: ")


def test_missing_and_broken_index_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.load(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"\xff{")
    with pytest.raises(DataError, match="is not JSON"):
        ShardIndex.load(tmp_path)
    with pytest.raises(DataError, match="is not JSON"):
        ShardIndex.parse(b"[" * 100_000, "here")
