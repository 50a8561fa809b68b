"""Runs that start from a model for images of another size or texts of another length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data2vec.core import Data2Vec, Experiment, main
from data2vec.core.errors import CheckpointError
from data2vec.core.overrides import to_yaml
from data2vec.core.testing import load_module
from data2vec.core.training import checkpoint

scenarios = load_module("scenarios_of_other_sizes", Path(__file__).with_name("scenarios.py"))
scenario = scenarios.scenario

LARGER = {"vision": {"image_size": 24}, "text": {"block": 40}}
LINES = {
    "vision": "vision: positions of 4 x 4 resampled to 6 x 6",
    "text": "text: positions of 24 tokens repeated to 40",
}
POSITIONS = {
    "vision": "frontends.vision.bias.table",
    "vision_v2": "frontends.vision.extractor.positions.positions",
    "text": "frontends.text.extractor.positions.weight",
    "text_v2": "frontends.text.extractor.positions.weight",
}


def trained(experiment: Experiment) -> Data2Vec:
    """A model whose weights and positions are none that a new one begins with."""
    model = Data2Vec.build(experiment)
    with torch.no_grad():
        for value in model.student.state_dict().values():
            value.add_(0.1 * torch.randn_like(value))
    return model


def state_of(model: Data2Vec, name: str) -> Tensor:
    value: Tensor = model.student.state_dict()[name]
    return value


@pytest.mark.parametrize("name", ["vision", "vision_v2", "text", "text_v2"])
def test_positions_are_made_to_fit_and_all_else_is_taken_as_it_is(name: str) -> None:
    kind = name.partition("_")[0]
    old = trained(scenario(name))
    new = Data2Vec.build(scenario(name).replace(**{kind: LARGER[kind]}))
    assert new.start_from(old.own_state()) == [LINES[kind]]
    for key, value in new.student.state_dict().items():
        if key == POSITIONS[name]:
            assert value.shape != state_of(old, key).shape
            assert float(value.std()) == pytest.approx(float(state_of(old, key).std()), rel=0.4)
        else:
            assert torch.equal(value, state_of(old, key)), key
        assert torch.equal(new.teacher.encoder.state_dict()[key], value), key
    again = Data2Vec.build(scenario(name))
    assert again.start_from(old.own_state()) == []
    assert torch.equal(state_of(again, POSITIONS[name]), state_of(old, POSITIONS[name]))


def test_images_of_another_size_are_seen_through_the_resampled_positions() -> None:
    """What a model computes for larger images, it computes too when it was made for them."""
    old = trained(scenario("vision")).eval()
    new = Data2Vec.build(scenario("vision").replace(vision=LARGER["vision"])).eval()
    new.start_from(old.own_state())
    images = torch.randn(2, 3, 24, 24)
    for model in (old, new):
        tokens = model.student.frontend("vision").extractor(images)
        encoded = model.student("vision", tokens.x, tokens.shape)
        if model is old:
            right = encoded.x
    torch.testing.assert_close(encoded.x, right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"image_size": 24, "patch_size": 2}}, r"extractor\.embed\.proj\.weight is \(20, 3, 4, 4\) there"),
        ({"vision": {"image_size": 24}, "transformer": {"heads": 4}}, r"bias\.table is \(52, 2\) there and \(124, 4\)"),
        ({"vision": {"image_size": 24}, "transformer": {"depth": 2}}, r"blocks\.2\..* has no place here"),
    ],
)
def test_all_else_that_does_not_fit_is_one_error(changes: dict[str, Any], message: str) -> None:
    model = Data2Vec.build(scenario("vision").replace(**changes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        model.start_from(Data2Vec.build(scenario("vision")).own_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_run_says_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, shards = tmp_path / "old", scenarios.write_shards(tmp_path / "shards" / name, name, 12).parent
    old.mkdir()
    (old / "config.yaml").write_text(to_yaml(scenario(name)))
    state = {"model": trained(scenario(name)).own_state()}
    checkpoint.save(old / "checkpoints", 1, checkpoint.Checkpoint(state, {}), keep=1)
    experiment = scenarios.run_of(name, shards, tmp_path / "new").replace(
        **{name: LARGER[name]}, train={"init_from": str(old), "updates": 5}, evaluation={"max_samples": 8}
    )
    with pytest.raises(SystemExit) as ended:
        main(experiment, None, argv=[])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert out.count(LINES[name]) == 1
