"""Runs that version 0.1.0 began go on, under the settings and from the checkpoints that it wrote.

``earlier_runs`` holds two runs of that version, stopped after 4 of 8 updates, their shards, and the losses of the same
runs without a stop: made with ``tests/scenarios.py``, width 12 and 2 blocks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data2vec.core import load_run
from data2vec.core.run.cli import main
from data2vec.core.settings.overrides import from_yaml
from data2vec.core.training.monitor import read_metrics

EARLIER = Path(__file__).with_name("earlier_runs")
LOSSES = json.loads((EARLIER / "losses.json").read_text())


def trained(name: str, folder: Path) -> list[float]:
    """Losses of a run in ``folder``, trained to its end."""
    experiment = from_yaml(EARLIER / name / "config.yaml")
    shards = EARLIER / "shards" / next(iter(experiment.modalities))
    with pytest.raises(SystemExit) as ended:
        main(experiment, argv=[f"data.train={shards}/train-*.tar", f"train.folder={folder}"])
    assert not ended.value.code
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_run_goes_on(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(EARLIER / name, tmp_path / name)
    losses = trained(name, folder)
    assert losses[:4] == LOSSES[name][:4]
    assert losses[4:] == pytest.approx(LOSSES[name][4:], rel=1e-6)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_run_begins_as_it_did(name: str, tmp_path: Path) -> None:
    """The same draws in the same order for weights, order of samples, masks, noise and dropped layers."""
    assert trained(name, tmp_path / name) == pytest.approx(LOSSES[name], rel=1e-4)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_run_is_loaded(name: str) -> None:
    run = load_run(EARLIER / name, device="cpu")
    assert run.update == 4
