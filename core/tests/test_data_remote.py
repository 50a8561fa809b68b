"""Shards from http servers that work, and from those that do not; what the cache folder holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from data2vec.core.data.shards.index import INDEX_NAME, ShardIndex
from data2vec.core.data.shards.opened import open_shards
from data2vec.core.data.shards.remote import store as store_module
from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.remote.patience import Helper, Patience
from data2vec.core.data.shards.remote.store import FOLDER, Store
from data2vec.core.errors import DataError, masked
from data2vec.core.testing import load_module

shards_of = load_module("shard_server", Path(__file__).with_name("shard_server.py"))
Server, tars, small = shards_of.Server, shards_of.tars, shards_of.small
folder, server, cache = shards_of.folder, shards_of.server, shards_of.cache


# ---- what is the user's own


def test_files_of_the_user_are_never_removed(server: Server, folder: Path, cache: ShardCache) -> None:
    """Those beside the cache, in it, of the name of a shard or of a record, and links."""
    cache.folder.mkdir()
    own = cache.folder / "precious.tar"
    own.write_bytes(b"mine")
    bounded = small(cache, folder, 1)
    first = bounded.fetch(server.shard(0))
    inside = first.parent / "precious.tar"
    inside.write_bytes(b"x" * 300_000)
    os.utime(inside, (1, 1))
    first.unlink()
    first.write_bytes(b"the user's")  # under the name of a shard that was fetched
    (first.parent / "link.tar").symlink_to(own)
    (first.parent / "link.json").write_bytes(first.with_suffix(".json").read_bytes())
    second = bounded.fetch(server.shard(0))
    assert second != first
    assert second.read_bytes() == (folder / "train-000000.tar").read_bytes()
    for number in (1, 2):
        bounded.fetch(server.shard(number))
    assert not second.exists()
    assert (own.read_bytes(), first.read_bytes(), inside.stat().st_size) == (b"mine", b"the user's", 300_000)
    assert (first.parent / "link.tar").is_symlink()


def test_a_cache_may_be_the_folder_of_the_shards(server: Server, folder: Path, cache: ShardCache) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bounded = replace(small(cache, folder, 1), folder=folder)
    for number in range(3):
        bounded.fetch(server.shard(number))
    assert len(tars(bounded)) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert open_shards(str(folder), "toy", bounded).counts == (2, 2, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: b"",
        lambda record: b"\xff" * 3000,
        lambda record: b"[" * 200_000,
        lambda record: json.dumps({**record, "file": "../../precious.tar"}).encode(),
        lambda record: json.dumps({**record, "inode": "../../precious.tar"}).encode(),
        lambda record: json.dumps({**record, "sha256": "../../precious.tar"}).encode(),
        lambda record: json.dumps({**record, "bytes": -1}).encode(),
        lambda record: json.dumps({**record, "inode": record["inode"] + 1}).encode(),
    ],
)
def test_a_damaged_record_leads_nowhere(
    server: Server, folder: Path, cache: ShardCache, damage: Callable[[dict[str, object]], bytes]
) -> None:
    precious = cache.folder.parent / "precious.tar"
    precious.write_bytes(b"mine")
    bounded = small(cache, folder, 1.5)
    first = bounded.fetch(server.shard(0))
    record = first.with_suffix(".json")
    record.write_bytes(damage(json.loads(record.read_bytes())))
    assert bounded.fetch(server.shard(0)).read_bytes() == (folder / "train-000000.tar").read_bytes()
    bounded.fetch(server.shard(1))
    assert precious.read_bytes() == b"mine"


def test_a_link_or_another_folder_of_the_name_is_refused(server: Server, tmp_path: Path, cache: ShardCache) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache.folder.mkdir()
    (cache.folder / FOLDER).symlink_to(elsewhere)
    with pytest.raises(DataError, match="is a link, which is not followed"):
        cache.fetch(server.shard())
    assert not list(elsewhere.iterdir())
    (cache.folder / FOLDER).unlink()
    (cache.folder / FOLDER).mkdir()
    (cache.folder / FOLDER / "mine.tar").touch()
    with pytest.raises(DataError, match=r"so it is not a cache; choose another data\.cache"):
        cache.fetch(server.shard())
    assert os.listdir(cache.folder / FOLDER) == ["mine.tar"]


def test_old_caches_are_left_alone(server: Server, cache: ShardCache) -> None:
    cache.folder.mkdir()
    old = cache.folder / "0123456789abcdef-train-000000.tar"
    old.write_bytes(b"x" * 1000)
    replace(cache, max_bytes=200_000).fetch(server.shard())
    assert old.read_bytes() == b"x" * 1000


# ---- servers that work


def test_remote_shards_with_an_index_are_fetched_when_they_are_read(
    server: Server, folder: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_shards(f"{server.url}/train-{{000000..000002}}.tar?signature=secret", "toy", cache)
    assert shards.counts == (2, 2, 2)
    assert server.requests == [(f"/{INDEX_NAME}?signature=secret", None)]
    with caplog.at_level("INFO", "data2vec"), shards.held(1) as path:
        assert path.read_bytes() == (folder / "train-000001.tar").read_bytes()
    assert f"fetching {server.shard(1)}?*** (0.1 MB)" in caplog.text
    assert "secret" not in caplog.text
    with shards.held(1) as again:
        assert again == path
    assert [server.count(f"train-00000{i}.tar?signature=secret") for i in range(3)] == [0, 1, 0]


def test_remote_shards_without_an_index_are_counted(server: Server, folder: Path, cache: ShardCache) -> None:
    (folder / INDEX_NAME).unlink()
    steps: list[tuple[int, int]] = []
    shards = open_shards(f"{server.url}/train-{{000000..000002}}.tar", "toy", cache, lambda *step: steps.append(step))
    assert shards.counts == (2, 2, 2)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with shards.held(0) as path:
        assert path.exists()
    assert server.count("train-000000.tar") == 1


def test_a_broken_connection_goes_on_where_it_broke(server: Server, folder: Path, cache: ShardCache) -> None:
    server.faults += ["cut", 503, "cut"]
    original = (folder / "train-000000.tar").read_bytes()
    assert cache.fetch(server.shard()).read_bytes() == original
    half, more = len(original) // 2, len(original) // 2 + (len(original) - len(original) // 2) // 2
    assert [range_ for _, range_ in server.requests] == [None, *[f"bytes={n}-" for n in (half, half, more)]]


def test_several_readers_fetch_once(server: Server, cache: ShardCache) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(cache.fetch, [server.shard()] * 6))
    assert len(paths) == 1
    assert server.count("train-000000.tar") == 1


# ---- servers that do not

FAULTS = ["page", "silent_cut", "cut", "gzip", "nothing", "elsewhere", "unasked", "long", "endless", 500, "file", "ftp"]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("fault", FAULTS[:-2])
def test_a_fault_that_passes_costs_a_try(
    server: Server, folder: Path, cache: ShardCache, fault: str | int, indexed: bool
) -> None:
    info = ShardIndex.load(folder).shards[0] if indexed else None
    server.faults.append(fault)
    if fault in ("long", "endless") and info is None:  # as a shard they are whole, and something behind the end
        cache = replace(cache, limits=replace(cache.limits, largest=150_000))
    assert cache.fetch(server.shard(), info).read_bytes() == (folder / "train-000000.tar").read_bytes()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_one_error(
    server: Server, folder: Path, cache: ShardCache, fault: str | int, indexed: bool
) -> None:
    info = ShardIndex.load(folder).shards[0] if indexed else None
    server.always = fault
    cache = replace(cache, limits=replace(cache.limits, largest=150_000))
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:\d+/train-000000\.tar\?\*\*\*: ") as caught:
        cache.fetch(f"{server.shard()}?signature=secret", info)
    text = str(caught.value)
    assert "secret" not in text
    if fault == "page":
        assert "what came is a web page" in text or (indexed and f"its index.json says {info and info.bytes}" in text)
    assert not tars(cache)
    assert server.sent < 12 << 20 or fault != "endless"


def test_a_body_is_never_written_beyond_its_size(
    server: Server, folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = ShardIndex.load(folder).shards[0]
    written: list[int] = []
    write = store_module.write_some
    monkeypatch.setattr(
        store_module, "write_some", lambda number, data: written.append(len(data)) or write(number, data)
    )
    server.always = "endless"
    with pytest.raises(DataError, match=rf"has more than {info.bytes} bytes, its index\.json says {info.bytes}"):
        cache.fetch(server.shard(), info)
    assert sum(written) <= 2 * info.bytes  # two tries


@pytest.mark.parametrize("fault", ["drip", "drip_headers"])
def test_a_server_that_drips_is_given_up(server: Server, cache: ShardCache, fault: str) -> None:
    server.always = fault
    impatient = replace(cache, limits=replace(cache.limits, seconds=0.5))
    with pytest.raises(DataError, match=r"cannot be fetched within data\.fetch_minutes=0\.00833"):
        impatient.fetch(server.shard())
    with pytest.raises(DataError, match=r"cannot be fetched within data\.fetch_minutes"):
        open_shards(server.shard(), "toy", impatient)
    assert not tars(cache)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("cut", "bytes early"),
        ("page", "JSON.*web page"),
        ("json", "shards"),
        ("nothing", "204"),
        (500, "answers 500"),
    ],
)
def test_an_index_that_comes_broken_is_fetched_again(
    server: Server, cache: ShardCache, fault: str | int, reason: str
) -> None:
    server.faults.append(fault)
    assert open_shards(server.shard(), "toy", cache).counts == (2,)
    server.always = fault
    with pytest.raises(DataError, match=rf"{INDEX_NAME}.*{reason}") as caught:
        open_shards(server.shard(), "toy", cache)
    assert str(caught.value).count(server.url) == 1


def test_what_is_not_there_is_asked_for_once(server: Server, cache: ShardCache) -> None:
    with pytest.raises(DataError, match=r"no\.tar: the server answers 404 .*; check the address"):
        cache.fetch(f"{server.url}/no.tar")
    assert server.count("no.tar") == 1


def test_a_copy_is_compared_again_when_it_was_touched(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_shards(server.shard(), "toy", cache)
    with shards.held(0) as path:
        original = path.read_bytes()
    for damaged in (original[:600] + bytes([original[600] ^ 1]) + original[601:], original[:1000], original + b"x"):
        path.write_bytes(damaged)
        with shards.held(0) as path:
            assert path.read_bytes() == original
    assert server.count("train-000000.tar") == 4
    assert "left alone and fetched again" in caplog.text
    os.utime(path)
    copied = shutil.copytree(cache.folder, cache.folder.with_name("copied"))
    for one in (cache, replace(cache, folder=copied)):
        with one.hold(server.shard(), shards.shards[0].info) as path:
            assert path.read_bytes() == original
    assert server.count("train-000000.tar") == 4


def test_a_shard_that_is_not_what_the_index_says_is_refused(server: Server, folder: Path, cache: ShardCache) -> None:
    info = ShardIndex.load(folder).shards[0]
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"SHA-256 [0-9a-f]{{64}}, its index\.json says {info.sha256}; .*index the set"
    ):
        cache.fetch(server.shard(), info)
    assert server.count("train-000000.tar") == 2
    path.write_bytes(content + b"more")
    with pytest.raises(DataError, match=rf"has {info.bytes + 4} bytes, its index\.json says {info.bytes}"):
        cache.fetch(server.shard(), info)
    assert not tars(cache)


def test_what_gives_access_is_not_shown() -> None:
    assert masked("https://me:pass@host/a.tar?sig=1&x=2: gone") == "https://***@host/a.tar?***: gone"
    assert masked("'http://h/{0..1}.tar?a::http://h/b?c' has") == "'http://h/{0..1}.tar?***' has"
    assert masked("train-00000?.tar in s3://bucket/a?b") == "train-00000?.tar in s3://bucket/a?b"


# ---- room


def test_what_was_used_longest_ago_goes_first(server: Server, folder: Path, cache: ShardCache) -> None:
    bounded = small(cache, folder, 2)
    first, second = (bounded.fetch(server.shard(i)) for i in range(2))
    os.utime(first.with_suffix(".json"), (1, 1))
    bounded.fetch(server.shard(0))  # used again: now the newest
    os.utime(second.with_suffix(".json"), (2, 2))
    third = bounded.fetch(server.shard(2))
    assert tars(bounded) == sorted([first, third])


def test_a_shard_that_is_held_stays(server: Server, folder: Path, cache: ShardCache) -> None:
    bounded = small(cache, folder, 1)
    with ThreadPoolExecutor(1) as pool, bounded.hold(server.shard(0)) as path:
        other = pool.submit(bounded.fetch, server.shard(1))
        time.sleep(0.2)
        assert path.exists()
        assert not other.done()
    assert other.result().exists()
    assert not path.exists()


def test_a_shard_larger_than_the_bound_is_refused(server: Server, folder: Path, cache: ShardCache) -> None:
    with pytest.raises(DataError, match=r"a shard of \d+ bytes does not fit into data.cache_gb=.*raise data\.cache_gb"):
        small(cache, folder, 0.5).fetch(server.shard())
    limited = replace(cache, limits=replace(cache.limits, largest=50_000))
    with pytest.raises(DataError, match=r"has \d+ bytes, data\.fetch_gb=5e-05 allows 50000; raise it"):
        limited.fetch(server.shard())
    assert not tars(cache)


def test_a_full_disk_makes_room(
    server: Server, folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (cache.fetch(server.shard(i)) for i in range(2))
    write, full = store_module.write_some, [True]

    def fails_while_there_are_others(number: int, data: memoryview) -> int:
        if full[0] and len(tars(cache)) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, data)

    monkeypatch.setattr(store_module, "write_some", fails_while_there_are_others)
    third = cache.fetch(server.shard(2))
    assert third.read_bytes() == (folder / "train-000002.tar").read_bytes()
    assert tars(cache) == [third]
    monkeypatch.setattr(store_module, "write_some", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(DataError, match=r"is full \(No space left on device\) and holds no other .*cache"):
        cache.fetch(server.shard(0))
    assert not tars(cache)
    del first, second


def test_shards_of_unknown_length_do_not_wait_for_each_other(server: Server, folder: Path, cache: ShardCache) -> None:
    """Each has half of its room when the other begins, and there is none for both."""
    server.always = "halting"
    bounded = small(replace(cache, limits=replace(cache.limits, seconds=30)), folder, 1.2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bounded.fetch, [server.shard(0), server.shard(1)]))
    assert server.count("train") == 2
    assert len(tars(bounded)) == 1


# ---- ending


def test_a_call_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    helper = Helper()
    with pytest.raises(TimeoutError, match=r"no answer for 0\.1 s"):
        helper.call(never.wait, 0.1, Patience())
    never.set()


def test_stores_of_one_folder_agree(tmp_path: Path) -> None:
    assert Store(tmp_path, None).path == Store(tmp_path, None).path
