"""One writer for a folder: who is refused, and whose claim is taken over."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data2vec.core import lock
from data2vec.core.errors import FolderInUseError
from data2vec.core.lock import NAME, only_writer
from data2vec.core.testing import load_module

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))
no_hooks, shards = toy.no_hooks, toy.shards
_HOLD = """
import filelock, sys
claim = filelock.SoftFileLease(sys.argv[1], lease_duration=float(sys.argv[2]), thread_local=False)
claim.acquire(timeout=0)
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that writes to the folder, until it is killed."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder / NAME), str(lock._LEASE_SECONDS)],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.communicate(timeout=60)


def of_another_host(folder: Path) -> Path:
    """A claim that a process of another host has left."""
    process = hold(folder)
    claim = (folder / NAME).read_text()
    process.kill()
    process.communicate(timeout=60)
    (folder / NAME).write_text("\n".join("host=elsewhere" if "host=" in line else line for line in claim.split("\n")))
    return folder / NAME


def test_a_second_run_is_refused(
    shards: Path, tmp_path: Path, other: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert toy.command(toy.settings(tmp_path / "run", shards)) == 2
    errors = capfd.readouterr().err
    assert f"in use by process {other.pid} on host {os.uname().nodename}" in errors
    assert "wait for it or stop it" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]


def test_a_run_goes_on_where_one_was_killed(
    shards: Path, tmp_path: Path, other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    other.kill()
    other.wait(60)
    with caplog.at_level(logging.INFO, "data2vec"):
        assert toy.command(toy.settings(tmp_path / "run", shards)) == 0
    assert f"taken over from process {other.pid} on host" in caplog.text
    assert not (tmp_path / "run" / NAME).exists()


def test_a_claim_is_given_up_at_every_ending(tmp_path: Path) -> None:
    def interrupted() -> None:
        with only_writer(tmp_path / "run"):
            assert (tmp_path / "run" / NAME).is_file()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "run").exists()


def test_what_another_host_does_not_renew_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_AT_ONCE_SECONDS", 0.1)
    of_another_host(tmp_path / "run")
    with caplog.at_level(logging.INFO, "data2vec"), only_writer(tmp_path / "run"):
        pass
    assert "on host elsewhere; watching for 1 s whether it still runs" in caplog.text
    assert "on host elsewhere, which has ended without leaving it" in caplog.text


def test_what_another_host_renews_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "_AT_ONCE_SECONDS", 0.1)
    path = of_another_host(tmp_path / "run")
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        began = time.monotonic()
        message = f"on host elsewhere; wait .* remove {path}"
        with pytest.raises(FolderInUseError, match=message), only_writer(tmp_path / "run"):
            pytest.fail("two writers")
        assert time.monotonic() - began > 2.0
    finally:
        done.set()
        thread.join(60)


def test_a_process_killed_before_it_wrote_its_name_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_EMPTY_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_AT_ONCE_SECONDS", 0.1)
    (tmp_path / NAME).touch()
    with caplog.at_level(logging.INFO, "data2vec"), only_writer(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / NAME).read_text()
    assert "taken over from a process that has not written its name" in caplog.text


def test_one_of_many_takes_over_an_empty_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait, or are refused; the folder, which each removes where it stays empty, is there for the next."""
    monkeypatch.setattr(lock, "_EMPTY_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_AT_ONCE_SECONDS", 0.1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / NAME).touch()
    writers: list[int] = []

    def contend(number: int) -> str:
        try:
            with only_writer(folder):
                writers.append(number)
                alone = writers == [number]
                time.sleep(0.05)
                writers.remove(number)
                return "alone" if alone else "not alone"
        except FolderInUseError:
            return "refused"

    with ThreadPoolExecutor(6) as pool:
        ended = list(pool.map(contend, range(6)))
    assert set(ended) <= {"alone", "refused"}
    assert "alone" in ended
    assert not folder.exists()
