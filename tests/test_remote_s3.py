"""Shards in an object store: a local server that speaks its protocol, read through the library that users install."""

from __future__ import annotations

import logging
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.index import INDEX_NAME
from data2vec.core.data.shards.remote import transfer
from data2vec.core.data.shards.remote.store import FOLDER
from data2vec.core.errors import DataError
from data2vec.core.settings.fields import DataConfig
from data2vec.core.testing import load_module

ROOT = Path(__file__).resolve().parents[1]
scenarios = load_module("scenarios", ROOT / "tests" / "scenarios.py")
Commands = load_module("commands_of_tests", ROOT / "tests" / "commands.py").Commands
BUCKET = "shards-of-tests"
SPEC = f"s3://{BUCKET}/set/train-{{000000..000002}}.tar"
HEADERS = {  # the server looks whether a request is signed, and not at the signature
    "Content-Type": "application/octet-stream",
    "Authorization": "AWS4-HMAC-SHA256 Credential=tests/20260101/us-east-1/s3/aws4_request, Signature=0",
}
TINY = (
    "transformer.depth=2", "transformer.width=32", "transformer.heads=2", "targets.top_k=2", "vision.image_size=16",
    "vision.patch_size=4", "train.updates=2", "train.batch=4", "train.micro_batch=4", "train.compile=off",
    "vision.mask.min_block=4", "optim.warmup=1",
    "evaluation.tasks=[rank]", "train.device=cpu", "data.workers=1",
)  # fmt: skip


@dataclass
class Bucket:
    """A bucket whose folder ``set`` holds the files of a local folder."""

    url: str
    folder: Path

    def ask(self, method: str, key: str = "", body: bytes = b"") -> None:
        request = urllib.request.Request(f"{self.url}/{BUCKET}{key}", body, HEADERS, method=method)
        urllib.request.urlopen(request, timeout=60).close()

    def put(self, name: str, content: bytes) -> None:
        self.ask("PUT", f"/set/{name}", content)

    def remove(self, name: str) -> None:
        self.ask("DELETE", f"/set/{name}")


@pytest.fixture(scope="session")  # one for each process: the library keeps the address that it saw first
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenarios.write_shards(tmp_path_factory.mktemp("set"), "vision", 27)


@pytest.fixture
def bucket(server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1",
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    made = Bucket(server, folder)
    made.ask("PUT")
    for path in folder.iterdir():
        made.put(path.name, path.read_bytes())
    yield made
    for path in folder.iterdir():
        made.remove(path.name)


def opened(cache: Path, spec: str = SPEC, **settings: Any) -> TrainData:
    modality = scenarios.scenario("vision").modalities["vision"]
    data = DataConfig(**{"workers": 0, "shuffle_shards": 1, **settings})
    return TrainData.open(spec, modality, data=data, seed=0, cache=cache)


def epoch(data: TrainData) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in islice(data.batches(0, 9), 3)])


def copies(cache: Path) -> list[Path]:
    return sorted((cache / FOLDER).glob("*.tar"))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_is_that_of_the_local_shards(bucket: Bucket, tmp_path: Path, indexed: bool, workers: int) -> None:
    """The workers are forked from a process that has used the library."""
    if not indexed:
        bucket.remove(INDEX_NAME)
    data = opened(tmp_path, workers=workers)
    assert data.counts == (9, 9, 9)
    assert len(copies(tmp_path)) == (0 if indexed else 3)
    assert torch.equal(epoch(data), epoch(opened(tmp_path / "none", str(bucket.folder / "train-*.tar"))))
    assert len(copies(tmp_path)) == 3


@pytest.mark.parametrize("indexed", [True, False])
def test_copies_that_had_to_go_are_fetched_again(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture, indexed: bool
) -> None:
    if not indexed:
        bucket.remove(INDEX_NAME)
    largest = max(path.stat().st_size for path in bucket.folder.glob("*.tar"))
    data = opened(tmp_path, cache_gb=1.5 * largest / 1e9)
    with caplog.at_level(logging.INFO, "data2vec"):
        first, second = epoch(data), epoch(data)
    assert torch.equal(first, second)
    assert len(copies(tmp_path)) == 1
    assert caplog.text.count("fetched s3://") >= 5


def test_an_object_that_was_replaced_is_told_from_the_one_of_the_index(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "wait", lambda *_: None)
    data, name = opened(tmp_path), "train-000001.tar"
    content = (bucket.folder / name).read_bytes()
    where = rf"^s3://{BUCKET}/set/{name}: has "
    bucket.put(name, content[:600] + bytes([content[600] ^ 1]) + content[601:])
    with pytest.raises(
        DataError, match=where + r"SHA-256 \w+, its index\.json says \w+; .*replaced, index the set anew"
    ):
        epoch(data)
    bucket.put(name, content + bytes(512))
    with pytest.raises(
        DataError, match=where + r"\d+ bytes, its index\.json says \d+; if the shard was replaced, index"
    ):
        epoch(data)


def test_an_object_that_was_replaced_goes_unnoticed_without_an_index_until_its_copy_is_gone(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.remove(INDEX_NAME)
    before = epoch(opened(tmp_path))
    larger = scenarios.write_shards(tmp_path / "other", "vision", 5) / "train-000000.tar"
    for number in range(3):
        bucket.put(f"train-{number:06d}.tar", larger.read_bytes())
    data = opened(tmp_path)
    assert data.counts == (9, 9, 9)
    assert torch.equal(epoch(data), before)
    for copy in copies(tmp_path):
        copy.unlink()
    with pytest.raises(DataError, match="has 5 samples, not the 9 that were counted; index the set again"):
        epoch(data)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            f"s3://{BUCKET}/set/train-000009.tar",
            f"s3://{BUCKET}/set/train-000009.tar: FileNotFoundError: .*; check the",
        ),
        (
            "s3://no-such-bucket/train-000000.tar",
            "s3://no-such-bucket/train-000000.tar: .*bucket does not exist; check",
        ),
    ],
)
def test_what_is_not_there_is_one_error(bucket: Bucket, tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        opened(tmp_path, spec)
    assert not copies(tmp_path)


def test_a_missing_library_is_named_with_what_to_install(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, extra in (("s3fs", "s3"), ("gcsfs", "gcs"), ("huggingface_hub", "hf")):
        monkeypatch.setitem(sys.modules, name, None)
        protocol = "gs" if extra == "gcs" else extra
        needed = rf"{protocol}:// needs the library {name}, which is not installed: .*'data2vec-core\[{extra}\]'"
        with pytest.raises(DataError, match=needed):
            opened(tmp_path, f"{protocol}://{BUCKET}/train-000000.tar")


def test_missing_credentials_are_told(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match="credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC"):
        opened(tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_command_trains_on_them(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_module("vision_base_for_s3", ROOT / "experiments" / "vision_base.py")
    run = Commands(module, TINY, tmp_path / "run", capsys, leaves=["cache"])
    error = run.refused("data.train=s3://no-such-bucket/train-000000.tar")
    assert "s3://no-such-bucket/train-000000.tar: FileNotFoundError: The specified bucket does not exist" in error
    code, out, err = run(f"data.train={SPEC}", "train.max_minutes=1e-9")
    assert code == 0, err
    assert "stopped (out of time) at update 1 of 2" in out
    assert copies(tmp_path / "run" / "cache")
