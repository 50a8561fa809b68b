"""Probes of single positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.errors import DataError
from data2vec.core.evaluation.positions import PER_SAMPLE, position_features
from data2vec.core.evaluation.probe import EvaluationResult, evaluate, with_positions
from data2vec.core.settings.pretraining import EvaluationConfig

CLASSES, WIDTH = 4, 6


def batch_of(samples: int, positions: int, *, seed: int, labelled: bool = True) -> Batch:
    """Inputs (B, T, D) around a centre of each position's class; a tenth of the positions without a label."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(CLASSES, (samples, positions), generator=generator)
    inputs = centres[classes] + torch.randn(samples, positions, WIDTH, generator=generator)
    classes = classes.masked_fill(torch.rand(samples, positions, generator=generator) < 0.1, -1)
    labels = torch.arange(samples) % 2
    return Batch("toy", inputs, torch.arange(samples), labels, position_labels=classes if labelled else None)


def same(batch: Batch) -> Tensor:
    return batch.inputs


def noise(batch: Batch) -> Tensor:
    return torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(int(batch.ids.sum())))


def test_only_labelled_positions_are_taken_and_every_encoder_gets_the_same() -> None:
    batch = batch_of(10, 40, seed=0)
    features = position_features({"same": same, "double": lambda b: 2 * b.inputs}, [batch], max_positions=1000)
    assert features is not None
    one = features["same"]
    assert len(one) == 10 * PER_SAMPLE
    assert int(one.labels.min()) == 0
    assert torch.equal(features["double"].x, 2 * one.x)
    assert batch.position_labels is not None
    for x, label in zip(one.x, one.labels, strict=True):
        place = (batch.inputs == x).all(-1).nonzero()
        assert batch.position_labels[tuple(place[0])] == label
    few = position_features({"same": same}, [batch, batch], max_positions=25)
    assert few is not None
    assert len(few["same"]) == 25


def test_the_probe_tells_classes_apart_where_features_do() -> None:
    sets = [
        position_features({"same": same, "noise": noise}, [batch_of(60, 30, seed=s)], max_positions=800) for s in (1, 2)
    ]
    table = evaluate(
        *({"same": f["same"], "noise": f["noise"]} for f in sets if f is not None), EvaluationConfig(tasks=("rank",))
    )
    assert table.row("same") == dataclasses.replace(table.rows[0], positions=None)
    probed = with_positions(table, *sets)
    good, bad = probed.row("same"), probed.row("noise")
    assert good is not None
    assert bad is not None
    assert good.positions is not None
    assert bad.positions is not None
    assert good.positions > 0.9
    assert bad.positions < 0.4
    assert (probed.position_classes, probed.position_samples) == (CLASSES, 800)
    assert "positions, 4 classes" in probed.cells()[0]
    assert EvaluationResult.from_json(probed.to_json()) == probed


def test_without_labels_there_is_a_note() -> None:
    assert position_features({"same": same}, [batch_of(3, 5, seed=0, labelled=False)], max_positions=10) is None
    table = EvaluationResult(rows=(), neighbours=1, few_labels=1, train_samples=1, test_samples=1)
    assert "no labels of positions" in with_positions(table, None, None).notes[0]


def test_labels_of_another_grid_are_refused() -> None:
    with pytest.raises(DataError, match="another grid"):
        position_features({"half": lambda b: b.inputs[:, ::2]}, [batch_of(3, 6, seed=0)], max_positions=10)
