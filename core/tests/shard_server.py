"""A server of shards that plays faults, and what tests keep of its shards."""

from __future__ import annotations

import gzip
import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data2vec.core.data.shards.remote.cache import ShardCache
from data2vec.core.data.shards.remote.store import FOLDER
from data2vec.core.data.shards.remote.transfer import Limits
from data2vec.core.data.shards.writer import ShardWriter

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

    def play_halting(self, content: bytes) -> None:
        """Without a length; the second half when another such request has its first."""
        half = len(content) // 2
        self.answer(content[:half], **{"Content-Length": ""})
        self.wfile.flush()
        self.server.meeting.wait(20)
        self.wfile.write(content[half:])

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
        self.meeting = threading.Barrier(2)
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
