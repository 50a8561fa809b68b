"""Which member is a sample's input, and shards that no decoder can use: opened, indexed, verified."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.checking import index_folder, verify
from data2vec.core.data.shards.index import ForeignIndexError, ShardIndex
from data2vec.core.data.shards.inputs import Inputs
from data2vec.core.data.shards.tar import TarSample
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.settings.fields import DataConfig
from data2vec.core.settings.overrides import validate
from data2vec.core.testing import load_module

pipeline = load_module("pipeline_of_inputs", Path(__file__).with_name("test_data_pipeline.py"))
toy = load_module("toy_of_inputs", Path(__file__).with_name("toy.py"))

IMAGES = Inputs("vision", ("jpg", "png"))


def sample(*extensions: str) -> TarSample:
    return TarSample("folder/clip", {extension: (number, 1) for number, extension in enumerate(extensions)})


def tar_file(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def opened(spec: Path, **settings: object) -> TrainData:
    config = DataConfig(workers=0, shuffle_shards=3, **settings)
    return TrainData.open(str(spec), pipeline.Numbers(), data=config, seed=0, cache=spec.parent / "cache")


@pytest.mark.parametrize(
    ("extensions", "taken"),
    [(("cls", "jpg"), "jpg"), (("input.jpg", "cls"), "input.jpg"), (("mask.png", "jpg"), "jpg"),
     (("a.b.png", "txt"), "a.b.png"), (("png", "jpg"), "jpg")],
)  # fmt: skip
def test_the_one_member_that_fits_is_the_input(extensions: tuple[str, ...], taken: str) -> None:
    found = IMAGES.present(sample(*extensions))
    assert found.problem is None
    first = next(extension for extension in IMAGES.extensions if extension in found.members)
    assert found.members[first] == sample(*extensions).members[taken]
    assert ("cls" in found.members) == ("cls" in extensions)


def test_a_setting_chooses_among_several() -> None:
    both = sample("input.jpg", "target.jpg", "cls")
    problem = IMAGES.present(both).problem
    assert problem is not None
    assert "holds 2 members that could be its vision input (.input.jpg, .target.jpg)" in problem
    assert "choose a member with data.member=input.jpg" in problem
    chosen = Inputs("vision", ("jpg", "png"), "target.jpg").present(both)
    assert chosen.problem is None
    assert chosen.members["jpg"] == (1, 1)
    # It comes before a member with a plain ending, and a sample without it is as it was.
    assert Inputs("vision", ("jpg", "png"), "b.png").present(sample("jpg", "b.png")).members == {"png": (1, 1)}
    assert Inputs("vision", ("jpg", "png"), "b.png").present(sample("jpg")) == sample("jpg")


def test_dots_in_keys_are_named_with_the_remedy() -> None:
    frames = IMAGES.present(sample(*(f"{number:04d}.jpg" for number in range(40))))
    assert frames.problem is not None
    assert "holds 40 members" in frames.problem
    assert "(.0000.jpg, .0001.jpg, .0002.jpg to .0039.jpg)" in frames.problem
    assert "a key ends at its first dot, so rename files without dots (clip-0000.jpg)" in frames.problem


def test_no_input_is_named() -> None:
    assert IMAGES.present(sample("flac", "cls")).problem == (
        "holds no vision input: its members are .cls, .flac, one of .jpg, .png is needed"
    )
    assert IMAGES.present(TarSample("a", {"jpg": (0, 1)}, "is odd")).problem == "is odd"


@given(st.lists(st.text("abjpng.", min_size=1, max_size=8), min_size=1, max_size=6), st.text("ajpng.", max_size=7))
def test_whatever_the_members_there_is_an_input_or_a_problem(extensions: list[str], member: str) -> None:
    found = Inputs.of(pipeline.Numbers, member or None)
    inputs = Inputs("vision", ("jpg", "png"), found.member)
    presented = inputs.present(sample(*extensions))
    assert (presented.problem is None) == any(extension in presented.members for extension in inputs.extensions)


@pytest.mark.parametrize(
    ("member", "message"),
    [("input.jpg", "ends in none of raw"), (".raw", "must be a member's name"), ("a b.raw", "must be"),
     ("A.raw", "must be"), ("a/b.raw", "must be"), ("", "must be")],
)  # fmt: skip
def test_the_setting_is_checked(member: str, message: str) -> None:
    experiment = toy.settings(Path("unused"))
    validate(experiment.replace(data={"member": "input.raw"}))
    with pytest.raises(ConfigError, match=f"data.member={member}: {message}"):
        validate(experiment.replace(data={"member": member}))


def test_a_member_with_more_than_one_ending_is_trained_on(tmp_path: Path) -> None:
    contents = {f"{n}.{kind}.num": f"{100 * extra + n}".encode() for n in range(6) for extra, kind in enumerate("ab")}
    path = tar_file(tmp_path / "set" / "a.tar", contents)
    with pytest.raises(DataError, match=r"6 of 6 samples cannot be used; the first: .*a\.tar: 0: holds 2 members"):
        opened(path)
    (batch,) = islice(opened(path, member="b.num").batches(0, 6), 1)
    assert sorted(batch.inputs[:, 0].tolist()) == [100, 101, 102, 103, 104, 105]
    with pytest.raises(DataError, match=r"a\.tar: 6 of 6 samples cannot be used; .*data\.member=a\.num"):
        index_folder(path.parent, "numbers")
    assert not (path.parent / "index.json").exists()
    index_folder(path.parent, "numbers", member="b.num")
    assert verify(path.parent, member="b.num") == []
    assert len(verify(path.parent)) == 6


def test_a_set_without_inputs_does_not_pass(tmp_path: Path) -> None:
    """Opened, indexed, or with an index that was written when nobody looked."""
    path = tar_file(tmp_path / "set" / "a.tar", {f"clip.{number:04d}.num": b"1" for number in range(40)})
    with pytest.raises(DataError, match=r"1 of 1 samples cannot be used; .*a\.tar: clip: holds 40 members"):
        opened(path)
    with pytest.raises(DataError, match="rename files without dots"):
        index_folder(path.parent, "numbers")
    index_folder(path.parent, "unknown")  # of a modality that is not installed
    index = path.parent / "index.json"
    index.write_text(index.read_text().replace("unknown", "numbers"))
    (problem,) = verify(path.parent)
    assert "a.tar: clip: holds 40 members that could be its numbers input" in problem
    with pytest.raises(
        DataError, match=r"all 1 samples of a batch are broken, the first:\n.*rename files without dots"
    ):
        next(opened(path).batches(0, 1))


def test_some_samples_without_input_are_counted_and_named(tmp_path: Path) -> None:
    contents = {f"{number:03d}.{'num' if number % 10 else 'json'}": b"1" for number in range(150)}
    path = tar_file(tmp_path / "set" / "a.tar", contents)
    with pytest.raises(DataError, match=r"15 of 150 samples cannot be used, more than data\.max_broken=0\.01 allows"):
        opened(path)
    assert opened(path, max_broken=0.1).total == 150
    warnings: list[str] = []
    index_folder(path.parent, "numbers", warn=warnings.append)
    (warning,) = warnings
    assert warning.startswith("15 of 150 samples cannot be used and will be skipped:")
    assert warning.count("holds no numbers input") == 10  # named
    assert len(verify(path.parent)) == 15


def test_labels_that_are_none_are_counted(tmp_path: Path) -> None:
    labels = (b"0", b"-1", b"", b"cat", b"2")
    contents = {f"{n}.{kind}": (b"1" if kind == "num" else label) for n, label in enumerate(labels)
                for kind in ("cls", "num")}  # fmt: skip
    path = tar_file(tmp_path / "set" / "a.tar", contents)
    expected = f"3 of 5 labels count as unlabelled, the first: {path}: 1: its label b'-1' is no class number such as 7"
    warnings: list[str] = []
    index_folder(path.parent, "numbers", warn=warnings.append)
    assert warnings == [expected]
    assert verify(path.parent, warn=warnings.append) == []
    assert warnings == [expected] * 2


FOREIGN = {
    "wids": {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 4}]},
    "nothing": {},
    "a list": [{"url": "a.tar"}],
    "a number": 3,
    "null": None,
    "a field of the same name": {"format": "webdataset", "shards": ["a.tar"]},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_index_of_another_program(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tar_file(tmp_path / "set" / "a.tar", {f"{number}.num": b"1" for number in range(4)})
    index = path.parent / "index.json"
    index.write_text(json.dumps(FOREIGN[name]))
    message = f"{index}: is not an index of these tools but another program's"
    with pytest.raises(ForeignIndexError, match="index FOLDER --modality NAME --force` replaces it"):
        ShardIndex.load(path.parent)
    assert [line.startswith(message) for line in verify(path.parent)] == [True]
    with caplog.at_level(logging.WARNING):
        assert opened(path.parent).total == 4  # counting the samples needs no index
    (record,) = caplog.records
    assert record.message.startswith(message)
    assert record.message.endswith("; the shards beside it are counted instead")
    index_folder(path.parent, "numbers")
    assert verify(path.parent) == []


def test_an_index_of_ours_that_is_damaged_is_not_taken_for_foreign(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "set" / "a.tar", {"0.num": b"1"})
    (path.parent / "index.json").write_text('{"format": null, "modality": "numbers", "totals": {}}')
    with pytest.raises(DataError, match="format='None' is no int"):
        opened(path.parent)
