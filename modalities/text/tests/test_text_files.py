"""Text files become parts and parts become samples: no document is lost, doubled or cut at a part's border."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.errors import DataError
from data2vec.text.files import (
    Document,
    Documents,
    PartEncoder,
    Skipped,
    class_names,
    cut_into_parts,
    read_documents,
)
from data2vec.text.loader import unpack_ids
from data2vec.text.packing import Packing
from data2vec.text.sources import TextFile, UnusableFileError, find_text, unpack
from data2vec.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
lines = st.text(st.sampled_from("ab é\t"), max_size=12)


def texts(files: list[TextFile] | tuple[TextFile, ...], documents: Documents, size: int) -> list[str]:
    parts = cut_into_parts(files, documents, size)
    assert len({part.key for part in parts}) == len(parts)
    read = [one for part in parts for one in read_documents(part, documents)]
    return [one.text for one in read if isinstance(one, Document)]


def write(folder: Path, name: str, content: str | bytes) -> TextFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TextFile(path, name)


@given(st.lists(st.lists(lines, max_size=8), min_size=1, max_size=3), st.integers(1, 60), st.booleans())
def test_every_line_is_one_document(contents: list[list[str]], size: int, windows: bool) -> None:
    wanted = [line.strip() for content in contents for line in content if line.strip()]
    with TemporaryDirectory() as folder:
        end = "\r\n" if windows else "\n"
        files = [write(Path(folder), f"{n}.txt", end.join(content)) for n, content in enumerate(contents)]
        if any(file.path.stat().st_size for file in files):
            assert texts(files, Documents.LINE, size) == wanted
        else:
            with pytest.raises(DataError, match="files are empty"):
                cut_into_parts(files, Documents.LINE, size)


@given(st.lists(st.lists(lines, max_size=6).filter(any), min_size=1, max_size=5), st.integers(1, 60))
def test_blank_lines_part_documents(contents: list[list[str]], size: int) -> None:
    joined = "\n\n".join("\n".join(line or "x" for line in content) for content in contents)
    wanted: list[str] = []
    for content in joined.split("\n"):
        if not content.strip(" \t"):
            wanted.append("")
        else:
            wanted = [*(wanted or [""])[:-1], f"{wanted[-1]}\n{content}" if wanted else content]
    with TemporaryDirectory() as folder:
        file = write(Path(folder), "a.txt", joined)
        assert texts([file], Documents.BLANK, size) == [one.strip() for one in wanted if one.strip()]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=8),
    st.integers(1, 60),
)
def test_a_file_is_one_document(contents: list[str], size: int) -> None:
    with TemporaryDirectory() as folder:
        files = [write(Path(folder), f"{n}.txt", content) for n, content in enumerate(contents)]
        wanted = [one.removeprefix("\ufeff").replace("\r\n", "\n").strip() for one in contents]
        assert texts(files, Documents.FILE, size) == [one for one in wanted if one]


def test_a_separator_across_a_read_is_found(tmp_path: Path) -> None:
    content = "a" * (1 << 16) + "\n" + " " * 70_000 + "\nb" + "c" * (1 << 16) + "\n\nd"
    file = write(tmp_path, "a.txt", content)
    assert [len(one) for one in texts([file], Documents.BLANK, 10)] == [65536, 65537, 1]
    assert len(cut_into_parts([file], Documents.BLANK, 10)) == 3


def test_parts_are_about_as_large_as_asked_and_cross_small_files(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{n}.txt", f"line {n}\n" * 10) for n in range(40)]
    parts = cut_into_parts(files, Documents.FILE, 200)
    sizes = [sum(span.end - span.start for span in part.spans) for part in parts]
    assert all(200 <= size < 300 for size in sizes[:-1])
    one = write(tmp_path, "large.txt", "word\n" * 10_000)
    parts = cut_into_parts([one], Documents.LINE, 1_000)
    assert len(parts) == 50
    assert len({part.describe() for part in parts}) == 50
    before = parts[0].describe()
    write(tmp_path, "large.txt", "words\n" * 10_000)
    assert cut_into_parts([one], Documents.LINE, 1_000)[0].describe() != before


def test_json_lines_carry_texts_and_labels(tmp_path: Path) -> None:
    entries = [
        {"text": "good\ntext", "label": "b"},
        {"text": "x", "label": 10},
        {"text": "y", "label": 9},
        {"text": "z"},
    ]
    bad = [
        b"{",
        b"[1]",
        b'{"text": 3}',
        b'{"text": " "}',
        b'{"text": "a", "label": true}',
        b"\xff",
        b'{"text": "\\ud800"}',
    ]
    content = b"\n".join([*(json.dumps(entry).encode() for entry in entries), *bad, b"", b""])
    parts = cut_into_parts([write(tmp_path, "a.jsonl", content)], Documents.BLANK, 30)
    read = [one for part in parts for one in read_documents(part, Documents.BLANK)]
    assert [(one.text, one.label) for one in read if isinstance(one, Document)] == [
        ("good\ntext", "b"), ("x", "10"), ("y", "9"), ("z", None)
    ]  # fmt: skip
    skipped = [one.reason for one in read if isinstance(one, Skipped)]
    assert len(skipped) == len(bad)
    start = content.index(b"\n{\n") + 1
    assert skipped[0] == f"a.jsonl at byte {start}: the line is no JSON"
    assert "neither text nor a whole number" in skipped[4]
    assert class_names(parts, Documents.BLANK) == ("9", "10", "b")


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    files = [write(tmp_path, "a.txt", b"good\nbad \xff\nlast"), write(tmp_path, "b.txt", b"")]
    encode = PartEncoder(BYTES, 16, Packing.WITHIN, Documents.LINE)
    (part,) = cut_into_parts(files, Documents.LINE, 1_000)
    found = encode(part)
    assert found.skipped == ("a.txt at byte 5: is not UTF-8 (byte 4 of the document)",)
    assert len(found.samples) == 2
    (part,) = cut_into_parts(files, Documents.FILE, 1_000)
    skipped = encode_with(encode, Documents.FILE)(part).skipped
    assert skipped == ("a.txt: is not UTF-8 (byte 9 of the document)", "b.txt: is empty")
    files[0].path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        encode(part)


def encode_with(encode: PartEncoder, documents: Documents) -> PartEncoder:
    return PartEncoder(encode.tokenizer, encode.block, encode.packing, documents, encode.class_names)


@given(
    st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=10), st.integers(5, 40),
    st.sampled_from(Packing), st.integers(1, 100),
)  # fmt: skip
def test_samples_hold_the_documents(contents: list[str], block: int, packing: Packing, size: int) -> None:
    with TemporaryDirectory() as folder:
        file = TextFile(write(Path(folder), "a.txt", "\n".join(contents)).path, "a.txt", "cat")
        encode = pickle.loads(pickle.dumps(PartEncoder(BYTES, block, packing, Documents.LINE, ("cat",))))
        samples = [one for part in cut_into_parts([file], Documents.LINE, size) for one in encode(part).samples]
    blocks = [unpack_ids(members["tokens"]).tolist() for _, members in samples]
    assert "".join(BYTES.decode(one) for one in blocks) == "".join(contents)
    assert all(len(one) <= block for one in blocks)
    assert len({key for key, _ in samples}) == len(samples)
    labels = {members.get("cls") for _, members in samples}
    assert labels == ({b"0"} if packing is Packing.WITHIN else {None})


def test_folders_globs_and_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/deep/3.jsonl.gz", ".hidden/4.txt", "a/.5.txt", "a/6.png"):
        write(tmp_path, name, "x")
    listed = find_text(tmp_path, labelled=True)
    found = listed.files
    assert listed.left_out == {"hidden": 2, ".png": 1}
    assert [(file.name, file.label) for file in found] == [
        ("a/1.txt", "a"), ("a/deep/3.jsonl.gz", "a"), ("b/2.txt", "b")
    ]  # fmt: skip
    assert {file.label for file in find_text(tmp_path, labelled=False).files} == {None}
    assert [file.json for file in found] == [False, True, False]
    assert [file.path.name for file in find_text(tmp_path / "*" / "*.txt", labelled=False).files] == ["1.txt", "2.txt"]
    assert [file.name for file in find_text(tmp_path / "a" / "6.png", labelled=False).files] == ["6.png"]
    write(tmp_path, "flat.txt", "x")
    with pytest.raises(DataError, match="1 text files beside class subfolders with 3"):
        find_text(tmp_path, labelled=True)
    assert len(find_text(tmp_path, labelled=False).files) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no text files"):
        find_text(tmp_path / "empty", labelled=False)
    for name in ("gone", "*.gone"):
        with pytest.raises(DataError, match="no such file, folder or glob"):
            find_text(tmp_path / name, labelled=False)


def test_compressed_files_are_unpacked_once(tmp_path: Path) -> None:
    content = b"one\ntwo\n"
    scratch = tmp_path / "scratch"
    packed = (
        write(tmp_path, "a.txt.gz", gzip.compress(content)),
        write(tmp_path, "b.jsonl.xz", lzma.compress(b'{"text": "three"}')),
        write(tmp_path, "d.txt.bz2", bz2.compress(b"four")),
        write(tmp_path, "e.txt", gzip.compress("f\xfcnf".encode("utf-16"))),  # the ending does not say so
    )
    opened = [unpack(file, scratch) for file in packed]
    assert [file.name for file in opened] == ["a.txt", "b.jsonl", "d.txt", "e.txt"]
    assert texts(opened, Documents.LINE, 100) == ["one", "two", "three", "four", "f\xfcnf"]
    times = {path: path.stat().st_mtime_ns for path in scratch.iterdir()}
    assert [unpack(file, scratch) for file in packed] == opened
    assert {path: path.stat().st_mtime_ns for path in scratch.iterdir()} == times
    plain = write(tmp_path, "c.txt", "x")
    assert unpack(plain, scratch) is plain


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"text" * 1000, mtime=0)[:-20], b""])
@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_a_damaged_archive_is_one_error(tmp_path: Path, content: bytes, ending: str) -> None:
    file = write(tmp_path, f"a.txt{ending}", content)
    if content or ending == ".xz":
        with pytest.raises(DataError, match=r"a\.txt.*: cannot be unpacked"):
            unpack(file, tmp_path / "scratch")
        assert list((tmp_path / "scratch").iterdir()) == []
    else:  # nothing at all is an archive of nothing to gzip
        assert unpack(file, tmp_path / "scratch").path.read_bytes() == b""


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("documents", Documents)
def test_every_unicode_gives_the_same_documents(
    tmp_path: Path, encoding: str, mark: bool, documents: Documents
) -> None:
    wanted = ["gr\xfc\xdfe an alle", "second \U0001f600 line", "\u4e2d\u6587 and more words of plain text"] * 900
    content = ("\ufeff" if mark else "") + "\r\n".join(wanted)
    file = unpack(write(tmp_path, "a.txt", content.encode(encoding)), tmp_path / "scratch")
    found = "\n".join(texts([file], documents, 700)).split("\n")
    assert found == wanted
    lines = ("\ufeff" if mark else "") + "\n".join(json.dumps({"text": one}, ensure_ascii=False) for one in wanted)
    file = unpack(write(tmp_path, "b.jsonl.gz", gzip.compress(lines.encode(encoding))), tmp_path / "scratch")
    assert texts([file], documents, 700) == wanted


ZSTD = bytes.fromhex("28b52ffd0458290000") + b"hello"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ZSTD, r"is compressed with zstd; unpack it first \(unzstd"),
        (b"PK\x03\x04" + bytes(30), "is compressed with zip; unpack it first"),
        (gzip.compress(ZSTD, mtime=0), "is compressed with zstd"),
        (gzip.compress(b"text" * 1000, mtime=0)[:-20], "cannot be unpacked as gzip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "is no text: it is binary"),
        (b"\xff\xfe" + "text\n".encode("utf-16-le") + b"\x00\xd8a\0", "begins as UTF-16 and does not go on so"),
        (b"\xff\xfe" + "text\n".encode("utf-16-le") + b"\xd8", "begins as UTF-16 and does not go on so"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path, "a.txt", content)
    with pytest.raises(UnusableFileError, match=rf"a\.txt: {message}"):
        unpack(file, tmp_path / "scratch")
    assert not list((tmp_path / "scratch").glob("*"))


def test_a_document_with_a_zero_character_is_skipped(tmp_path: Path) -> None:
    plain = write(tmp_path, "a.txt", b"good text of one line\nbad \0 text\nlast line of all")
    lines = write(tmp_path, "b.jsonl", b'{"text": "good"}\n{"text": "ba\\u0000d"}\n')
    files = [unpack(file, tmp_path / "scratch") for file in (plain, lines)]
    read = [one for part in cut_into_parts(files, Documents.LINE, 100) for one in read_documents(part, Documents.LINE)]
    assert [one.reason for one in read if isinstance(one, Skipped)] == [
        "a.txt at byte 22: holds a zero character, which no text has",
        "b.jsonl at byte 17: its text holds a zero character, which no text has",
    ]
    assert len(read) == 5


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/1.txt", "x")
    write(tmp_path, "corpus/b/2.txt", "y")
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "b" / "loop").symlink_to(tmp_path / "corpus")
    found = find_text(tmp_path / "corpus", labelled=True)
    assert [(file.name, file.label) for file in found.files] == [("a/1.txt", "a"), ("b/2.txt", "b")]
    assert sum(found.left_out.values()) == 1
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UnusableFileError, match=r"nothing\.txt: cannot be read"):
        unpack(TextFile(tmp_path / "nothing.txt", "nothing.txt"), tmp_path)
