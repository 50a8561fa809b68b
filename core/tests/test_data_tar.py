"""Random access to tar shards: round trip of any content, and files that are no good."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.data.shards import ShardFile, ShardWriter
from data2vec.core.data.tar import TarSample, read, sample_id, scan
from data2vec.core.errors import DataError

words = st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="./\\"), min_size=1, max_size=40)
keys = st.lists(words, min_size=1, max_size=4).map("/".join).filter(lambda key: not key.startswith("__"))
members = st.dictionaries(st.sampled_from(["jpg", "cls", "txt", "a.b", "npy"]), st.binary(max_size=2000), min_size=1)


def tar_file(path: Path, contents: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_all(path: Path) -> dict[str, dict[str, bytes]]:
    file = os.open(path, os.O_RDONLY)
    try:
        return {sample.key: dict(read(file, sample, path.name).members) for sample in scan(path)}
    finally:
        os.close(file)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(keys, members, min_size=1, max_size=8))
def test_any_content_and_keys_read_back(tmp_path_factory: pytest.TempPathFactory, samples: dict) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    shard = ShardFile(path)
    for key, parts in samples.items():
        shard.write(key, parts)
    info = shard.finish()
    assert read_all(path) == samples
    assert (info.samples, info.bytes) == (len(samples), path.stat().st_size)


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with ShardWriter(tmp_path, "a", "toy") as writer:
        writer.write("x/1", {"jpg": b"one", "cls": b"3"})
        writer.write("x/2", {"jpg": b""})
    with open(tmp_path / "a-000000.tar", "rb") as file:
        members = [{**member, "__url__": ""} for member in tar_file_iterator(file)]
    samples = [(s["__key__"], s["jpg"], s.get("cls")) for s in group_by_keys(members)]
    assert samples == [("x/1", b"one", b"3"), ("x/2", b"", None)]


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, "train", "toy") as writer:
            writer.write("k", {"png": b"1", "cls": b"2"})
        contents.append((tmp_path / name / "train-000000.tar").read_bytes())
    assert contents[0] == contents[1]


def test_grouping_ignores_links_folders_metadata_and_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d/secret.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in [("__meta__.json", b"{}"), ("noext", b"?"), ("d/a.JPG", b"1"), ("d/a.cls", b"2")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert read_all(path) == {"d/a": {"jpg": b"1", "cls": b"2"}}


def test_pickles_are_neither_read_nor_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {victim}",)

    payload = pickle.dumps(Payload())
    contents = [("a.jpg", b"1"), *[(f"a.{ext}", payload) for ext in ("pyd", "pickle", "pth")], ("b.pyd", payload)]
    path = tar_file(tmp_path / "a.tar", contents)
    assert read_all(path) == {"a": {"jpg": b"1"}, "b": {}}
    first, second = scan(path)
    assert first.problem is None
    assert second.problem is not None
    assert ".pyd could run code" in second.problem
    assert not victim.exists()
    pickle.loads(payload)  # the payload does work: the test would notice
    assert victim.exists()


def test_two_members_of_one_name_break_the_sample(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3")])
    assert [sample.problem for sample in scan(path)] == ["has two members .jpg", None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_shard_cut_anywhere_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tar_file(tmp_path_factory.mktemp("cut") / "a.tar", [(f"{i}.jpg", bytes(700)) for i in range(5)])
    whole = path.read_bytes()
    end = 5 * (512 + 1024)
    path.write_bytes(whole[: data.draw(st.integers(0, end))])
    with pytest.raises(DataError, match=r"a\.tar: .*(truncated|cannot be read)"):
        scan(path)


def test_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "a.tar", [(f"{i}.jpg", bytes(512)) for i in range(3)])
    content = bytearray(path.read_bytes())
    content[1024 : 1024 + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: is truncated or damaged at byte 1024"):
        scan(path)


def test_an_archive_behind_the_end_mark_is_refused(tmp_path: Path) -> None:
    """What `cat a.tar b.tar` gives: readers stop at the first end mark."""
    first, second = (tar_file(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"1")]).read_bytes() for name in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first + second)
    with pytest.raises(DataError, match=rf"both\.tar: goes on at byte {len(first)}, behind its end mark at byte 1024,"):
        scan(both)
    with pytest.raises(DataError, match=r"unpack it with `tar --ignore-zeros -xf` and pack the files anew"):
        scan(both)
    both.write_bytes(first[:1024] + bytes(512) + second)  # a lone block of zeros ends it for readers, too
    with pytest.raises(DataError, match=r"goes on at byte 1536, behind its end mark at byte 1024,"):
        scan(both)
    both.write_bytes(first + b"x")
    with pytest.raises(DataError, match=rf"goes on at byte {len(first)},"):
        scan(both)


@pytest.mark.parametrize("zeros", [512, 1024, 10_240, 1 << 20])
def test_zeros_that_fill_up_a_record_are_no_fault(tmp_path: Path, zeros: int) -> None:
    path = tar_file(tmp_path / "a.tar", [("a.jpg", b"1")])
    path.write_bytes(path.read_bytes()[:1024] + bytes(zeros))
    assert [sample.key for sample in scan(path)] == ["a"]


def test_a_download_that_reserved_its_room_and_was_cut_is_noticed(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    os.truncate(path, 1024)
    os.truncate(path, 4 << 20)
    with pytest.raises(DataError, match=r"a\.tar: has nothing but zeros from byte 1024 on, .* fetch or write it anew"):
        scan(path)


def test_members_of_a_key_that_lie_apart_are_refused(tmp_path: Path) -> None:
    contents = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3"), ("b.cls", b"4")]
    path = tar_file(tmp_path / "apart.tar", contents)
    message = r"apart\.tar: a\.cls lies apart from a\.jpg, so that one sample would be two; pack the files sorted"
    with pytest.raises(DataError, match=message):
        scan(path)
    assert [sample.key for sample in scan(tar_file(path, sorted(contents)))] == ["a", "b"]


def test_a_key_that_is_not_unique_names_several_whole_samples(tmp_path: Path) -> None:
    """Sets that were joined have such keys, and WebDataset reads them."""
    contents = [("a.jpg", b"1"), ("a.cls", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4"), ("a.cls", b"5")]
    assert [sample.key for sample in scan(tar_file(tmp_path / "a.tar", contents))] == ["a", "b", "a"]


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "z.tar").write_bytes(gzip.compress(bytes(1024)))
    with pytest.raises(DataError, match=r"z\.tar: is compressed \(gzip\).*decompress"):
        scan(tmp_path / "z.tar")
    with pytest.raises(DataError, match=r"empty\.tar: holds no samples"):
        scan(tar_file(tmp_path / "empty.tar", []))
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read"):
        scan(tmp_path / "gone.tar")
    (tmp_path / "text.tar").write_text("no tar file at all" * 100)
    with pytest.raises(DataError, match=r"text\.tar: is no tar file"):
        scan(tmp_path / "text.tar")


def test_a_file_that_shrinks_after_it_was_scanned_is_noticed(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "a.tar", [("a.jpg", bytes(5000))])
    (sample,) = scan(path)
    os.truncate(path, 1000)
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(DataError, match=r"a\.tar: ended inside a\.jpg"):
        read(file, sample, "a.tar")
    os.close(file)


def test_sample_ids_are_positive_distinct_and_fixed() -> None:
    ids = {sample_id(f"{shard}.tar", str(key)) for shard in range(20) for key in range(100)}
    assert len(ids) == 2000
    assert all(0 <= number < 2**63 for number in ids)
    assert sample_id("a.tar", "b") == 3655249163610230530
    assert TarSample("k", {}) == TarSample("k", {}, None)
