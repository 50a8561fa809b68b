"""The components picture of many images shows content, not places."""

from __future__ import annotations

import numpy as np
import torch

from data2vec.vision.panels import _components


def test_what_all_images_share_at_a_position_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    places = 10.0 * torch.randn(1, 16, 8, generator=generator)
    contents = torch.randn(40, 1, 8, generator=generator).expand(40, 16, 8)
    colours = _components(places + contents, by_position=True).astype(int)
    assert np.ptp(colours, axis=1).max() <= 1  # one colour for each image, whatever the place
    assert np.ptp(colours, axis=0).max() > 200
    shown_places = _components(places + contents).astype(int)
    assert np.ptp(shown_places, axis=1).min() > 100
