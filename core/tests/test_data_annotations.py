"""Members of samples that a task reads as they are, and samples chosen by them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from data2vec.core.data.dataset import TrainData
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.settings.fields import DataConfig
from data2vec.core.testing import load_module

pipeline = load_module("pipeline_of_annotations", Path(__file__).with_name("test_data_pipeline.py"))
SAMPLES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    """Numbers, every third without a text."""
    folder = tmp_path_factory.mktemp("annotated")
    with ShardWriter(folder, "train", "numbers", samples_per_shard=7) as writer:
        for i in range(SAMPLES):
            text = {} if i % 3 == 0 else {"txt": f"text {i}".encode()}
            writer.write(f"{i:04d}", {"num": str(i).encode(), **text})
    config = DataConfig(workers=0, shuffle_shards=3)
    return TrainData.open(str(folder), pipeline.Numbers(), data=config, seed=0, cache=folder / "cache")


def test_they_are_read_without_the_rest(data: TrainData) -> None:
    found = [members for shard in data.annotations("txt", "value") for members in shard]
    assert found == [{} if i % 3 == 0 else {"txt": f"text {i}".encode()} for i in range(SAMPLES)]


def test_samples_are_chosen_by_them(data: TrainData) -> None:
    chosen = data.chosen_of([["txt" in members for members in shard] for shard in data.annotations("txt")])
    wanted = [i for i in range(SAMPLES) if i % 3]
    assert chosen.total == len(wanted)
    assert chosen.fingerprint != data.fingerprint
    assert pipeline.numbers(list(chosen.for_evaluation().evaluation_batches(8))) == wanted
    (batch,) = islice(chosen.batches(0, chosen.total), 1)
    assert sorted(pipeline.numbers([batch])) == wanted
    again = chosen.chosen_of([[i == 0 for i in range(len(shard))] for shard in chosen.annotations()])
    assert pipeline.numbers(list(again.for_evaluation().evaluation_batches(99))) == [1, 7, 14, 22, 28, 35]


def test_batches_keep_what_they_are_asked_to(data: TrainData) -> None:
    config = {"shards": data.shards, "modality": data.modality, "config": data.config, "seed": 0}
    kept = TrainData(**config, chosen=data.chosen, keep=("txt", "value"))
    assert not next(data.batches(0, 8)).annotations
    for batch in (next(kept.batches(0, 8)), *kept.for_evaluation().evaluation_batches(8)):
        expected = tuple(None if i % 3 == 0 else f"text {i}".encode() for i in pipeline.numbers([batch]))
        assert batch.annotations == {"txt": expected, "value": (None,) * len(batch)}
    train, held = kept.hold_out(0.2)
    assert (train.keep, held.keep) == (kept.keep, kept.keep)
