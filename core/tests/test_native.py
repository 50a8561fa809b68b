"""Libraries of wheels: found among a distribution's files, and left to the system where they do not fit."""

from __future__ import annotations

from ctypes import CDLL
from importlib.metadata import PackagePath
from pathlib import Path

import pytest

from data2vec.core.native import load_library, packaged_library


def installed(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Pretend that a distribution has these files."""

    def listed(name: str) -> list[PackagePath]:
        made = []
        for path in paths:
            file = PackagePath(path)
            file.dist = type("Here", (), {"locate_file": staticmethod(lambda file: Path(file))})()
            made.append(file)
        return made

    monkeypatch.setattr("importlib.metadata.files", listed)


def test_a_distribution_that_is_missing_or_without_the_library_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_library("no-such-distribution", "lib*") is None
    assert load_library("no-such-distribution", "lib*") is None
    assert packaged_library("torch", "libsndfile*") is None
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)  # installed without a list of its files
    assert packaged_library("torch", "libtorch*") is None


def test_a_file_that_was_deleted_or_is_no_library_is_left_to_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign = tmp_path / "libsndfile_other.so"
    installed(monkeypatch, tmp_path / "setup.py", foreign)
    assert packaged_library("any", "libsndfile*") is None
    foreign.write_bytes(b"no library")
    assert packaged_library("any", "libsndfile*") == foreign.resolve()
    assert load_library("any", "libsndfile*") is None


def test_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    library = packaged_library("torch", "libtorch_global_deps*")
    assert library is not None
    assert library.is_file()
    assert isinstance(load_library("torch", "libtorch_global_deps*"), CDLL)
