"""What users get wrong, through the command line of an experiment: one clear error each, and nothing left behind."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data2vec.core.testing import load_module

ROOT = Path(__file__).resolve().parents[1]
Commands = load_module("commands_of_tests", ROOT / "tests" / "commands.py").Commands
TINY = (
    "--sample", "transformer.depth=2", "transformer.width=32", "transformer.heads=2", "targets.top_k=2",
    "train.updates=4", "train.batch=16", "optim.warmup=1", "evaluation.tasks=[rank]", "train.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def vision_base() -> ModuleType:
    return load_module("vision_base_for_bad_input", ROOT / "experiments" / "vision_base.py")


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def images(count: int, first: int = 0) -> dict[str, bytes]:
    members = {}
    for i in range(first, first + count):
        members |= {f"{i:04d}.png": png(i), f"{i:04d}.cls": str(i % 10).encode()}
    return members


@pytest.fixture
def run(vision_base: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    return Commands(vision_base, TINY, tmp_path / "run", capsys, leaves=())


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("shards") / "train-0000.tar", images(64))


def test_no_such_shard(run: Any, tmp_path: Path) -> None:
    error = run.refused(f"data.train={tmp_path}/train-{{0000..0003}}.tar")
    assert f"no shard matches '{tmp_path}/train-{{0000..0003}}.tar'" in error


def test_some_shards_are_missing(run: Any, shard: Path) -> None:
    error = run.refused(f"data.train={shard.parent}/train-{{0000..0002}}.tar")
    assert "2 of 3 shards" in error
    assert "train-0001.tar" in error


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_shard(run: Any, tmp_path: Path, content: bytes | None) -> None:
    path = write_tar(tmp_path / "empty.tar", {})
    if content is not None:
        path.write_bytes(content)
    assert str(path) in run.refused(f"data.train={path}")


def test_a_truncated_shard(run: Any, shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(shard.read_bytes()[:50_000])
    error = run.refused(f"data.train={path}")
    assert str(path) in error
    assert "truncated" in error


def test_too_few_samples_for_one_batch(run: Any, shard: Path) -> None:
    error = run.refused(f"data.train={shard}", "train.batch=512")
    assert "one update needs train.batch=512: lower train.batch" in error


def test_samples_that_are_no_images(run: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "noise.tar", {f"{i:04d}.png": b"no image" for i in range(64)})
    code, out, err = run(f"data.train={path}", f"train.folder={run.folder}")
    assert code == 2
    assert err.count("error:") == 1
    assert "all 16 samples of a batch are broken" in err
    assert "noise.tar" in err
    assert "Traceback" not in err + out
    assert not (run.folder / "checkpoints").exists()


def test_a_broken_sample_is_skipped_and_named(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = images(200)
    members["0077.png"] = members["0077.png"][:60]
    path = write_tar(tmp_path / "mixed.tar", members)
    with caplog.at_level(logging.WARNING):
        code, _, _ = run(
            "train.updates=13", f"data.train={path}", f"data.validation={path}", f"train.folder={run.folder}"
        )  # fmt: skip
    assert code == 0
    named = [record.message for record in caplog.records if "broken sample" in record.message]
    assert len([line for line in named if line.startswith("broken sample 1 skipped") and "0077" in line]) == 1
    assert (run.folder / "report.html").is_file()


def test_too_many_broken_samples_stop_the_run(run: Any, tmp_path: Path) -> None:
    members = images(64)
    for i in range(0, 64, 4):
        members[f"{i:04d}.png"] = b"no image"
    path = write_tar(tmp_path / "mixed.tar", members)
    code, _, err = run(f"data.train={path}", f"data.validation={path}", f"train.folder={run.folder}")
    assert code == 2
    assert re.search(r"\d+ of \d+ samples are broken, more than data\.max_broken=0\.01 allows", err)
    assert err.count("error:") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1e-3", "optim.lrr=1e-3: no such setting; did you mean optim.lr?"),
        ("train.bach=3", "did you mean train.batch?"),
        ("transformer.dropout=much", "transformer.dropout=much: expected a number"),
        ("vision.image_size=30", "vision.image_size=30"),
        ("targets.top_k=9", "targets.top_k=9: larger than transformer.depth=2; choose 1 to 2"),
        ("train.device=nonsense", "train.device=nonsense: not usable here"),
        ("justtext", "justtext: not of the form key=value"),
        ("train.resume=/nowhere/at/all", "/nowhere/at/all: not a readable checkpoint"),
    ],
)
def test_one_wrong_setting(run: Any, shard: Path, override: str, expected: str) -> None:
    assert expected in run.refused(f"data.train={shard}", override)


def test_all_wrong_settings_are_named_together(run: Any) -> None:
    error = run.refused("optim.lrr=1", "transformer.dropout=much", "teacher.decy_start=0.5")
    assert "3 settings are wrong:" in error
    for part in ("optim.lrr", "transformer.dropout=much", "teacher.decay_start?"):
        assert part in error
    error = run.refused("transformer.dropout=1.5", "vision.image_size=30", "data.workers=-1")
    assert "3 settings are wrong:" in error


def test_a_folder_that_cannot_be_made(run: Any, shard: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for data in ((), (f"data.train={shard}",)):
            error = run.refused(f"train.folder={folder}", *data)
            assert f"train.folder={folder}: {tmp_path}/file is no folder" in error
    assert (tmp_path / "file").read_text() == "keep me"


def test_another_configuration(run: Any, shard: Path) -> None:
    place = f"train.folder={run.folder}"
    assert run(f"data.train={shard}", place, "train.max_minutes=1e-9")[0] == 0
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    code, out, err = run(f"data.train={shard}", place, "optim.lr=0.3", "vision.mask.ratio=0.5")
    assert code == 2
    assert "was made with another configuration" in err
    assert "optim.lr: 0.002 there, 0.3 now" in err
    assert "vision.mask.ratio: 0.6 there, 0.5 now" in err
    assert err.count("error:") == 1
    assert "Traceback" not in err + out
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pth", "pkl", "pt"])
def test_pickled_members_are_not_executed(run: Any, tmp_path: Path, extension: str) -> None:
    trap = tmp_path / "executed"
    payload = pickle.dumps(Payload(trap))
    members = {}
    for name, data in images(64).items():
        members[name] = data
        if name.endswith("png"):
            members[name.replace("png", extension)] = payload
    path = write_tar(tmp_path / "trap.tar", members)
    code, _, err = run(f"data.train={path}", f"train.folder={run.folder}", "train.max_minutes=1e-9")
    assert not trap.exists()
    assert "Traceback" not in err
    assert code == 0 or err.count("error:") == 1
    pickle.loads(payload)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("form", ["pipe:touch {trap}", "pipe:touch {trap}; cat x.tar", "ssh://host/{trap}"])
def test_commands_in_names_are_not_executed(run: Any, tmp_path: Path, form: str) -> None:
    trap = tmp_path / "executed"
    error = run.refused(f"data.train={form.format(trap=trap)}")
    assert "nothing else is opened or executed" in error
    assert not trap.exists()


def test_a_configuration_in_a_run_folder_is_not_executed(run: Any, shard: Path, tmp_path: Path) -> None:
    place = f"train.folder={run.folder}"
    assert run(f"data.train={shard}", place, "train.max_minutes=1e-9")[0] == 0
    (state,) = run.folder.glob("checkpoints/update-*/state.json")
    trap = tmp_path / "executed"
    text = state.read_text()
    assert "name: vision_base_sample" in text
    state.write_text(text.replace("name: vision_base_sample", f"name: !!python/object/apply:os.mkdir ['{trap}']"))
    code, _, err = run(f"data.train={shard}", place)
    assert code == 2
    assert "Traceback" not in err
    assert not trap.exists()
