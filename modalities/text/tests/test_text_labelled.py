"""Tables of labelled texts as shards, and pairs of texts as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.batch import Sample
from data2vec.core.data.dataset import EvaluationData
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.errors import SampleError
from data2vec.core.settings.fields import DataConfig
from data2vec.core.testing import load_module
from data2vec.text import Text
from data2vec.text.loader import TextDecoder
from data2vec.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_module("shard_tool_of_labelled", ROOT / "tools" / "shard.py")


def written(tool: ModuleType, path: Path, *arguments: str) -> tuple[list[dict[str, bytes]], ShardIndex]:
    """The members of each sample that a table becomes, in the order of its rows."""
    out = path.parent / "shards"
    assert tool.main(["text-labelled", str(path), str(out), "--workers", "1", *arguments]) == 0
    data = EvaluationData.open(
        str(out / "train-*.tar"), Text(), data=DataConfig(workers=0), seed=0, cache=path.parent / "cache"
    )
    names = ("txt", "pair", "cls", "number")
    reader = [dict(members) for shard in data.annotations(*names) for members in shard]
    keys = [key for batch in data.evaluation_batches(100) for key in batch.keys]
    return [members for _, members in sorted(zip(keys, reader, strict=True))], ShardIndex.load(out)


# Rows laid out as in GLUE's files.
GLUE = {
    "CoLA": ("x1\t1\t\tThe dog sleeps here.\nx1\t0\t*\tSleep dog.\n", (b"The dog sleeps here.", None, b"1")),
    "SST-2": ('sentence\tlabel\na quiet surprise \t0\nloud "dull\t1\n', (b"a quiet surprise ", None, b"0")),
    "MRPC": (
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tHe said "so\tHe said.\n0\t2\t3\ta\tb\n',
        (b'He said "so', b"He said.", b"1"),
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n1\t2\t3\tA?\tA?\t1\n",
        (b"How?", b"Why?", b"0"),
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n0\tWhen?\tThen.\tentailment\n1\tWho?\tMe.\tnot_entailment\n",
        (b"When?", b"Then.", b"0"),
    ),
    "MNLI": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tOne.\tTwo.\tneutral\tneutral\n1\tA.\tB.\tx\tentailment\n",
        (b"One.", b"Two.", b"1"),
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\tnot_entailment\n1\tA.\tB.\tentailment\n",
        (b"One.", b"Two.", b"1"),
    ),
    "STS-B": ("index\tsentence1\tsentence2\tscore\n0\tOne.\tTwo.\t3.8\n1\tA.\tB.\t0\n", (b"One.", b"Two.", b"3.8")),
}


@pytest.mark.parametrize("task", list(GLUE))
def test_the_files_of_glue_are_known(task: str, tool: ModuleType, tmp_path: Path) -> None:
    content, (text, pair, label) = GLUE[task]
    path = tmp_path / "train.tsv"
    path.write_text(content)
    samples, index = written(tool, path)
    assert len(samples) == 2
    wanted = {"txt": text, "number" if task == "STS-B" else "cls": label, **({"pair": pair} if pair else {})}
    assert samples[0] == wanted
    assert len(index.class_names) == (0 if task == "STS-B" else 2)


def test_named_columns(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    rows = [{"body": "fine", "stars": 10}, {"body": "bad\nvery", "stars": 2}, {"body": "", "stars": 2}]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples, index = written(tool, path, "--text", "body", "--label", "stars")
    assert index.class_names == ("2", "10")  # numbers in their order
    assert samples == [{"txt": b"fine", "cls": b"1"}, {"txt": b"bad\nvery", "cls": b"0"}]
    numbers, _ = written(tool, path, "--text", "body", "--label", "stars", "--numbers", "--force")
    assert numbers[0] == {"txt": b"fine", "number": b"10.0"}


def test_classes_in_a_given_order(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"a, b",no\nc,yes\nd,maybe\n')
    samples, index = written(tool, path, "--text", "text", "--label", "label", "--classes", "yes,no")
    assert index.class_names == ("yes", "no")
    assert samples == [{"txt": b"a, b", "cls": b"1"}, {"txt": b"c", "cls": b"0"}]
    assert "line 4: the label 'maybe' is none of the classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("x.tsv", "a\tb\n1\t2\n", [], "name its columns with --text and --label"),
        ("x.tsv", "a\tb\n1\t2\n", ["--text", "a", "--label", "c"], "has no column 'c'; there is a, b"),
        ("x.tsv", "", [], "is empty"),
        ("x.tsv", "sentence\tlabel\n", [], "has no rows"),
        ("x.tsv", "sentence\tlabel\na\t1\n", [], "has one class only (1)"),
        ("x.tsv", "sentence1\tsentence2\tscore\na\tb\tgood\n", [], "none of its 1 rows could be used"),
        ("x.jsonl", "{", [], "line 1: is no JSON"),
        ("x.jsonl", "[1]", [], "line 1: is no object with columns"),
        ("x.txt", "a", [], "is no .tsv, .csv or .jsonl file"),
    ],
)
def test_tables_that_cannot_be_used(
    name: str, content: str, arguments: list[str], message: str, tool: ModuleType, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    path.write_text(content)
    assert tool.main(["text-labelled", str(path), str(tmp_path / "out"), "--workers", "1", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("error:") == 1
    assert not list((tmp_path / "out").glob("*.tar")) if (tmp_path / "out").exists() else True


TOKENS = Tokenizer.bytes()


def decoded(block: int, **members: bytes) -> list[int]:
    decoder = TextDecoder(None, block, train=False)
    ids: list[int] = decoder(Sample("k", "s", 1, members), 0).inputs.tolist()
    return ids


def test_a_pair_as_roberta_reads_it() -> None:
    bos, eos = TOKENS.bos, TOKENS.eos
    assert decoded(64, txt=b"ab", pair=b"c") == [bos, *TOKENS.encode("ab"), eos, eos, *TOKENS.encode("c"), eos]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(6, 30))
def test_pairs_are_cut_to_fit(first: int, second: int, block: int) -> None:
    """Nothing is cut that fits; what is cut comes off the longer text, and both keep at least half of the room."""
    ids = decoded(block, txt=b"a" * first, pair=b"b" * second)
    one, other = ids.count(TOKENS.encode("a")[0]), ids.count(TOKENS.encode("b")[0])
    room = block - 4
    assert len(ids) == one + other + 4 <= block
    if first + second <= room:
        assert (one, other) == (first, second)
    else:
        assert one + other == room
        assert one >= min(first, room // 2)
        assert other >= min(second, room // 2)


def test_a_block_without_room_for_a_pair() -> None:
    with pytest.raises(SampleError, match="does not fit into 5 tokens"):
        decoded(5, txt=b"a", pair=b"b")
    with pytest.raises(SampleError, match="empty document"):
        decoded(20, txt=b"a", pair=b" ")
