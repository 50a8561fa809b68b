"""RandAugment, random erasing and mixtures: as timm makes them, and the same for the same seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data2vec.core.batch import Sample
from data2vec.core.settings.finetuning import MixConfig
from data2vec.core.settings.overrides import apply_overrides, validate
from data2vec.core.settings.pretraining import Experiment
from data2vec.vision import Vision
from data2vec.vision.augment import ImageMixer, random_augment
from data2vec.vision.loader import AugmentConfig, ImageDecoder

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def decoded(channels: int, augment: AugmentConfig, seed: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(PIXELS if channels == 3 else PIXELS[..., 0]).save(file, format="PNG")
    decoder = ImageDecoder(32, channels, (0.5,) * channels, (0.25,) * channels, augment)
    return decoder(Sample("k", "s", 1, {"png": file.getvalue()}), seed).inputs


@pytest.mark.parametrize("channels", [1, 3])
def test_random_augment(channels: int) -> None:
    augment = AugmentConfig(crop_scale=None, flip=0.0, auto_augment="rand-m9-mstd0.5-inc1")
    images = [decoded(channels, augment, seed) for seed in range(40)]  # every step of it, also on grey images
    assert {tuple(image.shape) for image in images} == {(channels, 32, 32)}
    assert len({image.numpy().tobytes() for image in images}) > 20  # each step is left out at random
    assert torch.equal(decoded(channels, augment, 7), images[7])


def test_every_strength_of_every_step() -> None:
    """Also those that Pillow refuses since version 12: zero bits of a posterised image."""
    image = Image.fromarray(PIXELS)
    for strength in range(11):
        transform = random_augment(f"rand-m{strength}-n1-mstd1-inc1", 40, (0.5, 0.5, 0.5))
        for _ in range(60):
            assert transform(image).size == (40, 40)


def test_random_erasing() -> None:
    plain = AugmentConfig(crop_scale=None, flip=0.0, colour_jitter=0.0)
    whole, erased = (decoded(3, AugmentConfig(None, 0, 0.0, 0.0, None, chance), 3) for chance in (0.0, 1.0))
    assert torch.equal(whole, decoded(3, plain, 5))
    changed = (whole != erased).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert 0.02 * 1024 <= int(changed.sum()) <= 0.36 * 1024
    assert int(changed.sum()) == len(rows) * len(columns)  # a rectangle
    assert torch.equal(erased, decoded(3, AugmentConfig(None, 0, 0.0, 0.0, None, 1.0), 3))


@pytest.mark.parametrize("wrong", ["augmix-m3", "rand-q3", "rand-m9-w7", ""])
def test_configurations_that_timm_cannot_read(wrong: str) -> None:
    experiment = Experiment(modalities={"vision": Vision()})
    with pytest.raises(Exception, match="auto_augment"):
        validate(apply_overrides(experiment, [f"vision.augment.auto_augment={wrong or repr(wrong)}"]))


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(0, 1000), st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]))
def test_mixtures_keep_their_shares(samples: int, update: int, alphas: tuple[float, float]) -> None:
    """Labels are mixed in the shares of the images; an odd last image stays; the inputs are not changed."""
    inputs = torch.arange(samples, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    before, targets = inputs.clone(), torch.eye(7)[:samples]
    mixer = ImageMixer(MixConfig(*alphas))
    mixed, shares = mixer(inputs, targets, torch.arange(samples), seed=1, update=update)
    again = mixer(inputs, targets, torch.arange(samples), seed=1, update=update)
    assert torch.equal(mixed, again[0])
    assert torch.equal(inputs, before)
    torch.testing.assert_close(shares.sum(1), torch.ones(samples))
    mean = mixed.mean((1, 2, 3))  # of pixels that are the number of their image
    wanted = shares[:, :samples] @ torch.arange(samples, dtype=torch.float32)
    torch.testing.assert_close(mean, wanted, atol=1e-4, rtol=0)
    if samples % 2:
        assert torch.equal(mixed[-1], inputs[-1])
