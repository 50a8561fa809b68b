"""Text that cannot be used, through the commands a user types: a counted skip or one clear error, nothing lost."""

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

from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.tar import read, scan
from data2vec.core.testing import load_module, load_script
from data2vec.text import Tokenizer
from data2vec.text.loader import pack_ids, unpack_ids
from data2vec.text.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
Commands = load_module("commands_of_tests", ROOT / "tests" / "commands.py").Commands
BLOCK, VOCABULARY = 32, 270
TINY = (
    "--sample", f"text.vocabulary={VOCABULARY}", f"text.block={BLOCK}", "transformer.depth=1", "transformer.width=16",
    "transformer.heads=2", "targets.top_k=1", "optim.warmup=1", "train.updates=4", "train.batch=8",
    "train.device=cpu", "data.workers=0", "evaluation.tasks=[rank]",
)  # fmt: skip

Members = Mapping[str, bytes]


def ids(number: int, length: int = BLOCK, most: int = 261) -> np.ndarray:
    """A block that the tokenizer of bytes has: 0, bytes, 2."""
    inner = np.random.default_rng(number).integers(5, most, length - 2)
    return np.array([0, *inner, 2])


def block(values: np.ndarray) -> Members:
    return {"tokens": pack_ids(values, 1 << 16)}


def good(number: int) -> Members:
    return {**block(ids(number, 8 + number % 20)), "cls": str(number % 2).encode()}


def with_id(number: int, token: int) -> Members:
    values = ids(number)
    values[3] = token
    return block(values)


BAD: dict[str, tuple[Callable[[int], Members], str]] = {
    "encoding": (lambda number: {"txt": b"caf\xe9"}, "txt is not UTF-8 (byte 3 of 4)"),
    "no bytes": (lambda number: {"txt": b""}, "an empty document: txt of 0 bytes has no tokens"),
    "white space": (lambda number: {"txt": b" \n\t"}, "an empty document: txt of 3 bytes has no tokens"),
    "special tokens": (lambda number: block(np.array([0, 4, 2])), "an empty document: it has nothing but special"),
    "no tokens": (lambda number: block(np.array([], dtype=np.int64)), "an empty document: it has nothing but special"),
    "vocabulary": (lambda number: with_id(number, 261), "token id 261 is beyond the tokenizer's vocabulary of 261"),
    "length": (lambda number: block(ids(number, BLOCK + 1)), f"a block of {BLOCK + 1} tokens is longer than the 32"),
    "damaged": (lambda number: {"tokens": block(ids(number))["tokens"][:-1]}, "damaged; write them anew"),
    "other format": (lambda number: {"tokens": b"PK\3\4 something else"}, "begin with b'PK"),
    "image": (lambda number: {"png": b"\x89PNG"}, "holds no text input: its members are .png, one of .tokens, .txt is"),
}  # fmt: skip


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


def everything(folder: Path) -> Path:
    """60 good blocks and one of each bad kind."""
    samples = {f"good{number:03d}": good(number) for number in range(60)}
    samples |= {f"bad {name}": make(number) for number, (name, (make, _)) in enumerate(BAD.items())}
    return write_tar(folder / "train-0.tar", samples)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    names = ("experiments/text_base", "tools/shard", "tools/evaluate")
    return {Path(name).name: load_script(ROOT / f"{name}.py") for name in names}


