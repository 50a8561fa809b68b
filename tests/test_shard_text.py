"""tools/shard.py text: from files to shards that training reads, with the tokenizer beside them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.tar import read, scan
from data2vec.core.settings.fields import DataConfig
from data2vec.core.testing import load_module
from data2vec.text import Text
from data2vec.text.loader import unpack_ids
from data2vec.text.packing import documents_in
from data2vec.text.tokenizer import Tokenizer

TOOL = Path(__file__).parents[1] / "tools" / "shard.py"
LINES = [f"line {number}: the student predicts what teacher {number % 7} sees" for number in range(600)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("shard_tool_for_text", TOOL)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES[:250]) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in LINES[250:]).encode()))
    return folder


def members(out: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    found = {}
    for path in sorted(out.glob(pattern)):
        with path.open("rb") as file:
            for sample in scan(path):
                found[sample.key] = dict(read(file.fileno(), sample, path.name).members)
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_corpus_becomes_a_set_that_training_reads(tool: ModuleType, corpus: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["text", str(corpus), str(out), "--train-tokenizer", "400", "--block", "32", "--validation", "0.2"]
    command += ["--samples-per-shard", "100"]
    assert tool.main([*command, "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "0 documents skipped" in printed
    assert "tokens," in printed
    assert f"data.train='{out}/train-*.tar'" in printed
    assert not (out / ".unpacked").exists()
    assert tool.main(["verify", str(out)]) == 0

    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert 300 < tokenizer.vocabulary <= 400
    found = members(out)
    parts: dict[str, list] = {}
    for key in sorted(found):
        parts.setdefault(key.split("/")[0], []).append(unpack_ids(found[key]["tokens"]))
    texts = [tokenizer.decode(ids) for blocks in parts.values() for ids in documents_in(blocks, eos=tokenizer.eos)]
    assert sorted(texts) == sorted(LINES)
    assert all(len(block) == 32 for blocks in parts.values() for block in blocks[:-1])
    held_out = {key.split("/")[0] for key in members(out, "validation-*.tar")}
    assert held_out.isdisjoint(key.split("/")[0] for key in members(out, "train-*.tar"))

    index = ShardIndex.load(out)
    assert index.length == sum(len(block) for blocks in parts.values() for block in blocks)
    assert all(20 < shard.samples < 200 for shard in index.shards)

    modality = replace(Text(), vocabulary=400, block=32).located(out)
    data = TrainData.open(f"{out}/train-*.tar", modality, data=DataConfig(workers=0), seed=0, cache=tmp_path / "cache")
    batch = next(data.batches(0, 16))
    assert (batch.inputs.shape[0], batch.broken) == (16, ())
    assert int(batch.inputs.max()) < tokenizer.vocabulary

    other = tmp_path / "other"
    assert tool.main([*command[:2], str(other), *command[3:], "--workers", "1"]) == 0
    assert contents(out) == contents(other)  # the number of workers changes nothing


def test_class_folders_give_labels_and_whole_documents(tool: ModuleType, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "reviews", tmp_path / "out"
    for number in range(60):
        path = folder / ("bad", "good")[number % 2] / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"review {number}\n\nsecond paragraph".encode() if number else b"\xff")
    command = ["text", str(folder), str(out), "--bytes", "--pack", "within", "--documents", "file", "--block", "16"]
    assert tool.main([*command, "--validation", "0.25", "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "bad/0.txt: is not UTF-8" in printed.err
    assert "2 classes, 1 documents skipped" in printed.out
    assert ShardIndex.load(out).class_names == ("bad", "good")
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    documents: dict[str, str] = {}
    for key, one in sorted(members(out).items()):
        text = tokenizer.decode(unpack_ids(one["tokens"]).tolist())
        documents[key.rpartition("-")[0]] = documents.get(key.rpartition("-")[0], "") + text
        assert one["cls"] == (b"0" if key.startswith("bad_") else b"1")
    assert sorted(documents.values()) == sorted(f"review {n}\n\nsecond paragraph" for n in range(1, 60))
    held_out = {key.rpartition("-")[0] for key in members(out, "validation-*.tar")}
    assert len(held_out) in (14, 15)  # a quarter of the documents, one of which may be the one that is skipped
    assert held_out.isdisjoint(key.rpartition("-")[0] for key in members(out, "train-*.tar"))


def test_an_interrupted_run_continues(tool: ModuleType, corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    rest = ["--bytes", "--block", "64", "--samples-per-shard", "60", "--workers", "1"]
    assert tool.main(["text", str(corpus), str(whole), *rest]) == 0
    saved = tool._save_state

    def interrupt(folder: Path, job: str, results: dict) -> None:
        saved(folder, job, results)
        if len(results) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "_save_state", interrupt)
    assert tool.main(["text", str(corpus), str(out), *rest]) == 130
    monkeypatch.setattr(tool, "_save_state", saved)
    assert (out / ".unpacked").is_dir()
    assert tool.main(["text", str(corpus), str(out), *rest[:1], "--block", "32", *rest[3:]]) == 2  # another job
    capsys.readouterr()
    assert tool.main(["text", str(corpus), str(out), *rest]) == 0
    assert "2 of" in capsys.readouterr().out
    assert contents(out) == contents(whole)
    assert tool.main(["text", str(corpus), str(out), *rest]) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_a_tokenizer_of_ones_own_is_used_and_anothers_is_kept(tool: ModuleType, corpus: Path, tmp_path: Path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert tool.main(["text", str(corpus), str(first), "--train-tokenizer", "300", "--workers", "1"]) == 0
    file = first / "tokenizer.json"
    assert tool.main(["text", str(corpus), str(second), "--tokenizer", str(file), "--workers", "1"]) == 0
    assert contents(first) == contents(second)
    third = tmp_path / "third"
    third.mkdir()
    (third / "tokenizer.json").write_bytes(b"mine")
    assert tool.main(["text", str(corpus), str(third), "--bytes", "--workers", "1"]) == 2
    assert "exists already and is another one" in capsys.readouterr().err
    assert (third / "tokenizer.json").read_bytes() == b"mine"
    assert not list(third.glob("*.tar"))


def test_what_cannot_be_sharded_is_one_error(tool: ModuleType, corpus: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    (tmp_path / "bad.txt").write_bytes(b"\xff\n\xfe\n")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    for folder, tokens, message in [
        (tmp_path / "gone", ["--bytes"], "no such file, folder or glob"),
        (corpus, ["--tokenizer", str(tmp_path / "gone.json")], "gone.json: cannot be read"),
        (corpus, ["--tokenizer", str(corpus / "a.txt")], "a.txt: is no tokenizer"),
        (corpus, ["--train-tokenizer", "100"], "a vocabulary of 100 tokens"),
        (tmp_path / "bad.txt", ["--bytes"], "none of its 2 documents could be used"),
        (tmp_path / "blank.txt", ["--bytes"], "none of its 0 documents could be used"),
        (tmp_path / "blank.txt", ["--train-tokenizer", "300"], "no text"),
    ]:
        assert tool.main(["text", str(folder), str(out), *tokens, "--workers", "1", "--force"]) == 2
        error = capsys.readouterr().err
        assert f"{message}" in error
        assert "Traceback" not in error
    for arguments in (["--block", "2", "--bytes"], [], ["--bytes", "--tokenizer", "x"], ["--bytes", "--pack", "no"]):
        with pytest.raises(SystemExit, match="2"):
            tool.main(["text", str(corpus), str(out), *arguments])


def test_every_file_and_document_is_accounted_for(tool: ModuleType, corpus: Path, tmp_path: Path, capsys) -> None:
    (corpus / "wide.txt").write_bytes("Gr\xfc\xdfe\nan alle\n".encode("utf-16"))
    (corpus / "packed.txt").write_bytes(bytes.fromhex("28b52ffd0458290000"))
    (corpus / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    (corpus / "notes.md").write_text("about")
    (corpus / "zero.txt").write_bytes(b"whole line of text\na \0 in it\n")
    assert tool.main(["text", str(corpus), str(tmp_path / "out"), "--bytes", "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "packed.txt: is compressed with zstd; unpack it first (unzstd FILE)" in printed.err
    assert "picture.txt: is no text: it is binary" in printed.err
    assert "zero.txt at byte 19: holds a zero character" in printed.err
    assert "7 files found: 4 read, 3 left out (2 unusable, 1 .md)" in printed.out
    assert "604 documents found: 603 written, 1 skipped" in printed.out
    for name in ("packed", "picture"):
        assert tool.main(["text", str(corpus / f"{name}.txt"), str(tmp_path / name), "--bytes"]) == 2
        assert f"error: {corpus}/{name}.txt: is " in capsys.readouterr().err


def test_help_tells_what_there_is(tool: ModuleType, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main(["text", "--help"])
    printed = capsys.readouterr().out
    assert "--train-tokenizer VOCAB" in printed
    assert "{line,blank,file}" in printed
