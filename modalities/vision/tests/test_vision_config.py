"""The settings of images: what they build, and what is said about wrong ones."""

from __future__ import annotations

import pytest
import torch

from data2vec.core.batch import Batch
from data2vec.core.errors import DataError
from data2vec.core.modality import Modality
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind
from data2vec.vision import AugmentConfig, BlockMasker, InverseBlockMasker, MaskConfig, MaskKind, PositionKind, Vision

BASE = TransformerConfig()
TINY = TransformerConfig(depth=2, width=24, heads=3)


def test_the_defaults_are_sound():
    assert Vision().problems(BASE) == []
    assert Vision().grid == (14, 14)
    assert Vision().hidden == 118
    assert Modality.by_name("vision") is Vision


@pytest.mark.parametrize(
    ("vision", "problem"),
    [
        (Vision(image_size=30), "vision.image_size=30: not a multiple of vision.patch_size=16; choose 32 or 16"),
        (Vision(image_size=16), "vision.image_size=16: a single patch, so nothing can be hidden; choose 32 or more"),
        (Vision(patch_size=0), "vision.patch_size=0: must be 1 or more"),
        (Vision(channels=2), "vision.channels=2: choose 3 (RGB) or 1 (grey)"),
        (Vision(channels=1, std=(0.3,)), "vision.mean=[0.485, 0.456, 0.406]: 3 values for vision.channels=1"),
        (Vision(std=(0.2, 0.0, 0.2)), "vision.std=[0.2, 0.0, 0.2]: must be above 0"),
        (Vision(blocks=-1), "vision.blocks=-1: must be 0 or more"),
        (Vision(evaluation_crop=0.0), "vision.evaluation_crop=0.0: must be above 0"),
        (Vision(mask=MaskConfig(ratio=1.0)), "vision.mask.ratio=1.0: must be above 0 and below 1"),
        (Vision(mask=MaskConfig(ratio=0.001, min_block=1)), "vision.mask.ratio=0.001: hides nothing of 196 patches"),
        (
            Vision(mask=MaskConfig(MaskKind.INVERSE_BLOCK, ratio=0.999)),
            "vision.mask.ratio=0.999: hides everything of 196 patches",
        ),
        (Vision(mask=MaskConfig(masks=0)), "vision.mask.masks=0: must be 1 or more"),
        (Vision(mask=MaskConfig(max_block=4)), "vision.mask.max_block=4: below vision.mask.min_block=16"),
        (Vision(mask=MaskConfig(min_block=119)), "vision.mask.min_block=119: more than the 118 of 196 patches"),
        (Vision(mask=MaskConfig(min_aspect=1.5)), "vision.mask.min_aspect=1.5: must be above 0 and at most 1"),
        (Vision(mask=MaskConfig(MaskKind.INVERSE_BLOCK, block=15)), "vision.mask.block=15: larger than the grid"),
        (Vision(predictor=PredictorConfig(PredictorKind.CONV1D)), "vision.predictor.kind=conv1d: images have two"),
        (
            Vision(predictor=PredictorConfig(PredictorKind.CONV2D, groups=5)),
            "vision.predictor.groups=5: does not divide transformer.width=768",
        ),
        (
            Vision(predictor=PredictorConfig(PredictorKind.CONV2D, groups=16, width=100)),
            "vision.predictor.groups=16: does not divide vision.predictor.width=100",
        ),
        (Vision(predictor=PredictorConfig(input_dropout=1.0)), "vision.predictor.input_dropout=1.0: must be from 0"),
        (Vision(augment=AugmentConfig(crop_scale=(0.5, 0.1))), "vision.augment.crop_scale=[0.5, 0.1]: must rise"),
        (Vision(augment=AugmentConfig(flip=2.0)), "vision.augment.flip=2.0: must be from 0 to 1"),
        (Vision(augment=AugmentConfig(translate=-1)), "vision.augment.translate=-1: must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_named(vision, problem):
    found = vision.problems(BASE)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_sine_positions_need_a_width_they_divide():
    vision = Vision(positions=PositionKind.SINE)
    found = vision.problems(TransformerConfig(width=30, heads=3))
    assert found == ["transformer.width=30: vision.positions=sine needs a multiple of 4; choose 28 or 32"]


def test_all_problems_are_listed():
    assert len(Vision(image_size=30, channels=2, mask=MaskConfig(ratio=2.0)).problems(BASE)) == 3
    assert len(Vision(channels=2, blocks=-1, mask=MaskConfig(ratio=2.0)).problems(BASE)) == 3


def test_the_maskers_follow_the_settings():
    block = Vision(mask=MaskConfig(masks=2, max_block=40)).build_masker()
    assert block == BlockMasker(ratio=0.6, max_block=40, masks=2)
    inverse = Vision(mask=MaskConfig(MaskKind.INVERSE_BLOCK, ratio=0.8, masks=16)).build_masker()
    assert inverse == InverseBlockMasker()
    for mask in (MaskConfig(masks=2), MaskConfig(MaskKind.INVERSE_BLOCK, ratio=0.75)):
        vision = Vision(image_size=64, patch_size=8, mask=mask)
        made = vision.build_masker()(torch.arange(3), vision.grid, seed=0, update=0)
        assert made.shape == (3, mask.masks, 64)
        assert (made.sum(-1) == vision.hidden).all()


def test_the_prefix_and_the_norm_are_optional():
    frontend = Vision(image_size=32, patch_size=8, cls_token=False).build_frontend(TINY)
    assert frontend.prefix_tokens == 0
    assert isinstance(frontend.input_norm, torch.nn.Identity)


def test_training_augments_and_evaluation_does_not():
    vision = Vision()
    assert vision.build_decoder(train=True).augment == vision.augment
    assert vision.build_decoder(train=False).augment is None
    assert vision.build_decoder(train=False).crop == 0.875


def test_no_sample_data(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="dependency group 'demo'"):
        Vision().exhibit.write_sample_shards(tmp_path)


def test_raw_features_are_the_pixels():
    batch = Batch("vision", torch.randn(2, 3, 4, 4), torch.arange(2), torch.tensor([0, 1]))
    assert torch.equal(Vision().exhibit.raw_features(batch), batch.inputs.flatten(1))