@pytest.fixture
def run(modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    return Commands(modules["text_base"], TINY, tmp_path / "run", capsys, tools=modules)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """60 blocks of the tokenizer of bytes, with that tokenizer beside them."""
    path = write_tar(tmp_path / "shards" / "train-0.tar", {f"{number:03d}": good(number) for number in range(60)})
    (path.parent / "tokenizer.json").write_bytes(Tokenizer.bytes().content)
    return path


@pytest.fixture(scope="module")
def other() -> bytes:
    """A tokenizer of as many tokens whose merged ones differ."""
    return train_bpe(["one two three four five six seven " * 20], VOCABULARY).content


@pytest.mark.parametrize("name", BAD)
def test_samples_of_which_none_can_be_used(run: Any, tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = write_tar(tmp_path / "shards" / "train-0.tar", {f"{number:03d}": make(number) for number in range(20)})
    error = run.refused(f"data.train={path}")
    broken = "20 of 20 samples cannot be used;" if name == "image" else "all 8 samples of a batch are broken,"
    assert f"{broken} the first:" in error
    assert reason in error
    assert str(path) in error


def test_each_bad_sample_is_skipped_named_and_counted(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = everything(tmp_path / "shards")
    data = (f"data.train={path}", f"data.validation={path}", "data.max_broken=0.2")
    with caplog.at_level(logging.WARNING):
        code, _, err = run(*data, "train.batch=70", "train.updates=2", "train.max_minutes=1e-9")  # one epoch
    assert code == 0, err
    named = [record.message for record in caplog.records if record.message.startswith("broken sample")]
    numbers = [int(re.findall(r"broken sample (\d+) skipped", line)[0]) for line in named]
    assert numbers == list(range(1, len(BAD) + 1))
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in named if f"bad {name}:" in line]
        assert reason in line
        assert str(path) in line


def test_too_many_bad_samples_stop_the_run(run: Any, tmp_path: Path) -> None:
    path = everything(tmp_path / "shards")
    data = (f"data.train={path}", f"data.validation={path}", "train.batch=70")
    assert "1 of 70 samples cannot be used, more than data.max_broken=0.01 allows; the first: " in run.refused(*data)
    error = run.refused(*data, "data.max_broken=0.02")
    assert "10 of 70 samples are broken, more than data.max_broken=0.02 allows; the last: " in error


def test_files_become_shards_or_are_named(run: Any, tmp_path: Path) -> None:
    """Every document that can be read is in the shards, whole; every other one is named."""
    corpus, out = tmp_path / "corpus", tmp_path / "shards"
    corpus.mkdir()
    (corpus / "latin.txt").write_bytes(b"first\ncaf\xe9 au lait\nthird\n")
    (corpus / "blank.txt").write_bytes(b"\n  \n\t\n")
    (corpus / "none.txt").write_bytes(b"")
    lines = ['{"text": "fourth"}', '{"text": ""}', '{"body": "x"}', "[1]", "{", '{"text": 5}']
    (corpus / "lines.jsonl").write_text("\n".join(lines))
    arguments = ("text", str(corpus), str(out), "--bytes", "--block", str(BLOCK), "--workers", "1")
    code, printed, err = run.tool("shard", *arguments, "--pack", "within")
    assert code == 0
    assert "6 documents skipped" in printed
    named = [line for line in err.splitlines() if line.startswith(("latin", "lines"))]
    assert len(named) == 6
    assert "latin.txt at byte 6: is not UTF-8" in err
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    found = []
    for path in out.glob("*.tar"):
        with path.open("rb") as file:
            members = [read(file.fileno(), entry, path.name).members for entry in scan(path)]
        found += [tokenizer.decode(unpack_ids(one["tokens"]).tolist()) for one in members]
    assert sorted(found) == ["first", "fourth", "third"]
    assert run.tool("shard", "verify", str(out))[0] == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "corpus: has no text files (.txt, .jsonl"),
        ({"song.flac": b"fLaC"}, "corpus: has no text files"),
        ({"a.txt": b"\xff\n\xfe\n"}, "none of its 2 documents could be used"),
        ({"a.txt": b"", "b.txt": b"\n"}, "none of its 0 documents could be used"),
    ],
)
def test_a_folder_without_text(run: Any, tmp_path: Path, content: dict[str, bytes], expected: str) -> None:
    folder, out = tmp_path / "corpus", tmp_path / "shards"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    code, _, err = run.tool("shard", "text", str(folder), str(out), "--bytes", "--workers", "1")
    assert code == 2
    assert err.count("error: ") == 1
    assert expected in err
    assert not list(out.glob("*.tar"))
    assert not (out / "index.json").exists()


def test_a_vocabulary_below_the_tokenizers(run: Any, shard: Path) -> None:
    error = run.refused(f"data.train={shard}", "text.vocabulary=260")
    assert "text.vocabulary=260: the tokenizer " in error
    assert "has 261 tokens; choose text.vocabulary=261 or more" in error
    # What a refused command left does not keep the next one from starting.
    assert run(f"data.train={shard}", "text.vocabulary=261", "train.max_minutes=1e-9")[0] == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{}", b"[]", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'],
)
def test_a_tokenizer_that_is_none(run: Any, shard: Path, tmp_path: Path, content: bytes) -> None:
    good_one = (shard.parent / "tokenizer.json").read_bytes()
    (shard.parent / "tokenizer.json").write_bytes(content)
    reason = "lacks <s>, <pad>, </s>, <unk>, <mask>" if b"vocab" in content else "is no tokenizer"
    error = run.refused(f"data.train={shard}")
    assert "tokenizer.json" in error
    assert reason in error
    (shard.parent / "tokenizer.json").write_bytes(good_one)  # mended: the same command starts
    assert run(f"data.train={shard}", "train.max_minutes=1e-9")[0] == 0
    assert (run.folder / "tokenizer.json").read_bytes() == good_one


def test_a_tokenizer_that_settings_name(run: Any, shard: Path, tmp_path: Path, other: bytes) -> None:
    named = tmp_path / "named.json"
    named.write_bytes(other)
    error = run.refused(f"data.train={shard}", f"text.tokenizer={named}")
    assert f"text.tokenizer={named}: differs from " in error
    (shard.parent / "tokenizer.json").unlink()
    error = run.refused(f"data.train={shard}", f"text.tokenizer={tmp_path / 'gone.json'}")
    assert f"{tmp_path / 'gone.json'}: cannot be read" in error


