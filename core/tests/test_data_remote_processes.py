"""Remote shards in several processes: readers that share a folder, runs, and what ends with them."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.index import INDEX_NAME, ShardIndex
from data2vec.core.data.shards.opened import open_shards
from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.remote.patience import FetchStoppedError, stopped_by
from data2vec.core.data.shards.remote.store import FOLDER, Store
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.errors import DataError
from data2vec.core.run.prepare import open_data, warn_of_small_cache
from data2vec.core.settings.fields import DataConfig
from data2vec.core.testing import load_module

shards_of = load_module("shard_server", Path(__file__).with_name("shard_server.py"))
Server, tars, small = shards_of.Server, shards_of.tars, shards_of.small
folder, server, cache = shards_of.folder, shards_of.server, shards_of.cache
toy = load_module("toy_series", Path(__file__).with_name("toy.py"))


def started(function: Callable[..., None], *arguments: Any) -> Any:
    """A process that has all imports already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- readers


def read_at_random(cache: ShardCache, url: str, folder: Path, seed: int) -> None:
    infos, order = ShardIndex.load(folder).shards, random.Random(seed)
    assert cache.max_bytes is not None
    for _ in range(12):
        info = order.choice(infos)
        with cache.hold(f"{url}/{info.name}", info) as path:
            assert path.read_bytes() == (folder / info.name).read_bytes()
            held = 0
            for tar in (cache.folder / FOLDER).glob("*.tar"):
                with suppress(FileNotFoundError):
                    held += tar.stat().st_size
            assert held <= cache.max_bytes, held


def test_many_processes_share_a_small_disk(server: Server, folder: Path, cache: ShardCache) -> None:
    bounded = small(cache, folder, 2.5)
    readers = [started(read_at_random, bounded, server.url, folder, seed) for seed in range(4)]
    for reader in readers:
        reader.join(300)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert len(tars(cache)) <= 2


def write_and_die(folder: Path) -> None:
    store = Store(folder, None)
    with store.locked("killed", time.sleep, shared=False):
        writing = store.begin("killed", time.sleep)
        writing.write(bytes(100_000))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed(server: Server, cache: ShardCache) -> None:
    killed = started(write_and_die, cache.folder)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert len(tars(cache)) == 1
    fetched = cache.fetch(server.shard())
    assert tars(cache) == [fetched]


# ---- ending


def test_the_end_of_the_program_ends_a_fetch(server: Server, cache: ShardCache) -> None:
    server.always = "drip"
    ended = threading.Event()
    threading.Timer(0.2, ended.set).start()
    with stopped_by(ended.is_set), pytest.raises(FetchStoppedError):
        cache.fetch(server.shard())
    assert not tars(cache)


