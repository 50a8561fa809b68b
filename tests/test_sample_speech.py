"""The sample speech, which comes with the workspace's demo group and with no package."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data2vec.core.batch import Batch, Sample
from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.tar import read, scan
from data2vec.core.errors import DataError
from data2vec.core.evaluation.features import Pooled
from data2vec.core.evaluation.linear import few_label_accuracy, linear_accuracy
from data2vec.speech import espeak, samples
from data2vec.speech.audio import RATE
from data2vec.speech.espeak import SynthesisError, Utterance, speak
from data2vec.speech.features import log_mel_frames, log_mel_pooled
from data2vec.speech.loader import AudioConfig, AudioDecoder, collate_audio, decode_frame_labels
from data2vec.speech.samples import POSITION_CLASSES, plan, write_speech_shards
from data2vec.speech.sentences import WORDS

_DECODE = AudioDecoder(AudioConfig(min_length=400, max_length=None), train=False, minimum=400)
_FRAME_STRIDE = 16  # of the frames that the probe of frames sees


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    write_speech_shards(folder)
    return folder


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[str, list[tuple[Sample, Batch]]]:
    """Every sample of both sets as it lies in the shards, and decoded."""
    found: dict[str, list[tuple[Sample, Batch]]] = {"train": [], "validation": []}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            for entry in scan(path):
                sample = read(file.fileno(), entry, path.name)
                found[path.name.split("-")[0]].append((sample, collate_audio("speech", [sample], [_DECODE(sample, 0)])))
    return found


def test_how_much_there_is(folder: Path, sets: dict[str, list[tuple[Sample, Batch]]]) -> None:
    index = ShardIndex.load(folder)
    assert (index.modality, index.class_names) == ("speech", WORDS)
    assert index.samples == sum(len(part) for part in sets.values())
    for prefix, sentences, per_word in (("train", 1000, 38), ("validation", 100, 22)):
        labels = Counter(int(batch.labels) for _, batch in sets[prefix])
        assert labels == {-1: sentences} | dict.fromkeys(range(len(WORDS)), per_word)
        shards = [shard for shard in index.shards if shard.name.startswith(prefix)]
        lengths = [length for shard in shards for length in shard.lengths]
        assert lengths == [batch.inputs.shape[1] for _, batch in sets[prefix]]
        seconds = [batch.inputs.shape[1] / RATE for _, batch in sets[prefix] if int(batch.labels) < 0]
        assert min(seconds) >= 1
        assert max(seconds) <= 5
    minutes = sum(batch.inputs.shape[1] for _, batch in sets["train"]) / RATE / 60
    words = {word for sample, _ in sets["train"] for word in sample.members["txt"].decode().split()}
    print(f"\n{minutes:.1f} minutes of training speech, {len(words)} different words, {index.size / 1e6:.0f} MB")
    assert 35 <= minutes <= 50
    assert len(words) > 300


def test_the_same_bytes_come_out_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard again: no clip depends on a later one, so a plan that ends earlier begins with the same bytes."""
    whole = ShardIndex.load(folder)
    first = next(shard for shard in whole.shards if shard.name == "train-000000.tar")
    monkeypatch.setattr(samples, "plan", lambda prefix: plan(prefix)[: first.samples if prefix == "train" else 5])
    write_speech_shards(tmp_path)
    again = ShardIndex.load(tmp_path)
    assert [shard.name for shard in again.shards] == ["train-000000.tar", "validation-000000.tar"]
    assert again.shards[0] == first
    assert (tmp_path / first.name).read_bytes() == (folder / first.name).read_bytes()


def test_validation_voices_are_unseen_and_every_word_is_as_it_is_labelled() -> None:
    voices = {
        prefix: {clip.utterance.voice.partition("+")[2] for clip in plan(prefix)} for prefix in ("train", "validation")
    }
    assert len(voices["train"]) == 38
    assert len(voices["validation"]) == 11
    assert not voices["train"] & voices["validation"]
    for prefix in voices:
        for clip in plan(prefix):
            assert clip.label is None or clip.utterance.text == WORDS[clip.label]


def test_every_variant_is_a_voice_of_its_own() -> None:
    """espeak-ng takes a variant that it does not have for none, without a word."""
    variants = sorted({clip.utterance.voice.partition("+")[2] for p in ("train", "validation") for clip in plan(p)})
    spoken = [one.samples.tobytes() for one in speak([Utterance("seven", f"en+{v}") for v in (*variants, "none")])]
    assert len(set(spoken)) == len(variants) + 1


