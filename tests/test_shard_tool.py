"""tools/shard.py: from a folder of images to shards and back, restart, interruption, clear errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.tar import scan
from data2vec.core.errors import DataError
from data2vec.core.lock import only_writer
from data2vec.core.testing import load_module

TOOL = Path(__file__).parents[1] / "tools" / "shard.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("shard_tool_under_test", TOOL)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(30):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return folder


def keys(out: Path, pattern: str = "*.tar") -> list[str]:
    return [sample.key for path in sorted(out.glob(pattern)) for sample in scan(path)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_folder_becomes_a_verified_set(tool: ModuleType, images: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["vision", str(images), str(out), "--samples-per-shard", "8", "--validation", "0.2", "--workers", "2"]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert "30 samples in 4 shards" in printed
    assert f"data.train='{out}/train-*.tar'" in printed
    assert f"data.validation='{out}/validation-*.tar'" in printed
    index = ShardIndex.load(out)
    assert (index.modality, index.class_names) == ("vision", ("cat", "dog"))
    assert [s.samples for s in index.shards] == [8, 8, 8, 6]
    assert sorted(keys(out)) == sorted(f"{('cat', 'dog')[n % 2]}/{n}" for n in range(30))
    assert len(keys(out, "validation-*.tar")) == 6
    first = [key.split("/")[0] for key in keys(out)[:8]]
    assert set(first) == {"cat", "dog"}  # shuffled: classes mix
    assert tool.main(["verify", str(out)]) == 0
    other = tmp_path / "other"
    assert tool.main([*command[:2], str(other), *command[3:-1], "1"]) == 0
    assert contents(out) == contents(other)  # the number of workers changes nothing


def test_a_finished_set_is_kept_unless_forced(tool: ModuleType, images: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["vision", str(images), str(out), "--workers", "1"]
    assert tool.main(command) == 0
    before = contents(out)
    assert tool.main(command) == 2
    assert "--force replaces them" in capsys.readouterr().err
    assert contents(out) == before
    assert tool.main([*command, "--seed", "1", "--force"]) == 0
    assert contents(out) != before


def test_an_interrupted_run_continues(tool: ModuleType, images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    command = ["vision", str(images), str(out), "--samples-per-shard", "5", "--workers", "1"]
    assert tool.main(command) == 0
    whole = contents(out)
    assert tool.main([*command, "--force", "--seed", "2"]) == 0
    assert tool.main(["verify", str(out)]) == 0

    saved = tool._save_state

    def interrupt(folder: Path, job: str, results: dict) -> None:
        saved(folder, job, results)
        if len(results) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "_save_state", interrupt)
    assert tool.main([*command, "--force"]) == 130
    monkeypatch.setattr(tool, "_save_state", saved)
    assert not (out / "index.json").exists()
    assert not list(out.glob(".*.tmp"))
    assert all(scan(path) for path in out.glob("*.tar"))
    assert tool.main([*command, "--seed", "3"]) == 2  # another job does not mix with it
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.name in _state(out)}
    damaged = sorted(kept)[0]
    damaged.write_bytes(b"damaged")
    unfinished = next(name for name in whole if name.endswith(".tar") and name not in _state(out))
    (out / f".{unfinished}.tmp").write_bytes(b"left over")  # of which shard depends on how far the worker was ahead
    capsys.readouterr()
    assert tool.main(command) == 0
    assert "2 of 6 shards are finished already" in capsys.readouterr().out
    assert contents(out) == whole
    assert [path.stat().st_mtime_ns for path in sorted(kept)[1:]] == [kept[path] for path in sorted(kept)[1:]]


def _state(out: Path) -> dict:
    return json.loads((out / ".shard-state.json").read_text())["shards"]


def test_files_that_are_no_images_are_skipped_and_named(tool: ModuleType, images: Path, tmp_path: Path, capsys) -> None:
    (images / "cat" / "bad.jpg").write_text("text")
    assert tool.main(["vision", str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "bad.jpg: is no usable image" in printed.err
    assert "30 samples" in printed.out
    assert "1 files skipped" in printed.out
    for path in images.rglob("*.png"):
        path.unlink()
    assert tool.main(["vision", str(images), str(tmp_path / "none"), "--workers", "1"]) == 2
    assert "none of its 1 files could be used" in capsys.readouterr().err


def test_index_and_verify_tell_what_no_decoder_can_use(tool: ModuleType, tmp_path: Path, capsys) -> None:
    """What other programs write: dots in keys, several images to a key, labels that are none."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")

    def pack(names: list[str], content: bytes = picture.getvalue()) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    index = ["index", str(tmp_path), "--modality", "vision", "--force"]
    pack([f"clip.{number:04d}.png" for number in range(40)])
    assert tool.main(index) == 2
    assert "rename files without dots (clip-0000.png)" in capsys.readouterr().err
    pack(["a.png", "b.png", "a.cls", "b.cls"])
    assert tool.main(index) == 2
    assert "a.cls lies apart from a.png" in capsys.readouterr().err
    pack(["a.input.png", "a.target.png", "a.cls"])
    assert tool.main(index) == 2
    assert "choose a member with data.member=input.png" in capsys.readouterr().err
    assert tool.main([*index, "--member", "input.png"]) == 0
    assert "warning: 1 of 1 labels count as unlabelled" in capsys.readouterr().err
    assert tool.main(["verify", str(tmp_path), "--member", "input.png"]) == 0
    assert tool.main(["verify", str(tmp_path)]) == 2
    assert "a: holds 2 members that could be its vision input" in capsys.readouterr().err
    (tmp_path / "index.json").write_text('{"__kind__": "wids-shard-index-v1"}')
    assert tool.main(["verify", str(tmp_path)]) == 2
    assert "index.json: is not an index of these tools but another program's" in capsys.readouterr().err
    assert tool.main(index[:-1]) == 2
    assert "index.json: is the index of another program; --force replaces it" in capsys.readouterr().err


