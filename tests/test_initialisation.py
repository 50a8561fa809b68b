"""Initial weights, also where a random number is the most extreme one that its generator can give."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.testing import load_module

scenario = load_module("scenarios_of_initialisation", Path(__file__).with_name("scenarios.py")).scenario

_LARGEST = 1.8  # the first convolution of speech has a standard deviation of 0.45, all other weights start at most at 1


def _lowest(tensor: Tensor, low: float = 0.0, high: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """What ``Tensor.uniform_`` gives once in 2^24 draws of single precision: its lower bound itself."""
    return tensor.fill_(low)


def _highest(tensor: Tensor, low: float = 0.0, high: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    return tensor.fill_(high)


@pytest.mark.parametrize("extreme", [_lowest, _highest])
def test_truncated_normal_values_stay_within_five_deviations(extreme: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", extreme)
    values = truncated_normal_(torch.empty(64), std=0.02)
    assert values.abs().max() <= 0.1 + 1e-6
    assert values.abs().min() >= 0.09  # and that is what the bound is: the draw was extreme


def test_truncated_normal_values_are_normal() -> None:
    torch.manual_seed(0)
    values = truncated_normal_(torch.empty(400_000), std=0.02) / 0.02
    assert abs(float(values.std()) - 1.0) < 0.005
    for bound in (1.0, 2.0, 3.0):  # a bound of two or three deviations would show here
        share = float((values.abs() > bound).float().mean())
        assert share == pytest.approx(math.erfc(bound / math.sqrt(2.0)), rel=0.1)


@pytest.mark.parametrize("extreme", [_lowest, _highest])
@pytest.mark.parametrize("name", ["vision", "vision_v2", "speech", "speech_v2", "text", "text_v2"])
def test_no_weight_of_a_model_is_an_outlier(name: str, extreme: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", extreme)
    torch.manual_seed(0)
    model = Data2Vec.build(scenario(name))
    largest = {key: float(parameter.detach().abs().max()) for key, parameter in model.named_parameters()}
    outside = {key: value for key, value in largest.items() if not value <= _LARGEST}
    assert outside == {}