def test_phonemes_cover_the_clip_and_are_silent_where_it_is(sets: dict[str, list[tuple[Sample, Batch]]]) -> None:
    heard, quiet, loud = Counter[int](), [], []
    for sample, batch in sets["validation"]:
        length = batch.inputs.shape[1]
        segments = decode_frame_labels(sample, length)
        assert segments is not None
        assert segments[0].tolist() == [0, 0]
        assert segments[-1, 1] == 0  # the pause at the end
        assert 0.05 <= (length - segments[-1, 0]) / RATE <= 0.6
        assert batch.position_labels is not None
        labels = batch.position_labels[0]
        assert len(labels) == (length - 400) // 320 + 1
        assert (labels >= 0).all()
        heard.update(labels.tolist())
        energy = batch.inputs[0].unfold(0, 400, 320).square().mean(dim=1)
        quiet += energy[labels == 0].tolist()
        loud += energy[labels > 0].tolist()
    assert set(heard) == set(range(len(POSITION_CLASSES)))
    print(f"\nmedian energy of silence {np.median(quiet):.4f}, of speech {np.median(loud):.4f}")
    assert np.median(quiet) < 0.05 * np.median(loud)


def test_a_known_word_has_its_phonemes_in_order(sets: dict[str, list[tuple[Sample, Batch]]]) -> None:
    for word, expected in (("six", "SIL S IH K S SIL"), ("no", "SIL N OW SIL"), ("nine", "SIL N AY N SIL")):
        said = Counter[str]()
        for sample, batch in sets["train"]:
            if sample.members["txt"].decode() == word:
                segments = decode_frame_labels(sample, batch.inputs.shape[1])
                assert segments is not None
                said[" ".join(POSITION_CLASSES[label] for label in segments[:, 1])] += 1
        assert said.most_common(1)[0][0] == expected


def test_raw_spectra_find_the_words_and_phonemes_in_part(sets: dict[str, list[tuple[Sample, Batch]]]) -> None:
    words, frames = {}, {}
    for prefix, part in sets.items():
        labelled = [batch for _, batch in part if int(batch.labels) >= 0]
        words[prefix] = Pooled(
            torch.cat([log_mel_pooled(batch) for batch in labelled]), torch.cat([batch.labels for batch in labelled])
        )
        sentences = [batch for _, batch in part if int(batch.labels) < 0][:100]
        known = [batch.position_labels[0] for batch in sentences if batch.position_labels is not None]
        spectra = [log_mel_frames(batch, len(y), 320)[0] for batch, y in zip(sentences, known, strict=True)]
        frames[prefix] = Pooled(torch.cat(spectra)[::_FRAME_STRIDE], torch.cat(known)[::_FRAME_STRIDE])
    mean, std = few_label_accuracy(words["train"], words["validation"], 200, draws=2)
    every = linear_accuracy(words["train"], words["validation"])
    seen = torch.isin(frames["validation"].labels, frames["train"].labels)
    test = frames["validation"].take(torch.nonzero(seen).flatten())
    phonemes = linear_accuracy(frames["train"], test)
    silence = float((test.labels == 0).double().mean())
    print(
        f"\nwords of unseen voices from pooled log-mel: {mean:.1%} ({std:.1%}) from 200 labels, {every:.1%} from 760; "
        f"phonemes from log-mel frames: {phonemes:.1%}, silence alone {silence:.1%}"
    )
    assert 0.5 < mean < 0.75
    assert mean + 0.05 < every < 0.9
    assert silence + 0.15 < phonemes < 0.85


def test_it_is_said_how_to_install_the_synthesiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak, "_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match="uv sync --group demo"):
        write_speech_shards(tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_a_voice_that_is_none_is_one_error() -> None:
    spoken = speak([Utterance("yes", "en"), Utterance("no", "en-gb")])
    assert len(next(spoken).samples) > 1000
    with pytest.raises(SynthesisError, match="espeak-ng failed: it has no voice en-gb"):
        next(spoken)


def test_a_long_path_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 200)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (spoken,) = speak([Utterance("yes", "en")])
    assert len(spoken.samples) > 1000
    assert re.fullmatch(r"'?[a-zA-Z@0-9:]+", spoken.phonemes[0][1])
    assert os.listdir(long) == []
