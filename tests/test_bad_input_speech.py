"""Audio that cannot be used, through the commands a user types: a counted skip or one clear error, nothing lost."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from data2vec.core.data.index import ShardIndex
from data2vec.core.testing import load_module, load_script
from data2vec.core.training.monitor import read_metrics

ROOT = Path(__file__).resolve().parents[1]
Commands = load_module("commands_of_tests", ROOT / "tests" / "commands.py").Commands
RATE = 16_000
TINY = (
    "--sample", "speech.channels=[16,16,16,16,16,16,16]", "speech.kernels=[10,3,3,3,3,2,2]",
    "speech.strides=[5,2,2,2,2,2,2]", "speech.mel=false", "speech.positions.depth=1", "speech.positions.groups=2",
    "speech.audio.min_length=1600", "speech.audio.max_length=8000", "transformer.depth=1", "transformer.width=16",
    "transformer.heads=2", "targets.top_k=1", "optim.warmup=1", "train.updates=4", "train.batch=8",
    "train.micro_length=null", "train.batch_length=null", "train.device=cpu", "data.workers=0",
    "evaluation.tasks=[rank]",
)  # fmt: skip

Members = Mapping[str, bytes]


def noise(number: int, length: int, channels: int = 1) -> np.ndarray:
    """(L,) or (L, C) float32."""
    shape = (length, channels) if channels > 1 else (length,)
    return (0.1 * np.random.default_rng(number).standard_normal(shape)).astype(np.float32)


def sound(waveform: np.ndarray, rate: int = RATE, form: str = "FLAC", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=form, subtype=subtype)
    return file.getvalue()


def good(number: int) -> Members:
    return {"flac": sound(noise(number, 2000 + 50 * number)), "cls": str(number % 2).encode()}


def cut_flac(number: int) -> Members:
    """Its header promises what the file no longer holds."""
    data = sound(noise(number, 6000))
    return {"flac": data[: len(data) // 2]}


def not_finite(number: int) -> Members:
    waveform = noise(number, 4000)
    waveform[1000] = np.nan
    return {"wav": sound(waveform, form="WAV", subtype="FLOAT")}


BAD: dict[str, tuple[Callable[[int], Members], str]] = {
    "empty": (lambda number: {"flac": b""}, "the file is empty"),
    "without audio": (lambda number: {"wav": sound(np.zeros(0, np.float32), form="WAV")}, "holds no audio"),
    "text": (lambda number: {"flac": b"this is no audio"}, "are no usable audio"),
    "cut": (cut_flac, "damaged or cut short"),
    "shorter than the receptive field": (
        lambda number: {"flac": sound(noise(number, 300))}, "300 samples at 16 kHz; at least 1600 are needed"
    ),
    "silent": (lambda number: {"flac": sound(np.zeros(4000, np.float32))}, "silent: its variance is 0.0e+00"),
    "not finite": (not_finite, "values that are not finite"),
    "image": (lambda number: {"png": b"\x89PNG"}, "holds no speech input: its members are .png"),
}  # fmt: skip
# What does not cost a clip: who needs no labels does not ask for them.
UNLABELLED: dict[str, tuple[Callable[[int], Members], str]] = {
    "class": (lambda number: {**good(number), "cls": b"loud"}, "its label b'loud' is no class number"),
    "frames": (lambda number: {**good(number), "frames": b"0 one\n"}, "frames: must hold lines of a first sample"),
}


def write_tar(path: Path, samples: Mapping[str, Members]) -> Path:
    """As another program would write it: without an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def speech_base() -> ModuleType:
    return load_script(ROOT / "experiments" / "speech_base.py")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script(ROOT / "tools" / "shard.py")


