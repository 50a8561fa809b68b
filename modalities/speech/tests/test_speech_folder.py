"""Audio folders, LibriSpeech's layout and manifests as they become clips, and every kind of bad input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data2vec.core.errors import DataError, SampleError
from data2vec.speech.audio import decode, read_header
from data2vec.speech.folder import list_audio, list_audio_folder, list_manifest, read_audio_file

NOISE = np.random.default_rng(0).normal(size=2000).clip(-4, 4) / 5


def write(path: Path, rate: int = 16_000, channels: int = 1, length: int = 2000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([NOISE[:length]] * channels, axis=1), rate)
    return path


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name in ("yes/b.flac", "no/deep/a.wav", "yes/a.flac", ".hidden/x.flac", "yes/.y.flac"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    found = list_audio(tmp_path)
    assert found.class_names == ("no", "yes")
    assert [(clip.key, clip.label, clip.text) for clip in found.clips] == [
        ("no/deep/a", 0, None),
        ("yes/a", 1, None),
        ("yes/b", 1, None),
    ]
    members = read_audio_file(found.clips[1])
    assert members == {"flac": (tmp_path / "yes/a.flac").read_bytes(), "cls": b"1"}


def test_a_flat_folder_has_no_classes_and_keys_are_unique(tmp_path: Path) -> None:
    for name in ("a.b.flac", "a_b.flac", "a.b.wav", "__x.flac"):
        write(tmp_path / name)
    found = list_audio_folder(tmp_path)
    assert found.class_names == ()
    assert sorted(clip.key for clip in found.clips) == ["a_b", "a_b-2", "a_b-3", "x__x"]
    assert all(clip.label is None for clip in found.clips)


def test_librispeech(tmp_path: Path) -> None:
    for name in ("84/121/84-121-0000.flac", "84/121/84-121-0001.flac", "85/9/85-9-0000.flac"):
        write(tmp_path / name)
    (tmp_path / "84/121/84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n84-121-0009 NOBODY\n\n")
    found = list_audio(tmp_path)
    assert found.class_names == ()
    assert [clip.text for clip in found.clips] == ["GO DO YOU HEAR", None, None]
    assert read_audio_file(found.clips[0])["txt"] == b"GO DO YOU HEAR"
    assert set(read_audio_file(found.clips[1])) == {"flac"}


def test_a_folder_with_transcripts(tmp_path: Path) -> None:
    write(tmp_path / "audio/a.flac")
    write(tmp_path / "audio/b.flac")
    table = tmp_path / "texts.tsv"
    table.write_text("b.flac\tGr\u00fc\u00dfe an alle\n\n", encoding="utf-8")
    found = list_audio(tmp_path / "audio", table)
    assert [clip.text for clip in found.clips] == [None, "Gr\u00fc\u00dfe an alle"]
    assert read_audio_file(found.clips[1])["txt"].decode() == "Gr\u00fc\u00dfe an alle"
    table.write_text("c.flac\tx\n")
    with pytest.raises(DataError, match="none of its 1 paths is a clip"):
        list_audio(tmp_path / "audio", table)
    table.write_text("b.flac x\n")
    with pytest.raises(DataError, match="line 1: no tab"):
        list_audio(tmp_path / "audio", table)


def test_a_manifest_with_lengths_as_fairseq_writes_it(tmp_path: Path) -> None:
    write(tmp_path / "audio/x/a.flac")
    write(tmp_path / "audio/b.wav", 8000)
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{tmp_path}/audio\nx/a.flac\t2000\nb.wav\t1999\n")
    found = list_audio(manifest)
    assert [(clip.key, clip.frames, clip.text) for clip in found.clips] == [("x/a", 2000, None), ("b", 1999, None)]
    assert set(read_audio_file(found.clips[0])) == {"flac"}
    with pytest.raises(SampleError, match="holds 2000 samples, its manifest says 1999"):
        read_audio_file(found.clips[1])
    texts = tmp_path / "train.wrd"
    texts.write_text("ONE\nTWO\n")
    assert [clip.text for clip in list_audio(manifest, texts).clips] == ["ONE", "TWO"]
    texts.write_text("ONE\n")
    with pytest.raises(DataError, match="1 lines for 2 clips"):
        list_audio(manifest, texts)


def test_a_manifest_with_texts_and_a_relative_root(tmp_path: Path) -> None:
    write(tmp_path / "audio/a.flac")
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"audio\na.flac\thello there\n{tmp_path}/audio/a.flac\t42\n")
    found = list_manifest(manifest)
    assert [(clip.key, clip.text) for clip in found.clips] == [("a", "hello there"), ("a-2", "42")]
    assert read_audio_file(found.clips[1])["txt"] == b"42"


@pytest.mark.parametrize("name", ["../secret.flac", "x/../../secret.flac", "/etc/secret.flac", "", ".", "a\0.flac"])
def test_a_manifest_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "secret.flac")
    (tmp_path / "audio").mkdir()
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"audio\n{name}\t2000\n")
    with pytest.raises(DataError, match=r"train.tsv, line 2: .* must not leave that folder"):
        list_manifest(manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be the folder"),
        ("gone\na.flac\t1\n", "first line must be the folder .* not 'gone'"),
        (".\n", "names no clip"),
        (".\na.flac\n", "line 2: no tab"),
        (".\n" + "a" * 200_000, "no list of clips"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    manifest = tmp_path / "train.tsv"
    manifest.write_text(text)
    with pytest.raises(DataError, match=message):
        list_manifest(manifest)
    manifest.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no text in UTF-16"):
        list_manifest(manifest)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_audio(tmp_path / "gone")
    with pytest.raises(DataError, match="has no audio"):
        list_audio(tmp_path)
    write(tmp_path / "a.flac")
    write(tmp_path / "yes/b.flac")
    with pytest.raises(DataError, match="1 clips beside class subfolders with 1"):
        list_audio(tmp_path)


def test_files_that_are_no_clips(tmp_path: Path) -> None:
    write(tmp_path / "whole.flac")
    (tmp_path / "text.flac").write_text("text")
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:1500])
    clips = {clip.key: clip for clip in list_audio(tmp_path).clips}
    for key in ("text", "cut"):
        with pytest.raises(SampleError, match=rf"{key}\.flac: "):
            read_audio_file(clips[key])
    assert set(read_audio_file(clips["cut"], verify=False)) == {"flac"}
    before = clips["whole"].describe()
    (tmp_path / "whole.flac").unlink()
    with pytest.raises(SampleError, match=r"whole\.flac: cannot be read"):
        read_audio_file(clips["whole"])
    assert clips["whole"].describe() != before
    (tmp_path / "sound.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    manifest = tmp_path / "train.tsv"
    manifest.write_text(".\nsound.m4a\t2000\n")
    with pytest.raises(SampleError, match=r"sound\.m4a: is none of \.flac"):
        read_audio_file(list_manifest(manifest).clips[0])


def test_reencoding_gives_what_decoding_would(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 44_100, channels=2)
    write(tmp_path / "b.wav")
    wide, plain = list_audio(tmp_path).clips
    members = read_audio_file(wide, reencode=True)
    assert set(members) == {"flac"}
    header = read_header(members["flac"])
    assert (header.rate, header.channels) == (16_000, 1)
    assert soundfile.info(io.BytesIO(members["flac"])).subtype == "PCM_16"
    assert np.abs(decode(members["flac"]) - decode((tmp_path / "a.wav").read_bytes()).clip(-1, 1)).max() <= 2**-15
    assert read_audio_file(plain, reencode=True) == {"wav": (tmp_path / "b.wav").read_bytes()}
