"""tools/shard.py accounts for every file that it found: written, skipped with a reason, or left out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data2vec.core.data.folder import list_files
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.errors import SampleError
from data2vec.core.testing import load_module

TOOL = Path(__file__).parents[1] / "tools" / "shard.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("shard_tool_that_accounts", TOOL)


@dataclass(frozen=True)
class FakeItem:
    """A file, or a part of a corpus; what its name says decides what becomes of it."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.stem

    def describe(self) -> str:
        return f"{self.path} {self.path.stat().st_size}"


@dataclass(frozen=True)
class FakeSamples:
    samples: tuple[tuple[str, dict[str, bytes]], ...]
    skipped: tuple[str, ...]
    documents: int


def encode_file(item: FakeItem) -> dict[str, bytes]:
    try:
        data = item.path.read_bytes()
    except OSError as error:
        raise SampleError(f"{item.path}: cannot be read ({error.strerror})") from None
    if b"bad" in data:
        raise SampleError(f"{item.path}: is bad")
    return {"jpg": data}


def encode_part(item: FakeItem) -> FakeSamples:
    """A document a line, two to a sample."""
    lines = item.path.read_text().splitlines()
    good = [line for line in lines if "bad" not in line]
    samples = ((f"{item.key}/{n}", {"jpg": " ".join(good[n : n + 2]).encode()}) for n in range(0, len(good), 2))
    return FakeSamples(tuple(samples), tuple(f"{item.path}: {line}" for line in lines if "bad" in line), len(good))


def fake_files(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Any]:
    """Files that end in .jpg, at any depth."""

    def source(arguments: argparse.Namespace) -> Any:
        found = list_files(arguments.folder, lambda name: name.endswith(".jpg"))
        items = tuple(map(FakeItem, found.paths))
        return tool_source().Source("vision", items, (), encode_file, "", left_out=found.left_out)

    return source


def fake_corpus(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Any]:
    """Lines of files that end in .txt."""

    def source(arguments: argparse.Namespace) -> Any:
        found = list_files(arguments.folder, lambda name: name.endswith(".txt"))
        items = tuple(map(FakeItem, found.paths))
        left_out = {"unit": "documents", "files": len(items), "left_out": found.left_out}
        return tool_source().Source("vision", items, (), encode_part, "", **left_out)

    return source


def tool_source() -> ModuleType:
    return sys.modules["data2vec.core.data.shards.source"]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """1,200 pictures of which one is bad and one is gone, and files that are none; a folder is linked."""
    folder, elsewhere = tmp_path / "mixed", tmp_path / "elsewhere"
    for number in range(1_200):
        path = (folder, elsewhere)[number % 2] / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"bad" if number == 7 else b"picture")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for name in ("a.gif", "b.GIF", "c.txt", ".hidden.jpg", "none"):
        (folder / name).write_bytes(b"x")
    return folder


FOUND = "1,206 files found: 1,199 written, 2 skipped, 5 left out (2 .gif, 1 .txt, 1 hidden, 1 without an ending)\n"


def test_every_file_that_was_found_is_accounted_for(
    tool: ModuleType, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an interrupted command is continued, or done again."""
    monkeypatch.setattr(tool, "_commands_of", lambda name: {name: fake_files})
    out = tmp_path / "out"
    command = ["vision", str(mixed), str(out), "--samples-per-shard", "100", "--workers", "2"]
    saved = tool._save_state

    def interrupt(folder: Path, job: str, results: dict) -> None:
        saved(folder, job, results)
        if len(results) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "_save_state", interrupt)
    assert tool.main(command) == 130
    monkeypatch.setattr(tool, "_save_state", saved)
    capsys.readouterr()
    assert tool.main(command) == 0
    printed = capsys.readouterr()
    assert "5 of 13 shards are finished already" in printed.out
    assert FOUND in printed.out
    assert "is bad" in printed.err
    assert "gone.jpg: cannot be read" in printed.err
    assert ShardIndex.load(out).samples == 1_199
    assert tool.main([*command, "--force", "--seed", "1", "--validation", "0.3"]) == 0
    assert FOUND in capsys.readouterr().out


def test_files_of_which_none_can_be_used_are_accounted_for(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "_commands_of", lambda name: {name: fake_files})
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.tif"):
        (folder / name).write_bytes(b"bad")
    assert tool.main(["vision", str(folder), str(tmp_path / "out"), "--workers", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "3 files found: 0 written, 2 skipped, 1 left out (1 .tif)\n"
    assert "none of its 2 files could be used" in printed.err


def test_documents_are_accounted_for_beside_their_files(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "_commands_of", lambda name: {name: fake_corpus})
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text("good\nbad\n" + "good\n" * number)
    (folder / "scan.pdf").write_bytes(b"x")
    command = ["vision", str(folder), str(tmp_path / "out"), "--samples-per-shard", "7", "--workers", "1"]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "11 files found: 10 read, 1 left out (1 .pdf)\n65 documents found: 55 written, 10 skipped\n"
    )


@pytest.mark.parametrize(("written", "skipped"), [(1, 0), (2, 1)])
def test_a_sum_that_is_wrong_is_noticed(tool: ModuleType, written: int, skipped: int) -> None:
    source = tool_source().Source("vision", [FakeItem(Path("a")), FakeItem(Path("b"))], (), encode_file, "")
    with pytest.raises(AssertionError, match=f"{written} \\+ {skipped} of 2 files"):
        tool.account(source, written, skipped)
