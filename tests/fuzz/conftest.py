"""Fixtures of the fuzz tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data2vec.core.data.shards.remote import http, transfer
from data2vec.core.data.shards.remote.body import TroubleError
from data2vec.core.testing import load_module

material = load_module("fuzz_material", Path(__file__).with_name("material.py"))


@pytest.fixture
def place(tmp_path: Path) -> Any:
    return material.Place(tmp_path)


class Offline:
    def open(self, request: Any, timeout: float) -> Any:
        raise ConnectionRefusedError(f"no network for {request.full_url}")


def _offline(url: str, offset: int, version: str, timeout: float) -> Any:
    raise TroubleError(f"no network for {url}")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and no network."""
    monkeypatch.setattr(transfer, "wait", lambda *_: None)
    monkeypatch.setattr(http, "_opener", Offline)
    monkeypatch.setattr(transfer, "open_object", _offline)  # the libraries of object stores look for credentials


@pytest.fixture(scope="session")
def shards() -> dict[str, bytes]:
    return {modality: material.shard(modality) for modality in material.MODALITIES}
