"""Targets: what the norms promise, the top K, padding, and a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.core.pretraining.targets import make_targets, normalise
from data2vec.core.settings.pretraining import TargetNorm

norms = st.sampled_from(TargetNorm)
seeds = st.integers(0, 2**31)
SCALED = {TargetNorm.LAYER: (3, 6, 1), TargetNorm.INSTANCE: (3, 1, 5), TargetNorm.BATCH: (1, 1, 5)}


def random_layers(seed: int, count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator) * (1 + k) + 0.5 * k * torch.randn(shape[-1], generator=generator)
        for k in range(count)
    ]


def random_padding(seed: int, samples: int, length: int) -> Tensor:
    """(B, T) bool: a valid beginning of at least two positions, then padding."""
    lengths = torch.randint(2, length + 1, (samples, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) >= lengths


def standardised(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def reference_norm(x: Tensor, norm: TargetNorm, padding: Tensor) -> Tensor:
    """The group each valid element is normalised in, gathered one by one in float64."""
    x = x.double()
    out = x.clone()
    samples, length, width = x.shape
    valid = [(b, t) for b in range(samples) for t in range(length) if not padding[b, t]]
    groups: list[list[tuple[int, int, int]]] = []
    if norm is TargetNorm.LAYER:
        groups = [[(b, t, d) for d in range(width)] for b, t in valid]
    elif norm is TargetNorm.INSTANCE:
        groups = [[(b, t, d) for b, t in valid if b == sample] for sample in range(samples) for d in range(width)]
    elif norm is TargetNorm.BATCH:
        groups = [[(b, t, d) for b, t in valid] for d in range(width)]
    for group in groups:
        for place, value in zip(group, standardised([float(x[place]) for place in group]), strict=True):
            out[place] = value
    return out


@settings(max_examples=60)
@given(seeds, st.integers(1, 3), norms, norms, st.booleans())
def test_equals_a_plain_reference(
    seed: int, count: int, layer_norm: TargetNorm, mean_norm: TargetNorm, padded: bool
) -> None:
    layers = random_layers(seed, count, 2, 5, 4)
    padding = random_padding(seed, 2, 5) if padded else torch.zeros(2, 5, dtype=torch.bool)
    targets = make_targets(layers, layer_norm=layer_norm, mean_norm=mean_norm, padding=padding if padded else None)
    mean = sum((reference_norm(layer, layer_norm, padding) for layer in layers), torch.zeros(())) / count
    expected = reference_norm(mean, mean_norm, padding)
    assert targets.shape == (2, 5, 4)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets[~padding].double(), expected[~padding], rtol=2e-4, atol=2e-5)


@settings(max_examples=60)
@given(seeds, st.sampled_from(sorted(SCALED)), st.data())
def test_scale_and_shift_of_what_is_normalised_do_not_matter(seed: int, norm: TargetNorm, data: st.DataObject) -> None:
    layers = random_layers(seed, 2, 3, 6, 5)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = SCALED[norm]
    scale = torch.empty(shape).uniform_(0.5, 20.0, generator=generator)
    shift = torch.empty(shape).uniform_(-10.0, 10.0, generator=generator)
    changed = data.draw(st.integers(0, 1))
    others = [scale * layer + shift if k == changed else layer for k, layer in enumerate(layers)]
    before = make_targets(layers, layer_norm=norm, mean_norm=TargetNorm.NONE)
    after = make_targets(others, layer_norm=norm, mean_norm=TargetNorm.NONE)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=2e-3)
    plain = make_targets(others, layer_norm=TargetNorm.NONE, mean_norm=TargetNorm.NONE)
    assert not torch.allclose(
        plain, make_targets(layers, layer_norm=TargetNorm.NONE, mean_norm=TargetNorm.NONE), atol=1e-2
    )


@pytest.mark.parametrize(
    ("norm", "dims"), [(TargetNorm.LAYER, (2,)), (TargetNorm.INSTANCE, (1,)), (TargetNorm.BATCH, (0, 1))]
)
def test_each_norm_acts_over_its_own_axis(norm: TargetNorm, dims: tuple[int, ...]) -> None:
    x = random_layers(0, 2, 3, 6, 5)[1]
    for axes in ((2,), (1,), (0, 1)):
        mean = normalise(x, norm).mean(axes)
        assert bool((mean.abs() < 1e-5).all()) == (axes == dims or (norm is TargetNorm.INSTANCE and axes == (0, 1)))
    variance = normalise(x, norm).var(dims, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-3, atol=1e-3)


@settings(max_examples=40)
@given(seeds, norms)
def test_padding_never_reaches_a_valid_position(seed: int, norm: TargetNorm) -> None:
    layers, padding = random_layers(seed, 2, 3, 6, 4), random_padding(seed, 3, 6)
    noisy = [layer.masked_fill(padding.unsqueeze(-1), 1e4) for layer in layers]
    expected = make_targets(layers, layer_norm=norm, mean_norm=norm, padding=padding)
    found = make_targets(noisy, layer_norm=norm, mean_norm=norm, padding=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(seeds, st.sampled_from([TargetNorm.NONE, TargetNorm.LAYER, TargetNorm.INSTANCE]))
def test_a_padded_batch_gives_the_targets_of_its_samples_alone(seed: int, norm: TargetNorm) -> None:
    layers, padding = random_layers(seed, 2, 3, 6, 4), random_padding(seed, 3, 6)
    together = make_targets(layers, layer_norm=norm, mean_norm=norm, padding=padding)
    for sample in range(3):
        valid = int((~padding[sample]).sum())
        alone = make_targets([layer[sample : sample + 1, :valid] for layer in layers], layer_norm=norm, mean_norm=norm)
        # Two nearly equal positions of a channel: their norm magnifies rounding up to 316 times, 1 / sqrt(1e-5).
        torch.testing.assert_close(together[sample, :valid], alone[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_targets_are_float32_and_as_exact(dtype: torch.dtype) -> None:
    layers = [layer.to(dtype) for layer in random_layers(0, 3, 2, 8, 4)]
    norms = {"layer_norm": TargetNorm.INSTANCE, "mean_norm": TargetNorm.LAYER}
    targets = make_targets(layers, **norms)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, make_targets([layer.float() for layer in layers], **norms))