@pytest.fixture
def run(speech_base: ModuleType, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    return Commands(speech_base, TINY, tmp_path / "run", capsys, tools={"shard": tool})


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 clips of 2,000 to 4,950 samples, without an index."""
    return write_tar(tmp_path_factory.mktemp("good") / "train-0.tar", {f"{n:03d}": good(n) for n in range(60)})


def everything(folder: Path) -> Path:
    """60 good clips, one of each bad kind, and one with each kind of label that is none."""
    samples = {f"good{number:03d}": good(number) for number in range(60)}
    samples |= {f"bad {name}": make(number) for number, (name, (make, _)) in enumerate((BAD | UNLABELLED).items())}
    return write_tar(folder / "train-0.tar", samples)


@pytest.mark.parametrize("name", BAD)
def test_clips_of_which_none_can_be_used(run: Any, tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = write_tar(tmp_path / "shards" / "train-0.tar", {f"{number:03d}": make(number) for number in range(20)})
    error = run.refused(f"data.train={path}")
    broken = "20 of 20 samples cannot be used;" if name == "image" else "all 8 samples of a batch are broken,"
    assert f"{broken} the first:" in error
    assert reason in error
    assert str(path) in error


def test_each_bad_clip_is_skipped_named_and_counted(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = everything(tmp_path / "shards")
    data = (f"data.train={path}", f"data.validation={path}", "data.max_broken=0.2")
    with caplog.at_level(logging.WARNING):
        code, printed, err = run(*data, "train.batch=35", "train.updates=2")  # one epoch
    assert code == 0, err
    named = [record.message for record in caplog.records if record.message.startswith("broken sample")]
    counted = named[: len(BAD)]
    assert [re.match(r"broken sample (\d+) skipped", line)[1] for line in counted] == [  # type: ignore[index]
        str(number) for number in range(1, len(BAD) + 1)
    ]
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in counted if f"bad {name}:" in line]
        assert reason in line
        assert str(path) in line
    # Evaluation uses clips that are too short for training where they give two frames.
    assert "good" not in "".join(named)
    said = [record.message for record in caplog.records if "unlabelled" in record.message]
    for _, reason in UNLABELLED.values():  # though two sets of shards have them
        assert len([line for line in said if reason in line]) == 1
        assert reason.replace(" ", "") in re.sub(r"\s", "", printed)  # beside the probes, which need labels
    assert [line["update"] for line in read_metrics(run.folder / "metrics.jsonl")] == [2]
    assert (run.folder / "report.html").is_file()


def test_batches_by_length_leave_out_what_is_too_short(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = everything(tmp_path / "shards")
    assert run.tool("shard", "index", str(path.parent), "--modality", "speech")[0] == 0
    lengths = ShardIndex.load(path.parent).shards[0].lengths
    assert len(lengths) == 60 + len(BAD) + len(UNLABELLED)
    unknown = ("empty", "without audio", "text", "image")
    assert sorted(lengths)[: len(unknown) + 1] == [0] * len(unknown) + [300]
    budget = ("train.micro_length=40000", "data.max_broken=0.2", "train.updates=12", "train.max_minutes=1")
    with caplog.at_level(logging.INFO):
        code, _, err = run(f"data.train={path}", f"data.validation={path}", *budget)
    assert code == 0, err
    messages = [record.message for record in caplog.records]
    total = 60 + len(BAD) + len(UNLABELLED)
    assert f"{len(unknown) + 1} of {total} samples are shorter than 1600" in "\n".join(messages)
    broken = {name for name in BAD for line in messages if "skipped" in line and f"bad {name}:" in line}
    assert broken == {"cut", "silent", "not finite"}


def test_too_many_bad_clips_stop_the_run(run: Any, tmp_path: Path) -> None:
    path = everything(tmp_path / "shards")
    code, _, err = run(f"data.train={path}", f"data.validation={path}", "train.batch=35")
    assert code == 2
    assert "1 of 70 samples cannot be used, more than data.max_broken=0.01 allows; the first: " in err
    assert "bad image: holds no speech input" in err
    code, _, err = run(f"data.train={path}", f"data.validation={path}", "train.batch=35", "data.max_broken=0.05")
    assert code == 2
    assert re.search(r"\d+ of 70 samples are broken, more than data\.max_broken=0\.05 allows; the last: ", err)
    assert "Traceback" not in err


def test_stereo_and_odd_rates_are_used(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From files to a trained model, under a budget of lengths at 16 kHz."""
    kinds = ((1, 22_050, "WAV"), (2, 44_100, "FLAC"), (2, 8_000, "WAV"), (6, 48_000, "WAV"), (1, 11_025, "OGG"))
    for number in range(30):
        channels, rate, form = kinds[number % len(kinds)]
        path = tmp_path / "audio" / f"{number}.{form.lower()}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sound(noise(number, rate // 4, channels), rate, form))
    out = tmp_path / "shards"
    code, printed, _ = run.tool("shard", "speech", str(tmp_path / "audio"), str(out), "--workers", "1")
    assert code == 0
    assert "30 samples" in printed
    assert "0 files skipped" in printed
    assert set(ShardIndex.load(out).shards[0].lengths) == {RATE // 4}
    with caplog.at_level(logging.WARNING):
        code, _, err = run(f"data.train={out}/train-*.tar", "train.micro_length=16000", "train.max_minutes=1e-9")
    assert code == 0, err
    assert not [record for record in caplog.records if "broken" in record.message]


def test_files_become_shards_or_are_named(run: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "audio", tmp_path / "shards"
    for number, (name, (make, _)) in enumerate((BAD | UNLABELLED).items()):
        for extension, data in make(number).items():
            if extension in ("flac", "wav"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / f"x.{extension}").write_bytes(data)
    code, printed, err = run.tool("shard", "speech", str(folder), str(out), "--workers", "1")
    assert code == 0
    assert "6 files skipped" in printed
    for name in ("empty", "without audio", "text", "cut", "silent", "not finite"):
        assert f"{folder}/{name}/x." in err
    # Clips that are too short for one model may serve another: the decoder decides.
    kept = {"shorter than the receptive field", "class", "frames"}
    assert ShardIndex.load(out).samples == len(kept)
    assert run.tool("shard", "verify", str(out))[0] == 0


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"no audio", ".hidden.flac": b"x"}])
def test_a_folder_without_audio(run: Any, tmp_path: Path, content: dict[str, bytes]) -> None:
    folder, out = tmp_path / "audio", tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    for name, data in content.items():
        (folder / "deep" / name).write_bytes(data)
    code, _, err = run.tool("shard", "speech", str(folder), str(out))
    assert code == 2
    assert err.startswith(f"error: {folder}: has no audio (.flac, .wav, .ogg, .opus, .mp3, ")
    assert err.endswith("; it holds 1 .txt, 1 hidden\n" if content else ")\n")
    assert not out.exists()


