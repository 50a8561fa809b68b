"""The sample texts: documentation strings of installed libraries, whose versions the workspace's lock file fixes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.tar import read, sample_id, scan
from data2vec.core.errors import DataError
from data2vec.core.evaluation.features import Pooled, extract
from data2vec.core.evaluation.linear import few_labels, linear_accuracy
from data2vec.core.settings.fields import DataConfig
from data2vec.text import Text, samples
from data2vec.text.loader import unpack_ids
from data2vec.text.tokenizer import Tokenizer

_FITTED = 600  # of 1,700 labelled training texts: a probe of all takes ten times as long
_LESS = 60_000  # characters of each library: a smaller set by the same steps
_WRITE_LESS = f"""
import sys
from pathlib import Path
from data2vec.text import samples
samples._LIBRARY_CHARACTERS = {_LESS}
before = set(sys.modules)
samples.write_text_shards(Path("less"))
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that writes the smaller set into ``less``, and its folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WRITE_LESS]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process, folder
        process.kill()


@pytest.fixture(scope="module")
def passages(elsewhere: object) -> list[samples.Passage]:
    """Read while the other process, which is begun first, does its part."""
    return samples.read_passages()


@pytest.fixture(scope="module")
def shards(passages: list[samples.Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "read_passages", lambda: passages)  # reading takes seconds
        samples.write_text_shards(folder)
    return folder


@pytest.fixture(scope="module")
def text(shards: Path) -> Text:
    return replace(Text(), vocabulary=samples.VOCABULARY, block=samples.BLOCK).located(shards)


def blocks(shards: Path, prefix: str) -> dict[str, dict[str, bytes]]:
    found = {}
    for path in sorted(shards.glob(f"{prefix}-*.tar")):
        with path.open("rb") as file:
            for sample in scan(path):
                found[sample.key] = dict(read(file.fileno(), sample, path.name).members)
    return found


def test_counts_and_labels(shards: Path) -> None:
    index = ShardIndex.load(shards)
    assert (index.modality, index.class_names) == ("text", samples.LIBRARIES)
    train, validation = blocks(shards, "train"), blocks(shards, "validation")
    assert 6_000 <= len(train) <= 10_000
    assert all("cls" in members for members in validation.values())
    labelled = {key: members for key, members in train.items() if "cls" in members}
    assert all(key.startswith("packed/") is (key not in labelled) for key in train)
    for found, most in ((labelled, 400), (validation, 150)):
        counts = Counter(int(members["cls"]) for members in found.values())
        assert sorted(counts) == list(range(5))
        assert max(counts.values()) == most
        assert min(counts.values()) > most / 3
        assert all(samples.LIBRARIES[int(members["cls"])] == key.split("/")[0] for key, members in found.items())


def test_training_never_sees_a_held_out_file(passages: list[samples.Passage], shards: Path) -> None:
    held_out = {(one.library, one.module) for one in passages if one.held_out}
    assert held_out.isdisjoint((one.library, one.module) for one in passages if not one.held_out)
    assert len({one.text for one in passages}) == len(passages)
    assert 0.1 < sum(one.held_out for one in passages) / len(passages) < 0.3
    # Every token of the training texts is in the shards once, and no other is.
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    kept = sorted(tokenizer.specials)
    wanted = torch.zeros(tokenizer.vocabulary, dtype=torch.int64)
    for one in passages:
        if not one.held_out:
            wanted += torch.bincount(torch.tensor(tokenizer.encode(one.text)), minlength=tokenizer.vocabulary)
    found = torch.zeros_like(wanted)
    for members in blocks(shards, "train").values():
        ids = torch.from_numpy(unpack_ids(members["tokens"]).astype("int64"))
        assert 3 <= len(ids) <= samples.BLOCK
        found += torch.bincount(ids, minlength=tokenizer.vocabulary)
    found[kept] = 0
    assert torch.equal(found, wanted)


def test_a_bag_of_words_cannot_tell_the_order_of_sentences(
    passages: list[samples.Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair stands in both orders in one set, and neighbours in the source are written as they stand there."""
    monkeypatch.setattr(samples, "read_passages", lambda: passages)
    samples.write_order_shards(tmp_path)
    assert ShardIndex.load(tmp_path).class_names == ("in order", "swapped")
    texts = {one.key: " ".join(one.text.split()) for one in passages}
    kept = {}
    for prefix, least in (("train", 2_000), ("validation", 400)):
        found = blocks(tmp_path, prefix)
        kept[prefix] = {key.rpartition("-")[0] for key in found}
        assert len(found) == 2 * len(kept[prefix]) >= 2 * least
        for key in kept[prefix]:
            straight, swapped = found[f"{key}-0"], found[f"{key}-1"]
            assert (straight["cls"], swapped["cls"]) == (b"0", b"1")
            assert (straight["txt"], straight["pair"]) == (swapped["pair"], swapped["txt"])
            text = texts[key]
            assert text.index(straight["txt"].decode()) < text.rindex(straight["pair"].decode())
    assert kept["train"].isdisjoint(kept["validation"])


def test_another_process_writes_the_same_bytes_and_imports_nothing(
    elsewhere: tuple[subprocess.Popen[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the smaller set, whose texts are of every library, in both sets, labelled and packed."""
    process, folder = elsewhere
    monkeypatch.setattr(samples, "_LIBRARY_CHARACTERS", _LESS)
    samples.write_text_shards(tmp_path)
    imported, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert not {"sympy", "networkx", "torch"} & set(imported.split())
    assert {path.name: path.read_bytes() for path in (folder / "less").iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }
    train, validation = blocks(tmp_path, "train"), blocks(tmp_path, "validation")
    assert {int(members["cls"]) for members in validation.values()} == set(range(5))
    assert {members.get("cls") is None for members in train.values()} == {True, False}


def test_a_bag_of_tokens_tells_the_libraries_apart(shards: Path, text: Text, tmp_path: Path, capsys) -> None:
    config = DataConfig(workers=0)
    train = TrainData.open(f"{shards}/train-*.tar", text, data=config, seed=0, cache=tmp_path)
    test = EvaluationData.open(f"{shards}/validation-*.tar", text, data=config, seed=0, cache=tmp_path)

    def features(data: EvaluationData) -> Pooled:
        return extract(text.exhibit.raw_features, data.evaluation_batches(256), max_samples=50_000).labelled()

    fitted, judged = few_labels(features(train.for_evaluation()), _FITTED, seed=0), features(test)
    accuracy = linear_accuracy(fitted, judged)
    majority = float(torch.bincount(judged.labels).max()) / len(judged)
    with capsys.disabled():
        print(
            f"\nbag of tokens: {100 * accuracy:.1f} % of {len(judged)} from {_FITTED}, majority {100 * majority:.1f} %"
        )
    assert majority < 0.3
    assert 0.75 < accuracy < 0.95


def test_samples_are_the_ones_the_index_names(shards: Path) -> None:
    index = ShardIndex.load(shards)
    for shard in index.shards:
        found = scan(shards / shard.name)
        assert len(found) == shard.samples
        assert len({sample_id(shard.name, one.key) for one in found}) == shard.samples


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LIBRARIES", ("no_such_library",))
    with pytest.raises(DataError, match="no_such_library has no source files"):
        samples.read_passages()
