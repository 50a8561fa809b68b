"""Ranks that meet, and those that do not: what they say, how soon they obey, and when they give up."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data2vec.core import testing
from data2vec.core.distributed import meeting
from data2vec.core.distributed.launchers import Place
from data2vec.core.distributed.meeting import Meeting
from data2vec.core.errors import ConfigError, Data2VecError, PeerError
from data2vec.core.testing import load_module


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def met(places: list[Place], minutes: float = 2.0, **ports: int) -> list[Data2VecError | None]:
    """What each of some ranks of this process comes to."""
    port = ports.get("port") or free_port()

    def meet(here: Place) -> Data2VecError | None:
        try:
            stores.append(Meeting(here, "127.0.0.1", port, minutes).store())
        except Data2VecError as error:
            return error
        return None

    stores: list[object] = []  # rank 0's answers for as long as it is kept
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(meet, places))


def of(rank: int, world: int) -> Place:
    return Place(rank, world, rank, launched=True)


def test_all_come() -> None:
    assert met([of(rank, 3) for rank in range(3)]) == [None] * 3


def test_one_that_does_not_come(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_FIRST_SAID", 0.5)
    with caplog.at_level(logging.INFO, "data2vec"):
        ended = met([of(0, 3), of(1, 3)], minutes=0.05)
    assert "waiting for 1 of 3 ranks at 127.0.0.1:" in caplog.text
    assert None not in ended
    said = str(next(error for error in ended if isinstance(error, ConfigError)))  # by whichever finds it first
    assert re.search("rank [01] of 3, which meets the others at 127.0.0.1:", said)
    assert "has waited for rank 2, which has not come in 0.05 minutes (engine.join_minutes)" in said


def test_rank_0_does_not_come(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_FIRST_SAID", 0.2)
    with caplog.at_level(logging.INFO, "data2vec"):
        (error,) = met([Place(1, 2, 0, launched=True)], minutes=0.02)
    assert "rank 1 of 2 is waiting for rank 0 at 127.0.0.1:" in caplog.text
    assert "nothing listens there yet" in caplog.text
    assert "does not reach rank 0 in 0.02 minutes (engine.join_minutes)" in str(error)


def test_worlds_that_differ() -> None:
    said = [error for error in met([of(0, 3), of(1, 4)]) if isinstance(error, ConfigError)]
    assert len(said) == 1
    assert "give all one WORLD_SIZE" in str(said[0])


def test_a_rank_that_is_there_twice() -> None:
    ended = met([of(0, 3), of(1, 3), of(1, 3)])
    said = [error for error in ended if isinstance(error, ConfigError)]
    assert len(said) == 1
    assert "is there twice: two processes have RANK=1" in str(said[0])
    assert sum(isinstance(error, PeerError) for error in ended) == 2


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as taken:
        (error,) = met([of(0, 2)], port=taken.getsockname()[1])
    assert "cannot listen there" in str(error)
    assert "two processes are rank 0" in str(error)


def test_another_program_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_FOREIGN_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (error,) = met([of(1, 2)], port=taken.getsockname()[1])
    assert "finds another program there, which does not answer: choose another MASTER_PORT" in str(error)


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    monkeypatch.setattr(meeting, "_UNRESOLVED_SECONDS", 0.0)
    (error,) = met([of(1, 2)])
    assert "finds no such host (Name or service not known): correct MASTER_ADDR" in str(error)


def test_sockets_that_do_not_connect() -> None:
    here = Meeting(of(1, 2), "127.0.0.1", free_port(), 0.005)
    with pytest.raises(ConfigError, match="cannot connect to the others, which have come"):
        here.connect(lambda: time.sleep(5))


def run_alone(rank: int, port: int, toy: str, folder: str, log: str) -> None:
    """The command on one rank of two."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    series = load_module("toy_of_meetings", Path(toy))
    series.main(series.settings(Path(folder), Path(folder)), argv=[])


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_rank_that_waits_obeys_at_once(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    log = tmp_path / "log.txt"
    log.touch()
    toy = str(Path(__file__).with_name("toy.py"))
    process = multiprocessing.get_context("forkserver").Process(
        target=testing.call,
        args=("meetings", __file__, run_alone.__name__, rank, free_port(), toy, str(tmp_path / "run"), str(log)),
    )
    process.start()
    until = time.monotonic() + 120
    while "waiting for" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(process.pid or 0, number)
    process.join(60)
    taken = time.monotonic() - began
    print(f"ended {taken:.2f} s after the signal")
    assert process.exitcode == 130, log.read_text()
    assert taken < 10.0
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists()