def test_a_run_goes_on_with_its_own_tokenizer_only(run: Any, shard: Path, other: bytes) -> None:
    arguments = (f"data.train={shard}", "train.max_minutes=1e-9")
    assert run(*arguments)[0] == 0
    before = contents(run.folder)
    own = (shard.parent / "tokenizer.json").read_bytes()
    (shard.parent / "tokenizer.json").write_bytes(other)
    code, out, err = run(*arguments)
    assert code == 2
    assert err.count("error: ") == 1
    assert f"{run.folder / 'tokenizer.json'}: differs from the tokenizer.json beside the shards" in err
    assert "Traceback" not in out + err
    assert contents(run.folder) == before
    (shard.parent / "tokenizer.json").write_bytes(own)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "continuing from update 1 of 4" in out


def test_other_shards_for_evaluation(run: Any, shard: Path, tmp_path: Path, other: bytes) -> None:
    """Of another tokenizer, given when a run is started and when it is evaluated."""
    foreign = tmp_path / "foreign" / "validation-0.tar"
    foreign.parent.mkdir()
    foreign.write_bytes(shard.read_bytes())
    (foreign.parent / "tokenizer.json").write_bytes(other)
    error = run.refused(f"data.train={shard}", f"data.validation={foreign}")
    assert "differs from the tokenizer.json beside the shards" in error
    assert run(f"data.train={shard}", "train.max_minutes=1e-9")[0] == 0
    before = contents(run.folder)
    for arguments in (["--data", str(foreign)], ["--data", str(shard), "--test", str(foreign)]):
        code, _, err = run.tool("evaluate", str(run.folder), *arguments, "--device", "cpu", "--tasks", "rank")
        assert code == 2
        assert err.startswith("error: ")
        assert "differs from the tokenizer.json beside the shards" in err
    assert contents(run.folder) == before
    (foreign.parent / "tokenizer.json").unlink()
    assert run.tool("evaluate", str(run.folder), "--data", str(foreign), "--device", "cpu", "--tasks", "rank")[0] == 0


def test_shards_of_another_modality(run: Any, shard: Path) -> None:
    code, _, err = run.tool("shard", "index", str(shard.parent), "--modality", "vision")
    assert code == 2
    assert "holds no vision input" in err
    assert run.tool("shard", "index", str(shard.parent), "--modality", "text")[0] == 0
    foreign = shard.parent / "index.json"
    own = foreign.read_text()
    foreign.write_text(own.replace('"text"', '"vision"'))
    assert "holds vision, but" in run.refused(f"data.train={shard}")
    assert not run.folder.exists()
    foreign.write_text(own)
    assert run(f"data.train={shard}", "train.max_minutes=1e-9")[0] == 0
    foreign.write_text(foreign.read_text().replace('"text"', '"speech"'))
    code, _, err = run.tool("evaluate", str(run.folder), "--data", str(shard), "--device", "cpu")
    assert code == 2
    assert "holds speech, but" in err


def test_lengths_that_no_index_gives(run: Any, shard: Path, tmp_path: Path) -> None:
    budget = ("train.micro_length=256", "train.max_minutes=1e-9")
    error = run.refused(f"data.train={shard}", *budget)
    assert "no index gives the lengths of its samples, which train.micro_length needs" in error
    assert "tools/shard.py index FOLDER --modality text" in error
    assert run.tool("shard", "index", str(shard.parent), "--modality", "text")[0] == 0
    index = ShardIndex.load(shard.parent)
    assert list(index.shards[0].lengths) == [8 + number % 20 for number in range(60)]
    error = run.refused(f"data.train={shard}", "train.micro_length=20")
    assert "a sample of length 27 is longer than train.micro_length=20" in error
    assert run(f"data.train={shard}", *budget)[0] == 0
    # Documents are cut into tokens when they are read, so nobody knows their lengths before.
    path = write_tar(tmp_path / "documents" / "x.tar", {f"{n}": {"txt": b"some words"} for n in range(40)})
    assert run.tool("shard", "index", str(path.parent), "--modality", "text")[0] == 0
    assert not json.loads((path.parent / "index.json").read_bytes())["shards"][0].get("lengths")
    run.folder = tmp_path / "second"
    assert "which train.micro_length needs" in run.refused(f"data.train={path}", *budget)
    assert run(f"data.train={path}", "train.max_minutes=1e-9")[0] == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["text.block=2"], "text.block=2: must be 3 or more"),
        (["text.vocabulary=5"], "text.vocabulary=5: must be 6 or more"),
        (["text.mask.masks=2"], "text.mask.masks=2: the student reads one input of each sample"),
        (["text.mask.random_share=0.7", "text.mask.kept_share=0.7"], "text.mask.random_share=0.7: with"),
        (["text.mask.ratio=1"], "text.mask.ratio=1.0: must be above 0 and below 1"),
        (["text.predictor.kind=conv2d"], "text.predictor.kind=conv2d: text has one dimension"),
        (["student_sees=visible"], "text.predictor.kind=mlp: a student that sees visible positions only"),
        (["text.dropout=1"], "text.dropout=1.0: must be from 0 to below 1"),
    ],
)
def test_wrong_settings(run: Any, shard: Path, overrides: list[str], expected: str) -> None:
    assert expected in run.refused(f"data.train={shard}", *overrides)
    assert not run.folder.exists()