def test_a_modality_that_is_not_installed_is_not_indexed(tool: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    monkeypatch.setattr(tool.Modality, "installed", lambda: ["smell"])
    assert tool.main(["index", str(tmp_path), "--modality", "smell"]) == 2
    assert "smell: no such modality is installed (no package data2vec.smell defines it)" in capsys.readouterr().err
    entry = {"name": "a.tar", "samples": 1, "bytes": 1024, "sha256": "0" * 64}
    (tmp_path / "index.json").write_text(
        json.dumps({"format": 1, "modality": "smell", "totals": {"samples": 1, "bytes": 1024}, "shards": [entry]})
    )
    assert tool.main(["verify", str(tmp_path)]) == 2
    assert "holds 'smell', which is not installed: its samples are not looked into" in capsys.readouterr().err


def test_verify_and_index_tell_problems(tool: ModuleType, images: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert tool.main(["vision", str(images), str(out), "--samples-per-shard", "10", "--workers", "1"]) == 0
    (out / "train-000001.tar").unlink()
    assert tool.main(["verify", str(out)]) == 2
    assert "train-000001.tar: is missing" in capsys.readouterr().err
    assert tool.main(["index", str(out), "--modality", "vision"]) == 2
    assert tool.main(["index", str(out), "--modality", "vision", "--classes", "cat", "dog", "--force"]) == 0
    assert tool.main(["verify", str(out)]) == 0
    assert ShardIndex.load(out).class_names == ("cat", "dog")
    assert tool.main(["vision", str(tmp_path / "gone"), str(out)]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_dead_worker_is_one_error(tool: ModuleType, tmp_path: Path) -> None:
    task = tool.ShardTask(tmp_path / "train-000000.tar", "vision", [SimpleNamespace(key="a")], _die)
    with pytest.raises(DataError, match="a worker died"):
        list(tool.write_all([task], 1))
    assert list(tmp_path.iterdir()) == []


def _die(item: object) -> dict[str, bytes]:
    os._exit(9)


def test_a_second_command_for_the_same_folder_is_refused(
    tool: ModuleType, images: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    with only_writer(out):
        assert tool.main(["vision", str(images), str(out), "--workers", "1"]) == 2
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert f"error: {out}: in use by process {os.getpid()}" in capsys.readouterr().err
    assert tool.main(["vision", str(images), str(out), "--workers", "1"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "train-000000.tar"]


def test_ctrl_c_on_the_command_itself(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((600, 600), 90).save(folder / "0.png", compress_level=0)
    for number in range(1, 200):
        shutil.copy(folder / "0.png", folder / f"{number}.png")
    out = tmp_path / "out"
    arguments = ["vision", str(folder), str(out), "--samples-per-shard", "10", "--max-size", "500", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; the same command continues" in error
    assert "Traceback" not in error
    assert not list(out.glob(".*.tmp"))
    assert not (out / "index.json").exists()
    assert all(scan(path) for path in out.glob("*.tar"))


@pytest.mark.parametrize("command", [[], ["vision"], ["verify"], ["index"]])
def test_every_command_has_help(tool: ModuleType, command: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main([*command, "--help"])
    assert "usage: shard.py" in capsys.readouterr().out
