"""Runs that are loaded to be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.run.load import load_run
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.testing import load_module

toy = load_module("toy_series", Path(__file__).with_name("toy.py"))
no_hooks, shards = toy.no_hooks, toy.shards
LENGTH, UPDATES, settings, trained, some_batch = (toy.LENGTH, toy.UPDATES, toy.settings, toy.trained, toy.some_batch)


def test_a_loaded_run_gives_the_features_of_the_trained_model(shards: Path, tmp_path: Path) -> None:
    experiment = settings(tmp_path, shards, checkpoint_every=4)
    trainer, _ = trained(experiment)
    (tmp_path / "config.yaml").write_text(to_yaml(experiment))
    batch = some_batch()
    state = torch.get_rng_state()
    loaded = load_run(tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.update, loaded.experiment) == (UPDATES, experiment)
    for layers in ("top_k", "last", 1):
        for of in ("teacher", "student"):
            expected = trainer.engine.task.features(batch, layers=layers, of=of)
            found = loaded.features(batch.inputs, layers=layers, of=of)
            assert torch.equal(found.x, expected.x)
            assert found.shape == (LENGTH,)
    assert not loaded.model.training
    earlier = load_run(tmp_path / "checkpoints" / "update-000000004", device="cpu")
    assert earlier.update == 4
    assert not torch.equal(earlier.features(batch.inputs).x, loaded.features(batch.inputs).x)


def test_what_cannot_be_loaded_says_why(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no run there \(it has no config.yaml\)"):
        load_run(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("name: toy\n")
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        load_run(tmp_path)
    experiment = settings(tmp_path, shards, updates=3)
    trained(experiment)
    with pytest.raises(ConfigError, match="modalities: none"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(experiment.replace(transformer={"mlp_ratio": 1.0})))
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_run(tmp_path)
