"""tools/shard.py speech: from audio files to shards, with lengths in the index, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from data2vec.core.batch import Sample
from data2vec.core.data.index import ShardIndex
from data2vec.core.data.tar import read, scan
from data2vec.core.testing import load_module
from data2vec.speech.loader import AudioConfig, AudioDecoder

TOOL = Path(__file__).parents[1] / "tools" / "shard.py"
NOISE = np.random.default_rng(0).normal(size=24_000).clip(-4, 4) / 5


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("shard_tool_for_speech", TOOL)


def write(path: Path, length: int = 8000, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, NOISE[:length], rate)


def samples(out: Path, pattern: str = "*.tar") -> dict[str, Sample]:
    found = {}
    for path in sorted(out.glob(pattern)):
        with path.open("rb") as file:
            for entry in scan(path):
                found[entry.key] = read(file.fileno(), entry, path.name)
    return found


def test_a_folder_of_classes_becomes_a_verified_set(tool: ModuleType, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "audio", tmp_path / "out"
    for number in range(24):
        write(folder / ("yes", "no")[number % 2] / f"{number}.{('flac', 'wav', 'ogg')[number % 3]}", 4000 + 10 * number)
    write(folder / "yes" / "slow.wav", 4000, 8000)
    command = ["speech", str(folder), str(out), "--samples-per-shard", "10", "--validation", "0.2", "--workers", "2"]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    lengths = sum(4000 + 10 * number for number in range(24)) + 8000
    assert "25 samples in 3 shards" in printed
    assert f"{lengths:,} samples at 16 kHz" in printed
    index = ShardIndex.load(out)
    assert (index.modality, index.class_names) == ("speech", ("no", "yes"))
    assert json.loads((out / "index.json").read_bytes())["totals"]["length"] == lengths == index.length
    decode = AudioDecoder(AudioConfig(min_length=400, max_length=None), train=False, minimum=400)
    found = samples(out)
    assert len(found) == 25
    for key, sample in found.items():
        example = decode(sample, 0)
        folder_name, number = key.split("/")
        assert example.label == ("no", "yes").index(folder_name)
        assert len(example.inputs) == (8000 if number == "slow" else 4000 + 10 * int(number))
    for shard in index.shards:
        lengths_there = [len(decode(s, 0).inputs) for s in samples(out, shard.name).values()]
        assert list(shard.lengths) == lengths_there
    assert tool.main(["verify", str(out)]) == 0
    assert tool.main(["index", str(out), "--modality", "speech", "--classes", "no", "yes", "--force"]) == 0
    assert ShardIndex.load(out) == index


def test_librispeech_keeps_its_texts(tool: ModuleType, tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121"
    for number in range(4):
        write(chapter / f"84-121-{number:04d}.flac")
    (chapter / "84-121.trans.txt").write_text("".join(f"84-121-{n:04d} WORD NUMBER {n}\n" for n in range(4)))
    out = tmp_path / "out"
    assert tool.main(["speech", str(tmp_path / "LibriSpeech"), str(out), "--workers", "1"]) == 0
    found = samples(out)
    assert sorted(found) == [f"dev-clean/84/121/84-121-{number:04d}" for number in range(4)]
    for key, sample in found.items():
        assert sample.members["txt"].decode() == f"WORD NUMBER {int(key[-4:])}"
        assert set(sample.members) == {"flac", "txt"}
    assert ShardIndex.load(out).class_names == ()


def test_a_manifest_and_its_texts(tool: ModuleType, tmp_path: Path, capsys) -> None:
    write(tmp_path / "audio" / "a.flac", 8000)
    write(tmp_path / "audio" / "b.flac", 9000)
    manifest, out = tmp_path / "train.tsv", tmp_path / "out"
    manifest.write_text(f"{tmp_path / 'audio'}\na.flac\t8000\nb.flac\t9000\ngone.flac\t1\n")
    (tmp_path / "train.wrd").write_text("first\nsecond\nthird\n")
    texts = ["--transcripts", str(tmp_path / "train.wrd")]
    assert tool.main(["speech", str(manifest), str(out), "--workers", "1", *texts]) == 0
    printed = capsys.readouterr()
    assert "gone.flac: cannot be read" in printed.err
    assert "2 samples" in printed.out
    assert "1 files skipped" in printed.out
    assert {key: sample.members["txt"] for key, sample in samples(out).items()} == {"a": b"first", "b": b"second"}
    manifest.write_text(f"{tmp_path / 'audio'}\n../secret.flac\t8000\n")
    assert tool.main(["speech", str(manifest), str(tmp_path / "other")]) == 2
    assert "must not leave that folder" in capsys.readouterr().err


def test_files_that_are_no_audio_are_skipped_and_counted(tool: ModuleType, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "audio", tmp_path / "out"
    write(folder / "good.flac")
    (folder / "text.wav").write_text("no audio")
    (folder / "cut.flac").write_bytes((folder / "good.flac").read_bytes()[:4000])
    assert tool.main(["speech", str(folder), str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "text.wav: 8 bytes are no usable audio" in printed.err
    assert "cut.flac: " in printed.err
    assert "1 samples" in printed.out
    assert "2 files skipped" in printed.out
    (folder / "good.flac").unlink()
    assert tool.main(["speech", str(folder), str(tmp_path / "none"), "--workers", "1"]) == 2
    assert "none of its 2 files could be used" in capsys.readouterr().err
    assert tool.main(["speech", str(tmp_path / "gone"), str(tmp_path / "none")]) == 2
    assert "no such folder of audio" in capsys.readouterr().err


def test_reencoding_and_other_settings_are_another_job(tool: ModuleType, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "audio", tmp_path / "out"
    write(folder / "a.wav", 8000, 8000)
    assert tool.main(["speech", str(folder), str(out), "--workers", "1", "--reencode"]) == 0
    (sample,) = samples(out).values()
    assert set(sample.members) == {"flac"}
    assert ShardIndex.load(out).length == 16_000
    assert tool.main(["speech", str(folder), str(out), "--workers", "1"]) == 2
    assert "--force replaces them" in capsys.readouterr().err


def test_every_file_is_written_skipped_or_left_out(tool: ModuleType, tmp_path: Path, capsys) -> None:
    folder, out, elsewhere = tmp_path / "audio", tmp_path / "out", tmp_path / "elsewhere"
    for name in ("a.flac", "b.wav", "c.ogg", "d.mp3", "e.aiff", "f.au", "g.w64", "h.caf", "cut.wav"):
        write(folder / "84" / name)
    soundfile.write(folder / "84" / "i.opus", NOISE[:8000], 16_000, format="OGG", subtype="OPUS")
    write(elsewhere / "linked.flac")
    (folder / "85").symlink_to(elsewhere)
    whole = (folder / "84" / "cut.wav").read_bytes()
    (folder / "84" / "cut.wav").write_bytes(whole[: len(whole) // 2])
    at = whole.index(b"data") + 4
    (folder / "84" / "crashed.wav").write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    (folder / "84" / "84.trans.txt").write_bytes("a GR\xdcSSE\n".encode("utf-16"))
    (folder / "84" / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (folder / "README.md").write_text("about")
    assert tool.main(["speech", str(folder), str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "cut.wav: the file is cut short: its header says 16000 bytes of audio, 7978 are there" in printed.err
    assert "15 files found: 11 written, 1 skipped, 3 left out (1 .m4a, 1 .md, 1 read as transcripts)" in printed.out
    found = samples(out)
    kinds = {key: next(iter(set(one.members) - {"txt"})) for key, one in found.items()}
    assert kinds == {
        "84/a": "flac", "84/b": "wav", "84/c": "ogg", "84/d": "mp3", "84/e": "flac", "84/f": "flac", "84/g": "flac",
        "84/h": "flac", "84/i": "opus", "84/crashed": "wav", "85/linked": "flac",
    }  # fmt: skip
    assert found["84/a"].members["txt"].decode() == "GR\xdcSSE"
    decode = AudioDecoder(AudioConfig(min_length=400, max_length=None), train=False, minimum=400)
    assert {len(decode(one, 0).inputs) for one in found.values()} == {8000}
    assert tool.main(["verify", str(out)]) == 0
