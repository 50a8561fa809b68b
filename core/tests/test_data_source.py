"""Finding shards: paths, globs, brace lists, http(s); and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from braceexpand import braceexpand  # WebDataset's
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.data.shards.braces import expand
from data2vec.core.data.shards.index import INDEX_NAME
from data2vec.core.data.shards.locate import resolve
from data2vec.core.data.shards.opened import open_shards
from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for prefix, samples in (("train", 6), ("validation", 2)):
        with ShardWriter(tmp_path / "set", prefix, "toy", samples_per_shard=2) as writer:
            for i in range(samples):
                writer.write(str(i), {"bin": os.urandom(50_000)})
    return tmp_path / "set"


def test_every_way_to_name_local_shards(folder: Path) -> None:
    train = [str(folder / f"train-{i:06d}.tar") for i in range(3)]
    validation = str(folder / "validation-000000.tar")
    assert resolve(str(folder)) == [*train, validation]
    assert resolve(train[0]) == train[:1]
    assert resolve(f"{folder}/train-*.tar") == train
    assert resolve(f"{folder}/train-{{000000..000002}}.tar") == train
    assert resolve(f"{folder}/{{train-000001,validation-000000}}.tar") == [train[1], validation]
    assert resolve(f"{validation}::{folder}/train-*.tar") == [validation, *train]


def test_urls_are_expanded_and_not_looked_up() -> None:
    assert resolve("https://host/a-{08..10}.tar?x=1") == [f"https://host/a-{n}.tar?x=1" for n in ("08", "09", "10")]
    assert resolve("s3://bucket/a-{0..1}.tar::hf://datasets/me/set/b.tar") == [
        "s3://bucket/a-0.tar", "s3://bucket/a-1.tar", "hf://datasets/me/set/b.tar",
    ]  # fmt: skip
    for wrong in ("s3://bucket", "s3:///a.tar", "gs://bucket/", "s3://a b/c.tar", "https://"):
        with pytest.raises(DataError, match=r"is no (address|URL) such as"):
            resolve(wrong)
    assert resolve("http://[::1]:80/a.tar::http://[::1]:80/b.tar") == ["http://[::1]:80/a.tar", "http://[::1]:80/b.tar"]


def test_what_is_missing_is_named_with_what_is_there(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"no shard matches '.*/test-\*\.tar'; the folder .*/set has index.json, train-0"
    ):
        resolve(f"{folder}/test-*.tar")
    with pytest.raises(DataError, match=r"no shard matches .*; the folder .* has set/"):
        resolve(f"{folder.parent}/no/such/folder/a.tar")
    with pytest.raises(DataError, match=r"2 of 5 shards of .* do not exist: .*train-000003.tar, .*train-000004.tar"):
        resolve(f"{folder}/train-{{000000..000004}}.tar")
    (folder / "sub").mkdir()
    with pytest.raises(DataError, match=r"has no \*\.tar shards; the folder .* is empty"):
        resolve(f"{folder}/sub")
    with pytest.raises(DataError, match="is no brace list"):
        resolve(f"{folder}/a-{{000..003.tar")
    with pytest.raises(DataError, match="twice"):
        resolve(f"{folder}::{folder}/train-000000.tar")


@pytest.mark.parametrize("spec", ["", "  ", " :: ", "::"])
def test_naming_nothing_is_an_error(spec: str) -> None:
    with pytest.raises(DataError, match="names no shards"):
        resolve(spec)


@pytest.mark.parametrize("spec", ["pipe:touch {}", "pipe: touch {}", "x.tar::pipe:touch {}", "sftp://b/a.tar",
"file:///a",
                                  "ftp://h/a.tar", "abfs://b/a", "htdb:x",
                                  "simplecache::s3://b/a.tar", "s3://b/a.tar::memory://a", "S3://b/a.tar"])  # fmt: skip
def test_other_schemes_execute_nothing(tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.tar").touch()
    victim = tmp_path / "executed"
    with pytest.raises(DataError, match=r"nothing else is opened or executed|no shard matches 'simplecache'"):
        resolve(spec.format(victim))
    assert not victim.exists()


@given(st.text(max_size=30))
def test_any_text_is_a_list_or_one_error(text: str) -> None:
    try:
        found = resolve(f"/no-such-folder/{text}")
    except DataError as error:
        found = [str(error)]
    assert found


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


def test_sets_that_do_not_fit_are_refused(folder: Path, cache: ShardCache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds toy, but .* is read as other"):
        open_shards(str(folder), "other", cache)
    with ShardWriter(tmp_path / "b", "train", "toy", class_names=("x",)) as writer:
        writer.write("0", {"bin": b""})
    with pytest.raises(DataError, match="different classes"):
        open_shards(f"{folder}::{tmp_path / 'b'}", "toy", cache)
    os.truncate(folder / "train-000001.tar", 2000)
    with pytest.raises(DataError, match=r"train-000001\.tar: has 2000 bytes, its index\.json says .*: the file is t"):
        open_shards(str(folder), "toy", cache)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: is no tar file, truncated"):
        open_shards(str(folder), "toy", cache)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["{", "}", ",", "..", "a", "b", "0", "07", "-3", "\\", "{1..3}", "{a..e}", "{08..10}",
                                 "{Z..b}", "{3..-1..2}", "{a,b}", "{,}"]), max_size=8).map("".join))  # fmt: skip
def test_braces_stand_for_what_webdataset_takes_them_for(text: str) -> None:
    try:
        expected = list(braceexpand(text))
    except ValueError:
        expected = []
    try:
        found = expand(text)
    except ValueError:
        found = []
    assert found == expected or not found  # one that is closed before it is opened is refused


@pytest.mark.parametrize(
    "text",
    ["{0..99999999}", "{1..9}" * 12, "{a,b}" * 40, "{{0..9999}{0..9999},x}", "{0..999999999999999999..2}",
    "{" * 50 + "}" * 50,
     "{" + "0" * 17 + "1..900000}" + "x" * 1000],
)  # fmt: skip
def test_braces_that_stand_for_too_much(text: str) -> None:
    with pytest.raises(ValueError, match=r"too many names|levels deep"):
        expand(text)