def fetch_until_ctrl_c(cache: ShardCache, url: str, one: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cache.fetch(url) if one else open_shards(url, "toy", cache)
    except KeyboardInterrupt:
        sys.exit(130)  # which waits for threads, as the end of a program does


@pytest.mark.parametrize("one", [True, False])
def test_ctrl_c_ends_a_fetch(server: Server, folder: Path, cache: ShardCache, one: bool) -> None:
    """Both while one is read and while shards are counted, in threads; nothing half-written stays."""
    (folder / INDEX_NAME).unlink()
    server.always = "drip"
    url = server.shard() if one else f"{server.url}/train-{{000000..000002}}.tar"
    process = started(fetch_until_ctrl_c, cache, url, one)
    wait_until(lambda: tars(cache) and server.count("train"))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert not tars(cache)


def test_ctrl_c_ends_a_fetch_whose_thread_was_being_started(
    server: Server, folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread runs, and its pool has not noted it yet."""
    (folder / INDEX_NAME).unlink()
    server.always = "drip"
    start = threading.Thread.start
    met: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("ThreadPoolExecutor"):
            wait_until(lambda: tars(cache))
            met.append(thread)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_shards(f"{server.url}/train-{{000000..000002}}.tar", "toy", cache)
    (thread,) = met
    thread.join(5)
    assert not thread.is_alive()
    assert not tars(cache)


# ---- training


@pytest.fixture
def series(server: Server, tmp_path: Path) -> Server:
    """The server, of shards that can be trained on."""
    server.folder = tmp_path / "series"
    toy.write_shards(server.folder, "train", 60)
    toy.write_shards(server.folder, "validation", 30)
    return server


def spec(server: Server, prefix: str = "train", last: int = 3) -> str:
    return f"{server.url}/{prefix}-{{000000..00000{last}}}.tar"


def interrupt_when(happened: Callable[[], Any]) -> threading.Thread:
    """Send Ctrl-C to this process, and not to its workers."""

    def send() -> None:
        wait_until(happened)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_workers_that_fetch_end_with_the_stream(series: Server, tmp_path: Path) -> None:
    config = DataConfig(workers=2, fetch_minutes=60)
    data = TrainData.open(spec(series), toy.Series(), data=config, seed=0, cache=tmp_path)
    series.always = "drip"
    stream = data.batches(0, 8)
    sender = interrupt_when(lambda: series.count("train"))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    sender.join(60)
    began = time.monotonic()
    del stream
    wait_until(lambda: not multiprocessing.active_children())
    assert time.monotonic() - began < 4  # after 5 s torch would end them
    assert not list((tmp_path / FOLDER).glob("*.tar"))


@pytest.mark.parametrize(("slow", "workers"), [("train", 0), ("train", 1), ("validation", 1)])
def test_ctrl_c_in_a_run_does_not_wait_for_a_shard(
    series: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], slow: str, workers: int
) -> None:
    """One that training waits for, here or in a worker, or that evaluation during training does."""
    experiment = toy.settings(tmp_path / "run", updates=50).replace(
        data={"train": spec(series), "validation": spec(series, "validation", 1), "workers": workers,
              "shuffle_shards": 1, "fetch_minutes": 60.0},
        evaluation={"every": 2, "tasks": ("knn",)} if slow == "validation" else {},
    )  # fmt: skip
    play, dripping = series.RequestHandlerClass.play_well, threading.Event()

    def drip_later(handler: Any, content: bytes) -> None:
        """A shard after the first two (one is for measuring), or any of those for evaluation."""
        if series.count(slow) > (2 if slow == "train" else 0) and handler.path.startswith(f"/{slow}"):
            dripping.set()
            handler.play_drip(content)
        else:
            play(handler, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series.RequestHandlerClass, "play_well", drip_later)
        sender = interrupt_when(dripping.is_set)
        assert toy.command(experiment) == 130
        sender.join(60)
    text = capfd.readouterr()
    found = re.search(r"stopped \(interrupted\) at update (\d+) of 50", text.out)
    assert found is not None
    assert 1 <= int(found[1]) <= 3 if slow == "train" else int(found[1]) == 2
    assert "error" not in text.err
    assert toy.learned(tmp_path / "run")[2]["update"] == int(found[1])


def test_broken_samples_are_named_without_what_gives_access(series: Server, tmp_path: Path) -> None:
    with ShardWriter(series.folder / "broken", "train", "series") as writer:
        for number in range(4):
            writer.write(f"{number}", {"raw": b"no number" if number else bytes(72), "cls": b"0"})
    url = f"{series.url.replace('://', '://me:secret@')}/broken/train-000000.tar?token=secret"
    data = TrainData.open(url, toy.Series(), data=DataConfig(workers=0), seed=0, cache=tmp_path)
    batch = next(data.batches(0, 4))
    assert len(batch.broken) == 3
    shown = f"{series.url.replace('://', '://***@')}/broken/train-000000.tar?***: "
    assert all(line.startswith(shown) and "secret" not in line for line in batch.broken)
    with pytest.raises(DataError, match="all 1 samples of a batch are broken") as caught:
        [next(data.batches(position, 1)) for position in range(4)]
    assert "secret" not in str(caught.value)


# ---- room


@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_smaller_than_what_is_read_at_once_is_said(
    series: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    """Once, and not where the shards of a window fit."""
    if not indexed:
        (series.folder / INDEX_NAME).unlink()
    experiment = toy.settings(tmp_path / "run", max_minutes=1e-9).replace(data={"train": spec(series), "workers": 0})

    def said(**data: Any) -> list[str]:
        caplog.clear()
        train, _ = open_data(experiment.replace(data=data), tmp_path)
        warn_of_small_cache(train)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    # Three shards of 40,960 bytes, and one of 20,480.
    assert said(shuffle_shards=3, cache_gb=110e-6) == [
        "data.cache_gb=0.00011 is less than the 0.000123 GB of the 3 shards that are read at once "
        "(data.shuffle_shards=3), so that the same ones are fetched again and again; raise data.cache_gb to at least "
        "0.000123, or lower data.shuffle_shards to 2"
    ]
    assert "raise data.cache_gb to at least 0.000144, or lower data.shuffle_shards to 2" in said(cache_gb=110e-6)[0]
    assert said(shuffle_shards=2, cache_gb=110e-6) == said(cache_gb=0.000144) == said() == []
    monkeypatch.setattr(ShardCache, "room", lambda _: 30_000)
    assert said() == [
        f"data.cache_gb=null has room for 3e-05 GB in {tmp_path}, which is less than the 0.000144 GB of the 4 shards "
        "that are read at once (data.shuffle_shards=16), so that the same ones are fetched again and again; free room "
        "there, or set data.cache to another disk"
    ]
    assert toy.command(experiment.replace(data={"cache_gb": 110e-6})) == 0
    assert sum("read at once" in record.getMessage() for record in caplog.records) == 2
    local = experiment.replace(data={"train": str(series.folder / "train-*.tar")})
    assert not open_data(local, tmp_path)[0]["series"].shards.working_set(16)