def test_a_clip_above_the_budget(run: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shards" / "train-0.tar", {f"{n}": {"flac": sound(noise(n, 9000))} for n in range(20)})
    assert run.tool("shard", "index", str(path.parent), "--modality", "speech")[0] == 0
    error = run.refused(f"data.train={path}", "train.micro_length=5000")
    assert "8000" in error
    assert "train.micro_length=5000" in error
    # Clips are cropped to what fits: then they are used.
    assert run(f"data.train={path}", "train.micro_length=5000", "speech.audio.max_length=5000",
               "train.max_minutes=1e-9")[0] == 0  # fmt: skip


def test_lengths_that_no_index_gives(run: Any, shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "shards" / shard.name
    path.parent.mkdir()
    path.write_bytes(shard.read_bytes())
    budget = (f"data.train={path}", "train.micro_length=40000")
    advice = "tools/shard.py index FOLDER --modality speech"
    error = run.refused(*budget)
    assert f"{path}: no index gives the lengths of its samples, which train.micro_length needs" in error
    assert advice in error
    assert run.tool("shard", "index", str(path.parent), "--modality", "speech")[0] == 0
    index = path.parent / "index.json"
    complete = index.read_bytes()
    without = json.loads(complete)
    for entry in without["shards"]:
        del entry["lengths"]
    del without["totals"]["length"]
    index.write_text(json.dumps(without))
    assert advice in run.refused(*budget)
    assert run(f"data.train={path}", "train.max_minutes=1e-9")[0] == 0  # no budget, no lengths needed
    assert run.tool("shard", "index", str(path.parent), "--modality", "speech", "--force")[0] == 0
    assert index.read_bytes() == complete


def test_shards_of_another_modality(run: Any, shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "shards" / shard.name
    path.parent.mkdir()
    path.write_bytes(shard.read_bytes())
    code, _, err = run.tool("shard", "index", str(path.parent), "--modality", "vision")
    assert code == 2
    assert "60 of 60 samples cannot be used" in err
    assert "holds no vision input" in err
    assert run.tool("shard", "index", str(path.parent), "--modality", "speech")[0] == 0
    index = path.parent / "index.json"
    index.write_text(index.read_text().replace('"speech"', '"vision"'))
    assert "holds vision, but" in run.refused(f"data.train={path}")
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["speech.audio.min_length=700"], "speech.audio.min_length=700: shorter than 2 frames; choose 720 or more"),
        (["speech.audio.max_length=1000"], "speech.audio.max_length=1000: below the shortest clip of 1600 samples"),
        (["speech.kernels=[10,3]"], "7 channels, 2 kernels, 7 strides; give as many of each"),
        (["speech.positions.groups=3"], "speech.positions.groups=3: does not divide transformer.width=16"),
        (["speech.predictor.kind=conv2d"], "speech.predictor.kind=conv2d: speech has one dimension"),
        (["speech.mask.ratio=10"], "speech.mask.ratio=10.0: must be above 0 and below speech.mask.length=5"),
        (["train.micro_length=16000", "train.micro_batch=4"], "train.micro_batch=4: train.micro_length=16000 decides"),
        (["train.batch_length=16000"], "train.batch_length=16000: needs train.micro_length"),
    ],
)
def test_wrong_settings(run: Any, shard: Path, overrides: list[str], expected: str) -> None:
    assert expected in run.refused(f"data.train={shard}", *overrides)
    assert not run.folder.exists()
