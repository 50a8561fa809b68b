"""The report's pictures of images."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Illustrations, Panel
from data2vec.vision.panels import panels


def _drawn(channels: int, side: int, patch: int, masks: int, width: int = 6, samples: int = 10) -> Illustrations:
    generator = torch.Generator().manual_seed(side)
    grid = side // patch
    images = torch.rand(samples, channels, side, side, generator=generator)
    mask = torch.rand(samples, masks, grid * grid, generator=generator).argsort(-1) < grid * grid // 2
    batch = Batch("vision", (images - 0.5) / 0.25, torch.arange(samples), torch.zeros(samples).long())
    return Illustrations(batch, mask, torch.randn(samples, grid * grid, width, generator=generator), (grid, grid))


def _pictures(panel: Panel) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', panel.html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in found]


def _draw(drawn: Illustrations, patch: int) -> list[Panel]:
    channels = drawn.batch.inputs.shape[1]
    return panels(drawn, mean=(0.5,) * channels, std=(0.25,) * channels, patch=patch)


@pytest.mark.parametrize(("channels", "side", "patch"), [(1, 28, 4), (3, 32, 8), (3, 224, 56)])
def test_visible_patches_are_the_image_and_hidden_ones_are_not(channels: int, side: int, patch: int) -> None:
    drawn = _drawn(channels, side, patch, 1)
    pictures = _pictures(_draw(drawn, patch)[0])
    assert len(pictures) == 16
    original, masked = pictures[0], pictures[1]
    factor = original.shape[0] // side
    expected = (drawn.batch.inputs[0] * 0.25 + 0.5).expand(3, -1, -1).permute(1, 2, 0).numpy() * 255
    assert np.abs(original[::factor, ::factor] - expected).max() <= 1
    hidden = drawn.mask[0, 0].reshape(drawn.shape).numpy().repeat(patch * factor, 0).repeat(patch * factor, 1)
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert set(masked[hidden].ravel().tolist()) == {202, 226}


@pytest.mark.parametrize(("masks", "shown"), [(2, 2), (8, 4)])
def test_several_masks_stand_beside_the_original(masks: int, shown: int) -> None:
    panel = _draw(_drawn(3, 32, 8, masks), 8)[0]
    assert len(_pictures(panel)) == 8 * (1 + shown)
    assert f"under {masks} masks" in panel.caption


def test_like_features_have_like_colours() -> None:
    drawn = _drawn(3, 32, 8, 1)
    half = torch.arange(16) < 8
    direction = torch.randn(6)
    features = torch.where(half[None, :, None], direction, -direction).expand(10, 16, 6)
    picture = _pictures(_draw(Illustrations(drawn.batch, drawn.mask, features, drawn.shape), 8)[1])[1]
    top, bottom = picture[: picture.shape[0] // 2], picture[picture.shape[0] // 2 :]
    assert len(np.unique(top.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(bottom.reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(top[0, 0], bottom[0, 0])


@pytest.mark.parametrize("width", [1, 2])
def test_fewer_than_three_dimensions(width: int) -> None:
    assert len(_pictures(_draw(_drawn(1, 8, 4, 1, width=width, samples=1), 4)[1])) == 2


def test_features_without_variance_show_no_pattern() -> None:
    drawn = _drawn(3, 32, 8, 1)
    flat = Illustrations(drawn.batch, drawn.mask, torch.ones(10, 16, 6), drawn.shape)
    picture = _pictures(_draw(flat, 8)[1])[1]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not cover"):
        _draw(_drawn(3, 32, 8, 1), 4)
