"""Values of the recipes that follow the authors' code where their configuration files leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from data2vec.core.testing import load_script

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.mark.parametrize(
    ("name", "scale", "jitter"),
    [
        ("vision_base", (0.08, 1.0), 0.4),  # beit_transforms of the released MaeImageDataset
        ("vision_large", (0.08, 1.0), 0.4),
        ("vision_base_v2", (0.2, 1.0), 0.0),  # its default
        ("vision_large_v2", (0.2, 1.0), 0.0),
    ],
)
def test_crops_and_colours_of_images(name: str, scale: tuple[float, float], jitter: float) -> None:
    module = load_script(EXPERIMENTS / f"{name}.py")
    augment = module.experiment.modalities["vision"].augment
    assert (augment.crop_scale, augment.colour_jitter, augment.flip) == (scale, jitter, 0.5)
    assert module.sample.modalities["vision"].augment.crop_scale is None  # digits are not cropped
