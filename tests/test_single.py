"""The encoder of one modality as a plain module: what it gives, and that torch.export can follow it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from data2vec.core.model.encoder import Backbone
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.testing import load_module

scenario = load_module("scenarios_of_single", Path(__file__).with_name("scenarios.py")).scenario
NAMES = ["vision", "vision_v2", "speech", "speech_v2", "text", "text_v2"]
LONGEST = {"speech": 400_000, "text": 24}


def backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    return Data2Vec.build(scenario(name)).student.single(name.partition("_")[0]).eval()


def inputs_of(name: str, samples: int, length: int | None = None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(samples)
    if name.startswith("vision"):
        return (torch.randn(samples, 3, 16, 16, generator=generator),)
    if name.startswith("speech"):
        length = length or 3_000
        x = torch.randn(samples, length, generator=generator)
    else:
        length = length or 20
        x = torch.randint(4, 200, (samples, length), generator=generator)
    lengths = torch.tensor([length - length // 3 * (number % 2) for number in range(samples)])
    return x, lengths


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_the_encoder_gives(name: str) -> None:
    torch.manual_seed(0)
    model = Data2Vec.build(scenario(name)).eval()
    modality = name.partition("_")[0]
    inputs = inputs_of(name, 3)
    single = model.student.single(modality)
    features, padding = single(*inputs)
    expected = model.student.features(modality, *inputs, layers="last")
    valid = torch.ones(features.shape[:2], dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(features[valid], expected.x[valid], rtol=1e-5, atol=1e-6)
    ids = {id(parameter) for parameter in model.student.parameters()}
    assert all(id(parameter) in ids for parameter in single.parameters())  # shared, not copied


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", ["fixed", "batch", "batch and length"])
def test_it_is_exported(name: str, dynamic: str) -> None:
    modality = name.partition("_")[0]
    single, inputs = backbone(name), inputs_of(name, 3)
    batch = Dim("batch", min=1, max=64)
    shapes: dict[str, tuple[dict[int, Dim], ...] | None] = {
        "fixed": None,
        "batch": tuple({0: batch} for _ in inputs),
        "batch and length": ({0: batch}, {0: batch})[: len(inputs)],
    }
    others = [inputs]
    if dynamic != "fixed":
        others += [inputs_of(name, 1), inputs_of(name, 5)]
    if dynamic == "batch and length" and modality != "vision":
        length = Dim("length", min=2 if modality == "text" else 400, max=LONGEST[modality])
        shapes[dynamic] = ({0: batch, 1: length}, {0: batch})
        others += [inputs_of(name, 2, 9 if modality == "text" else 1_777)]
    with torch.no_grad():
        exported = export(single, inputs, dynamic_shapes=shapes[dynamic]).module()
        for some in others:
            features, padding = exported(*some)
            expected, expected_padding = single(*some)
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
            if expected_padding is not None:
                assert torch.equal(padding, expected_padding)
