"""Fixtures of the fuzz tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data2vec.core.data.shards import fetch
from data2vec.core.data.shards.fetch import ShardCache
from data2vec.core.testing import load_module

material = load_module("fuzz_material", Path(__file__).with_name("material.py"))


@pytest.fixture
def place(tmp_path: Path) -> Any:
    return material.Place(tmp_path)


class Offline:
    def open(self, request: Any, timeout: float) -> Any:
        raise ConnectionRefusedError(f"no network for {request.full_url}")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and no network."""
    monkeypatch.setattr(ShardCache, "_wait", lambda self, attempt: None)
    monkeypatch.setattr(fetch, "_opener", Offline)


@pytest.fixture(scope="session")
def shards() -> dict[str, bytes]:
    return {modality: material.shard(modality) for modality in material.MODALITIES}
