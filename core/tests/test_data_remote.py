"""Shards from http servers that work, and from those that do not; what the cache folder holds."""

from __future__ import annotations

import errno
import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from data2vec.core.data.index import INDEX_NAME, ShardIndex
from data2vec.core.data.remote import store as store_module
from data2vec.core.data.remote.cache import ShardCache
from data2vec.core.data.remote.patience import FetchStoppedError, Helper, Patience, stopped_by
from data2vec.core.data.remote.store import FOLDER, Store
from data2vec.core.data.remote.transfer import Limits
from data2vec.core.data.shards import ShardWriter
from data2vec.core.data.shardset import open_shards
from data2vec.core.errors import DataError, masked

PAGE = b"<!DOCTYPE html><html><title>Welcome to the hotel's network</title></html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", "train", "toy", samples_per_shard=2) as writer:
        for i in range(6):
            writer.write(str(i), {"bin": os.urandom(50_000)})
    return tmp_path / "set"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder with validators and ranges, and plays faults in the order in which they are listed."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        path = self.server.folder / self.path.partition("?")[0].strip("/")
        if isinstance(fault, int):
            self.send_error(fault)
        elif not path.is_file():
            self.send_error(404)
        else:
            getattr(self, f"play_{fault or 'well'}")(path.read_bytes())

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"v1"', **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def play_well(self, content: bytes) -> None:
        start = int(self.headers["Range"][6:-1]) if self.headers.get("If-Range") == '"v1"' else 0
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(content[start:], 206 if start else 200, **ranges)

    def play_cut(self, content: bytes) -> None:
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") else 0
        rest = content[start:]
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(rest[: len(rest) // 2], 206 if start else 200, **{"Content-Length": str(len(rest)), **ranges})

    def play_silent_cut(self, content: bytes) -> None:
        self.answer(content[: len(content) // 2], **{"Content-Length": ""})

    def play_page(self, content: bytes) -> None:
        self.answer(PAGE, Content_Type="text/html")

    def play_json(self, content: bytes) -> None:
        self.answer(b'{"format": 1, "modality": 5}')

    def play_gzip(self, content: bytes) -> None:
        self.answer(gzip.compress(content), Content_Encoding="gzip")

    def play_nothing(self, content: bytes) -> None:
        self.answer(b"", 204)

    def play_elsewhere(self, content: bytes) -> None:
        self.answer(content[1000:], 206, **{"Content-Range": f"bytes 1000-{len(content) - 1}/{len(content)}"})

    def play_unasked(self, content: bytes) -> None:
        self.answer(content[:4096], 206, **{"Content-Range": f"bytes 0-4095/{len(content)}"})

    def play_long(self, content: bytes) -> None:
        self.answer(content + content)

    def play_endless(self, content: bytes) -> None:
        self.answer(content, **{"Content-Length": ""})
        try:
            for _ in range(200):
                self.wfile.write(bytes(1 << 16))
                self.server.sent += 1 << 16
        except OSError:
            pass

    def play_drip(self, content: bytes) -> None:
        self.answer(b"", **{"Content-Length": str(len(content))})
        self.drip(content)

    def play_drip_headers(self, content: bytes) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 60_000)

    def drip(self, content: bytes) -> None:
        try:
            for byte in content:
                if self.server.closed.wait(0.02):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
        except OSError:
            pass

    def play_file(self, content: bytes) -> None:
        self.answer(b"", 302, Location=f"file://{self.server.folder}/train-000001.tar")

    def play_ftp(self, content: bytes) -> None:
        self.answer(b"", 302, Location="ftp://127.0.0.1/train-000001.tar?signature=secret")

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        self.faults: list[int | str] = []
        self.always: int | str = ""
        self.sent = 0
        self.closed = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass

    def shard(self, number: int = 0) -> str:
        return f"{self.url}/train-{number:06d}.tar"

    def count(self, name: str) -> int:
        return sum(path.startswith(f"/{name}") for path, _ in self.requests)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server(folder)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield running
    running.closed.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", limits=Limits(idle=20, seconds=120, pause=0.01))


def tars(cache: ShardCache) -> list[Path]:
    return sorted((cache.folder / FOLDER).glob("*.tar"))


def small(cache: ShardCache, folder: Path, shards: float) -> ShardCache:
    return replace(cache, max_bytes=int(shards * (folder / "train-000000.tar").stat().st_size))


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


def test_what_a_killed_process_left_is_removed(server: Server, cache: ShardCache, tmp_path: Path) -> None:
    program = (
        "import os, sys, signal; from pathlib import Path\n"
        "from data2vec.core.data.remote.store import Store\n"
        "store = Store(Path(sys.argv[1]), None)\n"
        "with store.locked('killed', lambda s: None, shared=False):\n"
        "    writing = store.begin('killed', lambda s: None); writing.write(bytes(100_000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(cache.folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(tars(cache)) == 1
    fetched = cache.fetch(server.shard())
    assert tars(cache) == [fetched]


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
    with pytest.raises(DataError, match=rf"{INDEX_NAME}.*{reason}"):
        open_shards(server.shard(), "toy", cache)


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


READER = """
import random, sys
from pathlib import Path
from data2vec.core.data.index import ShardIndex
from data2vec.core.data.remote.cache import ShardCache
from data2vec.core.data.remote.store import FOLDER
folder, url, server, seed = sys.argv[1:]
shards = ShardIndex.load(Path(server)).shards
bound = int(2.5 * shards[0].bytes)
cache = ShardCache(Path(folder), bound)
order = random.Random(int(seed))
for _ in range(12):
    info = order.choice(shards)
    with cache.hold(f"{url}/{info.name}", info) as path:
        assert path.read_bytes() == (Path(server) / info.name).read_bytes()
        held = 0
        for tar in (Path(folder) / FOLDER).glob("*.tar"):
            try:
                held += tar.stat().st_size
            except FileNotFoundError:
                pass
        assert held <= bound, held
"""


def test_many_processes_share_a_small_disk(server: Server, folder: Path, cache: ShardCache) -> None:
    arguments = [sys.executable, "-c", READER, str(cache.folder), server.url, str(folder)]
    readers = [subprocess.Popen([*arguments, str(seed)]) for seed in range(4)]
    assert [reader.wait(300) for reader in readers] == [0] * 4
    assert len(tars(cache)) <= 2


# ---- ending


def test_the_end_of_the_program_ends_a_fetch(server: Server, cache: ShardCache) -> None:
    server.always = "drip"
    ended = threading.Event()
    threading.Timer(0.2, ended.set).start()
    with stopped_by(ended.is_set), pytest.raises(FetchStoppedError):
        cache.fetch(server.shard())
    assert not tars(cache)


def test_ctrl_c_ends_a_fetch(server: Server, folder: Path, cache: ShardCache) -> None:
    """Both while shards are counted, in threads, and while one is read; nothing half-written stays."""
    (folder / INDEX_NAME).unlink()
    server.always = "drip"
    program = (
        "import sys; from pathlib import Path\n"
        "from data2vec.core.data.remote.cache import ShardCache\n"
        "from data2vec.core.data.shardset import open_shards\n"
        "cache = ShardCache(Path(sys.argv[1]))\n"
        "cache.fetch(sys.argv[2]) if sys.argv[3] == 'one' else open_shards(sys.argv[2], 'toy', cache)\n"
    )
    for how in ("one", "all"):
        url = server.shard() if how == "one" else f"{server.url}/train-{{000000..000002}}.tar"
        if how == "all":
            server.faults.append(404)  # the index
        server.requests.clear()
        process = subprocess.Popen([sys.executable, "-c", program, str(cache.folder), url, how], stderr=subprocess.PIPE)
        while not tars(cache) or not any("train" in path for path, _ in server.requests):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
        assert b"KeyboardInterrupt" in text
        assert not tars(cache)


def test_a_call_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    helper = Helper()
    with pytest.raises(TimeoutError, match=r"no answer for 0\.1 s"):
        helper.call(never.wait, 0.1, Patience())
    never.set()


def test_stores_of_one_folder_agree(tmp_path: Path) -> None:
    assert Store(tmp_path, None).path == Store(tmp_path, None).path
